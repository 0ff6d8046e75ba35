"""The search for the settings that train the most tokens a second."""

from types import SimpleNamespace

import pytest

from dryfit.cards.gpus import find
from dryfit.planner.fastest import Candidate, Search, _may_fit, _peak
from dryfit.scenario.scenario import Scenario

USABLE, RESIDENT = 1000, 400


def needed(way: dict, rows: int) -> int:
    return RESIDENT + way["each"] * rows


@pytest.mark.parametrize(
    ("each", "largest", "answered"),
    [(37, 16, [16]), (150, 4, [16, 4]), (590, 1, [16, 1]), (700, 1, [16, 1])],
)
def test_a_trace_rules_out_rows_that_can_not_fit(each, largest, answered) -> None:
    """Without an estimate each way begins with the most rows: what these show spares traces between."""
    asked = []

    def make(way, rows):
        step = SimpleNamespace(scenario=SimpleNamespace(loss="full"), gpu=None, way=way, rows=rows)
        return Candidate(way, rows, "", step)

    def answer(step):
        asked.append(step.rows)
        peak = needed(step.way, step.rows)
        trace = {"peak_allocated_bytes": peak, "resident_bytes": RESIDENT, "required_bytes": peak}
        return {"fits": peak <= USABLE, "trace": trace, "gpu": {"usable_bytes": USABLE}}

    search = Search([], [], (16, 8, 4, 2, 1), 1.0, True, make, answer)
    found = search._largest(make({"each": each}, 16))
    assert asked == answered and found.micro_batch == largest and found.fits is (each <= 600)


def test_without_an_estimate_layers_alike_say_where_to_begin() -> None:
    """Of a hybrid with Liger's loss, which has neither a form nor a record."""
    fields = {
        "model": "qwen3.5-9b",
        "sequence_length": 512,
        "loss": "liger",
        "gradient_checkpointing": False,
    }
    fits = []
    for rows in (1, 2, 16, 64):
        step = Scenario.from_mapping({**fields, "micro_batch": rows})
        asked = SimpleNamespace(scenario=step, gpu=find("rtx-4090"), where="here")
        assert _peak(asked) is None
        fits.append(_may_fit(asked))
    assert fits == sorted(fits, reverse=True) and fits[0] and not fits[-1]
