"""DPO and ORPO on several GPUs, by rules: a supervised step of both answers, and the reference model's part beside it.

TRL's trainers run under a strategy only in a group of processes, which a trace has no data for. What decides their
memory is public. ``trl/trainer/dpo_trainer.py`` (1.16) sends chosen and rejected answers through the model as rows of
one batch, and takes their log-probabilities with TRL's fused head, which keeps no whole logits.
``trl/experimental/orpo/orpo_trainer.py`` keeps them. A reference is a second model (``prepare_deepspeed`` and
``prepare_fsdp`` in ``trl/models/utils.py``): divided as the first under ZeRO-3 and FSDP, whole on each GPU otherwise,
without an optimizer. Its pass has no gradients, and ends before the policy's backward pass begins.
"""

from __future__ import annotations

import torch
from torch import nn

from dryfit.scenario.objectives import SUPERVISED
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import WEIGHTS
from dryfit.step.adapters import DTYPES
from dryfit.step.model import skeleton


def as_rows(scenario: Scenario) -> Scenario:
    """The supervised step that has the memory of a step of pairs, but for the reference."""
    gathers = WEIGHTS in scenario.parallel.kind.divides and scenario.parallel.zero_stage != 3
    whole = scenario.objective != "dpo" or gathers or scenario.experts.router_loss
    rows = scenario.micro_batch * scenario.aim.texts_in_a_row
    return scenario.changed(
        objective=SUPERVISED, preference=None, micro_batch=rows, loss="full" if whole else "chunked"
    )


def reference_beside(scenario: Scenario) -> list[nn.Module]:
    """What a reference model's weights take of one GPU, as a model of one tensor; none where there is no such model."""
    wanted = scenario.preference.reference
    known = wanted == "model" or (wanted is None and scenario.method == "full")
    if not known or "model" not in scenario.aim.references:
        return []
    zero, parallel = scenario.parallel.zero_stage, scenario.parallel
    if zero == 3 and scenario.zero_settings.offload_param == "cpu":
        return []
    numbers = sum(parameter.numel() for parameter in skeleton(scenario).parameters())
    if WEIGHTS in parallel.kind.divides:
        numbers = -(-numbers // parallel.gpus)
    # DeepSpeed's engine casts weights to the dtype that it computes in; elsewhere they keep the policy's.
    kind = (zero and scenario.autocast_precision) or scenario.weight_precision
    model = nn.Module()
    model.reference = nn.Parameter(
        torch.empty(numbers, dtype=DTYPES[kind], device="meta"), requires_grad=False
    )
    return [model]


def notes(scenario: Scenario) -> list[str]:
    """For people: what stands for TRL's trainer."""
    own = f"the step is a supervised one of {scenario.aim.texts_in_a_row} rows for each pair"
    return [
        f"{own}, with {scenario.objective}'s logits and reference by rules: TRL's trainer is traced on one GPU"
    ]
