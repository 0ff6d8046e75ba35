"""Meshes: what they are, how an answer says them, and those that no step can have."""

import pytest

from dryfit.common.errors import UserError
from dryfit.scenario.contradictions import TRAINING, contradictions
from dryfit.scenario.description import say_parallel
from dryfit.scenario.scenario import Scenario
from tests.dryfit.tracing.several_gpus import LLAMA

MOE = LLAMA | {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


def made(parallel, **fields):
    mapping = {"model": LLAMA, "method": "full", "precision": "fp32", "sequence_length": 64, "micro_batch": 2}
    return Scenario.from_mapping(mapping | fields | {"parallel": parallel})


GOOD = {
    "tensor alone": ({"strategy": "none", "gpus": 2, "tensor": 2}, {}, (1, 1)),
    "shards beside": ({"strategy": "fsdp2", "gpus": 8, "tensor": 2}, {}, (4, 4)),
    "replicas": ({"strategy": "fsdp2", "gpus": 8, "replicate": 2}, {}, (4, 8)),
    "context": ({"strategy": "fsdp2", "gpus": 8, "context": 4}, {}, (2, 2)),
    "pipeline": (
        {"strategy": "none", "gpus": 4, "pipeline": 2, "tensor": 2},
        {"gradient_accumulation": 2},
        (1, 1),
    ),
    "uneven stages": (
        {"strategy": "none", "gpus": 2, "pipeline": 2, "stage_layers": [2, 1]},
        {"gradient_accumulation": 2},
        (1, 1),
    ),
    "experts": ({"strategy": "fsdp2", "gpus": 6, "expert": 3}, {"model": MOE}, (6, 6)),
    "parts of rows, each in turn": ({"strategy": "zero3", "gpus": 8, "ulysses": 2}, {"method": "lora"}, (4, 4)),
    "more parts than heads of keys": ({"strategy": "zero2", "gpus": 4, "ulysses": 4}, {}, (1, 1)),
    "sequence parallel": (
        {"strategy": "fsdp2", "gpus": 8, "tensor": 2, "sequence_parallel": True, "offload": "cpu"},
        {"attention": "mem_efficient"},
        (4, 4),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_mesh_leaves_the_rest_to_fsdp(name):
    parallel, fields, (shard, rows) = GOOD[name]
    step = made(parallel, **fields)
    assert (step.parallel.shard, step.parallel.rows_at_once) == (shard, rows)
    assert Scenario.from_mapping(step.to_mapping()) == step


# By name: parts of `parallel`, other fields, a word of the message, what to write.
BAD = {
    "product": ({"gpus": 6, "tensor": 4}, {"model": LLAMA | {"num_key_value_heads": 4}}, "is no multiple", "gpus: 8"),
    "product without shards": ({"strategy": "none", "gpus": 4, "tensor": 2}, {}, "`parallel.gpus` says 4", "fsdp2"),
    "more places than gpus": ({"strategy": "none", "gpus": 1, "tensor": 2}, {}, "`parallel.gpus` says 1", "gpus: 2"),
    "heads": ({"gpus": 8, "tensor": 8}, {}, "does not divide the attention heads, 4", "tensor: 2"),
    "heads of keys": ({"gpus": 4, "tensor": 4}, {}, "does not divide the heads of keys and values, 2", "tensor: 2"),
    "columns": (
        {"gpus": 2, "tensor": 2},
        {"model": LLAMA | {"intermediate_size": 351}},
        "does not divide the columns of the MLP, 351",
        "tensor: 1",
    ),
    "tokens": ({"gpus": 2, "context": 2}, {"sequence_length": 62}, "can't be split", "sequence_length: 64"),
    "sliding window": (
        {"gpus": 2, "context": 2},
        {"model": LLAMA | {"model_type": "mistral", "sliding_window": 32}},
        "sliding-window",
        "context: 1",
    ),
    "attention under context": (
        {"gpus": 2, "context": 2},
        {"attention": "eager"},
        "needs scaled_dot",
        "attention: sdpa",
    ),
    "context without fsdp": ({"strategy": "none", "gpus": 2, "context": 2}, {}, "needs `parallel.strategy", "fsdp2"),
    "stages": (
        {"strategy": "none", "gpus": 4, "pipeline": 4},
        {"gradient_accumulation": 4},
        "more stages than the model has layers, 3",
        "pipeline: 3",
    ),
    "stages of interleaved": (
        {"strategy": "none", "gpus": 2, "pipeline": 2, "schedule": "interleaved"},
        {"gradient_accumulation": 2},
        "A pipeline of 4 stages",
        "pipeline: 1",
    ),
    "layers of other stages": (
        {"strategy": "none", "gpus": 2, "pipeline": 2, "stage_layers": [1, 1, 1]},
        {"gradient_accumulation": 2},
        "names 3 stages, and the pipeline has 2",
        "stage_layers: [2, 1]",
    ),
    "too few layers": (
        {"strategy": "none", "gpus": 2, "pipeline": 2, "stage_layers": [1, 1]},
        {"gradient_accumulation": 2},
        "its layers are 2, and the model has 3",
        "stage_layers: [2, 1]",
    ),
    "a stage without layers": (
        {"strategy": "none", "gpus": 2, "pipeline": 2, "stage_layers": [3, 0]},
        {"gradient_accumulation": 2},
        "every stage has one layer or more",
        "stage_layers: [2, 1]",
    ),
    "layers of stages alone": (
        {"gpus": 2, "stage_layers": [2, 1]},
        {},
        "is of a pipeline",
        "stage_layers: null",
    ),
    "micro-batches": ({"strategy": "none", "gpus": 2, "pipeline": 2}, {}, "micro-batches", "gradient_accumulation: 2"),
    "tied head": (
        {"strategy": "none", "gpus": 2, "pipeline": 2},
        {"gradient_accumulation": 2, "model": LLAMA | {"tie_word_embeddings": True}},
        "tie_word_embeddings",
        "pipeline: 1",
    ),
    "pipeline with fsdp": (
        {"gpus": 4, "pipeline": 2},
        {"gradient_accumulation": 2},
        "transformers refuses FSDP inside a pipeline",
        "strategy: none, gpus: 2",
    ),
    "pipeline with experts": (
        {"gpus": 4, "pipeline": 2, "expert": 2},
        {"gradient_accumulation": 2, "model": MOE},
        "transformers refuses to send tokens to experts",
        "expert: 1",
    ),
    "context with tensor": ({"gpus": 4, "context": 2, "tensor": 2}, {}, "imports a name", "tensor: 1"),
    "experts": ({"gpus": 4, "expert": 4}, {"model": MOE}, "does not divide the experts, 6", "expert: 3"),
    "experts on other gpus": ({"gpus": 4, "expert": 3}, {"model": MOE}, "has to be a multiple", "expert: 4"),
    "no experts": ({"gpus": 2, "expert": 2}, {}, "this model has none", "expert: 1"),
    "replicas of everything": ({"gpus": 4, "replicate": 4}, {}, "leaves no GPUs to shard among", "strategy: ddp"),
    "replicas of parts of rows": ({"gpus": 4, "replicate": 2, "context": 2}, {}, "leaves no GPUs", "replicate: 1"),
    "ddp": ({"strategy": "ddp", "gpus": 4, "tensor": 2}, {}, "not predicted together", "strategy: fsdp2"),
    "schedule alone": ({"gpus": 2, "schedule": "gpipe"}, {}, "is of a pipeline", "schedule: 1f1b"),
    "packed weights": ({"gpus": 2, "tensor": 2}, {"method": "qlora"}, "bytes without rows", "method: lora"),
    "other adapters": (
        {"gpus": 2, "tensor": 2},
        {"method": "lora", "adapter": {"peft_type": "IA3", "target_modules": ["k_proj"]}},
        "peft_type IA3 can't be combined",
        "peft_type: LORA",
    ),
    "more than factors": (
        {"gpus": 2, "tensor": 2},
        {"method": "lora", "adapter": {"peft_type": "LORA", "use_dora": True, "target_modules": "all-linear"}},
        "an adapter with use_dora",
        "peft_type: LORA",
    ),
    "adapters in stages": (
        {"strategy": "none", "gpus": 4, "pipeline": 2, "tensor": 2},
        {"method": "lora", "gradient_accumulation": 2},
        "not predicted together",
        "method: full",
    ),
    "adapters and experts": (
        {"gpus": 2, "expert": 2},
        {"model": MOE, "method": "lora"},
        "stay whole",
        "method: full",
    ),
    "one tensor": (
        {"gpus": 2, "tensor": 2},
        {"model": LLAMA | {"tie_word_embeddings": True}},
        "The output head of this model",
        "tensor: 1",
    ),
    "offload": ({"gpus": 2, "tensor": 2, "offload": "cpu"}, {}, "accelerate's FSDP2", "offload: none"),
    "wide sums": (
        {"gpus": 4, "tensor": 2, "reduce_in_fp32": True},
        {"precision": "fp16"},
        "gathers weights in bf16",
        "reduce_in_fp32: false",
    ),
    "gathered weights kept": (
        {"gpus": 2, "tensor": 2, "reshard_after_forward": False},
        {},
        "is accelerate's",
        "reshard_after_forward: true",
    ),
    "sequence parallel alone": ({"gpus": 2, "sequence_parallel": True}, {}, "`parallel.tensor` says 1", "false"),
    "loss parallel alone": ({"gpus": 2, "loss_parallel": True}, {}, "`parallel.tensor` says 1", "false"),
    "sequence parallel of experts": (
        {"gpus": 6, "tensor": 2, "expert": 6, "sequence_parallel": True},
        {"model": MOE},
        "the plan is followed for dense models",
        "sequence_parallel: false",
    ),
    "float8 in a pipeline": (
        {"strategy": "none", "gpus": 4, "tensor": 2, "pipeline": 2, "sequence_parallel": True},
        {"gradient_accumulation": 2, "float8": "rowwise"},
        "`float8: rowwise` and a mesh",
        "float8: none",
    ),
    "tokens of sequence parallel": (
        {"gpus": 2, "tensor": 2, "sequence_parallel": True},
        {"sequence_length": 63},
        "can't be divided among `parallel.tensor: 2`",
        "sequence_length: 64",
    ),
    "a mask under sequence parallel": (
        {"gpus": 2, "tensor": 2, "sequence_parallel": True},
        {"attention": "eager"},
        "needs that mask",
        "attention: sdpa",
    ),
    "a window under sequence parallel": (
        {"gpus": 2, "tensor": 2, "sequence_parallel": True},
        {"model": LLAMA | {"model_type": "mistral", "sliding_window": 32}},
        "sliding-window",
        "sequence_parallel: false",
    ),
    "ulysses with fsdp": ({"gpus": 2, "ulysses": 2}, {}, "needs DeepSpeed's ZeRO", "strategy: zero3"),
    "ulysses with tensor": (
        {"strategy": "zero3", "gpus": 4, "ulysses": 2, "tensor": 2},
        {},
        "can't be combined with tensor",
        "tensor: 1",
    ),
    "gpus of ulysses": ({"strategy": "zero3", "gpus": 3, "ulysses": 2}, {}, "is no multiple", "gpus: 4"),
    "heads of ulysses": ({"strategy": "zero3", "gpus": 8, "ulysses": 8}, {}, "attention heads, 4", "ulysses: 4"),
    "heads of keys of ulysses": (
        {"strategy": "zero2", "gpus": 6, "ulysses": 6},
        {"model": LLAMA | {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 32}},
        "the heads of keys and values, 4",
        "ulysses: 4",
    ),
    "tokens of ulysses": (
        {"strategy": "zero2", "gpus": 2, "ulysses": 2},
        {"sequence_length": 63},
        "can't be divided among `parallel.ulysses: 2`",
        "sequence_length: 64",
    ),
    "a mask under ulysses": (
        {"strategy": "zero2", "gpus": 2, "ulysses": 2},
        {"attention": "eager"},
        "DeepSpeed refuses `attention: eager`",
        "attention: sdpa",
    ),
    "float8 by transformers' plan": (
        {"gpus": 2, "tensor": 2},
        {"float8": "rowwise"},
        "`float8: rowwise` and a mesh",
        "float8: none",
    ),
    "float8 under zero": ({"strategy": "zero3", "gpus": 2}, {"float8": "rowwise"}, "with FSDP2", "float8: none"),
    "gathered in 8 bits without float8": (
        {"gpus": 2, "float8_all_gather": True},
        {"float8": "rowwise"},
        "that `float8: tensorwise` casts",
        "float8_all_gather: false",
    ),
    "a whole model compiled": ({"gpus": 2, "context": 2}, {"compile": "model"}, "a mesh", "compile: none"),
    "compiled by transformers' plan": ({"gpus": 2, "tensor": 2}, {"compile": "layers"}, "a mesh", "compile: none"),
    "compiled without shards": (
        {"strategy": "none", "gpus": 2, "tensor": 2, "sequence_parallel": True},
        {"compile": "layers"},
        "a mesh",
        "compile: none",
    ),
    "packing": ({"gpus": 2, "context": 2}, {"packing": "rows"}, "`packing: rows` and a mesh", "packing: none"),
    "loss": ({"strategy": "none", "gpus": 2, "tensor": 2}, {"loss": "chunked"}, "a mesh", "loss: full"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mesh_that_no_step_can_have(name):
    parallel, fields, said, write = BAD[name]
    with pytest.raises(UserError) as caught:
        made({"strategy": "fsdp2"} | parallel, **fields)
    assert said in str(caught.value) and write in str(caught.value)


def test_what_an_answer_says_of_a_mesh():
    step = made({"strategy": "fsdp2", "gpus": 8, "tensor": 2, "replicate": 2})
    assert say_parallel(step.to_mapping()["parallel"], {}) == "fsdp2 x replicate 2 x tensor 2 on 8 GPUs"
    step = made({"strategy": "none", "gpus": 2, "pipeline": 2, "schedule": "gpipe"}, gradient_accumulation=2)
    assert say_parallel(step.to_mapping()["parallel"], {}) == "pipeline 2 x schedule gpipe on 2 GPUs"

    step = made({"strategy": "fsdp2", "gpus": 4, "tensor": 2, "sequence_parallel": True, "loss_parallel": True})
    assert say_parallel(step.to_mapping()["parallel"], {}) == "fsdp2 x tensor 2 x sequence x loss on 4 GPUs"


TRAINED = {"tensor": 2}, {"context": 2}, {"replicate": 2, "gpus": 4}, {"tensor": 2, "gpus": 4}
NOT_TRAINED = {"strategy": "none", "pipeline": 2}, {"tensor": 2, "offload": "none", "reduce_in_fp32": True}


@pytest.mark.parametrize("mesh", TRAINED)
def test_meshes_that_the_pipeline_trains(mesh):
    step = made({"strategy": "fsdp2", "gpus": 2} | mesh, method="lora")
    assert not list(contradictions(step, "training", TRAINING, {"on_out_of_memory": "stop"}))


@pytest.mark.parametrize("mesh", NOT_TRAINED)
def test_meshes_that_are_predicted_and_not_trained(mesh):
    step = made({"strategy": "fsdp2", "gpus": 2} | mesh, precision="bf16", gradient_accumulation=2)
    (problem,) = contradictions(step, "training", TRAINING, {"on_out_of_memory": "stop"})
    assert "can be predicted" in str(problem)


def test_which_rows_each_gpu_takes():
    """The libraries' meshes: GPUs of tensor and context are neighbours, those of a pipeline farthest apart."""
    shares = {
        ("fsdp2", 4, "tensor"): [0, 0, 1, 1],
        ("fsdp2", 4, "context"): [0, 0, 1, 1],
        ("none", 2, "tensor"): [0, 0],
    }
    for (strategy, gpus, axis), expected in shares.items():
        parallel = made({"strategy": strategy, "gpus": gpus, axis: 2}).parallel
        assert [parallel.rows_of(rank) for rank in range(gpus)] == expected
        averaged = {"tensor": gpus // 2, "context": gpus}[axis]
        assert parallel.averaged == averaged
    staged = made({"strategy": "none", "gpus": 4, "pipeline": 2, "tensor": 2}, gradient_accumulation=2).parallel
    assert {staged.rows_of(rank) for rank in range(4)} == {0}
