"""Any of PEFT's methods: traced as it is measured, or refused with the reason."""

import json
import socket
import warnings

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import IMPOSSIBLE, adapter_names
from dryfit.step.model import build_model
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS

MODEL = {**DECODERS["qwen2"], "hidden_size": 128}
ALL = "all-linear"
METHODS = {
    "LoRA": {"peft_type": "LORA", "r": 8, "target_modules": ALL},
    "rsLoRA": {"peft_type": "LORA", "r": 8, "use_rslora": True, "rank_pattern": {"q_proj": 4}},
    "DoRA": {
        "peft_type": "LORA",
        "r": 8,
        "use_dora": True,
        "lora_dropout": 0.1,
        "target_modules": ALL,
    },
    "LoRA and a whole head": {"peft_type": "LORA", "r": 8, "modules_to_save": ["lm_head"]},
    "PiSSA": {"peft_type": "LORA", "r": 8, "init_lora_weights": "pissa"},
    "IA3": {"peft_type": "IA3"},
    "VeRA": {"peft_type": "VERA", "r": 16},
    "OFT": {"peft_type": "OFT"},
    "BOFT": {"peft_type": "BOFT"},
    "LoHa": {"peft_type": "LOHA"},
    "LoKr": {"peft_type": "LOKR"},
    "AdaLoRA": {"peft_type": "ADALORA", "total_step": 10},
    "prefix tuning": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8},
    "prompt tuning": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8},
    "layer norms": {"peft_type": "LN_TUNING"},
    "RandLoRA": {"peft_type": "RANDLORA"},
    "SHiRA": {"peft_type": "SHIRA", "r": 4},
    "VB-LoRA": {"peft_type": "VBLORA", "vector_length": 16},
    "WaveFT": {"peft_type": "WAVEFT", "n_frequency": 100},
    "trainable tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]},
}


def scenario(adapter, **fields) -> Scenario:
    fields = {
        "method": "lora",
        "precision": "bf16",
        "sequence_length": 64,
        "gradient_checkpointing": False,
        **fields,
    }
    return Scenario.from_mapping({"model": MODEL, "adapter": adapter, **fields}, where="test.yaml")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.few(3, 7)
@pytest.mark.parametrize("adapter", METHODS.values(), ids=METHODS)
def test_methods_are_traced_to_the_byte(adapter):
    asked = scenario(adapter)
    predicted, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    for field in ("parameters", "resident_bytes", "phases", "components"):
        assert predicted[field] == measured[field], field
    assert predicted["components"]["adapters"] > 0
    assert trace(asked, timeline=False)["trainable_parameters"] == predicted["trainable_parameters"]


@pytest.mark.few(1)
@pytest.mark.parametrize("adapter", ["DoRA", "OFT", "VeRA", "LoRA and a whole head"])
def test_methods_on_a_quantized_base(adapter):
    asked = scenario(METHODS[adapter], method="qlora", gradient_checkpointing=True)
    assert (
        trace(asked, "cpu", timeline=False)["phases"]
        == measure(asked, "cpu", timeline=False)["phases"]
    )


def test_only_what_peft_adds_is_cast_as_peft_casts_it():
    """Layer norms that are trained stay in the base's dtype: PEFT casts adapters alone."""
    model = build_model(scenario(METHODS["layer norms"]), "meta")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    for precision, dtype in (
        ("fp32", torch.float32),
        ("base", torch.bfloat16),
        ("fp16", torch.float16),
    ):
        for device in ("meta", "cpu"):
            model = build_model(scenario(METHODS["LoRA"], adapter_precision=precision), device)
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}, (
                precision,
                device,
            )


def test_a_prompt_made_of_a_text_is_priced_without_its_tokenizer(monkeypatch):
    """Anything that PEFT asked the Hub for would end here."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for an address"))
    text = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "a",
        "tokenizer_name_or_path": "some/model",
    }
    priced = [
        trace(scenario({**METHODS["prompt tuning"], **more}), timeline=False) for more in ({}, text)
    ]
    assert priced[0]["peak_allocated_bytes"] == priced[1]["peak_allocated_bytes"]


def test_names_of_what_was_added():
    model = build_model(scenario(METHODS["LoRA"]), "meta")
    assert adapter_names(model) == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_a_file_of_peft_is_read(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    fields = {"model": MODEL, "method": "lora", "adapter": tmp_path.name}
    asked = Scenario.from_mapping(fields, where=tmp_path.parent / "scenario.yaml")
    assert asked.lora is None
    assert asked.adapter == json.loads((tmp_path / "adapter_config.json").read_text())
    count = trace(asked, timeline=False)["trainable_parameters"]
    assert count == 2 * 4 * (128 + 128)
    assert Scenario.from_mapping(asked.to_mapping()) == asked


WRONG = {
    "unknown method": ({"peft_type": "LORAX"}, {}, "PEFT knows no method LORAX", "peft_type: LORA"),
    "no method": ({"r": 8}, {}, "peft_type", "peft_type: LORA"),
    "another task": (
        {"peft_type": "LORA", "task_type": "SEQ_CLS"},
        {},
        "another task, SEQ_CLS",
        "task_type: CAUSAL_LM",
    ),
    "unknown field": ({"peft_type": "LORA", "rnk": 8}, {}, "no field `rnk`", None),
    "the short form's field": (
        {"peft_type": "LORA", "rank": 8},
        {},
        "did you mean `r`?",
        "adapter: {r: 8, ...}",
    ),
    "the short form's, not here": ({"peft_type": "IA3", "rank": 8}, {}, "no field `rank`", None),
    "targets that are not there": (
        {"peft_type": "LORA", "target_modules": ["nosuch"]},
        {},
        "fit nothing in this model",
        "target_modules: all-linear",
    ),
    "checkpointed prefix": (
        METHODS["prefix tuning"],
        {"gradient_checkpointing": True},
        "gradient checkpointing",
        None,
    ),
    "values of weights": ({"peft_type": "FROD"}, {}, "values of the weights", None),
    "sizes that don't divide": (
        {"peft_type": "VBLORA", "vector_length": 256},
        {},
        "divisible",
        None,
    ),
    "beside lora": (
        METHODS["IA3"],
        {"lora": {"rank": 8}},
        "both say what the adapters are",
        "adapter:",
    ),
    "in full fine-tuning": (METHODS["IA3"], {"method": "full"}, "has no adapters", "method: lora"),
    "a path to nothing": ("nosuch.json", {}, "not a path", "adapter:"),
    "a list": ([1], {}, "peft_type", "adapter:"),
}


@pytest.mark.parametrize(("adapter", "fields", "says", "write"), WRONG.values(), ids=WRONG)
def test_wrong_adapters_are_refused_in_words(adapter, fields, says, write):
    with pytest.raises(UserError) as caught:
        trace(scenario(adapter, **fields))
    assert says in str(caught.value)
    if write:
        assert write in caught.value.write


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_methods_that_no_scenario_can_say(kind):
    with pytest.raises(UserError, match=f"{kind} can't be used"):
        trace(scenario({"peft_type": kind}))
