"""The optimizer of a scenario, over what a model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.engine.building import keep_paged_states_outside
from scripts.settings.scenario import Scenario

Parameters = Sequence[nn.Parameter]


def build_optimizer(
    model: nn.Module,
    scenario: Scenario,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Make the scenario's optimizer over the trainable parameters, with PyTorch's own choice of how it steps."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kind, options = scenario.optimizer, {"lr": learning_rate, "weight_decay": weight_decay}
    if kind == "muon":
        return _muon(model, trained, options)
    return _KINDS[kind](list(trained.values()), **options)


def _adamw(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **options)


def _adamw_fused(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True, foreach=False, **options)


def _adamw_8bit(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


def _paged_adamw_8bit(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW8bit

    device = parameters[0].device.type
    if device == "cpu":
        raise UserError(
            "Paged optimizer states need a GPU: they lie in CUDA's managed memory.",
            found="paged_adamw_8bit",
            allowed="adamw, adamw_fused, adamw_8bit",
            write="optimizer: adamw_8bit",
        )
    optimizer = PagedAdamW8bit(parameters, **options)
    if device == "meta":
        keep_paged_states_outside(optimizer)
    return optimizer


def _lion_8bit(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion8bit

    return Lion8bit(parameters, **options)


def _adafactor(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    """As transformers' Trainer has it: with the learning rate that it is given."""
    from transformers.optimization import Adafactor

    return Adafactor(parameters, scale_parameter=False, relative_step=False, **options)


_KINDS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_fused": _adamw_fused,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _paged_adamw_8bit,
    "lion_8bit": _lion_8bit,
    "adafactor": _adafactor,
}


def _muon(model: nn.Module, trained: Mapping[str, nn.Parameter], options: Mapping[str, float]) -> torch.optim.Optimizer:
    """Muon for the matrices of layers, AdamW for vectors, embeddings and output head, as Muon's authors have it."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            "This PyTorch has no Muon.",
            where=f"torch {torch.__version__}",
            found="optimizer: muon",
            allowed="torch 2.9 or newer; or another optimizer",
            write="optimizer: adamw",
        )
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    by_adamw = {id(table) for table in tables} | {id(getattr(head, "weight", None))}
    by_adamw |= {id(parameter) for parameter in trained.values() if parameter.ndim != 2}
    matrices = [parameter for parameter in trained.values() if id(parameter) not in by_adamw]
    others = [parameter for parameter in trained.values() if id(parameter) in by_adamw]
    parts = [torch.optim.Muon(matrices, **options)] if matrices else []
    parts += [torch.optim.AdamW(others, **options)] if others else []
    return parts[0] if len(parts) == 1 else Together(parts)


class Together(torch.optim.Optimizer):
    """Optimizers of one group each that step together; states and settings are kept here."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:
        """Let each part step."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
