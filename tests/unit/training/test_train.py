"""The loop around the step: batches, schedule, accumulation, checkpoints."""

from types import SimpleNamespace

import pytest
import torch

from dryfit.step.batches import IGNORED, Row, answer_tokens, collate, epoch_batches
from scripts.runs.configuration import read_schema
from scripts.training import train_process as worker
from scripts.training.loop import plan_steps
from scripts.training.schedules import SCHEDULES, learning_rate_at


def make_rows(count):
    return [
        Row(list(range(3 + index % 7)), [IGNORED, *range(2 + index % 7)]) for index in range(count)
    ]


def test_epochs_and_batches_have_an_order_by_seed_and_length():
    rows = make_rows(103)
    batches = epoch_batches(rows, 8, seed=1, epoch=0)
    assert sorted(map(id, (row for batch in batches for row in batch))) == sorted(map(id, rows))
    assert max(map(len, batches)) == 8
    assert batches == epoch_batches(rows, 8, seed=1, epoch=0)
    assert batches != epoch_batches(rows, 8, seed=1, epoch=1)
    assert batches != epoch_batches(rows, 8, seed=2, epoch=0)
    rows = make_rows(512)
    used = sum(len(row.input_ids) for row in rows)
    padded = sum(
        len(batch) * max(len(row.input_ids) for row in batch)
        for batch in epoch_batches(rows, 8, 0, 0)
    )
    assert padded <= 1.1 * used
    # Batches of rows of neighbouring lengths, but not the same ones in every epoch.
    rows = [Row([1] * length, [1] * length) for length in range(1, 401)]
    together = [
        {
            frozenset(len(row.input_ids) for row in batch)
            for batch in epoch_batches(rows, 2, seed=0, epoch=epoch)
        }
        for epoch in (0, 1)
    ]
    assert len(together[0] & together[1]) < 100


def test_batches_pad_to_their_longest_row_with_a_mask_where_one_was_predicted():
    batch = collate(
        [Row([1, 2, 3], [IGNORED, 2, 3]), Row([4], [IGNORED])], pad_token_id=9, device="cpu"
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED] * 3]
    assert batch["input_ids"].dtype == torch.long
    batch = collate(
        [Row([1, 2, 3], [IGNORED, 2, 3]), Row([4], [IGNORED])],
        pad_token_id=9,
        device="cpu",
        mask=True,
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert answer_tokens([Row([1, 2], [1, 2]), Row([1, 2], [IGNORED, 2])]) == 2


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "max_steps", "expected"),
    [(100, 8, 2, None, (13, 26)), (100, 8, 2, 5, (13, 5)), (8, 8, 1, 100, (1, 1))],
)
def test_the_number_of_steps(rows, batch, epochs, max_steps, expected):
    assert plan_steps(rows, batch, epochs, max_steps) == expected


def rates_of(schedule, total=100, warmup=0.1):
    loop = {"learning_rate": 1e-3, "warmup_ratio": warmup, "decay_ratio": 0.2, "schedule": schedule}
    return [learning_rate_at(step, total, loop) for step in range(total)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_rises_to_the_peak_and_never_above_it(schedule):
    rates = rates_of(schedule)
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(1e-3) and min(rates) > 0
    assert rates_of(schedule, total=1, warmup=0.0) == [1e-3]


def test_the_schedules_fall_as_their_names_say():
    """After a warm-up of 10 of 100 steps: half of the rest is taken at step 55."""
    assert rates_of("cosine")[55] == pytest.approx(0.5e-3)
    assert rates_of("cosine")[-1] < 1e-6
    assert rates_of("linear")[55] == pytest.approx(0.5e-3)
    assert rates_of("linear")[-1] == pytest.approx(1e-3 / 90)
    assert set(rates_of("constant")[9:]) == {1e-3}
    stable = rates_of("wsd")
    assert set(stable[9:83]) == {1e-3}  # the last 18 steps, a fifth of 90, fall
    assert stable[91] == pytest.approx(1e-3 * (1 - 0.5**0.5))
    assert stable[-1] < 0.05e-3


def test_the_configuration_allows_the_schedules_that_there_are():
    form = read_schema()["properties"]["training"]["properties"]
    assert form["schedule"]["enum"] == list(SCHEDULES)


@pytest.mark.parametrize(
    ("precision", "device", "fast", "said"),
    [
        ("bf16", "cpu", False, 1),
        ("bf16", "cpu", True, 0),
        ("fp32", "cpu", False, 0),
        ("bf16", "cuda", False, 0),
    ],
)
def test_a_processor_without_fast_bf16_says_how_slow_it_is(
    monkeypatch, caplog, precision, device, fast, said
):
    monkeypatch.setattr(worker, "multiplies_bf16", lambda: fast)
    worker.warn_of_slow_bf16(SimpleNamespace(compute_precision=precision), device)
    assert len(caplog.messages) == said and all(
        "precision: auto" in message for message in caplog.messages
    )
