"""Tensors that are divided on a mesh (``DTensor``), inside what ``torch.compile`` compiles.

While the compiler sees the program's tensors on the target, a mesh of the simulated group has to be one of such
devices too: DTensor brings whatever lies elsewhere to its mesh.

And a mesh is an input of what is compiled. Where random numbers are drawn again in the backward pass, PyTorch 2.13
hands the generator's state over behind the mesh, and then takes the one for the other. Its own CUDA generators go
another way, and don't meet this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .patching import patched


def meshes_of(target: str) -> AbstractContextManager:
    """Meshes on ``meta`` call themselves ones of the target inside, ``cuda`` or ``cpu``."""
    meshes = sys.modules.get("torch.distributed.device_mesh")
    if meshes is None or "torch.distributed.tensor" not in sys.modules:
        return nullcontext()

    def device_type(mesh: Any) -> str:
        return target if mesh._device_type == "meta" else mesh._device_type

    return patched([(meshes.DeviceMesh, "device_type", property(device_type))])


def states_before_meshes(functionalize: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of the partitioner's ``functionalize_rng_ops``: what it adds stands where tensors are looked for."""
    from torch._functorch._aot_autograd.graph_compile import is_opaque_node, is_sym_node

    def order(node: Any) -> int:
        return 2 if is_sym_node(node) else int(is_opaque_node(node))

    def functionalized(*args: Any, **kwargs: Any) -> Any:
        forward, backward = functionalize(*args, **kwargs)
        output = next(iter(forward.graph.find_nodes(op="output")))
        kept = list(output.args[0])
        first = next((at for at, node in enumerate(kept) if order(node) == 1), len(kept))
        output.args = ([*kept[:first], *sorted(kept[first:], key=order)],)
        inputs = list(backward.graph.find_nodes(op="placeholder"))
        tangent = next(node for node in inputs if "tangent" in node.name)
        for node in inputs[: inputs.index(tangent)]:
            if order(node) == 1:
                tangent.prepend(node)
        for module in (forward, backward):
            module.recompile()
        return forward, backward

    return functionalized
