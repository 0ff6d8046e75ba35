"""What a table shows as fitting is traced: a few cells of a small model, and what an unsafe border would look like."""

import json
from dataclasses import replace
from itertools import islice

import pytest

from dryfit.cards.gpus import find
from dryfit.planner.largest_fit import Border, Borders
from tests.dryfit.decoders import LLAMA_3_LAYERS
from tests.repository import ROOT
from validation.borders import cells, judged, text

CARD = replace(
    find({"vram_gib": 1}),
    name="small",
    total_bytes=find({"vram_gib": 1}).context_bytes + 90 * 2**20,
)


@pytest.mark.thorough
def test_drawn_borders_fit_by_their_own_trace_and_what_is_next_does_not() -> None:
    drawn = list(islice(cells(3, [LLAMA_3_LAYERS], [CARD]), 12))
    assert drawn[0] == next(cells(3, [LLAMA_3_LAYERS], [CARD]))
    cell = next(cell for cell in drawn if cell["field"] == "micro_batch" and not cell["expandable"])
    row = judged(cell)
    assert row["fits"] and 0 < row["shown"] <= row["largest"] and not row["too_careful"]
    assert row["required_bytes"] <= row["usable_bytes"] == CARD.usable_bytes
    assert "fits" in text(row) and "NOT" not in text(row)


def test_a_border_that_does_not_fit_is_told(monkeypatch) -> None:
    cell = next(
        cell for cell in cells(3, [LLAMA_3_LAYERS], [CARD]) if cell["field"] == "micro_batch"
    )
    monkeypatch.setattr(
        Borders, "largest", lambda self, *_, **__: self.scaled and Border(2000, 1, False)
    )
    row = judged(cell)
    assert not row["fits"] and row["largest"] is None and "DOES NOT FIT" in text(row)


def test_every_kept_border_fits() -> None:
    kept = json.loads((ROOT / "validation" / "data" / "borders.json").read_text(encoding="utf-8"))
    rows = [row for rows in kept.values() for row in rows]
    assert (
        len(kept["1"]) == 40
        and len({row["model"] for row in rows}) > 10
        and len({row["gpu"] for row in rows}) > 10
    )
    for row in rows:
        assert (
            row["fits"] and row["required_bytes"] <= row["usable_bytes"] and not row["too_careful"]
        )
