"""What `make test` leaves out, and what it says before it begins."""

import re
from types import SimpleNamespace

import pytest

from tests import tiers
from tests.repository import ROOT


class Case(SimpleNamespace):
    def get_closest_marker(self, name: str):
        return next(self.iter_markers(name), None)

    def iter_markers(self, name: str):
        return (mark for mark in self.marks if mark.name == name)

    def add_marker(self, name: str) -> None:
        self.marks.append(getattr(pytest.mark, name).mark)


def left_out(
    count: int, skipped: tuple[int, ...] = (), few: tuple[int, ...] = (2,), of: str = "thorough"
) -> list[int]:
    marks = [[pytest.mark.few(*few).mark] for _ in range(count)]
    for number in skipped:
        marks[number].append(pytest.mark.skipif(True, reason="").mark)
    cases = [
        Case(nodeid=f"test.py::test_it[{number}]", marks=own) for number, own in enumerate(marks)
    ]
    tiers.mark([*cases, Case(nodeid="test.py::test_that", marks=[])])
    return [number for number, case in enumerate(cases) if case.get_closest_marker(of)]


def test_few_cases_are_the_same_and_the_nights_are_left_out() -> None:
    assert len(left_out(7)) == 5 and left_out(7) == left_out(7)
    assert left_out(2) == [] and left_out(3, skipped=(0,)) == [0]
    assert left_out(7, of="nightly") == [] and left_out(7, few=(2, 0)) == left_out(7) == left_out(
        7, few=(2, 3)
    )
    assert (
        len(left_out(7, few=(2, 3), of="nightly")) == 2
        and left_out(4, few=(2, 3), of="nightly") == []
    )
    case = Case(
        nodeid="test.py::test_it[0]", marks=[pytest.mark.few(2).mark, pytest.mark.nightly.mark]
    )
    tiers.mark([case])
    assert case.get_closest_marker("thorough")


@pytest.mark.parametrize(("marks", "tier"), tiers.TIERS.items())
def test_a_target_says_how_long_it_takes(marks: str, tier: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f'-m "{marks}"' in makefile and f"tests.tiers {tier})" in makefile
    told = tiers.expected(tier)
    assert re.fullmatch(r"[\d,]+ tests, about \d+ minutes on two cores \(\d+ core minutes\)", told)
