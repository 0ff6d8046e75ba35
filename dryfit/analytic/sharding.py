"""FSDP2 on sizes: units whose weights are gathered before they run and given back after, gradients that are reduced.

A unit is what accelerate makes one: each decoder layer; the embedding; the final norm with the output head (and with
the embedding, where it is tied), which stay gathered from the forward pass to the end of the backward pass. Around each
unit PyTorch allocates, in this order:

- forward: a flat buffer that all GPUs' shards arrive in, then the weights, copied out of it. The buffer goes when the
  next unit's weights are there, the weights when the unit has run.
- backward: the same, but the buffer goes at once; and the buffer of the unit that comes next is already on its way.
- after a unit's backward pass: its weights go; its gradients are copied into a flat buffer, which goes when the next
  unit's has been filled; what comes back is this GPU's share.

Sources: accelerate 1.15 (utils/fsdp_utils.py, fsdp2_prepare_model), PyTorch 2.13
(torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, _fsdp_collectives.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dryfit.analytic.graph import Node, Parameter, Storage, Tensor
from dryfit.analytic.setting import Setting
from dryfit.engine.components import COLLECTIVES, GRADIENTS, UNSHARDED

Shapes = list[tuple[int, int]]  # (bytes of an element, elements)


def units_of(setting: Setting) -> tuple[Shapes, Shapes, Shapes]:
    """Weights of the embedding's unit (none if tied), of a layer's, and of the last one's."""
    decoder, layers = setting.decoder, setting.decoder.sizes["L"]
    parts: dict[str, Shapes] = {"embedding": [], "layer": [], "last": []}
    for group, elements, name, times in decoder.weight_shapes():
        once = group in ("embeddings", "output_head") or name in ("final norm", "output head bias")
        unit = (
            "layer"
            if not once
            else "embedding"
            if group == "embeddings" and not decoder.tied
            else "last"
        )
        if group == "linear" and setting.quantized:
            shape = (1, -(-elements // 2)) if setting.packed_sharded else None
        else:
            shape = (setting.weight_width(group), elements)
        if shape:
            parts[unit] += [shape] * (times if once else times // layers)
    if setting.scenario.lora:
        adapters = decoder.adapter_shapes(setting.scenario.lora)
        parts["layer"] += [(setting.adapter_width, elements) for _, elements, times in adapters]
    return parts["embedding"], parts["layer"], parts["last"]


class Sharding:
    """The buffers of a step under FSDP2, and what each unit holds at the moment.

    ``net``: the step, whose ledger is told. ``setting``: what it is made for.
    """

    def __init__(self, net: object, setting: Setting) -> None:
        self.net, self.setting = net, setting
        self._arrived: Storage | None = (
            None  # the flat buffer that is kept until the next unit's is there
        )
        self._reduced: Storage | None = None  # the same of gradients

    def storage(self, component: str, what: str, width: int, elements: int) -> Storage:
        return Storage(self.net, self.net.term(component, what, (str(elements),), width))

    # --- forward ---

    def before_forward(self, unit: Unit) -> None:
        if unit.gathered:
            return
        arriving = unit.buffer()
        unit.gather()
        self._arrived = arriving  # and only now the one before goes

    def after_forward(self, unit: Unit) -> None:
        if unit.resharded:
            unit.gathered.clear()

    def forward_ended(self) -> None:
        self._arrived = None

    # --- backward ---

    def before_backward(self, unit: Unit) -> None:
        if not unit.gathered:
            arrived = unit.arriving or unit.buffer()
            unit.arriving = None
            unit.gather()
            del arrived
        before = unit.before
        if before is not None and not before.gathered and before.arriving is None:
            before.arriving = before.buffer()

    def after_backward(self, unit: Unit) -> None:
        unit.gathered.clear()
        self._reduced = None
        trained = [p for p in unit.parameters if p.grad is not None]
        if not trained:
            return
        size = sum(p.grad.storage.term.size for p in trained)
        self._reduced = self.storage(COLLECTIVES, "gradients on their way", 1, size)
        for p in trained:
            p.grad = None
        share = self.storage(
            GRADIENTS, "this GPU's share of gradients", 1, self.setting.share(size)
        )
        if self.setting.scenario.gradient_accumulation == 1:  # else it is added to what is there
            unit.share = share

    def backward_ended(self, units: Sequence[Unit]) -> None:
        self._reduced = None
        for unit in units:
            unit.arriving = None


class Unit:
    """Weights that are gathered together.

    Attributes
    ----------
    before
        The unit that runs before it in the forward pass, and so next in the backward pass.
    resharded
        Whether its weights are given back after the forward pass.
    gathered, arriving, share
        What it holds: weights, the buffer that they come in, this GPU's share of the gradients.
    """

    def __init__(
        self,
        sharding: Sharding,
        shapes: Shapes,
        parameters: Sequence[Parameter],
        *,
        resharded: bool,
        what: str,
    ) -> None:
        self.shapes, self.parameters, self.resharded, self.what = (
            shapes,
            parameters,
            resharded,
            what,
        )
        self.before: Unit | None = None
        self.gathered: list[Storage] = []
        self.arriving: Storage | None = None
        self.share: Storage | None = None
        self._sharding = sharding
        self._bytes = sum(width * elements for width, elements in shapes)

    def buffer(self) -> Storage | None:
        """The flat buffer that the shards of all GPUs arrive in."""
        return (
            self._sharding.storage(COLLECTIVES, f"{self.what}, arriving", 1, self._bytes)
            if self._bytes
            else None
        )

    def gather(self) -> None:
        """Allocate the weights."""
        self.gathered = [
            self._sharding.storage(UNSHARDED, self.what, *shape) for shape in self.shapes
        ]


def marked(nodes: list[Node], x: Tensor, event: Callable[[], None]) -> Tensor:
    """The same tensor; when its gradient passes in the backward pass, ``event`` happens first."""
    if x.edge is None:
        return x

    def backward(grad: Tensor) -> list:
        event()
        return [grad]

    node = Node([x.edge], [], backward)
    nodes.append(node)
    return Tensor(x.storage, x.dims, x.width, node)
