"""Single modules, forward and backward, against what Liger-Kernel's benchmark measured of its baselines.

    python -m validation.modules            every row of validation/data/modules.csv

The plain PyTorch and Hugging Face modules that Liger's kernels are compared with: cross-entropy, LlamaMLP (SwiGLU,
GEGLU), RMSNorm, LayerNorm, an output head with cross-entropy, losses of distillation (Kullback-Leibler, Jensen-Shannon,
total variation, cosine) and of alignment (ORPO, CPO, SimPO, KTO, GRPO). One module shows one kernel, a step only their
sum.
``benchmark/scripts/benchmark_*.py`` of Liger-Kernel: ten times forward and backward, gradients never cleared;
``max_memory_allocated`` of each time, the median counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dryfit.cards.gpus import find
from dryfit.common.terminal import command
from dryfit.engine.allocator import round_size
from dryfit.engine.trace import Options, trace_step
from validation.rows import MIB
from validation.tables import rows_of

TABLE = "modules.csv"
GPUS = {"a100": "a100-80gb", "h100": "h100-80gb", "b200": "b200"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IGNORED = -100  # a word that is no label
NEAR = 2048  # bytes, to which the figures are published


class Stepped(nn.Module):
    """What a row measures: called without arguments it gives the loss."""

    def step(self) -> None:
        """Forward and backward once."""
        self().backward()


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


def jensen_shannon(
    student: torch.Tensor, teacher: torch.Tensor, *, per_token: bool = False
) -> torch.Tensor:
    """Between two tensors of log-probabilities, half towards each; ``per_token``: added up over words first."""
    dtype = student.dtype
    teacher, student = teacher.float(), student.float()
    mean = torch.lerp(student.exp(), teacher.exp(), 0.5)
    divergence = partial(
        functional.kl_div, reduction="none" if per_token else "batchmean", log_target=True
    )
    if not per_token:
        return (0.5 * divergence(mean.log(), teacher) + 0.5 * divergence(mean.log(), student)).to(
            dtype
        )
    loss = 0.5 * divergence(mean.log(), teacher).sum(-1) + 0.5 * divergence(
        mean.log(), student
    ).sum(-1)
    return (loss / len(student)).sum().to(dtype)


def total_variation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Between two tensors of probabilities, per token."""
    return ((student - teacher).abs() / 2.0).sum() / len(student)


# Losses of distillation, with what makes a student's and a teacher's numbers of scores.
LOSSES: dict[str, tuple[Callable, Callable, Callable]] = {
    "kl_div": (partial(functional.kl_div, reduction="batchmean"), torch.log_softmax, torch.softmax),
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


class HeadsAndLoss(Stepped):
    """Two output heads, a student's and a teacher's, and the loss between them; the script shares their weights."""

    def __init__(self, row: Mapping[str, str]) -> None:
        super().__init__()
        tokens, hidden, outputs = (int(row[name]) for name in ("tokens", "hidden_size", "outputs"))
        dtype = DTYPES[row["dtype"]]
        self.student, self.teacher = (
            nn.Linear(hidden, outputs, bias=False, dtype=dtype) for _ in range(2)
        )
        self.input = nn.Parameter(torch.empty(tokens, hidden, dtype=dtype))
        self.register_buffer("other", torch.empty(tokens, hidden, dtype=dtype))

    def forward(self) -> torch.Tensor:
        """The script's own variables hold the scores until the loss is there."""
        of_student, of_teacher = self.student(self.input), self.teacher(self.other)
        student, teacher = (
            torch.log_softmax(of_student / 1.0, -1),
            torch.log_softmax(of_teacher / 1.0, -1),
        )
        return jensen_shannon(student, teacher, per_token=True)


def text_probabilities(scores: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The mean log-probability of each text's words, where they count."""
    counts = words != IGNORED
    words = torch.where(words == IGNORED, 0, words)
    each = scores.log_softmax(-1).gather(2, words.unsqueeze(2)).squeeze(2)
    return (each * counts).sum(-1) / counts.sum(-1)


def odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """What ORPO adds for each pair of texts."""
    odds = (chosen - rejected) - (
        torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected))
    )
    return 0.1 * functional.logsigmoid(odds)


def contrast(
    chosen: torch.Tensor, rejected: torch.Tensor, *, margin: float | None = None
) -> torch.Tensor:
    """What CPO adds for each pair of texts, and SimPO with its margin."""
    apart = chosen - rejected
    apart = apart if margin is None else apart - margin
    return functional.logsigmoid(0.1 * apart) * 1.0 + functional.logsigmoid(-0.1 * apart) * 0.0


# Losses over pairs of texts: what each adds to the chosen texts' cross-entropy, and whether that is weighted.
PAIRS: dict[str, tuple[Callable, bool]] = {
    "orpo": (odds_ratio, False),
    "orpo_16bit": (
        odds_ratio,
        False,
    ),  # its rows fit a loss in 16 bits: they were measured before the script's last change
    "cpo": (contrast, True),
    "simpo": (partial(contrast, margin=5.0), True),
}
SIZES = ("tokens", "hidden_size", "outputs")


class Alignment(Stepped):
    """An output head and a loss over texts, of which the first half is chosen; Liger's head stands beside it."""

    def __init__(self, row: Mapping[str, str]) -> None:
        super().__init__()
        self.kind, dtype = row["module"], DTYPES[row["dtype"]]
        tokens, hidden, outputs = (int(row[name]) for name in SIZES)
        texts = int(row["id"].rpartition("-")[2].partition("x")[0])
        self.half, shape = texts // 2, (texts, tokens // texts)
        count = (
            2 if self.kind in PAIRS else 4
        )  # a frozen reference model has a head too, and the benchmark trains it
        linear = partial(nn.Linear, hidden, outputs, bias=self.kind == "kto", dtype=dtype)
        self.heads = nn.ModuleList(linear() for _ in range(count))
        self.input = nn.Parameter(
            torch.empty(*shape, hidden, dtype=dtype), requires_grad=self.kind != "kto"
        )
        self.register_buffer("words", torch.empty(shape, dtype=torch.long))
        if count == 4:
            self.register_buffer("other", torch.empty(*shape, hidden, dtype=dtype))
            self.register_buffer(
                "each", torch.empty(texts, dtype=torch.bool if self.kind == "kto" else dtype)
            )
            self.register_buffer(
                "more", torch.empty(1, dtype=dtype) if self.kind == "kto" else torch.empty(shape)
            )

    def scores(self, index: int, states: torch.Tensor) -> torch.Tensor:
        head = self.heads[index]
        scores = states @ head.weight.t()
        return scores if head.bias is None else scores + head.bias

    def pairs(self) -> torch.Tensor:
        """The variables of the baseline: scores in both dtypes are alive until all losses are there."""
        half = self.half
        narrow = self.scores(0, self.input)
        scores = narrow if self.kind == "orpo_16bit" else narrow.float()
        loss = functional.cross_entropy(
            scores[:half].view(-1, scores.shape[-1]), self.words[:half].view(-1)
        )
        all_of_them = text_probabilities(scores, self.words)
        added, weighted = PAIRS[self.kind]
        return (loss * 1.0 if weighted else loss) - added(
            all_of_them[:half], all_of_them[half:]
        ).mean()

    def kto(self) -> torch.Tensor:
        """The baseline copies the scores of the chosen and of the rejected texts, for its metrics."""
        half = self.half
        narrow = self.scores(0, self.input)
        scores = narrow.float()
        nothing = torch.tensor(0.0, device=scores.device)
        policy = text_probabilities(scores, self.words)
        copies = scores[:half].clone(), scores[half:].clone()
        del narrow, scores
        with torch.no_grad():
            reference = text_probabilities(self.scores(1, self.other), self.words)
        ratios = [policy[part] - reference[part] for part in (slice(half), slice(half, None))]
        losses = [
            1 - torch.sigmoid(0.1 * far) for far in (ratios[0] - self.more, self.more - ratios[1])
        ]
        loss = nothing * 1.0 + torch.cat(losses).mean()
        metrics = [part.detach().sum() for part in (policy[:half], policy[half:], *copies)]  # noqa: F841
        return loss

    def grpo(self, *, per_text: bool = False) -> torch.Tensor:
        words, mask = self.words.unsqueeze(-1), self.more
        narrow = self.scores(0, self.input)
        wide = torch.log_softmax(narrow.float(), -1)
        policy = wide.gather(-1, words).squeeze(-1)
        with torch.no_grad():
            narrow_reference = self.scores(1, self.other)
            wide_reference = torch.log_softmax(narrow_reference.float(), -1)
            reference = wide_reference.gather(-1, words).squeeze(-1)
        ratio = policy - policy.detach()
        if per_text:
            ratio = ((ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        factor = torch.exp(ratio)
        clipped = torch.clamp(factor, 0.8, 1.2)
        loss = -torch.min(factor * self.each.unsqueeze(1), clipped * self.each.unsqueeze(1))
        divergence = torch.exp(reference - policy) - (reference - policy) - 1.0
        loss = loss + 0.1 * divergence
        return (loss * mask).sum() / mask.sum().clamp(min=1.0)

    def forward(self) -> torch.Tensor:
        if self.kind in PAIRS:
            return self.pairs()
        return (
            self.kto() if self.kind == "kto" else self.grpo(per_text=self.kind == "grpo_sequence")
        )


def mixed(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon as the benchmark of whole heads writes it."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    mean = 0.5 * student.exp() + 0.5 * teacher.exp()
    mean_log = mean.log()
    divergence = partial(functional.kl_div, mean_log, reduction="batchmean", log_target=True)
    of_student, of_teacher = divergence(student), divergence(teacher)
    return 0.5 * of_teacher + 0.5 * of_student


def cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    student, teacher = (functional.normalize(scores, p=2, dim=-1) for scores in (student, teacher))
    return (1.0 * (1 - functional.cosine_similarity(student, teacher, dim=-1))).mean()


DISTILLED = {"distill_jsd": mixed, "distill_cosine": cosine}


class Distillation(Stepped):
    """A student's head and a teacher's of twice its width, cross-entropy and a loss between both; Liger's beside."""

    def __init__(self, row: Mapping[str, str]) -> None:
        super().__init__()
        tokens, hidden, outputs = (int(row[name]) for name in SIZES)
        self.loss, dtype = DISTILLED[row["module"]], DTYPES[row["dtype"]]
        widths = (hidden // 2, hidden) * 2
        self.heads = nn.ModuleList(
            nn.Linear(width, outputs, bias=False, dtype=dtype) for width in widths
        )
        self.inputs = nn.ParameterList(
            torch.empty(tokens, hidden // 2, dtype=dtype) for _ in range(3)
        )
        self.register_buffer("other", torch.empty(tokens, hidden, dtype=dtype))
        self.register_buffer("words", torch.empty(tokens, dtype=torch.long))

    def scores(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of both heads in fp32, with the student's cross-entropy: the 16-bit ones are alive until it is there."""
        narrow = self.inputs[0] @ self.heads[0].weight.t()
        with torch.no_grad():
            narrow_teacher = self.other @ self.heads[1].weight.t()
        student, teacher = narrow.float(), narrow_teacher.float()
        torch.all(self.words == IGNORED)
        return student, teacher, functional.cross_entropy(student, self.words)

    def forward(self) -> torch.Tensor:
        student, teacher, hard = self.scores()
        student /= 1.0
        teacher /= 1.0
        soft = self.loss(student, teacher)
        return 0.5 * hard + 0.5 * soft


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
                self.module, self.other = (
                    nn.Linear(hidden, outputs, bias=False, dtype=dtype) for _ in range(2)
                )
            self.register_buffer("target", torch.empty(tokens, dtype=torch.long))
        elif row["module"] in ("swiglu", "geglu"):
            from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

            activation = "silu" if row["module"] == "swiglu" else "gelu_pytorch_tanh"
            config = LlamaConfig(
                hidden_size=hidden, intermediate_size=outputs, hidden_act=activation
            )
            self.module = LlamaMLP(config).to(dtype)
            # benchmark_swiglu.py, benchmark_geglu.py: batches of rows, so that a gradient of the input is a view.
            length = int(row["id"].rpartition("-")[2])
            shape = (tokens // length, length, hidden)
        else:  # the norms: Liger's beside the baseline's, and a gradient that is made once
            kind = RMSNorm if row["module"] == "rms_norm" else nn.LayerNorm
            self.module, self.other = kind(hidden), kind(hidden)
            self.register_buffer("gradient", torch.empty(shape, dtype=dtype))
        self.input = nn.Parameter(torch.empty(shape, dtype=dtype))

    def forward(self) -> torch.Tensor:
        output = self.module(self.input)
        return functional.cross_entropy(output, self.target) if hasattr(self, "target") else output

    def step(self) -> None:
        """Forward and backward once, as the script does it."""
        output = self()
        if output.dim() == 0:
            output.backward()
        elif hasattr(self, "gradient"):
            output.backward(self.gradient, retain_graph=True)
        else:
            output.backward(torch.randn_like(output), retain_graph=True)


KINDS: dict[str, type[nn.Module]] = (
    dict.fromkeys(LOSSES, Loss)
    | dict.fromkeys((*PAIRS, "kto", "grpo_token", "grpo_sequence"), Alignment)
    | dict.fromkeys(DISTILLED, Distillation)
    | {"heads_and_jsd": HeadsAndLoss}
)


def read() -> list[dict[str, str]]:
    """All rows: ``tokens`` x ``hidden_size`` go in; ``outputs``: intermediate size or vocabulary."""
    return rows_of(TABLE)


def left_behind(row: Mapping[str, str]) -> list[int]:
    """Bytes of each tensor that an alignment loss, compiled earlier in the process, holds until Python collects it.

    PyTorch 2.5.1's Dynamo leaves the frame of a compiled function in a cycle of Python objects. While it compiled the
    second size, that cycle grew old, and Python hardly ever looks at old ones. It holds the head's weight and its
    gradient, the stacked inputs and their gradient of two texts more, one chunk's inputs, both their labels and a sum:
    two heads, five inputs and three labels of the smallest size. Seen on a CPU: liger-kernel's code of November 2024,
    PyTorch 2.5.1, sizes in the script's order, ``gc.get_objects()`` after each. PyTorch 2.13 leaves nothing.
    """
    if row["module"] == "kto":
        return _frame_of_kto(row, texts=4, reference_bias=False, gradients=False)
    if row["module"] not in PAIRS:
        return []
    smallest = 2 * int(row["id"].rpartition("x")[2])  # words of two texts
    head, inputs = (2 * int(row["hidden_size"]) * size for size in (int(row["outputs"]), smallest))
    return [*[head] * 2, *[inputs] * 5, *[8 * smallest] * 3, 4]


def left_again(row: Mapping[str, str]) -> list[int]:
    """The same, from the first size whose memory is measured on.

    The script of KTO gives its reference a bias only where it measures memory: so PyTorch compiles the loss again. Seen
    on a CPU too: after that size its head, its reference's and both biases stay with the batch.
    """
    return (
        _frame_of_kto(row, texts=2, reference_bias=True, gradients=True)
        if row["module"] == "kto"
        else []
    )


def _frame_of_kto(
    row: Mapping[str, str], *, texts: int, reference_bias: bool, gradients: bool
) -> list[int]:
    """Bytes of what the frame of KTO's compiled loss holds: both heads, both batches, labels, kinds, a divergence."""
    outputs, hidden, words = (
        int(row["outputs"]),
        int(row["hidden_size"]),
        texts * int(row["id"].rpartition("x")[2]),
    )
    heads, biases = 2 + gradients, 1 + reference_bias + gradients
    batch = [*[2 * hidden * words] * 2, 8 * words, texts, 2]
    return [*[2 * hidden * outputs] * heads, *[2 * outputs] * biases, *batch]


def peak_bytes(row: Mapping[str, str]) -> int:
    """The peak of a row, by the trace, with what its process held."""
    with torch.device("meta"):
        benchmark = KINDS.get(row["module"], Benchmark)(row)
    report = trace_step(
        benchmark,
        None,
        benchmark.step,
        options=Options(capability=find(GPUS[row["gpu"]]).capability),
    )
    return report.peak_allocated_bytes + sum(map(round_size, [*left_behind(row), *left_again(row)]))


def results(rows: Iterable[Mapping[str, str]] | None = None) -> Iterator[dict[str, Any]]:
    """For each row, of all unless some are named, what was measured, what the trace says, and the difference."""
    for row in read() if rows is None else rows:
        measured, traced = int(row["peak_allocated_bytes"]), peak_bytes(row)
        yield {
            "id": row["id"],
            "measured_bytes": measured,
            "predicted_bytes": traced,
            "error_percent": round(100 * (traced / measured - 1), 4),
        }


def shown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows for people, and how many come out to 2 KiB."""
    lines, near = [], 0
    for row in rows:
        measured, apart = (
            row["measured_bytes"] / MIB,
            row["predicted_bytes"] - row["measured_bytes"],
        )
        near += abs(apart) <= NEAR
        lines.append(
            f"{row['id']:34} {measured:10.2f} MiB  {apart / MIB:+8.4f} MiB  {row['error_percent']:+.4f} %"
        )
    return "\n".join([*lines, f"{len(lines)} modules, {near} to 2 KiB"])


def main() -> int:
    print(shown(results()))
    return 0


if __name__ == "__main__":
    command(main)
