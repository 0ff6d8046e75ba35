"""The verdict on base and tuned: better, worse, or a difference too small for the sample."""

import pandas as pd
import pytest

from scripts.evaluation.compare import compare
from will_it_fit.common.errors import UserError


def rows(exact, loss, tokens=10):
    count = len(exact)
    return pd.DataFrame(
        {
            "request": [f"request {index}" for index in range(count)],
            "answer_tokens": [tokens] * count,
            "loss_sum": loss,
            "exact": exact,
            "exact_canonical": exact,
            "parses": [True] * count,
            "program": exact,
        }
    )


def test_better_worse_and_neither():
    bad, good = rows([False] * 60, [30.0] * 60), rows([True] * 40 + [False] * 20, [10.0] * 60)
    better, worse, same = compare(bad, good), compare(good, bad), compare(bad, bad)
    assert (better["exact"]["verdict"], better["loss"]["verdict"]) == ("better", "better")
    assert (worse["exact"]["verdict"], worse["loss"]["verdict"]) == ("worse", "worse")
    assert same["exact"]["verdict"].startswith("difference too small") and same["loss"]["verdict"].startswith(
        "difference too small"
    )
    assert better["exact"]["gained"] == 40 and better["exact"]["lost"] == 0
    assert better["loss"]["difference"] == pytest.approx(-2.0)


def test_the_loss_is_weighted_by_tokens():
    base = rows([False, False], [10.0, 100.0])
    tuned = rows([False, False], [0.0, 100.0])
    base.loc[1, "answer_tokens"] = tuned.loc[1, "answer_tokens"] = 90
    assert compare(base, tuned)["loss"]["difference"] == pytest.approx(-10 / 100)


def test_other_requests_are_refused():
    base, tuned = rows([True], [1.0]), rows([True], [1.0])
    tuned.loc[0, "request"] = "another"
    with pytest.raises(UserError, match="same requests"):
        compare(base, tuned)


def test_the_interval_of_the_loss_is_weighted_by_tokens_too():
    """Short answers got better, one long one did not: what the interval is about has to lie in it."""
    base = rows([False] * 40, [2.0] * 39 + [1000.0], tokens=1)
    tuned = rows([False] * 40, [1.0] * 39 + [1000.0], tokens=1)
    base.loc[39, "answer_tokens"] = tuned.loc[39, "answer_tokens"] = 1000
    loss = compare(base, tuned)["loss"]
    assert loss["difference"] == pytest.approx(-39 / 1039)
    assert loss["low_95"] <= loss["difference"] <= loss["high_95"]
    assert loss["high_95"] > -0.1  # of the rows alone it would be -1 to -0.9
