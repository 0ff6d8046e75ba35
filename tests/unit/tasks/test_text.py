"""The task text: messages, checks and metrics, a user's own functions among them."""

import json
from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from scripts.common.statistics import share
from scripts.dataset import check_splits
from scripts.dataset.rows import write_rows
from scripts.tasks.support import messages, registry
from tests.task_parts import text

PAIR = {"request": "Where is Lyon?", "command": "In France."}


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, with nothing imported from another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_metrics", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "my_metrics.py"


def test_metrics_of_answers() -> None:
    task = text("scores")
    rows = task.score(["In France.", "in france", "Italy"], [PAIR] * 3)
    assert [row["exact"] for row in rows] == [True, False, False]
    assert [row["normalized"] for row in rows] == [True, True, False]
    summary = task.summarize([{**row, **PAIR, "answer": "In France."} for row in rows], share)
    assert (
        summary["exact"]["count"] == 1
        and summary["normalized"]["count"] == 2
        and summary["chrf"] == 100
    )


@pytest.mark.parametrize(
    ("name", "one", "other", "same"),
    [
        ("case", "Yes", "yes ", True),
        ("space", "a  b", "a b", True),
        ("space", "A b", "a b", False),
        ("words", "Yes, it is!", "yes it is", True),
        ("number", "The sum is 1,250.5", "1250.5", True),
        ("number", "12", "13", False),
    ],
)
def test_a_named_function_normalizes(name: str, one: str, other: str, same: bool) -> None:
    (row,) = text("scores", normalize=name).score([one], [{"request": "?", "command": other}])
    assert row["normalized"] is same


def test_own_metrics_and_checks(own: Path) -> None:
    own.write_text(
        "def overlap(answer, expected):\n"
        "    return len({*answer.split()} & {*expected.split()}) / len(expected.split())\n"
        "def polite(request, answer):\n    return None if 'please' in request else 'not polite'\n"
    )
    task = text("scores", metrics=["my_metrics:overlap"])
    rows = task.score(["In Italy.", "In France."], [PAIR] * 2)
    assert [row["overlap"] for row in rows] == [0.5, 1.0]
    assert task.flags() == ("exact", "overlap") and "Overlap" in task.labels()["overlap"]
    assert task.summarize([{**row, **PAIR, "answer": ""} for row in rows], share)["overlap"] == 0.75
    checked = text("cleaning", checks=["my_metrics:polite"]).check([("a", "b"), ("please", "b")])
    assert [one.reason for one in checked] == ["not polite", None]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1 / 0", "raised ZeroDivisionError"),
        ("return float('nan')", "returned nan"),
        ("return 'good'", "returned 'good'"),
        ("return None", "returned None"),
    ],
)
def test_a_metric_that_is_none_is_one_error_before_anything_costs(
    own: Path, body: str, said: str
) -> None:
    own.write_text(f"def bad(answer, expected):\n    {body}\n")
    options = registry.checked({"name": "text", "metrics": ["my_metrics:bad"]})
    import pandas as pd

    with pytest.raises(UserError) as error:
        check_splits.try_metrics(registry.task(options, "scores"), pd.DataFrame([PAIR]))
    assert said in str(error.value) and "my_metrics.py" in str(error.value)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("txt", ["no task 'txt'", "shell, sql, text", "task: text"]),
        ({"name": "text", "metric": ["exact"]}, ["has no metric", "metrics: ..."]),
        ({"name": "text", "metrics": ["exct"]}, ["no metrics called 'exct'", "metrics: [exact]"]),
        (
            {"name": "text", "metrics": ["nowhere:f"]},
            ["no file for the function nowhere:f", "nowhere.py"],
        ),
        ({"name": "text", "normalize": "wrds"}, ["normalize: words"]),
        ({"name": "text", "checks": ["jsn"]}, ["checks: [json]"]),
        (
            {"name": "text", "harm": True},
            ["no requests for harm of its own", "harm: data/harm.jsonl"],
        ),
        ({"name": "text", "harm": "none.jsonl"}, ["isn't there", "none.jsonl"]),
        ({"name": "text", "words": {"anwser": "x"}}, ["anwser", "answer"]),
        ({"name": "shell", "harm": "mine.jsonl"}, ["its own requests for harm"]),
        ({"name": "shell", "checks": []}, ["has no checks"]),
    ],
)
def test_wrong_options_say_what_to_write(task: object, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        registry.checked(task)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_name_alone_takes_the_defaults() -> None:
    assert registry.checked("shell") == {"name": "shell", "harm": True}
    assert registry.checked("text")["metrics"] == ["normalized", "chrf"]


def test_a_part_of_a_task_changes_with_its_options_and_functions_alone(own: Path) -> None:
    own.write_text("def close(answer, expected):\n    return answer == expected\n")
    options = registry.checked({"name": "text", "metrics": ["my_metrics:close"]})
    before = {part: registry.for_job(options, part) for part in registry.PARTS}
    own.write_text("def close(answer, expected):\n    return True\n")
    changed = {part for part in registry.PARTS if registry.for_job(options, part) != before[part]}
    assert changed == {"scores", "words"}
    more = registry.checked({**options, "checks": ["json"]})
    assert {
        part
        for part in registry.PARTS
        if registry.for_job(more, part)["options"] != before[part]["options"]
    } == {"cleaning"}


def test_requests_for_harm_of_a_file(tmp_path: Path) -> None:
    Path("harm.jsonl").write_text('{"request": "Insult him.", "category": "insult"}\n')
    task = registry.task(
        registry.checked({"name": "text", "harm": "harm.jsonl", "refusal": "No."}), "sources"
    )
    assert task.harmful() == [{"category": "insult", "command": "No.", "request": "Insult him."}]
    Path("harm.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"harm\.jsonl, line 1"):
        task.harmful()


CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Weather in Lyon?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": '{"at": 1}'}}],
    },
    {"role": "tool", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "And in Porto?"},
    {"role": "assistant", "content": "Rain."},
]


def test_messages_of_several_turns_are_a_row_for_each_answer() -> None:
    rows, reason = messages.rows(CHAT)
    assert reason is None
    assert [row["command"] for row in rows] == [
        '{"name": "weather", "arguments": {"at": 1}}',
        "Sunny.",
        "Rain.",
    ]
    assert rows[0] == {"request": "Be short.\n\nWeather in Lyon?", "command": rows[0]["command"]}
    assert [turn["role"] for turn in rows[2]["turns"]] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert "Tool weather: sunny" in rows[1]["request"] and rows[2]["request"].endswith(
        "User: And in Porto?"
    )
    shared, _ = messages.rows([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    assert shared == [{"request": "Hi", "command": "Hello"}]
    assert messages.rows(json.dumps(CHAT))[0] == rows


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([{"role": "user", "content": "Hi"}], "messages have no answer"),
        (CHAT[:6], "messages end without an answer"),
        ("not JSON", "messages are not a list"),
        ([], "messages are not a list"),
        ([{"role": "user", "content": ""}], "message 1 has no text"),
        ([{"role": "narrator", "content": "Once"}], "message 1 has the role 'narrator'"),
        (["Hi"], "message 1 is not a mapping"),
    ],
)
def test_messages_that_are_no_row_say_why(given: object, reason: str) -> None:
    assert messages.rows(given) == ([], reason)


def test_rows_of_a_task_keep_their_turns(tmp_path: Path) -> None:
    import pandas as pd

    from scripts.common.requests import asked
    from scripts.dataset.rows import read_rows

    rows, _ = messages.rows(CHAT)
    write_rows(
        tmp_path / "rows.jsonl", pd.DataFrame([{**row, "source": "a", "line": 1} for row in rows])
    )
    pairs, before = asked(
        read_rows(tmp_path / "rows.jsonl").to_dict("records"), [[("shot", "said")]] * 3
    )
    assert (
        pairs[2] == ("And in Porto?", "Rain.")
        and len(before[2]) == 3
        and before[0] == [("shot", "said")]
    )
