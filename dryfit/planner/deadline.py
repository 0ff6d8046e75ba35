"""What makes a run end sooner on the GPU that it has: a trace gives the memory and the time of each change."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from dryfit.cards.beside import Process, room_bytes
from dryfit.cards.gpus import Gpu
from dryfit.cards.verdict import verdict
from dryfit.common.errors import UserError
from dryfit.hours.run_time import Run, RunTime, run_time
from dryfit.planner.calibrated import CalibratedEstimator
from dryfit.planner.changes import Changes, Move, apply, faster_moves, written_out
from dryfit.scenario.scenario import Scenario

PROBES = 3  # traces that one change may take


@dataclass(frozen=True)
class Sooner:
    """Changes with which the step still fits, and the run that they make."""

    # What identifies it: the name of a :class:`~dryfit.planner.changes.Move`, or several, joined by a plus sign
    move: str
    # Fields of the scenario, and the same as YAML
    changes: Changes
    write: str
    cost: str  # what it costs, in words
    required_bytes: int
    headroom_bytes: int
    run: RunTime

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def sooner(scenario: Scenario, gpu: Gpu, asked: Run, estimate: CalibratedEstimator) -> list[Sooner]:
    """What makes a run that is late end in time, the change that costs least first.

    One change each; then all of them together, if none is enough. Where nothing ends in time: the soonest, alone.

    ``estimate``: of the scenario on this GPU, with the time of its step.
    """
    candidates = [
        item
        for move in faster_moves(scenario, gpu.capability)
        for item in [
            _largest(scenario, [move.name], [move.cost], move.options, gpu, asked, estimate)
        ]
        if item
    ]
    if not any(item.run.in_time for item in candidates) and len(candidates) > 1:
        candidates += _together(scenario, gpu, asked, estimate)
    return [item for item in candidates if item.run.in_time] or sorted(
        candidates, key=lambda item: item.run.hours
    )[:1]


def _together(
    scenario: Scenario, gpu: Gpu, asked: Run, estimate: CalibratedEstimator
) -> Iterator[Sooner]:
    """All changes for which there is memory, one after the other; the last one as large as still fits."""
    taken: list[tuple[Move, Changes]] = []
    changes: Changes = {}
    for move in faster_moves(scenario, gpu.capability):
        for option in move.options:
            with suppress(UserError):
                if estimate(apply(scenario, changes | option)) <= room_bytes(
                    Process.of(scenario), gpu
                ):
                    taken.append((move, option))
                    changes = changes | option
                    break
    if len(taken) > 1:
        last, _ = taken[-1]
        before = {key: value for _, option in taken[:-1] for key, value in option.items()}
        options = [before | option for option in last.options]
        names, costs = [move.name for move, _ in taken], [move.cost for move, _ in taken]
        item = _largest(scenario, names, costs, options, gpu, asked, estimate)
        if item:
            yield item


def _largest(
    scenario: Scenario,
    names: list[str],
    costs: list[str],
    options: list[Changes],
    gpu: Gpu,
    asked: Run,
    estimate: CalibratedEstimator,
) -> Sooner | None:
    """The first of the options, from the fastest on, that fits by the trace; None where the soonest is no sooner."""
    own = _hours(scenario, gpu, asked, estimate)
    tried = 0
    for changes in options:
        with suppress(UserError):  # what can't be traced is not proposed
            candidate = apply(scenario, changes)
            if tried == PROBES or estimate(candidate) > room_bytes(Process.of(candidate), gpu):
                continue
            tried += 1
            traced = estimate.verify(candidate)
            required, judged = traced["required_bytes"], verdict(traced, gpu, Process.of(candidate))
            if judged.fits:
                run = _hours(candidate, gpu, asked, estimate)
                write, cost = written_out(changes), "; ".join(costs)
                change = Sooner(
                    "+".join(names), changes, write, cost, required, judged.headroom_bytes, run
                )
                return change if run.hours < own.hours else None
    return None


def _hours(scenario: Scenario, gpu: Gpu, asked: Run, estimate: CalibratedEstimator) -> RunTime:
    typical = estimate.verify(asked.typical_step(scenario))
    time = typical["time"] if "time" in typical else typical["times"][gpu.name]
    return run_time(time, gpu, scenario, asked)
