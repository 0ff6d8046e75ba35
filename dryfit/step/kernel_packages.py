"""Functions that transformers takes from a package where it can, and otherwise runs in a loop of its own.

Linear attention, state spaces and short convolutions have such functions. The decorator
``use_kernel_func_from_hub_with_fallback`` (transformers from 5.16, ``integrations/hub_kernels.py``) looks for the
package while a model's file is imported. It swallows every error, so a machine without the package runs the loop, with
a line in a log. The loop may keep several times the memory. So what a model's functions run is asked of the functions
themselves, and exchanged here: for the package's, for the loop, or for the least that any kernel allocates.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from dryfit.engine.card import active_simulation
from dryfit.engine.importing import hidden
from dryfit.engine.patching import patched
from dryfit.scenario.model import KERNEL_PACKAGES, LEAST, LOOP, PACKAGE
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import architecture

_PIP_NAMES = {module: name for name, module in KERNEL_PACKAGES.items()}
_DECORATED = {
    "func_name",
    "is_new_implementation",
    "package",
    "torch_function",
}  # variables of the decorator


@dataclass(frozen=True)
class Function:
    """A function of a model's file that a package may have too."""

    # Where the model's file has it.
    place: Any
    name: str
    # What the package calls it; the package as pip names it.
    kernel: str
    package: str
    loop: Callable[..., Any]  # transformers' own

    @property
    def trains(self) -> bool:
        """Whether a step of training calls it, and not generation alone, which goes token by token."""
        return not re.search("update|recurrent", self.kernel)


@dataclass
class KernelPackages:
    """What a step's functions run."""

    ways: Mapping[str, str]  # by package, as pip names it: `package`, `loop` or `least`
    functions: Sequence[Function] = ()  # the functions of the model's file that were exchanged
    # By package that is installed and lacks a function, or can't be imported: what is wrong with it.
    differing: dict[str, str] = field(default_factory=dict)
    # Whether the model's file fetches a kernel from the Hub where there is a GPU, as RWKV's does.
    from_hub: bool = False

    def of(self, way: str) -> list[str]:
        """The packages whose functions run so."""
        return [name for name, own in self.ways.items() if own == way]


def functions_of(scenario: Scenario) -> list[Function]:
    """The functions of a scenario's model that transformers takes from a package where it can."""
    place = _file_of(scenario)
    return [
        function
        for name, value in vars(place).items()
        if (function := _function(place, name, value))
    ]


def _file_of(scenario: Scenario) -> ModuleType:
    """The module of a scenario's model.

    A package that is imported where no card is simulated would believe that there is none, and keep that.
    """
    with hidden(() if active_simulation() else KERNEL_PACKAGES.values()):
        kind = architecture(scenario)
    return sys.modules[kind.__module__] if kind else ModuleType("none")


def _function(place: Any, name: str, value: Any) -> Function | None:
    code = getattr(value, "__code__", None)
    if code is None or not _DECORATED.issubset(code.co_freevars):
        return None
    known = _closure(value)
    package = _PIP_NAMES.get(known["package"], known["package"])
    return Function(place, name, known["func_name"], package, known["torch_function"])


def _closure(function: Any) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def packages_of(scenario: Scenario) -> list[str]:
    """The packages whose functions transformers takes for a scenario's model, as pip names them."""
    return sorted({function.package for function in functions_of(scenario)})


def ways_of(scenario: Scenario, target: str = "cuda") -> dict[str, str]:
    """By package that the model's code asks for: what its functions run on the machine that a scenario is for.

    Without ``packages`` the machine is thought to have what is installed here, as the environment of a training has it;
    with ``kernels: packages`` all that the model's code asks for. A CPU runs none of them. In a step that is divided,
    of a whole model with images or of TRL's trainers they are not followed, and the loop is.
    """
    ways, parallel = {}, scenario.parallel
    unfollowed = (
        target == "cpu"
        or scenario.images
        or scenario.aim.trainer
        or parallel.sharded
        or parallel.zero_stage
    )
    for name in packages_of(scenario):
        here = find_spec(_module(name)) is not None
        has = (
            here or scenario.kernels == "packages"
            if scenario.packages is None
            else name in scenario.packages
        )
        ways[name] = LOOP if unfollowed or not has else PACKAGE if here else LEAST
    return ways


@contextmanager
def kernels_in_place(scenario: Scenario, ways: Mapping[str, str]) -> Iterator[KernelPackages]:
    """Let a model's functions run what :func:`ways_of` says. Packages are imported inside, on a simulated card."""
    kernels, places = KernelPackages(dict(ways), functions_of(scenario) if ways else ()), []
    code = [
        value.__code__
        for value in vars(_file_of(scenario)).values()
        if isinstance(value, FunctionType)
    ]
    kernels.from_hub = any("get_kernel" in each.co_names for each in code)
    for function in kernels.functions:
        way = ways[function.package]
        taken = _least(function) if way == LEAST else _decorated(function, seen=way == PACKAGE)
        if way == PACKAGE and function.trains and not _closure(taken)["is_new_implementation"]:
            kernels.differing.setdefault(function.package, _problem(function))
        places.append((function.place, function.name, taken))
    with patched(places):
        yield kernels


def _decorated(function: Function, *, seen: bool) -> Callable[..., Any]:
    """What transformers makes of a function, where the package is ``seen`` and where it is not."""
    from transformers.integrations.hub_kernels import (
        use_kernel_func_from_hub_with_fallback as decorate,
    )

    module = _module(function.package)
    before = sys.modules.get(module)
    if not seen:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        return decorate(function.kernel, module)(function.loop)
    finally:
        if not seen:
            sys.modules.pop(module)
            if before is not None:
                sys.modules[module] = before


def _module(package: str) -> str:
    return KERNEL_PACKAGES.get(package, package)


def _problem(function: Function) -> str:
    """Why transformers takes nothing of a package that is installed."""
    try:
        import_module(_module(function.package))
    except (
        Exception
    ) as error:  # whatever a package does while it is imported: transformers swallows it
        return (
            f"its import fails ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
        )
    return f"it has no {function.kernel}"


def installed_version(package: str) -> str:
    """Of a package as pip names it; "" where nobody says it. fla's kernels come in a distribution of their own."""
    for name in (package, f"{package}-core"):
        with suppress(PackageNotFoundError):
            return version(name)
    return ""


# --- the least that a kernel allocates ----------------------------------------------------------------------------


def _least(function: Function) -> Callable[..., Any]:
    """A function that makes the loop's outputs, keeps its inputs and makes their gradients, and nothing else."""
    loop, known = function.loop, inspect.signature(function.loop)
    outputs_of: dict[
        Any, tuple[list[Any], Any]
    ] = {}  # by the sizes of the inputs: the loop may take seconds

    def outputs(given: list[Any], spec: Any) -> tuple[list[Any], Any]:
        """What comes out, on ``meta`` and unseen by whoever records the step."""
        with _disable_current_modes(), torch.no_grad():
            alone = [
                torch.empty_like(each, device="meta") if _is_tensor(each) else each
                for each in given
            ]
            args, named = tree_unflatten(alone, spec)
            if function.kernel in _FUSED:
                return tree_flatten(_FUSED[function.kernel](**known.bind(*args, **named).arguments))
            return tree_flatten(loop(*args, **named))

    @wraps(loop)
    def run(*args: Any, **kwargs: Any) -> Any:
        named = {name: value for name, value in kwargs.items() if name in known.parameters}
        given, spec = tree_flatten((args, named))
        key = (
            str(spec),
            *((each.shape, each.dtype) if _is_tensor(each) else str(each) for each in given),
        )
        if key not in outputs_of:
            outputs_of[key] = outputs(given, spec)
        found, shape = outputs_of[key]
        sizes = [(each.shape, each.dtype) for each in found if _is_tensor(each)]
        made = iter(_MinimalKernel.apply(sizes, *filter(_is_tensor, given)))
        return tree_unflatten([next(made) if _is_tensor(each) else each for each in found], shape)

    return run


def _is_tensor(item: Any) -> bool:
    return isinstance(item, torch.Tensor)


# Functions whose loop gives nothing, which has transformers go on with smaller ones: the outputs of the package's,
# mamba-ssm 2.3 `ops/triton/ssd_combined.py` and `ops/selective_scan_interface.py`.
_FUSED: dict[str, Callable[..., torch.Tensor]] = {
    "mamba_split_conv1d_scan_combined": lambda zxbcdt, outproj_weight, **_: zxbcdt.new_empty(
        (*zxbcdt.shape[:2], outproj_weight.shape[0])
    ),
    "mamba_inner_fn": lambda xz, out_proj_weight, **_: xz.new_empty(
        (xz.shape[0], xz.shape[2], out_proj_weight.shape[0])
    ),
}


class _MinimalKernel(torch.autograd.Function):
    """In the place of a kernel that is not here."""

    @staticmethod
    def forward(
        ctx: Any, sizes: Sequence[tuple[torch.Size, torch.dtype]], *tensors: torch.Tensor
    ) -> tuple:
        ctx.save_for_backward(*tensors)
        return tuple(tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in sizes)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty_like(each) if need else None for each, need in needed)
