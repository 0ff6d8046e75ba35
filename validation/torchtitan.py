"""torchtitan's Llama 3.1 8B under FSDP2, as ``docs/performance.md`` of its commit 9dec370 measured it.

Written from its settings, not run from its code: fp32 weights gathered in bf16, gradients exchanged in fp32, RMSNorm in
fp32, selective checkpointing by operator (attention and every second matrix product are kept), logits in fp32, AdamW.
Each GPU makes its share of the weights itself, so that nothing has to come from the host. Without the compiler, or with
each layer compiled, as its ``--training.compile`` does:

    python -m validation.torchtitan 8 128      # the compiled rows; needs requirements-kernels.txt
"""

from __future__ import annotations

import sys
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import register_flop_formula

from will_it_fit.engine import cuda_rules
from will_it_fit.engine.card import H100
from will_it_fit.engine.costs import BACKWARD_ATTENTION
from will_it_fit.engine.fake_group import fake_group
from will_it_fit.engine.report import Report
from will_it_fit.engine.simulation import simulated
from will_it_fit.engine.trace import Options, trace_step
from will_it_fit.scenario.scenario import Scenario

# --- attention as one operator, which the policy of checkpointing can name; shapes: batch, heads, tokens, head size ---


@torch.library.custom_op("securecli::flash", mutates_args=())
def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("on `meta` alone")


@_flash.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("securecli::flash_backward", mutates_args=())
def _flash_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError("on `meta` alone")


@_flash_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, tokens, head = query.shape
    padded, wide = cuda_rules.flash_padding(tokens, head)
    rows = query.new_empty((batch, heads, padded), dtype=torch.float32)
    sums = query.new_empty((batch, padded, heads, wide), dtype=torch.float32)
    return _like(query), _like(key), _like(value), rows, sums


_flash.one_kernel = _flash_backward.one_kernel = True  # where a card is simulated, their shapes are all that runs


@register_flop_formula(torch.ops.securecli.flash)
def _flash_flops(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * query[0] * query[1] * query[2] * key[2] * query[3]  # causal: half of two products


@register_flop_formula(torch.ops.securecli.flash_backward)
def _flash_backward_flops(_: Any, query: tuple[int, ...], key: tuple[int, ...], *__: Any, **___: Any) -> int:
    return int(BACKWARD_ATTENTION * _flash_flops(query, key))


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels' layout: batch, tokens, heads, head size."""
    return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, ...]:
    query, key, value, *_ = ctx.saved_tensors
    return _flash_backward(grad.transpose(1, 2).contiguous().transpose(1, 2), query, key, value)[:3]


_flash.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


# --- the model --------------------------------------------------------------------------------------------------------


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(torch.pow(wide, 2).mean(-1, keepdim=True).add_(1e-5))
        return wide.mul(scale).type_as(hidden).mul(self.weight)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head = heads, key_heads, width // heads
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(width, key_heads * self.head, bias=False) for _ in range(2))

    def forward(self, hidden: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = hidden.shape
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        query, key, value = (x.view(batch, tokens, -1, self.head) for x in (query, key, value))
        query, key = (torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) for x in (query, key))
        rotation = rotation[:tokens].view(1, tokens, 1, self.head // 2)
        query, key = (torch.view_as_real(x * rotation).flatten(3).type_as(hidden) for x in (query, key))
        key, value = (self._repeated(x) for x in (key, value))
        mixed, _ = _flash(*(x.transpose(1, 2) for x in (query, key, value)))
        return self.out(mixed.transpose(1, 2).contiguous().view(batch, tokens, -1))

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens = x.shape[:2]
        groups = x.unsqueeze(3).expand(batch, tokens, self.key_heads, self.heads // self.key_heads, self.head)
        return groups.reshape(batch, tokens, self.heads, self.head)


class _Layer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.attention, self.norm, self.norm_of_mlp = _Attention(width, heads, key_heads), _Norm(width), _Norm(width)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm(hidden), rotation)
        normed = self.norm_of_mlp(hidden)
        return hidden + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class _Llama(nn.Module):
    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        width, inner, heads, key_heads = (scenario.size(name) for name in sizes)
        self.embedding = nn.Embedding(scenario.size("vocab_size"), width)
        rotation = torch.empty(scenario.sequence_length, width // heads // 2, dtype=torch.complex64)
        self.register_buffer("rotation", rotation, persistent=False)
        self.layers = nn.ModuleList(
            _Layer(width, inner, heads, key_heads) for _ in range(scenario.size("num_hidden_layers"))
        )
        self.norm, self.head = _Norm(width), nn.Linear(width, scenario.size("vocab_size"), bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden, self.rotation)
        return self.head(self.norm(hidden)).float()


def _selective() -> Any:
    """What checkpointing keeps: attention, and every second matrix product."""
    products: dict[bool, int] = defaultdict(int)

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        kept = operator is torch.ops.securecli.flash.default
        if operator is torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            kept = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def step_of_torchtitan(scenario: Scenario, *, costs: bool = False, compiled: bool = False) -> Report:
    """Trace its step on the GPUs that the scenario names, H100; ``compiled``: with each layer compiled."""
    gpus = scenario.parallel.gpus
    options_of_trace = Options(capability=(9, 0), costs=costs, compiled="follow" if compiled else "refuse")
    with simulated(H100) if compiled else nullcontext(), fake_group(gpus):
        with torch.device("meta"):
            model = _Llama(scenario)
            batch = torch.empty((2, scenario.micro_batch, scenario.sequence_length), dtype=torch.long)
        options = {
            "mesh": init_device_mesh("meta", (gpus,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        }
        last = len(model.layers) - 1
        for index, layer in enumerate(model.layers):
            layer = checkpoint_wrapper(layer, context_fn=_selective, preserve_rng_state=False)
            layer = torch.compile(layer, fullgraph=True) if compiled else layer
            model.layers[index] = fully_shard(layer, reshard_after_forward=index < last, **options)
        fully_shard(model, **options)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

        def step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
            optimizer.zero_grad()
            inputs, labels = batch
            logits = model(inputs)
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1))
            del logits
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return trace_step(model, optimizer, step, tuple(batch.unbind()), options_of_trace)


def scenario_of(gpus: int) -> Scenario:
    """Its settings on so many GPUs."""
    model = {"model": "llama-3.1-8b", "method": "full", "sequence_length": 8192, "micro_batch": 2}
    return Scenario.from_mapping({**model, "parallel": {"strategy": "fsdp2", "gpus": gpus}})


def main() -> None:
    """Trace the compiled row of each number of GPUs that the command names."""
    for gpus in map(int, sys.argv[1:]):
        report = step_of_torchtitan(scenario_of(gpus), compiled=True)
        sizes = [f"{size / 2**20:,.1f}" for size in (report.peak_allocated_bytes, report.peak_reserved_bytes)]
        print(gpus, "GPUs, MiB allocated and reserved:", *sizes, report.compiled, *report.warnings)


if __name__ == "__main__":
    main()
