"""What is compared with a trace: events in their order, but for frees that follow each other."""

from dryfit.recorder.teaching import _in_one_order

MARKS = [("forward", 0, 3)]


def test_frees_have_an_order_where_something_lies_between_them() -> None:
    assert _in_one_order([(1, 8), (2, 8), (-1, 0), (-2, 0)], []) == _in_one_order(
        [(1, 8), (2, 8), (-2, 0), (-1, 0)], []
    )
    for other in ([(1, 8), (2, 8), (-1, 0), (3, 8), (-2, 0)], [(1, 8), (2, 8), (-2, 0), (3, 8), (-1, 0)]):
        assert _in_one_order(other, []) == other
    first, second = [(1, 8), (2, 8), (-1, 0), (-2, 0)], [(1, 8), (2, 8), (-2, 0), (-1, 0)]
    assert _in_one_order(first, MARKS) != _in_one_order(second, MARKS)
    first, second = [(1, 8), (2, 8), (-1, 0), (0, 0), (-2, 0)], [(1, 8), (2, 8), (-2, 0), (0, 0), (-1, 0)]
    assert _in_one_order(first, []) != _in_one_order(second, [])
