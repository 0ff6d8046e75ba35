"""Meshes: what they are, how an answer says them, and those that no step can have."""

import pytest

from dryfit.common.errors import UserError
from dryfit.scenario.contradictions import TRAINING, contradictions
from dryfit.scenario.description import say_parallel
from dryfit.scenario.scenario import Scenario
from tests.dryfit.scenario.refusals import refusals
from tests.dryfit.tracing.several_gpus import LLAMA

MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
}


def made(parallel, **fields):
    mapping = {
        "model": LLAMA,
        "method": "full",
        "precision": "fp32",
        "sequence_length": 64,
        "micro_batch": 2,
    }
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
    "parts of rows, each in turn": (
        {"strategy": "zero3", "gpus": 8, "ulysses": 2},
        {"method": "lora"},
        (4, 4),
    ),
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
BAD = refusals("wrong_meshes", LLAMA=LLAMA, MOE=MOE)


@pytest.mark.parametrize("name", BAD)
def test_a_mesh_that_no_step_can_have(name):
    parallel, fields, said, write = BAD[name]
    with pytest.raises(UserError) as caught:
        made({"strategy": "fsdp2"} | parallel, **fields)
    assert said in str(caught.value) and write in str(caught.value)


def test_what_an_answer_says_of_a_mesh_and_which_rows_each_gpu_takes():
    step = made({"strategy": "fsdp2", "gpus": 8, "tensor": 2, "replicate": 2})
    assert (
        say_parallel(step.to_mapping()["parallel"], {})
        == "fsdp2 x replicate 2 x tensor 2 on 8 GPUs"
    )
    step = made(
        {"strategy": "none", "gpus": 2, "pipeline": 2, "schedule": "gpipe"}, gradient_accumulation=2
    )
    assert (
        say_parallel(step.to_mapping()["parallel"], {}) == "pipeline 2 x schedule gpipe on 2 GPUs"
    )

    step = made(
        {
            "strategy": "fsdp2",
            "gpus": 4,
            "tensor": 2,
            "sequence_parallel": True,
            "loss_parallel": True,
        }
    )
    assert (
        say_parallel(step.to_mapping()["parallel"], {})
        == "fsdp2 x tensor 2 x sequence x loss on 4 GPUs"
    )
    # The libraries' meshes: GPUs of tensor and context are neighbours, those of a pipeline farthest apart.
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
    staged = made(
        {"strategy": "none", "gpus": 4, "pipeline": 2, "tensor": 2}, gradient_accumulation=2
    ).parallel
    assert {staged.rows_of(rank) for rank in range(4)} == {0}


TRAINED = {"tensor": 2}, {"context": 2}, {"replicate": 2, "gpus": 4}, {"tensor": 2, "gpus": 4}
NOT_TRAINED = (
    {"strategy": "none", "pipeline": 2},
    {"tensor": 2, "offload": "none", "reduce_in_fp32": True},
)


@pytest.mark.parametrize("mesh", TRAINED)
def test_meshes_that_the_pipeline_trains(mesh):
    step = made({"strategy": "fsdp2", "gpus": 2} | mesh, method="lora")
    assert not list(contradictions(step, "training", TRAINING, {"on_out_of_memory": "stop"}))


@pytest.mark.parametrize("mesh", NOT_TRAINED)
def test_meshes_that_are_predicted_and_not_trained(mesh):
    step = made({"strategy": "fsdp2", "gpus": 2} | mesh, precision="bf16", gradient_accumulation=2)
    (problem,) = contradictions(step, "training", TRAINING, {"on_out_of_memory": "stop"})
    assert "can be predicted" in str(problem)
