"""Sequences that grow by repeats: what corresponds, and how numbers of their elements go on."""

import random

import pytest
import torch

from dryfit.engine.periods import Periods, Repeats, Unlike


def step(layers: int) -> tuple[list[str], list[int]]:
    """Like a training step: layers forward, backward in the other order; a number says which place an element frees."""
    tokens, targets, forward = ["begin"], [-1], []
    for _ in range(layers):
        forward.append(len(tokens))
        tokens += ["norm", "product", "norm"]
        targets += [-1, -1, -1]
    tokens.append("loss")
    targets.append(-1)
    for start in reversed(forward):
        tokens += ["gradient", "free product", "free norm"]
        targets += [-1, start + 1, start]
    tokens += ["update"] * 2 * layers + ["end"]
    targets += [-1] * 2 * layers + [len(tokens) - 1]
    return tokens, targets


@pytest.mark.parametrize("more", [0, 1, 2, 25])
def test_two_sequences_give_every_longer_one(more):
    (few, few_targets), (many, many_targets) = step(3), step(4)
    periods = Periods(few, many)
    tokens, targets = step(4 + more)
    assert [many[place] for place in periods.source(more).tolist()] == tokens
    assert (
        periods.extended(torch.tensor(few_targets), torch.tensor(many_targets), more).tolist()
        == targets
    )
    assert [few[place] for place in periods.in_shorter().tolist()] == many
    assert [run.count for run in periods.runs] == [4, 4, 4] and periods.runs[0] == Repeats(1, 3, 4)


def test_how_numbers_go_on():
    periods = Periods(list("abbbz"), list("abbbbz"))
    few, many = torch.tensor([7, 1, 1, 1, 30]), torch.tensor([7, 1, 1, 1, 1, 40])
    assert periods.extended(few, many, 2).tolist() == [7, 1, 1, 1, 1, 1, 1, 60]
    periods = Periods(list("xxxx"), list("xxxxx"))
    few, many = torch.arange(8).view(4, 2), torch.arange(10).view(5, 2)
    assert periods.extended(few, many, 3).tolist() == torch.arange(16).view(8, 2).tolist()
    periods = Periods(list("aabz"), list("aaabz"))
    even = periods.extended(torch.tensor([0, 10, 5, 5]), torch.tensor([0, 10, 20, 5, 5]), 2)
    assert even.tolist() == [0, 10, 20, 30, 40, 5, 5]
    with pytest.raises(Unlike, match="evenly"):
        periods.extended(torch.tensor([0, 10, 5, 5]), torch.tensor([3, 10, 90, 5, 5]), 2)
    periods = Periods(list("xabz"), list("xababz"))
    few, many = torch.tensor([0, 1, 12, 30]), torch.tensor([0, 2, 13, 4, 15, 37])
    assert periods.extended(few, many, 2).tolist() == [0, 4, 15, 6, 17, 8, 19, 10, 21, 51]


@pytest.mark.parametrize(
    ("few", "many", "why"),
    [
        ("abc", "abxc", "nothing repeats"),
        ("abc", "axc", "nothing repeats"),
        ("abcabc", "abc", "nothing repeats"),
    ],
)
def test_what_does_not_repeat_is_refused(few, many, why):
    with pytest.raises(Unlike, match=why):
        Periods(list(few), list(many))


def test_random_layers_between_random_ends():
    draw = random.Random(0)
    for _ in range(50):
        parts = [[draw.randrange(6) for _ in range(draw.randrange(1, 12))] for _ in range(7)]

        def sequence(layers: int, parts=parts) -> list[int]:
            first, forward, middle, backward, between, update, last = parts
            return [
                -1,
                *first,
                *forward * layers,
                -2,
                *middle,
                *backward * layers,
                -3,
                *between,
                *update * layers,
                *last,
            ]

        periods = Periods(sequence(4), sequence(5))
        assert [sequence(5)[place] for place in periods.source(6).tolist()] == sequence(11)
