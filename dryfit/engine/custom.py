"""Custom operators: their own code runs on ``meta``, and what can't be followed is told.

A shape function of ``torch.library.custom_op`` says what comes out, and nothing of what is made and dropped inside. In
one program that was 4.6 GiB. Where a card is simulated, the operator's Python code for CUDA runs in its place; an
operator without such code is opaque, and an answer names it. Whoever defines an operator that allocates nothing beside
its outputs says so by an attribute of the definition, ``one_kernel = True``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Body = Callable[..., Any]
# Operators that the engine knows, or that allocate nothing beside their outputs.
FOLLOWED = frozenset(
    "_c10d_functional _c10d_functional_autograd _dtensor _quantized aten bitsandbytes c10d fsdp higher_order inductor"
    " prim prims profiler quantized rngprims streams sym_numel torchvision".split()
)


def body_of(func: Any) -> Body | None:
    """The Python code of a custom operator for CUDA; None without any, and where it stands for a kernel."""
    definition = _definition(func)
    if definition is None or getattr(definition, "one_kernel", False):
        return None
    functions = definition._backend_fns
    return functions.get("cuda") or functions.get(None)


def opaque(func: Any) -> str | None:
    """What to say of an operator of which only the shape function is known; None: nothing."""
    if func.namespace in FOLLOWED or not hasattr(func, "_schema"):
        return None
    if getattr(_definition(func), "one_kernel", False):
        return None
    name = func._schema.name
    return f"the operator {name} is opaque: its outputs are counted, and what it makes and drops inside is not"


def _definition(func: Any) -> Any:
    return (
        torch._library.custom_ops.OPDEFS.get(func._schema.name)
        if hasattr(func, "_schema")
        else None
    )


def on_card(
    func: Any, args: tuple, kwargs: dict, host: Callable[[torch.Tensor], bool] | None = None
) -> Body | None:
    """What an operator is, where a card is simulated; None: what it says.

    What is asked of ``cuda`` is done on ``meta``. A custom operator's code for CUDA runs in the place of its shape
    function, which knows nothing of what the code makes and drops.
    """
    asked = kwargs.get("device")
    if kwargs.get("pin_memory"):  # the host's memory, which a build without CUDA can't pin
        given = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        own = on_card(func, args, given, host) or func
        return lambda *args, pin_memory, **kwargs: own(*args, **kwargs)
    if asked is not None and torch.device(asked).type == "cuda":
        here = (
            func is torch.ops.aten._to_copy.default
            and args[0].is_meta
            and not (host and host(args[0]))
        )
        if (
            here
            and kwargs.get("dtype") in (None, args[0].dtype)
            and kwargs.get("memory_format") is None
        ):
            return lambda *args, **kwargs: torch.ops.aten.alias.default(args[0])
        return lambda *args, **kwargs: func(*args, **{**kwargs, "device": torch.device("meta")})
    if func in (torch.ops.aten.is_pinned.default, torch.ops.aten._pin_memory.default):
        return lambda *args, **kwargs: (
            False if func is torch.ops.aten.is_pinned.default else args[0]
        )
    return None if func.namespace in FOLLOWED else body_of(func)
