"""Training steps that others timed, each as something that can be traced: ``validation/data/times.csv``.

* fms-acceleration's benchmark on A100s: 100 steps of transformers' Trainer, ``train_runtime``;
* PEFT's comparison of methods on an L40S: mean step, at the mean length of its texts;
* torchtitan's Llama 3.1 8B on eight H100 limited to 500 W, tokens a second;
* fitcheck-llm's measurements of a T4, ``step_seconds``.

The versions that were measured are older than what is installed here. A fused kernel of theirs is a stand-in that reads
its input once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from dryfit.engine.costs import COLLECTIVE, MEMORY, CostRecorder, Operator, launch, touched_bytes
from dryfit.engine.fake_group import fake_group
from dryfit.scenario.scenario import Scenario
from dryfit.step.step import random_step
from dryfit.tracing.prepare import prepare
from validation import programs, rows
from validation.tables import rows_of

TABLE = "times.csv"
SMALL_UNIT_BYTES = 2**20  # an adapter's unit is smaller, a layer's larger
# fms-acceleration's figure is a hundredth of 100 steps and of what came before the first: a constant, fitted.
START_SECONDS = 7.8
NEARLY_FULL_MIB = (
    80_000  # of the 81,920 of an A100: above it the allocator gives segments back and asks again
)
# Sizes that the configurations of these models have, beside those of the rows whose memory was measured.
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral",
        **_LLAMA,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "sliding_window": None,
    },
    "meta-llama/Meta-Llama-3-8B": {
        "model_type": "llama",
        **_LLAMA,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "NousResearch/Llama-2-70b-hf": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "ibm/PowerLM-3b": {
        "model_type": "granite",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 40,
        "num_attention_heads": 36,
        "num_key_value_heads": 36,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 9.0,
    },
    "bigcode/gpt_bigcode-santacoder": {
        "model_type": "gpt_bigcode",
        "n_embd": 2048,
        "n_layer": 24,
        "n_head": 16,
        "n_inner": 8192,
        "vocab_size": 49280,
        "n_positions": 2048,
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
    },
}


@dataclass(frozen=True)
class TimedRow:
    """A step that somebody timed.

    Attributes
    ----------
    id, source, licence, gpu, gpus, model, method, framework
        As in the table; ``method`` of PEFT's rows is their name there.
    micro_batch, sequence_length
        Rows a step and GPU; tokens a row, the mean of a data set where texts differ.
    step_seconds
        What a step took.
    nearly_full
        Whether the GPU's memory was nearly full, which slows a step down.
    """

    id: str
    source: str
    licence: str
    gpu: str
    gpus: int
    model: str
    method: str
    framework: str
    autocast: str
    micro_batch: int
    sequence_length: int
    step_seconds: float
    nearly_full: bool

    @property
    def kind(self) -> str:
        """What it is compared with: rows of one GPU, alone or in a group."""
        if self.id.startswith("time-unread-"):
            return "L40S, other methods"
        if self.gpu == "a100-80gb" and self.gpus > 1:
            return "2 or 4 A100, FSDP1" + (", nearly full" if self.nearly_full else "")
        return {"a100-80gb": "one A100", "l40s": "L40S", "t4": "T4"}.get(
            self.gpu, "8 x H100, FSDP2"
        )

    @property
    def seconds_beside_the_step(self) -> float:
        """What the measured figure holds beside the step."""
        return START_SECONDS / 100 if "fms-acceleration" in self.source else 0.0

    @property
    def unread(self) -> bool:
        """Two thirds of each kind are not looked at while the time model is made: every third id is.

        The L40S's all were: their errors were known when the share of its cache was chosen, on every third of them.
        """
        return self.gpu != "l40s" and not self.looked_at

    @property
    def looked_at(self) -> bool:
        """Whether it is one of the third by which shares are chosen."""
        import zlib

        return zlib.crc32(self.id.encode()) % 3 == 0


def read() -> list[TimedRow]:
    """All rows of the table."""
    return [
        TimedRow(
            **{
                name: row[name]
                for name in ("id", "source", "licence", "gpu", "model", "method", "framework")
            },
            **{name: int(row[name]) for name in ("gpus", "micro_batch", "sequence_length")},
            autocast=row["autocast"],
            step_seconds=float(row["step_seconds"]),
            nearly_full=float(row["reserved_mib"] or 0) > NEARLY_FULL_MIB,
        )
        for row in rows_of(TABLE)
    ]


def _measured(row: TimedRow) -> rows.MeasuredRow | None:
    """Find the row that has the measured memory of the same step. Returns None if no table has such a row."""
    if not row.id.startswith(("time-t4-", "time-peft-", "time-unread-", "time-torchtitan-")):
        return None
    kind = row.id.split("-")[1]
    source = "unread-peft" if kind == "unread" else kind
    known = next(item for item in rows.read(source) if f"time-{item.id}" == row.id)
    if row.gpu == "l40s":
        known = replace(
            known, scenario=replace(known.scenario, sequence_length=row.sequence_length)
        )
    return known


def scenario_of(row: TimedRow) -> Scenario:
    """What a scenario says of a row."""
    measured = _measured(row)
    return measured.scenario if measured else _of_benchmark(row)


def costs_of(row: TimedRow) -> CostRecorder:
    """Trace a row's step; returns what its operators cost."""
    if measured := _measured(row):
        return programs.run(measured, costs=True).costs
    scenario = _of_benchmark(row)
    with (
        fake_group(row.gpus) if row.gpus > 1 else nullcontext(),
        _fused_kernels() if "foak" in row.framework else nullcontext(),
    ):
        prepared = prepare(scenario)
        step = random_step(prepared.model, prepared.optimizer, scenario, "meta", max_grad_norm=1.0)
        costs = programs.traced(prepared, step, capability=(8, 0), costs=True).costs
    if "foak" in row.framework and row.gpus > 1 and row.method != "full":
        adapters_outside_fsdp(costs)
    return costs


def adapters_outside_fsdp(costs: CostRecorder) -> None:
    """``foak`` takes adapters out of FSDP's units (``lora_adapters_switch_ddp_from_fsdp``): nothing gathers them."""
    costs.operators[:] = [
        operator._replace(kind=MEMORY, bytes=0)
        if operator.kind == COLLECTIVE and 4 < operator.moved_bytes < SMALL_UNIT_BYTES
        else operator
        for operator in costs.operators
    ]


def _of_benchmark(row: TimedRow) -> Scenario:
    """fms-acceleration's settings, ``scripts/benchmarks/scenarios*.yaml`` and ``defaults.yaml`` there."""
    quantized = row.method == "qlora"
    mapping: dict[str, Any] = {
        "model": MODELS[row.model] | {"max_position_embeddings": 8192},
        "method": row.method,
        "precision": "bf16",
        "autocast": row.autocast or None,
        "attention": "flash",
        "optimizer": "adamw",
        "gradient_checkpointing": "reentrant",
        "sequence_length": row.sequence_length,
        "micro_batch": row.micro_batch,
        "loss": "liger" if "liger" in row.framework and row.gpus == 1 else "full",
    }
    if row.gpus > 1:
        mapping["parallel"] = {"strategy": "fsdp1", "gpus": row.gpus}
    if row.method != "full":
        targets = (
            ["c_attn"] if "santacoder" in row.model else ["q_proj", "k_proj", "v_proj", "o_proj"]
        )
        mapping["lora"] = {"rank": 16, "dropout": 0.1, "target_modules": targets}
    if quantized:
        prepared = row.framework.startswith("baseline") and row.gpus == 1
        mapping["kbit_preparation"] = "trl" if prepared else "none"
        mapping["quantization"] = {"type": "nf4", "double": True} | (
            {"storage": "bf16"} if row.gpus > 1 else {}
        )
    return Scenario.from_mapping(mapping, where=row.id)


class _OneKernel(torch.autograd.Function):
    """A fused kernel: reads its input once and writes an output; backward reads input and gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        output = tensor.new_empty(shape)
        launch(Operator("fused", MEMORY, "", 0, touched_bytes([tensor, output])))
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (tensor,) = ctx.saved_tensors
        launch(
            Operator(
                "fused_backward", MEMORY, "", 0, touched_bytes([grad]) + 2 * touched_bytes([tensor])
            )
        )
        return torch.empty_like(tensor), None


@contextmanager
def _fused_kernels() -> Iterator[None]:
    """What ``foak`` puts in the place of norms, rotary embeddings and loss; its products of adapters are left out."""
    from transformers.loss import loss_utils
    from transformers.models.granite import modeling_granite
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral

    def rotary(
        query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        return tuple(_OneKernel.apply(item, item.shape) for item in (query, key))

    def norm(_: Any, hidden: torch.Tensor) -> torch.Tensor:
        return _OneKernel.apply(hidden, hidden.shape)

    losses = {"ForCausalLM": lambda logits, *_, **__: _OneKernel.apply(logits, ())}
    places = (
        (modeling_llama, "Llama"),
        (modeling_mistral, "Mistral"),
        (modeling_granite, "Granite"),
    )
    patches = [
        mock.patch.object(getattr(place, f"{name}RMSNorm"), "forward", norm)
        for place, name in places
    ]
    patches += [mock.patch.object(place, "apply_rotary_pos_emb", rotary) for place, _ in places]
    patches.append(mock.patch.dict(loss_utils.LOSS_MAPPING, losses))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
