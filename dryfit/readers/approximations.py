"""What tools can do together and a scenario can't say yet: the nearest that it can, and which way that errs. One table.

Each row's change makes its own condition false and no other row's true again, so that the order of rows does not
matter (tests/dryfit/ask/test_approximations.py applies them in many orders).
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from dryfit.readers.reading import EITHER_WAY, TOO_HIGH, TOO_LOW, Reading, Remark
from dryfit.scenario.fields import BY_NAME
from dryfit.scenario.model import EXPERT_COUNTS, LIGER_MODELS, LIGER_WRITTEN_OUT
from dryfit.scenario.objectives import OBJECTIVES
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.strategies import AXES, DIVIDED, NONE, STRATEGIES, WEIGHTS, Strategy

Fields = Mapping[str, Any]
GONE = object()  # the value of a field that goes
_OF_ADAPTERS = ("lora", "adapter", "quantization", "kbit_preparation", "adapter_precision")
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")


class Approximation(NamedTuple):
    """A row: where it ``holds``, what to ``change``, and what to say: key, what was found, which way it errs, why."""

    holds: Callable[[Fields], Any]
    change: Callable[[Fields], dict[str, Any]]
    key: str = ""
    found: Callable[[Fields], Any] = lambda fields: None
    errs: str = ""  # "": nothing is said, since nothing changes
    why: str = ""
    bound: str | None = None


def _strategy(fields: Fields) -> Strategy:
    return STRATEGIES[(fields.get("parallel") or {}).get("strategy", NONE)]


def _value(fields: Fields, name: str) -> Any:
    return fields.get(name, BY_NAME[name].default)


def _half(fields: Fields) -> str:
    return str(_value(fields, "precision")).removesuffix("-mixed")


def _divides(fields: Fields) -> bool:
    return bool(_strategy(fields).divides)


def _meshed(fields: Fields) -> bool:
    """Whether a step is divided on a mesh that its strategy goes with."""
    parallel = fields.get("parallel") or {}
    goes = parallel.get("strategy", NONE) in (NONE, DIVIDED) or parallel.get("ulysses", 1) != 1
    return goes and any(parallel.get(axis, 1) != 1 for axis in AXES)


def _optimizer_in_few_bits(fields: Fields) -> bool:
    kind = OPTIMIZERS.get(str(_value(fields, "optimizer")))
    return kind is not None and kind.bits is not None


def _has_experts(fields: Fields) -> bool:
    return any(_size_of(fields["model"], key) for key in EXPERT_COUNTS)


def _size_of(model: Mapping[str, Any], key: str) -> Any:
    """A size of a configuration, or of its language model's."""
    return model.get(key) or (model.get("text_config") or {}).get(key)


def _packed_experts(fields: Fields) -> bool:
    return (fields.get("experts") or {}).get("quantized") == "bitsandbytes"


def _experts_not_followed(fields: Fields) -> bool:
    """Whether packed experts are asked for with what they are not predicted with."""
    adapted = bool((fields.get("adapter") or {}).get("target_parameters"))
    spread = _strategy(fields) is not STRATEGIES[NONE]
    return adapted or spread or not _supervised(fields) or _value(fields, "compile") != "none"


def _targets(fields: Fields) -> Any:
    return (fields.get("lora") or {}).get("target_modules") if _has_experts(fields) else None


def _without_experts(fields: Fields) -> list[str]:
    return [name for name in _targets(fields) if name not in _OF_EXPERTS]


def _in_4_bits(fields: Fields) -> bool:
    return (
        fields.get("method") == "qlora" and (fields.get("quantization") or {}).get("type") != "int8"
    )


def _drops_on_experts(fields: Fields) -> bool:
    targets = _targets(fields)
    if (
        not isinstance(targets, Sequence)
        or isinstance(targets, str)
        or not fields["lora"].get("dropout")
    ):
        return False
    kept = _without_experts(fields)
    return bool(kept) and kept != list(targets)


def _supervised(fields: Fields) -> bool:
    return not OBJECTIVES[_value(fields, "objective")].trainer


def _liger_followed(fields: Fields) -> bool:
    """Whether Liger's kernels are those of a step that is predicted: written out here, or run by their package."""
    kind = fields["model"].get("model_type")
    known = kind in LIGER_WRITTEN_OUT or (
        kind in LIGER_MODELS and find_spec("liger_kernel") is not None
    )
    text = _supervised(fields) and not fields.get("images")
    return (
        known
        and text
        and not (_divides(fields) or _meshed(fields))
        and _value(fields, "loss") == "liger"
    )


TABLE = (
    Approximation(
        lambda f: _packed_experts(f) and not (_has_experts(f) and f.get("method") == "qlora"),
        lambda f: {"experts": GONE},
        "quantize_moe_experts",
        lambda f: True,
        TOO_HIGH,
        "experts are packed beside a quantized base alone; counted in 16 bits",
    ),
    *(
        Approximation(
            lambda f, bits=bits: (
                _packed_experts(f)
                and _has_experts(f)
                and f.get("method") == "qlora"
                and _in_4_bits(f) == (bits == 4)
                and _experts_not_followed(f)
            ),
            lambda f: {"experts": GONE},
            "quantize_moe_experts",
            lambda f: True,
            TOO_HIGH,
            "packed experts are predicted for one GPU, without adapters of their own and the compiler; counted in 16"
            " bits",
            f"experts {bits}",
        )
        for bits in (4, 8)
    ),
    Approximation(
        lambda f: _value(f, "compile") != "none" and not _supervised(f),
        lambda f: {"compile": GONE, "compile_mode": GONE},
        "compile",
        lambda f: f["compile"],
        TOO_HIGH,
        "compiled code fuses operations, and is predicted for supervised fine-tuning",
    ),
    Approximation(
        lambda f: (
            _value(f, "compile_mode") in ("reduce-overhead", "max-autotune")
            and (_strategy(f) is not STRATEGIES[NONE] or _value(f, "gradient_accumulation") > 1)
        ),
        lambda f: {"compile_mode": GONE},
        "torch_compile_mode",
        lambda f: f["compile_mode"],
        TOO_LOW,
        "CUDA graphs keep memory in pools of their own, and PyTorch stops where they add up gradients; read as the"
        " default mode",
    ),
    Approximation(
        lambda f: (
            _divides(f)
            and f.get("method") != "full"
            and (f.get("quantization") or {}).get("type") == "int8"
        ),
        lambda f: {"method": "lora", "quantization": None},
        "load_in_8bit",
        lambda f: True,
        TOO_HIGH,
        "weights of LLM.int8 can't be divided; they are counted in 16 bits",
        "int8",
    ),
    Approximation(
        lambda f: _value(f, "loss") == "liger" and f["model"].get("model_type") not in LIGER_MODELS,
        lambda f: {"loss": "chunked"},
        "loss",
        lambda f: "liger",
        EITHER_WAY,
        "Liger's fused loss is not known for this model; read as a chunked loss",
    ),
    Approximation(
        lambda f: _value(f, "kernels") == "liger" and not _liger_followed(f),
        lambda f: {"kernels": GONE},
        "kernels",
        lambda f: "liger",
        TOO_HIGH,
        "Liger's fused norms and MLP keep less",
    ),
    Approximation(
        lambda f: (
            _value(f, "kernels") == "unsloth"
            and (_divides(f) or _meshed(f) or f.get("images") or not _supervised(f))
        ),
        lambda f: {"kernels": GONE},
    ),
    Approximation(
        lambda f: _value(f, "loss") == "liger" and _strategy(f).zero == 3 and not _meshed(f),
        lambda f: {"loss": "chunked"},
        "loss",
        lambda f: "liger",
        TOO_LOW,
        "Liger's fused loss under ZeRO-3 is read as a chunked loss",
        "liger_loss",
    ),
    Approximation(
        lambda f: (
            _value(f, "loss") != "full"
            and WEIGHTS in _strategy(f).divides
            and _strategy(f).zero != 3
        ),
        lambda f: {"loss": "full"},
        "loss",
        lambda f: f["loss"],
        TOO_HIGH,
        "a loss in chunks is not described where weights are divided",
        "logits",
    ),
    Approximation(
        lambda f: (
            _value(f, "loss") != "full" and WEIGHTS not in _strategy(f).divides and _meshed(f)
        ),
        lambda f: {"loss": "full"},
        "loss",
        lambda f: f["loss"],
        TOO_HIGH,
        "a loss in chunks is not described on a mesh",
        "logits",
    ),
    Approximation(
        lambda f: "attention_mask" in f and _meshed(f) and _value(f, "attention") != "flash",
        lambda f: {"attention_mask": GONE},
        "packing",
        lambda f: False,
        TOO_LOW,
        "the mask of padded rows is not described on a mesh",
    ),
    Approximation(
        lambda f: f.get("activation_offload") and (WEIGHTS in _strategy(f).divides or _meshed(f)),
        lambda f: {"activation_offload": GONE},
        "activation_offloading",
        lambda f: True,
        TOO_HIGH,
        "activations on the host are not described where weights are divided",
        "activations",
    ),
    Approximation(
        lambda f: _optimizer_in_few_bits(f) and _divides(f),
        lambda f: {"optimizer": BY_NAME["optimizer"].default},
        "optimizer",
        lambda f: f["optimizer"],
        TOO_HIGH,
        "8-bit states are not described where they are divided",
        "states",
    ),
    Approximation(
        lambda f: _strategy(f).fsdp == 1 and f["parallel"].get("offload") == "cpu",
        lambda f: {"parallel": {**f["parallel"], "strategy": DIVIDED}},
        "offload",
        lambda f: "cpu",
        TOO_LOW,
        "FSDP1 with offload is read as FSDP2, which lets a gradient's shard go once the host has it; FSDP1 keeps all of"
        " them on the GPU until backward ends",
        "gradient_shards",
    ),
    Approximation(
        lambda f: (
            _strategy(f).fsdp == 1
            and f["parallel"].get("offload") != "cpu"
            and f.get("quantization")
            and f["quantization"].get("storage") != _half(f)
        ),
        lambda f: {"quantization": {**f["quantization"], "storage": _half(f)}},
    ),
    Approximation(
        lambda f: (
            _strategy(f).fsdp == 1
            and f["parallel"].get("offload") != "cpu"
            and "kbit_preparation" in f
        ),
        lambda f: {"kbit_preparation": GONE},
    ),
    Approximation(
        lambda f: (
            _strategy(f).zero
            and (f.get("quantization") or {}).get("storage") in ("bf16", "fp16", "fp32")
            and f["quantization"]["storage"] != (f.get("autocast") or _half(f))
        ),
        lambda f: {"quantization": {**f["quantization"], "storage": f.get("autocast") or _half(f)}},
        "bnb_4bit_quant_storage",
        lambda f: f["quantization"]["storage"],
        EITHER_WAY,
        "DeepSpeed casts 4-bit weights that are stored in another float dtype than its own; read as stored in that",
    ),
    Approximation(
        lambda f: _value(f, "attention") == "flash" and (f.get("autocast") or _half(f)) == "fp32",
        lambda f: {"attention": "sdpa"},
        "attention",
        lambda f: "flash",
        EITHER_WAY,
        "FlashAttention takes no fp32; read as sdpa",
    ),
    # Padded rows go through FlashAttention unpadded.
    Approximation(
        lambda f: (
            _value(f, "attention") == "flash"
            and (f.get("autocast") or _half(f)) != "fp32"
            and "attention_mask" in f
        ),
        lambda f: {"attention_mask": GONE},
    ),
    Approximation(
        lambda f: f.get("autocast") and _half(f) != _value(f, "precision"),
        lambda f: {"autocast": GONE},
    ),
    *(
        Approximation(
            lambda f, name=name: f.get("method") == "full" and name in f,
            lambda f, name=name: {name: GONE},
        )
        for name in _OF_ADAPTERS
    ),
    Approximation(
        lambda f: f.get("method") != "full" and _targets(f) == "all-linear",
        lambda f: {"lora": {**f["lora"], "target_modules": list(_OF_ATTENTION)}},
        why="all linear layers are those of attention here: experts are no linear layers",
    ),
    Approximation(
        lambda f: f.get("method") != "full" and _drops_on_experts(f),
        lambda f: {"lora": {**f["lora"], "target_modules": _without_experts(f)}},
        "lora_target_modules",
        lambda f: "experts",
        TOO_LOW,
        "PEFT refuses dropout on expert adapters; they are left out",
    ),
)


def approximated(
    fields: Fields, table: Sequence[Approximation] = TABLE
) -> tuple[dict[str, Any], list[Approximation]]:
    """The fields with the nearest that a scenario can say, and the rows that changed them, each once.

    ``fields`` stay as they are. A row's ``found`` is then a value.
    """
    now, applied = dict(fields), []
    while row := next((row for row in table if row.holds(now)), None):
        applied.append(row._replace(found=row.found(now)))
        now = {
            name: value for name, value in {**now, **row.change(now)}.items() if value is not GONE
        }
    return now, applied


def approximate(fields: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The same, with what is approximated noted in a reading."""
    now, applied = approximated(fields)
    for row in applied:
        if row.errs:
            reading.remarks.append(Remark(row.key, row.found, row.errs, row.why, row.bound))
        elif row.why:
            reading.notes.append(row.why)
    return now
