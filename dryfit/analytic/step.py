"""The whole training step on sizes: embeddings, decoder layers, loss, backward pass, optimizer.

Where blocks don't matter three layers are run and the rest is multiplication: what the second left behind counts once
more for each that is not run.

Sources: transformers 5.24 (models/*/modeling_*.py, loss/loss_utils.py), dryfit/step/step.py.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from dryfit.analytic import state
from dryfit.analytic.experts import experts
from dryfit.analytic.graph import Node, Parameter, Storage, Tensor, Term
from dryfit.analytic.layers import Layer, Network, attention, dropped, mlp, norm, product
from dryfit.analytic.setting import Setting
from dryfit.analytic.sharding import Sharding, Unit, marked, units_of
from dryfit.engine.components import GRADIENTS, INPUTS, TEMPORARIES, WEIGHT_CASTS
from dryfit.engine.cuda_rules import embedding_backward_bytes
from dryfit.scenario.fields import CHUNK_TOKENS

LAYERS_RUN = 3


class TrainingStep(Network):
    """One step of a setting; `run` takes it, afterwards ``peaks`` and ``at_peak`` hold its phases.

    Attributes
    ----------
    resident
        Bytes before the first step.
    """

    def __init__(self, setting: Setting, *, blocks: bool) -> None:
        super().__init__(setting, blocks=blocks)
        count = setting.decoder.sizes["L"]
        self.skipped = (
            0 if blocks else max(0, count - LAYERS_RUN)
        )  # every layer's blocks are its own
        self.layers = [Layer(self) for _ in range(count - self.skipped)]
        self.resident = 0
        self._shared: list[Tensor] = []  # what every layer reads
        self.held: list[
            Tensor
        ] = []  # what the model's code keeps a name for, until the forward pass ends
        self._outputs: Tensor | None = None  # logits that a manual loop keeps a name for
        self._loss: Node | None = None
        # What the layers that are not run keep until their turn in the backward pass, and until the forward pass ends.
        self._between: Counter[Term] = Counter()
        self._until_backward: Counter[Term] = Counter()
        self._last_layer = 0  # index of its first node
        self._final_norm = self.base_parameter("norms", "h")
        self.embedding = self.base_parameter("embeddings", "V", "h", tied=self.decoder.tied)
        self.head = (
            self.embedding if self.decoder.tied else self.base_parameter("output_head", "V", "h")
        )
        self.sharding = Sharding(self, setting) if setting.sharded else None
        self.units: list[Unit] = self._units() if self.sharding else []

    def _units(self) -> list[Unit]:
        """What FSDP2 gathers together, in the order of the forward pass: the embedding if untied, layers, the rest."""
        embedding, layer, last = units_of(self.setting)
        reshard, tied = self.scenario.parallel.reshard_after_forward, self.decoder.tied
        make = lambda what, shapes, parameters, resharded: Unit(  # noqa: E731
            self.sharding, shapes, parameters, resharded=resharded, what=what
        )
        units = [] if tied else [make("the embedding", embedding, [self.embedding], reshard)]
        units += [make("a layer", layer, each.parameters, reshard) for each in self.layers]
        units.append(make("norm and head", last, [self._final_norm, self.head], False))
        for unit, following in pairwise(units):
            following.before = unit
        return units

    def run(self) -> TrainingStep:
        """Load, forward, backward, optimizer."""
        state.hold_weights(self, self.setting)
        self.look()
        self.resident = self.now
        if self.events is not None:
            state.load(self, self.setting)
        else:
            self.peaks["load"] += self.rounded(state.largest_arriving_bytes(self.setting))
        self.begin("forward")
        state.hold_working_set(self, self.setting)
        batch = self.batch()
        self.forward()
        self.begin("backward")
        self.backward_pass()
        batch.clear()
        state.optimizer_step(self, self.setting)
        self.make_blocks()
        return self

    def batch(self) -> list[Tensor]:
        """Ids and labels; of padded rows also which tokens are padding, of packed rows their positions and masks."""
        batch = [self.tensor(("t",), 8, INPUTS, "ids and labels") for _ in range(2)]
        if self.setting.padded:
            batch.append(self.tensor(("t",), 8, INPUTS, "which tokens are padding"))
        if self.setting.packed:
            batch.append(self.tensor(("t",), 8, INPUTS, "positions of packed rows"))
            for _ in range(self.setting.packing_masks):
                batch.append(
                    self.tensor(("t", "s"), self.setting.mask_width, INPUTS, "masks of packed rows")
                )
        return batch

    # --- forward ---

    def forward(self) -> None:
        """From ids to the loss, where earlier micro-batches have left their gradients."""
        if self.scenario.gradient_accumulation > 1:
            for width, elements, times in self.setting.trained_shapes():
                self.hold(GRADIENTS, "gradients of weights", width, elements, times)
        self.micro_batch()

    def micro_batch(self) -> None:
        """From ids to the loss."""
        decoder, checkpointing = self.decoder, self.scenario.gradient_checkpointing
        ways = {
            False: lambda run, x: run(x),
            True: self.checkpointed,
            "reentrant": self.checkpointed_reentrantly,
        }
        way, sharding = ways[checkpointing], self.sharding
        first = self.units[0 if not decoder.tied else -1] if sharding else None
        if sharding:
            sharding.before_forward(first)
        x = self.embedded()
        if sharding:
            if (
                not decoder.tied
            ):  # a tied embedding belongs to the last unit, whose backward pass began at the logits
                x = marked(self.nodes, x, lambda: sharding.before_backward(first))
            sharding.after_forward(first)
        self._share(x.width)
        before = self.live
        for index, layer in enumerate(self.layers):
            if index == LAYERS_RUN - 1:
                self._last_layer = len(self.nodes)
            if index == 1:
                before = self.live.copy()
            run = lambda x, layer=layer: decoder_layer(self, x, layer)  # noqa: E731
            unit = self.units[index + (not decoder.tied)] if sharding else None
            if sharding:
                sharding.before_forward(unit)
                x = marked(self.nodes, x, lambda unit=unit: sharding.after_backward(unit))
            x = way(run, x)
            if sharding:
                x = marked(self.nodes, x, lambda unit=unit: sharding.before_backward(unit))
                sharding.after_forward(unit)
            if self.skipped and index == 1:
                self._repeat(before)
        if not checkpointing:  # only a layer that runs again reads the mask again
            self._shared = [tensor for tensor in self._shared if "t" not in tensor.dims]
        if sharding:
            sharding.before_forward(self.units[-1])
            if not decoder.tied:
                x = marked(self.nodes, x, lambda: sharding.after_backward(self.units[-1]))
        x = norm(self, x, self._final_norm)
        self.held.clear()
        self.what = "logits and loss"
        (self._chunked_loss if self.scenario.loss == "chunked" else self._whole_loss)(x)
        del x
        self.casts.clear()
        for term, times in self._until_backward.items():
            self.count(term, -times)
        if sharding:
            sharding.forward_ended()

    def embedded(self) -> Tensor:
        """Rows of the embedding, with learned positions added where the model has them."""
        decoder, family = self.decoder, self.decoder.family
        self.what = "residual stream"
        weight = self.embedding
        x = self.rows(weight, "t")
        if x.edge is None and self.scenario.gradient_checkpointing == "reentrant":
            x.edge = Node(
                [], [], None
            )  # `enable_input_require_grads`: else no gradient would reach the layers
        self.held = [x]
        if decoder.positions:
            positions = self.rows(
                self.base_parameter("embeddings", "p", "h"), "t" if self.setting.packed else "s"
            )
            self.held.append(positions)
            x = self.add(x, positions)
            del positions
        if not family.holds_parts:
            self.held.clear()
        if family.scaled_embedding:
            x = self.elementwise(x)
        if decoder.embedding_dropout:
            x = dropped(self, x)
            if (
                not weight.trained and self.scenario.gradient_checkpointing
            ):  # PEFT has embeddings ask for a gradient
                self._shared.append(self.tensor(("t", "h"), 1))
        return x

    def rows(self, weight: Parameter, symbol: str) -> Tensor:
        """One row of an embedding for each of ``symbol`` indices."""
        words, hidden = weight.dims
        sizes = embedding_backward_bytes(self.value(symbol), self.value(words), self.value(hidden))
        dims: list[tuple[tuple[str, ...], int]] = []
        if sizes:
            segments, sums = f"w{symbol}", f"g{symbol}"
            self.symbols |= {segments: sizes[2] // 8, sums: sizes[-1] // (4 * self.value(hidden))}
            dims = [*[((symbol,), 8)] * 2, *[((segments,), 8)] * 3, ((sums, hidden), 4)]
        terms = [self.term(TEMPORARIES, "sums for an embedding's gradient", *part) for part in dims]

        def backward(grad: Tensor) -> list:
            scratch = [Storage(self, term) for term in terms]
            result = self.gradient(weight.dims, weight.width)
            scratch.clear()
            return [result]

        return self.operation((symbol, hidden), weight.width, [weight], backward)

    def _share(self, width: int) -> None:
        """Positions, cosines and sines, and the mask where scores are in memory or a window needs one."""
        self.what = "positions and mask"
        if (
            self.setting.packed
        ):  # the batch has brought positions, which differ from row to row, and the mask
            self._shared += [
                self.tensor(("t", "d"), width) for _ in range(2 if self.decoder.rotary else 0)
            ]
            return
        self._shared.append(self.tensor(("s",), 8))
        self._shared += [
            self.tensor(("s", "d"), width) for _ in range(2 if self.decoder.rotary else 0)
        ]
        if self.setting.attention_kernel(width) == "eager":
            self._shared.append(self.tensor(("t", "s"), width))
        elif self.setting.padded:
            self._shared.append(self.tensor(("t", "s"), 1))
        elif self.setting.windowed:
            self._shared.append(self.tensor(("s", "s"), 1))

    def _repeat(self, before: Counter[Term]) -> None:
        """What the layer just run has left behind, as often as there are layers that are not run."""
        self.look()
        for term in set(self.live) | set(before):
            kept = (self.live[term] - before[term]) * self.skipped
            if kept:
                until_backward = (
                    self.scenario.gradient_checkpointing and term.component == WEIGHT_CASTS
                )
                (self._until_backward if until_backward else self._between)[term] = kept
                self.count(term, kept)
        self.look()

    # --- loss ---

    def _logits(self, x: Tensor) -> Tensor:
        """Output head, and a soft cap where the model has one."""
        out = product(self, x, self.head, "V")
        if self.decoder.logit_softcap:
            out = self.elementwise(out)
            out = self.tanh(out)
            out = self.elementwise(out)
        return out

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        """In fp32: a log-softmax that keeps its output, and the choice of each token's target."""
        wide = self.cast(logits, 4)
        logs = self.operation(wide.dims, 4, [wide], self.like(wide), saves_output=True)
        return self.operation(("1",), 4, [logs], self.like(logs), [logs])

    def _whole_loss(self, x: Tensor) -> None:
        """Over all logits at once; a loop by hand holds the model's outputs until the next step."""
        logits = self._logits(x)
        if self.sharding:
            logits = marked(
                self.nodes, logits, lambda: self.sharding.before_backward(self.units[-1])
            )
        self._loss = self._cross_entropy(logits).edge
        self._outputs = logits if self.scenario.loop == "manual" else None

    def _chunked_loss(self, x: Tensor) -> None:
        """Head and loss for some target tokens at a time, and again in the backward pass."""
        x = self.elementwise(x, dims=("n", "h"))

        def run(x: Tensor) -> Tensor:
            self.what = "logits and loss"
            return self._cross_entropy(self._logits(x))

        if self.value("n") <= CHUNK_TOKENS:
            self._loss = run(x).edge
            return
        tokens = self._chunks()
        self._loss = Node([], [], lambda grad: [grad] * len(tokens))
        for symbol, chunk in zip(tokens, self.split(x, ("h",) * len(tokens)), strict=True):
            part = Tensor(chunk.storage, (symbol, "h"), chunk.width, chunk.edge)
            self._loss.edges.append(self.checkpointed(run, part).edge)
        self.nodes.append(self._loss)

    def _chunks(self) -> list[str]:
        """Chunks by the symbol of their tokens; two are run for all, since each adds to the same gradients."""
        return ["c", "c"]

    # --- backward ---

    def backward_pass(self) -> None:
        """From the loss to the gradients, last layer first."""
        held, self._outputs = self._outputs, None
        if self._loss is not None:
            self._loss.grad = self.tensor(("1",), 4)
            self._loss = None
        early, late = self.nodes, []
        self.nodes = []
        if self.skipped:
            late = early[self._last_layer :]
            del early[self._last_layer :]
            self.backward(late)
            self._skip_layers()
        self.backward(early)
        if self.sharding:
            self._last_units()
        if self.accumulating:  # a tied weight's gradient joins the others
            self.embedding.grad = None
        self._shared.clear()
        del held
        self.look()

    def _last_units(self) -> None:
        """What no gradient of an input ends: the embedding's unit, and the first layer's where the input needs none."""
        for unit in reversed(self.units):
            if unit.gathered or unit.arriving or any(p.grad for p in unit.parameters):
                self.sharding.before_backward(unit)
                self.sharding.after_backward(unit)
        self.sharding.backward_ended(self.units)

    def _skip_layers(self) -> None:
        """The layers that were not run: what they kept goes, their gradients come."""
        self.look()
        for term, kept in self._between.items():
            self.count(term, -kept)
        last = self.layers[LAYERS_RUN - 1].parameters
        grown = [parameter.grad.storage for parameter in last if parameter.grad is not None]
        if self.sharding and self.units[-2].share:
            grown = [self.units[-2].share]
        for storage in grown:
            self.count(storage.term, self.skipped)
        self.look()


def decoder_layer(net: Network, x: Tensor, layer: Layer) -> Tensor:
    """Norm, attention, norm, MLP, each added to the residual stream (or both at once: Phi)."""
    family, norms, width = net.decoder.family, layer.norms, x.width
    normed = norm(net, x, norms[0])
    out = attention(net, normed, layer, width)
    if family.parallel:
        other = mlp(net, normed, layer)
        net.what = "residual stream"
        out = net.add(out, other)
        del normed, other
        return net.add(out, x)
    del normed
    if family.post_norms:
        out = norm(net, out, norms[1])
    net.what = "residual stream"
    x = net.add(x, out)
    held = out if family.holds_parts else None  # noqa: F841, until the layer returns
    del out
    normed = norm(net, x, norms[-2] if family.post_norms else norms[-1])
    out = (experts if net.decoder.experts else mlp)(net, normed, layer)
    del normed
    if family.post_norms:
        out = norm(net, out, norms[-1])
    net.what = "residual stream"
    return net.add(x, out)
