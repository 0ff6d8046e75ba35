"""What is shown as fitting fits: borders against traces, and what lies between traces against a trace there."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dryfit.analytic.decoder import NotDescribed
from dryfit.cards.gpus import GIB, Gpu, find
from dryfit.engine.capacities import capacities
from dryfit.engine.cuda_rules import cublas_workspace_bytes
from dryfit.engine.interpolate import Recording, Scaled
from dryfit.planner.changes import apply, as_method, spread
from dryfit.planner.feasibility import feasibility, largest
from dryfit.planner.largest_fit import Borders, by_kernels, steps
from dryfit.readers.request import parse_request
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import Recorder, record
from tests.dryfit.decoders import LLAMA_3_LAYERS


def make(**fields) -> Scenario:
    return Scenario.from_mapping({"model": LLAMA_3_LAYERS, "sequence_length": 256, **fields})


def card(usable: int) -> Gpu:
    return replace(
        find({"vram_gib": 1, "context_mib": 512}),
        total_bytes=usable + find({"vram_gib": 1, "context_mib": 512}).context_bytes,
    )


RECORDED = Recorder()  # steps of one model share it


def required(scenario: Scenario) -> int:
    return RECORDED(scenario).required_bytes()


def test_largest_micro_batch_fits_and_the_next_does_not() -> None:
    scenario, gpu = make(), card(200 * 2**20)
    found = largest(scenario, gpu, "micro_batch")
    assert found["value"] > 1
    assert (
        required(scenario.changed(micro_batch=found["value"]))
        == found["required_bytes"]
        <= gpu.usable_bytes
    )
    assert required(scenario.changed(micro_batch=found["value"] + 1)) > gpu.usable_bytes
    assert found["headroom_bytes"] == gpu.usable_bytes - found["required_bytes"] >= 0


def test_the_largest_step_at_its_ends() -> None:
    found = largest(make(), card(4 * GIB), "sequence_length")
    assert (found["value"], found["limited_by_positions"]) == (1024, True)
    assert largest(make(), card(2**20), "micro_batch")["value"] == 0
    assert feasibility({"lora": make(method="lora")}, []) == []


@pytest.mark.thorough
def test_a_search_in_records_ends_where_one_in_traces_does(monkeypatch) -> None:
    """TRL's step of a small Qwen3: no value is traced, and all figures are the same."""
    base = parse_request(
        {"model": "qwen3-0.6b", "method": "qlora", "sequence_length": 512, "like": "trl"}
    ).scenario
    gpu = card(3 * GIB)
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "__call__", lambda *_: pytest.fail("a record knows this step"))
        found = largest(base, gpu, "micro_batch")
    monkeypatch.setattr("dryfit.planner.largest_fit.if_recorded", lambda *_: None)
    assert largest(base, gpu, "micro_batch") == found and 1 < found["value"] < 64


@pytest.mark.parametrize("fields", [{}, {"attention": "eager"}], ids=str)
def test_without_an_estimate_the_border_is_the_same_and_nothing_far_beyond_it_is_traced(
    fields, monkeypatch
) -> None:
    """As for layers of several kinds."""
    scenario, gpu, traced = make(**fields), card(400 * 2**20), []
    known = largest(scenario, gpu, "micro_batch")

    def nothing(*_, **__):
        raise NotDescribed("nothing is described")

    def traces(recorder, step, capability=None, *, record=Recorder.__call__):
        traced.append(step.micro_batch)
        return record(recorder, step, capability)

    monkeypatch.setattr("dryfit.planner.largest_fit.analytic_estimate", nothing)
    monkeypatch.setattr(Recorder, "__call__", traces)
    found = largest(scenario, gpu, "micro_batch")
    assert found | {"seen_from": None} == known | {"seen_from": None}
    assert max(traced) < 2 * known["value"] and len(traced) <= 6


@pytest.mark.nightly
def test_everything_below_the_longest_sequence_fits() -> None:
    scenario, gpu = make(), card(80 * 2**20)
    found = largest(scenario, gpu, "sequence_length")
    assert 0 < found["value"] < 1024
    for length in range(64, found["value"] + 1, 64):
        assert required(scenario.changed(sequence_length=length)) <= gpu.usable_bytes


@pytest.mark.thorough
def test_a_table_and_a_question_give_one_answer(monkeypatch) -> None:
    # On two cores a process takes two of the three methods.
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    cards = [replace(card(size * 2**20), name=str(size)) for size in (60, 150)]
    step = make(model={**LLAMA_3_LAYERS, "num_hidden_layers": 1})
    bases = {method: apply(step, as_method(step, method)) for method in ("full", "lora", "qlora")}
    rows = feasibility(bases, cards)
    assert [row["method"] for row in rows] == ["full"] * 2 + ["lora"] * 2 + ["qlora"] * 2
    for row in rows:
        gpu = next(gpu for gpu in cards if gpu.name == row["gpu"])
        for field in ("micro_batch", "sequence_length"):
            value, base = row[f"largest_{field}"], bases[row["method"]]
            if value:
                assert required(replace(base, **{field: value})) <= gpu.usable_bytes
            if value := row["expandable_segments"][f"largest_{field}"]:
                assert RECORDED(replace(base, **{field: value})).fits(
                    gpu.usable_bytes, expandable_segments=True
                )
    threads = torch.get_num_threads()
    for method in ("full", "qlora"):
        (one,) = feasibility({method: bases[method]}, [cards[1]], verify=["150"])
        assert torch.get_num_threads() == threads, "what a plan took for itself is given back"
        same = next(row for row in rows if row["method"] == method and row["gpu"] == "150")
        assert one["verified"] and not same["verified"]
        for name in ("largest_micro_batch", "largest_sequence_length", "required_bytes"):
            assert one[name] == same[name]
            assert one["expandable_segments"][name] == same["expandable_segments"][name]


def test_the_table_knows_several_cards() -> None:
    step = make(model={**LLAMA_3_LAYERS, "num_hidden_layers": 1}, method="full")
    by_count = {str(count): apply(step, spread(step, count)[0]) for count in (2, 4, 8)}
    rows = feasibility(by_count, [card(40 * 2**20)])
    assert [row["gpus"] for row in rows] == [2, 4, 8]
    batches = [row["largest_micro_batch"] for row in rows]
    assert batches == sorted(batches)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "fields", [{}, {"method": "full"}, {"attention": "eager", "gradient_checkpointing": False}]
)
def test_between_traces_the_events_are_those_of_a_trace(fields) -> None:
    scenario = make(**fields)
    borders = Borders(scenario, "sequence_length", None, [64 * 2**20, 256 * 2**20])
    for length in (384, 448):
        between = borders.scaled.at(length)
        traced = record(scenario.changed(sequence_length=length))
        assert between.required_bytes() == traced.required_bytes()


def scaled_by(sequences) -> tuple[Scaled, list[int]]:
    """A step whose events are given by its length, and which lengths it was traced at."""
    asked: list[int] = []

    def recorded(value: int) -> Recording:
        asked.append(value)
        return Recording([sequences(value)])

    return Scaled(recorded), asked


def test_where_the_events_change_is_looked_for_by_halves() -> None:
    """A step of a length above the change once took a trace for each length, since the trace below it is another."""
    scaled, asked = scaled_by(
        lambda value: [(1, value * 2**20), (2, 2**20), (-1, 0)][: 3 if value < 50 else 2]
    )
    for value in (10, 40, 1000):
        scaled.record(value)
    assert scaled.at(30).sequences == [[(1, 30 * 2**20), (2, 2**20), (-1, 0)]] and asked == [
        10,
        40,
        1000,
    ]
    for value in range(60, 1000):
        assert scaled.at(value).sequences == [[(1, value * 2**20), (2, 2**20)]]
    assert len(asked) <= 3 + 10


def test_steps_of_a_search_and_records_of_other_events() -> None:
    scaled, asked = scaled_by(lambda value: [(1 + number, 2**20) for number in range(value)])
    for value in (10, 40, 90, 70):
        scaled.record(value)
    assert scaled.at(60).traced and len(scaled.at(60).sequences[0]) == 60
    assert asked == [10, 40, 90, 70, 60]
    values = steps("sequence_length", 32768)
    assert (
        values[:3] == [64, 128, 192] and values[-1] == 32768 and 8192 in values and 16384 in values
    )
    assert all(later / value - 1 <= 1 / 64 for value, later in pairwise(values) if value >= 4096)
    assert capacities([(1, 2**20)]).required_bytes == 2 * 2**20


@pytest.mark.thorough
def test_kernels_of_a_card_share_traces() -> None:
    scenario = make()
    ours, theirs = record(scenario, (8, 0)), record(scenario, (9, 0))
    assert ours.sequences != theirs.sequences
    assert ours.with_workspaces(cublas_workspace_bytes((9, 0))).sequences == theirs.sequences
    (group,) = by_kernels(scenario, [find("h100-80gb"), find("a100-40gb")])
    assert [gpu.name for gpu in group] == ["a100-40gb", "h100-80gb"]
    # Liger's norm takes a row of sums for each of the card's processors: 128 of an RTX 4090, 108 of an A100.
    scenario = make(
        method="full", kernels="liger", loss="liger", gpu="rtx-4090", sequence_length=64
    )
    capability, width = find("rtx-4090").capability, scenario.size("hidden_size")
    recording = Borders(scenario, "sequence_length", capability, [2**30]).scaled.record(64)
    sizes = {size for _, size in recording.sequences[0]}
    assert 128 * width * 4 in sizes and 108 * width * 4 not in sizes
    assert recording.required_bytes() == record(scenario, capability).required_bytes()
    scenario, gpu = make(gradient_checkpointing="reentrant", autocast="bf16"), card(200 * 2**20)
    borders = Borders(scenario, "micro_batch", gpu.capability, [gpu.usable_bytes])
    found = borders.largest_traced(gpu.usable_bytes)
    assert max(borders.scaled.recordings) <= 2 * found.value


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_recorder_takes_the_model_that_it_has_built(method) -> None:
    scenario = apply(make(), as_method(make(), method))
    again = Recorder()
    for length in (64, 256, 64):
        step = scenario.changed(sequence_length=length)
        assert again(step, (8, 0)).sequences == record(step, (8, 0)).sequences


def test_a_fit_by_luck_is_above_the_border(monkeypatch) -> None:
    """What fits above the first value that does not is not the border."""
    borders = Borders(make(), "micro_batch", None, [10])
    monkeypatch.setattr(borders, "_guess", lambda *_: 11)
    monkeypatch.setattr(
        borders, "fits", lambda value, capacity, *, expandable: value in (*range(1, 10), 11, 12)
    )
    monkeypatch.setattr(borders, "_surely_too_large", lambda *_: False)
    assert borders.largest(10).value == 9


@pytest.mark.few(1)
@pytest.mark.parametrize("packing", ["none", "rows"])
def test_the_border_and_the_first_value_above_it_are_traced_themselves(packing) -> None:
    scenario, capacity = make(packing=packing), 90 * 2**20
    borders = Borders(scenario, "sequence_length", (8, 0), [capacity])
    value = borders.largest_traced(capacity).value
    above = borders.values[borders.values.index(value) + 1]
    assert borders.scaled.at(value).traced and borders.scaled.at(above).traced
    assert borders.scaled.at(value).fits(capacity) and not borders.scaled.at(above).fits(capacity)
