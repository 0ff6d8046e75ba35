"""Decoders whose layers are of several kinds, from the configuration alone: every weight of every layer by name.

A layer is a *mixer* of tokens and an MLP. Mixers: attention with heads of its own, latent attention, linear attention by
the delta rule, state spaces, short convolutions. :mod:`will_it_fit.analytic.mixers` says what they do in a step.

Symbols beside those of :mod:`will_it_fit.analytic.decoder`:

====  =====================================================
m, S  width of one expert, and of what every token goes through beside the experts
E, e  experts, and those of a token
x, y  linear attention: elements of a token's keys, and of its values; of a state space: of its inner width
X     its keys, repeated for the heads of its values
N     its heads; u, w: their keys' size and values' size
G     groups x states of a state space; n its state
A, B  queries and keys of a second kind of attention, whose heads are D large, and J share keys
q, l  latent attention: width of queries, of keys and values; P: of both and what is rotated
====  =====================================================

Source: transformers 5.24, models/<model_type>/modeling_<model_type>.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from will_it_fit.analytic.decoder import OUTSIDE_OF_LAYERS, Decoder, Heads, Matrix, NotDescribed, asked_names
from will_it_fit.analytic.families import Family
from will_it_fit.analytic.parameters import Sizes, kinds_of_layers
from will_it_fit.common.errors import UserError
from will_it_fit.scenario.nested_fields import Lora

FP32 = "fp32"  # a group of weights: kept so, whatever the model is loaded in


@dataclass(frozen=True)
class Weight:
    """A weight of a layer: its name, its group (:meth:`Decoder.weight_shapes`) and its dimensions by symbols.

    Those of the group ``linear`` are quantized; ``adapted``: whether they get an adapter where all linear layers do.
    ``bias``: whether there is one of the first dimension.
    """

    name: str
    group: str
    dims: tuple[str, ...]
    bias: bool = False
    adapted: bool = True

    def takes_adapter(self, family: Family) -> bool:
        """Whether PEFT can adapt it: linear layers, and parameters of experts in some families."""
        experts = bool(family.experts) and self.name in ("gate", "gate_up_proj", "experts.down_proj")
        return self.group == "linear" or experts


@dataclass(frozen=True)
class Plan:
    """A layer: what it does, by the names of functions of :mod:`mixers`, and its weights in order."""

    mixer: str
    mlp: str
    weights: tuple[Weight, ...]
    heads: Heads = Heads()
    options: frozenset[str] = frozenset()  # what a mixer does beside


@dataclass(frozen=True)
class Hybrid(Decoder):
    """A decoder by the plans of its layers."""

    plans: tuple[Plan, ...] = ()  # type: ignore[assignment]
    outside: tuple[Weight, ...] = ()  # beside embedding, head and last norm
    chunk: int = 64  # tokens of a chunk of linear attention or of a state space
    kernel: int = 4  # tokens that a convolution looks at
    packages: frozenset[str] = frozenset()  # whose kernels the model's code takes where it can

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
    def period(self) -> tuple[int, int]:
        """Layers before the first repetition, and layers of one: the choice that repeats most."""
        count = len(self.plans)
        best = (0, 0, 1)
        for length in range(1, count // 4 + 1):
            same = [self.plans[at] == self.plans[at + length] for at in range(count - length)]
            run = 0
            for at, alike in enumerate([*same, False]):
                if not alike and run:
                    best = max(best, (run // length * length, -(at - run), -length), key=lambda one: (one[0], one[2]))
                run = run + 1 if alike else 0
        return (-best[1], -best[2]) if best[0] else (0, max(count, 1))

    def of_step(self, length: int, rows: int) -> dict[str, int]:
        """Tokens rounded up to whole chunks, chunks, and what a convolution adds to both ends."""
        chunks = -(-length // self.chunk)
        return {
            "tc": rows * chunks * self.chunk,
            "bc": rows * self.chunk,
            "nc": rows * chunks,
            "C": self.chunk,
            "z": rows * (length + self.kernel - 1),
            "f": self.kernel,
        }

    def weight_shapes(self) -> list[tuple[str, int, str, int]]:
        """As in the base class; the places of weights are their names."""
        counts: dict[tuple[str, int, str], int] = {}
        for group, elements, name in self._each():
            counts[group, elements, name] = counts.get((group, elements, name), 0) + 1
        return [(*one, times) for one, times in counts.items()]

    def arrivals(self, first: bool = False) -> list[tuple[str, int]]:
        """As in the base class."""
        return [(group, elements) for group, elements, _ in self._each()]

    def _each(self) -> Iterator[tuple[str, int, str]]:
        """Every parameter as (group, elements, name)."""
        hidden = self.sizes["h"]
        yield "embeddings", self.sizes["V"] * hidden, "embedding"
        yield from self._sized(self.outside)
        for plan in self.plans:
            yield from self._sized(plan.weights)
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
            If a name matches nothing.
        """
        weights = [w for plan in self.plans for w in plan.weights] + list(self.outside)
        names = dict.fromkeys(w.name for w in weights if w.takes_adapter(self.family))
        if lora.target_modules == "all-linear":
            return tuple(name for name in names if any(w.name == name and w.adapted for w in weights))
        wanted = asked_names(lora)
        found = tuple(name for name in names if name.rsplit(".", 1)[-1] in wanted)
        if not found and not wanted & OUTSIDE_OF_LAYERS:
            near = [near for name in wanted for near in difflib.get_close_matches(name, sorted(names), n=1)]
            raise UserError(
                "`lora.target_modules` matches no linear layer of this model.",
                where=where,
                found=lora.target_modules,
                allowed=f"all-linear, or a list of {', '.join(sorted(names))}",
                change={"lora": {"target_modules": near or "all-linear"}},
            )
        return found

    def adapter_shapes(self, lora: Lora) -> list[tuple[str, int, int]]:
        """As in the base class."""
        if beyond := OUTSIDE_OF_LAYERS & asked_names(lora):
            raise NotDescribed(f"the analytic estimate does not describe adapters of {', '.join(sorted(beyond))}")
        targets, counts = set(self.targets(lora)), {}
        for weights in (self.outside, *(plan.weights for plan in self.plans)):
            for weight in weights:
                if weight.name not in targets or not weight.takes_adapter(self.family):
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


# --- parts that families share --------------------------------------------------------------------------------------


def _linear(name: str, outputs: str, inputs: str = "h", *, bias: bool = False, adapted: bool = True) -> Weight:
    return Weight(name, "linear", (outputs, inputs), bias, adapted)


def _norm(name: str, size: str = "h") -> Weight:
    return Weight(name, "norms", (size,))


def _projections(
    heads: Heads, *, gated: bool = False, qkv: bool = False, output: bool = False, last: str = "o_proj"
) -> tuple[Weight, ...]:
    """Queries, keys and values, and the way back; ``gated``: the queries' matrix brings a gate too."""
    queries = f"{heads.queries}+{heads.queries}" if gated else heads.queries
    return (
        _linear("q_proj", queries, bias=qkv),
        _linear("k_proj", heads.keys, bias=qkv),
        _linear("v_proj", heads.values, bias=qkv),
        _linear(last, "h", heads.out, bias=output),
    )


def _head_norms(head: str = "d", queries: str = "q_norm", keys: str = "k_norm") -> tuple[Weight, ...]:
    return _norm(queries, head), _norm(keys, head)


def _mlp(width: str = "i", prefix: str = "", *, adapted: bool = True, names: str = "gate_proj up_proj down_proj"):
    gate, up, down = names.split()
    return (
        _linear(prefix + gate, width, adapted=adapted),
        _linear(prefix + up, width, adapted=adapted),
        _linear(prefix + down, "h", width, adapted=adapted),
    )


def _experts(router: Weight, *, gated: bool = True) -> tuple[Weight, ...]:
    width = "m+m" if gated else "m"
    up = Weight("gate_up_proj" if gated else "experts.up_proj", "experts", ("E", width, "h"))
    return router, up, Weight("experts.down_proj", "experts", ("E", "h", "m"))


_BOTH_NORMS = (_norm("input_layernorm"), _norm("post_attention_layernorm"))


def _grouped_sizes(c: Sizes) -> dict[str, int]:
    """Symbols of attention, MLP and the ends of the model."""
    head, heads = c.head(), c.num_attention_heads
    groups = c.get("num_key_value_heads", None) or heads
    sizes = {"h": c.hidden_size, "V": c.vocab_size, "L": c.num_hidden_layers, "d": head, "H": heads, "K": groups}
    return sizes | {"a": heads * head, "k": groups * head, "i": c.get("intermediate_size", None) or 0}


def _delta_sizes(c: Sizes) -> dict[str, int]:
    heads, keys = c.linear_num_value_heads, c.linear_num_key_heads
    u, w = c.linear_key_head_dim, c.linear_value_head_dim
    return {"N": heads, "u": u, "w": w, "x": keys * u, "X": heads * u, "y": heads * w}


def _hybrid(
    c: Sizes, plans: Sequence[Plan], sizes: Mapping[str, int], *, family: Family, tied: bool = False, **others: Any
) -> Hybrid:
    kind = c.model["model_type"]
    return Hybrid(
        family=family,
        model_type=kind,
        sizes=sizes,
        attention=(),
        mlp=(),
        tied=bool(c.get("tie_word_embeddings", tied)),
        activation=str(c.get("hidden_act", None) or c.get("hidden_activation", "silu")),
        qk_norm=False,
        rotary=others.pop("rotary", 1.0),
        softcap=False,
        logit_softcap=bool(c.get("final_logit_softcapping", None)),
        embedding_dropout=0.0,
        residual_dropout=0.0,
        attention_dropout=float(c.get("attention_dropout", 0.0)),
        positions=0,
        window=0,
        experts=sizes.get("E", 0),
        plans=tuple(plans),
        **others,
    )


def _partial(c: Sizes, usual: float = 1.0) -> float:
    """The share of a head that is rotated."""
    rope = c.get("rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor", c.get("partial_rotary_factor", usual)))


# --- families -------------------------------------------------------------------------------------------------------


def _qwen(c: Sizes) -> Hybrid:
    """Qwen3-Next, Qwen3.5: three layers of linear attention by the gated delta rule, one of gated attention."""
    old, routed = c.model["model_type"] == "qwen3_next", c.get("num_experts", None) is not None
    projected = (
        (_linear("in_proj_qkvz", "x+x+y+y"), _linear("in_proj_ba", "N+N"))
        if old
        else (
            _linear("in_proj_qkv", "x+x+y"),
            _linear("in_proj_z", "y"),
            _linear("in_proj_b", "N"),
            _linear("in_proj_a", "N"),
        )
    )
    delta = (
        *(Weight(name, "other", ("N",)) for name in ("dt_bias", "A_log")),
        Weight("conv1d", "other", ("x+x+y", "f")),
        Weight("norm", "norms", ("w",)),
        *projected,
        _linear("out_proj", "h", "y"),
    )
    attention = (*_projections(Heads(), gated=True), *_head_norms())
    sizes = _grouped_sizes(c) | _delta_sizes(c)
    if routed:
        mlp = (*_experts(Weight("gate", "router", ("E", "h"))), *_mlp("S", "shared_expert."))
        mlp += (_linear("shared_expert_gate", "1"),)
        sizes |= {"E": c.num_experts, "e": c.num_experts_per_tok, "m": c.moe_intermediate_size}
        sizes |= {"S": c.shared_expert_intermediate_size}
    else:
        mlp = _mlp()
    kinds = {
        "linear_attention": Plan("delta", "routed" if routed else "gated", (*delta, *mlp, *_BOTH_NORMS)),
        "full_attention": Plan(
            "grouped",
            "routed" if routed else "gated",
            (*attention, *mlp, *_BOTH_NORMS),
            options=frozenset({"gated", "normed"}),
        ),
    }
    sizes |= {"f": c.get("linear_conv_kernel_dim", 4), "1": 1}
    return _hybrid(
        c,
        [kinds[kind] for kind in kinds_of_layers(c)],
        sizes,
        family=Family({}, norm="gemma"),
        rotary=_partial(c, 0.25),
        kernel=c.get("linear_conv_kernel_dim", 4),
        packages=frozenset({"fla", "causal-conv1d"}),
    )


_HYBRIDS: dict[str, Callable[[Sizes], Hybrid]] = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _qwen),
}


def hybrid(model: Mapping[str, Any]) -> Hybrid:
    """Describe a decoder of several kinds of layers.

    Raises
    ------
    NotDescribed
        For a family that is not known here, or a configuration that leaves a size out.
    """
    kind = model["model_type"]
    if kind not in _HYBRIDS:
        raise NotDescribed(f"the analytic estimate does not describe the architecture {kind}")
    return _HYBRIDS[kind](Sizes(model))
