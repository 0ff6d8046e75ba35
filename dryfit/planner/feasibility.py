"""What fits which GPU: the longest row and the most rows for each method, every border replayed from traces."""

import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from dryfit.cards.beside import Process, room_bytes
from dryfit.cards.gpus import GIB, Gpu, catalogue
from dryfit.cards.verdict import least_at, verdict
from dryfit.common.errors import UserError
from dryfit.common.terminal import progress
from dryfit.planner.largest_fit import Border, Borders, Traces, by_kernels, workspace_bytes
from dryfit.scenario.scenario import Scenario

FIELDS = ("sequence_length", "micro_batch")
TOO_LARGE = {
    "verdict": "does_not_fit",
    "fits": False,
    "headroom_bytes": None,
}  # by the analytic estimate alone
CELL = {"micro_batch": "largest_micro_batch", "sequence_length": "largest_sequence_length"}


class _Task(NamedTuple):
    """Borders of one step on GPUs that run the same kernels: what shares traces."""

    name: str
    scenario: Scenario
    gpus: tuple[Gpu, ...]
    verify: tuple[str, ...]  # names of the GPUs whose borders are traced themselves

    def solve(self, traces: Traces) -> dict[str, dict[str, Any]]:
        """By GPU and field the border, without expandable segments and with them, and what the step itself needs."""
        capability = self.gpus[0].capability
        rooms = {gpu.name: _rooms(self.scenario, gpu) for gpu in self.gpus}
        capacities = [size for gpu in self.gpus for size in (*rooms[gpu.name], gpu.usable_bytes)]
        found: dict[str, dict[str, Any]] = {gpu.name: {} for gpu in self.gpus}
        replayed = not any(gpu.name in self.verify for gpu in self.gpus)
        for field in FIELDS:
            shared = Borders(self.scenario, field, capability, capacities, traces)
            variants: dict[int, Borders] = {}
            for gpu in sorted(self.gpus, key=lambda gpu: gpu.usable_bytes):
                borders = variants.setdefault(
                    workspace_bytes(gpu.capability), shared.for_capability(gpu.capability)
                )
                search = borders.largest_traced if gpu.name in self.verify else borders.largest
                found[gpu.name][field] = {
                    "default": search(rooms[gpu.name][0]),
                    "expandable_segments": search(rooms[gpu.name][1], expandable=True),
                }
                if field == "sequence_length" and borders.has_traced:
                    found[gpu.name]["required"] = borders.required(self.scenario.sequence_length)
            if field == "sequence_length" and shared.has_traced and replayed:
                traces.known(self.scenario, shared.scaled.at(self.scenario.sequence_length))
        return found


def _process(scenario: Scenario, expandable: bool) -> Process:
    return replace(Process.of(scenario), expandable_segments=expandable)


def _rooms(scenario: Scenario, gpu: Gpu) -> tuple[int, int]:
    """The most that a step may need on a GPU, without expandable segments and with them."""
    without, with_them = (
        room_bytes(_process(scenario, expandable), gpu) for expandable in (False, True)
    )
    return without, with_them


_Solved = tuple[_Task, dict[str, dict[str, Any]]]


def _solve(tasks: Sequence[_Task]) -> list[_Solved]:
    """Tasks of one step: its models are built once."""
    from dryfit.hours.cpu import one_thread

    solved: list[_Solved] = []
    traces = None
    with one_thread():
        for task in tasks:
            traces = Traces(task.gpus[0].capability, beside=traces)
            solved.append((task, task.solve(traces)))
    return solved


def feasibility(
    bases: Mapping[str, Scenario], gpus: Iterable[Gpu] | None = None, *, verify: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """For each method and GPU the largest micro-batch at the scenario's length, and the longest sequence of one.

    Parameters
    ----------
    bases
        A step with a micro-batch of 1 by the name of its method.
    gpus
        The catalogue's by default.
    verify
        Names of GPUs whose borders are traced themselves; those of the others are replayed between traces.

    Returns
    -------
    list of dict
        ``method``, ``gpu``, ``gpus`` (how many share the step), ``total_gib``; ``required_bytes`` of a micro-batch of
        1 (None where the analytic estimate alone says that it is far too large), ``verdict``, ``fits``,
        ``headroom_bytes``;
        ``largest_micro_batch``, ``largest_sequence_length`` (0: none fits), ``seen_from``: by these names from where
        on every step of the search was replayed; ``expandable_segments``: the same figures with
        ``expandable_segments:True``; ``verified``: whether the borders themselves were traced.
    """
    if beside := [base for base in bases.values() if base.generation.engine == "vllm"]:
        raise UserError(
            "A plan knows nothing of the share of a card that vLLM takes.",
            where="generation.engine",
            found=beside[0].generation.engine,
            allowed="transformers, none; one cycle is asked about with dryfit and a GPU",
            change={"generation": {"engine": "none"}},
        )
    gpus = list(catalogue().values()) if gpus is None else list(gpus)
    tasks = [
        _Task(name, replace(base, gpu=None), tuple(group), tuple(verify))
        for name, base in bases.items()
        for group in by_kernels(base, gpus)
    ]
    solved: dict[tuple[str, str], dict[str, Any]] = {}
    for task, found in progress(
        _all(tasks), "what fits which GPU", unit="searches", total=len(tasks)
    ):
        for gpu, borders in found.items():
            solved[task.name, gpu] = borders
    return [
        _row(name, base, gpu, solved[name, gpu.name], verify)
        for name, base in bases.items()
        for gpu in gpus
    ]


def _all(tasks: Sequence[_Task]) -> Iterable[_Solved]:
    """Every task's answer; where processes can share what is imported, on all CPU cores.

    Where cores are few, a process takes all tasks of a step. A method's step comes before those of the methods that
    were named before it: they take less, and the last process ends sooner.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    by_step: dict[str, list[_Task]] = {}
    for task in reversed(tasks):
        by_step.setdefault(task.name, []).insert(0, task)
    shares = [[task] for task in tasks] if cores >= len(by_step) else list(by_step.values())
    workers = min(len(shares), cores)
    if workers < 2 or sys.platform != "linux" or multiprocessing.current_process().daemon:
        yield from chain.from_iterable(map(_solve, by_step.values()))
        return
    from dryfit.tracing.imports import import_quietly

    import_quietly(tasks[0].scenario)  # once, before the processes part

    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from chain.from_iterable(pool.imap_unordered(_solve, shares))


def _row(
    name: str, base: Scenario, gpu: Gpu, found: Mapping[str, Any], verify: Sequence[str]
) -> dict[str, Any]:
    needed = found.get(
        "required", {"default": None, "expandable_segments": None}
    )  # by the allocator's setting

    def figures(allocator: str) -> dict[str, Any]:
        borders: dict[str, Border] = {field: found[field][allocator] for field in FIELDS}
        own = needed[allocator]
        process = _process(base, allocator == "expandable_segments")
        judged = TOO_LARGE if own is None else verdict(own, gpu, process).fields()
        return {
            "required_bytes": own and own["required_bytes"],
            **judged,
            **{CELL[field]: border.value for field, border in borders.items()},
            "seen_from": {CELL[field]: border.seen_from for field, border in borders.items()},
        }

    return {
        "method": name,
        "gpu": gpu.name,
        "gpus": base.parallel.gpus,
        "total_gib": round(gpu.total_bytes / GIB, 2),
        **figures("default"),
        "expandable_segments": figures("expandable_segments"),
        "verified": gpu.name in verify,
    }


def largest(scenario: Scenario, gpu: Gpu, field: str, most: int | None = None) -> dict[str, Any]:
    """The largest ``micro_batch`` or ``sequence_length`` that fits a GPU, all else being as in the scenario, traced.

    ``most``: no value above it is tried.

    Returns ``value`` (0: not even the smallest fits), ``required_bytes`` and ``headroom_bytes`` there, ``seen_from``
    (:class:`~dryfit.planner.largest_fit.Border`), ``verified``: always, ``limited_by_positions``: the model's positions
    end it, not the memory; ``with_other_allocator``: the value, replayed, with expandable segments where the scenario
    has none, and without them where it has.
    """
    rooms = _rooms(scenario, gpu)
    traces = Traces(
        gpu.capability, derived=not gpu.pool_bytes
    )  # loading into a shared memory is in no record
    borders = Borders(scenario, field, gpu.capability, [*rooms, gpu.usable_bytes], traces)
    borders.values = [
        value for value in borders.values if most is None or value <= most
    ] or borders.values[:1]
    expandable = scenario.allocator.expandable_segments
    found = borders.largest_traced(rooms[expandable], expandable=expandable)
    needed = None
    if found.value:
        needed = borders.required(found.value)["expandable_segments" if expandable else "default"]
    return {
        "value": found.value,
        "required_bytes": needed and needed["required_bytes"],
        "headroom_bytes": needed and gpu.usable_bytes - least_at(needed, rooms[expandable]),
        "seen_from": found.seen_from,
        "verified": True,
        "with_other_allocator": borders.largest(
            rooms[not expandable], expandable=not expandable
        ).value,
        "limited_by_positions": field == "sequence_length" and found.limited,
    }
