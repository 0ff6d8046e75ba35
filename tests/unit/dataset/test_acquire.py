"""The benchmark among the external test sets: each of its commands keeps rows out of the training data."""

import json
from types import SimpleNamespace

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import read_jsonl, read_report, write_jsonl, write_report
from scripts.dataset import acquire, split
from tests.task_parts import shell

NAMES = ("pairs", "external", "benchmark", "rejected", "report")
WRITTEN = ("train", "validation", "test", "rejected", "harmful", "benchmark")


@pytest.fixture
def place(tmp_path):
    """A source of one's own, and a benchmark of one task with two commands."""
    (tmp_path / "own.jsonl").write_text(
        "".join(
            json.dumps({"request": f"request {number}", "command": command}) + "\n"
            for number, command in enumerate(
                ["ls -la", "ls -al", "pwd", "id", "df", "du", "env", "date"]
            )
        )
    )
    task = {"alternatives": ["ls -al"], "command": "LS  -la", "request": "Request 2."}
    write_jsonl(tmp_path / "tasks.jsonl", [task])
    about = {"requirement": "icalfa==0.3.6", "wheel_sha256": "0" * 64}
    write_report(tmp_path / "benchmark.json", about, tmp_path / "tasks.jsonl")
    return tmp_path


def run(place):
    sources = [{"type": "files", "license": "MIT", "paths": [str(place / "own.jsonl")]}]
    outputs = {
        name: str(place / f"{name}.{'json' if name == 'report' else 'jsonl'}") for name in NAMES
    }
    benchmark = {
        "license": "MIT",
        "requirement": "icalfa==0.3.6",
        "tasks": str(place / "tasks.jsonl"),
    }
    acquire.main(
        shell("sources"),
        sources,
        [],
        SimpleNamespace(**outputs),
        {**benchmark, "report": str(place / "benchmark.json")},
    )
    return outputs


def test_both_commands_and_the_request_are_taken_out(place):
    outputs = run(place)
    report = read_report(outputs["report"], outputs["external"])
    assert report["external"] == [
        {
            "license": "MIT",
            "name": "icalfa==0.3.6",
            "rejected": 0,
            "requirement": "icalfa==0.3.6",
            "rows": 2,
            "type": "benchmark",
            "wheel_sha256": "0" * 64,
        }
    ]
    write_report(place / "screen.json", {}, outputs["pairs"])
    inputs = {"pairs": outputs["pairs"], "screen": str(place / "screen.json")}
    inputs |= {
        "external": outputs["external"],
        "benchmark": outputs["benchmark"],
        "acquire": outputs["report"],
    }
    made = {name: str(place / f"{name}-split.jsonl") for name in WRITTEN}
    shares = {"train": 0.34, "validation": 0.33, "test": 0.33, "seed": 1}
    split.main(shell("splitting"), inputs, {**made, "report": str(place / "split.json")}, shares)
    assert list(read_jsonl(made["benchmark"])) == list(read_jsonl(place / "tasks.jsonl"))
    assert sorted(row["request"] for row in read_jsonl(made["rejected"])) == [
        "request 0",
        "request 1",
        "request 2",
    ]


def test_an_edited_benchmark_is_noticed(place):
    (place / "tasks.jsonl").write_text(
        (place / "tasks.jsonl").read_text().replace("ls -al", "ls -aL")
    )
    with pytest.raises(UserError, match="not what the step that made it has written"):
        run(place)
