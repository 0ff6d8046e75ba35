"""The analytic estimate: one training step from the configuration alone, every term by name, without torch.

Weights, gradients and optimizer states are sums over the decoder's matrices. Activations follow from the rules of
automatic differentiation: an operation keeps for its backward what its derivative needs. So one decoder layer is
written down once, as transformers computes it, in operations on *sizes* (:class:`Step`); its terms come out as
formulas such as ``2·t·h``, and the phases' peaks as sums of terms. Layers are alike, so at most three are run and the
rest is multiplication.

Symbols in formulas: t tokens in the micro-batch, s sequence length, h hidden, i intermediate, a heads x head size,
k key-value heads x head size, H heads, V vocabulary, r rank; the leading factor is bytes.

Sources: transformers 5.24 (models/*/modeling_*.py, loss/loss_utils.py), peft 0.21 (tuners/lora), bitsandbytes 0.50
(autograd/_functions.py), PyTorch 2.13 (tools/autograd/derivatives.yaml, torch/optim/adamw.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from scripts.memory.analytic.decoder import Decoder, Matrix, described
from scripts.memory.core import components as names
from scripts.memory.core import cuda_rules
from scripts.memory.core.allocator import Event, replay, round_size, typical_block
from scripts.memory.core.cuda_rules import DEFAULT_CAPABILITY, WIDTH
from scripts.scenario.scenario import Scenario

CHUNK_TOKENS = 256  # scripts/training/step.py: tokens whose logits exist at once with `loss: chunked`
LAYERS_RUN = 3
COPIES = "autocast copies of weights"
ROUNDING = "allocator rounding"

COMPONENT_OF = {
    "quantization state": names.QUANTIZATION_STATE,
    "adapters": names.ADAPTERS,
    "batch": names.INPUTS,
    "workspaces": names.WORKSPACES,
    "gradients": names.GRADIENTS,
    "gradients of activations": names.TEMPORARIES,
    "optimizer states": names.OPTIMIZER_STATES,
    "optimizer temporaries": names.TEMPORARIES,
    "unpacked 4-bit weight": names.TEMPORARIES,
    "logits and loss": names.LOGITS_AND_LOSS,
    COPIES: names.WEIGHT_CASTS,
    ROUNDING: names.ROUNDING,
}

Key = tuple[str, str, int]  # component, formula, bytes of one


class Node:
    """An operation of the forward pass, waiting for its backward; ``part`` is the checkpointed part it lies in."""

    __slots__ = ("backward", "edges", "grad", "part", "saved")

    def __init__(self, edges: list, saved: list | None, backward: Callable, part: Part | None = None) -> None:
        self.edges, self.saved, self.backward, self.part = edges, saved, backward, part
        self.grad: Tensor | None = None


class Part:
    """A checkpointed part of the forward pass: it keeps its input alone, and runs again when something it did not
    keep is asked for."""

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.run, self.storage, self.shape, self.needs = run, x.storage, (x.dims, x.width), edge_of(x) is not None
        self.nodes: list[Node] = []


class _Rerun(Exception):
    """All that a part did not keep is there again; what is left of it need not run."""


class Storage:
    """Bytes that are alive as long as this object is."""

    __slots__ = ("identity", "key", "step")

    def __init__(self, step: Step, key: Key) -> None:
        self.step, self.key, self.identity = step, key, step.emit(key[2])

    def __del__(self) -> None:
        self.step.retire(self.identity)
        self.step.free(self.key)


class Tensor:
    """A shape on a storage, which views share; ``edge`` is where its gradient goes."""

    __slots__ = ("dims", "edge", "storage", "width")

    def __init__(self, storage: Storage, dims: tuple[str, ...], width: int, edge: Any = None) -> None:
        self.storage, self.dims, self.width, self.edge = storage, dims, width, edge


class Parameter:
    """A weight: accounted for from the start, with a gradient if it is trained."""

    __slots__ = ("dims", "grad", "tied", "trained", "width")

    def __init__(self, dims: tuple[str, ...], width: int, trained: bool, tied: bool = False) -> None:
        self.dims, self.width, self.trained, self.tied, self.grad = dims, width, trained, tied, None


class Step:
    """One training step on sizes: what is alive, what was alive at each phase's peak."""

    def __init__(self, decoder: Decoder, scenario: Scenario, *, blocks: bool) -> None:
        self.decoder, self.scenario = decoder, scenario
        # What the allocator sees, for its blocks. Every layer must run then; else three stand for all.
        self.events: list[Event] | None = [] if blocks else None
        self.starts: list[tuple[str, int]] = [("load", 0)]
        self.last_identity = 0
        self.layers_run = decoder.sizes["L"] if blocks else LAYERS_RUN
        self.values = {**decoder.sizes, "t": scenario.tokens, "s": scenario.sequence_length}
        self.values |= {"p": decoder.positions, "E": decoder.experts, "e": decoder.experts_per_token}
        self.values["r"] = scenario.lora.rank if scenario.lora else 0
        self.values["b"] = scenario.micro_batch
        self.sizes: dict[tuple, Key] = {}
        self.live: Counter[Key] = Counter()
        self.now = 0
        self.phase, self.component = "load", "weights"
        self.peaks: dict[str, int] = {}
        self.at_peak: dict[str, Counter[Key]] = {}
        self.rising = False
        self.part: Part | None = None  # the checkpointed part that runs
        self.rerun: Part | None = None  # the one that runs again, in the backward pass
        self.copies: list[Tensor] = []  # autocast's cache of 16-bit weights, kept until its context ends
        self.accumulating = scenario.gradient_accumulation > 1
        self.nodes: list[Node] = []

    # --- accounts ---

    def allocate(self, component: str, dims: tuple[str, ...], width: int) -> Key:
        key = self.sizes.get((component, dims, width))
        if key is None:
            elements, divisor = 1, 1
            for symbol in dims:
                if symbol.startswith("1/"):
                    divisor *= int(symbol[2:])
                else:
                    elements *= self.value(symbol)
            elements = -(-elements // divisor)
            key = (component, "·".join((str(width), *dims)), self.rounded(elements * width))
            self.sizes[component, dims, width] = key
        self.add(key)
        return key

    def value(self, symbol: str) -> int:
        """A symbol's number: ``i+i`` is a sum."""
        if symbol not in self.values:
            self.values[symbol] = sum(
                self.values[part] if part in self.values else int(part) for part in symbol.split("+")
            )
        return self.values[symbol]

    def rounded(self, size: int) -> int:
        """Bytes to account for: blocks as they are on average, or requests where the allocator makes the blocks."""
        return typical_block(size) if self.events is None else round_size(size)

    def emit(self, size: int) -> int:
        """Tell the allocator of a tensor; returns what to retire it by."""
        if self.events is not None:
            self.last_identity += 1
            self.events.append((self.last_identity, size))
        return self.last_identity

    def retire(self, identity: int) -> None:
        if self.events is not None:
            self.events.append((-identity, 0))

    def add(self, key: Key, times: int = 1) -> None:
        self.live[key] += times
        self.now += key[2] * times
        self.rising = True

    def free(self, key: Key, times: int = 1) -> None:
        if self.rising:
            self.look()
        self.live[key] -= times
        self.now -= key[2] * times

    def look(self) -> None:
        """Note the peak of the phase if this is one."""
        self.rising = False
        if self.now > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = self.now
            self.at_peak[self.phase] = self.live.copy()

    def begin(self, phase: str) -> None:
        self.look()
        self.phase = phase
        self.look()
        if self.events is not None:
            self.starts.append((phase, len(self.events)))

    # --- operations ---

    def tensor(self, dims: tuple[str, ...], width: int, component: str | None = None) -> Tensor:
        return Tensor(Storage(self, self.allocate(component or self.component, dims, width)), dims, width)

    def operation(
        self,
        dims: tuple[str, ...],
        width: int,
        inputs: Sequence[Tensor | Parameter],
        backward: Callable,
        saved: Sequence = (),
        saves_output: bool = False,
    ) -> Tensor:
        """A new tensor; its node keeps ``saved`` and turns its gradient into one for each input."""
        edges = [edge_of(x) for x in inputs]
        node = None
        if any(edge is not None for edge in edges):
            kept = [x.storage for x in saved if isinstance(x, Tensor)]
            if self.part is not None:  # None: to be found out when the part runs again
                kept = None if kept or saves_output else []
            node = Node(edges, kept, backward, self.part)
            self.record(node)
        out = self.tensor(dims, width)
        if node is not None:
            out.edge = node
            if saves_output and self.part is None:
                node.saved.append(out.storage)
        return out

    def record(self, node: Node) -> None:
        """Put a node on the tape; while a part runs again, only what it keeps is of interest."""
        if self.rerun is None:
            self.nodes.append(node)
            if self.part is not None:
                self.part.nodes.append(node)
            return
        waiting = self.rerun.nodes
        original = waiting[len(waiting) - self.left]
        self.left -= 1
        if original.saved is None:
            original.saved = node.saved
            self.missing -= 1
            if not self.missing:
                raise _Rerun

    def run_again(self, part: Part) -> None:
        """Recompute a part until everything that its nodes keep is there (torch.utils.checkpoint stops there too)."""
        component = self.component
        self.rerun, self.left = part, len(part.nodes)
        self.missing = sum(node.saved is None for node in part.nodes)
        x = Tensor(part.storage, *part.shape, Node([], [], None) if part.needs else None)
        with suppress(_Rerun):
            part.run(x)
        self.rerun = None
        self.copies.clear()
        part.nodes.clear()
        self.component = component

    def elementwise(self, x: Tensor, width: int | None = None, saved: Sequence = (), dims: Any = None) -> Tensor:
        """One tensor to one of its shape (an activation, a scaling, a dtype change)."""
        source, target = (x.dims, x.width), (dims or x.dims, width or x.width)

        def backward(node: Node, grad: Tensor) -> list:
            return [self.tensor(*source)]

        return self.operation(*target, [x], backward, saved)

    def cast(self, x: Tensor, width: int) -> Tensor:
        return x if x.width == width else self.elementwise(x, width)

    def add_tensors(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y: keeps nothing, and hands its gradient on to both."""
        widths = (x.width, y.width)

        def backward(node: Node, grad: Tensor) -> list:
            return [grad if grad.width == w else self.tensor(grad.dims, w) for w in widths]

        return self.operation(x.dims, max(widths), [x, y], backward)

    def multiply(self, x: Tensor, y: Tensor | Parameter) -> Tensor:
        """x * y, y perhaps smaller and spread over x; each is kept for the gradient of the other."""
        saved = [y if edge_of(x) is not None else None, x if edge_of(y) is not None else None]
        shapes = [(x.dims, x.width), (y.dims, y.width)]
        needs = [edge_of(x) is not None, edge_of(y) is not None]

        def backward(node: Node, grad: Tensor) -> list:
            full = [
                self.tensor(grad.dims, max(grad.width, width)) if need else None
                for need, (_, width) in zip(needs, shapes, strict=True)
            ]
            return [
                wide if wide is None or (wide.dims, wide.width) == shape else self.tensor(*shape)
                for wide, shape in zip(full, shapes, strict=True)
            ]

        return self.operation(x.dims, max(x.width, y.width), [x, y], backward, saved)

    def matmul(
        self, x: Tensor, weight: Parameter, outputs: str, bias: Parameter | None = None, copy: Any = None
    ) -> Tensor:
        """x times a weight (``copy``: the weight's 16-bit copy under autocast)."""
        dims = (*x.dims[:-1], outputs)
        shape = (x.dims, x.width)
        trained, needs = weight.trained, edge_of(x) is not None
        inputs = [x, weight] + ([bias] if bias else [])

        def backward(node: Node, grad: Tensor) -> list:
            grads = [self.tensor(*shape) if needs else None]
            grads.append(self.gradient(weight, x_width) if trained else None)
            if bias:
                grads.append(self.gradient(bias, x_width) if bias.trained else None)
            return grads

        x_width = x.width
        return self.operation(dims, x.width, inputs, backward, [x if trained else None, copy if needs else None])

    def gradient(self, parameter: Parameter, width: int) -> Tensor:
        return self.tensor(parameter.dims, width, "gradients")

    # --- backward ---

    def backward(self, nodes: list[Node]) -> None:
        """Run nodes in reverse order, as the autograd engine does."""
        while nodes:
            node = nodes.pop()
            grad, node.grad = node.grad, None
            if grad is None:
                node.part = node.saved = None
                continue
            if node.saved is None:
                self.run_again(node.part)
            grads = node.backward(node, grad)
            node.part = node.saved = node.backward = None
            del grad
            for edge, new in zip(node.edges, grads, strict=True):
                self.accumulate(edge, new)
            del grads, new

    def accumulate(self, edge: Node | Parameter | None, grad: Tensor | None) -> None:
        """Hand a gradient to the node or parameter it belongs to; a second one is added in place."""
        if edge is None or grad is None:
            return
        if isinstance(edge, Parameter) and (grad.width != edge.width or grad.storage.key[0] != "gradients"):
            grad = self.gradient(edge, edge.width)
        if edge.grad is not None:
            if isinstance(edge, Parameter):  # a tied weight's gradients wait for each other, and make a new one
                edge.grad = self.gradient(edge, edge.width)
        elif not (isinstance(edge, Parameter) and self.accumulating and not edge.tied):
            edge.grad = grad  # else it is added to what earlier micro-batches left


def edge_of(x: Any) -> Node | Parameter | None:
    """Where a gradient of x goes; None if x needs none."""
    if isinstance(x, Parameter):
        return x if x.trained else None
    return x.edge if isinstance(x, Tensor) else None


class Layer:
    """The parameters of one decoder layer."""

    def __init__(self, form: AnalyticStep) -> None:
        decoder, scenario = form.decoder, form.scenario
        full, width = scenario.method == "full", form.base_width
        targets = {m.name for m in decoder.targets(scenario.lora)} if scenario.lora else set()
        adapter = WIDTH[scenario.adapter_dtype]
        self.linear: dict[tuple[str, str], dict[str, Any]] = {}
        for part, matrices in (("attention", decoder.attention), ("mlp", decoder.mlp)):
            for m in matrices:
                entry: dict[str, Any] = {
                    "weight": Parameter((m.outputs, m.inputs), width, full),
                    "bias": None,
                    "lora": None,
                }
                if m.bias:
                    entry["bias"] = Parameter((m.outputs,), width, full)
                if m.name in targets:
                    entry["lora"] = (
                        Parameter(("r", m.inputs), adapter, True),
                        Parameter((m.outputs, "r"), adapter, True),
                    )
                self.linear[part, m.name] = entry
        self.norms = [Parameter(("h",), width, full) for _ in range(decoder.family.norms)]
        self.qk_norms = [Parameter(("d",), width, full) for _ in range(2 if decoder.qk_norm else 0)]
        self.router = Parameter(("E", "h"), width, full)
        self.experts = (Parameter(("E", "i+i", "h"), width, full), Parameter(("E", "h", "i"), width, full))


class AnalyticStep(Step):
    """The step of a scenario, written down in operations on sizes."""

    def __init__(
        self, decoder: Decoder, scenario: Scenario, capability: tuple[int, int], *, blocks: bool = False
    ) -> None:
        super().__init__(decoder, scenario, blocks=blocks)
        self.capability = capability
        self.dense_width = 4 if scenario.mixed else WIDTH[scenario.precision]
        # PEFT's k-bit preparation turns every weight that is not packed to fp32.
        self.base_width = 4 if scenario.kbit_preparation == "peft" else self.dense_width
        self.quantized = scenario.method == "qlora"
        self.nested = 2 if self.quantized and scenario.quantization["double"] else 0  # copies of the unpacked scales

    # --- weights, gradients, optimizer ---

    def weights(self) -> None:
        """What is there before the first step."""
        for group, elements, _, times in self.decoder.weight_shapes():
            if group == "linear" and self.quantized:
                self.packed(elements, times)
            else:
                self.bulk(f"weights: {group}", self.base_width, elements, times)
        if self.scenario.lora:
            for _, elements, times in self.decoder.adapter_shapes(self.scenario.lora):
                self.bulk("adapters", WIDTH[self.scenario.adapter_dtype], elements, times)

    def packed(self, elements: int, times: int) -> None:
        """4-bit weights: two to a byte, a scale for each 64; the scales quantized again by 256 if double."""
        blocks = -(-elements // 64)
        self.bulk("weights: 4-bit", 1, -(-elements // 2), times)
        if self.scenario.quantization["double"]:
            self.bulk("quantization state", 1, blocks, times)
            self.bulk("quantization state", 4, -(-blocks // 256), times)
            self.bulk("quantization state", 4, 256, times)
            self.bulk("quantization state", 4, 1, times)
        else:
            self.bulk("quantization state", 4, blocks, times)
        self.bulk("quantization state", 4, 16, times)

    def bulk(self, component: str, width: int, elements: int, times: int) -> None:
        size = self.rounded(elements * width)
        self.add((component, f"{width}·{elements}", size), times)
        if self.events is not None and self.phase != "load":
            for _ in range(times):
                self.emit(size)

    def loading(self) -> None:
        """How the weights come to the device: it decides which blocks they get.

        transformers first allocates and frees one block of the model's size, then brings each tensor in the order of
        the names; a weight to be quantized comes whole, and goes when the packed one is there. (The trace's
        scripts/memory/loading.py follows the libraries in every detail, and names the sources.)
        """
        layers, dense = self.decoder.sizes["L"], self.dense_width
        once, each = [], []
        for group, elements, name, times in self.decoder.weight_shapes():
            packed = group == "linear" and self.quantized
            if group in ("embeddings", "output_head") or name in ("final norm", "output head bias"):
                once.append((name, elements, packed, times))
            else:
                each.append((name, elements, packed, times // layers))
        order = [item for item in once if item[0] == "output head"]
        order += [item for item in once if item[0] != "output head"]
        order += sorted(each) * layers
        total = sum(elements // 2 if packed else elements * dense for _, elements, packed, n in order for _ in range(n))
        self.retire(self.emit(total))
        for _, elements, packed, times in order:
            for _ in range(times):
                arrived = self.emit(elements * dense)
                if packed:
                    blocks = -(-elements // 64)
                    scales = self.emit(blocks * 4)
                    self.emit(-(-elements // 2))
                    self.emit(16 * 4)
                    if self.nested:
                        self.emit(4)
                        centred = self.emit(blocks * 4)
                        self.emit(-(-blocks // 256) * 4)
                        self.emit(blocks)
                        self.emit(256 * 4)
                        self.retire(centred)
                        self.retire(scales)
                    self.retire(arrived)
                elif self.base_width != dense:
                    self.emit(elements * self.base_width)
                    self.retire(arrived)
        if self.scenario.lora:
            width = WIDTH[self.scenario.adapter_dtype]
            for _, elements, times in self.decoder.adapter_shapes(self.scenario.lora):
                for _ in range(times):
                    self.emit(elements * width)

    def working_set(self) -> None:
        """What the first step brings and every later one finds: workspaces of cuBLAS, optimizer states."""
        self.bulk("workspaces", 1, cuda_rules.cublas_workspace_bytes(self.capability), 2)
        if any(m.bias for m in self.decoder.matrices) or self.decoder.family.head_bias:
            threads = 2 if self.scenario.gradient_checkpointing else 1  # recomputing happens in autograd's
            self.bulk("workspaces", 1, cuda_rules.CUBLASLT_WORKSPACE_BYTES, threads)
        self.bulk("batch", 8, self.values["t"], 2)
        self.optimizer_states()

    def trained_shapes(self) -> list[tuple[int, int, int]]:
        """Trainable tensors as (bytes of an element, elements, how many such)."""
        if self.scenario.lora:
            width = WIDTH[self.scenario.adapter_dtype]
            return [(width, elements, times) for _, elements, times in self.decoder.adapter_shapes(self.scenario.lora)]
        return [(self.base_width, elements, times) for _, elements, _, times in self.decoder.weight_shapes()]

    def optimizer_states(self) -> None:
        """Two moments for each trained parameter."""
        kind = self.scenario.optimizer
        for width, elements, times in self.trained_shapes():
            if kind in ("adamw", "adamw_fused"):
                self.bulk("optimizer states", width, elements, 2 * times)
                if kind == "adamw_fused":
                    self.bulk("optimizer states", 4, 1, times)  # its step counter lives on the device
            elif elements < 4096:  # bitsandbytes: min_8bit_size
                self.bulk("optimizer states", 4, elements, 2 * times)
            elif kind == "adamw_8bit" or elements < 100_000:  # smaller ones are never paged
                self.bulk("optimizer states", 1, elements, 2 * times)
                self.bulk("optimizer states", 4, -(-elements // 256), 2 * times)
            else:
                self.bulk("optimizer states", 4, -(-elements // 256), 2 * times)
        if kind not in ("adamw", "adamw_fused"):
            self.bulk("optimizer states", 4, 256, 2)

    def optimizer_step(self) -> None:
        """`foreach` AdamW takes the square root of all second moments at once: one more copy of them."""
        self.begin("optimizer")
        if self.scenario.optimizer == "adamw":
            for width, elements, times in self.trained_shapes():
                self.bulk("optimizer temporaries", width, elements, times)
        self.look()

    # --- layers of operations ---

    def linear(self, x: Tensor, entry: dict[str, Any], m: Matrix) -> Tensor:
        """A linear layer, 4-bit or not, with its adapter if it has one (peft/tuners/lora/layer.py, bnb.py)."""
        source = x.width
        if self.quantized:
            inner = self.cast(x, self.dense_width)
            out = self.cast(self.product_4bit(inner, m), source)
            del inner
        else:
            out = self.product(x, entry["weight"], m.outputs, entry["bias"])
        if entry["lora"] is None:
            return out
        result_width = out.width
        component, self.component = self.component, "activations: adapters"
        if self.quantized:
            out = self.elementwise(out)  # a defensive clone
        held = x if self.scenario.mixed and self.quantized else self.cast(x, entry["lora"][0].width)
        inner = self.dropped(held) if self.scenario.lora.dropout else held
        low = self.product(inner, entry["lora"][0], "r")
        del inner
        update = self.elementwise(self.product(low, entry["lora"][1], m.outputs))  # times alpha / rank
        del low
        if self.quantized:
            update = self.cast(update, result_width)
        self.component = component
        out = self.add_tensors(out, update)
        del update, held  # PEFT's forward holds its cast input to the end
        return self.cast(out, result_width)

    def product(self, x: Tensor, weight: Parameter, outputs: str, bias: Parameter | None = None) -> Tensor:
        """x times a dense weight; under autocast both in 16 bits."""
        copy = None
        if self.scenario.mixed:
            x = self.cast(x, 2)
            if weight.width == 4:
                copy = self.tensor(weight.dims, 2, COPIES)
                if weight.trained:
                    self.copies.append(copy)
        return self.matmul(x, weight, outputs, bias, copy)

    def product_4bit(self, x: Tensor, m: Matrix) -> Tensor:
        """x times a 4-bit weight: keeps nothing; forward and backward unpack the weight into a buffer."""
        shape = (x.dims, x.width)

        def unpacked() -> list[Tensor]:
            scales = [
                self.tensor((m.outputs, m.inputs, "1/64"), 4, "unpacked 4-bit weight") for _ in range(self.nested)
            ]
            return [*scales, self.tensor((m.outputs, m.inputs), self.dense_width, "unpacked 4-bit weight")]

        def backward(node: Node, grad: Tensor) -> list:
            buffers = unpacked()
            result = self.tensor(*shape)
            buffers.clear()
            return [result]

        buffers = unpacked()
        out = self.operation((*x.dims[:-1], m.outputs), x.width, [x], backward)
        buffers.clear()
        return out

    def dropped(self, x: Tensor) -> Tensor:
        """Dropout with a probability: keeps a mask of one byte an element."""
        return self.elementwise(x, saved=[self.tensor(x.dims, 1)])

    def norm(self, x: Tensor, weight: Parameter) -> Tensor:
        component, self.component = self.component, "activations: norms"
        kind = self.decoder.family.norm
        source = x.width
        if kind == "layer":
            inner = self.cast(x, 4) if self.scenario.mixed else x
            out = self.operation(
                inner.dims,
                max(inner.width, weight.width),
                [inner, weight],
                self._layer_norm_backward(inner, weight),
                [inner],
            )
        else:
            wide = self.cast(x, 4)
            square = self.tensor(wide.dims, 4)
            del square
            out = self.operation(wide.dims, 4, [wide], self._rms_backward, [wide])
            del wide
            if kind == "rms":
                out = self.multiply(self.cast(out, source), weight)
            else:
                out = self.cast(self.multiply(out, Parameter(weight.dims, 4, weight.trained)), source)
        self.component = component
        return out

    def _rms_backward(self, node: Node, grad: Tensor) -> list:
        """x * rsqrt(mean(x * x)): through the product, then through the mean of squares."""
        direct = self.tensor(grad.dims, 4)
        through_mean = self.tensor(grad.dims, 4)
        del through_mean
        power = self.tensor(grad.dims, 4)
        doubled = self.tensor(grad.dims, 4)
        del power
        times_grad = self.tensor(grad.dims, 4)
        del doubled, times_grad
        return [direct]

    def _layer_norm_backward(self, x: Tensor, weight: Parameter) -> Callable:
        shape = (x.dims, x.width)

        def backward(node: Node, grad: Tensor) -> list:
            return [self.tensor(*shape), self.gradient(weight, weight.width) if weight.trained else None]

        return backward

    def rotated(self, x: Tensor, width: int) -> Tensor:
        """Rotary position embedding: x * cos + rotate_half(x) * sin; keeps cos and sin alone."""
        if not self.decoder.rotary:
            return x
        out = self.add_tensors(self.elementwise(x, max(x.width, width)), self._rotated_half(x, width))
        return self.elementwise(out) if self.decoder.rotary < 1 else out  # put together with the part not rotated

    def _rotated_half(self, x: Tensor, width: int) -> Tensor:
        return self.elementwise(self.elementwise(x), max(x.width, width))

    def attention(self, x: Tensor, layer: Layer, hidden_width: int) -> Tensor:
        decoder, family = self.decoder, self.decoder.family
        self.component = "activations: attention"
        entries = {m.name: (layer.linear["attention", m.name], m) for m in decoder.attention}
        if family.fused_qkv:
            joined = self.linear(x, *entries[family.fused_qkv])
            q, k, v = self.split(joined, ("a", "k", "k"))
            del joined
        else:
            q, k, v = (self.linear(x, *entries[name]) for name in ("q_proj", "k_proj", "v_proj"))
        if layer.qk_norms:
            q, k = self.norm(q, layer.qk_norms[0]), self.norm(k, layer.qk_norms[1])
        q, k = self.rotated(q, hidden_width), self.rotated(k, hidden_width)
        kernel = self.kernel(q.width)
        if kernel == "eager":
            out = self.eager(q, k, v)
        elif kernel == "math":
            out = self.formula(q, k, v)
        else:
            out = self.fused(q, k, v, kernel)
        out = self.linear(out, *entries[family.names[0]])
        return self.dropped(out) if decoder.residual_dropout else out

    def split(self, x: Tensor, parts: tuple[str, ...]) -> tuple:
        """Views of one tensor; their gradients are put together again into one of its size."""
        shape, names = (x.dims, x.width), parts

        def together(node: Node, grad: Tensor) -> list:
            return [self.tensor(*shape)]

        edge = None
        if x.edge is not None:
            edge = Node([x.edge], [], together, self.part)
            self.record(edge)
        return tuple(Tensor(x.storage, (*x.dims[:-1], name), x.width, edge) for name in names)

    def expanded(self, x: Tensor) -> Tensor:
        """Keys or values repeated for every query head that shares them."""
        return self.elementwise(x, dims=("t", "a")) if self.values["H"] != self.values["K"] else x

    def kernel(self, width: int) -> str:
        """What scaled_dot_product_attention runs on queries whose elements take so many bytes.

        Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
        """
        if self.scenario.attention != "sdpa":
            return self.scenario.attention
        if not self.decoder.family.sdpa:
            return "eager"
        grouped = self.values["H"] != self.values["K"] and not self.windowed  # with a mask transformers repeats them
        head = self.values["d"]
        return cuda_rules.attention_kernel(
            self.dtype(width), head, head, grouped=grouped, masked=self.windowed, capability=self.capability
        )

    def dtype(self, width: int) -> str:
        """The dtype that attention computes in on queries whose elements take so many bytes."""
        return self.scenario.precision.removesuffix("-mixed") if self.scenario.mixed or width == 2 else "fp32"

    @property
    def windowed(self) -> bool:
        """Whether attention gets a mask, since some layers might not look back over the whole text.

        Source: transformers masking_utils.py, _ignore_causal_mask_sdpa (a window as long as the text makes one too).
        """
        return 0 < self.decoder.window <= self.scenario.sequence_length

    def fused(self, q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
        """Attention in one kernel: keeps its inputs, its output and the log-sum-exp of each row."""
        if self.scenario.mixed:
            q, k, v = self.cast(q, 2), self.cast(k, 2), self.cast(v, 2)
        grouped = self.values["H"] != self.values["K"]
        flash = kernel == "flash"
        if not flash:
            k, v = self.expanded(k), self.expanded(v)
        shapes = [(x.dims, x.width) for x in (q, k, v)]
        width = q.width
        length, head = self.scenario.sequence_length, self.values["d"]
        self.values["s128"], self.values["d32"] = cuda_rules.flash_padding(length, head)
        self.values["s32"] = cuda_rules.up(length, cuda_rules.LOG_SUM_EXP_ALIGNMENT)
        self.values["W"] = cuda_rules.efficient_workspace_bytes(
            length, length, head, self.dtype(width), self.capability
        )
        bias = []
        if self.windowed:  # convert_boolean_attn_mask
            bias = [self.tensor(("t", "s"), width, "positions and mask")]
            opposite = self.tensor(("t", "s"), 1, "positions and mask")
            del opposite
        sums = self.tensor(("H", "t") if flash else ("H", "b", "s32"), 4)

        def backward(node: Node, grad: Tensor) -> list:
            grads = [self.tensor(*shape) for shape in shapes]
            if flash:
                scratch = [self.tensor(("H", "b", "s128"), 4), self.tensor(("H", "b", "s128", "d32"), 4)]
                scratch += [self.tensor(("t", "a"), width) for _ in range(2 if grouped else 0)]
            else:
                scratch = [self.tensor(("H", "t"), 4), self.tensor(("H", "b", "W"), 1)]
            scratch.clear()
            return grads

        return self.operation(("t", "a"), width, [q, k, v], backward, [q, k, v, sums, *bias], saves_output=True)

    def formula(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """scaled_dot_product_attention without a kernel that takes its inputs: in fp32, scores in memory.

        Source: aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math.
        """
        if self.scenario.mixed:
            q, k, v = self.cast(q, 2), self.cast(k, 2), self.cast(v, 2)
        width = q.width
        q, k, v = self.cast(q, 4), self.cast(self.expanded(k), 4), self.cast(self.expanded(v), 4)
        component, self.component = self.component, "attention scores"
        mask = self.tensor(("s", "s"), 4)
        q, k = self.elementwise(q), self.elementwise(k)  # each times the square root of the scale
        scores = self.batched(q, k, ("H", "t", "s"), 4)
        del q, k
        soft = self.softmax(scores, 4)
        del scores, mask
        self.component = component
        out = self.batched(soft, v, ("t", "a"), 4)
        del soft, v
        return self.elementwise(self.cast(out, width))  # made contiguous

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention in single steps, the scores of every head in memory."""
        decoder = self.decoder
        compute = 2 if self.scenario.mixed else q.width
        scores = ("H", "t", "s")
        k, v = self.expanded(k), self.expanded(v)
        if decoder.family.fused_qkv and decoder.rotary and self.scenario.micro_batch > 1:
            v = self.elementwise(v)  # bmm copies a part of the one matrix's output, and queries and keys left it before
        component = self.component
        ql, kl = self.cast(q, compute), self.cast(k, compute)
        self.component = "attention scores"
        weights = self.batched(ql, kl, scores, compute)
        del ql, kl
        weights = self.elementwise(weights)  # scaled
        if decoder.softcap:
            weights = self.elementwise(weights)
            weights = self.tanh(weights)
            weights = self.elementwise(weights)
        weights = self.elementwise(weights)  # plus the mask
        # CUDA's softmax reads half directly, but not bfloat16.
        direct = self.scenario.precision in cuda_rules.HALF_TO_FLOAT or not decoder.family.softmax_fp32
        width = 4 if decoder.family.softmax_fp32 or self.scenario.mixed else weights.width
        soft = self.softmax(weights if direct else self.cast(weights, 4), width)
        soft = self.cast(soft, q.width)
        del weights
        if decoder.attention_dropout:
            soft = self.dropped(soft)
        soft, v = self.cast(soft, compute), self.cast(v, compute)
        self.component = component
        out = self.batched(soft, v, ("t", "a"), compute)
        del soft
        return self.elementwise(out)  # made contiguous

    def batched(self, x: Tensor, y: Tensor, dims: tuple[str, ...], width: int) -> Tensor:
        shapes = [(x.dims, x.width), (y.dims, y.width)]

        def backward(node: Node, grad: Tensor) -> list:
            return [self.tensor(*shape, "attention scores" if "s" in shape[0] else None) for shape in shapes]

        return self.operation(dims, width, [x, y], backward, [x, y])

    def softmax(self, x: Tensor, width: int) -> Tensor:
        """Keeps its output; its backward makes a product of gradient and output too."""
        shape = (x.dims, x.width)

        def backward(node: Node, grad: Tensor) -> list:
            result = self.tensor(*shape)
            product = self.tensor(shape[0], width)
            del product
            return [result]

        return self.operation(x.dims, width, [x], backward, saves_output=True)

    def tanh(self, x: Tensor) -> Tensor:
        shape = (x.dims, x.width)
        return self.operation(*shape, [x], lambda node, grad: [self.tensor(*shape)], saves_output=True)

    def activated(self, x: Tensor) -> Tensor:
        """The MLP's nonlinearity."""
        kind = self.decoder.activation
        if kind in ("gelu_new", "gelu_fast"):  # written out in Python: each step's operands are kept
            cube = self.elementwise(x, saved=[x])
            inner = self.elementwise(self.elementwise(self.add_tensors(x, self.elementwise(cube))))
            del cube
            one_plus = self.elementwise(self.tanh(inner))
            del inner
            return self.multiply(self.elementwise(x), one_plus)
        return self.elementwise(x, saved=[x])

    def mlp(self, x: Tensor, layer: Layer) -> Tensor:
        decoder, family = self.decoder, self.decoder.family
        self.component = "activations: MLP"
        entries = [(layer.linear["mlp", m.name], m) for m in decoder.mlp]
        if decoder.experts:
            return self.moe(x, layer)
        if family.fused_gate_up:
            joined = self.linear(x, *entries[0])
            gate, up = self.split(joined, ("i", "i"))
            del joined
            out = self.multiply(up, self.activated(gate))
            del gate, up
        elif family.gated:
            gate = self.activated(self.linear(x, *entries[0]))
            out = self.multiply(gate, self.linear(x, *entries[1]))
            del gate
        else:
            out = self.activated(self.linear(x, *entries[0]))
        out = self.linear(out, *entries[-1])
        return self.dropped(out) if decoder.residual_dropout else out

    def moe(self, x: Tensor, layer: Layer) -> Tensor:
        """Experts on the tokens that were routed to them (each token to ``e`` of them), rows gathered by expert."""
        up, down = layer.experts
        rows = self.elementwise(x, dims=("e", "t", "h"))
        joined = self.matmul(rows, up, "i+i")
        del rows
        gate, second = self.split(joined, ("i", "i"))
        del joined
        hidden = self.multiply(self.activated(gate), second)
        del gate, second
        out = self.matmul(hidden, down, "h")
        del hidden
        return self.elementwise(self.elementwise(out, saved=[out]), dims=("t", "h"))

    def decoder_layer(self, x: Tensor, layer: Layer) -> Tensor:
        family, norms = self.decoder.family, layer.norms
        width = x.width
        normed = self.norm(x, norms[0])
        out = self.attention(normed, layer, width)
        if family.parallel:
            other = self.mlp(normed, layer)
            out = self.add_tensors(out, other)
            del normed, other
            return self.add_tensors(out, x)
        del normed
        if family.post_norms:
            out = self.norm(out, norms[1])
        self.component = "residual stream"
        x = self.add_tensors(x, out)
        held = out if family.holds_parts else None  # noqa: F841, until the layer returns
        del out
        normed = self.norm(x, norms[-2] if family.post_norms else norms[-1])
        out = self.mlp(normed, layer)
        del normed
        if family.post_norms:
            out = self.norm(out, norms[-1])
        self.component = "residual stream"
        return self.add_tensors(x, out)

    def checkpointed(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a part without keeping anything but its input; it runs again in the backward pass."""
        self.part = Part(run, x)
        out = run(x)
        self.part = None
        return out

    # --- the whole step ---

    def forward(self) -> None:
        decoder, scenario = self.decoder, self.scenario
        full, count = scenario.method == "full", decoder.sizes["L"]
        if self.accumulating:  # the gradients of the micro-batches before this one
            for width, elements, times in self.trained_shapes():
                self.bulk("gradients", width, elements, times)
        self.component = "residual stream"
        self.embedding = Parameter(("V", "h"), self.base_width, full, decoder.tied)
        self.layers = [Layer(self) for _ in range(min(count, self.layers_run))]
        x = self.embedded()
        self.shared = self.shared_by_layers(x.width)
        before: Counter[Key] = Counter()
        self.between: Counter[Key] = Counter()  # what the layers that are not run keep
        self.until_backward: Counter[Key] = Counter()  # and what they keep until the forward pass ends
        self.marks: list[int] = []
        for index, layer in enumerate(self.layers):
            self.marks.append(len(self.nodes))
            before = self.live.copy()
            run = lambda x, layer=layer: self.decoder_layer(x, layer)  # noqa: E731
            x = self.checkpointed(run, x) if scenario.gradient_checkpointing else run(x)
            if index == 1 and count > self.layers_run:
                self.repeat(before, count - self.layers_run)
        if not scenario.gradient_checkpointing:
            self.shared = [
                tensor for tensor in self.shared if "t" not in tensor.dims
            ]  # only a rerun reads the mask again
        self.component = "activations: norms"
        self.final_norm = Parameter(("h",), self.base_width, full)
        x = self.norm(x, self.final_norm)
        self.parts.clear()
        self.head = self.embedding if decoder.tied else Parameter(("V", "h"), self.base_width, full)
        self.component = "logits and loss"
        (self.chunked_loss if scenario.loss == "chunked" else self.whole_loss)(x)
        del x
        self.copies.clear()
        for key, times in self.until_backward.items():
            self.add(key, -times)

    def shared_by_layers(self, width: int) -> list[Tensor]:
        """What every layer reads: positions, cosines and sines, and the mask where scores are in memory."""
        self.component = "positions and mask"
        shared = [
            self.tensor(("s",), 8),
            *(self.tensor(("s", "d"), width) for _ in range(2 if self.decoder.rotary else 0)),
        ]
        if self.kernel(width) == "eager":
            shared.append(self.tensor(("t", "s"), width))
        elif self.windowed:
            shared.append(self.tensor(("s", "s"), 1))
        self.component = "residual stream"
        return shared

    def repeat(self, before: Counter[Key], times: int) -> None:
        """What the layer just run has left behind, as often as there are layers like it."""
        self.look()
        for key in set(self.live) | set(before):
            kept = self.live[key] - before[key]
            if kept:
                until_backward = self.scenario.gradient_checkpointing and key[0] == COPIES
                (self.until_backward if until_backward else self.between)[key] = kept * times
                self.add(key, kept * times)
        self.look()

    def embedded(self) -> Tensor:
        weight = self.embedding
        decoder = self.decoder

        def backward(node: Node, grad: Tensor) -> list:
            return [self.gradient(weight, weight.width)]

        x = self.operation(("t", "h"), weight.width, [weight], backward)
        self.parts = [x]
        if decoder.positions:
            self.position = Parameter(("p", "h"), self.base_width, weight.trained)
            positions = self.operation(
                ("s", "h"),
                weight.width,
                [self.position],
                lambda n, g: [self.gradient(self.position, self.position.width)],
            )
            self.parts.append(positions)
            x = self.add_tensors(x, positions)
            del positions
        if not decoder.family.holds_parts:
            self.parts.clear()
        if decoder.family.scaled_embedding:
            x = self.elementwise(x)
        if decoder.embedding_dropout:
            x = self.dropped(x)
            if not weight.trained and self.scenario.gradient_checkpointing:  # PEFT has embeddings ask for a gradient
                self.mask = self.tensor(("t", "h"), 1)
        return x

    def logits(self, x: Tensor, dims: str = "t") -> Tensor:
        out = self.product(x, self.head, "V")
        if self.decoder.logit_softcap:
            out = self.elementwise(self.tanh(self.elementwise(out)))
        return out

    def whole_loss(self, x: Tensor) -> None:
        """Cross-entropy over all logits (loss/loss_utils.py: in fp32)."""
        logits = self.logits(x)
        self.loss = self.cross_entropy(logits)
        self.outputs = logits if self.scenario.loop == "manual" else None

    def cross_entropy(self, logits: Tensor) -> Node | None:
        wide = self.cast(logits, 4)
        shape = wide.dims
        logs = self.operation(shape, 4, [wide], lambda node, grad: [self.tensor(shape, 4)], saves_output=True)
        loss = self.operation(("1",), 4, [logs], lambda node, grad: [self.tensor(shape, 4)], [logs])
        return loss.edge

    def chunked_loss(self, x: Tensor) -> None:
        """Head and loss for some learned tokens at a time, and again in backward; here every token is learned."""
        learned = self.values["t"] - self.values["b"]
        self.values["n"], self.values["c"] = learned, min(CHUNK_TOKENS, learned)
        self.outputs = None
        x = self.elementwise(x, dims=("n", "h"))

        def run(x: Tensor) -> Tensor:
            self.component = "logits and loss"
            logits = self.logits(x)
            wide = self.cast(logits, 4)
            shape = wide.dims
            logs = self.operation(shape, 4, [wide], lambda node, grad: [self.tensor(shape, 4)], saves_output=True)
            return self.operation(("1",), 4, [logs], lambda node, grad: [self.tensor(shape, 4)], [logs])

        if learned <= CHUNK_TOKENS:
            self.loss = run(x).edge
            return
        states = self.split(x, ("h", "h"))  # two stand for all: each adds to the same gradients
        self.loss = Node([], [], lambda node, grad: [grad, grad])
        for state in states:
            chunk = Tensor(state.storage, ("c", "h"), state.width, state.edge)
            self.loss.edges.append(self.checkpointed(run, chunk).edge)
        self.nodes.append(self.loss)

    def backward_pass(self) -> None:
        self.begin("backward")
        self.component = "gradients of activations"
        held, self.outputs = self.outputs, None
        if self.loss is not None:
            self.loss.grad = self.tensor(("1",), 4)
            self.loss = None
        pending = self.nodes
        last = self.marks[-1] if self.between else 0
        early, late = pending[:last], pending[last:]
        del pending
        self.nodes = []
        self.backward_from(late)
        if self.between:
            self.swap_layers()
        self.backward_from(early)
        if self.accumulating:  # a tied weight's gradient joins the others
            self.embedding.grad = None
        self.shared.clear()
        self.mask = None
        del held
        self.look()

    def backward_from(self, nodes: list[Node]) -> None:
        self.component = "gradients of activations"
        self.backward(nodes)

    def swap_layers(self) -> None:
        """The layers that were not run: what they kept goes, their gradients come."""
        times = self.decoder.sizes["L"] - self.layers_run
        self.look()
        for key, kept in self.between.items():
            self.add(key, -kept)
        for entry in self.layers[-1].linear.values():
            for p in (entry["weight"], entry["bias"], *(entry["lora"] or ())):
                if p is not None and p.grad is not None:
                    self.add(p.grad.storage.key, times)
        for p in self.layers[-1].norms:
            if p.grad is not None:
                self.add(p.grad.storage.key, times)
        self.between.clear()
        self.look()

    def run(self) -> AnalyticStep:
        self.weights()
        self.look()
        self.resident = self.now
        if self.events is not None:
            self.loading()
        elif self.quantized:  # a dense weight is on the device while it is quantized
            largest = max(self.value(m.outputs) * self.value(m.inputs) for m in self.decoder.matrices)
            self.peaks["load"] += typical_block(largest * self.dense_width)
        self.begin("forward")
        self.working_set()
        self.forward()
        self.backward_pass()
        self.optimizer_step()
        if self.events is not None:
            self.blocks()
        return self

    def component_of(self, what: str, formula: str) -> str:
        """The component that a term belongs to; the trace too counts what is as wide as the vocabulary as logits."""
        if what.startswith("weights: "):
            dtype = "fp32" if self.base_width == 4 else self.scenario.precision
            return names.WEIGHTS_4BIT if what == "weights: 4-bit" else names.weights(dtype)
        component = COMPONENT_OF.get(what, names.ACTIVATIONS)
        wide = formula.endswith("·V") and component in (names.ACTIVATIONS, names.TEMPORARIES)
        return names.LOGITS_AND_LOSS if wide else component

    def blocks(self) -> None:
        """What the allocator's blocks take beyond the tensors, phase by phase."""
        allocated = replay(self.events, self.starts).phases
        for phase, peak in allocated.items():
            rest = peak - self.peaks[phase]
            self.at_peak[phase][ROUNDING, "", rest] = 1
            self.peaks[phase] = peak
        self.events = None


def analytic_estimate(
    scenario: Scenario,
    where: object = "scenario",
    *,
    capability: tuple[int, int] | None = None,
    blocks: bool = True,
) -> dict[str, Any] | None:
    """Memory of a scenario's training step; None for a family of models that isn't described.

    Parameters
    ----------
    scenario
        The step.
    where
        What to call the scenario in messages.
    capability
        Compute capability of the card, which decides some kernels.
    blocks
        Whether to run what the formula knows of allocations through the allocator, for the blocks that tensors get
        (a tenth of a second). False: blocks as they are on average, and three layers for all (two milliseconds).
    """
    capability = capability or DEFAULT_CAPABILITY
    decoder = described(scenario, where)
    if decoder is None:
        return None
    form = AnalyticStep(decoder, scenario, capability, blocks=blocks).run()
    steps = {phase: form.peaks[phase] for phase in ("forward", "backward", "optimizer")}
    phase = max(steps, key=steps.__getitem__)
    terms = [
        {
            "component": form.component_of(what, formula),
            "what": what,
            "formula": formula,
            "bytes": size * times,
            "times": times,
        }
        for (what, formula, size), times in form.at_peak[phase].items()
        if times and size
    ]
    components: Counter[str] = Counter()
    for term in terms:
        components[term["component"]] += term["bytes"]
    return {
        "peak_allocated_bytes": steps[phase],
        "phase": phase,
        "phases": dict(form.peaks),
        "resident_bytes": form.resident,
        "components": dict(components),
        "terms": sorted(terms, key=lambda term: -term["bytes"]),
        "parameters": decoder.parameter_counts(),
    }
