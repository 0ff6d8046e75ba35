"""What a decoder consists of, from its configuration alone: every matrix by name and size, without torch.

One description serves all families. What differs between them (which projections have a bias, how many norms a layer
has, whether gate and up are one matrix) stands in :data:`FAMILIES`, a table with the defaults of transformers'
configuration classes, since a configuration may leave a size out.

Symbols, as the formulas of the analytic estimate use them:

====  =====================================================
h     hidden size
i     intermediate size of the MLP (of one expert)
a     attention heads x head size
k     key-value heads x head size
V     vocabulary
L     layers
====  =====================================================
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from dryfit.analytic.families import Family
from dryfit.common.errors import UserError
from dryfit.scenario.value_fields import Lora

# What adapters may also be on, by the last part of its name, in the families below.
OUTSIDE_OF_LAYERS = {"embed_tokens", "lm_head", "wpe", "wte"}


class NotDescribed(Exception):
    """Why there is no analytic estimate of a scenario; the trace then answers alone."""


@dataclass(frozen=True)
class Matrix:
    """A linear layer: ``outputs`` x ``inputs`` symbols, with a bias or without."""

    name: str
    outputs: str
    inputs: str
    bias: bool = False


@dataclass(frozen=True)
class Decoder:
    """A decoder by its sizes: what its layers hold and what they do."""

    family: Family
    model_type: str
    sizes: Mapping[
        str, int
    ]  # the symbols h, i, a, k, V, L, and H heads, K key-value heads, d head size
    attention: tuple[Matrix, ...]
    mlp: tuple[Matrix, ...]
    tied: bool
    activation: str
    qk_norm: bool
    rotary: float
    softcap: bool  # of the attention scores
    logit_softcap: bool
    embedding_dropout: float
    residual_dropout: float
    attention_dropout: float
    positions: int
    window: int  # tokens that attention looks back in some layers at least; 0: all
    experts: int

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The linear layers of one decoder layer, in order."""
        return self.attention + self.mlp

    def value(self, symbol: str) -> int:
        """A symbol's number; ``k+a`` is a sum."""
        return sum(self.sizes[part] for part in symbol.split("+"))

    def elements(self, matrix: Matrix) -> int:
        """Elements of a linear layer's weight."""
        return self.value(matrix.outputs) * self.value(matrix.inputs)

    def weight_shapes(self) -> list[tuple[str, int, str, int]]:
        """Every base parameter as (group, elements, where, how many such).

        ``group`` is one of ``embeddings``, ``output_head``, ``linear`` (what 4-bit quantization packs), ``biases``,
        ``norms``, ``experts``, ``router``; ``where`` names it. A tied head is the embedding and not listed.
        """
        layers, family, h = self.sizes["L"], self.family, self.sizes["h"]
        shapes = [("embeddings", self.sizes["V"] * h, "embedding", 1)]
        if self.positions:
            shapes.append(("embeddings", self.positions * h, "position embedding", 1))
        for matrix in self.matrices:
            shapes.append(("linear", self.elements(matrix), matrix.name, layers))
            if matrix.bias:
                shapes.append(("biases", self.value(matrix.outputs), f"{matrix.name} bias", layers))
        if self.experts:
            one = self.sizes["i"] * h
            shapes.append(("experts", self.experts * 2 * one, "experts gate_up_proj", layers))
            shapes.append(("experts", self.experts * one, "experts down_proj", layers))
            shapes.append(("router", self.experts * h, "router", layers))
        parts = 2 if family.norm_bias else 1
        shapes.append(("norms", h, "norm", layers * family.norms * parts))
        if self.qk_norm:
            shapes.append(("norms", self.sizes["d"], "query and key norm", layers * 2 * parts))
        shapes.append(("norms", h, "final norm", parts))
        if not self.tied:
            shapes.append(("output_head", self.sizes["V"] * h, "output head", 1))
        if family.head_bias:
            shapes.append(("biases", self.sizes["V"], "output head bias", 1))
        return shapes

    def arrivals(self, attention_first: bool) -> list[tuple[str, int]]:
        """Every base parameter as (group, elements), in the order in which loading brings them: of their names.

        ``mlp`` comes before ``self_attn``, but GPT's ``attn`` and ``attention`` before ``mlp``.
        """
        layers, once, each = self.sizes["L"], [], []
        for group, elements, name, times in self.weight_shapes():
            if group in ("embeddings", "output_head") or name in ("final norm", "output head bias"):
                once += [(name, group, elements)] * times
            else:
                each.append((name, group, elements, times // layers))
        attention = {matrix.name for matrix in self.attention}
        each.sort(
            key=lambda item: (
                (item[0].removesuffix(" bias") in attention) != attention_first,
                item[0],
                item[2],
            )
        )
        once.sort(key=lambda item: item[0] != "output head")
        one_layer = [(group, elements) for _, group, elements, times in each for _ in range(times)]
        return [(group, elements) for _, group, elements in once] + one_layer * layers

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by group, and ``total``; ``linear`` is what 4-bit quantization packs."""
        counts: dict[str, int] = {}
        for group, elements, _, times in self.weight_shapes():
            counts[group] = counts.get(group, 0) + elements * times
        return {**counts, "total": sum(counts.values())}

    def targets(self, lora: Lora, where: object = "lora.target_modules") -> tuple[str, ...]:
        """Names of what gets adapters in one decoder layer.

        Linear layers by their own names; of a mixture of experts also ``gate``, ``gate_up_proj`` and ``down_proj``, the
        parameters that PEFT adapts where all linear layers, or the names that the experts once had, are asked for
        (peft 0.21, utils/transformers_weight_conversion.py).

        UserError: if a name matches nothing, or half of what experts hold in one parameter, or with dropout on experts.
        """
        names = {matrix.name: matrix.name for matrix in self.matrices}
        if self.experts:
            gate, up, down = self.family.expert_names
            names |= {"gate": "gate", gate: "gate_up_proj", up: "gate_up_proj", down: "down_proj"}
        wanted = set(names) if lora.target_modules == "all-linear" else asked_names(lora)
        matrices = tuple(dict.fromkeys(name for alias, name in names.items() if alias in wanted))
        problem = None
        if not matrices and not wanted & OUTSIDE_OF_LAYERS:
            problem = "`lora.target_modules` matches no linear layer of this model."
        elif self.experts and len(wanted & {gate, up}) == 1:
            problem = f"The experts' {gate} and {up} are one parameter, which has one adapter: both or none."
        elif (
            self.experts and lora.dropout and {"gate", "gate_up_proj", "down_proj"} & set(matrices)
        ):
            problem = (
                "PEFT has no dropout for adapters of experts, which are parameters and no layers."
            )
        if problem:
            near = [
                n
                for name in sorted(wanted)
                for n in difflib.get_close_matches(name, sorted(names), n=1)
            ]
            targets = list(dict.fromkeys(near)) if near and not matrices else "all-linear"
            raise UserError(
                problem,
                where=where,
                found=lora.target_modules if not lora.dropout else {"dropout": lora.dropout},
                allowed=f"all-linear, or a list of {', '.join(sorted(names))}",
                change={"lora": {"target_modules": targets}},
            )
        return matrices

    def adapter_shapes(self, lora: Lora) -> list[tuple[str, int, int]]:
        """Adapter matrices as (where, elements, how many such): A is rank x inputs, B is outputs x rank.

        Experts have one pair each; where two of their matrices are one parameter it has twice the rank.

        NotDescribed: with adapters of embeddings or of the output head.
        """
        if beyond := OUTSIDE_OF_LAYERS & asked_names(lora):
            raise NotDescribed(
                f"the analytic estimate does not describe adapters of {', '.join(sorted(beyond))}"
            )
        layers, rank, targets = self.sizes["L"], lora.rank, self.targets(lora)
        shapes = [
            (f"{matrix.name} {part}", rank * self.value(symbol), layers)
            for matrix in self.matrices
            if matrix.name in targets
            for part, symbol in (("A", matrix.inputs), ("B", matrix.outputs))
        ]
        if self.experts:
            h, i, experts = self.sizes["h"], self.sizes["i"], self.experts
            pairs = {
                "gate_up_proj": (2 * rank * experts, h, 2 * i),
                "down_proj": (rank * experts, i, h),
                "gate": (rank, h, experts),
            }
            for name, (inner, inputs, outputs) in pairs.items():
                if name in targets:
                    shapes += [
                        (f"experts {name} A", inner * inputs, layers),
                        (f"experts {name} B", inner * outputs, layers),
                    ]
        return shapes

    def adapter_parameters(self, lora: Lora) -> int:
        """Trainable parameters of the adapters."""
        return sum(elements * times for _, elements, times in self.adapter_shapes(lora))


def asked_names(lora: Lora) -> set[str]:
    """Last parts of the names that are listed; empty for all-linear."""
    listed = () if lora.target_modules == "all-linear" else lora.target_modules
    return {name.rsplit(".", 1)[-1] for name in listed}
