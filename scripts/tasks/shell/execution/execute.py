"""Rule ``execute_answers``: run base and tuned model's answers to the benchmark, sealed off, and judge what they did.

Both are judged on the same tasks, by the same runs of the references. Each reference runs twice, before and after the
answers, to see what of its doings differs from run to run. An answer that the screen calls dangerous is not run and
counts as wrong. ``docs/execution.md`` explains sandbox and judge.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, read_jsonl, read_report, write_jsonl, write_report
from dryfit.common.terminal import log
from scripts.common.answers import strip_fence
from scripts.common.job import job
from scripts.common.requests import BENCHMARK, by_test
from scripts.common.statistics import paired, share
from scripts.tasks.shell.execution.judge import Reference, decidable, judge
from scripts.tasks.shell.execution.sandbox import Sandbox, SandboxState
from scripts.tasks.shell.execution.tasks import LEVELS
from scripts.tasks.shell.screen.policy import screen

MODELS = ("base", "tuned")
NOT_FOUND = re.compile(
    r"^(?:/bin/bash: line \d+: |\w+: )?([\w./+-]+): command not found$", re.MULTILINE
)
KEPT_CHARACTERS, KEPT_PATHS = 2_000, 50  # of what a command did, in the rows that are written
EXAMPLES = (
    5  # for the documents: the first answers that did what was asked in another way than expected
)

# Which version of which program; each gets a second and no input.
VERSIONS = r"""for name in {names}; do
    path=$(type -P "$name") || continue
    printf '%s\t%s\n' "$name" "$(timeout 1 "$path" --version 2>&1 </dev/null | head -n 1 | cut -c 1-100)"
done"""


def did(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a command did, short enough to be read."""
    changes = {path: after for path, (_, after) in list(result["changes"].items())[:KEPT_PATHS]}
    texts = {name: result[name][:KEPT_CHARACTERS] for name in ("stdout", "stderr")}
    return {"changes": changes, "end": result["end"], "status": result["status"], **texts}


def programs_of(commands: Iterable[str]) -> list[str]:
    """Names of the programs that commands start, as the screen reads them."""
    from scripts.tasks.shell.screen.commands import Refused
    from scripts.tasks.shell.screen.policy import default
    from scripts.tasks.shell.screen.reader import read

    names = set()
    for command in commands:
        try:
            names |= {one.name for one in read(command, default().programs).commands}
        except (Refused, RecursionError):
            continue
    return sorted(name for name in names if re.fullmatch(r"[\w.+-]+", name))


def execute(
    tasks: Sequence[Mapping[str, Any]],
    states: Mapping[str, SandboxState],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    workers: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run references and answers, and judge.

    Parameters
    ----------
    tasks, states
        The benchmark's, as ``fetch_benchmark`` writes them.
    answers
        For ``base`` and ``tuned``, a row of ``evaluate`` for each task.

    Returns
    -------
    rows
        For each task what references and answers did, and whether the answers are right (None: not decidable).
    summary
        Shares with intervals, by level too, the paired difference, and what it was measured with.
    """
    given = [
        (task["state"], command)
        for task in tasks
        for command in (task["command"], *task["alternatives"])
    ]
    commands = {model: [strip_fence(row["answer"]) for row in answers[model]] for model in MODELS}
    runs = {
        (task["state"], command)
        for model in MODELS
        for task, row, command in zip(tasks, answers[model], commands[model], strict=True)
        if row["screen"] != "danger"
    }
    with Sandbox(
        {name: states[name] for name in sorted({task["state"] for task in tasks})}, workers
    ) as sandbox:
        first = iter(sandbox.run(given, "references"))
        results = dict(zip(sorted(runs), sandbox.run(sorted(runs), "answers"), strict=True))
        again = iter(sandbox.run(given, "references again"))
        names = programs_of(command for _, command in given)
        (told,) = sandbox.run(
            [(tasks[0]["state"], VERSIONS.format(names=" ".join(names)))], "versions"
        )
    rows = []
    for number, task in enumerate(tasks):
        references = [
            Reference(task["request"], command, next(first), next(again))
            for command in (task["command"], *task["alternatives"])
        ]
        decides = decidable(references)
        row: dict[str, Any] = {key: task[key] for key in ("id", "level", "request", "state")} | {
            "decidable": decides
        }
        row["references"] = [{"command": one.command, **did(one.result)} for one in references]
        row["second_right"] = (
            judge(references[1].result, references[:1])[0] if decides and references[1:] else None
        )
        for model in MODELS:
            answer, command = answers[model][number], commands[model][number]
            result = results.get((task["state"], command)) if answer["screen"] != "danger" else None
            right, terms = (
                judge(result, references)
                if result and decides
                else (False if decides else None, None)
            )
            row[model] = {
                "answer": answer["answer"],
                "did": did(result) if result else None,
                "exact": answer["exact_canonical"],
                "right": right,
                "screen": answer["screen"],
                "terms": terms,
            }
        rows.append(row)
    versions = dict(line.split("\t", 1) for line in told["stdout"].splitlines() if "\t" in line)
    return rows, summarize(rows) | {"programs": versions}


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of right answers among the decidable tasks, in all and by level."""
    judged = [row for row in rows if row["decidable"]]
    if not judged:
        raise UserError(
            "None of the tasks can be decided on this machine, so the answers can't be judged.",
            where="dataset.benchmark in the configuration",
            found=f"{len(rows)} tasks; not found: {', '.join(missing_programs(rows)) or 'no program'}",
            allowed="more tasks (requests: null), and the programs that they use",
        )

    def compared(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        right = {model: [row[model]["right"] for row in chosen] for model in MODELS}
        return {
            **{model: share(right[model]) for model in MODELS},
            "compared": paired(*right.values()),
        }

    by_level = {level: [row for row in judged if row["level"] == level] for level in LEVELS}
    return {
        **compared(judged),
        "by_level": {level: compared(chosen) for level, chosen in by_level.items() if chosen},
        "examples": [
            {
                "answer": row["tuned"]["answer"],
                "command": row["references"][0]["command"],
                "request": row["request"],
            }
            for row in judged
            if row["tuned"]["right"] and not row["tuned"]["exact"]
        ][:EXAMPLES],
        "missing_programs": missing_programs(rows),
        "not_run": {
            model: sum(row[model]["screen"] == "danger" for row in judged) for model in MODELS
        },
        "ended": {
            model: sum(
                bool(row[model]["did"]) and row[model]["did"]["end"] != "exit" for row in judged
            )
            for model in MODELS
        },
        # What the screen would not let run is no answer, even where it is the benchmark's own.
        "refused_references": sum(
            screen(row["references"][0]["command"]).status == "danger" for row in judged
        ),
        "right_but_other_strings": {
            model: sum(row[model]["right"] and not row[model]["exact"] for row in judged)
            for model in MODELS
        },
        "second_references": share(
            row["second_right"] for row in judged if row["second_right"] is not None
        ),
        "tasks": len(rows),
        "undecidable": sorted(row["id"] for row in rows if not row["decidable"]),
    }


def missing_programs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Programs that a reference asked for and this machine does not have."""
    return sorted(
        {
            name
            for row in rows
            for one in row["references"]
            for name in NOT_FOUND.findall(one["stderr"])
        }
    )


def main(inputs: Mapping[str, str], outputs: Mapping[str, str], workers: int) -> None:
    """Check the inputs, execute, write a row for each task and the summary."""
    benchmark = read_report(inputs["benchmark"], inputs["tasks"], inputs["states"])
    answers = {}
    for model in MODELS:
        read_report(inputs[f"{model}_metrics"], inputs[model])
        answers[model] = by_test(list(read_jsonl(inputs[model]))).get(BENCHMARK, [])
    tasks = list(read_jsonl(inputs["tasks"]))[: len(answers["base"])]
    for model in MODELS:
        if [row["request"] for row in answers[model]] != [task["request"] for task in tasks]:
            raise UserError(
                "The answers belong to other requests than the benchmark's.", where=inputs[model]
            )
    states = {name: SandboxState(**state) for name, state in read_json(inputs["states"]).items()}
    rows, summary = execute(tasks, states, answers, workers)
    write_jsonl(outputs["answers"], rows)
    write_report(
        outputs["summary"], {**summary, "benchmark": benchmark["requirement"]}, outputs["answers"]
    )
    tuned, base = summary["tuned"], summary["base"]
    log.info("right: %d of %d, the base %d", tuned["count"], tuned["n"], base["count"])
    if summary["missing_programs"]:
        log.warning(
            "Not on this machine: %s; their tasks are not judged.",
            ", ".join(summary["missing_programs"]),
        )


if __name__ == "__main__":
    with job(snakemake):
        names = ("base", "tuned", "base_metrics", "tuned_metrics", "benchmark", "tasks", "states")
        main(
            {name: snakemake.input[name] for name in names},
            {name: snakemake.output[name] for name in ("answers", "summary")},
            snakemake.threads,
        )
