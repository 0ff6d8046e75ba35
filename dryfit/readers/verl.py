"""verl's settings, as Hydra takes them: dotted on a command line, nested in YAML (dryfit/data/readers/verl.yaml).

What is predicted is the actor's update on one GPU of its FSDP group, whose step is verl's own: all logits of a
micro-batch, weights in fp32 that are cast for computing. vLLM lies in a process of its own and sleeps meanwhile. So
what it takes is said, and not predicted.
"""

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml, yaml_value
from dryfit.readers import common
from dryfit.readers.launch import Launch
from dryfit.readers.reading import EITHER_WAY, TOO_LOW, FileValues, Reading, begin, checked, keys
from dryfit.readers.shell import Command, beside, is_known

TABLE = ("verl",)
_TRAINERS = re.compile(r"(?:verl|recipe)\.\S*\.(?P<work>main_\w+|\w*sft_trainer)")
_TRAINS = ("main_ppo", "main_dapo", "fsdp_sft_trainer", "sft_trainer")
_ACTOR, _ROLLOUT, _MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
_LOG_PROB = (
    "micro_batch_size_per_gpu",
    "micro_batch_size",
    "max_token_len_per_gpu",
    "use_dynamic_bsz",
)
_WHOLE = (
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{_ACTOR}.ppo_micro_batch_size",
    f"{_ACTOR}.ppo_mini_batch_size",
    f"{_ACTOR}.ppo_max_token_len_per_gpu",
    f"{_ACTOR}.ulysses_sequence_parallel_size",
    f"{_ROLLOUT}.n",
    f"{_MODEL}.lora_rank",
    f"{_MODEL}.lora_alpha",
    *(
        f"{part}.log_prob_{name}"
        for part in (_ROLLOUT, "actor_rollout_ref.ref")
        for name in _LOG_PROB[:3]
    ),
    "data.max_prompt_length",
    "data.max_response_length",
    "data.max_length",
    "data.train_batch_size",
    "data.micro_batch_size_per_gpu",
    "model.lora_rank",
    "model.lora_alpha",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
)


def from_command(launch: Launch, command: Command, script: Path) -> Mapping[str, Any] | None:
    """The settings of a command that trains; None: verl is not called.

    UserError: if it trains nothing.
    """
    found = next((match for word in command.words if (match := _TRAINERS.fullmatch(word))), None)
    if found is None:
        return None
    if found["work"] not in _TRAINS:
        raise UserError(
            "This command of verl trains nothing that is known here.",
            where=script,
            found=found[0],
            allowed=", ".join(_TRAINS),
        )
    settings: dict[str, Any] = {}
    for word in command.words:
        name, equals, value = word.lstrip("+~").partition("=")
        if name.startswith("--"):
            name = name[2:].replace("-", "_")
        if equals and re.fullmatch(r"[\w.]+", name) and is_known(value):
            settings[name] = yaml_value(value, script)
    config = str(settings.get("config_name", "")).removesuffix(".yaml")
    if config and (path := beside(script, f"config/{config}.yaml")):
        settings = {**dict(common.dotted(read_yaml(path))), **settings}
    settings.setdefault(
        f"{_MODEL}.path" if "main" in found["work"] else "model.partial_pretrain", None
    )
    return settings


def read(mapping: Mapping[str, Any], file: Path, gpus: int | None = None) -> Reading:
    """The scenario's fields of the actor's update, with verl's defaults."""
    settings = {
        name: checked(name, value, file, "a whole number") if name in _WHOLE else value
        for name, value in common.dotted(mapping)
    }
    get, reading = begin(settings, keys(*TABLE), file)
    if (
        "megatron" in str(settings.get("config_name", ""))
        or get(f"{_ACTOR}.strategy") == "megatron"
        or any(name.startswith(f"{_ACTOR}.megatron.") for name in settings)
    ):
        raise UserError(
            "verl's Megatron engine divides layers otherwise than any strategy here: not described.",
            where=file,
            found="actor.megatron",
            allowed="strategy fsdp or fsdp2",
            write=f"{_ACTOR}.strategy: fsdp2",
        )
    supervised = "model.partial_pretrain" in settings
    own = "model" if supervised else _MODEL
    count = gpus or _gpus(get, supervised)
    weights = (
        "fp32" if supervised else common.dtype(get(f"{_ACTOR}.fsdp_config.model_dtype", "fp32"))
    )
    reading.set(
        model=get("model.partial_pretrain" if supervised else f"{_MODEL}.path"),
        precision="bf16-mixed" if weights == "fp32" else weights,
    )
    (_supervised if supervised else _update)(get, reading, count)
    reading.set(
        gradient_checkpointing=bool(get(f"{own}.enable_gradient_checkpointing", True)),
        attention="flash",
        optimizer="adamw",
    )
    rank = get(f"{own}.lora_rank", 0)
    reading.set(method="lora" if rank else "full")
    if rank:
        common.adapters(
            reading,
            rank=rank,
            alpha=get(f"{own}.lora_alpha", 16),
            dropout=0.0,
            targets=get(f"{own}.target_modules", "all-linear"),
        )
    if get(f"{own}.use_liger"):
        common.liger(reading)
    _divided(get, reading, count, supervised)
    return reading


def _gpus(get: FileValues, supervised: bool) -> int | None:
    if supervised:
        return get("nproc_per_node")
    return get("trainer.n_gpus_per_node", 8) * get("trainer.nnodes", 1)


def _update(get: FileValues, reading: Reading, count: int) -> None:
    """One micro-batch of prompts and answers, and what the cycle has beside.

    Ulysses divides each row among GPUs, which share a micro-batch. One of dynamic size holds as many tokens for each of
    them (1dda039, workers/engine/utils.py, ``prepare_micro_batches``).
    """
    tokens = get("data.max_prompt_length", 512) + get("data.max_response_length", 512)
    parts = get(f"{_ACTOR}.ulysses_sequence_parallel_size", 1) or 1
    groups = max(count // parts, 1)
    answers = get(f"{_ACTOR}.ppo_mini_batch_size", 256) * get(f"{_ROLLOUT}.n", 1)
    rows = get(f"{_ACTOR}.ppo_micro_batch_size_per_gpu")
    if rows is None and get(f"{_ACTOR}.ppo_micro_batch_size"):
        rows = max(get(f"{_ACTOR}.ppo_micro_batch_size") // groups, 1)
    if get(f"{_ACTOR}.use_dynamic_bsz"):
        rows = max(get(f"{_ACTOR}.ppo_max_token_len_per_gpu", 16_384) * parts // tokens, 1)
        reading.notes.append(
            f"use_dynamic_bsz: a micro-batch holds as many tokens as {rows} rows of the longest"
        )
    if rows is None:
        rows = 1
        reading.notes.append(
            "the file doesn't say how many rows a micro-batch has (ppo_micro_batch_size_per_gpu): 1"
        )
    accumulated = max(ceil(answers / groups / rows), 1)
    reading.set(
        sequence_length=ceil(tokens / parts), micro_batch=rows, gradient_accumulation=accumulated
    )
    if parts > 1:
        reading.notes.append(
            f"Ulysses: {parts} GPUs share a row of {tokens:,} tokens; counted as rows of their part"
        )
    reading.pads = not get(f"{_MODEL}.use_remove_padding", True)
    if get("algorithm.adv_estimator", "gae") == "gae":
        why = "a critic with its optimizer's states lies beside, unless it is offloaded"
        reading.approximates("algorithm.adv_estimator", "gae", TOO_LOW, why)
    compared = get(f"{_ACTOR}.use_kl_loss") or get("algorithm.use_kl_in_reward")
    if (
        compared
        and not get(f"{_MODEL}.lora_rank")
        and not get("actor_rollout_ref.ref.fsdp_config.param_offload")
    ):
        why = "a reference's weights lie beside, divided as well"
        reading.approximates(f"{_ACTOR}.use_kl_loss", True, TOO_LOW, why)
    _log_probabilities(get, reading, rows, tokens, groups)
    _rollout(get, reading)


def _log_probabilities(
    get: FileValues, reading: Reading, rows: int, tokens: int, groups: int
) -> None:
    """A pass without gradients, of rows of its own number; with the logits their softmax and its product (dp_actor)."""
    most = 0
    for part in (_ROLLOUT, "actor_rollout_ref.ref"):
        own = get(f"{part}.log_prob_micro_batch_size_per_gpu")
        if own is None and get(f"{part}.log_prob_micro_batch_size"):
            own = max(get(f"{part}.log_prob_micro_batch_size") // groups, 1)
        if get(f"{part}.log_prob_use_dynamic_bsz", get(f"{_ACTOR}.use_dynamic_bsz")):
            parts = get(f"{_ACTOR}.ulysses_sequence_parallel_size", 1) or 1
            usual = get(f"{_ACTOR}.ppo_max_token_len_per_gpu", 16_384)
            own = max(get(f"{part}.log_prob_max_token_len_per_gpu", usual) * parts // tokens, 1)
        most = max(most, own or 0)
    if most > rows:
        why = f"log-probabilities of {most} rows are computed at once"
        reading.approximates(
            "log_prob_micro_batch_size", most, TOO_LOW, why, f"evaluation {most} 6"
        )


def _rollout(get: FileValues, reading: Reading) -> None:
    share = get(f"{_ROLLOUT}.gpu_memory_utilization", 0.5)
    name = get(f"{_ROLLOUT}.name", "vllm")
    if name == "hf":
        return
    if get(f"{_ROLLOUT}.free_cache_engine", True):
        reading.notes.append(
            f"{name} takes {share:g} of each card while it generates, and sleeps in the update; its CUDA graphs and the"
            " context of its process stay, and are not counted"
        )
    else:
        why = f"{name} takes {share:g} of each card, in the update too"
        reading.approximates(f"{_ROLLOUT}.free_cache_engine", False, TOO_LOW, why)


def _supervised(get: FileValues, reading: Reading, count: int | None) -> None:
    rows = get("data.micro_batch_size_per_gpu", 4)
    reading.set(
        sequence_length=get("data.max_length", 1024),
        micro_batch=rows,
        gradient_accumulation=max(get("data.train_batch_size", 256) // (rows * (count or 1)), 1),
    )
    reading.pads = True


def _divided(get: FileValues, reading: Reading, count: int | None, supervised: bool) -> None:
    strategy = "fsdp" if supervised else get(f"{_ACTOR}.strategy", "fsdp")
    config = f"{_ACTOR}.fsdp_config"
    offload = "cpu" if not supervised and get(f"{config}.offload_policy") else "none"
    reshard = supervised or bool(get(f"{config}.reshard_after_forward", True))
    if str(strategy) not in ("fsdp", "fsdp2"):
        reading.approximates(f"{_ACTOR}.strategy", strategy, EITHER_WAY, "read as FSDP2")
    version = 1 if strategy == "fsdp" else 2
    common.parallel(
        reading, f"fsdp{version}", count, reshard_after_forward=reshard, offload=offload
    )
