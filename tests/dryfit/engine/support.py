"""What the engine follows and what it refuses, each line tried: the table on its page.

python -m tests.dryfit.engine.support --write
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import bitsandbytes
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.optimization import Adafactor

from dryfit.engine.errors import TraceError
from dryfit.engine.patching import device_lists, patched
from dryfit.engine.trace import Options, measure_step, trace_step
from tests.repository import ROOT

PAGE = ROOT / "docs" / "memory-core.md"
BEGIN, END = "<!-- support: begin -->\n", "<!-- support: end -->"
SIZE = 80


def model() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(4)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(16, SIZE), torch.randint(SIZE, (16,))


def loop(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward: Callable = lambda net, inputs: net(inputs),
    around: Callable = nullcontext,
    micro_batches: int = 1,
    clip: bool = False,
) -> Callable:
    def step(batch):
        for _ in range(micro_batches):
            with around():
                loss = functional.cross_entropy(forward(net, batch[0]), batch[1])
            loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def through(net: nn.Module, inputs: torch.Tensor, **options) -> torch.Tensor:
    return net[2:](checkpoint(net[:2], inputs, **options))


def from_inputs(net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return through(net, inputs.requires_grad_(), use_reentrant=True)


def kept(_, operator, *args, **options) -> CheckpointPolicy:
    wanted = operator is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


def reading(net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    output = net(inputs)
    return output if output.mean() > 0 else -output


def chosen(net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return net(inputs) * (torch.arange(16, device=inputs.device) % 2 == 0).nonzero().shape[0]


def picked(net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return net(inputs).gather(1, torch.zeros(inputs.shape, dtype=torch.long, device=inputs.device))


def regression(net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    output = net(inputs)
    return output + functional.mse_loss(output, inputs)


def convolved(net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return functional.conv1d(
        net(inputs).unsqueeze(1), torch.ones(4, 1, 3, device=inputs.device), padding=1
    ).sum(1)


def recurring(kind: str, net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    layer = getattr(nn, kind)(SIZE, SIZE, device=inputs.device)
    return layer(net(inputs).unsqueeze(0))[0].squeeze(0)


def resized(net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    output = net(inputs)
    return (
        output
        + torch.exp(inputs, out=inputs.new_empty(0))
        + inputs.new_zeros(0).resize_(16, SIZE).zero_()
    )


def compiled(net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return torch.compile(functional.relu)(net(inputs))


SELECTIVE = partial(create_selective_checkpoint_contexts, kept)
LOOPS = {
    "a plain loop, clipped": {"clip": True},
    "accumulated gradients": {"micro_batches": 2},
    "autocast to bf16": {"around": partial(torch.autocast, "cpu", torch.bfloat16)},
    "checkpointing": {"forward": partial(through, use_reentrant=False)},
    "checkpointing, reentrant": {"forward": from_inputs},
    "selective checkpointing": {
        "forward": partial(through, use_reentrant=False, context_fn=SELECTIVE)
    },
    "activations kept on the host": {"around": torch.autograd.graph.save_on_cpu},
    "shapes that follow from small integers": {"forward": chosen},
    "`gather`": {"forward": picked},
    "`mse_loss`": {"forward": regression},
    "a convolution (on a GPU a range)": {"forward": convolved},
    **{
        f"`nn.{kind}` (on a GPU a range)": {"forward": partial(recurring, kind)}
        for kind in ("GRU", "RNN")
    },
    "`out=`, `resize_`": {"forward": resized},
    "`torch.compile`": {"forward": compiled},
    "a float's value decides": {"forward": reading},
}
OPTIMIZERS = {
    **{
        f"`torch.optim.{name}`": getattr(torch.optim, name)
        for name in (
            "SGD",
            "Adam",
            "AdamW",
            "NAdam",
            "RAdam",
            "Adamax",
            "Adadelta",
            "Adagrad",
            "RMSprop",
            "Rprop",
            "ASGD",
            "Adafactor",
        )
    },
    "`AdamW`, amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "`AdamW`, foreach": partial(torch.optim.AdamW, foreach=True),
    "`AdamW`, fused": partial(torch.optim.AdamW, fused=True),
    "`SGD`, momentum, fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "transformers' `Adafactor`": partial(
        Adafactor, lr=0.1, scale_parameter=False, relative_step=False
    ),
    **{
        f"bitsandbytes' `{name}`": getattr(bitsandbytes.optim, name)
        for name in (
            "AdamW",
            "AdamW8bit",
            "Lion8bit",
            "AdEMAMix8bit",
            "Adagrad8bit",
            "RMSprop8bit",
            "SGD8bit",
        )
    },
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS |= {"`torch.optim.Muon`": torch.optim.Muon}
_SETTINGS = {
    "Adagrad8bit": {"lr": 0.1},
    "RMSprop8bit": {"lr": 0.1},
    "SGD8bit": {"lr": 0.1, "momentum": 0.9},
}


def outcome(optimizer: Callable = torch.optim.AdamW, **options) -> str:
    """What the trace for a CPU says beside the measurement there."""
    name = getattr(optimizer, "__name__", "")
    found, given = [], _SETTINGS.get(name, {})
    for device, answer in (("meta", trace_step), ("cpu", measure_step)):
        with torch.device(device):
            net = model()
        with patched(device_lists("cpu")):
            own = optimizer(net.parameters(), **given)
        try:
            report = answer(net, own, loop(net, own, **options), batch(), Options(target="cpu"))
        except TraceError as error:
            return f"refused: {str(error).splitlines()[0].partition(',')[0].rstrip('.')}"
        found.append(report.phases)
    traced, measured = found
    off = {phase: traced[phase] - size for phase, size in measured.items() if traced[phase] != size}
    told = ", ".join(f"{phase} {size:+,} bytes" for phase, size in off.items()) or "to the byte"
    return f"on a CPU {told}"


def table() -> str:
    """The page's table."""
    from tests.dryfit.engine.test_trainer import TRAINERS

    rows = [(name, outcome(**options)) for name, options in LOOPS.items()]
    rows += [(name, outcome(optimizer)) for name, optimizer in OPTIMIZERS.items()]
    rows += [
        (f"`train()` of {name}", "on a CPU to the byte (test_trainer.py)") for name in TRAINERS
    ]
    texts = dict.fromkeys(text for _, text in rows)
    lines = [
        f"| {'; '.join(name for name, found in rows if found == text)} | {text} |" for text in texts
    ]
    return "\n".join(["| | traced |", "| --- | --- |", *lines, ""])


def page_with(table: str) -> str:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + table + END + rest.partition(END)[2]


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(page_with(table()), encoding="utf-8")
