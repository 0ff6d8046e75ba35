"""The verdict on base and tuned: better, worse, or a difference too small for the sample."""

import pandas as pd
import pytest

from dryfit.common.errors import UserError
from scripts.evaluation.compare import compare, compare_tests
from scripts.evaluation.safety import compare_harms
from scripts.tasks.shell.scores import summarize
from scripts.tasks.support import registry
from tests.task_parts import shell

SHELL = shell("scores")


def rows(exact, loss, tokens=10):
    count = len(exact)
    return pd.DataFrame(
        {
            "request": [f"request {index}" for index in range(count)],
            "answer_tokens": [tokens] * count,
            "loss_sum": loss,
            "equivalent": exact,
            "exact": exact,
            "exact_canonical": exact,
            "parses": [True] * count,
            "program": exact,
        }
    )


def test_better_worse_neither_and_the_interval_of_the_loss():
    bad, good = rows([False] * 60, [30.0] * 60), rows([True] * 40 + [False] * 20, [10.0] * 60)
    better, worse, same = (
        compare(SHELL, bad, good),
        compare(SHELL, good, bad),
        compare(SHELL, bad, bad),
    )
    assert (better["exact"]["verdict"], better["loss"]["verdict"]) == ("better", "better")
    assert (worse["exact"]["verdict"], worse["loss"]["verdict"]) == ("worse", "worse")
    assert same["exact"]["verdict"].startswith("difference too small") and same["loss"][
        "verdict"
    ].startswith("difference too small")
    assert better["exact"]["gained"] == 40 and better["exact"]["lost"] == 0
    assert better["loss"]["difference"] == pytest.approx(-2.0)
    # Short answers got better, one long one did not: what the interval is about has to lie in it.
    base = rows([False] * 40, [2.0] * 39 + [1000.0], tokens=1)
    tuned = rows([False] * 40, [1.0] * 39 + [1000.0], tokens=1)
    base.loc[39, "answer_tokens"] = tuned.loc[39, "answer_tokens"] = 1000
    loss = compare(SHELL, base, tuned)["loss"]
    assert loss["difference"] == pytest.approx(-39 / 1039)
    assert loss["low_95"] <= loss["difference"] <= loss["high_95"]
    assert loss["high_95"] > -0.1  # of the rows alone it would be -1 to -0.9


def test_the_loss_is_weighted_by_tokens_and_other_requests_are_refused():
    base = rows([False, False], [10.0, 100.0])
    tuned = rows([False, False], [0.0, 100.0])
    base.loc[1, "answer_tokens"] = tuned.loc[1, "answer_tokens"] = 90
    assert compare(SHELL, base, tuned)["loss"]["difference"] == pytest.approx(-10 / 100)
    base, tuned = rows([True], [1.0]), rows([True], [1.0])
    tuned.loc[0, "request"] = "another"
    with pytest.raises(UserError, match="same requests"):
        compare(SHELL, base, tuned)


def answers(exact, intents=None, test="known", **fields):
    about = [{"intent": intent} for intent in intents] if intents else [{}] * len(exact)
    return [
        {
            **dict.fromkeys(("equivalent", "exact", "exact_canonical", "program"), one),
            **named,
            "request": f"r{number}",
            "test": test,
            "answer": "ls",
            "command": "ls",
            "parses": True,
            "parses_without_fence": True,
            "screen": "ok",
            "effect": "reads",
            "expected_effect": "reads",
            "answer_tokens": 2,
            "loss_sum": 3.0,
            **fields,
        }
        for number, (one, named) in enumerate(zip(exact, about, strict=True))
    ]


NOTHING, ALL = [False] * 40, [True] * 40


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("nearest", "few_shot", "tuned", "intents", "beats"),
    [
        (NOTHING, NOTHING, [True] * 12 + [False] * 28, None, True),
        (
            NOTHING,
            ALL,
            [True] * 12 + [False] * 28,
            None,
            False,
        ),  # one of the two is no rival to be passed over
        (NOTHING, NOTHING, [True] * 4 + [False] * 36, None, False),  # p = 1/8
        (
            NOTHING,
            NOTHING,
            [True] * 12 + [False] * 28,
            ["a"] * 12 + ["b"] * 28,
            False,
        ),  # one thing, twelve times
        ([True] * 12 + [False] * 28, NOTHING, NOTHING, None, False),  # worse is not better
    ],
)
def test_training_beats_both_baselines_or_not(nearest, few_shot, tuned, intents, beats):
    rows = {"base": NOTHING, "nearest_row": nearest, "few_shot": few_shot, "tuned": tuned}
    found = compare_tests(SHELL, {name: answers(exact, intents) for name, exact in rows.items()})[
        "known"
    ]
    assert found["beats_baselines"] is beats
    assert found["exact"]["units"] == (2 if intents else 40)


def test_an_answer_that_deletes_counts_where_only_reading_was_asked_for():
    rows = answers([True] * 5)
    rows[0] |= {"effect": "deletes"}
    rows[1] |= {"effect": "changes"}
    rows[2] |= {"effect": "deletes", "expected_effect": "deletes"}
    rows[3] |= {"effect": None}
    summary = summarize(rows)
    assert (summary["deletes_unasked"]["count"], summary["changes_unasked"]["count"]) == (1, 2)
    assert summary["deletes_unasked"]["n"] == 4
    assert "deletes_unasked" not in summarize(rows[2:3]), "nothing asks only to read"


def asked_to_read(effects, test="known"):
    """Rows of requests that ask only to read, each with what its answer does."""
    rows = answers([False] * len(effects), test=test)
    for row, effect in zip(rows, effects, strict=True):
        row |= {"effect": effect, "expected_effect": "reads"}
    return rows


@pytest.mark.parametrize(
    ("base", "tuned", "verdict"), [(1, 5, "more often"), (3, 3, "as often"), (5, 1, "less often")]
)
def test_harm_is_counted_on_strangers_requests_too_base_beside_tuned(base, tuned, verdict):
    def rows(own, strangers):
        of_own = asked_to_read(["deletes"] * own + ["reads"] * (10 - own))
        effects = ["deletes"] * strangers + ["reads"] * (30 - strangers)
        return [*of_own, *asked_to_read(effects, test="benchmark")]

    found = compare_harms(SHELL, rows(1, base), rows(1, tuned))["deletes_unasked"]
    assert found["own"]["verdict"] == "as often" and found["own"]["tuned"]["n"] == 10
    counts = {model: found["strangers"][model]["count"] for model in ("base", "tuned")}
    assert counts == {"base": base, "tuned": tuned} and found["strangers"]["base"]["n"] == 30
    assert found["strangers"]["verdict"] == found["all"]["verdict"] == verdict
    assert found["all"]["tuned"]["count"] == 1 + tuned and 0 < found["all"]["p"] <= 1


def test_harm_is_counted_where_the_request_can_show_it_and_no_other_task_has_any():
    rows = asked_to_read(["deletes", "deletes"])
    rows[1]["expected_effect"] = "deletes"
    found = compare_harms(SHELL, rows, rows)
    assert (
        found["deletes_unasked"]["own"]["tuned"]["n"] == 1
        and found["danger"]["own"]["base"]["n"] == 2
    )
    assert "strangers" not in found["danger"]
    assert compare_harms(registry.task(registry.checked("text"), "scores"), rows, rows) == {}


@pytest.mark.thorough
def test_each_test_is_compared_by_itself():
    rows = [*answers(NOTHING), *answers(ALL, test="new")]
    found = compare_tests(SHELL, dict.fromkeys(("base", "tuned", "nearest_row", "few_shot"), rows))
    assert list(found) == ["known", "new"]
    assert (found["known"]["tuned"]["exact"]["count"], found["new"]["tuned"]["exact"]["count"]) == (
        0,
        40,
    )
