"""The analytic estimate: one training step from the configuration alone, every term by name, without torch.

Weights, gradients and optimizer states are sums over the decoder's matrices (:mod:`state`). Activations follow from the
rules of automatic differentiation (:mod:`graph`): an operation keeps for its backward what its derivative needs. So the
layers are written down as transformers computes them, in operations on *sizes* (:mod:`layers`, :mod:`attention`,
:mod:`experts`, and the step around them, :mod:`step`); terms come out as formulas such as ``2·t·h``, and the phases'
peaks as sums of terms (:mod:`ledger`).

Symbols in formulas: t tokens in the micro-batch, s sequence length, b rows, h hidden, i intermediate, d head size, H
heads, a = H·d, k key-value heads x head size, V vocabulary, p positions, r rank, E experts, e experts of a token,
n target tokens, c of them in a chunk, W an attention kernel's workspace; s32, s128 and d32 are rounded up as kernels
do; the leading factor is bytes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from will_it_fit.analytic.decoder import described
from will_it_fit.analytic.setting import Setting, check_described
from will_it_fit.analytic.step import TrainingStep
from will_it_fit.engine.cuda_rules import DEFAULT_CAPABILITY, Capability
from will_it_fit.scenario.scenario import Scenario


def analytic_estimate(
    scenario: Scenario, where: object = "scenario", *, capability: Capability | None = None, blocks: bool = True
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
        ``components`` (:mod:`will_it_fit.engine.components`) and ``terms``, the largest first, each with its
        ``component``, ``what`` it is for, ``formula``, ``times`` and ``bytes`` of all of them; ``parameters`` by group.

    Raises
    ------
    NotDescribed
        For an architecture or a setting that the estimate knows nothing of, with the reason.
    UserError
        For a scenario that can't be, such as target modules that the model doesn't have.
    """
    decoder = described(scenario, where)
    check_described(scenario)
    step = TrainingStep(Setting(decoder, scenario, capability or DEFAULT_CAPABILITY), blocks=blocks).run()
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
        "terms": sorted(terms, key=lambda term: -term["bytes"]),
        "parameters": decoder.parameter_counts(),
    }
