"""A checkpoint of any model's shape with random weights, and a LoRA adapter for it, written with little memory.

    python -m tests.benchmarks.synthetic_checkpoint --config config/models/qwen2.5-coder-7b.json --output DIR

makes DIR/base (15.2 GB in bfloat16, four shards and their index) and DIR/adapter (rank 16 on every linear layer),
enough to measure and try a merge of that size where the real weights can't be had.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dryfit.common.files import atomic_open, read_json, write_json
from dryfit.common.terminal import command, log
from scripts.common.checkpoint import INDEX, ITEM_BYTES, SAFETENSORS_NAMES, SINGLE, lay_out_shard

BLOCK = 2**22  # random numbers drawn at once
STANDARD_DEVIATION = 0.02  # what these models initialize their matrices with


def shapes_and_linears(config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Each parameter's shape, and the linear layers that ``target_modules: all-linear`` means."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    head = model.get_output_embeddings()
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, linears


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    """Random matrices, and ones for vectors (norms), streamed into one safetensors file."""
    import torch

    entries = [(name, SAFETENSORS_NAMES[dtype], shape) for name, shape in tensors.items()]
    generator = torch.Generator().manual_seed(seed)
    block = torch.empty(BLOCK)
    with atomic_open(path, "wb") as handle:
        handle.write(lay_out_shard(path, entries, {"format": "pt"}).header)
        for shape in tensors.values():
            left = math.prod(shape)
            while left:
                part = block[: min(left, BLOCK)]
                if len(shape) == 1:
                    part.fill_(1.0)
                else:
                    part.normal_(0.0, STANDARD_DEVIATION, generator=generator)
                handle.write(part.to(getattr(torch, dtype)).view(torch.uint8).numpy())
                left -= len(part)


def make_base(
    config: dict[str, Any], folder: Path, dtype: str, shard_bytes: int, seed: int
) -> None:
    """A model folder in the layout that transformers writes: shards filled in order, an index for several."""
    shapes, _ = shapes_and_linears(config)
    item = ITEM_BYTES[SAFETENSORS_NAMES[dtype]]
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item
        if used and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    names = (
        [SINGLE]
        if len(shards) == 1
        else [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
    )
    for number, (name, tensors) in enumerate(zip(names, shards, strict=True)):
        log.info("%s: %d tensors", name, len(tensors))
        write_shard(folder / name, tensors, dtype, seed + number)
    if len(shards) > 1:
        total = sum(math.prod(shape) * item for shape in shapes.values())
        weight_map = {
            tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors
        }
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", {**config, "dtype": dtype})


def make_adapter(config: dict[str, Any], folder: Path, rank: int, seed: int) -> None:
    """A float32 LoRA adapter on every linear layer, with a B that is not zero, as training leaves it."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    shapes, linears = shapes_and_linears(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in linears:
        outputs, inputs = shapes[f"{name}.weight"]
        tensors[f"base_model.model.{name}.lora_A.weight"] = (
            torch.randn(rank, inputs, generator=generator) * 0.02
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = (
            torch.randn(outputs, rank, generator=generator) * 0.02
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in linears})
    LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.synthetic_checkpoint", description=__doc__
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the model's config.json")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--shard-bytes", type=int, default=4_000_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = read_json(arguments.config)
    make_base(
        config, arguments.output / "base", arguments.dtype, arguments.shard_bytes, arguments.seed
    )
    make_adapter(config, arguments.output / "adapter", arguments.rank, arguments.seed)
    size = sum(path.stat().st_size for path in (arguments.output / "base").glob("*.safetensors"))
    print(json.dumps({"bytes": size, "output": str(arguments.output)}))
    return 0


if __name__ == "__main__":
    command(main)
