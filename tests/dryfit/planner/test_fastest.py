"""The search for the settings that train the most tokens a second."""

from types import SimpleNamespace

import pytest

from dryfit.planner.fastest import Candidate, Search

USABLE, RESIDENT = 1000, 400


def needed(way: dict, rows: int) -> int:
    return RESIDENT + way["each"] * rows


@pytest.mark.parametrize(("each", "largest", "answered"), [(37, 16, [16]), (150, 4, [16, 4]), (590, 1, [16, 1]),
                                                           (700, 1, [16, 1])])  # fmt: skip
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
