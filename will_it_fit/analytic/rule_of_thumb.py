"""The arithmetic that people quote: bytes per parameter, and round numbers for the rest.

It is the framework of the project's first memory profile (parameters + gradients + optimizer states + activations +
overhead, 1 GB = 1e9 bytes, sequences of 512 tokens), kept as it was so that the better figures can be set beside it.
It knows neither the vocabulary nor the length; :mod:`will_it_fit.analytic.estimate` does. Over several GPUs it is
divided as people divide it, each GPU's activations and overhead being its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Any

from will_it_fit.engine.components import ACTIVATIONS, ADAPTERS, GRADIENTS, OPTIMIZER_STATES, OVERHEAD, WEIGHTS
from will_it_fit.scenario import strategies
from will_it_fit.scenario.scenario import Scenario

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
        weights = ceil(Fraction(parameters * bits, 8) / GB) * GB if method == "qlora" else width * parameters
        adapters = round(LORA_SHARE * parameters * LORA_BYTES / (GB // 100)) * (GB // 100)
        parts = {WEIGHTS: weights, ADAPTERS: adapters}
        activations = ACTIVATION_BYTES[2] if method == "qlora" else ACTIVATION_BYTES[width]
    return {**parts, ACTIVATIONS: activations, OVERHEAD: OVERHEAD_BYTES[method]}


def on_each(parts: Mapping[str, int], strategy: str, gpus: int) -> dict[str, int]:
    """One GPU's share of the memory by component."""
    divided = [name for part in strategies.STRATEGIES[strategy].divides for name in PARTS[part]]
    return {name: ceil(Fraction(size, gpus)) if name in divided else size for name, size in parts.items()}


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
        parts = on_each(parts, scenario.parallel.strategy, scenario.parallel.gpus)
        answers.append({"parameters": count, "components": parts, "peak_allocated_bytes": sum(parts.values())})
    return {**answers[0], "exact_count": answers[1]}
