"""Why something else was measured: the difference put into the causes that the project knows, the likeliest first.

``nvidia-smi=14.2GiB``: what the process, or the whole GPU, was shown with. ``allocated=``, ``reserved=``: what
``torch.cuda.max_memory_allocated`` and ``max_memory_reserved`` said. ``oom=``: what the out-of-memory message calls
"allocated by PyTorch".
"""

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from dryfit.ask.question import Question
from dryfit.ask.words import changed
from dryfit.cards.gpus import catalogue
from dryfit.common.errors import UserError
from dryfit.common.text import bytes_of, gib
from dryfit.tracing.trace import trace

KINDS = ("nvidia-smi", "reserved", "allocated", "oom")
EVALUATION_ROWS = 8  # TrainingArguments' default
CLOSE = 0.03  # of the measured size: what needs no cause


class Cause(NamedTuple):
    """One reason for more memory: how much it makes, and how to try it."""

    what: str
    size: int
    how: str = ""


def measured(text: str) -> tuple[str, int]:
    """What ``--measured`` says: which figure, and how many bytes. A size alone is nvidia-smi's."""
    kind, _, size = text.rpartition("=")
    kind = kind or KINDS[0]
    figure = bytes_of(size) or bytes_of(f"{size}MiB")  # nvidia-smi's own unit
    if kind.strip().lower() not in KINDS or figure is None:
        raise UserError(
            "`--measured` takes a size, a record or a snapshot.",
            where="--measured",
            found=text,
            allowed=f"{', '.join(KINDS)}, each with GiB, GB or MiB; a .json of `measure --record`; a .pickle",
            change={"--measured": "nvidia-smi=14.2GiB"},
        )
    return kind.strip().lower(), figure


def difference(asked: Question, answer: Mapping[str, Any], text: str) -> str:
    """The answer to "why is mine more?", as text."""
    kind, size = measured(text)
    own = answer["trace"]
    predicted = (
        own["peak_allocated_bytes"] if kind in ("allocated", "oom") else own["peak_reserved_bytes"]
    )
    context = (
        (asked.gpu or next(iter(catalogue().values()))).context_bytes if kind == "nvidia-smi" else 0
    )
    causes = _always(kind, own, context)
    explained = predicted + context
    left = size - explained
    lines = [
        f"{kind} shows {gib(size)}; of this step {gib(own['peak_allocated_bytes'])} are allocated at the peak"
        f" ({gib(size - own['peak_allocated_bytes'])} more).",
        "in any case:" if causes else "",
        *(f"  {gib(cause.size):>10}  {cause.what}" for cause in causes),
    ]
    if abs(left) <= CLOSE * size:
        close = abs(left) / size
        lines.append(
            f"That explains it: {gib(explained)} are expected, within {close:.1%} of what was seen."
        )
    elif left < 0:
        lines.append(
            f"What was seen is {gib(-left)} less than expected. Perhaps the step was not the longest one yet,"
            " or the process's figure is of another moment than the peak."
        )
    else:
        lines.append(f"{gib(left)} are left. What would make as much, the likeliest first:")
        for cause in sorted(_possible(asked, own, left), key=lambda cause: abs(cause.size - left)):
            lines.append(f"  {gib(cause.size):>10}  {cause.what}\n              {cause.how}")
        other = (
            "another process on the GPU, or another model kept in memory (nvidia-smi lists them)"
        )
        lines.append(f"  {gib(left):>10}  {other}")
    return "\n".join(line for line in lines if line)


def _always(kind: str, own: Mapping[str, Any], context: int) -> list[Cause]:
    causes = []
    if kind in ("reserved", "nvidia-smi"):
        spare = own["peak_reserved_bytes"] - own["peak_allocated_bytes"]
        causes.append(
            Cause("reserved by PyTorch above what is allocated: blocks that are free", spare)
        )
    if context:
        causes.append(
            Cause("the CUDA context: kernels and cuBLAS, which no allocator counts", context)
        )
    return causes


def _possible(asked: Question, own: Mapping[str, Any], left: int) -> list[Cause]:
    """Changes of the step that make it larger, each traced."""
    scenario = asked.scenario
    longer, rows = scenario.sequence_length * 2, scenario.micro_batch * 2
    spreads = (
        scenario.attention_mask == "none"
        and scenario.attention != "flash"
        and scenario.packing == "none"
    )
    changes: list[tuple[bool, str, dict[str, Any]]] = [
        (
            longer <= (scenario.size("max_position_embeddings") or longer),
            f"a longer batch: {longer:,} tokens a row",
            {"sequence_length": longer},
        ),
        (True, f"a larger batch: {rows} rows", {"micro_batch": rows}),
        (
            scenario.attention != "eager",
            "eager attention, which keeps every head's scores",
            {"attention": "eager", "attention_mask": "none"},
        ),
        (
            bool(scenario.gradient_checkpointing),
            "no gradient checkpointing",
            {"gradient_checkpointing": False},
        ),
        (
            scenario.method != "full" and scenario.kbit_preparation == "none",
            "PEFT's preparation: embeddings, head and norms in fp32",
            {"kbit_preparation": "peft"},
        ),
        (
            spreads,
            "padded rows, whose mask fused attention has to spread",
            {"attention_mask": "padding"},
        ),
        (
            scenario.loop == "trainer",
            "a loop of one's own that keeps the outputs: two steps' logits",
            {"loop": "manual"},
        ),
    ]
    causes = []
    for may, what, change in changes:
        if not may:
            continue
        try:
            other = trace(
                scenario.changed(**change),
                capability=asked.gpu.capability if asked.gpu else None,
                timeline=False,
            )
        except UserError:
            continue
        more = other["peak_reserved_bytes"] - own["peak_reserved_bytes"]
        if more > CLOSE * left:
            causes.append(
                Cause(what, more, f"try: {shlex.join(changed([], dict([*change.items()][:1])))}")
            )
    rows = EVALUATION_ROWS * scenario.sequence_length * scenario.size("vocab_size", 0)
    evaluation = 6 * rows - own["components"].get("logits_and_loss", 0)  # in 16 bits, and as fp32
    if evaluation > 0:
        what = f"evaluation: {EVALUATION_ROWS} rows, transformers' per_device_eval_batch_size, whose logits become fp32"
        causes.append(
            Cause(
                what,
                evaluation,
                "try: a smaller per_device_eval_batch_size, or prediction_loss_only",
            )
        )
    return causes
