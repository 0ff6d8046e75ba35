"""Sizes as expressions: exact, rounded up to whole elements, or none."""

import pytest

from dryfit.derived.sizes import EXACT, Inexact, by_rule, chunks, last_chunk, value, with_rounded
from dryfit.engine.cuda_rules import embedding_backward_bytes

KNOWN = {"b": 2, "s": 5, "h": 6}


def test_a_size_is_exact_or_rounded_up_as_a_whole() -> None:
    assert value([[[2, 1, [["b", 1], ["s", 1], ["h", 1]]]], EXACT], KNOWN) == 120
    assert value([[[1, 4, [["s", 1]]], [1, 4, [["h", 1]]]], 4], KNOWN) == 4
    assert value([[[1, 4, [["s", 1]]], [1, 4, [["h", 1]]]], 1], KNOWN) == 3
    assert value([[[10, 1, [["h", 1], ["s", -1]]]], EXACT], KNOWN) == 12
    with pytest.raises(Inexact):
        value([[[1, 4, [["s", 1]]]], EXACT], KNOWN)
    known = with_rounded({"b": 1, "s": 130, "d": 80}, (8, 0))
    assert (known["s^128"], known["s^8"], known["d^f"]) == (256, 136, 96)


@pytest.mark.parametrize(
    ("rows", "length", "count", "last"),
    [(1, 257, 1, 256), (1, 258, 2, 1), (1, 512, 2, 255), (3, 512, 6, 253)],
)
def test_a_loss_in_chunks_takes_all_tokens_but_the_last_of_each_row(
    rows, length, count, last
) -> None:
    assert chunks({"b": rows, "s": length}) == count
    assert last_chunk({"b": rows, "s": length}) == last


@pytest.mark.parametrize("indices", [3072, 3073])
def test_a_rule_that_allocates_nothing_gives_no_bytes(indices) -> None:
    made = [by_rule("embedding", (8,), slot, (indices, 1000, 64), (8, 0)) for slot in range(6)]
    assert [size for size in made if size] == embedding_backward_bytes(indices, 1000, 64, 8)
