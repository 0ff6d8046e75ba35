"""Whether packed rows are computed as if each were alone: tested on the very model before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.batches import IGNORED, Row
from dryfit.step.model import autocast_dtype, weight_dtype
from dryfit.step.packing import Pack, collate_packs, is_of_the_device, refusal
from dryfit.step.parallel import bare, full_tensor
from dryfit.step.quantized import without_noise
from dryfit.step.step import forward_backward

# How far packed rows may be from the rows alone, as a share of the loss and of the gradient's norm. A mask or a
# position that went unheeded is off by more, rounding by less.
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-2, 2e-1), torch.float16: (1e-2, 5e-2)}


def self_test(
    model: nn.Module, scenario: Scenario, rows: Sequence[Row], prefix: int, pad_token_id: int
) -> dict:
    """Two rows packed against each of them alone, on the very model that is to be trained.

    Returns
    -------
    dict
        ``loss_difference`` and ``gradient_difference``, each as a share of the rows' own.

    Raises :class:`UserError` when the architecture refuses packs, or computes something else for them.
    """
    config = bare(model).config
    kind = config.get_text_config().model_type
    if getattr(config, "output_router_logits", False):
        raise refusal(
            kind,
            "its auxiliary loss counts the tokens that go to each expert, and a pack has others",
        )
    noisy = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and module.p
    ]
    if noisy and scenario.packing == "shared_prefix":
        raise refusal(
            kind,
            f"all rows of a pack would share the noise of its dropout ({noisy[0]}) on their prefix",
        )
    device = next(model.parameters()).device
    chosen = sorted(rows, key=lambda row: len(row.input_ids))
    pair = [chosen[0], chosen[-1]]
    learned = [sum(label != IGNORED for label in row.labels[1:]) for row in pair]

    def run(
        packs: list[list[Pack]], how: Scenario, shared: int
    ) -> tuple[float, list[torch.Tensor]]:
        loss = 0.0
        for pack in packs:
            batch = collate_packs(pack, how, shared, pad_token_id, config, device)
            share = sum(learned) if len(packs) == 1 else learned[pair.index(pack[0][0])]
            share /= sum(learned)
            loss += share * float(forward_backward(model, batch, how, loss_scale=share))
        gradients = [
            full_tensor(parameter.grad)
            for parameter in model.parameters()
            if parameter.grad is not None
        ]
        model.zero_grad(set_to_none=True)
        return loss, gradients

    with without_noise(bare(model)):
        expected, single = run([[[row]] for row in pair], replace(scenario, packing="none"), 0)
        try:
            loss, packed = run([[pair]], scenario, prefix)
        except UserError:
            raise
        except Exception as error:  # architectures refuse masks and positions each in their own way
            if is_of_the_device(error):
                raise
            raise refusal(
                kind, f"it takes no mask of rows ({type(error).__name__}: {str(error)[:200]})"
            ) from None
        finally:
            model.zero_grad(set_to_none=True)
    norm = sum(float(gradient.double().norm() ** 2) for gradient in single) ** 0.5
    apart = sum(
        float((one.double() - other.double()).norm() ** 2)
        for one, other in zip(single, packed, strict=True)
    )
    result = {
        "gradient_difference": apart**0.5 / norm if norm else 0.0,
        "loss_difference": abs(loss - expected) / abs(expected),
    }
    loss_tolerance, gradient_tolerance = TOLERANCE[
        autocast_dtype(scenario) or weight_dtype(scenario)
    ]
    if not (
        result["loss_difference"] <= loss_tolerance
        and result["gradient_difference"] <= gradient_tolerance
    ):
        raise refusal(
            kind,
            f"two rows in one sequence give the loss {loss:.6g}, each alone {expected:.6g}"
            f" (gradients {result['gradient_difference']:.1e} apart): it looks beyond a row, or not at its positions",
        )
    return result
