"""Own data of any task: columns, messages, a test file and a benchmark of one's own; what is dropped stops the run."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import read_jsonl, read_report
from scripts.dataset import acquire, check_splits, clean, fetch_benchmark, screen_dataset, split
from scripts.dataset.rows import SPLITS
from scripts.tasks.support import registry

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2, "seed": 42}


def lines(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def files(*paths: str) -> dict[str, Any]:
    return {"type": "files", "license": "MIT", "paths": list(paths)}


def prepared(folder: Path, task: object, sources: list, **more: Any) -> dict[str, list[dict]]:
    """Rows of each split, through every stage of the dataset's rules."""
    options = registry.checked(task)
    most = more.pop("most_dropped", 0.05)

    def part(name: str):
        return registry.task(options, name)

    def at(**names: str) -> dict[str, str]:
        return {name: str(folder / file) for name, file in names.items()}

    benchmark = None
    if path := more.pop("benchmark", None):
        made = at(
            tasks="tasks.jsonl", states="states.json", license="LICENSE", report="benchmark.json"
        )
        fetch_benchmark.main(part("benchmark"), {"path": path}, SimpleNamespace(**made))
        benchmark = {
            "license": "MIT",
            "path": path,
            "tasks": made["tasks"],
            "report": made["report"],
        }
    raw = at(
        pairs="raw",
        external="external",
        benchmark="tasks",
        rejected="raw.rejected",
        report="acquire.json",
    )
    acquire.main(
        part("sources"), sources, [], SimpleNamespace(**raw), benchmark, most_dropped=most, **more
    )
    cleaned = at(pairs="clean", rejected="clean.rejected", report="clean.json")
    inputs = {"pairs": raw["pairs"], "acquire": raw["report"]}
    clean.main(part("cleaning"), inputs, cleaned, {"near_duplicates": None}, most)
    safe = at(pairs="safe", rejected="safe.rejected", report="screen.json")
    screen_dataset.main(
        part("screening"), {"pairs": cleaned["pairs"], "clean": cleaned["report"]}, safe
    )
    more = {name: name for name in ("rejected", "harmful", "benchmark")}
    outputs = at(**{name: f"{name}.jsonl" for name in SPLITS}, **more, report="split.json")
    given = {"pairs": safe["pairs"], "screen": safe["report"], "acquire": raw["report"]}
    given |= {name: raw[name] for name in ("external", "benchmark")}
    split.main(part("splitting"), given, outputs, SHARES)
    reports = {"acquire": raw, "clean": cleaned, "screen": safe, "split": outputs}
    checked = {name: outputs[name] for name in (*SPLITS, "rejected")} | {"safe": safe["pairs"]}
    checked |= {name: files["report"] for name, files in reports.items()}
    check_splits.main(part("splitting"), checked, str(folder / "check.json"))
    return {name: list(read_jsonl(outputs[name])) for name in SPLITS} | {
        "out": list(read_jsonl(outputs["rejected"]))
    }


def questions(count: int, answer: str = "yes") -> list[dict]:
    return [
        {"question": f"Is {number} a number of kind {number * 7}?", "answer": answer}
        for number in range(count)
    ]


def test_a_file_is_enough_and_equal_answers_hold_nothing_together(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        found = prepared(tmp_path, "text", [files(lines(tmp_path / "own.jsonl", questions(40)))])
    assert {name: len(found[name]) for name in SPLITS} == {"train": 24, "validation": 8, "test": 8}
    assert "request: question, command: answer" in caplog.text


def test_a_prompt_keeps_its_lines(tmp_path):
    rows = [
        {"prompt": f"Fix this, {number}:\r\n  x = 1\n", "completion": f"y = {number}"}
        for number in range(20)
    ]
    found = prepared(tmp_path, "text", [files(lines(tmp_path / "own.jsonl", rows))])
    assert all("\n  x = 1" in row["request"] for row in found["train"])


def test_conversations_stay_in_one_split_with_their_turns(tmp_path):
    def chat(number: int) -> dict:
        texts = [
            f"Hello, I am {number}.",
            "Hello.",
            f"What is {number} times 2, my friend {number}?",
            str(number * 2),
        ]
        roles = ("user", "assistant")
        return {
            "messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
        }

    found = prepared(
        tmp_path,
        "text",
        [files(lines(tmp_path / "own.jsonl", [chat(number) for number in range(20)]))],
    )
    rows = [row for name in SPLITS for row in found[name]]
    assert len(rows) == 40 and sum("turns" in row for row in rows) == 20
    for name in SPLITS:
        assert len({row["line"] for row in found[name]}) * 2 == len(found[name])


def test_messages_without_an_answer_stop_the_run_with_the_first_three(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Hello {number}"}]} for number in range(20)]
    rows[5]["messages"].append({"role": "assistant", "content": "Hello."})
    with pytest.raises(UserError) as error:
        prepared(tmp_path, "text", [files(lines(tmp_path / "own.jsonl", rows))])
    text = str(error.value)
    assert (
        "drops 19 of 20" in text and text.count("messages have no answer") == 3 and "line 3" in text
    )


def test_rows_that_no_check_accepts_stop_the_run_unless_it_is_allowed(tmp_path):
    rows = [
        {"request": f"Count table {number}.", "command": f"SELECT COUNT(*) FROM t{number}"}
        for number in range(40)
    ]
    rows += [
        {"request": f"list folder {number} please", "command": f"ls d{number}"}
        for number in range(40)
    ]
    source = [files(lines(tmp_path / "own.jsonl", rows))]
    with pytest.raises(UserError) as error:
        prepared(tmp_path, "shell", source)
    text = str(error.value)
    assert "cleaning drops 40 of 80, 50.0%" in text and text.count("command is not Bash") == 3
    assert (
        "line 1:" in text
        and "line 3:" in text
        and "most_dropped: 0.5" in text
        and "another task" in text
    )
    found = prepared(tmp_path, "shell", source, most_dropped=0.5)
    assert sum(len(found[name]) for name in SPLITS) == 40


def test_what_is_dropped_is_counted_at_once(tmp_path, caplog):
    rows = [*questions(40), {"question": "?", "answer": ""}]
    prepared(tmp_path, "text", [files(lines(tmp_path / "own.jsonl", rows))])
    assert "cleaning drops 1 of 41 rows: answer is empty (1)" in caplog.text


def test_an_own_test_file_is_the_test_split(tmp_path):
    test = [*questions(3), {"question": "How old is the moon?", "answer": "old"}]
    source = files(lines(tmp_path / "own.jsonl", questions(40)))
    found = prepared(tmp_path, "text", [source], test=[files(lines(tmp_path / "test.jsonl", test))])
    assert sorted(row["request"] for row in found["test"]) == sorted(
        row["question"] for row in test
    )
    assert (
        len(found["train"]) + len(found["validation"]) + len(found["out"]) == 40 - 3
        and found["validation"]
    )
    assert {row["reason"] for row in found["out"]} <= {
        "request in the test file",
        "nearly its request in the test file",
    }
    assert not {row["request"] for row in found["train"]} & {
        row["request"] for row in found["test"]
    }


def test_rows_of_the_benchmark_are_named_and_taken_out(tmp_path, caplog):
    path = lines(
        tmp_path / "benchmark.jsonl", [{"question": "IS 3 a number of kind 21", "answer": "yes"}]
    )
    found = prepared(
        tmp_path, "text", [files(lines(tmp_path / "own.jsonl", questions(40)))], benchmark=path
    )
    assert "Is 3 a number of kind 21?" in [row["request"] for row in found["out"]]
    assert (
        "taken out of the data, request in the external test set: Is 3 a number of kind 21?"
        in caplog.text
    )
    report = read_report(tmp_path / "acquire.json")
    assert report["external"][0]["file"]["path"] == path and report["external"][0]["rows"] == 1


def test_a_benchmark_with_a_row_that_cannot_be_asked_is_an_error(tmp_path):
    path = lines(
        tmp_path / "benchmark.jsonl", [{"question": "Who?", "answer": "me"}, {"question": "Why?"}]
    )
    with pytest.raises(UserError, match="line 2"):
        prepared(
            tmp_path, "text", [files(lines(tmp_path / "own.jsonl", questions(40)))], benchmark=path
        )
