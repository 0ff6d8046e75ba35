"""Liger's fused loss: head and cross-entropy a chunk of tokens at a time, gradients already in the forward pass.

On CUDA the package liger-kernel runs. It can't be imported without Triton, so everywhere else the same algorithm is
written out with the same tensors: what the package's kernels do in place, one operator does here, of which a tracker
sees no more than it sees of a kernel.

Source: liger-kernel 0.8.5, ``ops/fused_linear_cross_entropy.py`` (``fused_linear_cross_entropy_forward``, sizes of
chunks, ``_can_use_mm_out``), ``transformers/model/loss_utils.py`` (``LigerForCausalLMLoss``),
``transformers/model/llama.py`` (``lce_forward``), ``transformers/monkey_patch.py`` (which models).
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from will_it_fit.common.errors import UserError
from will_it_fit.scenario.model import LIGER_MODELS
from will_it_fit.step.batches import IGNORED


def use_liger(model: nn.Module) -> None:
    """Give a causal language model the forward pass with the fused loss, as Liger does.

    Raises
    ------
    UserError
        If Liger doesn't know the model, or the package isn't there on a GPU.
    """
    kind = model.config.model_type
    if kind not in LIGER_MODELS:
        raise UserError(
            "Liger's fused loss is not known for this architecture.",
            where=f"loss, model (model_type {kind})",
            found="loss: liger",
            allowed=f"loss: chunked, or one of {', '.join(LIGER_MODELS)}",
            change={"loss": "chunked"},
        )
    if next(model.parameters()).device.type == "cuda":
        _package()
    model.forward = types.MethodType(_forward, model)


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
    if hidden.device.type == "cuda":
        return _package().liger_fused_linear_cross_entropy(hidden, weight, target, softcap=softcap)
    return _FusedLinearCrossEntropy.apply(hidden, weight, target, softcap)


def _package() -> Any:
    try:
        return importlib.import_module("liger_kernel.transformers.functional")  # optional: no environment brings it
    except ImportError:
        raise UserError(
            "The package liger-kernel is not installed.",
            where="loss",
            found="liger",
            allowed="chunked, which needs no package; or the package",
            write="pip install liger-kernel",
        ) from None


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, softcap: float | None
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
            torch.ops.securecli.cross_entropy_in_place_(logits, target[part], losses[part], count, softcap or 0.0)
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


@torch.library.custom_op("securecli::cross_entropy_in_place_", mutates_args=("logits", "losses"))
def _cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, losses: torch.Tensor, count: int, softcap: float
) -> None:
    """Put the gradient of the mean loss in the place of the logits, and each token's loss in ``losses``."""
    scores = logits.float()
    bend = torch.tanh(scores / softcap) if softcap else None
    scores = scores if bend is None else softcap * bend
    share = (target != IGNORED) / max(count, 1)
    losses.copy_(functional.cross_entropy(scores, target, ignore_index=IGNORED, reduction="none") / max(count, 1))
    gradient = scores.softmax(-1)
    gradient[torch.arange(len(target)), target.clamp(min=0)] -= 1
    gradient *= share[:, None]
    logits.copy_(gradient if bend is None else gradient * (1 - bend**2))


_cross_entropy.one_kernel = True  # as Liger's is: the engine counts nothing inside


@_cross_entropy.register_fake
def _(logits: torch.Tensor, target: torch.Tensor, losses: torch.Tensor, count: int, softcap: float) -> None:
    return None
