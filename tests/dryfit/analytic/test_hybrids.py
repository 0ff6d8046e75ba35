"""Decoders whose layers are of several kinds: their weights and adapters are known, their steps are not."""

import pytest

from dryfit.analytic.certainty import Needs
from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate, estimate, weights_bytes
from dryfit.analytic.hybrid_weights import _FAMILIES
from dryfit.analytic.parameters import parameter_count
from dryfit.analytic.setting import describe
from dryfit.common.errors import UserError
from dryfit.common.files import read_json
from dryfit.derived.step import derived_step
from dryfit.recorder.variants import METHODS, OPTIONS
from dryfit.scenario.model import MODELS
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model
from tests.dryfit.families import FAMILIES

KNOWN = sorted(set(FAMILIES) & set(_FAMILIES))


def step(model, method: str = "lora", **fields) -> Scenario:
    lora = {"lora": {"rank": 8, "target_modules": "all-linear"}} if method != "full" else {}
    return Scenario.from_mapping(
        {"model": model, "method": method, "sequence_length": 64, **lora, **fields}
    )


@pytest.mark.few(4, 8)
@pytest.mark.parametrize("family", KNOWN)
def test_adapters_are_those_that_peft_makes(family) -> None:
    asked = step(FAMILIES[family], packages=[])
    trained = sum(p.numel() for p in build_model(asked, "meta").parameters() if p.requires_grad)
    assert describe(asked.model).adapter_parameters(asked.lora) == trained


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_next", ["gate_proj", "up_proj", "down_proj"]),
        ("nemotron_h", ["in_proj", "q_proj"]),
        ("gemma4_text", ["q_proj", "v_proj", "per_layer_projection"]),
    ],
)
def test_adapters_of_some_matrices_are_those_that_peft_makes(family, names) -> None:
    asked = step(FAMILIES[family], packages=[], lora={"rank": 4, "target_modules": names})
    trained = sum(p.numel() for p in build_model(asked, "meta").parameters() if p.requires_grad)
    assert describe(asked.model).adapter_parameters(asked.lora) == trained


@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo3", "gemma4_text"])
def test_their_steps_have_no_closed_form_and_the_reason_says_who_answers(family) -> None:
    asked = step(FAMILIES[family])
    for ask in (analytic_estimate, lambda one: Needs.of(one, "here", None)):
        with pytest.raises(
            NotDescribed, match=f"does not describe the layers of {family}, whose steps are traced"
        ):
            ask(asked)
    found = estimate(asked)
    count = describe(asked.model).parameter_counts()["total"]
    assert found.analytic is None and found.rule_of_thumb["exact_count"]["parameters"] == count
    assert found.reason.endswith(f"{2 * count / 2**30:.1f} GiB")


@pytest.mark.parametrize(("experts", "most"), [("none", 200), ("bitsandbytes", 60)])
def test_of_a_mixture_in_four_bits_the_experts_count_as_they_are(experts, most) -> None:
    """bitsandbytes packs linear layers, and experts are none: at least what the built model takes."""
    asked = Scenario.from_mapping(
        {"model": "llama-4-scout", "experts": {"quantized": experts}, "sequence_length": 64}
    )
    size = float(estimate(asked).reason.rpartition(" take ")[2].removesuffix(" GiB"))
    assert most - 20 < size < most


def test_a_recorded_step_is_answered_and_names_its_parameters() -> None:
    asked = Scenario.from_mapping({"model": "olmo-2-7b", "method": "lora", "sequence_length": 1024})
    found = estimate(asked)
    assert found.analytic["recorded_with"] and found.reason is None
    assert found.analytic["parameters"] == describe(asked.model).parameter_counts()


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "qwen3-30b-a3b", "gpt-oss-20b", "nemotron-3-nano-30b-a3b"]
)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_weights_alone_are_never_more_than_a_record_has(name, method) -> None:
    step = {
        "model": name,
        "method": method,
        "sequence_length": 1024,
        **OPTIONS["trl"],
        **METHODS[method],
    }
    asked = Scenario.from_mapping(step, {})
    parts = derived_step(asked).components
    kept = sum(size for part, size in parts.items() if part.startswith("weights"))
    assert 0.97 * kept < weights_bytes(asked, parameter_count(asked.model)) <= kept


def test_what_is_refused_of_layers_that_differ() -> None:
    with pytest.raises(NotDescribed, match="come quantized"):
        describe(FAMILIES["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(UserError) as caught:
        analytic_estimate(step(FAMILIES["lfm2"], lora={"target_modules": ["in_proi"]}))
    assert "conv.in_proj" in str(caught.value)
    lora = {"target_modules": "all-linear", "dropout": 0.1}
    with pytest.raises(UserError, match="no dropout"):
        analytic_estimate(step(FAMILIES["deepseek_v3"], lora=lora))
    describe(FAMILIES["lfm2"]).targets(step(FAMILIES["lfm2"], lora=lora).lora)


@pytest.mark.parametrize("names", [["q_proj", "lm_head"], ["model.embed_tokens"]])
def test_adapters_outside_of_the_layers_have_no_figure(names) -> None:
    asked = step(FAMILIES["lfm2"], lora={"target_modules": names})
    with pytest.raises(NotDescribed, match="adapters of"):
        describe(asked.model).adapter_parameters(asked.lora)


def test_what_a_configuration_leaves_out_is_filled_in() -> None:
    whole = read_json(MODELS / "gpt-oss-20b.json")
    left_out = {
        key: value
        for key, value in whole.items()
        if key not in ("layer_types", "quantization_config")
    }
    assert (
        describe(left_out).parameter_counts()
        == describe(dict(whole, quantization_config=None)).parameter_counts()
    )
    shared = FAMILIES["gemma4_text"] | {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": None,
    }
    same = shared | {"num_global_key_value_heads": shared["num_key_value_heads"]}
    assert describe(shared).parameter_counts() == describe(same).parameter_counts()
