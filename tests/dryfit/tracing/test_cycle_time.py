"""How long a cycle takes: the trainer's phases by the launches of its trace, an engine's by the roofline."""

import pytest

from dryfit.analytic.estimate import estimate
from dryfit.ask.text import cycle_lines
from dryfit.hours.run_time import Run
from dryfit.planner.compare import compare
from dryfit.planner.cycle import knobs
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.cycle import cycle
from dryfit.tracing.scenario_trace import traced
from tests.dryfit.tracing.test_cycle import GPU, scenario

pytestmark = pytest.mark.skipif("not __import__('importlib').util.find_spec('trl')")


def changed(**fields) -> Scenario:
    return Scenario.from_mapping(scenario().to_mapping() | fields)


@pytest.fixture(scope="module")
def known():
    return traced(scenario()).trace


def time_of(known, step):
    return cycle(step, known, GPU).time


def test_each_phase_of_a_cycle_has_its_seconds(known):
    time = time_of(known, scenario(sleep_level=1))
    assert set(time.seconds) == {
        "weight sync",
        "generate",
        "sleep",
        "old log-probabilities",
        "reference log-probabilities",
        "update",
    }
    assert all(seconds > 0 for seconds in time.seconds.values())
    assert time.whole == sum(time.seconds.values())
    assert time.tokens == 4 * scenario().completion_length
    assert "sleep" not in time_of(known, scenario(sleep_level=2)).seconds  # level 2 copies nothing


def test_answers_that_are_used_twice_or_come_from_elsewhere(known):
    twice = scenario(iterations=2)
    once, update = (
        time_of(known, scenario()).seconds["update"],
        time_of(traced(twice).trace, twice).seconds["update"],
    )
    assert update == pytest.approx(2 * once, rel=0.1)
    asked = changed(generation={"engine": "none"})
    assert "generate" not in time_of(traced(asked).trace, asked).seconds
    found = {
        next(iter(knob.changes["generation"])): knob
        for knob in knobs(cycle(scenario(), known, GPU), known)
    }
    assert found["cuda_graphs"].more_seconds > 0
    assert found["mode"].more_seconds == pytest.approx(
        time_of(known, scenario(**found["mode"].changes["generation"])).whole
        - time_of(known, scenario()).whole
    )


@pytest.mark.thorough
def test_a_cycle_of_several_updates_takes_as_many_more(known):
    asked = scenario()
    longer = changed(generation={"engine": "vllm", "steps_per_generation": 8})
    once, eight = time_of(known, asked), time_of(traced(longer).trace, longer)
    assert (once.updates, eight.updates) == (1, 8)
    assert eight.seconds["update"] == pytest.approx(8 * once.seconds["update"], rel=0.25)
    assert eight.seconds["old log-probabilities"] == pytest.approx(
        8 * once.seconds["old log-probabilities"], rel=0.25
    )
    assert eight.seconds["weight sync"] == once.seconds["weight sync"]
    update = eight.of_an_update()
    assert update["seconds_per_step"] == eight.whole / 8 and sum(
        update["shares"].values()
    ) == pytest.approx(1, abs=1e-3)


@pytest.mark.nightly
def test_what_transformers_generates_is_timed_token_by_token():
    def seconds(tokens):
        asked = changed(
            generation={"engine": "transformers"},
            sequence_length=32 + tokens,
            preference={"generations": 4, "completion_length": tokens},
        )
        return time_of(traced(asked).trace, asked).seconds["generate"]

    assert seconds(128) - seconds(64) == pytest.approx(seconds(64) - 2 * seconds(64) / 64, rel=0.25)


def test_a_server_of_its_own_gets_its_weights_by_the_link_and_several_share_the_answers(known):
    beside, apart = (
        time_of(known, scenario()),
        time_of(known, scenario(mode="server", utilization=0.9)),
    )
    assert apart.seconds["weight sync"] != beside.seconds["weight sync"]
    many = changed(
        gpu="3xrtx-4090",
        generation={"engine": "vllm", "mode": "server", "servers": 2, "utilization": 0.9},
    )
    shared = cycle(many, known, GPU).time
    assert shared.seconds["generate"] <= apart.seconds["generate"]


@pytest.mark.thorough
def test_an_answer_tells_the_time_and_the_run_counts_prompts():
    asked = scenario(utilization=0.5)
    mapping = compare(estimate(asked), traced(asked)).to_mapping()
    time = mapping["phases_of_cycle"]["time"]
    assert (
        mapping["time"]["seconds_per_step"] == time["seconds_per_cycle"] / time["updates_per_cycle"]
    )
    assert mapping["time"]["range"] is None and "time" not in mapping["reasons"]
    text = "\n".join(cycle_lines(mapping))
    assert (
        "a cycle of 1 update takes" in text and "tokens a second" in text and "not counted" in text
    )
    assert Run(rows=100).steps(asked) == 100 * 4 // 4
    mean = Run(rows=100, tokens_per_row=48).typical_step(asked)
    assert (
        mean.sequence_length - mean.completion_length
        == asked.sequence_length - asked.completion_length
    )


@pytest.mark.thorough
def test_without_a_speed_of_the_card_there_is_a_reason():
    asked = changed(gpu={"vram_gib": 24})
    mapping = compare(estimate(asked), traced(asked)).to_mapping()
    assert mapping["time"] is None and "speed" in mapping["reasons"]["time"]
    assert mapping["phases_of_cycle"]["time"] is None
