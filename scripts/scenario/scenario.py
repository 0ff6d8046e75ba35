"""A scenario: one training step, described completely enough to know its memory before it runs.

It is a value that the memory stage predicts and measures and that the training stage runs::

    model: qwen2.5-coder-7b   # a name in config/models/, a path to a config.json, or the configuration itself
    method: qlora
    precision: bf16
    sequence_length: 512

Whatever a file leaves out comes from ``scenario_defaults`` in config/config.yaml. Every wrong field is a
:class:`UserError` that shows the corrected line. Nothing heavier than PyYAML is imported here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "config" / "models"

CHOICES = {
    "method": ("full", "lora", "qlora"),
    "precision": ("fp32", "fp16", "bf16", "fp16-mixed", "bf16-mixed"),
    "kbit_preparation": ("none", "peft"),
    "adapter_precision": ("fp32", "fp16", "bf16"),
    "attention": ("eager", "sdpa", "mem_efficient", "flash"),
    "optimizer": ("adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit"),
    "loss": ("full", "chunked"),
    "loop": ("trainer", "manual"),
    "packing": ("none", "rows", "shared_prefix"),
}
COUNTS = {"sequence_length": 512, "micro_batch": 1, "gradient_accumulation": 1}
QUANTIZATION_TYPES = ("nf4", "fp4")

# Other names for the same sizes in older configurations (GPT-2's; transformers' `attribute_map`).
ALIASES = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions",),
    "intermediate_size": ("n_inner",),
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# Fields of decoders in transformers 5.24 that read like a misspelt size and are none.
ALIKE = (
    "attention_heads",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "swa_num_attention_heads",
    "swa_num_key_value_heads",
    "v_head_dim",
)
# Families whose configuration class has a head size of its own, so that hidden_size need not be a multiple of the
# heads (`head_dim` default in transformers' configuration_*.py).
OWN_HEAD_DIM = (
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "glm",
    "glm4",
    "helium",
    "olmoe",
)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: B (out x rank) times A (rank x in), scaled by alpha / rank, beside each target module."""

    rank: int
    alpha: int
    dropout: float
    target_modules: str | tuple[str, ...]  # "all-linear" (every linear layer but the output head) or names


@dataclass(frozen=True)
class Scenario:
    """One training step. Sizes are counts; ``precision`` is the dtype of the weights (``*-mixed``: fp32, autocast)."""

    model: dict[str, Any]
    model_name: str | None
    method: str
    precision: str
    quantization: dict[str, Any] | None  # {"type": "nf4", "double": bool}; None unless method is qlora
    kbit_preparation: str
    lora: Lora | None  # None when method is full
    adapter_precision: str
    sequence_length: int
    micro_batch: int
    gradient_accumulation: int
    gradient_checkpointing: bool
    attention: str
    optimizer: str
    loss: str
    loop: str
    packing: str  # rows in one sequence (scripts.training.packing): the batch then has positions and a square mask
    gpu: str | dict[str, float] | None

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        where: object = "scenario",
    ) -> Scenario:
        """Check a mapping and make the scenario it describes.

        Parameters
        ----------
        mapping
            The fields of a scenario file.
        defaults
            Values for the fields that are left out; the project's ``scenario_defaults`` when None.
        where
            What to call the place in messages, usually the file. A relative path to a model configuration is
            looked for beside that file first, then in the working directory.

        Raises
        ------
        UserError
            For the first field that is wrong, with the corrected line.
        """
        if not isinstance(mapping, Mapping):
            raise UserError(
                "A scenario is a mapping of fields.",
                where=where,
                found=mapping,
                write="model: qwen2.5-coder-7b",
            )
        if defaults is None:
            defaults = scenario_defaults()
        check_keys(mapping, [f.name for f in fields(cls)], where)
        values: dict[str, Any] = {**defaults, **mapping}
        method = choice(values, "method", CHOICES["method"], where)
        _refuse_incompatible(method, mapping, where)

        for key, allowed in CHOICES.items():
            values[key] = choice(values, key, allowed, where)
        for key, example in COUNTS.items():
            values[key] = whole(values, key, where, example=example)
        values["gradient_checkpointing"] = boolean(values, "gradient_checkpointing", where)
        values["quantization"] = _quantization(mapping, defaults, where) if method == "qlora" else None
        values["lora"] = _lora(mapping, defaults, where) if method != "full" else None
        if method == "full":
            values["adapter_precision"] = "fp32"
        values["gpu"] = _gpu(values.get("gpu"), where)
        values["model"], name = _model(values.get("model"), where)
        values["model_name"] = values.get("model_name") or name
        scenario = cls(**{f.name: values[f.name] for f in fields(cls)})
        _check_together(scenario, where)
        return scenario

    def to_mapping(self) -> dict[str, Any]:
        """Plain, sorted values; ``Scenario.from_mapping`` gives the same scenario back."""
        values = asdict(self)
        if self.lora and not isinstance(self.lora.target_modules, str):
            values["lora"]["target_modules"] = list(self.lora.target_modules)
        return {key: _sorted(values[key]) for key in sorted(values)}

    def changed(self, **changes: Any) -> Scenario:
        """The same scenario but for some fields, checked again."""
        return Scenario.from_mapping({**self.to_mapping(), **changes}, where="changed scenario")

    @property
    def tokens(self) -> int:
        """Tokens in one micro-batch."""
        return self.micro_batch * self.sequence_length

    @property
    def mixed(self) -> bool:
        """Whether fp32 weights are used under autocast."""
        return self.precision.endswith("-mixed")

    def size(self, name: str, default: Any = None) -> Any:
        """A size of the model under its usual name, whatever its configuration calls it (None counts as missing)."""
        return size(self.model, name, default)


def load_scenario(path: str | Path) -> Scenario:
    """Read a scenario file (YAML); ``scenario_defaults`` of config/config.yaml fill in what it leaves out."""
    return Scenario.from_mapping(read_yaml(path), where=path)


def scenario_defaults() -> dict[str, Any]:
    """``scenario_defaults`` of config/config.yaml."""
    return read_yaml(ROOT / "config" / "config.yaml")["scenario_defaults"]


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file; a :class:`UserError` names file and line when it is missing, broken or repeats a key."""
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc, valid-type]
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    line = node.start_mark.line + 1
                    raise UserError(
                        f"The key `{key}` stands twice in one mapping.",
                        where=f"{path}, from line {line}",
                    )
            return super().construct_mapping(node, deep)

    try:
        with open(path, encoding="utf-8") as handle:
            return yaml.load(handle, Loader)
    except FileNotFoundError:
        raise UserError("The file does not exist.", where=path) from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"The file can't be read: {error.strerror}.", where=path) from None
    except UnicodeDecodeError:
        raise UserError("The file is not UTF-8 text.", where=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"This is not YAML: {getattr(error, 'problem', error)}.",
            where=f"{path}{line}",
        ) from None


def size(model: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Look a size up in a model configuration under its usual name or an older one; None counts as missing."""
    for key in (name, *ALIASES.get(name, ())):
        if model.get(key) is not None:
            return model[key]
    return default


# --- checks of single fields --------------------------------------------------------------------------------------


def check_keys(mapping: Mapping[str, Any], known: list[str], where: object, prefix: str = "") -> None:
    """Refuse a key that is not known, with the nearest known one."""
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            raise UserError(
                f"Unknown field `{prefix}{key}`" + (f"; did you mean `{prefix}{near[0]}`?" if near else "."),
                where=where,
                found=key,
                allowed=", ".join(sorted(known)),
                write=f"{near[0]}: {_yaml(mapping[key])}" if near else None,
            )


def choice(values: Mapping[str, Any], key: str, allowed: tuple[str, ...], where: object) -> str:
    """A field that is one of a few words."""
    value = values.get(key)
    if value in allowed and isinstance(value, str):
        return value
    near = difflib.get_close_matches(
        str(value).lower().replace("bfloat", "bf").replace("float", "fp"), allowed, n=1, cutoff=0.4
    )
    raise UserError(
        f"`{key}` is not one of the allowed words." if value is not None else f"`{key}` has no value.",
        where=where,
        found=value,
        allowed=", ".join(allowed),
        write=f"{key}: {near[0] if near else allowed[0]}",
    )


def whole(
    values: Mapping[str, Any],
    key: str,
    where: object,
    *,
    example: int,
    prefix: str = "",
) -> int:
    """A field that is a whole number of at least 1."""
    value = values.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    problem = f"`{prefix}{key}` must be a whole number of at least 1."
    if isinstance(value, float) and value >= 1 and value == int(value):
        example = int(value)
    elif (parsed := _number(value)) is not None:
        problem = f"`{prefix}{key}` is text, not a number{_exponent_hint(value)}."
        example = int(parsed) if parsed >= 1 and parsed == int(parsed) else example
    raise UserError(
        problem,
        where=where,
        found=value,
        allowed="1, 2, 3, ...",
        write=_nested(prefix, f"{key}: {example}"),
    )


def boolean(values: Mapping[str, Any], key: str, where: object, *, prefix: str = "") -> bool:
    """A field that is true or false."""
    value = values.get(key)
    if isinstance(value, bool):
        return value
    example = "false" if str(value).lower() in ("no", "off", "0", "none", "false") else "true"
    raise UserError(
        f"`{prefix}{key}` must be true or false.",
        where=where,
        found=value,
        allowed="true, false",
        write=_nested(prefix, f"{key}: {example}"),
    )


def _number(value: Any) -> float | None:
    """The number that a text spells, if it does."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value):
        return float(value)
    return None


def _exponent_hint(value: Any) -> str:
    """Why YAML read a number as text: 2e-4 has no decimal point (YAML 1.1)."""
    if re.fullmatch(r"\s*[-+]?\d+[eE][-+]?\d+\s*", value):
        return ": YAML reads an exponent without a decimal point as text"
    return " (it stands in quotes)"


def _yaml(value: Any) -> str:
    """A value as it would stand in a YAML file, on one line."""
    return json.dumps(value, ensure_ascii=False).strip('"') if not isinstance(value, str) else value


def _nested(prefix: str, line: str) -> str:
    return f"{prefix.rstrip('.')}: {{{line}}}" if prefix else line


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return value


# --- fields with a structure --------------------------------------------------------------------------------------


def _refuse_incompatible(method: str, given: Mapping[str, Any], where: object) -> None:
    """Fields that were written down although the method has no place for them."""
    reasons = {
        "lora": {"full": "method full trains every weight and has no adapters"},
        "quantization": {
            "full": "method full trains every weight, and 4-bit weights can't be trained",
            "lora": "method lora keeps the base in the precision; a quantized base is method qlora",
        },
        "kbit_preparation": {"full": "PEFT's k-bit preparation freezes the base, which method full trains"},
    }
    instead = {
        "lora": "method: lora",
        "quantization": "method: qlora",
        "kbit_preparation": "kbit_preparation: none",
    }
    for key, by_method in reasons.items():
        if method in by_method and given.get(key) not in (None, "none"):
            raise UserError(
                f"`{key}` and `method: {method}` don't go together: {by_method[method]}.",
                where=where,
                found=given[key],
                allowed=f"leave `{key}` out, or another method",
                write=instead[key],
            )


def _quantization(given: Mapping[str, Any], defaults: Mapping[str, Any], where: object) -> dict[str, Any]:
    fallback = defaults.get("quantization") or {"type": "nf4", "double": True}
    value = given.get("quantization")
    if value is None:
        value = fallback
    write = "quantization: {type: nf4, double: true}"
    if not isinstance(value, Mapping):
        raise UserError(
            "`quantization` is a mapping.",
            where=where,
            found=value,
            allowed="type, double",
            write=write,
        )
    check_keys(value, ["type", "double"], where, "quantization.")
    value = {**fallback, **value}
    if value["type"] not in QUANTIZATION_TYPES:
        allowed = ", ".join(QUANTIZATION_TYPES)
        raise UserError(
            "`quantization.type` is not known.",
            where=where,
            found=value["type"],
            allowed=allowed,
            write=write,
        )
    return {
        "double": boolean(value, "double", where, prefix="quantization."),
        "type": value["type"],
    }


def _lora(given: Mapping[str, Any], defaults: Mapping[str, Any], where: object) -> Lora:
    fallback = defaults.get("lora") or {
        "rank": 16,
        "alpha": 32,
        "dropout": 0.0,
        "target_modules": "all-linear",
    }
    value = given.get("lora")
    if value is None:
        value = fallback
    if not isinstance(value, Mapping):
        raise UserError(
            "`lora` is a mapping.",
            where=where,
            found=value,
            allowed="rank, alpha, dropout, target_modules",
            write="lora: {rank: 16, target_modules: all-linear}",
        )
    check_keys(value, ["rank", "alpha", "dropout", "target_modules"], where, "lora.")
    value = {**fallback, **value}
    rank = whole(value, "rank", where, example=16, prefix="lora.")
    alpha = whole(value, "alpha", where, example=32, prefix="lora.")
    dropout = value["dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        parsed = _number(dropout)
        raise UserError(
            "`lora.dropout` must be a number from 0 to below 1."
            if parsed is None
            else f"`lora.dropout` is text, not a number{_exponent_hint(dropout)}.",
            where=where,
            found=dropout,
            allowed="0.0 to below 1.0",
            write=f"lora: {{dropout: {parsed if parsed is not None and 0 <= parsed < 1 else 0.0}}}",
        )
    targets = value["target_modules"]
    if isinstance(targets, (list, tuple)):
        targets = tuple(targets)
        good = bool(targets) and all(isinstance(name, str) and name for name in targets)
    else:
        good = targets == "all-linear"
    if not good:
        listed = [targets] if isinstance(targets, str) and targets else ["q_proj", "v_proj"]
        raise UserError(
            "`lora.target_modules` must be the word all-linear or a list of module names.",
            where=where,
            found=value["target_modules"],
            allowed="all-linear, or a list such as [q_proj, v_proj]",
            write=f"lora: {{target_modules: [{', '.join(listed)}]}}",
        )
    return Lora(rank, alpha, float(dropout), targets)


def _gpu(value: Any, where: object) -> str | dict[str, float] | None:
    """A name (looked up in config/gpus.yaml by who needs the card), ``{vram_gib: number}``, or None."""
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, Mapping):
        check_keys(value, ["vram_gib"], where, "gpu.")
        gib = value.get("vram_gib")
        if isinstance(gib, (int, float)) and not isinstance(gib, bool) and gib > 0:
            return {"vram_gib": float(gib)}
    gib = value if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else 24
    raise UserError(
        "`gpu` must be a name or a size.",
        where=where,
        found=value,
        allowed="a name in config/gpus.yaml, {vram_gib: number}, or null",
        write=f"gpu: {{vram_gib: {gib}}}",
    )


def _model(value: Any, where: object) -> tuple[dict[str, Any], str | None]:
    """The configuration as a mapping, and a name for it: from a mapping, a path, or a name in config/models/."""
    names = sorted(path.stem for path in MODELS.glob("*.json"))
    example = "qwen2.5-coder-7b"
    if value is None:
        raise UserError(
            "`model` is missing.",
            where=where,
            allowed=f"a configuration as a mapping, a path to a config.json, or one of: {', '.join(names)}",
            write=f"model: {example}",
        )
    if isinstance(value, str):
        beside = Path(where).parent if isinstance(where, (str, Path)) else Path()
        for path in (MODELS / f"{value}.json", beside / value, Path(value)):
            if path.is_dir() and (path / "config.json").is_file():
                path = path / "config.json"
            if path.is_file():
                break
        else:
            near = difflib.get_close_matches(value, names, n=1, cutoff=0.3)
            raise UserError(
                "`model` is neither the name of a known configuration nor a path to a file.",
                where=where,
                found=value,
                allowed=f"{', '.join(names)}; or a path to a config.json",
                write=f"model: {near[0] if near else example}",
            )
        name = path.parent.name if path.name == "config.json" else path.stem
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError("The model's configuration is not JSON.", where=f"{path}{line}") from None
    elif isinstance(value, Mapping):
        name = value.get("_name_or_path") or None
    else:
        raise UserError(
            "`model` must be a mapping, a path or a name.",
            where=where,
            found=value,
            write=f"model: {example}",
        )
    if not isinstance(value, Mapping):
        raise UserError(
            "The model's configuration is not a JSON object.",
            where=where,
            found=type(value).__name__,
        )
    model = json.loads(json.dumps(dict(value), default=str))
    _check_model(model, where)
    return model, name


def _check_model(model: dict[str, Any], where: object) -> None:
    if not isinstance(model.get("model_type"), str) or not model["model_type"]:
        raise UserError(
            "`model.model_type` is missing: it says which architecture the sizes belong to.",
            where=where,
            found=model.get("model_type"),
            allowed="a model_type of transformers: qwen2, qwen3, llama, mistral, gemma2, phi3, gpt2, mixtral, ...",
            write="model: {model_type: qwen2, ...}",
        )
    for key, value in model.items():
        # transformers takes any key and ignores what it does not know: a misspelt size would silently be the default.
        near = difflib.get_close_matches(key, SIZES, n=1, cutoff=0.88)
        if near and key not in (*SIZES, *ALIKE) and near[0] not in model:
            raise UserError(
                f"Unknown size `model.{key}`; did you mean `model.{near[0]}`?",
                where=where,
                found=key,
                allowed=", ".join(SIZES),
                write=f"model: {{{near[0]}: {value}, ...}}",
            )
    for name in SIZES:
        for key in (name, *ALIASES.get(name, ())):
            if model.get(key) is not None:
                whole(model, key, where, example=_example_size(name), prefix="model.")
    hidden, heads = size(model, "hidden_size"), size(model, "num_attention_heads")
    groups = model.get("num_key_value_heads")
    if hidden and heads and not model.get("head_dim") and model["model_type"] not in OWN_HEAD_DIM and hidden % heads:
        fits = [n for n in range(1, hidden + 1) if hidden % n == 0]
        near_heads = min(fits, key=lambda n: (abs(n - heads), -n))
        raise UserError(
            f"`model.num_attention_heads` does not divide `model.hidden_size` ({hidden}).",
            where=where,
            found=heads,
            allowed=f"a divisor of {hidden}, or a `head_dim` of its own",
            write=f"model: {{num_attention_heads: {near_heads}, ...}}",
        )
    if heads and groups and heads % groups:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"`model.num_key_value_heads` does not divide `model.num_attention_heads` ({heads}).",
            where=where,
            found=groups,
            allowed=", ".join(map(str, fits)),
            write=f"model: {{num_key_value_heads: {min(fits, key=lambda n: (abs(n - groups), -n))}, ...}}",
        )


def _example_size(name: str) -> int:
    return {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "head_dim": 128,
    }.get(name, 28)


def _check_together(scenario: Scenario, where: object) -> None:
    """Pairs of fields that can't both be so."""
    if scenario.method == "qlora" and scenario.mixed:
        base = scenario.precision.removesuffix("-mixed")
        raise UserError(
            f"`precision: {scenario.precision}` and `method: qlora` don't go together: mixed precision casts fp32"
            " weights on the fly, and a quantized base has none; its precision is the dtype it computes in.",
            where=where,
            found=scenario.precision,
            allowed="fp32, fp16, bf16",
            write=f"precision: {base}",
        )
    if scenario.attention == "flash" and scenario.precision == "fp32":
        raise UserError(
            "`attention: flash` and `precision: fp32` don't go together: the flash kernels take 16-bit tensors only.",
            where=where,
            found=scenario.attention,
            allowed="eager, sdpa, mem_efficient; or precision bf16",
            write="attention: mem_efficient",
        )
    if scenario.packing != "none" and scenario.attention == "flash":
        raise UserError(
            f"`packing: {scenario.packing}` and `attention: flash` don't go together: the flash kernels take no mask.",
            where=where,
            found=scenario.attention,
            allowed="eager, sdpa, mem_efficient; or packing none",
            write="attention: sdpa",
        )
    if scenario.packing == "shared_prefix" and scenario.lora and scenario.lora.dropout:
        raise UserError(
            "`packing: shared_prefix` and `lora.dropout` don't go together: all rows of a pack would share the noise"
            " on their prefix.",
            where=where,
            found=scenario.lora.dropout,
            allowed="lora.dropout 0.0; or packing rows, where each row has its own",
            write="packing: rows",
        )
    limit = scenario.size("max_position_embeddings")
    if limit and scenario.sequence_length > limit:
        raise UserError(
            f"`sequence_length` is beyond the {limit} positions of the model.",
            where=where,
            found=scenario.sequence_length,
            allowed=f"1 to {limit}",
            write=f"sequence_length: {limit}",
        )
