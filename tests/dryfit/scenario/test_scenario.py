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
from tests.dryfit.scenario.refusals import refusals

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


def test_defaults_come_from_the_configuration_and_the_method_decides_what_is_there() -> None:
    scenario, defaults = make(), scenario_defaults()
    assert (scenario.method, scenario.sequence_length) == (
        defaults["method"],
        defaults["sequence_length"],
    )
    assert scenario.lora.rank == defaults["lora"]["rank"]
    assert make(method="full").lora is None
    assert make(method="lora").quantization is None
    assert make().quantization == Quantization(
        type="nf4", double=True, storage="uint8", compute=None
    )
    scenario = make(lora={"rank": 4}, quantization={"double": False})
    assert scenario.lora.target_modules == "all-linear"
    assert scenario.quantization == Quantization(
        type="nf4", double=False, storage="uint8", compute=None
    )


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


WRONG = refusals("wrong_fields", SMALL=SMALL)


@pytest.mark.parametrize("folder", ["transformer", "pipeline"])
def test_a_diffusion_model_is_sent_to_the_program_that_trains_it(tmp_path, folder) -> None:
    """Its configuration has no model_type: the message spoke of sizes, and of no way to ask."""
    files = {
        "transformer": ("config.json", {"_class_name": "FluxTransformer2DModel", "num_layers": 19}),
        "pipeline": (
            "model_index.json",
            {
                "_class_name": "FluxPipeline",
                "vae": ["diffusers", "AutoencoderKL"],
                "transformer": ["diffusers", "FluxTransformer2DModel"],
            },
        ),
    }
    name, content = files[folder]
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="makes images or films") as caught:
        make(model=str(tmp_path))
    assert caught.value.write == "dryfit run train.py"


def test_a_broken_file_of_json_is_named_with_its_line(tmp_path) -> None:
    for name, field in {
        "config.json": "model",
        "adapter_config.json": "adapter",
        "model_index.json": "model",
    }.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{\n  no", encoding="utf-8")
        with pytest.raises(UserError, match="This is not JSON") as caught:
            make(**{field: str(folder)})
        assert caught.value.where == f"{folder / name}, line 2"


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
        make(
            micro_bacth=2,
            lora={"rank": 0},
            method="qlora",
            precision="bfloat16",
            gpu={"vram_gib": 0},
        )
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
        more = (
            " (language model alone)" if json.loads(path.read_text()).get("vision_config") else ""
        )
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


def test_the_defaults_are_one_for_each_field_of_the_table() -> None:
    """config.yaml holds a value for each field of the table, and for no other."""
    named = {field.name for field in FIELDS} - {"model", "model_name"}
    assert set(scenario_defaults()) == named
    for field in FIELDS:
        if field.parts:
            assert set(scenario_defaults()[field.name]) == {part.name for part in field.parts}, (
                field.name
            )
    assert {field.name for field in fields(Scenario)} == {field.name for field in FIELDS}


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
    assert "full, lora, qlora" in str(error.value) and f"objective: {objective.lower()}" in str(
        error.value
    )


@pytest.mark.parametrize("method", ["mxfp4", "gptq", "awq", "fp8"])
def test_a_quantized_model_is_told_what_to_take_out_of_it(method) -> None:
    with pytest.raises(UserError, match=rf"quantized already \({method}\)") as error:
        make(model={**SMALL, "quantization_config": {"quant_method": method}}, method="qlora")
    assert (
        "del(.quantization_config)" in error.value.write
        and "method: qlora" not in error.value.write
    )


def test_a_model_under_another_tools_name_is_told_once() -> None:
    with pytest.raises(UserError) as error:
        Scenario.from_mapping({"model_name_or_path": "Qwen/Qwen3-8B", "foo": 1})
    assert "2 things are wrong" in str(error.value) and "model: Qwen/Qwen3-8B" in str(error.value)
    assert "is missing" not in str(error.value) and "nothing here: remove the key" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("gpus", "count", "fits"), [(2, 2, True), (2, 3, True), (3, 2, False), (4, 3, False)]
)
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
    assert (
        rows_in_a_step(step, {"rows_per_step": None})
        == rows_in_a_step(step, {"rows_per_step": 24})
        == 24
    )
    assert rows_in_a_step(Scenario.from_mapping(fields), {}) == 6
    with pytest.raises(UserError, match="rows_per_step"):
        rows_in_a_step(step, {"rows_per_step": 6})


def test_sizes_of_layers_and_dtypes_of_weights() -> None:
    """As Gemma 3n's configuration has its MLPs; a list of no family is still refused."""
    listed = {
        **SMALL,
        "model_type": "gemma3n_text",
        "intermediate_size": [64] * SMALL["num_hidden_layers"],
    }
    assert make(model=listed).model["intermediate_size"] == [64] * SMALL["num_hidden_layers"]
    with pytest.raises(UserError, match="hidden_size"):
        make(model={**SMALL, "hidden_size": [64, 64]})
    # All others in fp32 where nothing casts them, which is refused.
    fields = {
        "model": "qwen2.5-coder-0.5b",
        "precision": "bf16",
        "parallel": {"strategy": "zero3", "gpus": 2},
    }
    assert Scenario.from_mapping({**fields, "method": "qlora"}).precision == "bf16"
    with pytest.raises(UserError, match="loads the weights in fp32"):
        Scenario.from_mapping({**fields, "method": "lora"})
    mixed, said = (
        make(method="full", precision="bf16-mixed"),
        make(method="full", precision="fp32", autocast="bf16"),
    )
    for name in ("weight_precision", "autocast_precision", "compute_precision"):
        assert getattr(mixed, name) == getattr(said, name), name
    assert make(precision="fp16", autocast="bf16").compute_precision == "bf16"
    assert make(precision="fp16", adapter_precision="base").adapter_dtype == "fp16"


@pytest.mark.parametrize(("kind", "words"), [("phi3", 32000), ("smollm3", 128004)])
def test_a_padding_beyond_the_vocabulary_is_refused_as_transformers_does(kind, words) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = {**SMALL, "model_type": kind, "vocab_size": words}
    with pytest.raises(UserError, match="pad_token_id") as caught:
        make(model=model)
    assert kind in caught.value.found and caught.value.write == "model: {pad_token_id: null, ...}"
    for right in ({"vocab_size": words + 1}, {"pad_token_id": None}, {"pad_token_id": 0}):
        assert make(model={**model, **right}).model["model_type"] == kind
    with pytest.raises(AssertionError, match="Padding_idx"):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
