"""Decoders whose layers are of several kinds: every weight of every layer by name and size.

Their steps have no closed form: records and the trace answer them. What their weights say is asked for without torch
too: how many parameters there are, what adapters may be on, how large these are.
:mod:`dryfit.analytic.hybrid_weights` has the families.
"""

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dryfit.analytic.decoder import OUTSIDE_OF_LAYERS, NotDescribed, asked_names
from dryfit.common.errors import UserError
from dryfit.scenario.value_fields import Lora

FP32 = "fp32"  # a group of weights: kept so, whatever the model is loaded in


@dataclass(frozen=True)
class Weight:
    """A weight: its name, its group (:meth:`Decoder.weight_shapes`) and its dimensions, outputs before inputs.

    Those of the group ``linear`` are quantized; ``adapted``: whether they get an adapter where all linear layers do.
    ``bias``: whether there is one of the first dimension.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    bias: bool = False
    adapted: bool = True


@dataclass(frozen=True)
class Hybrid:
    """A decoder by the weights of its layers."""

    layers: tuple[tuple[Weight, ...], ...]
    # Weights beside those of the layers: embedding, last norm, output head if it is not tied, and others
    outside: tuple[Weight, ...]
    # What targets of adapters call an expert's gate, up and down matrices, where PEFT adapts experts; else empty
    expert_names: tuple[str, ...] = ()

    def _weights(self) -> Iterator[Weight]:
        for weights in (self.outside, *self.layers):
            yield from weights

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by group, and ``total``; ``linear`` is what 4-bit quantization packs."""
        counts: Counter[str] = Counter()
        for weight in self._weights():
            counts[weight.group] += prod(weight.shape)
            if weight.bias:
                counts["biases"] += weight.shape[0]
        return {**counts, "total": counts.total()}

    def targets(self, lora: Lora, where: object = "lora.target_modules") -> tuple[str, ...]:
        """Names of the weights that get adapters.

        UserError: if a name matches nothing, or with dropout on experts.
        """
        names = dict.fromkeys(
            weight.name for weight in self._weights() if self._takes_adapter(weight)
        )
        adapted = {weight.name for weight in self._weights() if weight.adapted}
        wanted, every = asked_names(lora), lora.target_modules == "all-linear"
        found = tuple(
            name for name in names if name in adapted and (every or wanted & self._called(name))
        )
        problem, near = None, []
        if not found and not wanted & OUTSIDE_OF_LAYERS:
            problem = "`lora.target_modules` matches no linear layer of this model."
            near = [
                n
                for name in sorted(wanted)
                for n in difflib.get_close_matches(name, sorted(names), n=1)
            ]
        elif (
            lora.dropout
            and self.expert_names
            and {"gate", "gate_up_proj", "experts.down_proj"} & set(found)
        ):
            problem = (
                "PEFT has no dropout for adapters of experts, which are parameters and no layers."
            )
        if problem:
            raise UserError(
                problem,
                where=where,
                found=lora.target_modules if not lora.dropout else {"dropout": lora.dropout},
                allowed=f"all-linear, or a list of {', '.join(sorted(names))}",
                change={"lora": {"target_modules": near or "all-linear"}},
            )
        return found

    def adapter_parameters(self, lora: Lora) -> int:
        """Trainable parameters of the adapters: A is rank x inputs, B is outputs x rank, of experts a pair each.

        Where two of an expert's matrices are one parameter it has twice the rank.

        NotDescribed: with adapters of embeddings or of the output head.
        """
        if beyond := OUTSIDE_OF_LAYERS & asked_names(lora):
            raise NotDescribed(
                f"the analytic estimate does not describe adapters of {', '.join(sorted(beyond))}"
            )
        targets, count = set(self.targets(lora)), 0
        for weight in self._weights():
            if weight.name in targets and self._takes_adapter(weight):
                rank = lora.rank
                if weight.group == "experts":
                    rank *= weight.shape[0] * (2 if weight.name == "gate_up_proj" else 1)
                count += rank * sum(weight.shape[-2:])
        return count

    def _takes_adapter(self, weight: Weight) -> bool:
        """Whether PEFT can adapt it: linear layers, and parameters of experts in some families."""
        of_experts = weight.name in ("gate", "gate_up_proj", "experts.down_proj")
        return weight.group == "linear" or bool(self.expert_names and of_experts)

    def _called(self, name: str) -> set[str]:
        """What a user may call a weight: by the last part of its name; experts that are adapted by their old names."""
        if self.expert_names and name in ("gate_up_proj", "experts.down_proj"):
            return set(self.expert_names[:2] if name == "gate_up_proj" else self.expert_names[2:])
        return {name.rsplit(".", 1)[-1]}
