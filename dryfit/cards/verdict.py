"""Whether a step fits a card, in three words, with what else the card holds.

A step fits where what it needs, and the most that may be beside it (:mod:`dryfit.cards.beside`), is there. It does
not fit where not even the least is. Between the two it is too close to call. What an answer leaves out counts by its
bytes where they are known (:class:`Omission`). :mod:`dryfit.cards.sentences` says it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from dryfit.cards.beside import ALONE, NOTHING, Beside, Part, Process, beside
from dryfit.cards.gpus import Gpu, loading_on_unified_memory
from dryfit.common.text import gib

CLOSE_BY = 2  # parts that a sentence names


class Word(Enum):
    """A verdict; its value stands in JSON."""

    FITS = "fits"
    TOO_CLOSE = "too_close"
    DOES_NOT_FIT = "does_not_fit"


TITLES = {Word.FITS: "FITS", Word.TOO_CLOSE: "TOO CLOSE TO CALL", Word.DOES_NOT_FIT: "DOES NOT FIT"}
NO_VERDICT = "NO VERDICT"  # of a card whose allocator is not modelled


@dataclass(frozen=True)
class Omission:
    """Something that an answer does not count."""

    what: str  # its name, as an answer says it
    # By how much the answer may be too low, and too high; 0: it is not. None: nobody knows how much.
    too_low_bytes: int | None = 0
    too_high_bytes: int | None = 0
    # Nothing can be said to fit beside it: it takes memory for certain, and nobody knows how much
    decides: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether a step fits a card."""

    # Where the step itself fits: by how much smaller the card might be so that every size between suffices. Else,
    # negative: what the least lacks from which on every size suffices. None: no card is named.
    headroom_bytes: int | None = None
    needed_bytes: int = 0  # what was compared with the card
    beside: Beside = NOTHING  # what else the card holds
    omissions: tuple[Omission, ...] = ()  # what the answer leaves out
    is_lower_bound: bool = (
        False  # the figures are the least that the step can need, and nobody knows the most
    )
    is_modelled: bool = (
        True  # whether the card's allocator is replayed; else nothing can be said to fit
    )
    estimated: Word | None = (
        None  # what the analytic estimate says by its own ranges; None: the step was traced
    )

    @property
    def beside_bytes(self) -> tuple[int, int]:
        """The least and the most that is to be counted beside what the step needs."""
        low = sum(one.too_high_bytes or 0 for one in self.omissions)
        high = sum(one.too_low_bytes or 0 for one in self.omissions)
        return self.beside.least_bytes(self.needed_bytes) - low, self.beside.most_bytes(
            self.needed_bytes
        ) + high

    @property
    def word(self) -> Word | None:
        """The verdict; None: no card is named, or its allocator is not modelled and the step is not too large."""
        if self.headroom_bytes is None:
            return None
        least, most = self.beside_bytes
        if not self.is_modelled:
            return Word.DOES_NOT_FIT if self.headroom_bytes < 0 else None
        word = Word.TOO_CLOSE
        if self.headroom_bytes < least:
            word = Word.DOES_NOT_FIT
        elif (
            self.headroom_bytes >= most
            and not self.is_lower_bound
            and not any(one.decides for one in self.omissions)
        ):
            word = Word.FITS
        return word if self.estimated in (None, word) else Word.TOO_CLOSE

    @property
    def fits(self) -> bool | None:
        """True for fits, False for does not fit; None: too close to call, or no verdict."""
        return {Word.FITS: True, Word.DOES_NOT_FIT: False}.get(self.word)

    def leaving_out(self, omissions: Iterable[Omission]) -> Verdict:
        """The verdict of an answer that leaves more out."""
        return replace(self, omissions=(*self.omissions, *omissions))

    def fields(self) -> dict[str, Any]:
        """``verdict``, ``fits`` and ``headroom_bytes``, as JSON has them."""
        word = self.word
        return {
            "verdict": word and word.value,
            "fits": self.fits,
            "headroom_bytes": self.headroom_bytes,
        }

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON: the fields, and what they rest on."""
        named = self.headroom_bytes is not None and self.is_modelled
        return self.fields() | {
            "margin": self.beside.to_mapping(self.needed_bytes) if named else None,
            "omissions": [vars(one) for one in self.omissions],
        }

    @property
    def reason(self) -> str:
        """What the headroom means, as the end of a sentence."""
        spare, (least, most) = self.headroom_bytes or 0, self.beside_bytes
        word = self.word
        if word is Word.FITS:
            return f"{gib(spare)} to spare"
        if word is Word.DOES_NOT_FIT and spare < 0:
            return f"short by {gib(-spare)}"
        if word is Word.DOES_NOT_FIT:
            return f"{gib(spare)} to spare, and at least {gib(least)} more is needed ({self._named(least=True)})"
        if self.is_lower_bound and spare >= most:
            return "what is missing is in the warnings"
        if spare >= most and (more := [one.what for one in self.omissions if one.decides]):
            return (
                f"{gib(spare)} to spare, and nobody knows how much more {' and '.join(more)} need"
            )
        if spare >= 0:
            return (
                f"{gib(spare)} to spare, and up to {gib(most)} more may be needed ({self._named()})"
            )
        return f"short by {gib(-spare)}, and the answer may be {gib(-least)} too high ({self._named(least=True)})"

    def _named(self, least: bool = False) -> str:
        """What decides: the largest parts first."""
        fragments = self.beside.to_mapping(self.needed_bytes)["parts"]
        sizes = [
            (part["name"], part["least_bytes"] if least else part["most_bytes"])
            for part in fragments
        ]
        for one in self.omissions:
            sizes.append(
                (one.what, -(one.too_high_bytes or 0) if least else one.too_low_bytes or 0)
            )
        told = sorted(((abs(size), name) for name, size in sizes if size), reverse=True)
        shown = [f"{name} {gib(size)}" for size, name in told[:CLOSE_BY]]
        return ", ".join([*shown, *(["..."] if len(told) > CLOSE_BY else [])])


def verdict(needed: Mapping[str, Any], gpu: Gpu | None, process: Process = ALONE) -> Verdict:
    """The verdict on a step for a card.

    ``needed``: what a trace says: ``required_bytes``, from where on every size suffices; ``also_fits_bytes``, intervals
    below it that suffice as well (:mod:`dryfit.engine.capacities`); for unified memory ``phases`` and
    ``host_copy_bytes``, which say what loading takes; ``peak_allocated_bytes`` where no allocator is modelled;
    ``bounds``, where more is not known. ``process``: who takes the step, which decides what is beside it.
    """
    if gpu is None:
        return Verdict()
    usable = gpu.usable_bytes
    if gpu.is_modelled:
        least = least_at(needed, usable)
    else:
        least = needed.get("peak_allocated_bytes", needed["required_bytes"])
    headroom = usable - least
    if (loads := loading_on_unified_memory(needed, gpu)) is not None:
        headroom = min(headroom, gpu.free_pool_bytes - gpu.context_bytes - loads)
    omissions = tuple(_of_bounds(needed))
    return Verdict(
        headroom, least, beside(process, gpu), omissions, is_lower_bound(needed), gpu.is_modelled
    )


def least_at(needed: Mapping[str, Any], size: int) -> int:
    """From where on every size up to a given one suffices; where that does not suffice, from where on every size does.

    ``needed``: as for :func:`verdict`.
    """
    around = (low for low, high in needed.get("also_fits_bytes", ()) if low <= size < high)
    return next(around, needed["required_bytes"])


def _of_bounds(needed: Mapping[str, Any]) -> Iterator[Omission]:
    """What kernels that are not known may take more or less; not the worst case of an assumption that is stated.

    A step whose kernels keep less has other fragments too, so its need may be as low as its peak.
    """
    if has_range(needed):
        bounds, peak = needed["bounds"], needed["peak_allocated_bytes"]
        yield Omission(
            "kernels that are not known",
            max(bounds["highest_bytes"] - peak, 0),
            max(needed["required_bytes"] - bounds["lowest_bytes"], 0),
        )


def has_range(needed: Mapping[str, Any]) -> bool:
    """Whether kernels that are not known make a trace's peak a range, with a lower and an upper end."""
    bounds = needed.get("bounds")
    is_known = (
        bounds
        and bounds["highest_bytes"] is not None
        and needed.get("peak_allocated_bytes") is not None
    )
    return bool(is_known and not bounds.get("is_worst_case"))


def is_lower_bound(needed: Mapping[str, Any]) -> bool:
    """Whether a trace's figures are the least that a step can need, and nobody knows the most."""
    return "bounds" in needed and needed["bounds"]["highest_bytes"] is None


_MORE = (
    "bounds",
    "phases",
    "host_copy_bytes",
    "peak_allocated_bytes",
)  # of a trace, whatever the allocator


def verdicts_by_allocator(
    trace: Mapping[str, Any], gpu: Gpu | None, process: Process = ALONE
) -> dict[str, dict[str, Any]]:
    """By the allocator's setting ``required_bytes`` of a step, and the fields of its :class:`Verdict`."""
    if gpu and not gpu.is_modelled:
        return {}
    verdicts = {}
    for name, size in trace.get("required_bytes_by_allocator", {}).items():
        needed = {
            "required_bytes": size,
            "also_fits_bytes": trace["also_fits_bytes_by_allocator"][name],
        }
        more = {key: trace[key] for key in _MORE if key in trace}
        own = replace(process, expandable_segments=name == "expandable_segments")
        verdicts[name] = {"required_bytes": size, **verdict(needed | more, gpu, own).fields()}
    return verdicts


def of_mapping(answer: Mapping[str, Any]) -> Verdict:
    """The verdict that an answer's JSON holds, for whoever has no more than that."""
    margin, gpu = answer.get("margin") or {"parts": []}, answer.get("gpu") or {}
    parts = tuple(Part(**part) for part in margin["parts"])
    trace = answer.get("trace") or {}
    omissions = tuple(Omission(**one) for one in answer.get("omissions", ()))
    estimated = Word(answer["verdict"]) if not trace and answer["verdict"] else None
    modelled = gpu.get("is_modelled", True)
    return Verdict(
        answer["headroom_bytes"],
        0,
        Beside(parts),
        omissions,
        is_lower_bound(trace),
        modelled,
        estimated,
    )
