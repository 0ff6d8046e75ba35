"""The analytic estimate as a function of sequence length and micro-batch, to be evaluated where no Python runs.

A step's peak is the largest of the sums that are alive at some moment. Which tensors those are does not depend on
length and micro-batch; how large each is does, as ``bytes x unit``, where a unit is a product of symbols such as ``t``
(tokens) or ``b·s128`` (rows times the length padded to 128). So the engine runs once, every moment's tensors are noted
by unit, and the peak anywhere is the largest of the moments' sums: no interpolation, the same number to the byte. Of
the hundreds of moments the few are kept that are the largest somewhere on a dense grid of lengths and micro-batches.

Where the structure does change it changes at a known place, and there is a part for each side: attention's window, the
chunks of a chunked loss, one row or several in eager attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import product
from typing import Any

from will_it_fit.analytic.decoder import NotDescribed, described
from will_it_fit.analytic.live_bytes import Term
from will_it_fit.analytic.setting import CHUNK_TOKENS, Setting, check_described
from will_it_fit.analytic.step import TrainingStep
from will_it_fit.engine import cuda_rules
from will_it_fit.engine.allocator import typical_block
from will_it_fit.engine.components import grouped
from will_it_fit.engine.cuda_rules import DEFAULT_CAPABILITY, Capability
from will_it_fit.scenario.scenario import Scenario

# Symbols that change with length or micro-batch; all others are numbers of the model. `wt`, `gt` (`ws`, `gs`): words
# and partial sums of the gradient of an embedding that is looked up for each token (each position).
VARYING = frozenset(("b", "s", "t", "n", "c", "s8", "s32", "s128", "W", "wt", "gt", "ws", "gs"))
CONSTANTS = ("V", "p", "W64", "W128")  # that the varying ones are made of
UNEVEN = 4001  # a length that no block of a kernel divides
LONGEST = 2**20  # of models that don't say how long a sequence may be
# The grid on which moments are chosen: bounds of blocks and kernels lie between powers of two, so odd sizes are in it.
ROWS = (1, 2, 3, 5, 8, 13, 21, 40, 64, 111, 256, 600, 1024, 4096)
LENGTHS = (1, 3, 8, 16, 33, 64, 96, 128, 200, 256, 333, 512, 700, 1024, 1408, 2048, 2900, 4096, 6000, 8192, 12288)
LENGTHS += (16384, 25000, 32768, 50000, 65536, 100000, 131072)
NEAR = 0.005  # blocks are rounded up: what is this near to the peak on the grid may be the peak beside it

# Phase, fixed by group, times by (group, unit, bytes).
Moment = tuple[str, dict[str, int], dict[tuple[str, str, int], int]]


class _Recorder(TrainingStep):
    """A step that notes each moment at which a sum was the largest for a while, with its phase."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, blocks=False)
        self.moments: dict[tuple[int, str], Counter[Term]] = {}

    def look(self) -> None:
        super().look()
        # Equal sums are the same tensors: at a length that is no multiple of anything no two sizes agree by chance.
        if self.phase != "load" and (self.now, self.phase) not in self.moments:
            self.moments[self.now, self.phase] = self.live.copy()

    def by_unit(self, *, adapters: bool) -> list[Moment]:
        """The moments with their terms taken together by group of components and unit."""
        units = {}
        for (component, _, dims, width), term in self._terms.items():
            (group,) = grouped({component: 1}, adapters=adapters)
            varying = [symbol for symbol in dims if symbol in VARYING]
            for symbol in dims:
                width *= 1 if symbol in VARYING else self.value(symbol)
            units[term] = group, "·".join(sorted(varying)), width
        found: list[Moment] = []
        for (_, phase), moment in self.moments.items():
            fixed: Counter[str] = Counter()
            terms: Counter[tuple[str, str, int]] = Counter()
            for term, times in moment.items():
                if not times:
                    continue
                group, unit, width = units[term]
                if unit:
                    terms[group, unit, width] += times
                else:
                    fixed[group] += term.size * times
            found.append((phase, dict(fixed), dict(terms)))
        return found


def surface(scenario: Scenario, *, capability: Capability | None = None) -> dict[str, Any]:
    """The peak of a scenario's step for every sequence length and micro-batch.

    Parameters
    ----------
    scenario
        The step; its own length and micro-batch don't matter.
    capability
        Compute capability of the GPU.

    Returns
    -------
    dict
        ``parts``, each with bounds ``from_length``, ``from_rows``, ``from_targets`` (the last part counts whose bounds
        are all reached) and ``moments``; a moment has its ``phase``, ``fixed`` (bytes by group of components) and
        ``terms``, each ``[group, unit, bytes, times]``: so many blocks of bytes x unit. ``symbols``: numbers that units
        are made of beside length and rows. :func:`evaluate` shows how all of it is read.

    Raises
    ------
    NotDescribed
        For what the estimate does not describe.
    """
    decoder = described(scenario)
    check_described(scenario)
    if scenario.packing != "none":  # its attention pads masks of some lengths and not of others
        raise NotDescribed(f"a surface does not describe packing: {scenario.packing}")
    if scenario.allocator.expandable_segments:
        raise NotDescribed("a surface describes blocks as they are without expandable segments")
    longest = scenario.size("max_position_embeddings") or LONGEST
    found: dict[str, Any] = {"parts": [], "symbols": {"chunk": CHUNK_TOKENS}}
    for bounds, length, rows in _parts(scenario, decoder.window, longest):
        there = replace(scenario, sequence_length=length, micro_batch=rows)
        step = _Recorder(Setting(decoder, there, capability or DEFAULT_CAPABILITY)).run()
        found["symbols"] |= {name: step.symbols[name] for name in CONSTANTS if name in step.symbols}
        moments = step.by_unit(adapters=scenario.method != "full")
        moments = _largest_somewhere(moments, found["symbols"], bounds, longest)
        found["parts"].append({**bounds, "moments": [_as_mapping(moment) for moment in moments]})
    return found


def kernels_of(scenario: Scenario, capability: Capability | None) -> tuple[Any, ...]:
    """What of a step a GPU's compute capability decides: where this is the same, so are surfaces.

    Raises
    ------
    NotDescribed
        For what the estimate does not describe.
    """
    decoder, capability = described(scenario), capability or DEFAULT_CAPABILITY
    longest = scenario.size("max_position_embeddings") or LONGEST
    found: list[Any] = [cuda_rules.cublas_workspace_bytes(capability)]
    for _, length, rows in _parts(scenario, decoder.window, longest):
        setting = Setting(decoder, replace(scenario, sequence_length=length, micro_batch=rows), capability)
        for width in (2, 4):
            found.append(setting.attention_kernel(width))
            dtype = setting.attention_dtype(width)
            found += [
                cuda_rules.efficient_workspace_bytes(n, n, decoder.sizes["d"], dtype, capability)
                for n in (64, 128)
                if found[-1] == "mem_efficient"
            ]
    return tuple(found)


def _parts(scenario: Scenario, window: int, longest: int) -> Iterator[tuple[dict[str, int], int, int]]:
    """Where the structure of the step is the same: its lower bounds, and a length and rows inside.

    There more than 3,072 tokens, if possible, so that an embedding's gradient shows all that it may need.
    """
    lengths = [(1, min(longest - 1, UNEVEN, window - 1 if window else longest))]
    if 0 < window <= longest:
        lengths.append((window, max(window, min(longest, window + 97))))
    rows = [1, 2] if scenario.attention == "eager" else [1]
    targets = [0, CHUNK_TOKENS + 1] if scenario.loss == "chunked" else [0]
    for (from_length, length), from_rows, from_targets in product(lengths, rows, targets):
        bounds = {"from_length": from_length, "from_rows": from_rows, "from_targets": from_targets}
        many = 1 if rows == [1, 2] and from_rows == 1 else max(2, -(-4096 // length))
        if scenario.loss == "chunked" and not from_targets:
            length = min(length, CHUNK_TOKENS // many - 1)
        yield bounds, length, many


def _within(bounds: Mapping[str, int], length: int, rows: int) -> bool:
    return (
        length >= bounds["from_length"]
        and rows >= bounds["from_rows"]
        and rows * (length - 1) >= bounds["from_targets"]
    )


@cache
def _grid(bounds: tuple[tuple[str, int], ...], longest: int) -> tuple[tuple[int, int], ...]:
    lengths = [length for length in LENGTHS if length < longest] + [longest]
    return tuple(place for place in product(lengths, ROWS) if _within(dict(bounds), *place))


@lru_cache(8192)
def _blocks_on_grid(
    symbols: tuple[tuple[str, int], ...], bounds: tuple[tuple[str, int], ...], longest: int, unit: str, width: int
) -> tuple[int, ...]:
    """The block of a tensor at every place of a part's grid: the same in all methods and layouts of a model."""
    return tuple(_block(_symbols(dict(symbols), *place), unit, width) for place in _grid(bounds, longest))


def _largest_somewhere(
    moments: Sequence[Moment], symbols: Mapping[str, int], bounds: Mapping[str, int], longest: int
) -> list[Moment]:
    """The moments that are the peak, or within :data:`NEAR` of it, somewhere on the grid."""
    import numpy

    keys = sorted({key[1:] for _, _, terms in moments for key in terms})
    columns = {key: column for column, key in enumerate(keys)}
    place = tuple(sorted(symbols.items())), tuple(bounds.items()), longest
    blocks = numpy.array([_blocks_on_grid(*place, *key) for key in keys], dtype=numpy.int64)
    times = numpy.zeros((len(moments), len(keys)), dtype=numpy.int64)
    for row, (_, _, terms) in enumerate(moments):
        for (_, unit, width), count in terms.items():
            times[row, columns[unit, width]] += count
    fixed = numpy.array([sum(fixed.values()) for _, fixed, _ in moments], dtype=numpy.int64)
    sums = fixed[:, None] + times @ blocks
    kept: list[int] = []
    for index in numpy.argsort(-sums.max(axis=1), kind="stable"):  # one that has less of everything is never the peak
        above = [other for other in kept if fixed[other] >= fixed[index]]
        if not (times[above] >= times[index]).all(axis=1).any():
            kept.append(int(index))
    near = (sums[kept] >= sums.max(axis=0) * (1 - NEAR)).any(axis=1)
    return [moments[index] for index, is_near in zip(kept, near.tolist(), strict=True) if is_near]


def _as_mapping(moment: Moment) -> dict[str, Any]:
    phase, fixed, terms = moment
    return {"phase": phase, "fixed": fixed, "terms": [[*key, times] for key, times in sorted(terms.items())]}


def _symbols(constants: Mapping[str, int], length: int, rows: int) -> dict[str, int]:
    """The varying symbols at a place, as :meth:`Setting.symbols` and the layers define them."""
    targets = rows * (length - 1)
    found = {"b": rows, "s": length, "t": rows * length, "n": targets, "c": min(constants["chunk"], targets)}
    found["s8"] = cuda_rules.up(length, cuda_rules.BIAS_ALIGNMENT)
    found["s32"] = cuda_rules.up(length, cuda_rules.LOG_SUM_EXP_ALIGNMENT)
    found["s128"], _ = cuda_rules.flash_padding(length, 32)
    if "W128" in constants:  # blocks of 64 or 128 tokens: alike every 128
        whole, rest = divmod(length - 1, 128)
        found["W"] = whole * constants["W128"] + constants["W64" if rest < 64 else "W128"]
    for name, indices, words in (("t", rows * length, constants["V"]), ("s", length, constants["p"])):
        sizes = cuda_rules.embedding_backward_bytes(indices, words, 1) or [0] * 6
        found["w" + name], found["g" + name] = sizes[2] // 8, sizes[-1] // 4
    return found


def _block(symbols: Mapping[str, int], unit: str, width: int) -> int:
    """The block of a tensor of ``width`` bytes for each of a unit; none for a tensor that is not there."""
    for symbol in unit.split("·"):
        width *= symbols[symbol]
    return typical_block(width) if width else 0


def evaluate(form: Mapping[str, Any], length: int, rows: int) -> dict[str, Any]:
    """What a surface says of a place: ``peak_allocated_bytes``, the ``phase`` it is in, ``groups`` of components."""
    part = [part for part in form["parts"] if _within(part, length, rows)][-1]
    symbols = _symbols(form["symbols"], length, rows)

    def groups(moment: Mapping[str, Any]) -> Counter[str]:
        found = Counter(moment["fixed"])
        for group, unit, width, times in moment["terms"]:
            found[group] += times * _block(symbols, unit, width)
        return found

    sums = [(groups(moment), moment["phase"]) for moment in part["moments"]]
    largest, phase = max(sums, key=lambda item: sum(item[0].values()))
    return {"groups": dict(largest), "peak_allocated_bytes": sum(largest.values()), "phase": phase}
