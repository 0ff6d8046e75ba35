"""Decoders whose layers are of several kinds: every weight of every layer by name and size.

A layer is a *mixer* of tokens and an MLP: its :class:`Plan`. :mod:`dryfit.analytic.plans` has the families, and
:mod:`dryfit.analytic.hybrid_layers` what they do in a step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dryfit.analytic.decoder import OUTSIDE_OF_LAYERS, Decoder, Heads, Matrix, NotDescribed, asked_names
from dryfit.common.errors import UserError
from dryfit.scenario.value_fields import Lora

ATTENTION = ("grouped", "latent", "with_sinks")  # mixers that read a mask
FP32 = "fp32"  # a group of weights: kept so, whatever the model is loaded in


@dataclass(frozen=True)
class Weight:
    """A weight of a layer: its name, its group (:meth:`Decoder.weight_shapes`) and its dimensions by symbols.

    Those of the group ``linear`` are quantized; ``adapted``: whether they get an adapter where all linear layers do.
    ``bias``: whether there is one of the first dimension. ``reached``: whether a gradient reaches it.
    """

    name: str
    group: str
    dims: tuple[str, ...]
    bias: bool = False
    adapted: bool = True
    reached: bool = True

    def takes_adapter(self, adapts_experts: bool) -> bool:
        """Whether PEFT can adapt it: linear layers, and parameters of experts in some families."""
        return self.group == "linear" or (adapts_experts and self.name in ("gate", "gate_up_proj", "experts.down_proj"))


@dataclass(frozen=True)
class Plan:
    """A layer: what it does, by the names of functions of :mod:`hybrid_layers`, and its weights in order.

    ``layer``: how mixer and MLP go together; ``options``: what they do beside.
    """

    layer: str
    mixer: str
    mlp: str
    weights: tuple[Weight, ...]
    heads: Heads
    options: frozenset[str] = frozenset()
    rotary: float = 1.0  # share of a head that is rotated; 0: none


@dataclass(frozen=True)
class Hybrid(Decoder):
    """A decoder by the plans of its layers."""

    plans: tuple[Plan, ...] = ()  # type: ignore[assignment]
    outside: tuple[Weight, ...] = ()  # beside embedding, head and last norm
    chunk: int = 64  # tokens of a chunk of linear attention or of a state space
    kernel: int = 4  # tokens that a convolution looks at
    packages: frozenset[str] = frozenset()  # type: ignore[assignment]
    adapts_experts: bool = False  # whether PEFT adapts experts where all linear layers are asked for
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # that targets of adapters go by
    router: str = "softmax"  # type: ignore[assignment]
    scaled_logits: bool = False  # type: ignore[assignment]
    streams: int = 0  # type: ignore[assignment]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every linear layer that differs from others, once."""
        weights = dict.fromkeys(w for plan in self.plans for w in plan.weights if w.group == "linear")
        weights |= dict.fromkeys(w for w in self.outside if w.group == "linear")
        return tuple(Matrix(w.name, *w.dims, w.bias) for w in weights)

    @property
    def heads(self) -> Heads:
        """An attention with a window, where a layer has one."""
        return max((plan.heads for plan in self.plans), key=lambda heads: heads.window)

    @property
    def rotations(self) -> tuple[str, ...]:
        """As in the base class."""
        return tuple(dict.fromkeys(plan.heads.rotated for plan in self.plans if plan.rotary))

    @property
    def kinds_of_masks(self) -> int:
        """As in the base class."""
        return len({plan.heads.window > 0 for plan in self.plans if plan.mixer in ATTENTION})

    @property
    def period(self) -> tuple[int, int, int]:
        """As in the base class: the choice that leaves out most layers."""
        count, best = len(self.plans), (0, max(len(self.plans), 1), 1)
        for length in range(1, count // 2 + 1):
            same = [self.plans[at] == self.plans[at + length] for at in range(count - length)]
            run = 0
            for at, alike in enumerate([*same, False]):
                if not alike and run // length * length > (best[2] - 1) * best[1]:
                    best = at - run, length, run // length + 1
                run = run + 1 if alike else 0
        return best

    def of_step(self, length: int, rows: int) -> dict[str, int]:
        """Tokens rounded up to whole chunks, chunks, and what a convolution adds to both ends."""
        chunks = -(-length // self.chunk)
        return {
            "tc": rows * chunks * self.chunk,
            "bc": rows * self.chunk,
            "nc": rows * chunks,
            "C": self.chunk,
            "tf": rows * (length + self.kernel - 1),
            "f": self.kernel,
        }

    def weight_shapes(self, *, reached: bool = False) -> list[tuple[str, int, str, int]]:
        """As in the base class; the places of weights are their names."""
        counts: dict[tuple[str, int, str], int] = {}
        for group, elements, name in self._each(reached):
            counts[group, elements, name] = counts.get((group, elements, name), 0) + 1
        return [(*one, times) for one, times in counts.items()]

    def arrivals(self, first: bool = False) -> list[tuple[str, int]]:
        """As in the base class."""
        return [(group, elements) for group, elements, _ in self._each()]

    def _each(self, reached: bool = False) -> Iterator[tuple[str, int, str]]:
        """Every parameter as (group, elements, name); ``reached``: those alone that a gradient reaches."""
        hidden = self.sizes["h"]
        yield "embeddings", self.sizes["V"] * hidden, "embedding"
        for weights in (self.outside, *(plan.weights for plan in self.plans)):
            yield from self._sized([weight for weight in weights if weight.reached or not reached])
        yield "norms", hidden, "final norm"
        if not self.tied:
            yield "output_head", self.sizes["V"] * hidden, "output head"

    def _sized(self, weights: Sequence[Weight]) -> Iterator[tuple[str, int, str]]:
        for weight in weights:
            elements = 1
            for symbol in weight.dims:
                elements *= self.value(symbol)
            yield weight.group, elements, weight.name
            if weight.bias:
                yield "biases", self.value(weight.dims[0]), f"{weight.name} bias"

    def targets(self, lora: Lora, where: object = "lora.target_modules") -> tuple[str, ...]:
        """Names of the weights that get adapters.

        Raises
        ------
        UserError
            If a name matches nothing, or with dropout on experts.
        """
        weights = [w for plan in self.plans for w in plan.weights] + list(self.outside)
        names = dict.fromkeys(w.name for w in weights if w.takes_adapter(self.adapts_experts))
        adapted = {w.name for w in weights if w.adapted}
        wanted = asked_names(lora)
        if lora.target_modules == "all-linear":
            found = tuple(name for name in names if name in adapted)
        else:
            found = tuple(name for name in names if name in adapted and wanted & self._names_of(name))
        problem, near = None, []
        if not found and not wanted & OUTSIDE_OF_LAYERS:
            problem = "`lora.target_modules` matches no linear layer of this model."
            near = [n for name in sorted(wanted) for n in difflib.get_close_matches(name, sorted(names), n=1)]
        elif lora.dropout and self.adapts_experts and {"gate", "gate_up_proj", "experts.down_proj"} & set(found):
            problem = "PEFT has no dropout for adapters of experts, which are parameters and no layers."
        if problem:
            raise UserError(
                problem,
                where=where,
                found=lora.target_modules if not lora.dropout else {"dropout": lora.dropout},
                allowed=f"all-linear, or a list of {', '.join(sorted(names))}",
                change={"lora": {"target_modules": near or "all-linear"}},
            )
        return found

    def _names_of(self, name: str) -> set[str]:
        """What a user may call a weight: by the last part of its name; experts that are adapted by their old names."""
        if self.adapts_experts and name in ("gate_up_proj", "experts.down_proj"):
            return set(self.expert_names[:2] if name == "gate_up_proj" else self.expert_names[2:])
        return {name.rsplit(".", 1)[-1]}

    def adapter_shapes(self, lora: Lora, *, reached: bool = False) -> list[tuple[str, int, int]]:
        """As in the base class."""
        if beyond := OUTSIDE_OF_LAYERS & asked_names(lora):
            raise NotDescribed(f"the analytic estimate does not describe adapters of {', '.join(sorted(beyond))}")
        targets, counts = set(self.targets(lora)), {}
        for weights in (self.outside, *(plan.weights for plan in self.plans)):
            for weight in weights:
                if weight.name not in targets or not weight.takes_adapter(self.adapts_experts):
                    continue
                if reached and not weight.reached:
                    continue
                for part, elements in self._adapter(weight, lora.rank):
                    key = f"{weight.name} {part}", elements
                    counts[key] = counts.get(key, 0) + 1
        return [(*key, times) for key, times in counts.items()]

    def _adapter(self, weight: Weight, rank: int) -> tuple[tuple[str, int], tuple[str, int]]:
        if weight.group == "experts":
            experts, outputs, inputs = (self.value(symbol) for symbol in weight.dims)
            rank *= experts * (2 if weight.name == "gate_up_proj" else 1)
        else:
            outputs, inputs = (self.value(symbol) for symbol in weight.dims)
        return ("A", rank * inputs), ("B", rank * outputs)
