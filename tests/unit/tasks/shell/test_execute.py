"""Rule ``execute_answers`` on a small benchmark: base and tuned on the same tasks, what is not run, what is written."""

import json
from types import SimpleNamespace

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import read_jsonl, read_report, write_jsonl, write_report
from scripts.tasks.shell import benchmark
from scripts.tasks.shell.execution import execute
from scripts.tasks.shell.scores import score
from tests.unit.tasks.shell.execution.benchmark import ROWS, write_wheel

ANSWERS = {  # by request: the base's and the tuned model's
    "show the greeting": ("echo it is", "```bash\ncat /data/greeting\n```\nThis shows it."),
    "count the files in /data": ("ls /data", "find /data -type f | wc -l"),
    "make a copy of the greeting in /data/copy": ("rm -rf /", "cp -v /data/greeting /data/copy"),
    "do nothing that can be seen": ("true", "true"),
    "show the colour": ("sleep 99", "rm -rf /*; echo dark red"),
    "use a program that no host has": ("", "no-such-program /data"),
}
NOTHING = {"changes": {}, "complete": True, "end": "exit", "status": 0, "stderr": "", "stdout": ""}


def prepare(tmp_path):
    """What the rule reads, in a folder of its own; its paths by name."""
    wheel = write_wheel(tmp_path / "icalfa-0.3.6-py3-none-any.whl")
    paths = {
        name: str(tmp_path / f"{name}.json")
        for name in ("benchmark", "states", "base_metrics", "tuned_metrics")
    }
    paths |= {name: str(tmp_path / f"{name}.jsonl") for name in ("tasks", "base", "tuned")}
    made = {"tasks": paths["tasks"], "states": paths["states"], "report": paths["benchmark"]}
    source = {"requirement": "icalfa==0.3.6", "sha256": "0" * 64}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(benchmark, "download_wheel", lambda *_, **__: wheel)
        benchmark.Task({}).fetch_benchmark(
            source, SimpleNamespace(**made, license=str(tmp_path / "LICENSE"))
        )
    tasks = list(read_jsonl(paths["tasks"]))
    for number, model in enumerate(execute.MODELS):
        said = [ANSWERS[task["request"]][number] for task in tasks]
        rows = [
            {"answer": answer, "request": task["request"], "test": "benchmark", **scored}
            for answer, task, scored in zip(
                said, tasks, score(said, [task["command"] for task in tasks]), strict=True
            )
        ]
        write_jsonl(
            paths[model], [{"answer": "rm -rf /", "request": "of the data", "test": "known"}, *rows]
        )
        write_report(paths[f"{model}_metrics"], {}, paths[model])
    return paths | {"out": tmp_path}


@pytest.fixture
def place(tmp_path):
    return prepare(tmp_path)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Rows by request, and the summary, of one run for all tests that only read them."""
    return run(prepare(tmp_path_factory.mktemp("executed")))


def run(place, workers=2):
    """The rule; returns its rows by request, and its summary."""
    outputs = {
        "answers": str(place["out"] / "execution.jsonl"),
        "summary": str(place["out"] / "execution.json"),
    }
    try:
        execute.main(place, outputs, workers)
    except UserError as error:
        if "sandbox" not in str(error) and "bubblewrap" not in str(error):
            raise
        pytest.skip(str(error))
    summary = read_report(outputs["summary"], outputs["answers"])
    return {row["request"]: row for row in read_jsonl(outputs["answers"])}, summary


def test_both_models_are_judged_on_the_same_tasks_by_what_they_do(executed):
    rows, summary = executed
    assert {request for request, row in rows.items() if not row["decidable"]} == {
        "do nothing that can be seen",
        "use a program that no host has",
    }
    assert len(summary["undecidable"]) == 2 and summary["tasks"] == len(ROWS)
    assert summary["missing_programs"] == ["no-such-program"]
    assert (summary["base"]["count"], summary["tuned"]["count"], summary["tuned"]["n"]) == (0, 3, 4)
    assert summary["compared"]["gained"] == 3 and summary["compared"][
        "difference"
    ] == pytest.approx(0.75)
    assert {level: part["tuned"]["count"] for level, part in summary["by_level"].items()} == {
        "easy": 2,
        "medium": 1,
        "hard": 0,
    }
    assert summary["second_references"]["n"] == 4 and summary["second_references"]["count"] == 4
    assert "GNU bash" in summary["programs"]["cat"] or "coreutils" in summary["programs"]["cat"]
    copy = rows["make a copy of the greeting in /data/copy"]
    assert (
        copy["tuned"]["did"]["changes"].keys() == {"/data/copy"} and copy["tuned"]["right"] is True
    )


def test_wrong_answers_and_those_in_other_forms(executed):
    rows, summary = executed
    for request, model in (
        ("make a copy of the greeting in /data/copy", "base"),
        ("show the colour", "tuned"),
    ):
        assert rows[request][model] | {"answer": ""} == {
            **{
                "answer": "",
                "did": None,
                "exact": False,
                "right": False,
                "screen": "danger",
                "terms": None,
            }
        }
    assert summary["not_run"] == {"base": 1, "tuned": 1}
    rows, summary = executed
    assert rows["show the colour"]["base"]["did"]["end"] == "time" and summary["ended"]["base"] == 1
    assert rows["use a program that no host has"]["base"]["right"] is None
    _, summary = executed
    assert summary["right_but_other_strings"] == {"base": 0, "tuned": 2}
    assert [example["answer"] for example in summary["examples"]][:1] and len(
        summary["examples"]
    ) == 2


def test_answers_to_other_requests_are_refused(place):
    rows = list(read_jsonl(place["tuned"]))
    write_jsonl(place["tuned"], reversed(rows))
    write_report(place["tuned_metrics"], {}, place["tuned"])
    with pytest.raises(UserError, match="other requests than the benchmark"):
        run(place)


@pytest.mark.parametrize("name", ["tasks", "states", "base"])
def test_edited_inputs_are_noticed(place, name):
    path = place["out"] / f"{name}.{'json' if name == 'states' else 'jsonl'}"
    path.write_text(path.read_text().replace("data", "date", 1))
    with pytest.raises(UserError, match="not what the step that made it has written"):
        run(place)


def test_without_a_sandbox_there_is_an_error_and_no_result(place, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    outputs = {
        "answers": str(place["out"] / "execution.jsonl"),
        "summary": str(place["out"] / "execution.json"),
    }
    with pytest.raises(UserError, match="Nothing was executed"):
        execute.main(place, outputs, 1)
    assert not list(place["out"].glob("execution.*"))


def test_tasks_none_of_which_can_be_decided_are_explained(place):
    tasks = [task for task in read_jsonl(place["tasks"]) if "no host has" in task["request"]]
    rows = [
        dict.fromkeys(("answer", "request"), tasks[0]["request"])
        | {"screen": "ok", "exact_canonical": False}
    ]
    rows[0] |= {"test": "benchmark"}
    write_jsonl(place["tasks"], tasks)
    report = {
        key: value
        for key, value in json.loads((place["out"] / "benchmark.json").read_text()).items()
    }
    write_report(place["benchmark"], report, place["tasks"], place["states"])
    for model in execute.MODELS:
        write_jsonl(place[model], rows)
        write_report(place[f"{model}_metrics"], {}, place[model])
    with pytest.raises(UserError, match="None of the tasks") as error:
        run(place)
    assert "no-such-program" in error.value.found


def test_no_dangerous_answer_is_handed_to_the_sandbox(place, monkeypatch):
    """In the sandbox's place stands a list of what it is given: nothing is run, so that no failure runs an attack."""
    handed = []

    class Listed:
        def __init__(self, states, workers):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def run(self, commands, *_):
            handed.extend(command for _, command in commands)
            return [dict(NOTHING) for _ in commands]

    monkeypatch.setattr(execute, "Sandbox", Listed)
    with pytest.raises(UserError, match="None of the tasks can be decided"):  # nothing was run
        run(place)
    given = [answer for answers in ANSWERS.values() for answer in answers]
    assert "echo it is" in handed and "cp -v /data/greeting /data/copy" in handed
    assert sum("rm -rf" in answer for answer in given) == 2 and not any(
        "rm -rf" in command for command in handed
    )
