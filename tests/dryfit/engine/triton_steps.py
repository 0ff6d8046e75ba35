"""Steps with Triton kernels, traced where a card is simulated, or measured with Triton's interpreter.

    python -m tests.dryfit.engine.triton_steps measure | trace

Prints the figures of each as JSON. A process decides once, when kernels are defined, whether they are interpreted.
"""

import gc
import json
import os
import sys
from contextlib import nullcontext
from functools import partial

MEASURED = sys.argv[1:] == ["measure"]
if MEASURED:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

from dryfit.engine.card import A100  # noqa: E402
from dryfit.engine.patching import on_meta  # noqa: E402
from dryfit.engine.simulation import simulated  # noqa: E402
from dryfit.engine.trace import Options, measure_step, trace_step  # noqa: E402


@triton.jit
def scale_kernel(source, target, count, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(
        target + index, tl.load(source + index, mask=index < count) * factor, mask=index < count
    )


class Scale(torch.autograd.Function):
    """Twice its input, with scratch memory that the kernel doesn't use."""

    @staticmethod
    def forward(ctx, inputs):
        output, _scratch = (
            torch.empty_like(inputs),
            torch.empty(2 * inputs.numel(), device=inputs.device),
        )
        count = inputs.numel()
        scale_kernel[lambda given: (triton.cdiv(count, given["BLOCK"]),)](
            inputs, output, count, 2.0, BLOCK=64
        )
        return output

    @staticmethod
    def backward(ctx, grad):
        of_input = torch.empty_like(grad)
        scale_kernel[(triton.cdiv(grad.numel(), 64),)](
            grad.contiguous(), of_input, grad.numel(), 2.0, BLOCK=64
        )
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
    """One head of linear attention of flash-linear-attention's, over 300 tokens as one row."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from fla.modules import FusedRMSNormGated, ShortConvolution

        self.kind, self.inputs, self.head = kind, nn.Linear(32, 64), nn.Linear(16, 8)
        self.convolution = ShortConvolution(16, 4)
        self.norm = FusedRMSNormGated(16)

    def forward(self, inputs, labels):
        query, key, value, gate = (
            part[None, :, None] for part in self.inputs(inputs).split(16, dim=-1)
        )
        query = self.convolution(query[:, :, 0])[0][:, :, None]
        if self.kind == "delta":
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            decay, strength = functional.logsigmoid(gate[..., 0]), gate[..., 1].sigmoid()
            mixed, _ = chunk_gated_delta_rule(
                query, key, value, decay, strength, use_qk_l2norm_in_kernel=True
            )
        elif self.kind == "gated":
            from fla.ops.gla import chunk_gla

            mixed, _ = chunk_gla(query, key, value, functional.logsigmoid(gate))
        else:
            from fla.ops.gla import fused_recurrent_gla

            mixed, _ = fused_recurrent_gla(query, key, value, functional.logsigmoid(gate))
        return functional.cross_entropy(self.head(self.norm(mixed, gate)[0, :, 0]), labels)


STEPS = {
    "own": OwnKernel,
    "liger": lambda: OfLiger(fused=False),
    "liger_fused": lambda: OfLiger(fused=True),
}
STEPS |= {f"fla_{kind}": partial(OfFla, kind) for kind in ("delta", "gated", "recurrent")}


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
    }


def interpreted() -> None:
    """Take what the interpreter itself makes out of the step, and the cycles in which it holds a kernel's arguments.

    Its loops count in Python's numbers, of which kernels of fla ask ``i.to(tl.int64)``; an autotuner asks a driver.
    """
    from triton.runtime import autotuner, interpreter

    kind = interpreter.GridExecutor
    launch = kind.__call__

    def counted(*bounds):
        return map(interpreter._implicit_cvt, range(*map(int, bounds)))

    def call(executor, *args, **kwargs):
        names = executor.fn.__globals__
        names["range"] = counted
        try:
            with _disable_current_modes():
                result = launch(executor, *args, **kwargs)
        finally:
            del names["range"]
        gc.collect()
        return result

    def first_configuration(tuner, *args, **kwargs):
        tuner.nargs, tuner.best_config = (
            dict(zip(tuner.arg_names, args, strict=False)),
            tuner.configs[0],
        )
        result = tuner.fn.run(*args, **tuner.best_config.all_kwargs(), **kwargs)
        tuner.nargs = None
        return result

    kind.__call__ = call
    autotuner.Autotuner.run = first_configuration


if __name__ == "__main__":
    if MEASURED:
        interpreted()
    with nullcontext() if MEASURED else simulated(A100):
        print(json.dumps({name: figures(name) for name in STEPS}))
