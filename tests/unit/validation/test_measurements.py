"""The table of measurements, how its rows become scenarios, and three rows traced whole."""

import json
import subprocess
import sys

import pytest

from scripts.scenario.scenario import ROOT
from scripts.validation import measurements as validate

HELD_OUT = ROOT / "config" / "measurements" / "held-out.csv"


def row(identity: str) -> dict[str, str]:
    rows = [*validate.read_measurements(), *validate.read_measurements(HELD_OUT)]
    return next(entry for entry in rows if entry["id"] == identity)


def test_the_table_is_complete_with_sources_and_licences():
    rows = validate.read_measurements()
    assert len(rows) == 65
    assert len(validate.read_measurements(source="t4")) == 57
    assert len(validate.read_measurements(source="a100")) == 8
    assert all(entry["source"] and entry["licence"] in ("MIT", "Apache-2.0") for entry in rows)


@pytest.mark.parametrize("entry", validate.read_measurements(), ids=lambda entry: entry["id"])
def test_every_row_is_a_scenario(entry):
    scenario = validate.scenario_of(entry)
    assert scenario.method == entry["method"]
    assert scenario.sequence_length * scenario.micro_batch == int(entry["sequence_length"]) * int(entry["micro_batch"])


# LoRA by eager and fused attention in every phase; QLoRA loaded one tensor after the other.
@pytest.mark.parametrize("identity", ["t4-sweep-29", "t4-sweep-31", "t4-notebook-04", "t4-notebook-08"])
def test_rows_that_leave_nothing_to_chance_are_exact(identity):
    (result,) = validate.validate([row(identity)])
    rounding = 0.5 if "notebook" in identity else 0.006  # of the published figures, in MiB
    differences = result["difference_bytes"]
    assert differences.pop("reserved") == 0
    assert {"allocated"} <= set(differences) and max(map(abs, differences.values())) <= rounding * validate.MIB


def test_threads_that_load_leave_a_median_and_a_range():
    (result,) = validate.validate([row("t4-sweep-10")], orders=3)
    assert result["orders"] == 3
    low, high = result["range_bytes"]["reserved"]
    assert low <= result["predicted_bytes"]["reserved"] <= high
    assert abs(result["error_percent"]["allocated"]) < 0.002  # a model whose weights leave no rests in any order
    assert abs(result["error_percent"]["reserved"]) < 1


def test_summary_and_table():
    rows = [row("t4-sweep-29"), row("t4-sweep-30"), row("t4-sweep-31")]
    stages = dict.fromkeys(validate.STAGES, 0)
    results = []
    for entry, factor in zip(rows, (1.01, 0.98, 1.0), strict=True):
        peak = round(float(entry["peak_allocated_mib"]) * validate.MIB * factor)
        results.append(validate.compare(entry, [stages | {"allocated": peak, "reserved": peak}]))
    found = validate.summary(results)["t4"]
    assert found["rows"] == 3
    assert found["allocated"] == {"median_percent": 1.0, "worst_percent": 2.0, "worst_row": "t4-sweep-30"}
    table = validate.markdown({"rows": results, "summary": validate.summary(results)})
    assert "| t4 | 3 | 1.000 %, 2.000 % (t4-sweep-30) |" in table
    assert table.count("\n| t4-sweep") == 3


def test_several_orders_give_a_median_and_a_range():
    entry = row("t4-sweep-30")
    orders = [dict.fromkeys(validate.STAGES, value) for value in (30, 10, 20)]
    result = validate.compare(entry, orders)
    assert result["predicted_bytes"]["reserved"] == 20
    assert result["range_bytes"]["reserved"] == [10, 30]


def test_the_kept_report_has_every_row_and_keeps_its_promise():
    report = json.loads((ROOT / "config" / "measurements" / "validation.json").read_text())
    assert {entry["id"] for entry in report["rows"]} == {entry["id"] for entry in validate.read_measurements()}
    assert report["summary"] == validate.summary(report["rows"])
    t4, a100 = report["summary"]["t4"], report["summary"]["a100"]
    assert t4["allocated"]["median_percent"] <= 0.05 and t4["allocated"]["worst_percent"] <= 0.3
    assert t4["reserved"]["median_percent"] <= 1.0 and t4["reserved"]["worst_percent"] <= 5.0
    assert a100["allocated"]["worst_percent"] <= 0.2


def test_an_unknown_row_is_refused():
    run = subprocess.run(
        [sys.executable, "-m", "scripts.validation.measurements", "--rows", "t4-nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "There is no such row." in run.stderr and "t4-nothing" in run.stderr


def test_the_documentation_shows_the_kept_report():
    report = json.loads((ROOT / "config" / "measurements" / "validation.json").read_text())
    assert validate.markdown(report) in (ROOT / "docs" / "memory-validation.md").read_text(encoding="utf-8")


def test_the_held_out_report_has_every_run_and_the_documentation_shows_it():
    folder = ROOT / "config" / "measurements"
    report = json.loads((folder / "held-out.json").read_text())
    rows = validate.read_measurements(HELD_OUT)
    assert {entry["id"]: entry["outcome"] for entry in report["rows"]} == {row["id"]: row["outcome"] for row in rows}
    assert report["summary"] == validate.summary(report["rows"])
    assert report["summary"]["t4"]["verdicts"] == {"right": 34, "rows": 34}
    assert validate.markdown(report) in (ROOT / "docs" / "memory-validation.md").read_text(encoding="utf-8")


def test_a_run_that_ended_out_of_memory_does_not_fit():
    entry = row("t4-final-23")
    (result,) = validate.validate([entry], orders=1)
    assert entry["outcome"] == "out of memory" and not result["fits"]
    assert result["measured_bytes"] == {} and result["error_percent"] == {}
