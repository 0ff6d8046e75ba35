"""Tiny random models of several architectures, and adapters on them with weights as training leaves them."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 97
IDS = torch.arange(3, 23)[None]
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Any] = {
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "phi3": lambda: transformers.Phi3Config(**_SIZES, pad_token_id=0),
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, num_local_experts=4),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
}


def make_base(
    folder: Path, kind: str = "qwen2", dtype: str = "float32", shard: str = "5GB"
) -> Path:
    """A base folder with everything that a merge passes on."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer_config.json", "chat_template.jinja", "LICENSE", "NOTICE", "README.md"):
        (folder / name).write_text("{}" if name.endswith("json") else name)
    return folder


def make_adapter(folder: Path, base: Path, seed: int = 1, **lora: Any) -> Path:
    """An adapter folder as PEFT saves it, every trained tensor moved away from its start."""
    lora.setdefault("target_modules", "all-linear")
    lora.setdefault("lora_alpha", 12)  # of rank 8: a scale of 1 would hide where it is left out
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    generator = torch.Generator().manual_seed(seed)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.add_(noise)  # in place: tied factors are two views of one memory
    peft.save_pretrained(str(folder))
    return folder


def with_adapter(base: Path, adapter: Path, dtype: str = "auto") -> PeftModel:
    """Base plus adapter, unmerged."""
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(adapter)
    ).eval()


def logits(model: Any) -> torch.Tensor:
    """Logits of a fixed input."""
    with torch.inference_mode():
        return model(IDS).logits


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def edit_weights(path: Path, edit: Any) -> None:
    """Load a safetensors file, let ``edit`` change the mapping, save it again."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def distance(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((ours - expected).abs().max() / expected.abs().max())
