"""What compiled steps and packages' kernels need to be traced: the scenario's card, simulated, and compiled modules."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from dryfit.cards.gpus import Gpu, catalogue, find
from dryfit.common.errors import UserError
from dryfit.common.text import gib
from dryfit.engine.allocator import MIB
from dryfit.engine.card import Card
from dryfit.engine.cuda_rules import most_processors
from dryfit.engine.errors import TraceError
from dryfit.engine.simulation import simulated
from dryfit.hours.step_time import speed_of
from dryfit.scenario.model import KERNEL_PACKAGES, LEAST, LOOP, PACKAGE
from dryfit.scenario.scenario import Scenario, check_packages
from dryfit.step.kernel_packages import KernelPackages, installed_version, kernels_in_place, ways_of
from dryfit.step.liger import package_installed
from dryfit.tracing.imports import import_libraries

UNNAMED = "a100-80gb"  # the card of a scenario that names none: of the capability that the engine assumes then


def card_of(gpu: Gpu | None = None) -> Card:
    """What the engine answers about a GPU; None: about the one that it assumes.

    A card without a line under ``speeds`` has as many processors as the largest of its capability: a few buffers have a
    row for each, so the step needs the most there.

    Raises :class:`UserError` if it is no card of NVIDIA's.
    """
    gpu = gpu or find(UNNAMED)
    if gpu.capability is None:
        raise UserError(
            f"{gpu.title} can't be simulated: it is no card of NVIDIA's by name.",
            where="gpu",
            found=gpu.name,
            allowed="a card of NVIDIA's that config/gpus.yaml has",
            write=f"gpu: {UNNAMED}",
        )
    own, other = speed_of(gpu.name), speed_of(UNNAMED)
    processors = own.multiprocessors if own else most_processors(gpu.capability)
    cache = (
        round((own or other).cache_bytes / 1e6) * MIB
    )  # datasheets write MB, and the driver says MiB
    return Card(gpu.title, gpu.capability, processors, gpu.total_bytes, cache)


_heard: dict[
    str, str
] = {}  # by package, the card that it heard of when it was imported, whose answers it keeps


def _asked_card(scenario: Scenario, capability: tuple[int, int] | None) -> Card:
    """The scenario's card; where it is asked for a capability alone, or for another card's, the largest that has it.

    Some buffers have a row for each processor: on the card with the most of them the step needs the most.
    """
    gpu = None if scenario.gpu is None else find(scenario.gpu)
    known = gpu is not None and gpu.capability is not None
    if known and capability in (None, gpu.capability):
        return card_of(gpu)
    if capability is None:
        return card_of()
    alike = [
        each
        for each in catalogue().values()
        if each.capability == capability and speed_of(each.name)
    ]
    if alike:
        return max(map(card_of, alike), key=lambda card: card.multiprocessors)
    return replace(card_of(), capability=capability, shared_memory_bytes=None)


def _needs_card(scenario: Scenario, packages: Mapping[str, str]) -> bool:
    """Whether the step asks for the card: it is compiled, or runs kernels of packages, Liger's or others'."""
    by_package = scenario.loss == "liger" and package_installed()
    return (
        scenario.compile != "none"
        or scenario.kernels == "liger"
        or by_package
        or PACKAGE in packages.values()
    )


@contextmanager
def machine_in_place(
    scenario: Scenario,
    target: str,
    capability: tuple[int, int] | None,
    templates: bool = False,
    *,
    missing: str = LEAST,
    unlike: Collection[str] = (),
) -> Iterator[KernelPackages]:
    """Simulate the machine that a step is for: its card, if the step asks for one, and the packages that it has.

    A scenario that names no card, or only a size, gets :data:`UNNAMED`, or the largest of the capability that is asked.

    ``missing``: what runs for a package that it has and this machine does not. ``unlike``: packages whose version here
    is not the one that is meant.

    Raises :class:`UserError` if the card can't be simulated, or a package that the step needs is not installed.
    """
    check_packages(scenario)
    import_libraries(scenario)  # before a card is simulated: they would believe in it
    packages = {
        name: missing if way == LEAST else way for name, way in ways_of(scenario, target).items()
    }
    packages |= dict.fromkeys(unlike, LEAST)
    if target == "cpu" or not _needs_card(scenario, packages):
        with kernels_in_place(scenario, packages) as kernels:
            yield kernels
        return
    card = replace(_asked_card(scenario, capability), platform=scenario.platform)
    for name in (name for name, way in packages.items() if way == PACKAGE):
        _heard.setdefault(
            name, card.name if KERNEL_PACKAGES[name] not in sys.modules else "no card"
        )
    try:
        context = simulated(card, templates=templates)
        context.__enter__()
    except TraceError as error:
        raise UserError(error.problem, where="compile, kernels", allowed=error.hint) from error
    try:
        with kernels_in_place(scenario, packages) as kernels:
            yield kernels
    finally:
        context.__exit__(None, None, None)


def ways(scenario: Scenario, target: str) -> tuple[bool, ...]:
    """Whether Inductor's own products win the benchmarks of ``max-autotune``: both answers where they are made."""
    return (
        (False, True)
        if target == "cuda" and scenario.compile_mode.startswith("max-autotune")
        else (False,)
    )


_UNSLOTH = (
    "Unsloth's kernels can't be followed, so the figures are those of the same step with transformers' own kernels:"
    " it needs no more than that. {} Its loss takes up to half of what is free on top, and 4 GiB at most"
    " (unsloth_zoo's fused_losses/cross_entropy_loss.py), so that it alone runs out of nothing"
)
_UNSLOTH_LEAST = "It needs no less than {}, which is a step whose norms, MLP and rotation keep what its kernels keep."
_UNSLOTH_RESIDENT = "How much less this architecture needs with them is not known."
_AUTOTUNED = "a benchmark on the GPU chooses between cuBLAS and Inductor's own products; the figures are the higher"


def add_kernels(
    answer: dict[str, Any],
    scenario: Scenario,
    kernels: KernelPackages,
    capability: tuple[int, int] | None,
    peaks: Sequence[int],
) -> None:
    """Say in a trace's answer whose kernels ran, and the ``bounds`` of its peak where that isn't known.

    ``answer``: ``notes`` and ``warnings`` get lines; ``packages`` says of each package that the model's code asks for
    what ran; ``bounds``: ``lowest_bytes`` and ``highest_bytes`` (None: nobody knows) that are allocated, and
    ``missing``, what is not known between them. ``peaks``: the step's, one for each of :func:`ways`, in bytes.
    """
    launched = sum((answer.get("triton_kernels") or {}).values())
    if kernels.ways:
        answer["packages"] = dict(kernels.ways)
    notes, warnings = _said_of_packages(scenario, kernels, capability, launched)
    if scenario.kernels == "liger":
        version = installed_version("liger-kernel")
        own = f"liger-kernel {version} itself" if launched else "written after liger-kernel 0.8.5"
        notes.append(f"Liger's kernels: {own}")
    if bounds := _bounds(scenario, kernels, peaks, answer["resident_bytes"]):
        answer["bounds"] = bounds
        warnings.append(bounds["missing"])
    answer["notes"] = [*answer.get("notes", ()), *notes]
    answer["warnings"] = [*answer.get("warnings", ()), *warnings]


def _said_of_packages(
    scenario: Scenario, kernels: KernelPackages, capability: tuple[int, int] | None, launched: int
) -> tuple[list[str], list[str]]:
    """Notes and warnings about the packages that a model's code asks for."""
    notes, warnings = [], []
    if named := [name for name in kernels.of(PACKAGE) if name not in kernels.differing]:
        versions = ", ".join(f"{name} {installed_version(name)}".strip() for name in named)
        notes.append(f"kernels of {versions}: {launched} launches of Triton's in two steps")
        asked = _asked_card(scenario, capability).name
        warnings += [
            f"{name} was imported where there was {heard}, and keeps what it heard then: ask about {asked} in a process"
            " of its own"
            for name in named
            if (heard := _heard.get(name, asked)) != asked
        ]
    if looped := kernels.of(LOOP):
        why = "not among the `packages`"
        if scenario.packages is None:
            here = any(find_spec(KERNEL_PACKAGES.get(name, name)) for name in looped)
            why = "installed, and not followed in such a step" if here else "not installed here"
        notes.append(
            f"transformers' own loops run ({_loops(kernels, looped)}): {' and '.join(looped)} {_be(looped)} {why}"
        )
    if kernels.from_hub:
        warnings.append(
            "this model's code fetches a kernel from the Hub where the package kernels and a GPU are there; the figures"
            " are those of its own loop"
        )
    if scenario.kernels == "packages" and not kernels.ways:
        warnings.append("this model's code asks for no package: transformers' own kernels run")
    return notes, warnings


def _bounds(
    scenario: Scenario, kernels: KernelPackages, peaks: Sequence[int], resident: int
) -> dict[str, Any] | None:
    """Between which figures the peak lies; None: it is known."""
    least = kernels.of(LEAST)
    if kernels.differing:
        found = " and ".join(
            f"{name} {installed_version(name)}".strip() + f" is installed here, and {problem}"
            for name, problem in kernels.differing.items()
        )
        missing = _DIFFERING.format(found, gib(min(peaks)))
    elif least:
        missing = _LEAST.format(" and ".join(least), _be(least), _loops(kernels, least))
    elif scenario.kernels == "unsloth":
        known = len(peaks) > 1
        least = min(peaks) if known else resident
        missing = _UNSLOTH.format(_UNSLOTH_LEAST.format(gib(least)) if known else _UNSLOTH_RESIDENT)
        return {"lowest_bytes": least, "highest_bytes": max(peaks), "missing": missing}
    elif len(set(peaks)) > 1:
        missing = _AUTOTUNED
    else:
        return None
    return {
        "lowest_bytes": min(peaks),
        "highest_bytes": None if least else max(peaks),
        "missing": missing,
    }


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


_LEAST = (
    "a lower bound: {} {} not installed here, so the kernels can't be followed. Of {} the outputs, the inputs that are"
    " kept and their gradients are counted, and not what the kernels allocate beside them"
)
_DIFFERING = (
    "{}. transformers runs its own loop then, without a word, and so does this figure. With a version that has it"
    " (the extra `run` names one) the step needs less: {} is a lower bound"
)


def _loops(kernels: KernelPackages, packages: Sequence[str]) -> str:
    """The functions of some packages that a step calls, as the packages call them."""
    return ", ".join(
        dict.fromkeys(
            each.kernel for each in kernels.functions if each.package in packages and each.trains
        )
    )
