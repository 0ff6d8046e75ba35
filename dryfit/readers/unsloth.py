"""What Unsloth does otherwise than TRL, transformers and PEFT (dryfit/data/unsloth.yaml)."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from dryfit.common.files import read_yaml
from dryfit.data import data_path
from dryfit.readers import common, grpo
from dryfit.readers.flow import Call
from dryfit.readers.reading import TOO_HIGH, TOO_LOW, Reading, is_on
from dryfit.readers.request import takes_flex
from dryfit.scenario.objectives import OBJECTIVES, SUPERVISED

_PAIR_TOKENS = 1024  # TRL's max_length
_GENERATIONS = 8  # Unsloth's and TRL's num_generations
UPPER_END = "its kernels are its own and keep less: this is the upper end of a range"
# Arguments of its loaders and adapters that a training keeps under their own names.
KEPT = (
    "full_finetuning",
    "load_in_16bit",
    "qat_scheme",
    "fast_inference",
    "gpu_memory_utilization",
    "unsloth_vllm_standby",
)


@cache
def rules() -> Mapping[str, Any]:
    """Unsloth's classes, defaults, and what of its arguments is not described."""
    return read_yaml(data_path("unsloth.yaml"))


def decide_what_a_load_leaves_open(values: dict[str, Any], halves: bool) -> None:
    """Bits and dtype of a load, as Unsloth takes them; ``halves``: whether the card computes in bf16."""
    named = str(values.get("model_name_or_path", "")).lower()
    if any(
        is_on(values.get(name))
        for name in ("full_finetuning", "load_in_16bit", "load_in_8bit", "load_in_fp8")
    ):
        values["load_in_4bit"] = False
    elif named.endswith("-bnb-4bit"):
        values["load_in_4bit"] = True
    dtype = str(values.get("dtype") or "auto")
    if dtype == "auto":
        dtype = "bfloat16" if halves else "float16"
    values["dtype"] = dtype


def targets(call: Call) -> Any:
    """What Unsloth adapts where a call names no modules: all linear layers, or the part that it lets train."""
    usual = rules()["defaults"]["target_modules"]
    if call.owner not in ("FastModel", "FastVisionModel"):
        return list(usual)
    attention = call.words.get("finetune_attention_modules", True)
    mlp = call.words.get("finetune_mlp_modules", True)
    if attention and mlp:
        return "all-linear"
    return [
        name for name in usual if (name in usual[:4] and attention) or (name in usual[4:] and mlp)
    ]


def save_instead(values: dict[str, Any]) -> None:
    """Unsloth trains embedding and head whole where they are among the modules to adapt (models/llama.py)."""
    chosen = values.get("lora_target_modules")
    if isinstance(chosen, list) and (
        whole := [name for name in chosen if name in ("embed_tokens", "lm_head")]
    ):
        values["lora_target_modules"] = [name for name in chosen if name not in whole]
        saved = values.get("lora_modules_to_save") or []
        values["lora_modules_to_save"] = [*dict.fromkeys([*saved, *whole])]


def divide_a_row(said: dict[str, Any], unread: dict[str, str], whole: Any) -> int | None:
    """Prompt and answer of a row of a training that generates, where the program computes what one leaves the other.

    Together they are the length that the model is loaded with, ``whole``. The answer's tokens if both are unread.
    """
    if not isinstance(whole, int):
        return None
    parts = ("max_prompt_length", "max_completion_length")
    open_ = [key for key in parts if key in unread]
    known = [said[key] for key in parts if isinstance(said.get(key), int)]
    for key in open_:
        del unread[key]
    if len(open_) == 1 and known and known[0] < whole:
        said[open_[0]] = whole - known[0]
    elif open_ == ["max_completion_length"] and not known:
        open_ = list(parts)
    if len(open_) == 2:
        said |= {"max_prompt_length": whole // 4, "max_completion_length": whole - whole // 4}
        return said["max_completion_length"]
    return None


def with_defaults(
    said: dict[str, Any], trainer: str, own: Mapping[str, Any], halves: bool
) -> dict[str, Any]:
    """Settings with Unsloth's defaults; mixed precision is that of the model (models/rl.py), a full one has none."""
    if trainer != "transformers":
        said = {**rules()["defaults"]["arguments"], **said}
        half = said.get("dtype")
        full = bool(own.get("full_finetuning"))
        if half in ("bfloat16", "float16"):
            said |= {"bf16": half == "bfloat16" and not full, "fp16": half == "float16"}
        elif not (said.get("bf16") or said.get("fp16")):
            said |= {"bf16": halves, "fp16": False}
        rows, steps = said["per_device_train_batch_size"], said["gradient_accumulation_steps"]
        count = said.get("num_generations", _GENERATIONS)
        known = all(isinstance(one, int) for one in (rows, steps, count))
        if trainer == "grpo" and known and not said.get("steps_per_generation"):
            said |= {
                "num_generations": count,
                "per_device_train_batch_size": count if rows * steps % count else rows,
            }
    said.setdefault("gradient_checkpointing", "unsloth")
    given, most = said.pop("max_seq_length", None), own.get("model_length")
    if most is None:
        return said
    if trainer == "sft":  # models/rl.py: there the model's length stands before TRL's max_length
        said["max_length"] = min(given, most) if isinstance(given, int) else most
    else:
        said["max_length"] = min(
            said.get("max_length", most if trainer == "transformers" else _PAIR_TOKENS), most
        )
    return said


def say(reading: Reading, own: Mapping[str, Any], *, offloads: bool, halves: bool) -> None:
    """Set and say what Unsloth's kernels change (2026.10.9): their need is a range, whose upper end are PyTorch's.

    In training it drops the mask of padded rows (``models/llama.py``, ``LlamaModel_fast_forward``). Attention is
    xFormers' where FlashAttention is not installed (``utils/attention_dispatch.py``, ``select_attention_backend``).
    Layers' inputs of more than 2 MiB wait on the host (``gradient_checkpointing.py``, ``UnslothCheckpointFunction``).
    The loss is computed in chunks (``fused_losses/cross_entropy_loss.py``), but not that of pairs: DPO's and its
    relatives' logits are whole, the policy's and the reference's (``models/dpo.py``: chunks are opt-in).
    """
    table, name = rules(), str(reading.fields.get("model"))
    reading.older = {}  # its own defaults stand before TRL's
    if not halves and re.search(table["float32"], name, re.I):
        reading.approximates(
            "dtype",
            "float32",
            TOO_LOW,
            "on a card without bf16 Unsloth computes this model in fp32",
        )
    for key, (errs, why) in table["not_described"].items():
        if is_on(own.get(key)):
            reading.approximates(key, own[key], errs, why)
    reading.tool = f"Unsloth and {reading.tool}"
    reading.approximates("unsloth", True, TOO_HIGH, UPPER_END, "step")
    quantization = reading.fields.get("quantization") or {}
    if quantization and quantization.get("type") != "int8":  # models/llama.py and models/vision.py
        reading.set(quantization={**quantization, "double": True})
    objective = reading.fields.get("objective", SUPERVISED)
    if OBJECTIVES[objective].generates:
        reading.remarks.pop()
        usual = table["defaults"]["fast_inference_utilization"]
        share = (
            own.get("gpu_memory_utilization", usual) if own.get("fast_inference") is True else None
        )
        sleeps = (
            is_on(own.get("unsloth_vllm_standby")) or own.get("UNSLOTH_VLLM_STANDBY", "0") != "0"
        )
        grpo.of_unsloth(
            reading, share if share is None or isinstance(share, float) else usual, sleeps=sleeps
        )
        return
    if objective != SUPERVISED:  # TRL's own step, with whole logits
        return
    take_the_step(reading, offloads=offloads)


def _experts_of_a_copy(reading: Reading) -> None:
    """A model in 4 bits comes from Unsloth's copy, whose experts are linear layers in 4 bits (models/mapper.py).

    Where an MLP's layers are to be adapted, newer versions adapt each expert, and older ones none of them
    (models/_utils.py, ``get_moe_target_modules``). Here they get none.
    """
    reading.set(experts={"quantized": "bitsandbytes"})
    reading.notes.append(
        "in 4 bits Unsloth takes its copy of this model, whose experts are packed as linear layers"
    )
    lora, of_an_mlp = reading.fields.get("lora") or {}, rules()["defaults"]["target_modules"][4:]
    if isinstance(targets := lora.get("target_modules"), list) and {*targets} & {*of_an_mlp}:
        reading.set(
            lora={
                **lora,
                "target_modules": [name for name in targets if name not in of_an_mlp] or ["q_proj"],
            }
        )
        why = "newer versions of Unsloth give each expert an adapter, which is not counted"
        reading.approximates("target_modules of experts", targets, TOO_LOW, why, "expert_adapters")


def _attention(name: str, reading: Reading) -> str:
    if takes_flex(name, reading.fields.get("precision")):
        return "flash"
    return "eager" if re.search(rules()["eager"], name, re.I) else "mem_efficient"


def take_the_step(reading: Reading, *, offloads: bool) -> None:
    """Set what Unsloth's step of supervised fine-tuning does otherwise; ``offloads``: layers' inputs go to the host."""
    table, name = rules(), str(reading.fields.get("model"))
    reading.pads = False
    reading.fields.pop("attention_mask", None)
    if reading.fields.get("attention", "sdpa") == "sdpa":
        reading.set(attention=_attention(name, reading))
    if reading.fields["attention"] == "eager":
        why = "attention that keeps its scores; since May 2026 flex_attention on Ampere and later, which keeps none"
        reading.approximates("attention", "eager", TOO_HIGH, why)
    if offloads:
        reading.set(gradient_checkpointing="reentrant")
        common.offloaded(reading, "use_gradient_checkpointing")
    if re.search(table["linear_experts"], name, re.I) and reading.fields["method"] == "qlora":
        _experts_of_a_copy(reading)
    reading.set(
        kernels="unsloth", loss="full" if reading.fields.get("loss") == "full" else "chunked"
    )
    if count := next(
        (count for key, count in table["towers"].items() if re.search(key, name, re.I)), 0
    ):
        why = "the model is loaded with its vision tower, whose weights are not counted"
        reading.approximates("vision tower", True, TOO_LOW, why, f"bytes {2 * count}")
    old, new = (re.search(table[key], name, re.I) for key in ("whole_logits", "not_whole_logits"))
    if old and not new and reading.fields["loss"] == "chunked":
        why = "Unsloth before November 2024 keeps whole logits"
        reading.approximates("older Unsloth with whole logits", True, TOO_LOW, why, "logits 6")
