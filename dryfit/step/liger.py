"""Liger: a model as liger-kernel patches it, or its fused loss alone.

Where the package can run, it does: on CUDA, and in a trace where a card is simulated and Triton is installed. Elsewhere
(macOS, Windows) the same algorithms are written out with the same tensors: what the package's kernels do in place, one
operator does here, of which a tracker sees no more than it sees of a kernel.

Source: liger-kernel 0.8.5, ``ops/fused_linear_cross_entropy.py`` (``fused_linear_cross_entropy_forward``, sizes of
chunks, ``_can_use_mm_out``), ``ops/rms_norm.py``, ``ops/swiglu.py``, ``ops/rope.py``,
``transformers/model/loss_utils.py`` (``LigerForCausalLMLoss``), ``transformers/model/llama.py`` (``lce_forward``),
``transformers/monkey_patch.py`` (which models, and what of them).
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dryfit.common.errors import UserError
from dryfit.engine.card import active_simulation
from dryfit.engine.patching import patched
from dryfit.scenario.model import LIGER_MODELS, LIGER_WRITTEN_OUT
from dryfit.step.batches import IGNORED


def package_runs(device: torch.device) -> bool:
    """Whether the package's own code is what runs for tensors on a device."""
    if device.type == "cuda":
        return True
    return device.type == "meta" and active_simulation() is not None and package_installed()


def package_installed() -> bool:
    """Whether liger-kernel can be imported where a card is simulated."""
    return find_spec("triton") is not None and find_spec("liger_kernel") is not None


def use_liger(model: nn.Module, *, kernels: bool = False) -> None:
    """Give a causal language model the forward pass with the fused loss, as Liger does.

    ``kernels``: and its norms and MLPs; its rotation is exchanged by :func:`rotating`.

    Raises :class:`UserError` if Liger doesn't know the model, or the package is needed and isn't there.
    """
    kind, field = model.config.model_type, "kernels" if kernels else "loss"
    if kind not in LIGER_MODELS:
        raise UserError(
            "Liger's fused loss is not known for this architecture.",
            where=f"{field}, model (model_type {kind})",
            found=f"{field}: liger",
            allowed=f"loss: chunked, or one of {', '.join(LIGER_MODELS)}",
            change={"loss": "chunked"},
        )
    own = package_runs(next(model.parameters()).device)
    if own:
        _package()
    if kernels and own:
        _patched_by_package(model)
        return
    model.forward = types.MethodType(_forward, model)
    if kernels:
        _patched_here(model, kind)


def _patched_by_package(model: nn.Module) -> None:
    """What the Trainer does for ``use_liger_kernel``, but for the functions of modules, which :func:`rotating` does."""
    logging.getLogger("liger_kernel").setLevel(
        logging.ERROR
    )  # it names each backend of another maker
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    own = sys.modules[type(model).__module__]
    before = dict(vars(own))
    _apply_liger_kernel_to_instance(model=model)
    model.liger_rotation = vars(own)[_ROTATION]
    vars(own).update(before)


def _patched_here(model: nn.Module, kind: str) -> None:
    if kind not in LIGER_WRITTEN_OUT:
        raise UserError(
            "Liger's kernels for this architecture need its package, which can't run here.",
            where=f"kernels, model (model_type {kind})",
            found="kernels: liger",
            allowed=f"kernels: transformers; one of {', '.join(LIGER_WRITTEN_OUT)}; on Linux the package",
            write='pip install "dryfit[run]"',
        )
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
        elif name.endswith("MLP"):
            module.forward = types.MethodType(_mlp, module)
    model.liger_rotation = _rotated


def keep_little(model: nn.Module) -> bool:
    """Let norms, MLPs and rotation keep what Liger's and Unsloth's kernels keep; whether the family is known.

    Unsloth's keep the same of them (2026.10.9, ``unsloth/kernels``): a norm its input and the rows' factor
    (``rms_layernorm.py``, ``Fast_RMS_Layernorm.forward``), an MLP its input and both products before the activation
    (``fast_lora.py``, ``LoRA_MLP.forward``), the rotation nothing, since it turns queries and keys where they are
    (``rope_embedding.py``).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = base.config.model_type
    if kind in LIGER_WRITTEN_OUT:
        _patched_here(base, kind)
    return kind in LIGER_WRITTEN_OUT


_ROTATION = "apply_rotary_pos_emb"


@contextmanager
def rotating(model: nn.Module) -> Iterator[None]:
    """Let a model's attention call Liger's rotation, if :func:`use_liger` gave it Liger's kernels.

    The rotation is a function of transformers' module, which all models of the family share.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rotation = getattr(base, "liger_rotation", None)
    owner = sys.modules[type(base).__module__]
    with patched([(owner, _ROTATION, rotation)] if rotation is not None else []):
        yield


def _forward(self: nn.Module, input_ids: Any = None, labels: Any = None, **inputs: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if labels is None:
        return type(self).forward(self, input_ids=input_ids, **inputs)
    outputs = self.get_decoder()(input_ids=input_ids, **inputs)
    hidden = outputs[0]
    head = self.get_output_embeddings()
    head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
    loss = fused_linear_cross_entropy(
        hidden.view(-1, hidden.shape[-1]),
        head.weight,
        labels.view(-1),
        softcap=getattr(self.config, "final_logit_softcapping", None),
    )
    return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values)


def fused_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` against the targets that are not :data:`IGNORED`.

    Shapes: tokens x hidden, vocabulary x hidden, tokens.
    """
    if package_runs(hidden.device):
        return _package().liger_fused_linear_cross_entropy(hidden, weight, target, softcap=softcap)
    return _FusedLinearCrossEntropy.apply(hidden, weight, target, softcap)


def _package() -> Any:
    try:
        return importlib.import_module(
            "liger_kernel.transformers.functional"
        )  # optional: no environment brings it
    except ImportError:
        raise UserError(
            "The package liger-kernel is not installed.",
            where="loss",
            found="liger",
            allowed="chunked, which needs no package; or the package",
            write="pip install liger-kernel",
        ) from None


# --- the fused loss -------------------------------------------------------------------------------------------------


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        tokens, vocabulary = len(hidden), len(weight)
        pieces = -(-vocabulary // hidden.shape[-1])
        chunk = min(1 << (-(-tokens // pieces) - 1).bit_length(), tokens)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        losses = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
        counted = (target != IGNORED).sum()
        count = 1 if counted.device.type == "meta" else int(counted.item())
        direct = hidden.dtype == weight.dtype and _computes_in(hidden.dtype, hidden.device.type)
        storage = hidden.new_empty((chunk, vocabulary)) if direct else None
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            if direct:
                logits = storage[: part.stop - part.start]
                torch.mm(hidden[part], weight.t(), out=logits)
            else:
                logits = hidden[part] @ weight.t()
            torch.ops.securecli.cross_entropy_in_place_(
                logits, target[part], losses[part], count, softcap or 0.0
            )
            if direct and logits.dtype == grad_hidden.dtype:
                torch.mm(logits, weight, out=grad_hidden[part])
            else:
                grad_hidden[part] = logits @ weight
            if grad_weight is not None:
                if logits.dtype == grad_weight.dtype != torch.float32:
                    operand = hidden[part].to(logits.dtype)
                    torch.addmm(grad_weight, logits.t(), operand, out=grad_weight)
                    del operand
                else:
                    grad_weight += torch.mm(logits.t(), hidden[part]).float()
            del logits
        del storage
        ctx.save_for_backward(grad_hidden, *([] if grad_weight is None else [grad_weight]))
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        grads = ctx.saved_tensors
        for each in grads:
            each.mul_(grad)
        return grads[0], grads[1] if len(grads) > 1 else None, None, None


def _computes_in(dtype: torch.dtype, device: str) -> bool:
    """Whether a product of two tensors of a dtype is computed in it: autocast doesn't come between."""
    if device == "meta":  # knows autocast only inside a trace
        return not torch.amp.is_autocast_available(device) or _computes_in(dtype, "cuda")
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == dtype


def _kernel(*written: str) -> Callable[[Callable], Any]:
    """An operator that writes into given tensors, as one kernel of Liger's: the engine counts nothing inside."""

    def define(function: Callable) -> Any:
        operator = torch.library.custom_op(
            f"securecli::{function.__name__[1:]}_", function, mutates_args=written
        )
        operator.one_kernel = True
        operator.register_fake(lambda *args: None)
        return operator

    return define


@_kernel("logits", "losses")
def _cross_entropy_in_place(
    logits: torch.Tensor, target: torch.Tensor, losses: torch.Tensor, count: int, softcap: float
) -> None:
    """Put the gradient of the mean loss in the place of the logits, and each token's loss in ``losses``."""
    scores = logits.float()
    bend = torch.tanh(scores / softcap) if softcap else None
    scores = scores if bend is None else softcap * bend
    share = (target != IGNORED) / max(count, 1)
    losses.copy_(
        functional.cross_entropy(scores, target, ignore_index=IGNORED, reduction="none")
        / max(count, 1)
    )
    gradient = scores.softmax(-1)
    gradient[torch.arange(len(target)), target.clamp(min=0)] -= 1
    gradient *= share[:, None]
    logits.copy_(gradient if bend is None else gradient * (1 - bend**2))


# --- norms, MLPs, rotation ------------------------------------------------------------------------------------------


def _norm(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return _RmsNorm.apply(hidden, self.weight, self.variance_epsilon)


def _mlp(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return self.down_proj(_SwiGlu.apply(self.gate_proj(hidden), self.up_proj(hidden)))


def _rotated(
    queries: torch.Tensor, keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _Rotation.apply(queries, keys, cosines, sines)


def _processors(device: torch.device) -> int:
    """Into as many partial sums a norm's gradient of its weight is split."""
    simulation = active_simulation()
    return (
        simulation.card.multiprocessors if simulation is not None and device.type == "meta" else 1
    )


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and one number a row; the input's gradient takes the place of the output's."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        hidden = hidden.contiguous()
        rows = hidden.view(-1, hidden.shape[-1])
        out = torch.empty_like(rows)
        scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        torch.ops.securecli.rms_norm_(out, scale, rows, weight, epsilon)
        ctx.save_for_backward(rows, weight, scale)
        return out.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        rows, weight, scale = ctx.saved_tensors
        given = grad.contiguous()
        grad = given.view(rows.shape)
        sums = None
        if ctx.needs_input_grad[1]:
            sums = torch.empty(
                (_processors(rows.device), rows.shape[1]), dtype=torch.float32, device=rows.device
            )
        torch.ops.securecli.rms_norm_backward_(grad, sums, rows, weight, scale)
        return grad.view(given.shape), None if sums is None else sums.sum(0).to(weight.dtype), None


class _SwiGlu(torch.autograd.Function):
    """``silu(gate) * up``; both gradients take the places of what was kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        torch.ops.securecli.swiglu_(out, gate, up)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        torch.ops.securecli.swiglu_backward_(gate, up, grad.contiguous())
        return gate, up


class _Rotation(torch.autograd.Function):
    """Rotates queries and keys where they lie. Shapes: batch x heads x tokens x head size."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cosines, sines)
        return _rotate(queries, keys, cosines, sines)

    @staticmethod
    def backward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor) -> tuple:
        cosines, sines = ctx.saved_tensors
        return *_rotate(queries, keys, cosines, sines, back=True), None, None


def _rotate(
    queries: torch.Tensor,
    keys: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    back: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    both = []
    for heads in (queries, keys):
        rows = heads.detach().transpose(1, 2).contiguous()  # as the projection wrote them: no copy
        torch.ops.securecli.rotation_(rows, cosines, sines, back)
        both.append(rows.transpose(1, 2))
    return both[0], both[1]


@_kernel("out", "scale")
def _rms_norm(
    out: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> None:
    wide = rows.float()
    scale.copy_(torch.rsqrt(wide.square().mean(-1) + epsilon))
    out.copy_((wide * scale[:, None]).to(rows.dtype) * weight)


@_kernel("grad", "sums")
def _rms_norm_backward(
    grad: torch.Tensor,
    sums: torch.Tensor | None,
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """Put the input's gradient in the place of the output's, and the weight's into ``sums``."""
    normed, given = rows.float() * scale[:, None], grad.float()
    if sums is not None:
        sums.zero_()
        sums[0] = (given * normed).sum(0)
    given = given * weight.float()
    grad.copy_(scale[:, None] * (given - normed * (given * normed).mean(-1, keepdim=True)))


@_kernel("out")
def _swiglu(out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    out.copy_(functional.silu(gate.float()).to(up.dtype) * up)


@_kernel("gate", "up")
def _swiglu_backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> None:
    wide, given = gate.float(), grad.float()
    share = torch.sigmoid(wide)
    of_gate = given * up.float() * share * (1 + wide * (1 - share))
    up.copy_(given * wide * share)
    gate.copy_(of_gate)


@_kernel("rows")
def _rotation(rows: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, back: bool) -> None:
    """Rotate heads of the shape batch x tokens x heads x head size; ``back``: by the negative angles."""
    cosines, sines = cosines.float().unsqueeze(2), sines.float().unsqueeze(2) * (-1 if back else 1)
    wide = rows.float()
    first, second = wide.chunk(2, -1)
    rows.copy_(wide * cosines + torch.cat((-second, first), -1) * sines)
