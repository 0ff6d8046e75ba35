"""Training, evaluation, merge check and measurement with ``device: cuda``, over a simulated card (stages.py)."""

from pathlib import Path

import pytest

from tests.end_to_end import whole_chain
from tests.end_to_end.whole_chain import started

thorough, nightly = pytest.mark.thorough, pytest.mark.nightly


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    started(folder, "make")
    return folder


@pytest.mark.parametrize(
    ("case", "rank", "resumed"),
    [
        ("qlora", None, "resumed"),
        pytest.param("lora", None, "", marks=thorough),
        pytest.param("autocast", None, "", marks=thorough),
        pytest.param("fp16", None, "resumed", marks=thorough),
        pytest.param("rows", None, "", marks=nightly),
        pytest.param("shared_prefix", None, "", marks=thorough),
        ("lora ddp", 1, ""),
        pytest.param("lora ddp", 0, "", marks=nightly),
        pytest.param("qlora ddp", 1, "", marks=thorough),
        pytest.param("lora fsdp2", 0, "resumed", marks=thorough),
        pytest.param("lora fsdp2", 1, "", marks=nightly),
        pytest.param("qlora fsdp2", 0, "", marks=thorough),
    ],
)
def test_a_training_ends_with_its_adapter(
    place: Path, case: str, rank: int | None, resumed: str
) -> None:
    found, said = started(place, case, str(rank or 0), *filter(None, [resumed]))
    assert "error" not in found, said
    assert found["scaled_steps"] == (2 if case == "fp16" else 0)
    assert ("report" in found) == (not rank)  # the first process writes it
    if rank:
        return
    report = found["report"]
    assert report["device"] == "NVIDIA GeForce RTX 4090" and found["adapter"] > 1_000
    assert report["steps"] == len(found["curve"]) == 2
    assert report["resumed_from_step"] == (1 if resumed else None)
    assert (
        len(report["ranks"]) == (1 if rank is None else 2)
        and report["peak_allocated_bytes"] > 2**24
    )


@thorough
def test_half_a_micro_batch_goes_on_at_the_cards_border(place: Path) -> None:
    found, said = started(place, "halve")
    assert "error" not in found, said
    assert len(found["ran_out"]) == 2 and [row["micro_batch"] for row in found["curve"]] == [2, 2]
    assert found["report"]["peak_allocated_bytes"] < 18_000_000
    stopped, said = started(place, "stop")
    assert (
        "does not fit the device's memory" in stopped["error"]
        and "micro_batch: 4" in stopped["error"]
    ), said


def test_an_evaluation_answers_on_the_card(place: Path) -> None:
    found, said = started(place, "evaluation")
    assert "error" not in found, said
    assert "computed apart" not in said and len(found["answers"]) == 4


@thorough
def test_answers_one_by_one(place: Path) -> None:
    """In transformers' own way, as where a model takes no masks."""
    found, said = started(place, "evaluation apart")
    assert "error" not in found, said
    assert "computed apart" in said and len(found["answers"]) == 4


@thorough
def test_the_merge_check_computes_on_the_card(place: Path) -> None:
    found, said = started(place, "merge check")
    assert "error" not in found, said
    assert found["complete"] and found["passed"] and found["checks"]["logits"]["device"] == "cuda"


@thorough
def test_the_measurement_is_the_trace_of_the_same_step(place: Path) -> None:
    found, said = started(place, "measurement")
    assert "error" not in found, said
    predicted, _ = started(place, "trace")
    assert found["peak_allocated_bytes"] == pytest.approx(
        predicted["peak_allocated_bytes"], rel=0.001
    )
    assert found["parameters"] == predicted["parameters"]


@thorough
@pytest.mark.parametrize(
    ("case", "gpus", "is_resumed"),
    [("qlora", 1, True), ("lora", 1, False), ("lora ddp", 2, False), ("qlora fsdp2", 2, True)],
)
def test_the_whole_chain(tmp_path: Path, case: str, gpus: int, is_resumed: bool) -> None:
    """Each stage from what the last one left; tests/gpu has the same on a GPU."""
    found = whole_chain.run(tmp_path, case, is_resumed=is_resumed)
    whole_chain.check(found, gpus, is_resumed)
