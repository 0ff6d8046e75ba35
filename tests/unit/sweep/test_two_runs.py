"""Two finished runs beside each other: settings, figures with intervals, and the requests that both were asked."""

import pytest

from dryfit.common.errors import UserError
from scripts.sweep.__main__ import compare, page, read_run
from tests.unit.sweep.test_summarize import run, spread


def finished(rank, losses, *, first=0, right=0):
    """A run with a configuration, whose requests are numbered from ``first``."""
    made = run(losses, 2**30 * rank, size=1000 * rank, right=right)
    answers = [
        {**row, "command": "ls", "request": f"request {number + first}"}
        for number, row in enumerate(made["answers"])
    ]
    lora = {"rank": rank, "target_modules": "all-linear"}
    return {
        **made,
        "answers": answers,
        "configuration": {"lora": lora, "run": {"name": f"run-{rank}"}},
    }


def test_what_differs_stands_beside_what_it_came_to():
    compared = compare(finished(4, spread(2.0), right=1), finished(8, spread(1.0), right=9))
    assert compared["settings"] == {"lora.rank": [4, 8]} and compared["requests"] == 40
    assert compared["difference"]["loss"]["difference"] == pytest.approx(-1)
    assert compared["difference"]["exact"]["difference"] == pytest.approx(0.2)
    said = page(("four", "eight"), compared)
    assert (
        "| `lora.rank` | `4` | `8` |" in said
        and "| exact answers | 1 of 40, 2.5 % [0.4 %, 12.9 %] |" in said
    )
    assert (
        "peak, predicted | 4.00 GiB | 8.00 GiB" in said
        and "peak, measured" in said
        and "9.0 s, 100 tokens/s" in said
    )
    assert (
        "`eight` minus `four`:\n- loss −1.000 [−1.000, −1.000]. The interval does not reach over zero."
        in said
    )


def test_only_requests_that_both_were_asked_are_paired():
    half = compare(finished(4, spread(2.0, 0.3)), finished(4, spread(2.0, -0.3), first=20))
    assert half["requests"] == 20 and half["settings"] == {}
    said = page(("one", "two"), half)
    assert (
        "| settings | the same | the same |" in said
        and "- exact answers +0.0 points [+0.0 points, +0.0 points]" in said
    )
    apart = compare(finished(4, spread(2.0)), finished(8, spread(2.0), first=99))
    assert apart["difference"] is None and "no request in common" in page(("one", "two"), apart)


def test_a_folder_without_a_finished_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No finished run lies in this folder") as error:
        read_run(tmp_path)
    assert error.value.where == tmp_path
