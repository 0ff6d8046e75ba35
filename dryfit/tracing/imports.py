"""What a trace imports of PyTorch's neighbours, and what it leaves out because no trace runs it.

transformers, PEFT and bitsandbytes take some seconds to import. A good part of that is scipy, sympy, the compiler and
sharded tensors, which the trace of a step on one GPU does not run.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from dryfit.scenario.model import KERNEL_PACKAGES
from dryfit.scenario.scenario import Scenario

NEIGHBOURS = ("bitsandbytes", "peft")  # of transformers, which a trace needs
COMPILER, SHARDED_TENSORS = "torch._dynamo", "torch.distributed.tensor"
SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"  # which imports sympy
# Whether the process answers one question and ends: command lines say so before they ask. Then a step on one GPU that
# is not compiled goes without the compiler, sharded tensors and symbolic shapes: stand-ins answer for them until a step
# needs them.
ends_with_its_answer = False
_DISABLED = "__dynamo_disable"  # where torch/_compile.py keeps what the compiler made of a function


def import_libraries(scenario: Scenario) -> None:
    """Import what a trace needs without what no trace runs.

    Left out are decorations by the compiler, which bitsandbytes asks for; scipy, which transformers loads for a loss of
    object detection; and the second of two looks into each of transformers' files for the names in it. A package that
    is not installed is missed where it is needed.
    """
    if not _is_plain(scenario):
        for name in (COMPILER, SHARDED_TENSORS, SYMBOLIC_SHAPES):
            if isinstance(module := sys.modules.get(name), _StandIn):
                module.import_itself()
    with _names_found_fast():
        _import_transformers([])
    if scenario.parallel.zero_stage and not scenario.zero_by_rules:
        _import_whole_deepspeed()
    if scenario.parallel.pipeline > 1:  # patched where it is imported (dryfit.engine.fake_pipeline)
        import_module("torch.distributed.pipelining")


def import_quietly(scenario: Scenario) -> None:
    """The same, and keep the libraries' own warnings out of the terminal."""
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # DDP warns that it takes no times on `meta`
    gc.set_threshold(
        100_000, 50, 50
    )  # imports and models make few cycles and many objects: a seventh of the time
    if ends_with_its_answer and _is_plain(scenario) and "transformers" not in sys.modules:
        _import_with_stand_ins()
    import_libraries(scenario)
    import transformers

    transformers.logging.set_verbosity_error()
    # DTensor tells whoever trains on a mesh how to make its reductions one.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.tensor.experimental").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch.distributed")
    warnings.filterwarnings(
        "ignore", module="peft"
    )  # a pattern for experts, which PEFT itself has made


def import_for_answers() -> None:
    """Import transformers where a model of plain weights is asked on the CPU and nothing is compiled or divided."""
    if "transformers" not in sys.modules:
        gc.set_threshold(100_000, 50, 50)
        _import_with_stand_ins(neighbours=())


def _is_plain(scenario: Scenario) -> bool:
    """Whether a step needs neither the compiler, packages' kernels nor sharded tensors."""
    possible = KERNEL_PACKAGES if scenario.packages is None else scenario.packages
    packages = any(
        find_spec(KERNEL_PACKAGES[name]) for name in possible
    )  # whether the model asks for them shows later
    own_kernels = scenario.kernels == "transformers" and scenario.loss != "liger" and not packages
    return (
        scenario.compile == "none"
        and own_kernels
        and scenario.parallel.gpus == 1
        and not scenario.aim.trainer
    )


def _import_with_stand_ins(neighbours: Sequence[str] = NEIGHBOURS) -> None:
    for name, kind in (
        (COMPILER, _StandIn),
        (SHARDED_TENSORS, _StandIn),
        (SYMBOLIC_SHAPES, _NothingSymbolic),
    ):
        if name not in sys.modules:
            parent, _, last = name.rpartition(".")
            sys.modules[name] = kind(name, str(Path(import_module(parent).__path__[0], last)))
            setattr(sys.modules[parent], last, sys.modules[name])
    from dryfit.engine.importing import hidden

    _promote_types_without_sympy()
    with (
        hidden(["trio"]),
        _names_found_fast(),
    ):  # trio: the Hub's client imports it where it is, and does not need it
        import transformers.utils
        from transformers.utils import import_utils

        places = (transformers.utils, import_utils)
        nothing_divided = [
            (place, "is_torch_distributed_available", lambda: False) for place in places
        ]
        _import_transformers(nothing_divided, neighbours)


def _import_whole_deepspeed() -> None:
    """An engine that is made imports an optimizer which asks for the compiler; a trace is no place to import that."""
    from dryfit.engine.fake_deepspeed import quiet

    with suppress(ImportError), quiet():
        import_module("deepspeed.runtime.zero.muon.original_muon")


def _names_found_fast() -> AbstractContextManager[None]:
    """Let transformers, once it is imported, look for the names in its files once, and from their ends."""
    from dryfit.engine.importing import when_imported

    return when_imported({"transformers.utils.import_utils": _found_fast})


def _found_fast(import_utils: Any) -> list[tuple[Any, str, Any]]:
    names_in = (
        import_utils.create_import_structure_from_path
    )  # remembers by path: a folder, or a file for its folder
    exported = import_utils.fetch__all__  # takes the last line that begins so
    return [
        (
            import_utils,
            "create_import_structure_from_path",
            lambda path: names_in(Path(path).parent if Path(path).is_file() else path),
        ),
        (import_utils, "fetch__all__", lambda text: exported(text[text.rfind("\n__all__") + 1 :])),
    ]


def _import_transformers(
    more: list[tuple[Any, str, Any]], neighbours: Sequence[str] = NEIGHBOURS
) -> None:
    import torch
    import transformers  # by itself, so that an error names it
    import transformers.utils

    from dryfit.engine.patching import patched

    undecorated = lambda model=None, **_: model if model is not None else lambda function: function  # noqa: E731
    places = [
        (torch, "compile", undecorated),
        (transformers.utils, "is_scipy_available", lambda: False),
    ]
    with patched([*places, *more]):
        import transformers.modeling_utils

        for name in neighbours:
            with suppress(ImportError):
                import_module(name)


def _promote_types_without_sympy() -> None:
    """PyTorch asks each argument of an operator on ``meta`` whether it is one of sympy's, and imports it to ask."""
    from torch import _prims_common

    promote, nothing = _prims_common.elementwise_dtypes, ModuleType("sympy")
    nothing.Basic = type("Basic", (), {})

    def elementwise_dtypes(*arguments: Any, **named: Any) -> Any:
        if "sympy" in sys.modules:
            return promote(*arguments, **named)
        sys.modules["sympy"] = nothing
        try:
            return promote(*arguments, **named)
        finally:
            del sys.modules["sympy"]

    _prims_common.elementwise_dtypes = elementwise_dtypes


class _StandIn(ModuleType):
    """A package of PyTorch that is imported when more is asked of it than is known here.

    What is known: the compiler's decorators, which leave a function as it is, and its settings; and that no tensor is
    sharded yet. Once the package is imported, what was decorated meanwhile is decorated in earnest.
    """

    def __init__(self, name: str, folder: str) -> None:
        super().__init__(name)
        self.__path__ = [folder]  # its modules can be imported without it
        self._decorated: list[tuple[str, Any]] = []
        if name == COMPILER:
            for decorator in ("allow_in_graph", "assume_constant_result", "disable"):
                setattr(self, decorator, partial(self._decorate, decorator))
            self.graph_break = lambda *_, **__: None  # where nothing is compiled
        else:
            self.DTensor = type("DTensor", (), {})

    def _decorate(self, decorator: str, function: Any = None, *_: Any, **__: Any) -> Any:
        if function is None:
            return partial(self._decorate, decorator)
        self._decorated.append((decorator, function))
        return function

    def import_itself(self) -> ModuleType:
        """Import the package, and put it in this one's place."""
        name = self.__name__
        if sys.modules.get(name) is self:
            del sys.modules[name]
            package = import_module(name)
            for path, module in list(sys.modules.items()):
                if (
                    path.rpartition(".")[0] == name
                ):  # imported without the package, which so does not know it
                    setattr(package, path.rpartition(".")[2], module)
            parent, _, last = name.rpartition(".")
            setattr(sys.modules[parent], last, package)
            for decorator, function in self._decorated:
                if decorator != "disable":
                    getattr(package, decorator)(function)
                elif hasattr(function, _DISABLED):
                    delattr(function, _DISABLED)  # PyTorch asks again at the next call
        return sys.modules[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "config" and self.__name__ == COMPILER:
            return import_module(f"{COMPILER}.config")
        return getattr(self.import_itself(), name)


def _is_plain_number(value: Any) -> bool:
    """Whether a value is a plain number, a sequence of such, or a tensor whose sizes are."""
    parts = getattr(value, "shape", value)
    return type(value) in (bool, int) or (
        isinstance(parts, (list, tuple)) and all(map(_is_plain_number, parts))
    )


# What functions of symbolic shapes give that PyTorch's operators on `meta` call (`_meta_registrations.py`, `_refs`).
_OF_PLAIN_NUMBERS = {
    **dict.fromkeys(
        ("expect_true", "guard_int", "guard_or_false", "guard_or_true"), lambda value: value
    ),
    **dict.fromkeys(("guard_size_oblivious", "statically_known_true"), lambda value: value),
    "free_unbacked_symbols": lambda value: frozenset(),
    "is_nested_int": lambda value: False,
    "sym_and": lambda *values: all(values),
    "sym_eq": lambda one, other: one == other if isinstance(one, int) else [*one] == [*other],
    "sym_or": lambda *values: any(values),
}
_FOR_SYMBOLS = (
    "guarding_hint_or_throw",
    "has_guarding_hint",
)  # imported beside them, and never called then


class _NothingSymbolic(_StandIn):
    """The module of symbolic shapes, where sizes and conditions are plain numbers. With others it imports itself."""

    def _answer(self, name: str, *values: Any) -> Any:
        if name in _OF_PLAIN_NUMBERS and all(map(_is_plain_number, values)):
            return _OF_PLAIN_NUMBERS[name](*values)
        return getattr(self.import_itself(), name)(*values)

    def __getattr__(self, name: str) -> Any:
        if name not in _OF_PLAIN_NUMBERS and name not in _FOR_SYMBOLS:
            return super().__getattr__(name)
        answer = self.__dict__[name] = partial(
            self._answer, name
        )  # shape functions import it at each call
        return answer
