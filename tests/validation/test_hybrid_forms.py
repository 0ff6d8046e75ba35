"""The closed form of layers of several kinds: their weights, adapters, activations, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from importlib.util import find_spec

import pytest

from dryfit.analytic.certainty import Needs, kind_of, over_peak, peak_bound
from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.analytic.plans import _HYBRIDS
from dryfit.analytic.setting import describe
from dryfit.common.errors import UserError
from dryfit.common.files import read_json
from dryfit.scenario.model import MODELS
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model
from dryfit.tracing.trace import trace
from tests.dryfit.families import FAMILIES
from validation.hybrid_forms import PACKAGES, few_layers, model_of

H100 = (9, 0)
KNOWN = sorted(set(FAMILIES) & set(_HYBRIDS))
SETTINGS = list(itertools.product(("lora", "qlora", "full"), (False, True)))


def step(model, method: str = "lora", **fields) -> Scenario:
    lora = {"lora": {"rank": 8, "target_modules": "all-linear"}} if method != "full" else {}
    given = {"model": model, "method": method, "sequence_length": 600, "packages": [], **lora, **fields}
    return Scenario.from_mapping(given)


def off_the_step(asked: Scenario) -> float:
    """The form's peak beside the trace's, as a share of what the step adds to the weights."""
    form = analytic_estimate(asked, capability=H100)["peak_allocated_bytes"]
    traced = trace(asked, capability=H100, timeline=False)
    peak = traced["peak_allocated_bytes"]
    return (form - peak) / (peak - traced["resident_bytes"])


@pytest.mark.few(8)
@pytest.mark.parametrize("family", KNOWN)
def test_adapters_are_those_that_peft_makes(family) -> None:
    asked = step(FAMILIES[family], sequence_length=64)
    trained = sum(p.numel() for p in build_model(asked, "meta").parameters() if p.requires_grad)
    assert describe(asked.model).adapter_parameters(asked.lora) == trained


CASES = [(family, SETTINGS[index % len(SETTINGS)]) for index, family in enumerate(KNOWN) if family != "ministral3"]
CASES = [(family, ("lora", False) if family == "gemma3n_text" else setting) for family, setting in CASES]


@pytest.mark.few(2, 8)
@pytest.mark.parametrize(("family", "setting"), CASES, ids=[family for family, _ in CASES])
def test_the_step_is_held_within_five_percent_of_the_trace(family, setting) -> None:
    """Of the peak, and of what the step adds to the weights; by transformers' own loop, four layers."""
    method, checkpointing = setting
    fields = {"sequence_length": 100} if family == "jamba" else {}  # its loop takes each token by itself
    asked = step(model_of(family, "default"), method, gradient_checkpointing=checkpointing, **fields)
    assert abs(off_the_step(asked)) <= 0.05


FEW_EXPERTS = {"n_routed_experts": 8, "num_local_experts": 8, "n_group": 1, "topk_group": 1}


@pytest.mark.few(0, 2)
@pytest.mark.parametrize("fields", [
    {"sequence_length": 2500, "gradient_checkpointing": True},
    {"sequence_length": 700, "micro_batch": 2, "gradient_checkpointing": False},
    {"sequence_length": 900, "attention": "eager", "precision": "bf16-mixed"},
], ids=["long", "rows", "eager"])  # fmt: skip
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_an_indexer_is_held_within_one_percent_of_the_trace(family, fields) -> None:
    """Its scores are in fp32 for all heads, and with several rows keys are copied for each token."""
    assert abs(off_the_step(step(model_of(family, "default") | FEW_EXPERTS, **fields))) <= 0.01


def test_an_indexer_gets_no_gradient() -> None:
    """So it has no optimizer states, whole or with adapters."""
    model = describe(FAMILIES["glm_moe_dsa"])
    heads, narrow, hidden = 2, 16, 64
    own = 2 * (24 * heads * narrow + hidden * narrow + 2 * narrow + hidden * heads)  # two layers
    whole, reached = (
        sum(elements * times for _, elements, _, times in model.weight_shapes(reached=only)) for only in (False, True)
    )
    assert whole - reached == own


@pytest.mark.few(0, 3)
@pytest.mark.parametrize(("family", "fields"), [
    ("jamba", {"sequence_length": 150, "micro_batch": 2, "gradient_checkpointing": False}),
    ("jamba", {"sequence_length": 333, "precision": "bf16-mixed", "attention": "eager"}),
    ("olmo_hybrid", {"sequence_length": 1000, "micro_batch": 2, "gradient_checkpointing": False}),
    ("olmo_hybrid", {"sequence_length": 333, "precision": "bf16-mixed", "attention": "eager"}),
    ("gemma3n_text", {"sequence_length": 700, "micro_batch": 2, "gradient_checkpointing": True}),
    ("gemma3n_text", {"sequence_length": 333, "precision": "bf16-mixed", "attention": "eager"}),
    ("minimax", {"sequence_length": 900, "micro_batch": 2, "gradient_checkpointing": True}),
    ("minimax", {"sequence_length": 200, "precision": "bf16-mixed", "attention": "eager"}),
])  # fmt: skip
def test_families_are_held_within_two_percent_at_other_sizes(family, fields) -> None:
    assert abs(off_the_step(step(model_of(family, "default"), **fields))) <= 0.02


def test_the_kernel_of_the_first_mamba_is_not_described() -> None:
    with pytest.raises(NotDescribed, match="kernel of the first Mamba"):
        analytic_estimate(step(FAMILIES["jamba"], packages=["mamba-ssm", "causal-conv1d"]))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name", ["deepseek-v3.2", "glm-5", "exaone-4.0-32b", "minimax-m2.5", "olmo-2-7b", "devstral-small-2-24b"]
)
def test_models_of_the_catalogue_are_held_too(name) -> None:
    """Families that have no test model here."""
    whole = read_json(MODELS / f"{name}.json")
    asked = step(few_layers(whole.get("text_config", whole), range(2)), gradient_checkpointing=False)
    assert abs(off_the_step(asked)) <= 0.05


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "bamba"])
def test_packages_take_less_than_the_loop(family) -> None:
    model = model_of(family, "default")
    loop, kernels = (
        analytic_estimate(step(model, gradient_checkpointing=False, packages=packages), capability=H100)
        for packages in ([], PACKAGES[family].split())
    )
    assert kernels["peak_allocated_bytes"] < loop["peak_allocated_bytes"]
    assert kernels["resident_bytes"] == loop["resident_bytes"]


@pytest.mark.parametrize("family", ["qwen3_5_text", "gpt_oss", "deepseek_v3"])
def test_layers_that_repeat_are_run_three_times(family) -> None:
    """The rest is multiplication: the same peak as layer by layer, but for blocks."""
    period = {"qwen3_5_text": 4, "gpt_oss": 2, "deepseek_v3": 1}[family]
    whole = model_of(family, "default")
    layers = {"num_hidden_layers": 6 * period}
    if "layer_types" in whole:
        layers["layer_types"] = whole["layer_types"][:period] * 6
    for more, checkpointing in itertools.product((layers, {}), (True, False)):
        asked = step(whole | more, "full", sequence_length=128, gradient_checkpointing=checkpointing)
        short, long = (analytic_estimate(asked, capability=H100, blocks=blocks) for blocks in (False, True))
        assert short["peak_allocated_bytes"] == pytest.approx(long["peak_allocated_bytes"], rel=0.002)
        assert short["parameters"] == long["parameters"]


@pytest.mark.parametrize(("kinds", "period"), [
    ("aaab", (0, 1, 3)),
    ("aaabaaabaaab", (0, 4, 3)),
    ("daaaaaa", (1, 1, 6)),
    ("ab", (0, 2, 1)),
    ("abacababab", (4, 2, 3)),
])  # fmt: skip
def test_the_repetition_that_leaves_out_most_layers_is_found(kinds, period) -> None:
    whole = describe(FAMILIES["lfm2"])
    plans = tuple(replace(whole.plans[0], mixer=kind) for kind in kinds)
    assert replace(whole, plans=plans).period == period


def test_each_term_is_named() -> None:
    terms = analytic_estimate(step(FAMILIES["qwen3_5_text"], gradient_checkpointing=False), capability=H100)["terms"]
    assert {"linear attention", "attention", "MLP", "norms", "adapters"} <= {term["what"] for term in terms}


@pytest.mark.parametrize(("fields", "says"), [
    ({"parallel": {"strategy": "fsdp2", "gpus": 2}}, "FSDP2 with the layers of lfm2"),
    ({"packing": "rows"}, "packing: rows with the layers of lfm2"),
])  # fmt: skip
def test_what_is_not_described_of_such_layers_is_named(fields, says) -> None:
    with pytest.raises(NotDescribed, match=says):
        analytic_estimate(step(FAMILIES["lfm2"], **fields))


def test_gemma_3n_in_four_bits_is_refused() -> None:
    """transformers' code multiplies by `correction_coefs.weight` itself: the step fails."""
    with pytest.raises(NotDescribed, match="4-bit weights with the layers of gemma3n_text"):
        analytic_estimate(step(FAMILIES["gemma3n_text"], "qlora"))


def test_weights_that_come_quantized_are_refused() -> None:
    quantized = FAMILIES["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(NotDescribed, match="come quantized"):
        describe(quantized)


def test_experts_that_are_prepared_in_fp32_are_refused() -> None:
    with pytest.raises(NotDescribed, match="experts in fp32"):
        analytic_estimate(step(FAMILIES["lfm2_moe"], "qlora", kbit_preparation="trl"))
    assert analytic_estimate(step(FAMILIES["lfm2"], "qlora", kbit_preparation="trl"))["peak_allocated_bytes"]


def test_mamba_ssm_cannot_read_a_quantized_matrix() -> None:
    with pytest.raises(NotDescribed, match="mamba-ssm's kernel can't read a quantized out_proj"):
        analytic_estimate(step(FAMILIES["bamba"], "qlora", packages=["mamba-ssm", "causal-conv1d"]))


def test_a_target_that_matches_nothing_names_what_would() -> None:
    with pytest.raises(UserError) as caught:
        describe(FAMILIES["lfm2"]).targets(step(FAMILIES["lfm2"], lora={"target_modules": ["in_proi"]}).lora)
    assert "conv.in_proj" in str(caught.value)


def test_bounds_of_hybrids_come_from_hybrids_alone() -> None:
    dense = step({"model_type": "llama", "num_hidden_layers": 2})
    hybrid = step(FAMILIES["qwen3_5_text"])
    assert kind_of(hybrid).hybrid and not kind_of(dense).hybrid
    assert over_peak(kind_of(hybrid)) != over_peak(kind_of(dense))
    assert "hybrid" in peak_bound("lora", 10**9, hybrid=True).of


def test_a_verdict_near_the_border_is_left_open() -> None:
    asked = step(FAMILIES["granitemoehybrid"])
    peak = analytic_estimate(asked, capability=H100, blocks=False)["peak_allocated_bytes"]
    needs, share = Needs(asked, peak, H100), over_peak(kind_of(asked))
    assert needs.fits(int(peak * share.high) + 1) is True and needs.fits(int(peak * share.low) - 1) is False
    assert needs.fits(int(peak * (share.high + share.low) / 2)) is None


def test_a_few_layers_keep_what_each_of_them_is() -> None:
    model = {"num_hidden_layers": 6, "first_k_dense_replace": 3, "layer_types": list("abcdef")}
    kept = few_layers(model, range(2, 5))
    assert (kept["layer_types"], kept["first_k_dense_replace"], kept["num_hidden_layers"]) == (list("cde"), 1, 3)


@pytest.mark.skipif(find_spec("fla") is None, reason="`make test-kernels` runs it")
@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear"])
def test_the_closed_form_of_flash_linear_attention_is_held_within_five_percent(family) -> None:
    """Of what the step adds to the weights, with four layers of the family's usual sizes."""
    fields = {"method": "lora", "sequence_length": 600, "gradient_checkpointing": False, "packages": ["fla"]}
    asked = Scenario.from_mapping({"model": model_of(family, "default"), **fields})
    form = analytic_estimate(asked, capability=(9, 0))["peak_allocated_bytes"]
    found = trace(asked, capability=(9, 0), timeline=False)
    peak = found["peak_allocated_bytes"]
    assert abs(form - peak) <= 0.05 * (peak - found["resident_bytes"])
