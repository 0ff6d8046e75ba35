"""Files that lie beside a tool's own: accelerate's, DeepSpeed's and PEFT's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.readers import common
from dryfit.readers.reading import TOO_LOW, Reading, checked

ACCELERATE = "1.15.0"  # accelerate: commands/config/config_args.py, and the files that `accelerate config` writes
DEEPSPEED = "0.19"
PEFT = "0.21.2"
_HARMLESS = {
    "compute_environment",
    "debug",
    "downcast_bf16",
    "enable_cpu_affinity",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "main_training_function",
    "num_machines",
    "rdzv_backend",
    "same_network",
    "tpu_env",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "use_cpu",
    "gpu_ids",
    "use_parallelism_config",
}


def read_accelerate(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """How a step is spread, and mixed precision."""
    reading = Reading("accelerate", ACCELERATE, file, own=mapping)
    mapping = {key: checked(str(key), value, file) for key, value in mapping.items()}
    for key, value in mapping.items():
        if key in (
            "distributed_type",
            "num_processes",
            "fsdp_config",
            "deepspeed_config",
            "parallelism_config",
        ):
            reading.understood[key] = "parallel"
        elif key in ("dynamo_config", "dynamo_backend"):
            reading.understood[key] = "compile"
        elif key == "mixed_precision":
            reading.understood[key] = "autocast"
        elif key in ("fp8_config", "megatron_lm_config") and value:
            reading.approximates(
                key, value, "either way", "layers are divided otherwise, or products are in 8 bits"
            )
        elif key not in _HARMLESS:
            reading.unknown[key] = None
    count = gpus or mapping.get("num_processes")
    kind = str(mapping.get("distributed_type", "NO")).upper()
    if kind == "FSDP":
        config = mapping.get("fsdp_config") or {}
        common.fsdp(reading, config, 1, count)
    elif kind == "DEEPSPEED":
        config = dict(mapping.get("deepspeed_config") or {})
        named = config.get("deepspeed_config_file")
        parts = ("offload_optimizer", "offload_param")
        offload = {part: {"device": config.get(f"{part}_device", "none")} for part in parts}
        own = {"zero_optimization": {"stage": config.get("zero_stage", 2), **offload}}
        common.deepspeed(reading, named or own, file.parent, count, "deepspeed_config")
        divided = (reading.fields.get("parallel") or {}).get("strategy") == "zero3"
        if divided and config.get("zero3_init_flag") is False:
            # deepspeed/runtime/engine.py, _configure_distributed_model: a model that zero.Init has not made
            why = "without zero.Init DeepSpeed brings the whole model to each GPU before it divides it"
            reading.approximates("zero3_init_flag", False, TOO_LOW, why, "whole")
    elif kind in ("MULTI_GPU", "MULTI_NPU") and (count or 1) > 1:
        common.parallel(reading, "ddp", count)
    divided = checked(
        "parallelism_config", mapping.get("parallelism_config"), file, "keys below it"
    )
    common.mesh(reading, "parallelism_config", divided or {}, count)
    _compiled(reading, mapping, file)
    mixed = common.dtype(mapping.get("mixed_precision", "no"))
    if mixed in ("bf16", "fp16"):
        reading.set(autocast=mixed)
    return reading


def _compiled(reading: Reading, mapping: Mapping[str, Any], file: Path) -> None:
    """``torch.compile`` through ``accelerate launch``: the whole model, or its repeated layers.

    accelerate puts ``dynamo_`` before keys that lack it (commands/launch.py), and once had the backend alone.
    """
    given = checked("dynamo_config", mapping.get("dynamo_config"), file, "keys below it") or {}
    own = {str(key).removeprefix("dynamo_"): value for key, value in given.items()}
    backend = str(own.get("backend", mapping.get("dynamo_backend", "no"))).lower()
    key = "dynamo_config" if given else "dynamo_backend"
    if backend == "inductor":
        layers = own.get("use_regional_compilation") is True
        common.compiled(reading, backend, own.get("mode"), layers=layers, key=key)
    elif backend != "no":
        reading.approximates(
            key, backend, "either way", "of the compiler's backends Inductor is followed"
        )


def read_deepspeed(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The stage of ZeRO, and the micro-batch where it is a number."""
    reading = Reading("DeepSpeed", DEEPSPEED, file)
    common.deepspeed(reading, mapping, file, gpus)
    reading.understood["zero_optimization"] = "parallel"
    rows = mapping.get("train_micro_batch_size_per_gpu")
    if isinstance(rows, int):
        reading.set(micro_batch=rows)
        reading.understood["train_micro_batch_size_per_gpu"] = "micro_batch"
    for key in ("bf16", "fp16"):
        if (checked(key, mapping.get(key), file, "keys below it") or {}).get("enabled") is True:
            reading.set(autocast=key)
            reading.understood[key] = "autocast"
    return reading


def read_adapter(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """An adapter that is there already: its own configuration, and the base that it belongs to."""
    reading = Reading("PEFT", PEFT, file)
    reading.set(model=mapping.get("base_model_name_or_path"), adapter=dict(mapping))
    reading.understood = dict.fromkeys(mapping, "adapter") | {"base_model_name_or_path": "model"}
    if mapping.get("peft_type") == "LORA":
        reading.notes.append(
            f"an adapter of rank {mapping.get('r')} is there; what training one like it takes"
        )
    return reading
