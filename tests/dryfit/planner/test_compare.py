"""Four answers side by side, with signed differences."""

from dataclasses import replace
from pathlib import Path

import pytest

from dryfit.analytic.estimate import Estimated, estimate
from dryfit.cards.gpus import GIB, MIB, find
from dryfit.cards.sentences import of_step
from dryfit.planner.compare import NO_GPU, NOT_MEASURED, compare
from dryfit.planner.omissions import omissions
from dryfit.readers.reading import TOO_HIGH, Reading
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.scenario_trace import Traced, traced
from dryfit.tracing.trace import trace

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 256,
}


def answers(**fields) -> tuple[Estimated, Traced]:
    scenario = Scenario.from_mapping({"model": MODEL, "sequence_length": 64, **fields})
    return estimate(scenario), Traced(scenario, trace(scenario, timeline=False))


def test_differences_are_signed_and_measured_where_the_device_is() -> None:
    estimated, traced = answers()
    compared = compare(estimated, traced)
    rule = estimated.rule_of_thumb["peak_allocated_bytes"]
    peak = traced.trace["peak_allocated_bytes"]
    assert compared.differences["rule_of_thumb_to_trace"]["bytes"] == rule - peak > 0
    assert compared.differences["analytic_to_trace"]["share"] == pytest.approx(0, abs=0.03)
    assert compared.answers["measurement"] is None
    assert compared.reasons == {"measurement": NOT_MEASURED, "time": NO_GPU}
    estimated, traced = answers()
    own = {"peak_allocated_bytes": 1000}
    compared = compare(
        estimated, traced, {"peak_allocated_bytes": 1001, "trace_on_the_same_device": own}
    )
    assert compared.differences["measurement_to_trace"] == {"bytes": 1, "share": 0.001}


@pytest.mark.thorough
def test_verdict_for_the_card_that_is_named() -> None:
    estimated, traced = answers(gpu="t4")
    judged = compare(estimated, traced)
    assert (judged.verdict.fits, judged.gpu.name) == (True, "t4")


@pytest.mark.few(1)
@pytest.mark.parametrize(("reserved_share", "warned"), [(0.98, True), (0.96, False)])
def test_a_card_that_is_nearly_full_is_slower_and_says_so(reserved_share, warned) -> None:
    estimated, traced = answers(gpu="t4")
    reserved = int(reserved_share * find("t4").usable_bytes)
    full = compare(
        estimated, replace(traced, trace={**traced.trace, "peak_reserved_bytes": reserved})
    )
    found = [
        warning for warning in full.to_mapping()["warnings"] if "of the GPU's memory" in warning
    ]
    assert bool(found) == warned and (not warned or "the step would reserve 98%" in found[0])


def test_architecture_without_an_analytic_estimate() -> None:
    scenario = Scenario.from_mapping({"model": MODEL, "sequence_length": 64})
    unknown = scenario.changed(model={"model_type": "bloom", "hidden_size": 64})
    estimated = estimate(unknown)
    assert (estimated.analytic, estimated.rule_of_thumb) == (None, None)
    _, traced = answers()
    compared = compare(estimated, traced)
    assert (
        compared.answers["rule_of_thumb"]["exact_count"]["parameters"] == traced.trace["parameters"]
    )
    assert "analytic_to_trace" not in compared.differences
    assert "bloom" in compared.reasons["analytic"]


@pytest.mark.nightly
def test_the_verdict_is_a_replay_at_the_gpus_own_size() -> None:
    """241 MiB serve this step and 243 do not: more memory is not always better."""
    llama = {
        **{
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
        },
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 4000,
            "max_position_embeddings": 8192,
        },
    }
    fields = {"model": llama, "method": "qlora", "sequence_length": 637, "micro_batch": 6}
    found = {}
    for usable in (239, 241, 243, 245, 252):
        gpu = {"vram_gib": (usable + 1) * MIB / GIB, "context_mib": 1}
        scenario = Scenario.from_mapping({**fields, "gpu": gpu})
        found[usable] = compare(estimate(scenario), traced(scenario))
    spare = {usable: one.verdict.headroom_bytes // MIB for usable, one in found.items()}
    assert spare == {239: -5, 241: 1, 243: -1, 245: 1, 252: 8}
    words = [one.verdict.word.value for one in found.values()]
    assert words == ["does_not_fit", "too_close", "too_close", "too_close", "fits"]
    by_luck = found[241]
    assert (
        by_luck.verdict.headroom_bytes == MIB
        and by_luck.traced.trace["required_bytes"] == 244 * MIB
    )
    assert [warning for warning in by_luck.warnings if "not every larger one" in warning]
    assert not [warning for warning in found[245].warnings if "not every larger one" in warning]
    line = of_step(by_luck.to_mapping())
    assert line.startswith("TOO CLOSE TO CALL on this card: blocks have to pack well; ")
    assert line.endswith("0.24 GiB is enough on any card")


def test_a_range_of_kernels_that_the_trace_gives_is_not_counted_a_second_time() -> None:
    reading = Reading("Unsloth", "", Path("train.py"))
    reading.approximates("unsloth", True, TOO_HIGH, "its kernels keep less", "step")
    scenario = Scenario.from_mapping({"model": MODEL, "sequence_length": 64})
    plain = {
        "peak_allocated_bytes": 9 * MIB,
        "resident_bytes": 4 * MIB,
        "required_bytes": 10 * MIB,
        "components": {},
    }
    ranged = plain | {
        "bounds": {"lowest_bytes": 8 * MIB, "highest_bytes": 9 * MIB, "missing": "kernels"}
    }
    assert [one.too_high_bytes for one in omissions([reading], scenario, {"trace": plain})] == [
        5 * MIB
    ]
    assert not list(omissions([reading], scenario, {"trace": ranged}))
