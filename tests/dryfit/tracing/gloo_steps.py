"""Steps on several CPUs, measured: run by test_several_gpus.py as a program of its own, one process for each.

python -m tests.dryfit.tracing.gloo_steps FOLDER torch | zero NUMBER [NUMBER ...]      a step of STEPS or of ZERO_STEPS
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

# Method, strategy, and the fields that differ.
STEPS = [
    *[(method, strategy, {}) for strategy in ("fsdp2", "ddp") for method in ("lora", "full")],
    (
        "full",
        "fsdp2",
        {"precision": "bf16", "parallel": {"strategy": "fsdp2", "gpus": 2, "reduce_in_fp32": True}},
    ),
]
ULYSSES = {
    name: {"parallel": {"strategy": name, "gpus": 2, "ulysses": 2}} for name in ("zero2", "zero3")
}
# Of DeepSpeed's, with the fields that differ; the last word: with DeepSpeed's own sizes of buckets, or small ones.
ZERO_STEPS = [
    ("full", "zero2", {}, "own"),
    ("full", "zero3", {}, "own"),
    *[
        (method, strategy, {}, "small")
        for method in ("full", "lora")
        for strategy in ("zero2", "zero3")
    ],
    *[("full", strategy, {"precision": "bf16-mixed"}, "small") for strategy in ("zero2", "zero3")],
    *[
        ("lora", strategy, {"precision": "bf16", "autocast": "bf16"}, "small")
        for strategy in ("zero2", "zero3")
    ],
    *[
        ("qlora", strategy, {"precision": "bf16", "autocast": "bf16"}, "small")
        for strategy in ("zero2", "zero3")
    ],
    *[("full", strategy, {"gradient_accumulation": 2}, "small") for strategy in ("zero2", "zero3")],
    *[("full", strategy, ULYSSES[strategy], "small") for strategy in ("zero2", "zero3")],
    (
        "full",
        "zero3",
        ULYSSES["zero3"] | {"precision": "bf16-mixed", "gradient_accumulation": 2},
        "small",
    ),
    ("lora", "zero2", ULYSSES["zero2"] | {"precision": "bf16", "autocast": "bf16"}, "small"),
]


def measured_with_deepspeed(numbers: Sequence[str]) -> dict[str, dict]:
    """What each of these of :data:`ZERO_STEPS` takes in this process."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from torch.nn import functional

    from dryfit.engine.trace import Options, measure_step
    from dryfit.step.model import build_model
    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.parallel import parallelize
    from dryfit.step.step import random_step
    from dryfit.tracing.prepare import labels
    from tests.dryfit.tracing.several_gpus import SMALL, scenario

    _deepspeed_on_gloo()
    measured, linear = {}, functional.linear
    for number in numbers:
        method, strategy, fields, buckets = ZERO_STEPS[int(number)]
        step = scenario(method, strategy, zero=SMALL if buckets == "small" else {}, **fields)
        model = build_model(step, "cpu")
        optimizer = build_optimizer(model, step, learning_rate=1e-4)

        def begin(model=model, optimizer=optimizer, step=step):
            engine = parallelize(model, step, "cpu", optimizer)
            return random_step(engine, optimizer, step, "cpu", max_grad_norm=1.0)

        report = measure_step(
            model, optimizer, None, options=Options(label=labels(model), begin=begin)
        )
        functional.linear = linear  # ZeRO-3 leaves its own there
        parallel_state_sp._release_sequence_parallel_groups()
        measured[number] = {"phases": report.phases, "resident_bytes": report.resident_bytes}
    return measured


def _deepspeed_on_gloo() -> None:
    """Let DeepSpeed use gloo alone, which compiles nothing, and let gloo's thread let go of each buffer.

    Gloo has no reduce-scatter: it would reduce a copy of all of it, which NCCL does not make. Here it is done in place.
    """
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.comm.torch import TorchBackend
    from torch import distributed as dist

    def settled(function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            work = function(*arguments, **options)
            if work is not None:
                work.wait()
            time.sleep(0.005)
            return work

        return call

    def reduce_scatter_tensor(_, output_tensor, input_tensor, op=None, group=None, async_op=False):
        work = dist.all_reduce(input_tensor, group=group, async_op=async_op)
        if work is not None:
            work.wait()
        output_tensor.copy_(input_tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)])
        return work

    CPU_Accelerator.create_op_builder = lambda *_: None
    TorchBackend.reduce_scatter_tensor = reduce_scatter_tensor
    names = (
        "all_gather",
        "all_gather_into_tensor",
        "all_reduce",
        "all_to_all_single",
        "broadcast",
        "reduce",
        "reduce_scatter_tensor",
    )
    for name in names:
        setattr(TorchBackend, name, settled(getattr(TorchBackend, name)))


def main(folder: Path, kind: str, *numbers: str) -> int:
    import torch
    from torch import distributed as dist

    from dryfit.engine.trace import Options, measure_step
    from dryfit.step import step as taken
    from dryfit.step.model import build_model
    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.parallel import parallelize
    from dryfit.step.step import random_step
    from dryfit.tracing.prepare import labels
    from tests.dryfit.tracing.several_gpus import scenario

    clip = taken.clip_gradients

    def clip_later(*arguments: object) -> object:
        time.sleep(0.1)  # until gloo's thread has let go of its last buffer
        return clip(*arguments)

    taken.clip_gradients = clip_later
    torch.set_num_threads(1)
    child = os.fork()  # the libraries are loaded once; no thread has been started yet
    rank = 0 if child else 1
    store = dist.FileStore(str(folder / "store"), 2)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=600)
    )
    measured = measured_with_deepspeed(numbers) if kind == "zero" else {}
    for number in numbers if kind == "torch" else ():
        method, strategy, fields = STEPS[int(number)]
        step = scenario(method, strategy, **fields)
        model = build_model(step, "cpu")
        label, begin, one_step = labels(model), None, None
        if strategy == "ddp":
            optimizer = build_optimizer(model, step, learning_rate=1e-4)

            def begin(model=model, optimizer=optimizer, step=step):
                wrapped = parallelize(model, step, "cpu")
                time.sleep(0.1)
                return random_step(wrapped, optimizer, step, "cpu", max_grad_norm=1.0)

        else:
            model = parallelize(model, step, "cpu")
            optimizer = build_optimizer(model, step, learning_rate=1e-4)
            one_step = random_step(model, optimizer, step, "cpu", max_grad_norm=1.0)
        report = measure_step(model, optimizer, one_step, options=Options(label=label, begin=begin))
        measured[number] = {"phases": report.phases, "resident_bytes": report.resident_bytes}
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
