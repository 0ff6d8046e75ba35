"""The answers that need no torch: the analytic estimate of a step, every term by name, and the rule of thumb.

Weights, gradients and optimizer states are sums over the decoder's matrices (:mod:`state`). Activations follow from the
rules of automatic differentiation (:mod:`graph`): an operation keeps for its backward what its derivative needs. So the
layers are written down as transformers computes them, in operations on *sizes* (:mod:`layers`, :mod:`experts`; the
step around them: :mod:`step`). Terms come out as formulas such as ``2·t·h``, and the phases' peaks as sums. Of decoders
whose layers are of several kinds only weights are written down (:mod:`hybrids`): records and the trace know their
steps.

Symbols in formulas: t tokens in the micro-batch, s sequence length, b rows, h hidden, i intermediate, d head size, H
heads, a = H·d, k key-value heads x head size, V vocabulary, p positions, r rank, E experts, e experts of a token,
n target tokens, c of them in a chunk, W an attention kernel's workspace; s32, s128 and d32 are rounded up as kernels
do; the leading factor is bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.setting import Setting, check_described, describe, described
from dryfit.cards.gpus import named
from dryfit.derived.step import if_recorded, recorded_with
from dryfit.engine.components import (
    ACTIVATIONS,
    ADAPTERS,
    GRADIENTS,
    OPTIMIZER_STATES,
    OVERHEAD,
    WEIGHTS,
)
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY, WIDTH, Capability
from dryfit.scenario import strategies
from dryfit.scenario.nested_fields import Parallel
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.value_fields import Experts


def analytic_estimate(
    scenario: Scenario,
    where: object = "scenario",
    *,
    capability: Capability | None = None,
    blocks: bool = True,
) -> dict[str, Any]:
    """Memory of a scenario's training step.

    Parameters
    ----------
    scenario
        The step.
    where
        What to call the scenario in messages.
    capability
        Compute capability of the GPU, which decides some kernels.
    blocks
        Whether to run what the formula knows of allocations through the allocator, for the blocks that tensors get
        (a tenth of a second). False: blocks as they are on average, and three layers for all (two milliseconds).

    Returns
    -------
    dict
        ``peak_allocated_bytes`` and the ``phase`` it is in; ``phases`` and ``resident_bytes``; at the peak
        ``components`` (:mod:`dryfit.engine.components`) and ``terms``, the largest first, each with its
        ``component``, ``what`` it is for, ``formula``, ``times`` and ``bytes`` of all of them; ``parameters`` by group.

    Raises
    ------
    NotDescribed
        For an architecture or a setting that the estimate knows nothing of, with the reason.
    UserError
        For a scenario that can't be, such as target modules that the model doesn't have.
    """
    from dryfit.analytic.step import (
        TrainingStep,
    )  # its 1,700 lines serve a step without a record alone

    decoder = described(scenario, where)
    check_described(scenario)
    step = TrainingStep(
        Setting(decoder, scenario, capability or DEFAULT_CAPABILITY), blocks=blocks
    ).run()
    steps = {phase: step.peaks[phase] for phase in ("forward", "backward", "optimizer")}
    phase = max(steps, key=steps.__getitem__)
    terms = [
        {
            "component": term.component,
            "what": term.what,
            "formula": term.formula,
            "times": times,
            "bytes": term.size * times,
        }
        for term, times in step.at_peak[phase].items()
        if times and term.size
    ]
    components: Counter[str] = Counter()
    for term in terms:
        components[term["component"]] += term["bytes"]
    return {
        "peak_allocated_bytes": steps[phase],
        "phase": phase,
        "phases": dict(step.peaks),
        "resident_bytes": step.resident,
        "components": dict(components),
        "terms": sorted(terms, key=lambda term: (-term["bytes"], term["what"], term["formula"])),
        "parameters": decoder.parameter_counts(),
    }


# --- the rule of thumb ----------------------------------------------------------------------------------
# The arithmetic that people quote: bytes per parameter, and round numbers for the rest.
#
# It is the framework of the project's first memory profile (parameters + gradients + optimizer states + activations +
# overhead, 1 GB = 1e9 bytes, sequences of 512 tokens), kept as it was so that the better figures can be set beside it.
# It knows neither the vocabulary nor the length, which the analytic estimate does. Over several GPUs it is divided as
# people divide it: each GPU has activations and overhead of its own.

GB = 10**9
# Bytes: "about 8 GB" for fp32, "about 6 GB" for 16 bits; "about 4 GB" of framework, "about 2 GB" under QLoRA.
ACTIVATION_BYTES = {4: 8 * GB, 2: 6 * GB}
OVERHEAD_BYTES = {"full": 4 * GB, "lora": 4 * GB, "qlora": 2 * GB}
ADAM_STATES = 8  # two fp32 numbers a parameter
LORA_SHARE = Fraction(3, 1000)  # "LoRA trains about 0.3 % of the parameters", whatever the rank
LORA_BYTES = 2 + 2 + ADAM_STATES  # 16-bit weight and gradient, fp32 states
# What is said to be divided by the number of GPUs; DDP divides nothing. Source: Rajbhandari et al., "ZeRO: Memory
# Optimizations Toward Training Trillion Parameter Models", 2020, figure 1; FSDP is quoted as ZeRO's third stage.
PARTS = {
    strategies.WEIGHTS: (WEIGHTS, ADAPTERS),
    strategies.GRADIENTS: (GRADIENTS,),
    strategies.STATES: (OPTIMIZER_STATES,),
}


def components(method: str, width: int, parameters: int, bits: int = 4) -> dict[str, int]:
    """Memory by component in bytes.

    Parameters
    ----------
    width
        Bytes of a weight: 4 for fp32, 2 for 16 bits.
    bits
        Of a quantized weight.
    """
    if method == "full":
        parts = {WEIGHTS: width * parameters, GRADIENTS: width * parameters}
        parts[OPTIMIZER_STATES] = ADAM_STATES * parameters
        activations = ACTIVATION_BYTES[width]
    else:
        # "3.5 GB, rounded to 4 GB"; the adapters' 0.252 GB are written as 0.25.
        weights = (
            ceil(Fraction(parameters * bits, 8) / GB) * GB
            if method == "qlora"
            else width * parameters
        )
        adapters = round(LORA_SHARE * parameters * LORA_BYTES / (GB // 100)) * (GB // 100)
        parts = {WEIGHTS: weights, ADAPTERS: adapters}
        activations = ACTIVATION_BYTES[2] if method == "qlora" else ACTIVATION_BYTES[width]
    return {**parts, ACTIVATIONS: activations, OVERHEAD: OVERHEAD_BYTES[method]}


def on_each(parts: Mapping[str, int], parallel: Parallel) -> dict[str, int]:
    """One GPU's share of the memory by component: FSDP divides, and so do matrices and layers on a mesh."""
    kinds = parallel.kind.divides or (strategies.WEIGHTS, strategies.GRADIENTS, strategies.STATES)
    among = (
        parallel.gpus // parallel.replicate
        if parallel.kind.divides
        else parallel.tensor * parallel.pipeline
    )
    divided = [name for part in kinds for name in PARTS[part]]
    return {
        name: ceil(Fraction(size, among)) if name in divided else size
        for name, size in parts.items()
    }


def quoted_parameters(count: int, name: str | None = None) -> int:
    """The size that people call a model by: the "7b" in its name, or its billions, rounded down.

    A name is believed only if it is within half of the count (vocabularies are left out of some names).
    """
    match = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z0-9])", (name or "").lower())
    if match:
        quoted = int(Fraction(match[1]) * {"b": 10**9, "m": 10**6}[match[2]])
        if count / 2 <= quoted <= count * 1.5:
            return quoted
    return count // GB * GB if count >= 2 * GB else count


def rule_of_thumb(scenario: Scenario, parameters: int) -> dict[str, Any]:
    """The rule for a scenario, on one GPU: with the size that the model is called by, and its exact parameter count."""
    width = 4 if scenario.precision == "fp32" else 2
    bits = 8 if scenario.quantization and scenario.quantization.type == "int8" else 4
    answers = []
    for count in (quoted_parameters(parameters, scenario.model_name), parameters):
        parts = components(scenario.method, width, count, bits)
        parts = on_each(parts, scenario.parallel)
        answers.append(
            {"parameters": count, "components": parts, "peak_allocated_bytes": sum(parts.values())}
        )
    return {**answers[0], "exact_count": answers[1]}


# --- both -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimated:
    """The answers that need no torch.

    Attributes
    ----------
    analytic, rule_of_thumb
        Each with ``peak_allocated_bytes`` and ``components``. The estimate is None where it does not describe the
        architecture or a setting; the rule, too, where not even the parameters are known.
    reason
        Why the estimate is None, else None.
    least_bytes
        Where the estimate is None: what the weights alone take on the GPU for certain; 0: not known.
    """

    scenario: Scenario
    analytic: Mapping[str, Any] | None
    rule_of_thumb: Mapping[str, Any] | None
    reason: str | None = None
    least_bytes: int = 0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "scenario": self.scenario.to_mapping()}


def _by_parameters(scenario: Scenario, reason: str) -> Estimated:
    """What is left where a step is not described: the parameters, where the family is known, and the rule of thumb."""
    from dryfit.analytic.parameters import parameter_count

    try:
        count = parameter_count(scenario.model)
    except NotDescribed:
        return Estimated(scenario, None, None, reason)
    size = weights_bytes(scenario, count)
    known = (
        f"the weights of its {count / 1e9:.2f} billion parameters alone take {size / 2**30:.1f} GiB"
    )
    # Several GPUs may share them, experts may be packed or on the host, and a reward model has another head.
    certain = (
        scenario.parallel.gpus == 1 and scenario.experts == Experts() and not scenario.aim.scores
    )
    least = size if certain else 0
    return Estimated(scenario, None, rule_of_thumb(scenario, count), f"{reason}; {known}", least)


def weights_bytes(scenario: Scenario, count: int) -> int:
    """The least that so many weights take: packed are linear layers, and experts where that is asked for."""
    width, packed = WIDTH[scenario.weight_precision], 0
    if scenario.method == "qlora":
        try:
            counts = describe(scenario.model).parameter_counts()
            packed = counts["linear"] + (
                counts.get("experts", 0) if scenario.experts.quantized != "none" else 0
            )
        except NotDescribed:  # which of them are linear is not known
            packed = count
    bits = 8 if scenario.quantization and scenario.quantization.type == "int8" else 4
    return packed * bits // 8 + (count - packed) * width


def estimate(
    scenario: Scenario, where: object = "scenario", *, blocks: bool = True, recorded: bool = True
) -> Estimated:
    """The analytic estimate on the GPU that a scenario names, and the rule of thumb; ``blocks`` as there.

    Where a record covers the step, the estimate is derived from it and equal to the trace. Then it has
    ``peak_reserved_bytes``, too, and the versions that it was ``recorded_with``. Without ``recorded`` no record is
    asked, whose events take a tenth of a second.
    """
    gpu = named(scenario.gpu, where)
    capability = gpu.capability if gpu else None
    try:
        exact = if_recorded(scenario, capability) if recorded else None
        if exact is not None:
            counts = {"parameters": describe(scenario.model).parameter_counts()}
            analytic = exact.to_mapping() | counts | {"recorded_with": recorded_with(scenario)}
        else:
            analytic = analytic_estimate(scenario, where, capability=capability, blocks=blocks)
    except NotDescribed as error:
        return _by_parameters(scenario, str(error))
    return Estimated(scenario, analytic, rule_of_thumb(scenario, analytic["parameters"]["total"]))
