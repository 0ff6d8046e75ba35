"""The optimizer of a scenario, over what a model trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from dryfit.common.errors import UserError
from dryfit.engine.bitsandbytes_layers import keep_paged_states_outside
from dryfit.scenario.scenario import Scenario
from dryfit.step.meshes import mesh_of

Parameters = Sequence[nn.Parameter]
MOMENTS = ("exp_avg", "exp_avg_sq")  # what PyTorch calls AdamW's states
PROJECTED_EVERY = 200  # steps: GaLore's projections last so long


def build_optimizer(
    model: nn.Module,
    scenario: Scenario,
    *,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    largest_steps: bool = True,
) -> torch.optim.Optimizer:
    """Make the scenario's optimizer over the trainable parameters, with PyTorch's own choice of how it steps.

    ``largest_steps``: what an optimizer does in some steps alone, GaLore's projections, it does in each, as predictions
    and measurements want it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"lr": learning_rate, "weight_decay": weight_decay}
    if scenario.has_wider_states:
        return AdamWWithFp32States(trained, **options)
    fused_on_host = scenario.optimizer == "adamw_fused" and scenario.parallel.offload == "cpu"
    build = BUILDERS[
        "adamw" if fused_on_host else scenario.optimizer
    ]  # there the GPU has no part in how it steps
    if build in BY_MATRICES:
        return build(*_matrices_and_others(model, trained), options, largest_steps)
    return build(_by_mesh(trained) if scenario.parallel.meshed else trained, **options)


def _by_mesh(trained: Parameters) -> Parameters | list[dict[str, Any]]:
    """A group for each mesh where parameters lie on several, as transformers' Trainer makes them.

    One call of a kernel can't take tensors of several meshes (``foreach``, ``fused``).
    """
    groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in trained:
        groups[mesh_of(parameter)].append(parameter)
    return [{"params": group} for group in groups.values()] if len(groups) > 1 else trained


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step: torchao's lie in tensors, which its compiled steps read."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _class(module: str, name: str, **settings: Any) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer's class, whose package is imported when the optimizer is made."""
    return lambda parameters, **options: getattr(import_module(module), name)(
        parameters, **settings, **options
    )


def _paged_adamw_8bit(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW8bit

    device = parameters[0].device.type
    if device == "cpu":
        raise UserError(
            "Paged optimizer states need a GPU: they lie in CUDA's managed memory.",
            found="paged_adamw_8bit",
            allowed="adamw, adamw_fused, adamw_8bit",
            change={"optimizer": "adamw_8bit"},
        )
    optimizer = PagedAdamW8bit(parameters, **options)
    if device == "meta":
        keep_paged_states_outside(optimizer)
    return optimizer


def _matrices_and_others(model: nn.Module, trained: Parameters) -> tuple[Parameters, Parameters]:
    """The matrices of layers; vectors, embeddings and the output head, which Muon's and GaLore's authors leave out."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left_out = {id(table) for table in tables} | {id(getattr(head, "weight", None))}
    left_out |= {id(parameter) for parameter in trained if parameter.ndim != 2}
    matrices = [parameter for parameter in trained if id(parameter) not in left_out]
    return matrices, [parameter for parameter in trained if id(parameter) in left_out]


def _muon(
    matrices: Parameters, others: Parameters, options: Mapping[str, float], largest_steps: bool
) -> torch.optim.Optimizer:
    """Muon for the matrices of layers, AdamW for the others. All its steps are alike."""
    del largest_steps
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            "This PyTorch has no Muon.",
            where=f"torch {torch.__version__}",
            found="optimizer: muon",
            allowed="torch 2.9 or newer; or another optimizer",
            change={"optimizer": "adamw"},
        )
    parts = [torch.optim.Muon(matrices, **options)] if matrices else []
    parts += [torch.optim.AdamW(others, **options)] if others else []
    return parts[0] if len(parts) == 1 else Together(parts)


def _galore(
    matrices: Parameters, others: Parameters, options: Mapping[str, float], largest_steps: bool
) -> torch.optim.Optimizer:
    """GaLore's AdamW, with the settings that transformers' Trainer has."""
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    class GaLore(GaLoreAdamW):
        def load_state_dict(self, states: dict[str, Any]) -> None:
            """Bring the projections to their weights: PyTorch does so with tensors alone."""
            super().load_state_dict(states)
            for parameter, state in self.state.items():
                if "projector" in state:
                    projector = state["projector"]
                    projector.ortho_matrix = projector.ortho_matrix.to(parameter.device)

    torch.serialization.add_safe_globals([GaLoreProjector])  # a checkpoint holds them
    settings = {
        "rank": 128,
        "update_proj_gap": 1 if largest_steps else PROJECTED_EVERY,
        "scale": 0.25,
        "proj_type": "std",
    }
    groups = [{"params": matrices, **settings}] if matrices else []
    groups += [{"params": others}] if others else []
    return GaLore(groups, no_deprecation_warning=True, **options)


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


class AdamWWithFp32States(torch.optim.Optimizer):
    """AdamW whose two moments are in fp32, whatever the dtype of the parameters and their gradients.

    PyTorch's own keeps moments in the parameters' dtype, and its kernels refuse any other (torch 2.13:
    ``torch._foreach_lerp_`` and ``torch._fused_adamw_`` want one dtype). The rule is its
    (``torch/optim/adamw.py``, decoupled weight decay). Parameters step one after the other, each in fp32: beside the
    moments, a step needs one fp32 copy of the largest parameter at a time.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update each parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update_moments(parameter, group["betas"])
                    self._update_parameter(parameter, group)

    def _update_moments(self, parameter: nn.Parameter, betas: tuple[float, float]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        first, second = (state[name] for name in MOMENTS)
        gradient = parameter.grad.float()
        first.lerp_(gradient, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])

    def _update_parameter(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        first, second = (state[name] for name in MOMENTS)
        first_correction, second_correction = (1 - beta ** state["step"] for beta in group["betas"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = second.sqrt().div_(second_correction**0.5).add_(group["eps"])
        parameter.addcdiv_(first, denominator, value=-group["lr"] / first_correction)

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Load states without rounding: PyTorch casts moments to the parameters' dtype."""
        super().load_state_dict(states)
        parameters = [one for group in self.param_groups for one in group["params"]]
        for index, kept in states["state"].items():
            parameter = parameters[index]
            for name in MOMENTS:
                moment = kept[name].to(parameter.device, torch.float32, copy=True)
                self.state[parameter][name] = moment


# In the order of dryfit.scenario.optimizers, which says what each keeps.
BUILDERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _class("torch.optim", "AdamW"),
    "adamw_fused": _class("torch.optim", "AdamW", fused=True, foreach=False),
    "adamw_8bit": _class("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw_8bit": _paged_adamw_8bit,
    "lion_8bit": _class("bitsandbytes.optim", "Lion8bit"),
    # As transformers' Trainer has it: with the learning rate that it is given.
    "adafactor": _class(
        "transformers.optimization", "Adafactor", scale_parameter=False, relative_step=False
    ),
    "muon": _muon,
    "adamw_torchao_8bit": _class("torchao.optim", "AdamW8bit"),
    "adamw_torchao_4bit": _class("torchao.optim", "AdamW4bit"),
    "galore": _galore,
}
BY_MATRICES = (
    _muon,
    _galore,
)  # they treat the matrices of layers otherwise than the other parameters
