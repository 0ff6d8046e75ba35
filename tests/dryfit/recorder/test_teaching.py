"""What is compared with a trace: events in their order, but for frees that follow each other."""

import pytest

from dryfit.derived.families import FAMILIES, language_model_of
from dryfit.recorder.teaching import _in_one_order, base_key, checking_points, teaching_points
from dryfit.recorder.variants import variants_of

MARKS = [("forward", 0, 3)]


def test_frees_have_an_order_where_something_lies_between_them() -> None:
    assert _in_one_order([(1, 8), (2, 8), (-1, 0), (-2, 0)], []) == _in_one_order(
        [(1, 8), (2, 8), (-2, 0), (-1, 0)], []
    )
    for other in (
        [(1, 8), (2, 8), (-1, 0), (3, 8), (-2, 0)],
        [(1, 8), (2, 8), (-2, 0), (3, 8), (-1, 0)],
    ):
        assert _in_one_order(other, []) == other
    first, second = [(1, 8), (2, 8), (-1, 0), (-2, 0)], [(1, 8), (2, 8), (-2, 0), (-1, 0)]
    assert _in_one_order(first, MARKS) != _in_one_order(second, MARKS)
    first, second = (
        [(1, 8), (2, 8), (-1, 0), (0, 0), (-2, 0)],
        [(1, 8), (2, 8), (-2, 0), (0, 0), (-1, 0)],
    )
    assert _in_one_order(first, []) != _in_one_order(second, [])


@pytest.mark.parametrize("name", ["glm-5", "glm-5.2", "deepseek-v3.2"])
def test_rows_up_to_what_an_indexer_chooses_and_longer_ones_are_taught_and_checked_apart(
    name,
) -> None:
    family = next(family for family in FAMILIES.values() if name in family.catalogue())
    chosen = language_model_of(name)[family.chooses]
    seen = set()
    for variant in variants_of(family):
        longer = bool(variant.flags.get("chosen"))
        points = [*teaching_points(family, variant)[1], *checking_points(family, variant)]
        assert {point["s"] > chosen for point in points} == {longer}, variant
        assert base_key(family, variant).flags.get("chosen", False) == longer
        seen.add(longer)
    assert seen == {False, True}
