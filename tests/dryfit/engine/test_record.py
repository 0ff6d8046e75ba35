"""A record's events as columns."""

import pytest

from dryfit.engine.periods import Unlike
from dryfit.engine.record import Columns, Record, WrittenRecord


def record(*events: int) -> Record:
    """Allocations of 512 bytes by id, and frees as negative ids."""
    found = Record()
    found.events = [(one, 512 if one > 0 else 0) for one in events]
    found.components = {one: "activations" for one in events if one > 0}
    return found


@pytest.mark.parametrize(
    ("events", "marks", "ordered"),
    [
        ((1, 2, 3, -3, -1, -2), (), [1, 2, 3, -1, -2, -3]),
        ((1, 2, 3, -3, -1, 4, -2), (), [1, 2, 3, -1, -3, 4, -2]),  # not beyond an allocation
        ((1, 2, 3, -3, -2, -1), (5,), [1, 2, 3, -2, -3, -1]),  # nor beyond a phase that begins
        ((1, 2, -1, -2), (0, 4), [1, 2, -1, -2]),
    ],
)
def test_frees_in_a_row_come_in_the_order_of_their_allocations(events, marks, ordered):
    columns = Columns.of(record(*events)).in_order(marks)
    assert WrittenRecord(columns).events == [(one, 512 if one > 0 else 0) for one in ordered]


def test_frees_stay_behind_other_streams_and_their_allocations():
    other = record(1, 2, 3, -3, -2, -1)
    other.reusable = {2: 5}
    assert Columns.of(other).in_order(()).targets.tolist() == [-1, -1, -1, 1, 2, 0]
    with pytest.raises(Unlike, match="nobody allocated"):
        Columns.of(record(1, -2))
