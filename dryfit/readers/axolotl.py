"""axolotl's YAML files (dryfit/data/readers/axolotl.yaml says which version, and what each key means)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.readers import common, grpo
from dryfit.readers.launch import Launch
from dryfit.readers.reading import EITHER_WAY, TOO_HIGH, TOO_LOW, FileValues, Reading, begin, keys
from dryfit.readers.shell import Command, with_file
from dryfit.scenario.strategies import NONE, STRATEGIES

TABLE = ("axolotl",)
_ATTENTION_FLAGS = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "xformers_attention": "xformers",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
    "sage_attention": "sage",
}
_OBJECTIVES = {
    "dpo": "dpo",
    "ipo": "dpo",
    "simpo": "orpo",
    "orpo": "orpo",
    "kto": "kto",
}  # all others generate


def from_command(launch: Launch, command: Command, script: Path) -> Mapping[str, Any] | None:
    """The settings of ``axolotl train FILE`` or ``-m axolotl.cli.train FILE``; None: axolotl is not called."""
    words, name = launch.words, launch.program.rpartition("/")[2]
    if name == "axolotl" and words[1:2] == ["train"]:
        return with_file(words[2:], script)
    if name == "axolotl.cli.train":
        return with_file(words[1:], script)
    if name == "axolotl" or name.startswith("axolotl.cli"):
        raise UserError(
            "This command of axolotl trains nothing.",
            where=script,
            found=" ".join(words[:2]),
            allowed="axolotl train",
        )
    return None


def read(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The scenario's fields of a file, with axolotl's defaults."""
    get, reading = begin(mapping, keys(*TABLE), file)
    common.model(reading, get("base_model"), get("revision_of_model"))
    reading.set(
        sequence_length=get("sequence_len", 512),
        micro_batch=get("micro_batch_size", 1),
        gradient_accumulation=get("gradient_accumulation_steps", 1),
    )
    _precision(get, reading)
    _method(get, reading)
    _checkpointing(get, reading)
    flag = next((kernel for name, kernel in _ATTENTION_FLAGS.items() if get(name)), None)
    if kernel := get("attn_implementation", flag):
        common.attention(reading, "attn_implementation", kernel)
    reading.pads = not (get("sample_packing") or get("batch_flattening"))
    common.optimizer(reading, "optimizer", get("optimizer", "adamw_torch_fused"))
    _loss(get, reading)
    for key in ("overrides_of_model_config", "model_config"):  # the newer name and the older one
        if (get(key) or {}).get("output_router_logits"):
            common.router_loss(reading, key)
    _parallel(get, reading, gpus)
    if get("rl"):
        kind, rows = str(get("rl")), reading.fields["micro_batch"]
        answers = kind == "grpo"
        predicted = common.preference(
            reading, _OBJECTIVES.get(kind, "grpo"), "rl", rows, answers=answers
        )
        if answers:
            grpo.answers(_of_blocks(get), reading, predicted=predicted)
    if get("vllm") and str(get("rl")) != "grpo":
        why = "vLLM runs on a GPU too, beside training where its mode is colocate"
        reading.approximates("vllm", get("vllm"), TOO_LOW, why)
    common.compiled(reading, get("torch_compile"), get("torch_compile_mode"))
    if get("activation_offloading") or str(get("gradient_checkpointing")).startswith("offload"):
        common.offloaded(reading, "activation_offloading")
    if (
        reading.fields["method"] == "full"
        and reading.fields.get("attention") != "flash"
        and _is_half(reading)
    ):
        why = "without FlashAttention axolotl keeps norms, embeddings and head in fp32"
        reading.approximates("bf16", get("bf16", "auto"), TOO_LOW, why, "head_fp32")
    reading.pad(reading.fields)
    return reading


def _of_blocks(get: FileValues) -> grpo.Get:
    """TRL's settings by their names, from the blocks ``trl`` and ``vllm``."""
    server = {
        "vllm_gpu_memory_utilization": "gpu_memory_utilization",
        "vllm_max_model_length": "max_model_len",
        "vllm_tensor_parallel_size": "tensor_parallel_size",
    }
    trl, vllm = get("trl") or {}, get("vllm") or {}
    known = {**trl, **{name: vllm[key] for name, key in server.items() if key in vllm}}

    def value(name: str, default: Any = None) -> Any:
        return default if known.get(name) is None else known[name]

    return value


def _is_half(reading: Reading) -> bool:
    return reading.fields.get("precision") in ("bf16", "fp16")


def _precision(get: FileValues, reading: Reading) -> None:
    """``normalize_config``: bf16 before fp16 before fp32; ``bf16`` and ``fp16`` are autocast as well."""
    bf16, fp16 = get("bf16", "auto"), get("fp16") or get("float16")
    if fp16 and bf16 in ("auto", False):
        reading.set(precision="fp16", autocast="fp16" if get("fp16") else None)
    elif bf16 or get("bfloat16"):
        reading.set(precision="bf16", autocast="bf16" if bf16 != "full" else None)
    elif get("load_in_8bit"):
        reading.set(precision="fp16")
    else:
        reading.set(precision="fp32")


def _method(get: FileValues, reading: Reading) -> None:
    adapter, weights = get("adapter"), reading.fields["precision"]
    reading.set(method="full" if not adapter else "lora")
    if adapter and get("load_in_4bit"):
        given = {
            "double": get("bnb_config_kwargs", {}).get("bnb_4bit_use_double_quant", True),
            "type": get("bnb_config_kwargs", {}).get("bnb_4bit_quant_type", "nf4"),
            "storage": common.dtype(
                get("bnb_config_kwargs", {}).get("bnb_4bit_quant_storage", "bfloat16")
            ),
        }
        common.quantized(reading, 4, "load_in_4bit", adapter=True, compute=None, **given)
    elif adapter and get("load_in_8bit"):
        common.quantized(reading, 8, "load_in_8bit", adapter=True)
    if not adapter:
        return
    if get(
        "llama4_linearized_experts"
    ):  # monkeypatch/models/llama4/modeling.py: a linear layer for each expert
        why = "experts as linear layers are counted as packed ones, of which a layer's are unpacked together"
        reading.approximates("llama4_linearized_experts", True, TOO_HIGH, why)
    if get("quantize_moe_experts") or get("llama4_linearized_experts"):
        reading.set(experts={"quantized": "bitsandbytes"})
    targets = get("lora_target_modules")
    if get("lora_target_linear"):
        targets = "all-linear"
    more = {
        "use_dora": get("peft_use_dora"),
        "modules_to_save": get("lora_modules_to_save"),
        "target_parameters": get("lora_target_parameters"),
        "rank_pattern": get("lora_rank_pattern"),
        "layers_to_transform": get("peft_layers_to_transform"),
    }
    common.adapters(
        reading,
        rank=get("lora_r", 8),
        alpha=get("lora_alpha"),
        dropout=get("lora_dropout", 0.0),
        targets=targets,
        more=more,
    )
    if get("peft_autocast_adapter_dtype") is False:
        reading.set(adapter_precision="base")
    if not get("lora_dropout") and weights != "fp32":
        reading.notes.append(
            "without dropout axolotl may turn on its LoRA kernels, which keep less of a layer"
        )


def _checkpointing(get: FileValues, reading: Reading) -> None:
    given = get("gradient_checkpointing_kwargs")
    reentrant = (given or {}).get("use_reentrant", given is None and not get("rl"))
    common.checkpointing(reading, get("gradient_checkpointing"), reentrant)


def _loss(get: FileValues, reading: Reading) -> None:
    plugins = " ".join(map(str, get("plugins", [])))
    parts = {
        "liger_rms_norm",
        "liger_rope",
        "liger_glu_activation" if get("liger_glu_activation") else "liger_swiglu",
    }
    fused = [part for part in sorted(parts) if get(part)]
    if get("liger_fused_linear_cross_entropy") and len(fused) == len(parts):
        common.liger(reading)
        fused = []
    why = "one of Liger's kernels alone is read as transformers' own, which keeps more"
    for part in fused:
        reading.approximates(part, True, TOO_HIGH, why)
    if get("liger_fused_linear_cross_entropy"):
        reading.set(loss="liger")
    elif get("cut_cross_entropy") or "CutCrossEntropy" in plugins:
        reading.set(loss="chunked")
        reading.notes.append(
            "cut_cross_entropy is read as `loss: chunked`, which takes a little more"
        )
    elif get("chunked_cross_entropy"):
        reading.set(loss="chunked")


def _parallel(get: FileValues, reading: Reading, gpus: int | None) -> None:
    count = gpus or get("world_size") or get("dp_shard_size")
    count = count if isinstance(count, int) and count > 1 else None if gpus is None else gpus
    if get("deepspeed"):
        common.deepspeed(reading, get("deepspeed"), reading.file.parent, count)
    elif get("fsdp") or get("fsdp_config") or get("fsdp_version"):
        words = (
            " ".join(map(str, get("fsdp", [])))
            if isinstance(get("fsdp", []), list)
            else str(get("fsdp"))
        )
        version = get("fsdp_version") or 1
        common.fsdp(
            reading, get("fsdp_config") or {}, version, count, words if "offload" in words else ""
        )
    elif (gpus or get("world_size") or 1) > 1 or get("ddp"):
        common.parallel(reading, "ddp", count)
    names = {
        "replicate": "dp_replicate_size",
        "tensor": "tensor_parallel_size",
        "expert": "expert_parallel_size",
    }
    names["context"] = (
        "context_parallel_size" if "context_parallel_size" in get else "sequence_parallel_degree"
    )
    parts = {axis: get(key, 1) for axis, key in names.items()}
    if STRATEGIES[(reading.fields.get("parallel") or {}).get("strategy", NONE)].zero:
        common.ulysses(
            reading, names["context"], parts.pop("context"), "axolotl's own ring attention"
        )
    divided = next((names[axis] for axis, size in parts.items() if size > 1), "")
    common.axes(reading, divided, parts, gpus or get("world_size"), get("dp_shard_size", 1))
    for axis, whose in (("context", "ring attention"), ("expert", "exchange of tokens")):
        if parts.get(axis, 1) > 1:
            library = "PyTorch's" if axis == "context" else "transformers'"
            why = f"axolotl's own {whose} is read as {library}"
            reading.approximates(names[axis], parts[axis], EITHER_WAY, why)
