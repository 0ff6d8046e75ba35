"""Questions as a stranger types them: answered, or refused with one line that is what was meant, and works.

They were written down before any was tried. Each has the step that is meant. ``run``: the program that answers.
"""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from dryfit.ask.command import read
from dryfit.common.errors import UserError

QUESTIONS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-7B-Instruct --gpu 4090": {"model": (3584, 28), "gpu": "rtx-4090"},
    "llama-3.1-8b --gpu 'RTX 3090' --method lora -s 4096":
        {"model": (4096, 32), "gpu": "rtx-3090", "method": "lora", "sequence_length": 4096},
    "meta-llama/Llama-3.1-8B --gpu a100 --method full": {"model": (4096, 32), "gpu": "a100", "method": "full"},
    "mistral 7b --gpu 24gb": {"model": (4096, 32), "gpu": 24},
    "qwen3-8b --gpu 2x3090 --qlora": {"model": (4096, 36), "gpu": "rtx-3090", "gpus": 2, "method": "qlora"},
    "Qwen3-8B --gpu H100 --max-seq-length 8192": {"model": (4096, 36), "gpu": "h100", "sequence_length": 8192},
    "qwen2.5-coder-7b --gpu 4090 --batch-size 4 --seq-len 2048":
        {"gpu": "rtx-4090", "micro_batch": 4, "sequence_length": 2048},
    "gemma-2-9b --vram 24": {"model": (3584, 42), "gpu": 24},
    "qwen2.5-14b --gpu a6000 --lora-r 64 --lora-alpha 128": {"gpu": "rtx-a6000", "rank": 64, "alpha": 128},
    "llama-3.1-70b --gpu 8xh100 --method full --strategy zero3":
        {"gpu": "h100", "gpus": 8, "method": "full", "strategy": "zero3"},
    "llama-3.1-70b --gpus 4 --gpu a100-80gb": {"gpu": "a100-80gb", "gpus": 4},
    "batch qwen3-8b --gpu 4090 -s 2k": {"command": "batch", "gpu": "rtx-4090", "sequence_length": 2048},
    "longest llama-3.1-8b --gpu 24GB --method qlora": {"command": "longest", "gpu": 24, "method": "qlora"},
    "max-batch qwen3-8b --gpu 4090": {"command": "batch", "gpu": "rtx-4090"},
    "config qwen3-8b --gpu 4090 --for unsloth -s 2048": {"command": "config", "for": "unsloth"},
    "config llama-3.1-8b --gpu 3090 --for llamafactory --rows 10k":
        {"command": "config", "for": "llama-factory", "gpu": "rtx-3090", "rows": 10_000},
    "gpus qwen2.5-32b --method qlora -s 4096 --rows 50000 --price 2":
        {"command": "gpus", "method": "qlora", "sequence_length": 4096, "rows": 50_000},
    "serve llama-3.1-8b --gpu 4090 --quant q4_k_m": {"command": "serve", "gpu": "rtx-4090", "weights": "q4_k_m"},
    "qwen3-8b --gpu 4090 --load-in-4bit": {"gpu": "rtx-4090", "method": "qlora"},
    "Qwen/Qwen3-30B-A3B --gpu 80gb --method qlora": {"model": (2048, 48), "gpu": 80, "method": "qlora"},
    "phi-4 --gpu 'NVIDIA GeForce RTX 4080 SUPER' --method lora": {"model": (5120, 40), "gpu": "4080", "method": "lora"},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --gpu 4090": {"model": (3584, 28), "gpu": "rtx-4090"},
    "unsloth/llama-3-8b-bnb-4bit --gpu t4": {"model": (4096, 32), "gpu": "t4", "method": "qlora"},
    "qwen2.5-coder-7b --gpu 4090 --objective dpo": {"gpu": "rtx-4090", "objective": "dpo"},
    "qwen2.5-7b --gpu 4090 --gradient-checkpointing false --attn flash_attention_2":
        {"gradient_checkpointing": False, "attention": "flash"},
    "fit qwen3-8b on 4090": {"model": (4096, 36), "gpu": "rtx-4090"},
    "qwen3-4b --gpu 4090 --epochs 3 --rows 20,000 --price 0.4": {"rows": 20_000, "gpu": "rtx-4090"},
    "openai/whisper-large-v3 --gpu 3060": {"run": "dryfit run --gpu rtx-3060-12gb train.py"},
    "mixtral-8x7b --gpu 2xA100-40GB --method qlora --bf16": {"gpu": "a100-40gb", "gpus": 2, "method": "qlora"},
    "does llama-3.1-8b fit on 24GB": {"model": (4096, 32), "gpu": 24},
}  # fmt: skip


def understood(line: str) -> dict[str, Any]:
    """What is understood of a line, or of the one line that its error gives instead."""
    words = shlex.split(line)
    try:
        asked = read(words)
    except UserError as error:
        writes = {part.write for part in error.parts or (error,)}
        assert len(writes) == 1, error
        program, *words = shlex.split(writes.pop() or "")
        assert program == "dryfit", error
        if words[0] == "run":
            return {"run": shlex.join([program, *words])}
        asked = read(words)
    step, gpu, options = asked.question.scenario, asked.question.gpu, asked.options
    return {
        **{name: getattr(step, name) for name in ("method", "sequence_length", "micro_batch", "objective",
                                                  "gradient_checkpointing", "attention")},
        "model": (step.size("hidden_size"), step.size("num_hidden_layers")), "command": options.command,
        "gpu": str(gpu.name if gpu else None), "gib": gpu and round(gpu.total_bytes / 2**30), "gpus": gpu and gpu.count,
        "rank": step.lora and step.lora.rank, "alpha": step.lora and step.lora.alpha,
        "strategy": step.parallel.strategy, "for": options.tool_for, "weights": options.weights,
        "rows": options.rows,
    }  # fmt: skip


@pytest.mark.parametrize("line", QUESTIONS)
def test_a_strangers_question_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    got = understood(line)
    for name, meant in QUESTIONS[line].items():
        if name == "gpu":
            assert abs(got["gib"] - meant) <= 2 if isinstance(meant, int) else meant in got["gpu"]
        else:
            assert got[name] == meant, name
