"""What a step's record means: peaks, phases, components, a timeline, and what is alive at the peak. All in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from statistics import median_low
from typing import Any, NamedTuple

from .allocator import Event
from .capacities import Interval
from .components import ROUNDING
from .costs import CostRecorder
from .interpolate import NOTHING_ASKED, Asked, Recording
from .origins import NOWHERE
from .record import Record
from .replay import Events, Replay, replay, running_sum

# The last in whole programs alone, and those before it in trainers that generate (:mod:`.trainer`).
PHASES = (
    "load",
    "forward",
    "backward",
    "optimizer",
    "generation",
    "rewards",
    "old_log_probabilities",
    "reference_log_probabilities",
    "teacher",
    "evaluation",
)
_OUTSIDE = {
    "inputs": "forward",
    "between": "optimizer",
}  # of no module, the autograd engine or an optimizer
TIMELINE_POINTS = 2000


class History(NamedTuple):
    """What happened on the device before the first step.

    Attributes
    ----------
    events
        ``(id, bytes)`` allocates, ``(-id, 0)`` frees, the allocator's ``EMPTY_CACHE`` gives free segments back.
    ids
        The id of each storage that the model holds, by ``tensor.untyped_storage()._cdata``.
    components
        What ids are for that neither were freed nor belong to the model.
    """

    events: Sequence[Event] = ()
    ids: Mapping[int, int] = {}
    components: Mapping[int, str] = {}


@dataclass(frozen=True)
class Report:
    """The memory of the last step that was taken, in bytes.

    Attributes
    ----------
    peak_allocated_bytes
        Largest sum of blocks in use: ``torch.cuda.max_memory_allocated``. On the CPU, of live tensors.
    peak_allocated_range_bytes
        From no workspaces of cuDNN and cuFFT to as large ones as may be, None where nothing bounds them; or, where a
        program starts collectives and doesn't wait for them, to a CPU that is as far ahead of the GPU as it can be.
        Absent (None) where neither is so.
    peak_phase
        Where that was: ``forward``, ``backward`` or ``optimizer``; in a whole program ``load`` or ``evaluation``, too.
    components
        What lived at that moment; they add up to the peak exactly.
    phases
        The peak in ``load``, ``forward``, ``backward``, ``optimizer``; of a whole program in ``evaluation``, too.
    components_by_phase
        What lived at each phase's peak.
    resident_bytes
        Before the first step.
    peak_reserved_bytes
        Largest sum of segments, ``torch.cuda.max_memory_reserved``, everything before the step included; the median
        where several histories are possible. None on the CPU.
    reserved_range_bytes
        Lowest and highest of them; with several GPUs, from a CPU that is never ahead of the GPU to one that is as far
        ahead as the program lets it be.
    required_bytes
        What a GPU must have, without its CUDA context: from there on every size suffices
        (:mod:`dryfit.engine.capacities`), where several histories are possible for the worst.
    required_range_bytes
        Lowest and highest of them.
    also_fits_bytes
        Intervals of sizes below it, around those that were asked about, that suffice as well: from, to before.
    asked_bytes
        The sizes that were asked about. Both figures hold for these very sizes.
    required_bytes_by_allocator, also_fits_bytes_by_allocator
        Of ``default``, where segments stay as they were made, and of ``expandable_segments``. None: not asked for.
    events
        How many allocations and frees were recorded.
    warnings
        What a person should know about these figures.
    orders
        One mapping for each history where there are several: ``peak_allocated_bytes``, ``peak_reserved_bytes``,
        ``phases``, ``resident_bytes``.
    timeline
        Columns ``event``, ``phase``, ``allocated_bytes``, and ``components`` with one column each. None: not asked for.
    tensors
        What is alive at the peak, the largest first: ``bytes``, ``component``, ``shape``, ``dtype``, ``module``,
        ``line``, ``operator``. None: not asked for.
    costs
        The kernels of the step and what each costs; as a mapping their sums by phase and kind, and with
        ``origins`` ``costs_by_module`` by module and kind. None: not asked for.
    triton_kernels
        How often each of Triton's kernels was launched, in all steps; None: none was.
    compiled
        Where a compiled step was followed: ``graphs``, and by text how often ``breaks`` and ``skipped_frames`` were
        met.
    """

    peak_allocated_bytes: int
    peak_phase: str
    components: dict[str, int]
    phases: dict[str, int]
    components_by_phase: dict[str, dict[str, int]]
    resident_bytes: int
    events: int
    warnings: tuple[str, ...] = ()
    peak_allocated_range_bytes: tuple[int, int | None] | None = None
    peak_reserved_bytes: int | None = None
    reserved_range_bytes: tuple[int, int] | None = None
    required_bytes: int | None = None
    required_range_bytes: tuple[int, int] | None = None
    also_fits_bytes: tuple[Interval, ...] | None = None
    asked_bytes: tuple[int, ...] | None = None
    required_bytes_by_allocator: dict[str, int] | None = None
    also_fits_bytes_by_allocator: dict[str, tuple[Interval, ...]] | None = None
    orders: list[dict[str, Any]] | None = None
    timeline: dict[str, Any] | None = None
    tensors: list[dict[str, Any]] | None = None
    costs: CostRecorder | None = None
    triton_kernels: dict[str, int] | None = None
    compiled: dict[str, Any] | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON, without what is None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.costs is not None:
            values["costs"] = self.costs.by_phase()
            if self.costs.module_now is not None:
                values["costs_by_module"] = self.costs.by_module()
        return {key: _plain(value) for key, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """Lists for tuples, those within a tuple or a mapping too."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict) and any(isinstance(one, tuple) for one in value.values()):
        return {key: _plain(one) for key, one in value.items()}
    return value


def make_report(
    record: Record,
    histories: Sequence[History] = (),
    *,
    on_gpu: bool,
    timeline: bool = True,
    capacity_bytes: int | None = None,
    expandable_segments: bool = False,
    asked: Asked = NOTHING_ASKED,
) -> Report:
    """Turn the record of several steps into the figures of the last one.

    Parameters
    ----------
    record
        Its events begin with those of the first history.
    histories
        What may have happened before the first step; over one where chance decides.
    on_gpu
        Whether blocks and segments count, or the bytes of tensors alone.
    capacity_bytes
        The GPU's memory without the CUDA context: then reserved memory is that of a GPU which gives cached segments
        back when it is full. None: memory is plentiful.
    expandable_segments
        Whether the allocator runs with ``expandable_segments:True``.
    asked
        GPUs that are asked about, and whether both of the allocator's settings are.
    """
    replayed = partial(replay, streams=record.streams, expandable_segments=expandable_segments)
    events = record.events if on_gpu else [event for event in record.events if event[0]]
    last = record.marks[-1][1] - 1  # the mark of the end has a number of its own
    begin, second = record.start(0), record.start(last)
    trail: list[int] = []
    run = (
        replayed(Events.of(events), [("load", 0), ("steps", begin)], trail=trail)
        if on_gpu
        else None
    )
    allocated = [*trail[begin:], run.allocated_bytes] if run else [*running_sum(events)][begin:]
    # allocated[i] is the state before event begin + i, so after event begin + i - 1.
    if last in record.replayed:
        last = _recorded(record, last, allocated, begin)
        second = record.start(last)
    spans = _phases(record, last)
    tops = _highest_of_all(record, last, spans, allocated, begin)
    phases = {phase: allocated[top] for phase, top in tops.items()}
    peak_phase = max(phases, key=lambda phase: phases[phase])
    by_phase = {}
    for phase, parts in zip(
        tops, _components(record, events, [begin + top for top in tops.values()]), strict=True
    ):
        rounding = {ROUNDING: phases[phase] - sum(parts.values())} if on_gpu else {}
        by_phase[phase] = dict(sorted((parts | rounding).items()))
    before = run.spans[0].peak_allocated_bytes if run else allocated[0]
    reserved = _reserved(record, histories, events, run, capacity_bytes, replayed) if run else {}
    if run:
        reserved |= recording(record, histories).needs(
            asked, expandable_segments=expandable_segments
        )
    if on_gpu:
        before_event = lambda at: allocated[at - begin]  # noqa: E731
        peak = phases[peak_phase]

        def peak_of(moved):
            return replayed(Events.of(moved), [("steps", begin)]).spans[0].peak_allocated_bytes

        if record.stashes is not None:
            reserved |= record.stashes.range_of(
                peak, events, peak_of, record.warn, record.marks[-1][1]
            )
        reserved |= record.workspaces.range_of(
            peak, before_event, second, capacity_bytes, record.warn
        )
    return Report(
        peak_allocated_bytes=phases[peak_phase],
        peak_phase=peak_phase,
        components=by_phase[peak_phase],
        phases={"load": before} | phases,
        components_by_phase=by_phase,
        resident_bytes=allocated[0],
        events=len(events),
        warnings=tuple(record.warnings),
        timeline=_timeline(record, events, allocated, begin, second, spans, on_gpu)
        if timeline
        else None,
        tensors=_alive(record, events, begin + tops[peak_phase])
        if record.origins is not None
        else None,
        costs=record.costs,
        triton_kernels=dict(sorted(record.kernels_run.items())) or None,
        compiled=record.compiled and record.compiled.to_mapping(),
        **reserved,
    )


def _recorded(record: Record, last: int, allocated: Sequence[int], begin: int) -> int:
    """The step with the most memory, where CUDA graphs were recorded: in later ones they are replayed."""

    def most(step: int) -> int:
        return max(
            max(allocated[first - begin : end - begin + 1]) for _, first, end in record.spans(step)
        )

    step = max(range(last + 1), key=most)
    record.warn(
        "CUDA graphs are replayed from the second or third step on, and PyTorch counts nothing of that as allocated:"
        f" the peak is that of step {step + 1}, where they were recorded. What a GPU must have covers all steps"
    )
    return step


def _highest_of_all(
    record: Record,
    last: int,
    spans: Sequence[tuple[str, int, int]],
    allocated: Sequence[int],
    begin: int,
) -> dict[str, int]:
    """Where each phase is highest; with the step's own code, between the phases, where that takes the most."""
    tops = _highest(spans, allocated, begin)
    for phase, top in _highest(_phases(record, last, _OUTSIDE), allocated, begin).items():
        if allocated[top] > max(allocated[other] for other in tops.values()):
            tops[phase] = top
    return tops


def _phases(
    record: Record, step: int, named: Mapping[str, str] = dict(zip(PHASES, PHASES, strict=True))
) -> list[tuple[str, int, int]]:
    """Names, first events and ends of a step's phases; one of them, the forward pass, if no module was called."""
    spans = [
        (named[phase], first, end) for phase, first, end in record.spans(step) if phase in named
    ]
    return spans or [("forward", first, end) for _, first, end in record.spans(step)]


def _highest(
    spans: Sequence[tuple[str, int, int]], allocated: Sequence[int], begin: int
) -> dict[str, int]:
    """Where each phase has most allocated, the first such place; ``allocated[i]`` is before event ``begin + i``."""
    tops: dict[str, int] = {}
    for phase, first, end in spans:
        top = max(
            range(first - begin, end - begin + 1), key=lambda index: (allocated[index], -index)
        )
        if phase not in tops or allocated[top] > allocated[tops[phase]]:
            tops[phase] = top
    return tops


def recording(record: Record, histories: Sequence[History] = (), **_: Any) -> Recording:
    """A record as events alone, to be run through the allocator (:mod:`dryfit.engine.interpolate`)."""
    sequences = [record.sequence()]
    if len(histories) > 1:
        step = record.events[len(histories[0].events) :]
        sequences = [Events.of(_after(history, histories[0], step)) for history in histories]
    return Recording(sequences, record.streams, workspaces=record.cublas_workspaces())


def _reserved(
    record: Record,
    histories: Sequence[History],
    events: Sequence[Event],
    run: Replay,
    capacity_bytes: int | None,
    replay: Callable[..., Replay],
) -> dict[str, Any]:
    """Segments: of the history that the record begins with, and of the others."""
    reserved = run.peak_reserved_bytes
    if capacity_bytes is not None and reserved > capacity_bytes:
        reserved = replay(events, capacity_bytes=capacity_bytes, grow=True).peak_reserved_bytes
    if len(histories) < 2:
        most = reserved
        if record.reusable:
            late = _reused_late(record, events)
            most = max(
                most,
                replay(
                    late, capacity_bytes=capacity_bytes, grow=capacity_bytes is not None
                ).peak_reserved_bytes,
            )
        return {"peak_reserved_bytes": reserved, "reserved_range_bytes": (reserved, most)}
    step = events[len(histories[0].events) :]
    sequences = [_after(history, histories[0], step) for history in histories]
    orders = [_peaks(record, sequence, capacity_bytes, replay) for sequence in sequences]
    peaks = [order["peak_reserved_bytes"] for order in orders]
    return {
        "orders": orders,
        "peak_reserved_bytes": median_low(peaks),
        "reserved_range_bytes": (min(peaks), max(peaks)),
    }


def _reused_late(record: Record, events: Sequence[Event]) -> list[Event]:
    """The events when the CPU is ahead of the GPU as far as the program lets it be.

    Blocks that another stream uses as well come back only where the program waits for the GPU. A full GPU is waited for
    (``synchronize_and_free_events``, before segments are given back), so that what it must have is the same.
    """
    held: dict[int, list[int]] = {}
    for identity, moment in record.reusable.items():
        held.setdefault(moment, []).append(-identity)
    late: list[Event] = []
    for index, event in enumerate(events):
        late += [(identity, 0) for identity in held.get(index, ())]
        if -event[0] not in record.reusable or event[0] > 0:
            late.append(event)
    return late


def _after(history: History, seen: History, step: Sequence[Event]) -> list[Event]:
    """The steps after another history: where they free a tensor of the model, the id is that history's."""
    known = {-identity: -history.ids[storage] for storage, identity in seen.ids.items()}
    return [*history.events, *((known.get(identity, identity), count) for identity, count in step)]


def _peaks(
    record: Record,
    events: Sequence[Event],
    capacity_bytes: int | None,
    replay: Callable[..., Replay],
) -> dict[str, Any]:
    """Figures of the last step for events that are the record's own but for those before its first mark."""
    shift = len(events) - len(record.events)  # histories may be of different lengths
    marks = [(phase, index + shift) for phase, _, index in record.marks]
    run = replay(events, marks, capacity_bytes=capacity_bytes, grow=capacity_bytes is not None)
    last = record.marks[-1][1] - 1
    phases: dict[str, int] = {}
    for span, (phase, step, _) in zip(run.spans, record.marks, strict=True):
        if step == last and phase in PHASES:
            phases[phase] = max(phases.get(phase, 0), span.peak_allocated_bytes)
    return {
        "peak_allocated_bytes": max(phases.values()),
        "peak_reserved_bytes": run.peak_reserved_bytes,
        "phases": phases,
        "resident_bytes": run.spans[0].start_allocated_bytes,
    }


def alive_after(events: Sequence[Event]) -> dict[int, int]:
    """Bytes by id of what is allocated and not freed."""
    alive: dict[int, int] = {}
    for identity, count in events:
        if identity > 0:
            alive[identity] = count
        else:
            alive.pop(-identity, None)
    return alive


def _components(
    record: Record, events: Sequence[Event], moments: Sequence[int]
) -> list[dict[str, int]]:
    """Bytes of each component before the events at some indices."""
    wanted = sorted(set(moments))
    bytes_at: dict[int, dict[str, int]] = {}
    totals: dict[str, int] = {}
    sizes: dict[int, int] = {}
    position = 0
    for moment in wanted:
        for identity, count in events[position:moment]:
            if identity > 0:
                component = record.components[identity]
                sizes[identity] = count
                totals[component] = totals.get(component, 0) + count
            elif identity < 0 and -identity in sizes:
                totals[record.components[-identity]] -= sizes.pop(-identity)
        position = moment
        bytes_at[moment] = {component: count for component, count in totals.items() if count}
    return [bytes_at[moment] for moment in moments]


def _alive(record: Record, events: Sequence[Event], moment: int) -> list[dict[str, Any]]:
    """The tensors before the event at an index, the largest first."""
    rows = []
    for identity, count in alive_after(events[:moment]).items():
        origin = record.origins.of.get(identity, NOWHERE)
        row = {"bytes": count, "component": record.components[identity]}
        rows.append(row | asdict(origin) | {"shape": list(origin.shape)})
    return sorted(rows, key=lambda row: (-row["bytes"], row["module"], row["operator"]))


def _timeline(
    record: Record,
    events: Sequence[Event],
    allocated: Sequence[int],
    begin: int,
    second: int,
    spans: Sequence[tuple[str, int, int]],
    on_gpu: bool,
) -> dict[str, Any]:
    """The last step, thinned out: of each stretch of events the moment with the most memory."""
    count = len(events) - second
    width = max(1, -(-count // TIMELINE_POINTS))
    total_at: Callable[[int], int] = lambda index: allocated[index - begin]  # noqa: E731
    moments = [
        max(range(first, min(first + width, len(events) + 1)), key=total_at)
        for first in range(second, len(events) + 1, width)
    ]
    snapshots = _components(record, events, moments)
    names = sorted({name for snapshot in snapshots for name in snapshot})
    columns = {name: [snapshot.get(name, 0) for snapshot in snapshots] for name in names}
    totals = [total_at(moment) for moment in moments]
    if on_gpu:
        columns[ROUNDING] = [
            total - sum(snapshot.values())
            for total, snapshot in zip(totals, snapshots, strict=True)
        ]
    starts = [(first, phase) for phase, first, _ in spans]
    phase_of = []
    for moment in moments:
        past = [phase for first, phase in starts if first < moment]
        phase_of.append(past[-1] if past else "forward")
    return {
        "allocated_bytes": totals,
        "components": columns,
        "event": [moment - second for moment in moments],
        "phase": phase_of,
    }
