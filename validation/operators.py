"""Each operator of PyTorch's own tests: the traced CPU step against the real one, to the byte.

``python -m validation.operators [NAME ...]`` takes the operators of ``torch.testing``'s list (OpInfo), runs each one
forward and backward on real tensors of the CPU, and traces the same step on ``meta``. The real bytes come from the
events of PyTorch's profiler, which ATen's allocator itself reports, and not from this project's tracker. A trace is
equal where it has the peak at the ends of operators, or the peak with what kernels take and give back inside.

PyTorch's list needs the package ``expecttest``. ``validation/data/operators.yaml`` names those that are not equal.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils._pytree import tree_flatten, tree_map_only

from dryfit.engine.errors import TraceError
from dryfit.engine.trace import Options, trace_step

KNOWN = Path(__file__).parent / "data" / "operators.yaml"
SAMPLES = 1  # of an operator: those with the most elements


@dataclass(frozen=True)
class Compared:
    """An operator's step: peak bytes of the real one, and of the traced one or why there is none."""

    name: str
    real: Allocated
    traced_bytes: int | None
    refused: str = ""

    @property
    def outcome(self) -> str:
        """``equal``, ``unequal`` or ``refused``: with what kernels take inside, or without."""
        if self.refused:
            return "refused"
        return "equal" if self.traced_bytes in (self.real.held, self.real.peak) else "unequal"


@dataclass(frozen=True)
class Allocated:
    """Bytes that ATen's allocator for the CPU had given out at once, beyond those before.

    ``peak``: the most of them; ``held``: the most at the end of an operator, without what a kernel gives back.
    """

    peak: int
    held: int


def allocated_bytes(act: Callable[[], Any]) -> Allocated:
    """What ``act`` allocates, by the events of PyTorch's profiler."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        act()
    events = profile.profiler.kineto_results.events()
    moments = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    moments += [(end, None) for end in _ends_of_operators(events)]
    total = peak = held = 0
    for _, count in sorted(moments, key=lambda moment: moment[0]):
        total += count or 0
        peak = max(peak, total)
        held = max(held, total) if count is None else held
    return Allocated(peak, held)


def _ends_of_operators(events: Any) -> Iterator[int]:
    """When each operator ends that has kernels of its own, and was called by no such operator."""
    until = 0
    calls = [event for event in events if event.name().startswith("aten::")]
    for event in sorted(calls, key=lambda event: (event.start_ns(), -event.duration_ns())):
        if event.start_ns() >= until and not _composite(event.name()):
            until = event.start_ns() + event.duration_ns()
            yield until


@cache
def _composite(name: str) -> bool:
    """Whether an operator is made of others for every backend, so that autograd sees those."""
    names = [each for each in torch._C._dispatch_get_all_op_names() if each.split(".")[0] == name]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(names) and all(has(each, "CompositeImplicitAutograd") for each in names)


def compare(name: str, step: Callable[[Any], Any], batch: Any) -> Compared:
    """A step over a batch of real tensors, which both ways get copies of."""

    def real() -> None:
        step(tree_map_only(torch.Tensor, torch.clone, batch))

    real()  # what an operator makes once in a process
    allocated = allocated_bytes(real)
    try:
        report = trace_step(torch.nn.Module(), None, step, batch, Options(target="cpu", steps=1))
    except TraceError as error:
        return Compared(name, allocated, None, error.problem)
    return Compared(name, allocated, report.peak_allocated_bytes)


def step_of(function: Callable[..., Any], trained: Sequence[bool]) -> Callable[[Any], None]:
    """One forward and, where something is trained, backward pass; ``trained``: by the batch's tensors in order."""

    def step(batch: Any) -> None:
        tensors = [item for item in tree_flatten(batch)[0] if isinstance(item, torch.Tensor)]
        for tensor, trains in zip(tensors, trained, strict=True):
            tensor.requires_grad_(trains)
        args, kwargs = batch
        place = sys.modules.get(
            getattr(function, "__module__", "")
        )  # by its name, as a program calls it
        outputs = tree_flatten(
            getattr(place, getattr(function, "__name__", ""), function)(*args, **kwargs)
        )[0]
        sums = [
            item.sum() for item in outputs if isinstance(item, torch.Tensor) and item.requires_grad
        ]
        sums = [item.real if item.is_complex() else item for item in sums]
        if sums:
            sum(sums).backward()

    return step


def operators(names: Sequence[str] = ()) -> Iterator[tuple[str, Callable[[Any], None], Any]]:
    """Name, step and batch of each operator that takes fp32."""
    from torch.testing._internal import common_methods_invocations as listed

    listed.wrapper_set_seed = lambda function, *args, **kwargs: function(
        *args, **kwargs
    )  # its copy of a seed's state
    for operator in listed.op_db:
        name = ".".join(part for part in (operator.name, operator.variant_test_name) if part)
        if (names and name not in names) or torch.float32 not in operator.dtypes:
            continue
        torch.manual_seed(0)
        trains = operator.supports_autograd
        for sample in largest(operator.sample_inputs("cpu", torch.float32, requires_grad=trains)):
            batch = ([sample.input, *sample.args], dict(sample.kwargs))
            tensors = [item for item in tree_flatten(batch)[0] if isinstance(item, torch.Tensor)]
            if any(
                type(item) is not torch.Tensor or item.layout is not torch.strided
                for item in tensors
            ):
                continue
            trained = [item.requires_grad for item in tensors]
            yield (
                name,
                step_of(operator.op, trained),
                tree_map_only(torch.Tensor, torch.detach, batch),
            )


def largest(samples: Any) -> list[Any]:
    """Those with the most elements."""

    def elements(sample: Any) -> int:
        given = tree_flatten([sample.input, sample.args, sample.kwargs])[0]
        return sum(item.numel() for item in given if isinstance(item, torch.Tensor))

    return sorted(samples, key=elements)[-SAMPLES:]


def run(names: Sequence[str] = ()) -> list[Compared]:
    """Each operator compared, or those of some names; prints what is not equal as it comes."""
    torch.set_num_threads(1)
    compared = []
    for name, step, batch in operators(names):
        try:
            each = compare(name, step, batch)
        except Exception as error:  # the real step itself fails here
            print(
                f"{name}: not run: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True
            )
            continue
        compared.append(each)
        if each.outcome == "unequal":
            real = f"{each.real.held:,} (inside {each.real.peak:,})"
            print(f"{name}: real {real}, traced {each.traced_bytes:,}", flush=True)
        elif each.outcome == "refused":
            print(f"{name}: refused: {each.refused}", flush=True)
    return compared


def known() -> dict[str, dict[str, str]]:
    """Operators that are not equal, ``unequal`` or ``refused``, and why."""
    return yaml.safe_load(KNOWN.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="operators; all of them by default"
    )
    counts = Counter(each.outcome for each in run(parser.parse_args(arguments).names))
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
