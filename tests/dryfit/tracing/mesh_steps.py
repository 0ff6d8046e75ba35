"""Steps on meshes of two and four GPUs, as scenarios; measured in as many gloo processes by this program.

python -m tests.dryfit.tracing.mesh_steps FOLDER 2 NAME [NAME ...]      the steps that take as many GPUs
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

from dryfit.scenario.scenario import Scenario
from tests.dryfit.tracing.several_gpus import LLAMA

LAYERS = LLAMA | {"num_hidden_layers": 4}
EXPERTS = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "head_dim": 32,
}
NORMS_IN_HEADS = LLAMA | {"model_type": "qwen3", "head_dim": 32}
LORA = {"method": "lora", "lora": {"rank": 8}}
AUTOCAST = {"precision": "bf16-mixed"}
PIPELINE = {"strategy": "none", "pipeline": 2}
SEQUENCE = {"strategy": "none", "tensor": 2, "sequence_parallel": True}
DIVIDED = {"gpus": 4, "tensor": 2, "sequence_parallel": True}
# By name: parts of `parallel`, and other fields that differ.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor": ({"strategy": "none", "tensor": 2}, {}),
    "tensor, checkpointed": ({"strategy": "none", "tensor": 2}, {"gradient_checkpointing": True}),
    "tensor, autocast": ({"strategy": "none", "tensor": 2}, AUTOCAST),
    "tensor, LoRA": ({"strategy": "none", "tensor": 2}, LORA),
    "tensor, LoRA, checkpointed": (
        {"strategy": "none", "tensor": 2},
        LORA | {"gradient_checkpointing": True},
    ),
    "tensor, sequence": (SEQUENCE, {}),
    "tensor, sequence, loss": (
        SEQUENCE | {"loss_parallel": True},
        {"gradient_checkpointing": True},
    ),
    "tensor, loss": (SEQUENCE | {"sequence_parallel": False, "loss_parallel": True}, {}),
    "tensor, sequence, loss, autocast": (SEQUENCE | {"loss_parallel": True}, AUTOCAST),
    "context": ({"context": 2}, {}),
    "context, LoRA": ({"context": 2}, LORA),
    "context, two micro-batches": ({"context": 2}, {"gradient_accumulation": 2}),
    "1f1b": (PIPELINE, {"gradient_accumulation": 4, "model": LAYERS}),
    "gpipe": (PIPELINE | {"schedule": "gpipe"}, {"gradient_accumulation": 4, "model": LAYERS}),
    "interleaved": (
        PIPELINE | {"schedule": "interleaved"},
        {"gradient_accumulation": 4, "model": LAYERS},
    ),
    "zero bubble": (
        PIPELINE | {"schedule": "zero_bubble"},
        {"gradient_accumulation": 4, "model": LAYERS},
    ),
    "uneven stages": (
        PIPELINE | {"stage_layers": [3, 1]},
        {"gradient_accumulation": 4, "model": LAYERS},
    ),
    "1f1b, autocast": (PIPELINE, {"gradient_accumulation": 4, "model": LAYERS, **AUTOCAST}),
    "1f1b, LoRA": (PIPELINE, {"gradient_accumulation": 4, "model": LAYERS, **LORA}),
    "interleaved, LoRA": (
        PIPELINE | {"schedule": "interleaved"},
        {"gradient_accumulation": 4, "model": LAYERS, **LORA},
    ),
    "expert": ({"expert": 2}, {"model": EXPERTS}),
    "expert, autocast": ({"expert": 2}, {"model": EXPERTS, **AUTOCAST}),
    "fsdp2 x tensor": ({"gpus": 4, "tensor": 2}, {}),
    "fsdp2 x tensor, autocast": ({"gpus": 4, "tensor": 2}, AUTOCAST),
    "fsdp2 x tensor, sums in fp32": ({"gpus": 4, "tensor": 2, "reduce_in_fp32": True}, AUTOCAST),
    "fsdp2 x tensor, LoRA": ({"gpus": 4, "tensor": 2}, LORA),
    "fsdp2 x tensor, sequence": (
        DIVIDED | {"reshard_after_forward": False},
        {"gradient_accumulation": 2},
    ),
    "fsdp2 x tensor, sequence, loss": (
        DIVIDED | {"loss_parallel": True},
        {"model": NORMS_IN_HEADS},
    ),
    "fsdp2 x tensor, sequence, loss, autocast": (
        DIVIDED | {"loss_parallel": True, "reduce_in_fp32": True},
        AUTOCAST | {"gradient_checkpointing": True},
    ),
    "replicate": ({"gpus": 4, "replicate": 2}, LORA),
    "pipeline x tensor": (
        {"strategy": "none", "gpus": 4, "pipeline": 2, "tensor": 2},
        {"gradient_accumulation": 2, "model": LAYERS},
    ),
    "pipeline x tensor, sequence, loss": (
        {
            "strategy": "none",
            "gpus": 4,
            "pipeline": 2,
            "tensor": 2,
            "sequence_parallel": True,
            "loss_parallel": True,
        },
        {"gradient_accumulation": 2, "model": LAYERS},
    ),
    "interleaved x tensor, sequence, autocast": (
        {"strategy": "none", "gpus": 4, "pipeline": 2, "tensor": 2, "sequence_parallel": True}
        | {"schedule": "interleaved"},
        {"gradient_accumulation": 4, "model": LAYERS, **AUTOCAST},
    ),
    "fsdp2 x context": ({"gpus": 4, "context": 2}, {}),
    "context of four": ({"gpus": 4, "context": 4}, {}),
    "tensor x expert": ({"gpus": 4, "tensor": 2, "expert": 4}, {"model": EXPERTS}),
}
# What each of these adds, another step has beside something else.
EACH_NIGHT = {
    "tensor, checkpointed",
    "tensor, LoRA",
    "tensor, loss",
    "tensor, sequence, loss",
    "1f1b, autocast",
    "interleaved, LoRA",
    "expert, autocast",
    "fsdp2 x tensor, autocast",
    "pipeline x tensor",
}

# With torchao's products in 8 bits (the extra `optimizers`).
_EIGHT = {"precision": "bf16", "float8": "tensorwise"}
FLOAT8_STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float8, fsdp2": ({}, _EIGHT | {"gradient_checkpointing": True}),
    "float8, gathered in 8 bits": (
        {"float8_all_gather": True},
        _EIGHT | {"precision": "bf16-mixed"},
    ),
    "float8 by rows, context": ({"context": 2}, _EIGHT | {"float8": "rowwise"}),
    "float8, tensor, sequence, loss": (SEQUENCE | {"loss_parallel": True}, _EIGHT | AUTOCAST),
    "float8 by rows, tensor, sequence": (SEQUENCE, _EIGHT | {"float8": "rowwise"}),
}

UNLUCKY = "expert, all to the first"  # the first GPU's experts get all tokens


SAVED = "context"  # the step after which a full state dict is gathered


def scenario(name: str) -> Scenario:
    """A step of a small model."""
    parallel, fields = (STEPS | FLOAT8_STEPS)["expert" if name == UNLUCKY else name]
    mapping = {
        "model": LLAMA,
        "method": "full",
        "precision": "fp32",
        "sequence_length": 64,
        "micro_batch": 2,
    }
    mapping["gradient_checkpointing"] = False
    return Scenario.from_mapping(
        mapping | {"parallel": {"strategy": "fsdp2", "gpus": 2, **parallel}} | fields
    )


def in_turns(model: Any, among: int = 4) -> None:
    """Let routers choose ``among`` the first experts in turns: each of these gets as many tokens as the others."""
    import torch

    for router in (module for name, module in model.named_modules() if name.endswith("mlp.gate")):

        def choose(
            *args: Any, forward: Any = router.forward, experts: int = among, **named: Any
        ) -> tuple:
            *scores, chosen = forward(*args, **named)
            return *scores, (torch.arange(chosen.numel()) % experts).view_as(chosen)

        router.forward = choose


def float8_as_bytes() -> None:
    """Let gloo, which knows no float8, exchange torchao's tensors as bytes."""
    import torch
    from torchao.float8.float8_ops import FLOAT8_OPS_TABLE

    def exchanging(handler: Any) -> Any:
        def call(operator: Any, args: Any, kwargs: Any = None) -> Any:
            def exchange(data: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
                return operator(data.view(torch.uint8), *rest, **named).view(data.dtype)

            return handler(exchange, args, kwargs or {})

        return call

    for name in ("all_gather_into_tensor", "wait_tensor"):
        operator = getattr(torch.ops._c10d_functional, name).default
        FLOAT8_OPS_TABLE[operator] = exchanging(FLOAT8_OPS_TABLE[operator])


def main(folder: Path, count: int, *names: str) -> int:
    import torch

    from dryfit.engine.trace import Options, measure_step
    from dryfit.step import step as taken
    from dryfit.step.model import build_model
    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.parallel import parallelize
    from dryfit.tracing.checkpoints import gathering
    from dryfit.tracing.prepare import labels
    from tests.dryfit.engine.pairs import figures, finish, gloo_as_nccl, start

    rank, children = start(folder, count)
    clip, measured = taken.clip_gradients, {}
    if any(name in FLOAT8_STEPS for name in names):
        float8_as_bytes()

    def clip_later(*arguments: Any) -> torch.Tensor:
        import time

        time.sleep(0.1)  # until gloo's thread has let go of its last buffer
        return clip(*arguments)

    with gloo_as_nccl(), mock.patch.object(taken, "clip_gradients", clip_later):
        for name in names:
            step = scenario(name)
            if step.parallel.gpus != count:
                continue
            model = build_model(step, "cpu")
            in_turns(model, 2 if name == UNLUCKY else 4)
            label = labels(model)
            model = parallelize(model, step, "cpu")
            optimizer = build_optimizer(model, step)
            one_step = taken.random_step(model, optimizer, step, "cpu", max_grad_norm=1.0)
            measured[name] = figures(
                measure_step(model, optimizer, one_step, options=Options(label=label))
            )
            if name == SAVED:
                for cpu_offload in (True, False):
                    step, options = gathering(model, cpu_offload, []), Options(label=label, steps=1)
                    report = measure_step(model, None, step, options=options)
                    measured[f"saved, {cpu_offload}"] = report.peak_allocated_bytes
    return finish(folder, rank, measured, children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
