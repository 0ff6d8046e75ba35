"""Steps with Triton kernels, traced where a card is simulated, or measured with Triton's interpreter.

    python -m tests.will_it_fit.engine.triton_steps measure | trace

Prints the figures of each as JSON. A process decides once, when kernels are defined, whether they are interpreted.
"""

import gc
import json
import os
import sys
from contextlib import nullcontext

MEASURED = sys.argv[1:] == ["measure"]
if MEASURED:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

from will_it_fit.engine.card import A100  # noqa: E402
from will_it_fit.engine.patching import on_meta  # noqa: E402
from will_it_fit.engine.simulation import simulated  # noqa: E402
from will_it_fit.engine.trace import Options, measure_step, trace_step  # noqa: E402


@triton.jit
def scale_kernel(source, target, count, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index < count) * factor, mask=index < count)


class Scale(torch.autograd.Function):
    """Twice its input, with scratch memory that the kernel doesn't use."""

    @staticmethod
    def forward(ctx, inputs):
        output, scratch = torch.empty_like(inputs), torch.empty(2 * inputs.numel(), device=inputs.device)  # noqa: F841
        count = inputs.numel()
        scale_kernel[lambda given: (triton.cdiv(count, given["BLOCK"]),)](inputs, output, count, 2.0, BLOCK=64)
        return output

    @staticmethod
    def backward(ctx, grad):
        of_input = torch.empty_like(grad)
        scale_kernel[(triton.cdiv(grad.numel(), 64),)](grad.contiguous(), of_input, grad.numel(), 2.0, BLOCK=64)
        return of_input


class OwnKernel(nn.Module):
    """A head on scaled features."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(32, 48), nn.Linear(48, 8)

    def forward(self, inputs, labels):
        return functional.cross_entropy(self.head(Scale.apply(self.features(inputs))), labels)


class OfLiger(nn.Module):
    """A head of 800 words whose loss is one of Liger's; its norms and activations don't run in the interpreter."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        from liger_kernel.transformers import functional as liger

        self.features, self.head = nn.Linear(32, 48), nn.Linear(48, 800, bias=False)
        self.loss = liger.liger_cross_entropy
        self.loss_of_head = liger.liger_fused_linear_cross_entropy
        self.fused = fused

    def forward(self, inputs, labels):
        features = self.features(inputs)
        if self.fused:
            return self.loss_of_head(features, self.head.weight, labels)
        return self.loss(self.head(features), labels)


class OfFla(nn.Module):
    """Linear attention by the gated delta rule, through flash-linear-attention."""

    def __init__(self) -> None:
        super().__init__()
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        self.projections, self.head = nn.Linear(32, 100), nn.Linear(32, 8)
        self.rule = chunk_gated_delta_rule

    def forward(self, inputs, labels):
        parts = self.projections(inputs[:256].view(4, 64, 32)).split((32, 32, 32, 2, 2), dim=-1)
        queries, keys, values = (each.reshape(4, 64, 2, 16) for each in parts[:3])
        decay, beta = functional.logsigmoid(parts[3]), parts[4].sigmoid()
        out, _ = self.rule(queries, keys, values, decay, beta, use_qk_l2norm_in_kernel=True)
        return functional.cross_entropy(self.head(out.reshape(256, 32)), labels[:256])


failing: set[str] = set()  # kernels that the interpreter can't run: they compute nothing, and allocate nothing anyway
STEPS = {
    "own": OwnKernel,
    "liger": lambda: OfLiger(fused=False),
    "liger_fused": lambda: OfLiger(fused=True),
    "fla": OfFla,
}


def figures(name: str) -> dict:
    """Bytes of each phase, and the kernels that ran."""
    with nullcontext() if MEASURED else on_meta("cpu"):
        torch.manual_seed(0)
        model = STEPS[name]()
        optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(300, 32), torch.randint(0, 8, (300,))

    def step(given):
        model(*given).backward()
        optimizer.step()
        optimizer.zero_grad()

    ways = (measure_step, Options()) if MEASURED else (trace_step, Options(target="cpu"))
    report = ways[0](model, optimizer, step, batch, ways[1])
    return {
        "phases": report.phases,
        "components": report.components,
        "kernels": report.triton_kernels,
        "failing": sorted(failing),
    }


def interpreted() -> None:
    """Take what the interpreter itself makes out of the step, and the cycles in which it holds a kernel's arguments."""
    from triton.runtime import autotuner, errors, interpreter

    kind = interpreter.GridExecutor
    launch = kind.__call__

    def call(executor, *args, **kwargs):
        with _disable_current_modes():
            try:
                result = launch(executor, *args, **kwargs)
            except errors.InterpreterError:
                result = failing.add(executor.fn.__name__)
        gc.collect()
        return result

    kind.__call__ = call
    autotuner.Autotuner.do_bench = property(lambda tuner: lambda call, **asked: [1.0] * 3)  # the first one wins


if __name__ == "__main__":
    if MEASURED:
        interpreted()
    with nullcontext() if MEASURED else simulated(A100):
        print(json.dumps({name: figures(name) for name in STEPS}))
