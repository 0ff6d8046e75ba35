"""litgpt's recipes: what is kept is every row, within what the page claims."""

import csv
import statistics

from dryfit.common.files import read_json
from tests.repository import ROOT
from validation import litgpt_hub

KEPT = read_json(litgpt_hub.REPORT)["rows"]
PAGE = (ROOT / "docs" / "memory-validation.md").read_text(encoding="utf-8")


def errors(method: str) -> list[float]:
    return [abs(row["error"]) for row in KEPT if row["error"] is not None and row["config"].endswith(f"/{method}")]


def test_every_row_is_kept_and_shown():
    with litgpt_hub.TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["config"] for row in rows] == [row["config"] for row in KEPT]
    assert all(f"| {row['config']} |" in litgpt_hub.table(KEPT) for row in KEPT)
    assert litgpt_hub.summary(KEPT) in " ".join(PAGE.split()), "the page may wrap the line anywhere"


def test_what_is_claimed_holds():
    assert max(errors("lora")) <= 0.5 and statistics.median(errors("lora")) <= 0.1
    assert statistics.median(errors("qlora")) <= 0.3
    for row in KEPT:
        if row["published_gb"] == "OOM":
            assert row["predicted_bytes"] > 24e9


def test_a_row_is_compared_as_it_was_published():
    row = {"config": "a/lora", "peak_allocated_gb": "10.00"}
    assert litgpt_hub.compare(row, 10_100_000_000)["error"] == 1.0
    assert litgpt_hub.compare(row | {"peak_allocated_gb": "OOM"}, 1)["error"] is None
    assert litgpt_hub.compare(row | {"config": litgpt_hub.IMPOSSIBLE[0]}, 1)["error"] is None
