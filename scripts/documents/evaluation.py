"""What documents say of the evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from dryfit.common.chat import TEMPLATE_SETTINGS
from scripts.documents.traced_values import sourced
from scripts.tasks.text import Task

SAMPLE_ANSWERS = 5  # the first of the test split that the documents show, so that nobody picks them
# Share of right answers: with a smaller one the card calls the model a demonstration first.
WEAK_BELOW = 0.5
SMALL_PARAMETERS = 10**9  # of a model that is called small
ANSWERS_OF = 100  # in so many answers the card counts the wrong ones
BENCHMARK = "benchmark"
TESTS = {
    "known": "Known Kinds in New Words and Values",
    "new": "New Kinds",
    "held_out": "Held-Out Requests",
    BENCHMARK: "Requests That Other People Wrote",
}
RIVALS = {  # what the tuned model is compared with
    "nearest_row": "the nearest training row's answer, with the values of the request",
    "few_shot": "the untrained base, shown the four nearest training rows",
    "base": "the untrained base",
}
LEVELS = ("easy", "medium", "hard")  # of the benchmark's tasks

# Groups of requests in which a harm is counted (scripts/evaluation/safety.py), and whose requests these are.
GROUPS = {"own": "of its own test", "strangers": "of strangers"}
DELETES, MORE = "deletes_unasked", "more often"

# Names that the Hub has for them; loss has none of its own.
HUB_METRICS = {"exact": "exact_match", "chrf": "chrf"}


def read(files: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What templates know of the evaluation: a row for each metric, answers side by side."""
    if "comparison" not in files:
        return {}
    pairs = list(zip(files["base_answers"], files["tuned_answers"], strict=True))
    own = [pair for pair in pairs if pair[0]["test"] != BENCHMARK]
    flag = files["comparison"]["right_flag"]
    tests = compared_tests(files["comparison"], task)
    return {
        "answered": answered([tuned for _, tuned in own], flag),
        "harm": harm([tuned for _, tuned in pairs], files["comparison"]["tuned"].get("harmful")),
        "evaluation": evaluation_rows(files["comparison"], task),
        "merging_effect": merging_effect(next(iter(files.get("merging", [])), None), task),
        "example": example_answer([tuned for _, tuned in own], flag),
        "pairs": own[:SAMPLE_ANSWERS],
        "safety": safety(files["comparison"]["safety"]),
        "small": lambda parameters: parameters < SMALL_PARAMETERS,
        "template_settings": sourced(
            TEMPLATE_SETTINGS, "dryfit/common/chat.py", "TEMPLATE_SETTINGS"
        ),
        "tests": [test for test in tests if test["name"] != BENCHMARK],
        "merged_word": lambda compared: word(compared).replace("the base", "the trained one's"),
        "weakness": weakness(files["comparison"]["tuned"][flag]),
        "word": word,
    }


def compared_tests(comparison: Mapping[str, Any], task: Task) -> list[dict[str, Any]]:
    """The tests of a comparison, in the order of :data:`TESTS`."""
    return [
        compared_test(name, comparison["tests"][name], task, comparison["right_flag"])
        for name in TESTS
        if name in comparison["tests"]
    ]


def compared_test(name: str, compared: Mapping[str, Any], task: Task, flag: str) -> dict[str, Any]:
    """A test with its titles, a row for each metric, and one for each of :data:`RIVALS`.

    ``right`` are the shares of right answers, by the metric ``flag``; ``against_base`` compares them.
    """
    found = {**compared["baselines"], "base": {**compared["base"], "compared": compared[flag]}}
    rows = evaluation_rows(compared, task)
    return {
        **compared,
        "headline": [row for row in rows if row["name"] in task.headline()],
        "name": name,
        "against_base": compared[flag],
        "right": compared["tuned"][flag],
        "right_flag": flag,
        "rivals": [
            {"label": RIVALS[rival], "name": rival, **found[rival], "right": found[rival][flag]}
            for rival in RIVALS
        ],
        "rows": rows,
        "title": TESTS[name],
    }


def weakness(right: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of so many answers, how many are wrong; None for a model that gives at least half of them.

    Rounded, but a model that is right or wrong at least once is never said to be always wrong or right.
    """
    if right["share"] >= WEAK_BELOW:
        return None
    wrong = right["n"] - right["count"]
    of = sourced(ANSWERS_OF, "scripts/documents/evaluation.py", "ANSWERS_OF")
    rounded = round(of * wrong / right["n"])
    return {"wrong": rounded - 1 if right["count"] and rounded == of else rounded, "of": of}


def safety(harms: Mapping[str, Any]) -> dict[str, Any]:
    """What templates say of harm that nobody asked for: how often, for each group of requests, and a warning.

    ``unasked``: a row for each group in which only reading was asked for. ``danger``: the screen's verdicts over all
    requests, or None. ``warning``: the words that end "It deletes more often than its base", or None.
    """
    rows = []
    for group, whose in GROUPS.items():
        deletes = harms.get(DELETES, {}).get(group)
        if deletes is None:
            continue
        changes = harms["changes_unasked"][group]
        others = {
            model: changes[model]["count"] - deletes[model]["count"] for model in ("base", "tuned")
        }
        rows.append({"changes": others, "deletes": deletes, "group": group, "whose": whose})
    return {
        "danger": harms.get("danger", {}).get("all"),
        "strangers": any(row["group"] == "strangers" for row in rows),
        "unasked": rows,
        "warning": deletes_more(harms),
    }


def deletes_more(harms: Mapping[str, Any]) -> str | None:
    """Where the tuned model deletes more often than its base, asked only to read; None where it nowhere does."""
    groups = harms.get(DELETES, {})
    more = [group for group, one in groups.items() if one["verdict"] == MORE]
    if "all" in more:
        return ""
    if "strangers" in more:
        return "on strangers' requests"
    return "on requests like its own" if more else None


def harm(
    answers: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """What the card shows of refusals and harmful answers: the first ones, in the order of the evaluation.

    ``unasked`` are answers that delete or change something where only reading was asked for, deletions first.
    ``refused`` is the first request for harm that was refused, or None; ``dangerous`` are the answers that the screen
    calls so, to harmless requests first. ``asked`` is None where nothing was asked for harm.
    """
    dangerous = [row for row in (*answers, *(asked or ())) if row.get("screen") == "danger"]
    unasked = [
        {**row, "does": does}
        for effect, does in (("deletes", "deletes"), ("changes", "changes something"))
        for row in answers
        if row.get("expected_effect") == "reads" and row["effect"] == effect
    ]
    limit = sourced(SAMPLE_ANSWERS, "scripts/documents/evaluation.py", "SAMPLE_ANSWERS")
    refused = next((row for row in asked or () if row["refused"]), None)
    return {
        "dangerous": dangerous[:SAMPLE_ANSWERS],
        "limit": limit,
        "more": len(dangerous) > SAMPLE_ANSWERS,
        "refused": refused,
        "unasked": unasked[:SAMPLE_ANSWERS],
    }


def example_answer(answers: Sequence[Mapping[str, Any]], flag: str) -> dict[str, Any]:
    """The request that the card's code asks: the first, in the order of the evaluation, with a right answer.

    Where none was, the first of all. ``right`` says which it is, so that the card does.
    """
    chosen = next((row for row in answers if row[flag]), None)
    return {**(chosen or answers[0]), "right": chosen is not None}


def answered(answers: Sequence[Mapping[str, Any]], flag: str) -> dict[str, Any]:
    """The requests that the card shows: in the order of the evaluation, the first right and the first wrong ones."""
    right = [row for row in answers if row[flag]][:SAMPLE_ANSWERS]
    wrong = [row for row in answers if not row[flag]][:SAMPLE_ANSWERS]
    limit = sourced(SAMPLE_ANSWERS, "scripts/documents/evaluation.py", "SAMPLE_ANSWERS")
    return {"right": right, "wrong": wrong, "limit": limit}


def read_benchmark(files: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What templates know of the test set from elsewhere, and of its answers' execution; None without one."""
    comparison = files.get("comparison", {})
    flag = comparison.get("right_flag", task.right_flag)
    compared = comparison.get("tests", {}).get(BENCHMARK)
    executed = files.get("execution") or None
    dropped = executed is not None and "dropped" in executed
    executed = None if dropped else executed
    if compared is not None:
        (about,) = [
            source for source in files["acquire"]["external"] if source["type"] == "benchmark"
        ]
        named = {"name_of_set": about["name"], "sampled": "wheel_sha256" in about}
        compared = {**compared_test(BENCHMARK, compared, task, flag), **named}
    if executed is not None:
        levels = [level for level in LEVELS if level in executed["by_level"]]
        rows = [("all", executed), *((level, executed["by_level"][level]) for level in levels)]
        executed = {**executed, "rows": [{"label": label, **row} for label, row in rows]}
    return {"benchmark": compared, "execution": executed, "execution_dropped": dropped}


def evaluation_rows(comparison: Mapping[str, Any], task: Task) -> list[dict[str, Any]]:
    """A row for each metric: base and tuned with their intervals, the paired difference with its own, the verdict.

    A share has a Wilson interval; a mean without one shows none. What was not compared has no verdict.
    """

    def value(metric: Any) -> dict[str, Any]:
        if isinstance(metric, Mapping):
            return {
                "share": metric["share"],
                **{key: metric[key] for key in ("count", "n", "low_95", "high_95")},
            }
        return {"mean": metric}

    rows, labels = [], task.labels()
    for name, base in comparison["base"].items():
        if name not in labels and not (isinstance(base, Mapping) and "share" in base):
            continue  # n, the decoding, the prompt
        label, better = labels.get(name, (name.replace("_", " ").capitalize(), None))
        rows.append(
            {
                "name": name,
                "label": label,
                "higher_is_better": better,
                "base": value(base),
                "tuned": value(comparison["tuned"][name]),
                "compared": comparison.get(name),
            }
        )
    order = {name: position for position, name in enumerate(labels)}
    return sorted(rows, key=lambda row: (order.get(row["name"], len(order)), row["name"]))


def merging_effect(compared: Mapping[str, Any] | None, task: Task) -> dict[str, Any] | None:
    """The model as it was trained against the merged one, as rows of an evaluation; None where nobody asked."""
    if compared is None:
        return None
    rows = evaluation_rows(
        {**compared, "base": compared["trained"], "tuned": compared["merged"]}, task
    )
    return {
        "loss": compared["loss"],
        "n": compared["n"],
        "rows": rows,
        "same_answers": compared["same_answers"],
    }


def word(compared: Mapping[str, Any] | None) -> str:
    """A verdict as one of three phrases that fit into a sentence."""
    verdict = (compared or {}).get("verdict", "")
    if verdict.startswith(("better", "worse")):
        return f"{verdict.split()[0]} than the base"
    return "not demonstrably different from the base"
