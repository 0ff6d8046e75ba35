"""A scenario is checked field by field; each message names the field, the value and the corrected line."""

import json
from dataclasses import fields

import pytest

from dryfit.common.errors import UserError
from dryfit.readers.request import read_request
from dryfit.scenario.fields import FIELDS, scenario_defaults
from dryfit.scenario.model import MODELS
from dryfit.scenario.scenario import Scenario, rows_in_a_step
from dryfit.scenario.value_fields import Quantization

SMALL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
}


def make(**fields) -> Scenario:
    return Scenario.from_mapping({"model": SMALL, **fields}, where="test.yaml")


def test_defaults_come_from_the_configuration() -> None:
    scenario, defaults = make(), scenario_defaults()
    assert (scenario.method, scenario.sequence_length) == (defaults["method"], defaults["sequence_length"])
    assert scenario.lora.rank == defaults["lora"]["rank"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "full", "precision": "bf16-mixed"},
        {"method": "lora", "lora": {"rank": 8, "target_modules": ["q_proj", "v_proj"]}},
        {"gpu": {"vram_gib": 24}},
        {"gpu": {"name": "rtx-3090", "count": 2}},
        {"gpu": {"vram_gib": 24, "count": 2}, "parallel": {"strategy": "fsdp2", "gpus": 2}},
        {"gpu": "t4", "micro_batch": 4, "gradient_accumulation": 2},
    ],
)
def test_mapping_makes_the_same_scenario_again(fields) -> None:
    scenario = make(**fields)
    mapping = scenario.to_mapping()
    assert Scenario.from_mapping(mapping) == scenario
    assert list(mapping) == sorted(mapping)
    assert json.loads(json.dumps(mapping)) == mapping


def test_method_decides_what_is_there() -> None:
    assert make(method="full").lora is None
    assert make(method="lora").quantization is None
    assert make().quantization == Quantization(type="nf4", double=True, storage="uint8", compute=None)


def test_part_of_a_structure_keeps_the_rest() -> None:
    scenario = make(lora={"rank": 4}, quantization={"double": False})
    assert scenario.lora.target_modules == "all-linear"
    assert scenario.quantization == Quantization(type="nf4", double=False, storage="uint8", compute=None)


WRONG = {
    "unknown field": ({"micro_bacth": 2}, "micro_batch", "micro_batch: 2"),
    "unknown method": ({"method": "lorra"}, "method", "method: lora"),
    "dtype by its long name": ({"precision": "bfloat16"}, "precision", "precision: bf16"),
    "rank 0": ({"lora": {"rank": 0}}, "lora.rank", "rank: 16"),
    "rank as text": ({"lora": {"rank": "8"}}, "text", "rank: 8"),
    "exponent as text": ({"lora": {"dropout": "5e-2"}}, "exponent", "dropout: 0.05"),
    "unknown lora field": ({"lora": {"r": 8}}, "lora.r", None),
    "dropout 1": ({"lora": {"dropout": 1.0}}, "lora.dropout", "dropout: 0.0"),
    "one target as text": ({"lora": {"target_modules": "q_proj"}}, "target_modules", "[q_proj]"),
    "no targets": ({"lora": {"target_modules": []}}, "target_modules", None),
    "length as text": ({"sequence_length": "512"}, "sequence_length", "sequence_length: 512"),
    "negative length": ({"sequence_length": -1}, "sequence_length", "sequence_length: 512"),
    "beyond the positions": ({"sequence_length": 1025}, "1024 positions", "sequence_length: 1024"),
    "half a batch": ({"micro_batch": 1.5}, "micro_batch", "micro_batch: 1"),
    "true as a number": ({"micro_batch": True}, "micro_batch", "micro_batch: 1"),
    "yes for true": ({"gradient_checkpointing": "yes"}, "gradient_checkpointing", "gradient_checkpointing: true"),
    "quantized full": ({"method": "full", "quantization": {"type": "nf4"}}, "method: full", "method: qlora"),
    "adapters in full": ({"method": "full", "lora": {"rank": 8}}, "method: full", "method: lora"),
    "preparation in full": ({"method": "full", "kbit_preparation": "peft"}, "method: full", "kbit_preparation: none"),
    "mixed qlora": ({"precision": "fp16-mixed"}, "method: qlora", "precision: fp16"),
    "flash in fp32": ({"attention": "flash", "precision": "fp32"}, "flash", "attention: mem_efficient"),
    "quantization type": ({"quantization": {"type": "int3"}}, "quantization.type", "type: int8"),
    "gpu as a number": ({"gpu": 24}, "gpu", "gpu: {vram_gib: 24}"),
    "gpu without size": ({"gpu": {"vram_gib": 0}}, "gpu", "gpu: {vram_gib: 24}"),
    "no gpu of a kind": (
        {"gpu": {"name": "t4", "count": 0}},
        "gpu.count",
        "gpu: {name: t4, count: 2}",
    ),
    "a count as text": (
        {"gpu": {"name": "t4", "count": "2"}},
        "gpu.count is text, not a number",
        "gpu: {name: t4, count: 2}",
    ),
    "half a gpu": (
        {"gpu": {"vram_gib": 24, "count": 1.5}},
        "gpu.count",
        "gpu: {vram_gib: 24, count: 2}",
    ),
    "a count of nothing": ({"gpu": {"count": 2}}, "`gpu` must be a name or a size", "gpu: {vram_gib: 24}"),
    "more gpus than there are": (
        {"gpu": {"name": "t4", "count": 2}, "parallel": {"strategy": "fsdp2", "gpus": 4}},
        "`parallel.gpus: 4` is more than `gpu` has",
        "gpu: {name: t4, count: 4}",
    ),
    "no model": ({"model": None}, "model", "model: qwen2.5-coder-7b"),
    "unknown model": ({"model": "qwen2.5-codr-7b"}, "model", "model: qwen2.5-coder-7b"),
    "no model type": ({"model": {"hidden_size": 64}}, "model_type", "model_type: qwen2"),
    "misspelt size": ({"model": {"model_type": "llama", "hiden_size": 64}}, "hiden_size", "hidden_size: 64"),
    "size 0": ({"model": {**SMALL, "num_hidden_layers": 0}}, "num_hidden_layers", "num_hidden_layers: 28"),
    "autocast that contradicts": (
        {"method": "full", "precision": "bf16-mixed", "autocast": "fp16"},
        "contradict",
        "autocast: bf16",
    ),
    "autocast by its long name": ({"autocast": "bfloat16"}, "autocast", "autocast: bf16"),
    "storage": ({"quantization": {"storage": "int8"}}, "quantization.storage", "storage: uint8"),
    "unknown part": ({"allocator": {"expandable": True}}, "allocator.expandable", "expandable_segments"),
    "a word for true": ({"use_cache": "yes"}, "use_cache", "use_cache: true"),
    "checkpointing": ({"gradient_checkpointing": "reentrent"}, "gradient_checkpointing", "reentrant"),
    "mask and packing": (
        {"attention_mask": "padding", "packing": "rows"},
        "mask of its own",
        "attention_mask: none",
    ),
    "mask and flash": (
        {"attention_mask": "padding", "attention": "flash", "precision": "bf16"},
        "takes no mask",
        "attention: sdpa",
    ),
    "outputs before, in a trainer": ({"previous_sequence_length": 64}, "keeps none", "loop: manual"),
    "outputs before, too long": (
        {"previous_sequence_length": 2000, "loop": "manual"},
        "1024 positions",
        "previous_sequence_length: 1024",
    ),
    "cache without outputs": ({"use_cache": True, "loss": "chunked"}, "use_cache", "use_cache: false"),
    "one strategy for several gpus": (
        {"parallel": {"gpus": 2}},
        "`gpus` says 2",
        "parallel: {strategy: fsdp2, gpus: 2}",
    ),
    "several gpus' strategy for one": (
        {"parallel": {"strategy": "ddp"}},
        "`gpus` says 1",
        "parallel: {strategy: ddp, gpus: 2}",
    ),
    "unknown strategy": ({"parallel": {"strategy": "fsdp", "gpus": 2}}, "parallel.strategy", "strategy: fsdp"),
    "zero keeps": (
        {"parallel": {"strategy": "zero2", "gpus": 2, "reshard_after_forward": False}},
        "does not shard them",
        "parallel: {strategy: zero2, gpus: 2}",
    ),
    "zero offloads": (
        {"parallel": {"strategy": "zero3", "gpus": 2, "offload": "cpu"}},
        "only FSDP can keep",
        "parallel: {strategy: zero3, gpus: 2, offload: none}",
    ),
    "zero and 8-bit states": (
        {"optimizer": "adamw_8bit", "parallel": {"strategy": "zero2", "gpus": 2}},
        "one flat tensor",
        "optimizer: adamw",
    ),
    "zero casts packed weights": (
        {"autocast": "bf16", "quantization": {"storage": "fp16"}, "parallel": {"strategy": "zero3", "gpus": 2}},
        "breaks 4-bit weights",
        "quantization: {storage: bf16}",
    ),
    "zero3 without mixed precision": (
        {"method": "lora", "precision": "bf16", "parallel": {"strategy": "zero3", "gpus": 2}},
        "loads the weights in fp32",
        "autocast: bf16",
    ),
    "no gpus": ({"parallel": {"strategy": "ddp", "gpus": 0}}, "parallel.gpus", "gpus: 2"),
    "more gpus than rows": (
        {"parallel": {"strategy": "fsdp2", "gpus": 65}},
        "this model's have 64",
        "parallel: {strategy: fsdp2, gpus: 64}",
    ),
    "offload": ({"parallel": {"offload": "cpu"}}, "offload", "offload: none"),
    "offload with ddp": (
        {"parallel": {"strategy": "ddp", "gpus": 2, "offload": "cpu"}},
        "only FSDP can keep",
        "parallel: {strategy: ddp, gpus: 2, offload: none}",
    ),
    "resharding with ddp": (
        {"parallel": {"strategy": "ddp", "gpus": 2, "reshard_after_forward": False}},
        "nothing is gathered",
        "parallel: {strategy: ddp, gpus: 2}",
    ),
    "packed bytes in one tensor with others": (
        {"precision": "bf16", "parallel": {"strategy": "fsdp1", "gpus": 2}},
        "quantization.storage: uint8",
        "quantization: {storage: bf16}",
    ),
    "fp32 norms in one tensor with others": (
        {
            "precision": "bf16",
            "quantization": {"storage": "bf16"},
            "kbit_preparation": "peft",
            "parallel": {"strategy": "fsdp1", "gpus": 2},
        },
        "need one dtype",
        "kbit_preparation: none",
    ),
    "a loss outside the forward pass": (
        {"loss": "chunked", "parallel": {"strategy": "fsdp2", "gpus": 2}},
        "outside the forward pass",
        "loss: full",
    ),
    "a divided 8-bit base": (
        {"quantization": {"type": "int8"}, "parallel": {"strategy": "fsdp1", "gpus": 2}},
        "keeps each weight whole",
        "quantization: {type: nf4}",
    ),
    "8-bit weights stored otherwise": (
        {"quantization": {"type": "int8", "storage": "bf16"}},
        "are for 4-bit weights",
        "quantization: {type: int8, storage: uint8, compute: null}",
    ),
    "divided 8-bit states": (
        {"optimizer": "adamw_8bit", "parallel": {"strategy": "fsdp2", "gpus": 2}},
        "whole tensors",
        "optimizer: adamw",
    ),
    "preparation of a dense base": (
        {"method": "lora", "kbit_preparation": "trl"},
        "quantized base",
        "kbit_preparation: none",
    ),
    "a length beyond everything": ({"micro_batch": 10**12}, "at most 16777216", "micro_batch: 1"),
    "quantized weights": (
        {"model": {**SMALL, "quantization_config": {"quant_method": "awq"}}},
        "quantized already (awq)",
        "model: plain.json",
    ),
    "heads": ({"model": {**SMALL, "num_attention_heads": 5}}, "num_attention_heads", "num_attention_heads: 4"),
    "an objective with a loss": ({"objective": "dpo", "loss": "chunked"}, "the objective is the loss", "loss: full"),
    "an objective in packs": ({"objective": "orpo", "packing": "rows"}, "are not packed", "packing: none"),
    "kept outputs, in a trainer": ({"keeps_outputs": True}, "keeps no outputs", "loop: manual"),
    "kept outputs, in chunks": (
        {"keeps_outputs": True, "loop": "manual", "loss": "chunked"},
        "has none",
        "keeps_outputs: false",
    ),
    "flash on Windows": ({"platform": "windows", "attention": "flash"}, "without FlashAttention", "attention: sdpa"),
    "an objective's own loop": ({"objective": "kto", "loop": "manual"}, "is the loop", "loop: trainer"),
    "an objective with a cache": ({"objective": "dpo", "use_cache": True}, "keep no keys", "use_cache: false"),
    "an objective on the host": (
        {"objective": "dpo", "activation_offload": True},
        "streams of a GPU",
        "activation_offload: false",
    ),
    "an objective on a prepared base": (
        {"objective": "dpo", "kbit_preparation": "peft"},
        "prepare a 4-bit base",
        "kbit_preparation: none",
    ),
    "an objective's adapters": (
        {"objective": "dpo", "adapter_precision": "base"},
        "casts the adapters itself",
        "adapter_precision: fp32",
    ),
    "an objective with muon": ({"objective": "dpo", "optimizer": "muon"}, "TRL makes", "optimizer: adamw"),
    "an objective on several GPUs": (
        {"objective": "kto", "micro_batch": 2, "parallel": {"strategy": "ddp", "gpus": 2}},
        "`objective: kto` is not predicted with this `parallel`",
        "parallel: {strategy: none, gpus: 1}",
    ),
    "no adapter to turn off": (
        {"objective": "dpo", "method": "full", "preference": {"reference": "adapter_off"}},
        "no adapter to turn off",
        "preference: {reference: model}",
    ),
    "a reference for nothing": (
        {"objective": "orpo", "preference": {"reference": "model"}},
        "has no reference",
        "preference: {reference: null}",
    ),
    "generated answers compared before": (
        {"objective": "grpo", "preference": {"reference": "precomputed", "generations": 2}},
        "new in each step",
        "preference: {reference: null}",
    ),
    "a second model for grpo": (
        {"objective": "grpo", "preference": {"reference": "model", "generations": 2}},
        "turns the adapters off",
        "preference: {reference: adapter_off}",
    ),
    "an answer without a prompt": (
        {"objective": "dpo", "sequence_length": 64, "preference": {"completion_length": 64}},
        "no token of",
        "preference: {completion_length: 32}",
    ),
    "one row of kto": ({"objective": "kto"}, "one row at a time", "micro_batch: 2"),
    "grpo's groups": (
        {"objective": "grpo", "micro_batch": 3, "preference": {"generations": 2}},
        "doesn't divide",
        "micro_batch: 2",
    ),
    "one generation": ({"preference": {"generations": 1}}, "preference.generations", "generations: 8"),
    "activations of divided weights": (
        {"activation_offload": True, "parallel": {"strategy": "fsdp2", "gpus": 2}},
        "gathered weights would go",
        "activation_offload: false",
    ),
    "a compiled step over divided weights": (
        {"compile": "model", "parallel": {"strategy": "fsdp2", "gpus": 2}},
        "by layers with FSDP2",
        "compile: none",
    ),
    "experts in 4 bits beside a base in 16": (
        {"experts": {"quantized": "bitsandbytes"}, "method": "lora"},
        "this base has other bits",
        "experts: {quantized: none}",
    ),
    "mxfp4 of another family": (
        {"experts": {"quantized": "mxfp4"}},
        "gpt-oss' files",
        "experts: {quantized: none}",
    ),
    "experts on the host, trained": (
        {"experts": {"offload": "host"}, "method": "full"},
        "are frozen",
        "experts: {quantized: none, offload: none}",
    ),
    "packed experts on several GPUs": (
        {"experts": {"quantized": "bitsandbytes"}, "parallel": {"strategy": "fsdp2", "gpus": 2}},
        "on one GPU",
        "experts: {quantized: none, offload: none}",
    ),
    "an unknown way to compile": ({"compile": "blocks"}, "none, layers", "compile: layers"),
    "groups": ({"model": {**SMALL, "num_key_value_heads": 3}}, "num_key_value_heads", "num_key_value_heads: 4"),
}


@pytest.mark.parametrize("folder", ["transformer", "pipeline"])
def test_a_diffusion_model_is_sent_to_the_program_that_trains_it(tmp_path, folder) -> None:
    """Its configuration has no model_type: the message spoke of sizes, and of no way to ask."""
    files = {
        "transformer": ("config.json", {"_class_name": "FluxTransformer2DModel", "num_layers": 19}),
        "pipeline": ("model_index.json", {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"],
                                          "transformer": ["diffusers", "FluxTransformer2DModel"]}),
    }  # fmt: skip
    name, content = files[folder]
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="makes images or films") as caught:
        make(model=str(tmp_path))
    assert caught.value.write == "dryfit run train.py"


@pytest.mark.parametrize(("fields", "names", "write"), WRONG.values(), ids=WRONG)
def test_wrong_field_is_named_with_the_corrected_line(fields, names, write) -> None:
    with pytest.raises(UserError) as caught:
        make(**fields)
    assert names in str(caught.value)
    assert "test.yaml" in str(caught.value)
    if write:
        assert write in caught.value.write


def test_all_wrong_fields_are_named_at_once_with_their_lines() -> None:
    with pytest.raises(UserError) as caught:
        make(micro_bacth=2, lora={"rank": 0}, method="qlora", precision="bfloat16", gpu={"vram_gib": 0})
    text = str(caught.value)
    assert text.startswith("4 things are wrong.")
    for words in ("micro_bacth", "lora.rank", "precision", "gpu.vram_gib"):
        assert words in text
    for line in ("micro_batch: 2", "rank: 16", "precision: bf16", "gpu: {vram_gib: 24}"):
        assert line in caught.value.write
    with pytest.raises(UserError, match="2 things are wrong") as caught:
        make(attention="flash", precision="fp32", use_cache=True, loss="chunked")
    assert caught.value.write == "attention: mem_efficient\nuse_cache: false"


def test_every_model_of_the_catalogue_is_good() -> None:
    for path in sorted(MODELS.glob("*.json")):
        more = " (language model alone)" if json.loads(path.read_text()).get("vision_config") else ""
        assert Scenario.from_mapping({"model": path.stem}).model_name == path.stem + more


def test_model_beside_the_scenario_file(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(SMALL))
    file = tmp_path / "scenario.yaml"
    file.write_text("model: mine/config.json\nmethod: full\n")
    scenario = read_request(file).scenario
    assert (scenario.model, scenario.model_name) == (SMALL, "mine")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [", "line"),
        ("- a\n- b\n", "mapping"),
        ("method: lora\nmethod: full\n", "twice"),
        ("", "mapping"),
    ],
)
def test_broken_file_is_named(tmp_path, text, says) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_request(file)
    assert says in str(caught.value)
    assert "scenario.yaml" in str(caught.value)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_request(tmp_path / "none.yaml")


def test_the_defaults_are_one_for_each_field() -> None:
    """config.yaml holds a value for each field of the table, and for no other."""
    named = {field.name for field in FIELDS} - {"model", "model_name"}
    assert set(scenario_defaults()) == named
    for field in FIELDS:
        if field.parts:
            assert set(scenario_defaults()[field.name]) == {part.name for part in field.parts}, field.name


def test_the_value_has_the_fields_of_the_table() -> None:
    assert {field.name for field in fields(Scenario)} == {field.name for field in FIELDS}


def test_autocast_is_what_mixed_precision_says() -> None:
    mixed, said = make(method="full", precision="bf16-mixed"), make(method="full", precision="fp32", autocast="bf16")
    for name in ("weight_precision", "autocast_precision", "compute_precision"):
        assert getattr(mixed, name) == getattr(said, name), name
    assert make(precision="fp16", autocast="bf16").compute_precision == "bf16"
    assert make(precision="fp16", adapter_precision="base").adapter_dtype == "fp16"


@pytest.mark.parametrize(
    ("key", "value", "write"),
    [
        ("model_name_or_path", "qwen3-8b", "model: qwen3-8b"),  # LLaMA-Factory, TRL
        ("base_model", "qwen3-8b", "model: qwen3-8b"),  # axolotl
        ("finetuning_type", "lora", "method: lora"),
        ("per_device_train_batch_size", 2, "micro_batch: 2"),
        ("cutoff_len", 2048, "sequence_length: 2048"),
        ("gradient_accumulation_steps", 8, "gradient_accumulation: 8"),
        ("lora_r", 8, "lora:\n  rank: 8"),
        ("lora_target", "all-linear", "lora:\n  target_modules: all-linear"),
    ],
)
def test_a_key_of_another_tool_is_told_in_our_words(key, value, write) -> None:
    with pytest.raises(UserError) as error:
        make(**{key: value})
    assert error.value.write == write
    name = write.partition(":")[0]
    assert f"did you mean `{name}" in str(error.value) and name in {field.name for field in FIELDS}


@pytest.mark.parametrize("objective", ["dpo", "DPO", "orpo", "grpo", "reward", "sft"])
def test_an_objective_is_not_taken_for_a_misspelt_method(objective) -> None:
    with pytest.raises(UserError, match="what a training aims at") as error:
        make(method=objective)
    assert "full, lora, qlora" in str(error.value) and f"objective: {objective.lower()}" in str(error.value)


@pytest.mark.parametrize("method", ["mxfp4", "gptq", "awq", "fp8"])
def test_a_quantized_model_is_told_what_to_take_out_of_it(method) -> None:
    with pytest.raises(UserError, match=rf"quantized already \({method}\)") as error:
        make(model={**SMALL, "quantization_config": {"quant_method": method}}, method="qlora")
    assert "del(.quantization_config)" in error.value.write and "method: qlora" not in error.value.write


def test_a_model_under_another_tools_name_is_told_once() -> None:
    with pytest.raises(UserError) as error:
        Scenario.from_mapping({"model_name_or_path": "Qwen/Qwen3-8B", "foo": 1})
    assert "2 things are wrong" in str(error.value) and "model: Qwen/Qwen3-8B" in str(error.value)
    assert "is missing" not in str(error.value) and "nothing here: remove the key" in str(error.value)


@pytest.mark.parametrize(("gpus", "count", "fits"), [(2, 2, True), (2, 3, True), (3, 2, False), (4, 3, False)])
def test_a_step_takes_no_more_gpus_than_there_are_cards(gpus, count, fits) -> None:
    fields = {"model": "smollm2-135m", "parallel": {"strategy": "ddp", "gpus": gpus}}
    fields["gpu"] = {"name": "rtx-3090", "count": count}
    if fits:
        assert Scenario.from_mapping(fields).parallel.gpus == gpus
        return
    with pytest.raises(UserError) as caught:
        Scenario.from_mapping(fields)
    assert caught.value.write == f"gpu: {{name: rtx-3090, count: {gpus}}}"


def test_the_rows_of_a_step_are_those_of_all_gpus() -> None:
    fields = {"model": "smollm2-135m", "micro_batch": 2, "gradient_accumulation": 3}
    step = Scenario.from_mapping(fields | {"parallel": {"strategy": "ddp", "gpus": 4}})
    assert rows_in_a_step(step, {"rows_per_step": None}) == rows_in_a_step(step, {"rows_per_step": 24}) == 24
    assert rows_in_a_step(Scenario.from_mapping(fields), {}) == 6
    with pytest.raises(UserError, match="rows_per_step"):
        rows_in_a_step(step, {"rows_per_step": 6})


def test_a_size_for_each_layer_is_taken_where_a_family_lists_them() -> None:
    """As Gemma 3n's configuration has its MLPs; a list of no family is still refused."""
    listed = {**SMALL, "model_type": "gemma3n_text", "intermediate_size": [64] * SMALL["num_hidden_layers"]}
    assert make(model=listed).model["intermediate_size"] == [64] * SMALL["num_hidden_layers"]
    with pytest.raises(UserError, match="hidden_size"):
        make(model={**SMALL, "hidden_size": [64, 64]})


def test_zero3_loads_packed_weights_as_they_are_packed() -> None:
    """All others in fp32 where nothing casts them, which is refused."""
    fields = {"model": "qwen2.5-coder-0.5b", "precision": "bf16", "parallel": {"strategy": "zero3", "gpus": 2}}
    assert Scenario.from_mapping({**fields, "method": "qlora"}).precision == "bf16"
    with pytest.raises(UserError, match="loads the weights in fp32"):
        Scenario.from_mapping({**fields, "method": "lora"})
