"""What the closed form knows of what a GPU must have, and what it leaves open."""

import csv

import pytest

from dryfit.analytic import certainty
from dryfit.analytic.allocations import BRIEF, form_events, variations
from dryfit.analytic.certainty import (
    Kind,
    Needs,
    follows_allocations,
    kind_of,
    over_peak,
    over_variations,
)
from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.engine.allocator import LARGE_SEGMENT, MIB, SMALL
from dryfit.engine.capacities import capacities, served_at
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import record

LLAMA = {
    **{
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 3,
    },
    **{
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 16000,
        "max_position_embeddings": 8192,
    },
}


def scenario(**fields) -> Scenario:
    return Scenario.from_mapping(
        {"model": LLAMA, "method": "full", "sequence_length": 700, "micro_batch": 3, **fields}
    )


def needs_of(step: Scenario) -> Needs:
    peak = analytic_estimate(step, capability=(8, 0), blocks=False)["peak_allocated_bytes"]
    return Needs(step, peak, (8, 0))


@pytest.mark.few(2, 4)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimizer": "adamw_8bit", "gradient_accumulation": 4},
        {"method": "lora", "gradient_checkpointing": False},
        {"method": "qlora", "kbit_preparation": "trl", "autocast": "bf16"},
        {"method": "qlora", "kbit_preparation": "peft", "autocast": "bf16"},
        {"precision": "fp32", "attention": "eager"},
        {"allocator": {"expandable_segments": True}},
        {"method": "lora", "loss": "chunked"},
        {"parallel": {"strategy": "fsdp2", "gpus": 2}},
        {"gradient_checkpointing": "reentrant"},
        {
            "method": "qlora",
            "gradient_checkpointing": "reentrant",
            "autocast": "bf16",
            "attention_mask": "padding",
        },
    ],
)
def test_the_forms_allocations_take_what_the_traces_do(fields) -> None:
    """First steps and loading leave fragments; with the peak alone up to a quarter would be missing."""
    step = scenario(**fields)
    expandable = step.allocator.expandable_segments
    traced = record(step, (8, 0)).required_bytes(expandable_segments=expandable)
    forms = [
        capacities(events, expandable_segments=expandable).required_bytes
        for events in variations(form_events(step, capability=(8, 0)))
    ]
    assert min(forms) * 0.99 - LARGE_SEGMENT <= traced <= max(forms) * 1.01 + LARGE_SEGMENT


@pytest.mark.parametrize("parallel", [{"strategy": "none"}, {"strategy": "fsdp2", "gpus": 2}])
def test_after_two_steps_each_moment_is_there_once(parallel) -> None:
    step, alive = scenario(parallel=parallel), {}
    for identity, size in form_events(step, capability=(8, 0)):
        if identity > 0:
            alive[identity] = size
        else:
            alive.pop(-identity, None)
    form = analytic_estimate(step, capability=(8, 0), blocks=False)
    states = form["components"]["optimizer_states"]
    assert states < sum(alive.values()) - form["resident_bytes"] < 2 * states


def test_a_verdict_is_open_only_near_the_border() -> None:
    needs = needs_of(scenario())
    share = over_peak(kind_of(needs.scenario))
    peak = needs.peak_bytes
    assert (
        needs.roughly(int(peak * share.high) + 1) is needs.fits(int(peak * share.high) + 1) is True
    )
    assert (
        needs.roughly(int(peak * share.low) - 1) is needs.fits(int(peak * share.low) - 1) is False
    )
    assert needs.roughly(peak) is None or share.low > 1
    about = needs.about_bytes
    verdicts = [
        needs.fits(round(about * factor)) for factor in (0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)
    ]
    assert verdicts[0] is False and verdicts[-1] is True and None in verdicts
    known = [verdict for verdict in verdicts if verdict is not None]
    assert known == sorted(known)


def test_near_the_border_the_forms_own_allocations_are_replayed_at_the_very_size() -> None:
    needs = needs_of(scenario())
    share, events = (
        over_variations(kind_of(needs.scenario)),
        list(variations(form_events(needs.scenario))),
    )
    for factor in (0.97, 0.985, 1.0, 1.015, 1.03):
        usable = round(needs.about_bytes * factor)
        if needs.roughly(usable) is not None:
            continue
        sizes = int(usable / share.high) - LARGE_SEGMENT, int(usable / share.low) + LARGE_SEGMENT
        served = {served_at(size, each)[2] for each in events for size in sizes}
        assert needs.fits(usable) is (served.pop() if len(served) == 1 else None)


def test_the_smallest_size_that_surely_suffices() -> None:
    needs = needs_of(scenario())
    about = needs.about_bytes
    sizes = [3 * about, about // 2, about, 2 * about]
    assert needs.smallest(sizes) == 2 * about
    assert needs.smallest([about // 2]) is None
    assert (
        needs.required_bytes(2 * about) > needs.peak_bytes > needs.required_bytes(about // 2) * 0.9
    )


def test_variations_that_disagree_leave_it_open() -> None:
    """Even where each of them is sure at this size."""
    needs = needs_of(scenario())
    between = [[(1, 700 * MIB)], [(1, 900 * MIB)]]
    needs.__dict__["_variations"] = between
    needs.peak_bytes = 750 * MIB
    assert needs.roughly(800 * MIB) is None and needs.fits(800 * MIB) is None
    needs.__dict__["_variations"] = between[:1]
    assert needs.fits(800 * MIB) is True
    needs.__dict__["_variations"] = between[1:]
    assert needs.fits(800 * MIB) is False


@pytest.mark.parametrize(
    ("fields", "followed"),
    [
        ({}, True),
        ({"loss": "chunked"}, False),
        ({"loss": "chunked", "method": "lora"}, True),
        ({"parallel": {"strategy": "ddp", "gpus": 2}}, False),
        ({"parallel": {"strategy": "fsdp2", "gpus": 2}}, True),
        ({"model": "qwen3-30b-a3b"}, False),
    ],
)
def test_where_the_form_does_not_know_allocations_its_peak_alone_decides(fields, followed) -> None:
    step = scenario(**fields)
    assert follows_allocations(step) is followed
    needs = needs_of(step)
    share = over_peak(kind_of(step))
    between = int(needs.peak_bytes * (share.low + share.high) / 2)
    if not followed:
        assert needs.fits(between) is None


def test_every_row_lies_within_what_is_said_of_its_kind() -> None:
    with certainty.ROWS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 100
    for row in rows:
        kind = Kind(row["method"], row["strategy"], row["expandable"] == "1")
        peak = int(row["peak_form"])
        share = over_peak(kind)
        assert (
            peak * share.low <= int(row["least_trace"])
            and int(row["required_trace"]) <= peak * share.high
        )
        assert share.low <= 1 - certainty.LEAST and share.high >= 1 + certainty.LEAST


def test_variations_differ_in_tensors_that_live_briefly() -> None:
    events = form_events(scenario())
    first, *others = variations(events)
    assert first == events and len(others) == 7
    sizes = {identity: size for identity, size in events if identity > 0}
    for one in others:
        assert one != events
        born = {identity for identity, _ in one if identity > 0}
        assert all(sizes[identity] > SMALL for identity in sizes.keys() - born)
        places = {identity: index for index, (identity, _) in enumerate(events)}
        assert all(
            places[-identity] - places[identity] <= BRIEF for identity in sizes.keys() - born
        )
        freed = [-identity for identity, _ in one if identity < 0]
        assert len(freed) == len(set(freed)) and set(freed) <= born
    assert list(variations(events)) == [first, *others]


def test_autocast_and_windows_are_described_or_refused() -> None:
    """Each product casts both operands there; the form, which counts widths, saw none of the copies."""
    with pytest.raises(NotDescribed, match="autocast to bf16 over weights in fp16"):
        analytic_estimate(scenario(method="lora", precision="fp16", autocast="bf16"))
    analytic_estimate(scenario(method="lora", precision="fp32", autocast="bf16"))
    # Mistral's class has a window of 4,096; its newer models say null, and attention looks back over everything.
    mistral = {**LLAMA, "model_type": "mistral"}
    far = {"sequence_length": 4200, "micro_batch": 1, "precision": "fp32"}
    whole = analytic_estimate(scenario(model={**mistral, "sliding_window": None}, **far))[
        "peak_allocated_bytes"
    ]
    window = analytic_estimate(scenario(model=mistral, **far))["peak_allocated_bytes"]
    assert whole == analytic_estimate(scenario(**far))["peak_allocated_bytes"] != window
