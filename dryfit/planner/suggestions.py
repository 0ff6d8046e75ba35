"""What to change so that a step fits its GPU: the analytic estimate searches, and the trace verifies each answer."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dryfit.analytic.certainty import OTHER_KERNELS
from dryfit.cards.beside import Process, room_bytes
from dryfit.cards.gpus import GIB, Gpu, catalogue
from dryfit.cards.verdict import verdict
from dryfit.common.errors import UserError
from dryfit.common.terminal import left_out_if_it_fails
from dryfit.planner.calibrated import CalibratedEstimator
from dryfit.planner.changes import COUNTS, Changes, Move, apply, moves, spread, written_out
from dryfit.planner.divisions import fitting, written
from dryfit.planner.largest_fit import Borders
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import DIVIDED, NONE

SUGGESTIONS = 3  # changes of the step to show, beside more GPUs and a bigger one
PROBES = 8  # traces that one search may take


@dataclass(frozen=True)
class Suggestion:
    """Changes that make a step fit."""

    move: str  # what identifies it: the name of a :class:`Move`, or several, joined by a plus sign
    # Fields of the scenario, and the same as YAML
    changes: Changes
    write: str
    cost: str  # what it costs, in words
    peak_allocated_bytes: int
    required_bytes: int
    headroom_bytes: int
    # How much longer a token takes on the same card, from two traces; None where its speed is not known
    slower_share: float | None = None


Watch = Callable[[str, int, Sequence[Suggestion]], None]


def suggest(
    scenario: Scenario,
    gpu: Gpu,
    traced: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    allowed: Callable[[Scenario], bool] = lambda step: True,
    failed: list[str] | None = None,
) -> list[Suggestion]:
    """Changes that make a scenario fit a GPU, in order of what they cost; the trace verifies each.

    At most :data:`SUGGESTIONS` changes of the step, then another division of several GPUs
    (:mod:`dryfit.planner.divisions`), more GPUs of the kind and a bigger one. What takes one trace is tried first,
    the mildest change before the others; then several changes together; and a shorter length, whose border takes
    several traces, only where fewer stand.

    Parameters
    ----------
    watch
        Called before each search, with what is tried, how many searches are left at most after it, and what was found.
    allowed
        Says of a division whether it may be suggested; the gate allows those that the training has.
    failed
        Gets the names of searches that failed; what they might have found is left out.
    """
    estimate = CalibratedEstimator(scenario, gpu, traced)
    fits = lambda candidate: estimate(candidate) <= room_bytes(Process.of(candidate), gpu)  # noqa: E731
    possible = list(moves(scenario))
    if (
        fits(scenario) and gpu.pool_bytes
    ):  # loading alone is too much, so what the step takes does not matter
        possible = [move for move in possible if move.name == "load_on_device"]
    quick = [move for move in possible if "sequence_length" not in move.options[0]]
    long = [move for move in possible if move not in quick]
    order = {move.name: place for place, move in enumerate(possible)}
    found: list[Suggestion] = []

    def mildest() -> str | None:
        return min((item.move for item in found), key=lambda name: order.get(name, 0), default=None)

    def one(move: Move) -> Callable[[], Suggestion | None]:
        return lambda: _verified(scenario, move, gpu, estimate, fits)

    searches: list[tuple[str, Callable[[], Suggestion | None]]] = [
        *((move.name, one(move)) for move in quick),
        (
            "several changes",
            lambda: _combined(scenario, gpu, estimate, fits, cheaper_than=mildest()),
        ),
        *((move.name, one(move)) for move in long),
    ]
    others = [
        ("more GPUs", lambda: _more_gpus(scenario, gpu, allowed)),
        ("a bigger GPU", lambda: _bigger_gpu(scenario, gpu, estimate)),
    ]
    if scenario.parallel.gpus > 1:
        others.insert(
            0,
            ("another division", lambda: _divided(scenario, gpu, scenario.parallel.gpus, allowed)),
        )
    places = {
        name: len(order) + place
        for place, name in enumerate(("division", "more_gpus", "bigger_gpu"))
    }
    while searches or others:
        changes_only = [item for item in found if item.move not in places]
        name, search = (searches if searches and len(changes_only) < SUGGESTIONS else others).pop(0)
        if len(changes_only) == SUGGESTIONS:
            searches.clear()
        if watch:
            watch(name, len(searches) + len(others), found)
        answer = None
        with left_out_if_it_fails(name, failed):
            answer = search()
        with left_out_if_it_fails("time", failed):
            if (
                answer
                and estimate.timed_on
                and scenario.aim.trainer is None
                and answer.move not in places
            ):
                answer = _timed(answer, scenario, gpu, estimate)  # no other objective has a time
        if answer:
            found.append(answer)
            found.sort(key=lambda item: order.get(item.move, places.get(item.move, -1)))
    return found


def _timed(
    item: Suggestion, scenario: Scenario, gpu: Gpu, estimate: CalibratedEstimator
) -> Suggestion:
    """The suggestion with what it saves and what it costs in time, for as many tokens."""
    before, changed = estimate.verify(scenario), apply(scenario, item.changes)
    after = estimate.verify(changed)["times"][gpu.name]

    def seconds_per_token(step: Scenario, time: Mapping[str, Any]) -> float:
        return time["seconds_per_step"] / (
            step.tokens * step.gradient_accumulation * step.parallel.rows_at_once
        )

    slower = seconds_per_token(changed, after) / seconds_per_token(scenario, before["time"]) - 1
    speed = (
        f"{abs(slower):.0%} {'slower' if slower > 0 else 'faster'}"
        if abs(slower) >= 0.005
        else "as fast"
    )
    speed += " a token" if changed.sequence_length != scenario.sequence_length else ""
    saved = f"saves {(before['required_bytes'] - item.required_bytes) / GIB:.2f} GiB, {speed}"
    return replace(item, cost=f"{item.cost}; {saved}", slower_share=round(slower, 4))


def _verified(
    scenario: Scenario,
    move: Move,
    gpu: Gpu,
    estimate: CalibratedEstimator,
    fits: Callable[[Scenario], bool],
) -> Suggestion | None:
    """The mildest of a move's changes that fits, by the trace; of lengths the one below which all fit."""
    with suppress(UserError):  # what can't be traced is no suggestion
        options = move.options[_mildest(scenario, move, fits) :]
        if (
            options
            and "sequence_length" in options[0]
            and scenario.aim.trainer is None
            and not scenario.images
        ):
            expandable = scenario.allocator.expandable_segments
            room = room_bytes(Process.of(scenario), gpu)
            borders = Borders(scenario, "sequence_length", gpu.capability, [room, gpu.usable_bytes])
            longest = borders.largest_traced(room, expandable=expandable).value
            options = [
                changes for changes in move.options if changes["sequence_length"] <= longest
            ][:1]
        for changes in options[:PROBES]:
            candidate = apply(scenario, changes)
            traced = estimate.verify(candidate) if fits(candidate) else None
            if traced and verdict(traced, gpu, Process.of(candidate)).fits:
                return _suggestion(move.name, changes, move.cost, traced, gpu)
    return None


def _mildest(scenario: Scenario, move: Move, fits: Callable[[Scenario], bool]) -> int:
    """Place of the first of a move's options, each of which needs less memory than the one before, that fits."""
    return bisect_left(move.options, True, key=lambda changes: fits(apply(scenario, changes)))


def _combined(
    scenario: Scenario,
    gpu: Gpu,
    estimate: CalibratedEstimator,
    fits: Callable[[Scenario], bool],
    cheaper_than: str | None,
) -> Suggestion | None:
    """Several changes together, verified; each trace corrects the estimate, until the search finds the same again."""
    best: Suggestion | None = None
    before: list[tuple[Move, Changes]] | None = None
    for _ in range(PROBES):
        taken = _cheapest(scenario, estimate, fits, cheaper_than)
        if taken is None or taken == before:
            break
        before = taken
        changed = _all(scenario, taken)
        traced = estimate.verify(changed)
        if verdict(traced, gpu, Process.of(changed)).fits:
            changes = {key: value for _, step in taken for key, value in step.items()}
            name, cost = (
                "+".join(move.name for move, _ in taken),
                "; ".join(move.cost for move, _ in taken),
            )
            best = _suggestion(name, changes, cost, traced, gpu)
    return best


def _cheapest(
    scenario: Scenario,
    estimate: CalibratedEstimator,
    fits: Callable[[Scenario], bool],
    cheaper_than: str | None,
) -> list[tuple[Move, Changes]] | None:
    """The cheapest changes first until it fits, then without those that turn out not to be needed."""
    taken: list[tuple[Move, Changes]] = []
    seen: set[str] = set()
    current = scenario
    while not fits(current):
        move = next((move for move in moves(current) if move.name not in seen), None)
        if move is None or move.name == cheaper_than:
            return None
        seen.add(move.name)
        chosen = move.options[min(_mildest(current, move, fits), len(move.options) - 1)]
        candidate = apply(current, chosen)
        if estimate(candidate) < estimate(current):
            taken.append((move, chosen))
            current = candidate
    for item in list(
        taken
    ):  # where a later change alone is enough, the cheap ones before it are not needed
        rest = [other for other in taken if other is not item]
        with suppress(UserError):  # a later change needs this one, as a rank needs adapters
            if fits(_all(scenario, rest)):
                taken = rest
    return taken


def _all(scenario: Scenario, taken: Iterable[tuple[Move, Changes]]) -> Scenario:
    for _, changes in taken:
        scenario = apply(scenario, changes)
    return scenario


def _bigger_gpu(scenario: Scenario, gpu: Gpu, estimate: CalibratedEstimator) -> Suggestion | None:
    """The smallest GPU of the catalogue that the scenario fits as it is."""
    own = estimate.verify(scenario)
    known = {estimate.capability: own}  # by compute capability
    for other in sorted(catalogue().values(), key=lambda other: other.usable_bytes):
        if other.total_bytes <= gpu.total_bytes:
            continue
        if other.capability not in known:
            # Another GPU may run other kernels. The analytic estimate knows how the peak differs, but not how well the
            # blocks fit together: where the peak fits, the trace decides.
            peak = own["peak_allocated_bytes"]
            if estimate.described:
                peak += estimate.on(other).formula(scenario) - estimate.formula(scenario)
            if peak > other.usable_bytes:
                continue
            known[other.capability] = CalibratedEstimator(scenario, other).verify(scenario)
        answer = known[other.capability]
        if verdict(answer, other, Process.of(scenario)).fits:
            return _suggestion(
                "bigger_gpu", {"gpu": other.name}, f"another GPU: {other.title}", answer, other
            )
    return None


def _divided(
    scenario: Scenario, gpu: Gpu, count: int, allowed: Callable[[Scenario], bool]
) -> Suggestion | None:
    """The scenario as it is on so many GPUs, divided in the best way that fits."""
    found = fitting(scenario, gpu, count, allowed)
    if found is None:
        return None
    changes: Changes = {"parallel": written(found.to_mapping())}
    if found.gradient_accumulation != scenario.gradient_accumulation:
        changes["gradient_accumulation"] = found.gradient_accumulation
    if found.loss != scenario.loss:
        changes["loss"] = found.loss
    if count > scenario.parallel.gpus:
        changes["gpu"] = {**_kind(gpu), "count": count}
    same = count == scenario.parallel.gpus
    cost = f"{'the same' if same else count} GPUs, divided as {found.way}: another exchange between them"
    sizes = found.peak_allocated_bytes, found.required_bytes, found.headroom_bytes
    return Suggestion(
        "division" if same else "more_gpus", changes, written_out(changes), cost, *sizes
    )


def _kind(gpu: Gpu) -> dict[str, Any]:
    kind = replace(gpu, count=1).setting
    return {"name": kind} if isinstance(kind, str) else kind


def _more_gpus(
    scenario: Scenario, gpu: Gpu, allowed: Callable[[Scenario], bool]
) -> Suggestion | None:
    """The fewest GPUs of the kind that hold the scenario as it is: with FSDP2 alone, or divided in another way."""
    if scenario.parallel.strategy not in (NONE, DIVIDED):
        return None
    estimate: CalibratedEstimator | None = None
    for count in COUNTS:
        if count <= max(gpu.count, scenario.parallel.gpus):
            continue
        changes, price = spread(scenario, count)
        changes["gpu"] = {**_kind(gpu), "count": count}
        try:
            candidate = apply(scenario, changes)
        except UserError:  # such as a loss that FSDP has no place for
            return None
        estimate = estimate or CalibratedEstimator(candidate, gpu)
        with suppress(UserError):  # what can't be traced is no suggestion
            if estimate(candidate) <= gpu.usable_bytes * (1 + OTHER_KERNELS):
                traced = estimate.verify(candidate)
                if verdict(traced, gpu, Process.of(candidate)).fits:
                    return _suggestion(
                        "more_gpus", changes, f"{count} such GPUs: {price}", traced, gpu
                    )
        if count == COUNTS[-1]:  # FSDP2 alone is not enough on any number
            return _divided(scenario, gpu, count, allowed)
    return None


def _suggestion(
    move: str, changes: Changes, cost: str, traced: Mapping[str, Any], gpu: Gpu
) -> Suggestion:
    peak, required = traced["peak_allocated_bytes"], traced["required_bytes"]
    return Suggestion(
        move,
        changes,
        written_out(changes),
        cost,
        peak,
        required,
        verdict(traced, gpu).headroom_bytes,
    )
