"""The size of an allocation as an expression in a step's numbers, or as one of the rules of kernels.

An expression is a sum of products of symbols, rounded up: ``[[factor, divisor, [[symbol, power], ...]], ...]`` and the
width that the sum is rounded up to (0: it is whole). Symbols are a step's numbers, as the family names them: ``s``
tokens of a row, ``b`` rows, ``h`` the hidden size, and so on. Others follow from these, such as ``s^128``, the length
rounded up to 128.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dryfit.engine import cuda_rules
from dryfit.engine.cuda_rules import Capability, up
from dryfit.scenario.fields import CHUNK_TOKENS

ROUNDED_TO = (8, 32, 64, 128, 256)  # lengths: blocks of kernels
KINDS = ("SUM", "LARGEST", "WITH_INDEX", "MOMENTS")  # of reductions, in cuda_rules
WORKSPACES = {
    "d": "W",
    "D": "W^D",
}  # of attention, by the size of a head; D: of layers that have another one
SLOTS = {
    "reduction": 3,
    "embedding": 6,
}  # allocations that a rule may make; those of 0 bytes are left out
Expression = Sequence[Any]  # terms and width
EXACT = 0  # in the place of a width


class Inexact(Exception):
    """A size came out with a fraction of a byte."""


def with_rounded(numbers: Mapping[str, int], capability: Capability) -> dict[str, int]:
    """The numbers of a step, and those that follow from them."""
    known, length = dict(numbers), numbers["s"]
    for multiple in ROUNDED_TO:
        known[f"s^{multiple}"] = up(length, multiple)
    known |= {"s-1": length - 1, "s+1": length + 1, "s+3": length + 3}
    known |= {f"s/{multiple}+1": -(-length // multiple) + 1 for multiple in (128, 256)}
    known["z"] = last_chunk(numbers)
    if "d" in numbers:
        known["d^f"] = cuda_rules.flash_padding(length, numbers["d"])[1]
    for symbol, workspace in WORKSPACES.items():
        if symbol in numbers:
            known[workspace] = cuda_rules.efficient_workspace_bytes(
                length, length, numbers[symbol], "bf16", capability
            )
    return known


def chunks(numbers: Mapping[str, int]) -> int:
    """In how many chunks the loss is taken, of all tokens but the last of each row."""
    return -(-numbers["b"] * (numbers["s"] - 1) // CHUNK_TOKENS)


def last_chunk(numbers: Mapping[str, int]) -> int:
    """Tokens of the last chunk."""
    return numbers["b"] * (numbers["s"] - 1) - CHUNK_TOKENS * (chunks(numbers) - 1)


def symbols_of(name: str) -> list[str]:
    """The symbols that follow from one number, itself first."""
    if name == "s":
        rounded = [f"s^{multiple}" for multiple in ROUNDED_TO]
        return ["s", "s-1", "s+1", "s+3", *rounded, "s/128+1", "s/256+1", "z"]
    return ["d", "d^f"] if name == "d" else [name]


def value(expression: Expression, known: Mapping[str, int]) -> int:
    """An expression's value, exactly.

    Inexact: if it was whole wherever it was fitted, and is not whole here.
    """
    terms, width = expression
    top, bottom = 0, 1
    for factor, divisor, powers in terms:
        for symbol, power in powers:
            if power > 0:
                factor *= known[symbol] ** power
            else:
                divisor *= known[symbol] ** -power
        if divisor == bottom == 1:
            top += factor
        else:
            top, bottom = top * divisor + factor * bottom, bottom * divisor
    if width:
        return -(-top // (bottom * width)) * width
    if top % bottom:
        raise Inexact(f"{top}/{bottom} bytes")
    return top // bottom


def by_rule(
    name: str, fixed: Sequence[Any], slot: int, arguments: Sequence[int], capability: Capability
) -> int:
    """Bytes of what a rule of :mod:`dryfit.engine.cuda_rules` says; 0: it allocates nothing there."""
    if name == "cublas":
        return cuda_rules.cublas_workspace_bytes(capability)
    if name == "embedding":
        made: Sequence[int] = cuda_rules.embedding_backward_bytes(*arguments, *fixed)
    else:
        count, reduced, element, output, kind = fixed
        made = cuda_rules.reduction_bytes(
            tuple(arguments[:count]),
            tuple(arguments[count:]),
            frozenset(reduced),
            element,
            output,
            getattr(cuda_rules, kind),
            capability,
            cuda_rules.most_processors(capability),
        )
    return made[slot] if slot < len(made) else 0
