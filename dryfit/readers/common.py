"""What the tools' settings have in common: names of optimizers and kernels, adapters, FSDP and DeepSpeed."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.data import data_path
from dryfit.readers.reading import (
    EITHER_WAY,
    TOO_HIGH,
    TOO_LOW,
    FileValues,
    Reading,
    allowed,
    checked,
    knows,
)
from dryfit.scenario.fields import BY_NAME
from dryfit.scenario.hub import HubId, catalogued
from dryfit.scenario.hub import of_modelscope as of_modelscope_alone
from dryfit.scenario.objectives import OBJECTIVES
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.strategies import NONE, STRATEGIES

# By the names of transformers' and axolotl's `optim`: our optimizers, the first that the scenario knows is taken, and
# where it is not the very one, which way the answer errs, and why.
_LION = "Lion keeps one state a weight instead of two"
_GALORE = "GaLore keeps states of a projection"
OPTIM_NAMES: dict[str, tuple[Sequence[str], str, str]] = {
    **dict.fromkeys(("adamw_torch", "adamw_hf", "adamw"), (["adamw"], EITHER_WAY, "")),
    **dict.fromkeys(("adamw_torch_fused", "adamw_apex_fused"), (["adamw_fused"], EITHER_WAY, "")),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), (["adamw_8bit"], EITHER_WAY, "")),
    "paged_adamw_8bit": (["paged_adamw_8bit"], EITHER_WAY, ""),
    **dict.fromkeys(
        ("paged_adamw", "paged_adamw_32bit"),
        (["paged_adamw", "adamw"], TOO_HIGH, "its states may move to the host"),
    ),
    "adamw_torch_8bit": (
        ["adamw_torchao_8bit", "adamw_8bit"],
        EITHER_WAY,
        "torchao's states are read as bitsandbytes'",
    ),
    "adamw_torch_4bit": (
        ["adamw_torchao_4bit", "adamw_8bit"],
        TOO_HIGH,
        "states in 4 bits are read as in 8",
    ),
    "ao_adamw_fp8": (["adamw_8bit"], EITHER_WAY, "8-bit states of another kind"),
    "adafactor": (
        ["adafactor", "adamw"],
        TOO_HIGH,
        "Adafactor keeps rows and columns instead of second moments",
    ),
    **dict.fromkeys(
        ("lion", "lion_32bit", "lion_pytorch", "paged_lion_32bit"),
        (["lion", "adamw"], TOO_HIGH, _LION),
    ),
    "lion_8bit": (["lion_8bit", "adamw_8bit"], TOO_HIGH, _LION),
    "paged_lion_8bit": (["lion_8bit", "paged_adamw_8bit"], TOO_HIGH, _LION),
    "sgd": (["sgd", "adamw"], TOO_HIGH, "SGD keeps no states"),
    "adagrad": (["adamw"], TOO_HIGH, "Adagrad keeps one state a weight instead of two"),
    "rmsprop": (["adamw"], TOO_HIGH, "RMSprop keeps one state a weight instead of two"),
    "muon": (["muon", "adamw"], TOO_HIGH, "Muon keeps one state a weight instead of two"),
    "galore_adamw": (["galore", "adamw"], TOO_HIGH, _GALORE),
    "galore_adamw_8bit": (["adamw_8bit"], TOO_HIGH, _GALORE),
    "galore_adafactor": (["adafactor"], TOO_HIGH, _GALORE),
    "apollo_adamw": (
        ["adamw"],
        TOO_HIGH,
        "APOLLO keeps states of a projection; its package forbids commercial use",
    ),
    "q_galore_adamw8bit": (
        ["galore", "adamw_8bit"],
        TOO_HIGH,
        "Q-GaLore keeps 8-bit states of a projection",
    ),
    "adam_mini": (["adamw"], TOO_HIGH, "Adam-mini keeps few second moments"),
    "came_pytorch": (["adamw"], TOO_HIGH, "CAME keeps rows and columns instead of second moments"),
    **dict.fromkeys(("optimi_adamw", "adopt_adamw"), (["adamw"], EITHER_WAY, "another AdamW")),
    "dion": (["adamw"], TOO_HIGH, "Dion keeps states of a projection"),
    "schedule_free_adamw": (
        ["adamw"],
        EITHER_WAY,
        "schedule-free AdamW keeps one state more, and one less",
    ),
}
_ATTENTION = {
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "fa2": "flash",
    "fa3": "flash",
    "flash": "flash",
    "sage": "flash",
    "sdpa": "sdpa",
    "eager": "eager",
    "disabled": "eager",
    "xformers": "mem_efficient",
    "auto": "sdpa",
}
_DTYPES = {
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "fp32": "fp32",
    "float": "fp32",
    "auto": "bf16",
}
# DeepSpeed's configurations that come with the tools, by their names: files that need not lie here.
_DEEPSPEED_FILES = data_path("deepspeed_files.yaml")
DEFAULT_GPUS = 2  # where a file divides a model and doesn't say among how many


def dotted(mapping: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of nested settings; a block without any has none."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def model(reading: Reading, name: Any, revision: str | None) -> None:
    """Set the model, at a revision that is not its newest."""
    reading.set(model=f"{name}@{revision}" if revision and revision != "main" else name)


def precision(reading: Reading, weights: str, mixed: str | None) -> None:
    """Set the dtype of the weights, and autocast over them."""
    if weights == "fp32" and mixed:
        reading.set(precision=f"{mixed}-mixed")
    else:
        reading.set(precision=weights, autocast=mixed)


def checkpointing(reading: Reading, is_on: Any, reentrant: Any) -> None:
    """Set whether, and in which way, activations are recomputed."""
    reading.set(gradient_checkpointing=("reentrant" if reentrant else True) if is_on else False)


def optimizer(reading: Reading, key: str, name: Any) -> None:
    """Set the optimizer."""
    base = str(name).removesuffix("_layerwise")
    families = ("apollo_adamw", "schedule_free_adamw")
    wanted = OPTIM_NAMES.get(next((kind for kind in families if base.startswith(kind)), base))
    if wanted is None:
        reading.set(optimizer="adamw")
        reading.approximates(
            key, name, EITHER_WAY, "this optimizer is not known, and is read as AdamW", "states"
        )
        return
    ours, errs, why = wanted
    taken = next(
        one for one in ours if (allowed("optimizer", one) and _installed(one)) or one == ours[-1]
    )
    reading.set(optimizer=taken)
    if str(name).endswith("_layerwise"):
        reading.approximates(
            key, name, TOO_HIGH, "each gradient goes as soon as its layer has stepped", "gradients"
        )
    if why and (taken != ours[0] or len(ours) == 1):
        reading.approximates(key, name, errs, why, "states")


def _installed(optimizer: str) -> bool:
    package = OPTIMIZERS[optimizer].package
    return package is None or find_spec(package) is not None


def kernel(name: Any) -> str | None:
    """Our name of a tool's attention; None where it is not known."""
    text = str(name)
    return _ATTENTION.get(text) or (
        "flash" if "flash" in text and not text.startswith("paged") else None
    )


def attention(reading: Reading, key: str, name: Any) -> None:
    """Set the attention."""
    known = kernel(name)
    reading.set(attention=known or "sdpa")
    if known is None:
        reading.approximates(
            key, name, EITHER_WAY, "this attention is not known, and is read as sdpa"
        )


def allocator(reading: Reading, environment: Mapping[str, Any]) -> None:
    """Set PyTorch's allocator by the variables that a script or a program sets; PyTorch 2.9 and later know both."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if isinstance(value := environment.get(name), str) and value:
            reading.understood[name] = "allocator.expandable_segments"
            expands = re.search(r"expandable_segments\s*:\s*true", value, re.I) is not None
            reading.set(allocator={"expandable_segments": expands})


def of_modelscope(reading: Reading, name: Any) -> None:
    """Say that a model comes from ModelScope, whose ids are asked of the Hub here."""
    if (
        isinstance(name, str)
        and (hub := HubId.read(name))
        and not catalogued(hub)
        and not of_modelscope_alone(name)
    ):
        reading.notes.append(
            f"{name} is taken from ModelScope; its configuration is asked of the Hub under the same name"
        )


def dtype(name: Any) -> str | None:
    """Our name of a dtype, which may come as ``torch.bfloat16``."""
    return _DTYPES.get(str(name).removeprefix("torch."))


def adapters(
    reading: Reading,
    *,
    rank: int,
    alpha: int | None,
    dropout: float,
    targets: Any,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Set LoRA: the short form where it can say all, else a PEFT configuration with ``more``."""
    more = {key: value for key, value in (more or {}).items() if value}
    listed = isinstance(targets, (list, tuple))
    if targets in ("all", "all_linear", "all-linear") or (
        listed and list(targets) in (["all"], ["all-linear"])
    ):
        targets, listed = "all-linear", False
    if (
        isinstance(targets, str)
        and targets != "all-linear"
        and not any(sign in targets for sign in "\\[(*.|")
    ):
        targets, listed = [part.strip() for part in targets.split(",")], True
    if not more and (listed or targets == "all-linear"):
        reading.set(
            lora={
                "rank": rank,
                "alpha": alpha or 2 * rank,
                "dropout": dropout,
                "target_modules": targets,
            }
        )
        return
    adapter = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha or 2 * rank,
        "lora_dropout": dropout,
        **more,
    }
    if targets is not None:
        # The vision tower is left out, and the language model's layers then lie at the top.
        targets = [targets] if isinstance(targets, str) else targets
        targets = [re.sub(r"\b(language|text)_model\\?\.", "", target) for target in targets]
        adapter["target_modules"] = targets if listed else targets[0]
    reading.set(adapter=adapter)


def quantized(reading: Reading, bits: int, key: str, *, adapter: bool, **parts: Any) -> None:
    """Set a quantized base, of 4 bits or of LLM.int8's 8."""
    if not adapter:
        reading.approximates(
            key,
            bits,
            EITHER_WAY,
            "a quantized base is trained with adapters alone; read as one with LoRA",
        )
    if bits == 4:
        reading.set(
            method="qlora",
            quantization={key: value for key, value in parts.items() if value is not None},
        )
    else:
        reading.set(method="qlora", quantization={"type": "int8"})


def parallel(reading: Reading, strategy: str, gpus: int | None, **parts: Any) -> None:
    """Set how a step is spread over GPUs."""
    if gpus is None:
        gpus, reading.guesses_gpus = DEFAULT_GPUS, True
        reading.notes.append(
            f"the file doesn't say how many GPUs: {gpus} are assumed (--gpu 4x24GiB says four)"
        )
    if gpus < 2 and strategy != "none":
        reading.notes.append(f"{strategy} on one GPU divides nothing: read as one GPU")
        return
    reading.set(parallel={"strategy": strategy, "gpus": gpus, **parts})


def spread(get: FileValues, reading: Reading, gpus: int | None) -> None:
    """How `TrainingArguments` spread a step over GPUs: DeepSpeed, FSDP, else DDP; and accelerate's mesh over it."""
    if "deepspeed" in get:
        deepspeed(reading, get("deepspeed"), reading.file.parent, gpus)
    elif named := get("fsdp"):
        words = named if isinstance(named, str) else " ".join(map(str, named))
        fsdp(reading, get("fsdp_config") or {}, 2 if words == "fsdp2" else 1, gpus, words)
    elif (gpus or 1) > 1 and not get("parallelism_config"):
        parallel(reading, "ddp", gpus)
    if divided := checked(
        "parallelism_config", get("parallelism_config"), reading.file, "keys below it"
    ):
        mesh(reading, "parallelism_config", divided, gpus)


# The axes of accelerate's `ParallelismConfig`, by their names in files: parts of our `parallel`.
_AXES = {"dp_replicate_size": "replicate", "tp_size": "tensor", "cp_size": "context"}


def mesh(reading: Reading, key: str, config: Mapping[str, Any], gpus: int | None) -> None:
    """accelerate's ``ParallelismConfig``, beside an FSDP2 that was read; its keys may begin with the block's name."""
    where = f"{reading.file}: {key}"
    sizes = {str(name).removeprefix("parallelism_config_"): value for name, value in config.items()}
    sizes = {
        name: checked(name, value, where, "a whole number") or 1
        for name, value in sizes.items()
        if name in (*_AXES, "dp_shard_size", "sp_size")
    }
    ulysses(reading, f"{key}: sp_size", sizes.pop("sp_size", 1))
    axes(
        reading,
        key,
        {_AXES[name]: size for name, size in sizes.items() if name in _AXES},
        gpus,
        sizes.get("dp_shard_size", 1),
    )


def ulysses(reading: Reading, key: str, size: int, whose: str = "") -> None:
    """Rows divided by Ulysses, beside a ZeRO that was read; ``whose``: where another library's code does it."""
    before = reading.fields.get("parallel") or {}
    if size > 1 and STRATEGIES[before.get("strategy", NONE)].zero:
        reading.set(parallel={**before, "ulysses": size})
        if whose:
            reading.approximates(key, size, EITHER_WAY, f"{whose} is read as DeepSpeed's Ulysses")
    elif size > 1:
        why = "a row's tokens are divided among GPUs by Ulysses, which is described with DeepSpeed's ZeRO alone"
        reading.approximates(key, size, TOO_HIGH, why)


def axes(
    reading: Reading, key: str, parts: Mapping[str, int], gpus: int | None, shard: int = 1
) -> None:
    """Divide a step that was read as FSDP2 further; ``parts``: of ``parallel``. Without FSDP2 it is said."""
    parts = {axis: size for axis, size in parts.items() if size > 1}
    if not parts:
        return
    before = reading.fields.get("parallel") or {}
    if before.get("strategy", "fsdp2") != "fsdp2":
        why = f"{', '.join(parts)}: divided among GPUs, which is described with FSDP2 alone"
        reading.approximates(key, dict(parts), TOO_HIGH, why)
        return
    places = prod(size for axis, size in parts.items() if axis != "expert")
    own = {name: value for name, value in before.items() if name not in ("strategy", "gpus")}
    if "tensor" in parts or "expert" in parts:  # transformers' FSDP2 has no such settings
        for name, usual in (("reshard_after_forward", True), ("offload", "none")):
            if own.pop(name, usual) != usual:
                reading.approximates(
                    key,
                    usual,
                    EITHER_WAY,
                    f"{name} is not described with tensor or expert parallel",
                )
    if "context" in parts:
        reading.set(attention="sdpa")  # the ring takes the kernels of scaled_dot_product_attention
    parallel(reading, "fsdp2", gpus or places * max(shard, 1), **own, **parts)


def fsdp(
    reading: Reading, config: Mapping[str, Any], version: int, gpus: int | None, words: str = ""
) -> None:
    """FSDP as transformers, accelerate and axolotl write it; their keys may begin with ``fsdp_``."""
    settings = {str(key).removeprefix("fsdp_"): value for key, value in config.items()}
    where = f"{reading.file}: fsdp_config"
    version = checked("version", settings.get("version"), where, "a whole number") or version
    if version not in (1, 2):
        raise UserError(
            "FSDP has the versions 1 and 2.",
            where=where,
            found=version,
            allowed="1, 2",
            write="version: 2",
        )
    sharding = str(settings.get("sharding_strategy") or words or "FULL_SHARD").upper()
    reshard = settings.get("reshard_after_forward", True)
    if isinstance(reshard, str):  # of FSDP1 under its new name
        sharding, reshard = reshard.upper(), True
    if sharding in ("SHARD_GRAD_OP", "2") or "SHARD_GRAD_OP" in sharding:
        reshard = False
    if "NO_SHARD" in sharding or sharding == "3":
        parallel(reading, "ddp", gpus)
        return
    if "HYBRID" in sharding:
        reading.approximates(
            "fsdp_sharding_strategy", sharding, TOO_LOW, "weights are divided within a node alone"
        )
    offload = bool(settings.get("offload_params")) or "offload" in words
    wraps = {"auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"} & {*settings}
    if (
        version == 1 and words and "auto_wrap" not in words and not wraps
    ):  # transformers: --fsdp full_shard
        why = "nothing says what is wrapped: as one unit all weights are gathered at once, and all gradients made"
        reading.approximates("no auto_wrap", words, TOO_LOW, why, "unit")
    parallel(
        reading,
        f"fsdp{version}",
        gpus,
        reshard_after_forward=bool(reshard),
        offload="cpu" if offload else "none",
    )
    if settings.get("activation_checkpointing"):
        reading.set(gradient_checkpointing=True)


def deepspeed(
    reading: Reading, value: Any, beside: Path, gpus: int | None, key: str = "deepspeed"
) -> None:
    """DeepSpeed's configuration: a mapping, a file, or the name of one that comes with the tools."""
    where = reading.file
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(
                f"DeepSpeed's settings are not JSON: {error}.",
                where=f"{where}: {key}",
                found=value[:80],
                allowed="JSON, or the path of such a file",
                write=f"{key}: ds_z3_config.json",
            ) from None
    if isinstance(value, str):
        value = _deepspeed_file(value, beside, key, reading.tool)
    value = checked(key, value, where, "keys below it")
    zero = checked("zero_optimization", value.get("zero_optimization"), where) or {}
    stage = zero.get("stage", 0)
    stage = 2 if stage == "auto" else checked("stage", stage, where, "a whole number") or 0
    if stage not in range(4):
        raise UserError(
            "DeepSpeed's ZeRO has the stages 0 to 3.",
            where=f"{where}: {key}: zero_optimization",
            found=stage,
            allowed="0, 1, 2, 3",
            write="stage: 3",
        )
    parallel(reading, "ddp" if stage == 0 else f"zero{stage}", gpus)
    if stage and gpus != 1:
        _zero(reading, value, stage, f"{where}: {key}")
    elif stage and not (
        zero.get("cpu_offload") or (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    ):
        why = "on one GPU DeepSpeed keeps an fp32 copy of what is trained, and its states in fp32; read without them"
        reading.approximates(key, f"zero{stage}", TOO_LOW, why, "masters")


# Keys of `zero_optimization` that take no memory of a step, or none that DeepSpeed 0.19.8 heeds.
_ZERO_WITHOUT_MEMORY = set(
    """stage allgather_partitions allgather_bucket_size load_from_fp32_weights elastic_checkpoint
    ignore_unused_parameters stage3_gather_16bit_weights_on_model_save gather_16bit_weights_on_model_save
    stage3_gather_fp16_weights_on_model_save log_trace_cache_warnings pipeline_loading_checkpoint
    override_module_apply cpu_offload_use_pin_memory enable_sanity_checks""".split()
)
# What other keys say where they change nothing (deepspeed/runtime/zero/config.py and precision_config.py).
_ZERO_OFF = {
    "memory_efficient_linear": True,
    "use_multi_rank_bucket_allreduce": True,
    "zero_hpz_partition_size": 1,
    "compute_grad_norm": True,
}
_BESIDE_ZERO_OFF: dict[str, dict[str, Any]] = {
    "bf16": {
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
        "check_grad_overflow": True,
    },
    "fp16": {"fp16_master_weights_and_grads": False},
}
_BESIDE_ZERO = (
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "tensor_parallel",
    "torch_autocast",
)


def _zero(reading: Reading, config: Mapping[str, Any], stage: int, where: str) -> None:
    """What DeepSpeed's file says of ZeRO beside its stage: the field ``zero``.

    What has no rule goes to DeepSpeed's own package, as ``zero.other``.
    """
    known = {part.name: part for part in BY_NAME["zero"].parts}
    fields: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for name, value in config["zero_optimization"].items():
        name = name if name in known or f"stage3_{name}" not in known else f"stage3_{name}"
        if name == "cpu_offload":
            name, value = "offload_optimizer", {"device": "cpu" if value else "none"}
        if name in ("offload_optimizer", "offload_param"):
            place = checked(name, value, where, "keys below it") or {}
            device, ratio = place.get("device") or "none", place.get("ratio", 1.0)
            if device not in ("none", "cpu") or ratio != 1.0 or place.get("super_offload"):
                other[name] = value
            elif name == "offload_optimizer" or stage == 3:
                fields[name] = device
        elif name in known and name != "other":
            if value == "auto" and "auto" not in known[name].about:
                continue
            boolean = known[name].is_boolean or "boolean" in known[name].types
            fields[name] = value if boolean or value == "auto" else int(float(value))
        elif name not in _ZERO_WITHOUT_MEMORY and value not in (
            None,
            "auto",
            _ZERO_OFF.get(name, False),
            0,
            {},
        ):
            other[name] = value
    beside = {
        name: config[name]
        for name in _BESIDE_ZERO
        if config.get(name) not in (None, False, "auto", {})
    }
    for block, defaults in _BESIDE_ZERO_OFF.items():
        own = config.get(block) or {}
        changed = {
            name: own[name]
            for name, off in defaults.items()
            if own.get(name, off) not in (off, "auto")
        }
        beside |= {block: changed} if changed else {}
    if other or beside:
        fields["other"] = beside | ({"zero_optimization": other} if other else {})
    reading.set(zero=fields)


def _deepspeed_file(text: str, beside: Path, key: str, tool: str) -> dict[str, Any]:
    for folder in (beside, *beside.parents[:4], Path()):
        path = folder / text
        if path.is_file():
            return read_yaml(path)  # JSON is YAML
    # ms-swift before 3 had `default-` before the names that it has now (its notes of release 3.0, pull request 2546).
    stem, known = Path(text).stem.removeprefix("default-"), read_yaml(_DEEPSPEED_FILES)
    tools = [known[tool]] if tool in known else list(known.values())
    found = next((files[stem] for files in (*tools, *known.values()) if stem in files), None)
    if found is None:
        raise UserError(
            "A file that this configuration names isn't there.",
            where=f"{beside}: {key}",
            found=text,
            allowed="the file, beside this one or in the working directory; DeepSpeed's JSON",
            write=f"{key}: ds_z3_config.json",
        )
    return {"zero_optimization": found}


def offloaded(reading: Reading, key: str) -> None:
    """Activations that wait on the host; to be called when objective and GPUs are set."""
    alone = (reading.fields.get("parallel") or {}).get("strategy", "none") in ("none", "ddp")
    if knows("activation_offload") and alone and reading.fields.get("objective", "sft") == "sft":
        reading.set(activation_offload=True)
    else:
        reading.approximates(
            key, True, TOO_HIGH, "what backward needs waits on the host", "activations"
        )


def router_loss(reading: Reading, key: str) -> None:
    """The loss that spreads tokens over experts; to be called when the loss is set."""
    if reading.fields.get("loss", "full") == "full":
        reading.set(experts={**reading.fields.get("experts", {}), "router_loss": True})
    else:
        reading.approximates(
            key, True, TOO_LOW, "the routers' logits are kept for a loss of their own"
        )


def evaluation(reading: Reading, settings: Mapping[str, Any]) -> None:
    """Say what an evaluation of transformers' Trainer takes, where one is asked for; of 8 rows if nobody says how many.

    It runs without gradients, so that its logits count alone (transformers 5.24.0, training_args.py and trainer.py).
    """
    on = [settings.get(key) for key in ("eval_strategy", "evaluation_strategy", "do_eval")]
    if not any(str(value).lower() in ("steps", "epoch", "true") for value in on):
        return
    rows = settings.get("per_device_eval_batch_size", 8)
    if isinstance(rows, int) and not isinstance(rows, bool):
        why = f"an evaluation of {rows} rows of full length keeps their logits"
        reading.approximates("evaluation", rows, TOO_LOW, why, f"evaluation {rows}")


_PLANS = ("tensor", "expert")  # axes that transformers' plans divide


def compiled(
    reading: Reading,
    torch_compile: Any,
    mode: Any,
    *,
    layers: bool = False,
    key: str = "torch_compile",
) -> None:
    """``torch_compile`` of a trainer, which compiles the whole model; to be called when objective and GPUs are set.

    ``layers``: it compiles layer by layer, which goes with FSDP2, and with the plan for sequence and loss parallel.
    ``key``: whose value ``torch_compile`` is.
    """
    if not torch_compile:
        return
    fields, divided = reading.fields, reading.fields.get("parallel") or {}
    strategy, titan = (
        divided.get("strategy", "none"),
        divided.get("sequence_parallel") or divided.get("loss_parallel"),
    )
    by_plan = divided.get("pipeline", 1) > 1 or (
        not titan and any(divided.get(axis, 1) > 1 for axis in _PLANS)
    )
    together = (
        strategy == "fsdp2"
        if layers and (titan or strategy == "fsdp2")
        else strategy in ("none", "ddp")
    )
    known = together and not by_plan and fields.get("objective", "sft") == "sft"
    if known and find_spec("triton") is not None:
        reading.set(compile="layers" if layers else "model")
        if mode in ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
            reading.set(compile_mode=mode)
        return
    why = "compiled code fuses operations, and needs some memory for its own buffers"
    if known:
        why += "; with the extra `run` it is followed"
    reading.approximates(key, torch_compile, TOO_HIGH, why)


def liger(reading: Reading) -> None:
    """The model as Liger patches it, with its fused loss; where that can't be followed, the loss alone."""
    reading.set(loss="liger", kernels="liger")


# What TRL's trainers decide themselves, whatever a file says of the step of supervised fine-tuning.
_TRL_DECIDES = (
    "loss",
    "kernels",
    "packing",
    "kbit_preparation",
    "adapter_precision",
    "loop",
    "use_cache",
)


def _is_predicted(fields: Mapping[str, Any], kind: str, rows: int) -> bool:
    """Whether the objective's step can be predicted, with an optimizer that TRL's trainers take.

    On one GPU it is TRL's own, with its package; on several pairs alone are predicted, by rules.
    """
    strategy = (fields.get("parallel") or {}).get("strategy", "none")
    known = OPTIMIZERS[fields.get("optimizer", BY_NAME["optimizer"].default)].in_trl is not None
    aim = OBJECTIVES[kind]
    can = find_spec("trl") is not None if strategy == "none" else aim.in_pairs
    return can and known and rows >= aim.least_rows


def preference(reading: Reading, kind: str, key: str, rows: int, *, answers: bool = False) -> bool:
    """A preference objective: TRL's step where that is predicted, else twice the rows, with what is left out said.

    ``answers``: the caller reads how they are generated, without which a step that generates is not predicted.

    Returns whether TRL's step is predicted.
    """
    liger = reading.fields.get("loss") == "liger"
    if _is_predicted(reading.fields, kind, rows) and answers >= OBJECTIVES[kind].generates:
        for name in _TRL_DECIDES:
            reading.fields.pop(name, None)
        reading.set(objective=kind, micro_batch=rows)
        if kind == "dpo" and not liger:
            why = "logits in chunks, as TRL has them after 1.9; TRL up to 1.9, and losses of other tools, keep them"
            reading.approximates(
                f"{kind} with whole logits", kind, TOO_LOW, f"{why} whole", "pair_logits"
            )
        return True
    aim = OBJECTIVES[kind]
    if aim.texts_in_a_row == 2:
        reading.set(micro_batch=2 * rows, loss="full")
        reading.notes.append(
            f"{kind}: an answer that is preferred and one that is not are two rows of the batch"
        )
    if aim.references:
        reading.approximates(
            key, kind, TOO_LOW, "the logits of the reference model are computed beside", "logits"
        )
    if "precomputed" in aim.references and reading.fields.get("method") == "full":
        reading.approximates(
            key, kind, TOO_LOW, "a reference model lies beside the one that is trained", "reference"
        )
    if aim.generates:
        reading.approximates(
            key, kind, TOO_LOW, "answers are generated in training, and their keys and values kept"
        )
    return False
