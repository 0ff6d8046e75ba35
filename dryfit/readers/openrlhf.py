"""OpenRLHF's commands: ``train_sft``, and the actor's update of ``train_ppo_ray`` (dryfit/data/readers/openrlhf.yaml).

The names of August 2026 have dots, and those before April 2026 none. A pass without gradients computes the
log-probabilities of ``micro_rollout_batch_size`` rows, with whole logits in fp32, and may decide the peak.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.readers import common
from dryfit.readers.launch import Launch
from dryfit.readers.reading import TOO_HIGH, TOO_LOW, FileValues, Reading, begin, checked, keys
from dryfit.readers.shell import Command, options

TABLE = ("openrlhf",)
_PROGRAM = "openrlhf.cli."
_TRAINS = ("train_sft", "train_ppo_ray")
_LOGIT_BYTES = (
    2 + 4 + 4
)  # in 16 bits, in fp32, and the log_softmax of a row's (models/actor.py, models/utils.py)
_NEWER = {
    "actor.model_name_or_path": "pretrain",
    "model.model_name_or_path": "pretrain",
    "train.micro_batch_size": "micro_train_batch_size",
    "train.batch_size": "train_batch_size",
    "train.dynamic_batch_enable": "use_dynamic_batch",
    "train.max_tokens_per_gpu": "train_max_tokens_per_gpu",
    "train.colocate_all": "colocate_all_models",
    "train.colocate_actor_ref": "colocate_actor_ref",
    "rollout.micro_batch_size": "micro_rollout_batch_size",
    "rollout.max_tokens_per_gpu": "rollout_max_tokens_per_gpu",
    "data.max_len": "max_len",
    "actor.num_nodes": "actor_num_nodes",
    "actor.num_gpus_per_node": "actor_num_gpus_per_node",
    "actor.gradient_checkpointing_enable": "gradient_checkpointing",
    "model.gradient_checkpointing_enable": "gradient_checkpointing",
    "actor.gradient_checkpointing_reentrant": "gradient_checkpointing_use_reentrant",
    "model.gradient_checkpointing_reentrant": "gradient_checkpointing_use_reentrant",
    "algo.kl.init_coef": "init_kl_coef",
    "algo.advantage.estimator": "advantage_estimator",
    "ds.lora.rank": "lora_rank",
    "ds.lora.alpha": "lora_alpha",
    "ds.lora.dropout": "lora_dropout",
    "ds.lora.target_modules": "target_modules",
    "vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "vllm.enable_sleep": "vllm_enable_sleep",
    **{
        f"ds.{name}": name
        for name in (
            "zero_stage",
            "param_dtype",
            "adam_offload",
            "attn_implementation",
            "overlap_comm",
            "packing_samples",
            "load_in_4bit",
            "use_liger_kernel",
        )
    },
}
_WHOLE = """micro_train_batch_size train_batch_size micro_rollout_batch_size max_len prompt_max_len generate_max_len
    actor_num_nodes actor_num_gpus_per_node zero_stage lora_rank lora_alpha train_max_tokens_per_gpu
    rollout_max_tokens_per_gpu""".split()


def from_command(launch: Launch, command: Command, script: Path) -> Mapping[str, Any] | None:
    """The settings of a command that trains; None: OpenRLHF is not called.

    UserError: if it trains nothing that is known here.
    """
    place = next(
        (place for place, word in enumerate(command.words) if word.startswith(_PROGRAM)), None
    )
    if place is None:
        return None
    work = command.words[place].removeprefix(_PROGRAM)
    if work not in _TRAINS:
        raise UserError(
            "This command of OpenRLHF is not known here.",
            where=script,
            found=command.words[place],
            allowed=", ".join(f"{_PROGRAM}{name}" for name in _TRAINS),
        )
    settings = {
        _NEWER.get(name, name): value
        for name, value in options(command.words[place + 1 :], script).items()
    }
    if work == "train_ppo_ray":
        settings.setdefault("actor_num_gpus_per_node", 8)
    settings.setdefault("pretrain", None)
    settings.setdefault("micro_train_batch_size", None)
    return settings


def read(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The scenario's fields, with OpenRLHF's defaults."""
    older = {"attn_implementation": "flash_attention_2"} if mapping.get("flash_attn") else {}
    mapping = {
        name: checked(name, value, file, "a whole number") if name in _WHOLE else value
        for name, value in {**older, **mapping}.items()
        if name != "flash_attn"
    }
    get, reading = begin(mapping, keys(*TABLE), file)
    generates = "actor_num_gpus_per_node" in get
    count = gpus or (
        get("actor_num_gpus_per_node") * get("actor_num_nodes", 1) if generates else None
    )
    tokens = get("max_len", 2048)
    if "generate_max_len" in get or "prompt_max_len" in get:
        tokens = get("prompt_max_len", 1024) + get("generate_max_len", 1024)
    rows = get("micro_train_batch_size", 1 if generates else 8)
    if get("use_dynamic_batch"):
        rows = max(get("train_max_tokens_per_gpu", 16_192) // tokens, 1)
        reading.notes.append(
            f"use_dynamic_batch: a micro-batch holds as many tokens as {rows} rows of the longest"
        )
    half = get("param_dtype", "fp16" if get("fp16") else "bf16")
    reading.set(
        model=get("pretrain"),
        sequence_length=tokens,
        micro_batch=rows,
        gradient_accumulation=max(get("train_batch_size", 128) // (rows * (count or 1)), 1),
        precision=f"{half}-mixed",
        method="full",
        optimizer="adamw",
        loss="full",
    )
    common.checkpointing(
        reading, get("gradient_checkpointing"), get("gradient_checkpointing_use_reentrant")
    )
    common.attention(
        reading, "attn_implementation", get("attn_implementation", "flash_attention_2")
    )
    reading.pads = not get("packing_samples")
    if get("use_liger_kernel"):
        reading.approximates(
            "use_liger_kernel", True, TOO_HIGH, "Liger's fused norms and MLP keep less"
        )
    if get("lora_rank"):
        if get("load_in_4bit"):
            common.quantized(reading, 4, "load_in_4bit", adapter=True, double=False)
        else:
            reading.set(method="lora")
        common.adapters(
            reading,
            rank=get("lora_rank"),
            alpha=get("lora_alpha", 16),
            dropout=get("lora_dropout", 0.0),
            targets=get("target_modules", "all-linear"),
        )
    stage = get("zero_stage", 2)
    common.parallel(reading, f"zero{stage}" if stage else "ddp", count)
    if stage and (count or 2) > 1:
        place = "cpu" if get("adam_offload") else "none"
        reading.set(
            zero={
                "offload_optimizer": place,
                "reduce_bucket_size": "auto",
                "round_robin_gradients": True,
                **({"overlap_comm": True} if get("overlap_comm") else {}),
            }
        )
    if generates:
        _beside_the_update(get, reading, rows, tokens)
    reading.pad(reading.fields)
    return reading


def _beside_the_update(get: FileValues, reading: Reading, rows: int, tokens: int) -> None:
    """The pass of log-probabilities, and who else lies on the actor's cards."""
    at_once = get("micro_rollout_batch_size", 1)
    if get("use_dynamic_batch"):
        at_once = max(
            get("rollout_max_tokens_per_gpu", get("train_max_tokens_per_gpu", 16_192)) // tokens, 1
        )
    if at_once > rows:
        why = f"log-probabilities of {at_once} rows are computed at once, with whole logits in fp32"
        bound = f"evaluation {at_once} {_LOGIT_BYTES}"
        reading.approximates("micro_rollout_batch_size", at_once, TOO_LOW, why, bound)
    together = get("colocate_all_models")
    if float(get("init_kl_coef", 0.01)) and (together or get("colocate_actor_ref")):
        why = "a reference's weights lie beside"
        reading.approximates("init_kl_coef", get("init_kl_coef", 0.01), TOO_LOW, why, "reference")
    if together and get("advantage_estimator", "gae") == "gae":
        why = "a critic with its optimizer's states lies beside"
        reading.approximates("advantage_estimator", "gae", TOO_LOW, why)
    if together:
        share, sleeps = get("vllm_gpu_memory_utilization", 0.95), bool(get("vllm_enable_sleep"))
        why = f"vLLM takes {share:g} of each card" + (
            ", and sleeps in the update" if sleeps else ""
        )
        reading.approximates(
            "vllm_gpu_memory_utilization",
            share,
            TOO_LOW,
            why,
            f"vllm {share}{' sleeps' if sleeps else ''}",
        )
