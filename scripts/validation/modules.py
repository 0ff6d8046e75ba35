"""Single modules, forward and backward, against what Liger-Kernel's benchmark measured of its baselines.

    python -m scripts.validation.modules            every row of config/measurements/modules.csv

The plain PyTorch and Hugging Face modules that Liger's kernels are compared with: cross-entropy, LlamaMLP (SwiGLU,
GEGLU), RMSNorm, LayerNorm, an output head with cross-entropy, and losses of distillation (Kullback-Leibler,
Jensen-Shannon, total variation). One module shows one kernel, a step only their sum.
``benchmark/scripts/benchmark_*.py`` of Liger-Kernel: ten times forward and backward, gradients never cleared;
``max_memory_allocated`` of each time, the median counts.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from scripts.common.job import command
from scripts.engine.trace import Options, trace_step
from scripts.memory.gpus import find
from scripts.validation.rows import FOLDER, MIB

TABLE = FOLDER / "modules.csv"
GPUS = {"a100": "a100-80gb", "h100": "h100-80gb", "b200": "b200"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RMSNorm(nn.Module):
    """What ``LlamaRMSNorm`` computes: in fp32, and back; its weight stays fp32 in the benchmark."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        dtype = states.dtype
        states = states.to(torch.float32)
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * states.to(dtype)


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, *, per_token: bool = False) -> torch.Tensor:
    """Between two tensors of log-probabilities, half towards each; ``per_token``: added up over words first."""
    dtype = student.dtype
    teacher, student = teacher.float(), student.float()
    mean = torch.lerp(student.exp(), teacher.exp(), 0.5)
    divergence = partial(nn.functional.kl_div, reduction="none" if per_token else "batchmean", log_target=True)
    if not per_token:
        return (0.5 * divergence(mean.log(), teacher) + 0.5 * divergence(mean.log(), student)).to(dtype)
    loss = 0.5 * divergence(mean.log(), teacher).sum(-1) + 0.5 * divergence(mean.log(), student).sum(-1)
    return (loss / len(student)).sum().to(dtype)


def total_variation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Between two tensors of probabilities, per token."""
    return ((student - teacher).abs() / 2.0).sum() / len(student)


# Losses of distillation, with what makes a student's and a teacher's numbers of scores.
LOSSES: dict[str, tuple[Callable, Callable, Callable]] = {
    "kl_div": (partial(nn.functional.kl_div, reduction="batchmean"), torch.log_softmax, torch.softmax),
    "jsd": (jensen_shannon, torch.log_softmax, torch.log_softmax),
    "tvd": (total_variation, torch.softmax, torch.softmax),
}


class Loss(nn.Module):
    """A loss between a student's scores and a teacher's; the script computes the probabilities once, before."""

    def __init__(self, row: Mapping[str, str]) -> None:
        super().__init__()
        self.loss, of_student, of_teacher = LOSSES[row["module"]]
        shape = int(row["tokens"]), int(row["outputs"])
        self.scores = nn.Parameter(torch.empty(shape))
        self.student, self.teacher = of_student(self.scores, -1), of_teacher(torch.empty(shape), -1)

    def forward(self) -> torch.Tensor:
        return self.loss(self.student, self.teacher)

    def step(self) -> None:
        """Forward and backward once."""
        self().backward(retain_graph=True)


class HeadsAndLoss(nn.Module):
    """Two output heads, a student's and a teacher's, and the loss between them; the script shares their weights."""

    def __init__(self, row: Mapping[str, str]) -> None:
        super().__init__()
        tokens, hidden, outputs = (int(row[name]) for name in ("tokens", "hidden_size", "outputs"))
        dtype = DTYPES[row["dtype"]]
        self.student, self.teacher = (nn.Linear(hidden, outputs, bias=False, dtype=dtype) for _ in range(2))
        self.input = nn.Parameter(torch.empty(tokens, hidden, dtype=dtype))
        self.register_buffer("other", torch.empty(tokens, hidden, dtype=dtype))

    def step(self) -> None:
        """Forward and backward once."""
        self().backward()

    def forward(self) -> torch.Tensor:
        """The script's own variables hold the scores until the loss is there."""
        of_student, of_teacher = self.student(self.input), self.teacher(self.other)
        student, teacher = torch.log_softmax(of_student / 1.0, -1), torch.log_softmax(of_teacher / 1.0, -1)
        return jensen_shannon(student, teacher, per_token=True)


class Benchmark(nn.Module):
    """A module, its input, and what else the script keeps on the GPU; called without arguments it runs forward."""

    def __init__(self, row: Mapping[str, str]) -> None:
        super().__init__()
        tokens, dtype = int(row["tokens"]), DTYPES[row["dtype"]]
        hidden, outputs = int(row["hidden_size"] or 0), int(row["outputs"] or 0)
        shape = (tokens, hidden or outputs)
        if row["module"] in ("cross_entropy", "head_and_cross_entropy"):
            self.module: nn.Module = nn.Identity()
            if hidden:  # the script builds Liger's head beside PyTorch's
                self.module, self.other = (nn.Linear(hidden, outputs, bias=False, dtype=dtype) for _ in range(2))
            self.register_buffer("target", torch.empty(tokens, dtype=torch.long))
        elif row["module"] in ("swiglu", "geglu"):
            from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

            activation = "silu" if row["module"] == "swiglu" else "gelu_pytorch_tanh"
            config = LlamaConfig(hidden_size=hidden, intermediate_size=outputs, hidden_act=activation)
            self.module = LlamaMLP(config).to(dtype)
        else:  # the norms: Liger's beside the baseline's, and a gradient that is made once
            kind = RMSNorm if row["module"] == "rms_norm" else nn.LayerNorm
            self.module, self.other = kind(hidden), kind(hidden)
            self.register_buffer("gradient", torch.empty(shape, dtype=dtype))
        self.input = nn.Parameter(torch.empty(shape, dtype=dtype))

    def forward(self) -> torch.Tensor:
        output = self.module(self.input)
        return nn.functional.cross_entropy(output, self.target) if hasattr(self, "target") else output

    def step(self) -> None:
        """Forward and backward once, as the script does it."""
        output = self()
        if output.dim() == 0:
            output.backward()
        elif hasattr(self, "gradient"):
            output.backward(self.gradient, retain_graph=True)
        else:
            output.backward(torch.randn_like(output), retain_graph=True)


def read() -> list[dict[str, str]]:
    """All rows: ``tokens`` x ``hidden_size`` go in; ``outputs``: intermediate size or vocabulary."""
    with open(TABLE, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def peak_bytes(row: Mapping[str, str]) -> int:
    """The peak of a row, by the trace."""
    kind = Loss if row["module"] in LOSSES else HeadsAndLoss if row["module"] == "heads_and_jsd" else Benchmark
    with torch.device("meta"):
        benchmark = kind(row)
    return trace_step(
        benchmark, None, benchmark.step, options=Options(capability=find(GPUS[row["gpu"]]).capability)
    ).peak_allocated_bytes


def results() -> Iterator[dict[str, Any]]:
    """For each row what was measured, what the trace says, and the difference."""
    for row in read():
        measured, traced = int(row["peak_allocated_bytes"]), peak_bytes(row)
        yield {
            "id": row["id"],
            "measured_bytes": measured,
            "predicted_bytes": traced,
            "error_percent": round(100 * (traced / measured - 1), 4),
        }


def main() -> int:
    rows = list(results())
    for row in rows:
        measured, traced = row["measured_bytes"] / MIB, row["predicted_bytes"] / MIB
        print(f"{row['id']:34} {measured:10.2f} MiB  {traced - measured:+8.4f} MiB  {row['error_percent']:+.4f} %")
    near = sum(abs(row["error_percent"]) <= 0.01 for row in rows)
    print(f"{len(rows)} modules, {near} within 0.01 %")
    return 0


if __name__ == "__main__":
    command(main)
