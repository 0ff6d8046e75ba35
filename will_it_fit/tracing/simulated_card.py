"""What compiled steps and packages' kernels need to be traced: the scenario's card, simulated, and compiled modules."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from will_it_fit.cards.gpus import Gpu, catalogue, find
from will_it_fit.common.errors import UserError
from will_it_fit.engine.allocator import MIB
from will_it_fit.engine.card import Card, Simulation
from will_it_fit.engine.errors import TraceError
from will_it_fit.engine.simulation import simulated
from will_it_fit.hours.step_time import speed_of
from will_it_fit.scenario.model import KERNEL_PACKAGES
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.step.liger import package_installed

UNNAMED = "a100-80gb"  # the card of a scenario that names none: of the capability that the engine assumes then


def card_of(gpu: Gpu | None = None) -> Card:
    """What the engine answers about a GPU; None: about the one that it assumes.

    Raises
    ------
    UserError
        If config/gpus.yaml has no processors of it, or it is no card of NVIDIA's.
    """
    gpu = gpu or find(UNNAMED)
    speed = speed_of(gpu.name)
    if speed is None or gpu.capability is None:
        raise UserError(
            f"{gpu.title} can't be simulated: config/gpus.yaml doesn't say how many processors it has.",
            where="gpu",
            found=gpu.name,
            allowed="a card of NVIDIA's with a line under `speeds` of config/gpus.yaml",
            write=f"gpu: {UNNAMED}",
        )
    cache = round(speed.cache_bytes / 1e6) * MIB  # datasheets write MB, and the driver says MiB
    return Card(gpu.title, gpu.capability, speed.multiprocessors, gpu.total_bytes, cache)


_OWN_KERNELS = re.compile("Mamba|SSM|Rwkv|GatedDelta|Recurrent|ShortConv|xLSTM|mLSTM|LightningAttention")
_heard: dict[str, str] = {}  # by package, the card that it heard of when it was imported, whose answers it keeps


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
    alike = [each for each in catalogue().values() if each.capability == capability and speed_of(each.name)]
    if alike:
        return max(map(card_of, alike), key=lambda card: card.multiprocessors)
    return replace(card_of(), capability=capability, shared_memory_bytes=None)


def needs_card(scenario: Scenario) -> bool:
    """Whether the step asks for the card: it is compiled, or runs kernels of packages, Liger's or others'."""
    by_package = scenario.loss == "liger" and package_installed()
    return scenario.compile != "none" or scenario.kernels in ("packages", "liger") or by_package


@contextmanager
def card_in_place(
    scenario: Scenario, target: str, capability: tuple[int, int] | None, templates: bool = False
) -> Iterator[Simulation | None]:
    """Simulate the card that a step is for, if it asks for one.

    A scenario that names no card, or only a size, gets :data:`UNNAMED`, or the largest of the capability that is asked.

    Raises
    ------
    UserError
        If the card can't be simulated.
    """
    if not needs_card(scenario) or target == "cpu":
        yield None
        return
    card = _asked_card(scenario, capability)
    for name in scenario.packages:
        module = KERNEL_PACKAGES[name]
        _heard.setdefault(name, card.name if module not in sys.modules else "no card")
    try:
        context = simulated(card, templates=templates)
        simulation = context.__enter__()
    except TraceError as error:
        raise UserError(error.problem, where="compile, kernels", allowed=error.hint) from error
    try:
        yield simulation
    finally:
        context.__exit__(None, None, None)


def ways(scenario: Scenario, target: str) -> tuple[bool, ...]:
    """Whether Inductor's own products win the benchmarks of ``max-autotune``: both answers where they are made."""
    return (False, True) if target == "cuda" and scenario.compile_mode.startswith("max-autotune") else (False,)


_UNSLOTH = (
    "Unsloth's kernels can't be followed, so the figures are those of the same step with transformers' own kernels:"
    " it needs no more than that"
)
_AUTOTUNED = "a benchmark on the GPU chooses between cuBLAS and Inductor's own products; the figures are the higher"


def add_kernels(
    answer: dict[str, Any], scenario: Scenario, capability: tuple[int, int] | None, peaks: Sequence[int]
) -> None:
    """Say in a trace's answer whose kernels ran, and the ``bounds`` of its peak where that isn't known.

    Parameters
    ----------
    answer
        ``notes`` and ``warnings`` get lines; ``bounds``: ``lowest_bytes`` and ``highest_bytes`` that are allocated,
        and ``missing``, what is not known between them.
    peaks
        The step's, one for each of :func:`ways`, in bytes.
    """
    notes, warnings = list(answer.get("notes", ())), list(answer.get("warnings", ()))
    launched = sum((answer.get("triton_kernels") or {}).values())
    if scenario.kernels == "packages":
        named = ", ".join(f"{name} {_version(name)}" for name in scenario.packages)
        notes.append(f"kernels of {named}: {launched} launches of Triton's in two steps")
        asked = _asked_card(scenario, capability).name
        warnings += [
            f"{name} was imported where there was {heard}, and keeps what it heard then: ask about {asked} in a process"
            " of its own"
            for name in scenario.packages
            if (heard := _heard.get(name, asked)) != asked
        ]
        if not launched:
            warnings.append("the step launches no kernel of Triton's: transformers took its own code for these layers")
    elif scenario.kernels == "liger":
        own = f"liger-kernel {_version('liger-kernel')} itself" if launched else "written after liger-kernel 0.8.5"
        notes.append(f"Liger's kernels: {own}")
    missing = _UNSLOTH if scenario.kernels == "unsloth" else _AUTOTUNED if len(set(peaks)) > 1 else None
    if missing:
        lowest = answer["resident_bytes"] if scenario.kernels == "unsloth" else min(peaks)
        answer["bounds"] = {"lowest_bytes": lowest, "highest_bytes": max(peaks), "missing": missing}
        warnings.append(missing)
    answer["notes"], answer["warnings"] = notes, warnings


def _version(package: str) -> str:
    """Of a package as pip names it; fla's kernels come in a distribution of their own."""
    for name in (package, f"{package}-core"):
        with suppress(PackageNotFoundError):
            return version(name)
    return ""


_NAMED = re.compile(r'use_kernel_func_from_hub_with_fallback\("\w+", "(\w+)"\)')


def packages_of(model: nn.Module) -> list[str]:
    """The packages whose kernels transformers takes in a model's file where they can be imported, as pip names them."""
    owners = {sys.modules[type(module).__module__] for module in model.modules()}
    named = {name for owner in owners for name in _NAMED.findall(inspect.getsource(owner))}
    return [name for name, module in KERNEL_PACKAGES.items() if module in named]


def refuse_own_kernels(model: nn.Module, scenario: Scenario) -> None:
    """State spaces, recurrences and short convolutions: what they allocate on a GPU only their packages' code says."""
    own = sorted({type(module).__name__ for module in model.modules() if _OWN_KERNELS.search(type(module).__name__)})
    if not own or scenario.kernels == "packages":
        return
    packages, allowed = packages_of(model), "an architecture whose layers are attention and linear layers"
    if packages:
        allowed += f"; or those of {', '.join(packages)} that the target machine has: kernels packages, with their list"
    raise UserError(
        "This architecture has layers that run through kernels of packages of their own, whose memory is not known."
        if packages
        else "This architecture has recurrences whose memory is not known; transformers takes no package for them.",
        where=f"model (model_type {scenario.model['model_type']})",
        found=", ".join(own[:3]),
        allowed=allowed,
        change={"kernels": "packages", "packages": packages} if packages else {},
    )


def compile_parts(model: nn.Module, how: str, mode: str) -> None:
    """Compile a model in place, as ``model.compile(mode=...)`` does: the whole, or each of its decoder's layers.

    What a layer is the model itself says, where it tells FSDP and accelerate what not to split.
    """
    if how == "model":
        model.compile(mode=mode)
    elif how == "layers":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = set(base._no_split_modules or ())
        for module in base.modules():
            if type(module).__name__ in names:
                module.compile(mode=mode)
