"""Accounts of one training step: what is alive, term by term, and what was alive at each phase's peak.

A term is a size written down as a formula: ``2·t·h`` is two bytes for each token and hidden element. All tensors of one
formula, component and purpose are one term, counted.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import NamedTuple

from will_it_fit.engine.allocator import EMPTY_CACHE, Event, round_size, typical_block
from will_it_fit.engine.components import ROUNDING
from will_it_fit.engine.replay import replay


class Term(NamedTuple):
    """What a number of tensors are: their component, their purpose in words, their formula and the bytes of one."""

    component: str
    what: str
    formula: str
    size: int


class Ledger:
    """What is alive, what was alive at each phase's peak, and, on request, every allocation in order.

    Parameters
    ----------
    symbols
        The numbers that symbols of formulas stand for.
    blocks
        Whether to keep the order of allocations, so that the allocator can make blocks of them. Else each tensor counts
        as much as its block does on average.
    expandable
        Whether segments are expandable: then every block is as large as its tensor, to 512 bytes.
    """

    def __init__(self, symbols: dict[str, int], *, blocks: bool, expandable: bool = False) -> None:
        self.symbols, self.expandable = symbols, expandable
        self.live: Counter[Term] = Counter()
        self.now = 0
        self.phase = "load"
        self.peaks: dict[str, int] = {}
        self.at_peak: dict[str, Counter[Term]] = {}
        self.events: list[Event] | None = [] if blocks else None
        self._terms: dict[tuple, Term] = {}
        self._starts = [("load", 0)]
        self._last_identity = 0
        self._rising = False

    def value(self, symbol: str) -> int:
        """A symbol's number; ``i+i`` is a sum, ``1/64`` a share, ``4096`` itself."""
        if symbol not in self.symbols:
            parts = symbol.split("+")
            self.symbols[symbol] = sum(int(part) if part.isdigit() else self.symbols[part] for part in parts)
        return self.symbols[symbol]

    def term(self, component: str, what: str, dims: tuple[str, ...], width: int) -> Term:
        """The term of tensors of some dimensions, whose elements take ``width`` bytes."""
        key = (component, what, dims, width)
        term = self._terms.get(key)
        if term is None:
            elements = prod(self.value(symbol) for symbol in dims)
            term = Term(component, what, "·".join((str(width), *dims)), self.rounded(elements * width))
            self._terms[key] = term
        return term

    def rounded(self, size: int) -> int:
        """Bytes to account for: requests where the allocator makes the blocks, else blocks as they are on average."""
        return round_size(size) if self.expandable or self.events is not None else typical_block(size)

    def count(self, term: Term, times: int = 1) -> None:
        """Some tensors of a term come."""
        self.live[term] += times
        self.now += term.size * times
        self._rising = True

    def uncount(self, term: Term, times: int = 1) -> None:
        """Some tensors of a term go."""
        if self._rising:
            self.look()
        self.live[term] -= times
        self.now -= term.size * times

    def look(self) -> None:
        """Note the phase's peak if this is one."""
        self._rising = False
        if self.now > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = self.now
            self.at_peak[self.phase] = self.live.copy()

    def begin(self, phase: str) -> None:
        """A phase begins; what is alive counts for both."""
        self.look()
        self.phase = phase
        self.look()
        if self.events is not None:
            self._starts.append((phase, len(self.events)))

    def hold(self, component: str, what: str, width: int, elements: int | str, times: int = 1) -> None:
        """Tensors of some elements (a number or a symbol) come and stay to the end of the step.

        Those of the load phase are allocated by who loads them.
        """
        term = self.term(component, what, (str(elements),), width)
        self.count(term, times)
        if self.events is not None and self.phase != "load":
            for _ in range(times):
                self.allocate(term.size)

    def allocate(self, size: int) -> int:
        """Tell the allocator of a tensor; returns what to retire it by."""
        if self.events is not None:
            self._last_identity += 1
            self.events.append((self._last_identity, size))
        return self._last_identity

    def free(self, identity: int) -> None:
        """Tell the allocator of a tensor's end."""
        if self.events is not None:
            self.events.append((-identity, 0))

    def empty_cache(self) -> None:
        """Tell the allocator to give back what is free."""
        if self.events is not None:
            self.events.append(EMPTY_CACHE)

    def make_blocks(self) -> None:
        """Run the allocations through the allocator: what its blocks take beyond the tensors is a term of its own."""
        if self.events is None:
            return
        run = replay(self.events, self._starts, expandable_segments=self.expandable)
        for phase, peak in run.phases.items():
            self.at_peak[phase][Term(ROUNDING, "blocks larger than tensors", "", peak - self.peaks[phase])] = 1
            self.peaks[phase] = peak
        self.events = None
