"""A model's configuration, as a mapping: where it comes from, what its sizes are called, what can't be right in it."""

import difflib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_json
from dryfit.common.schema import problems
from dryfit.scenario.description import MOST
from dryfit.scenario.hub import (
    MODELS,
    HubId,
    catalogued,
    fetch_config,
    is_language_model_alone,
    likely_id,
    named_repository,
    nearest,
    of_modelscope,
)
from dryfit.scenario.other_models import by_name, not_a_language_model, refuse_other_kinds

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
# Fields of decoders in transformers 5.24 that look like a misspelt size but are settings of their own.
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
    "glm4_moe",
    "glm4_moe_lite",
    "helium",
    "olmoe",
)
MOST_LAYERS = 4096
# What families call the number of experts of a layer.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Packages whose kernels transformers takes where it can import them: as pip and as Python name them.
KERNEL_PACKAGES = {"causal-conv1d": "causal_conv1d", "fla": "fla", "mamba-ssm": "mamba_ssm"}
PACKAGE, LOOP, LEAST = (
    "package",
    "loop",
    "least",
)  # of such a kernel: the package's, transformers' own, no less than it
PACKAGE_TITLES = {"fla": "flash-linear-attention"}  # where people know a package by another name
# Decoders of liger-kernel's MODEL_TYPE_TO_APPLY_LIGER_FN whose forward pass with the fused loss is that of lce_forward.
LIGER_MODELS = (
    "deepseek_v3",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)


# Of these, models whose norms, MLPs and rotation dryfit/step/liger.py has: RMSNorm as Llama's, SwiGLU of two
# projections, the whole head rotated.
LIGER_WRITTEN_OUT = ("llama", "ministral", "mistral", "qwen2", "qwen3", "smollm3")


def size(model: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Look a size up in a model configuration under its usual name or an older one; None counts as missing."""
    for key in (name, *ALIASES.get(name, ())):
        if model.get(key) is not None:
            return model[key]
    return default


def found_beside(path: str, where: object) -> Path | None:
    """A file or folder that a scenario names: beside the scenario's own file, else in the working directory."""
    beside = Path(where).parent if isinstance(where, (str, Path)) else Path()
    return next((file for file in (beside / path, Path(path)) if file.exists()), None)


def read_model(
    value: Any, where: object, *, whole: bool = False
) -> tuple[dict[str, Any], str | None]:
    """The configuration as a mapping, and a name for it.

    From a mapping, a path, a name in config/models/, or a model's id on the Hub (:mod:`dryfit.scenario.hub`).
    ``whole``: of a multimodal model all parts, instead of its language model.
    """
    example = "qwen2.5-coder-7b"
    if value is None:
        raise UserError(
            "`model` is missing.",
            where=where,
            allowed="a name in config/models/, an id on the Hub, a path to a config.json, or a configuration itself;"
            f" names are {', '.join(sorted(path.stem for path in MODELS.glob('*.json')))}",
            change={"model": example},
        )
    if isinstance(value, str):
        value, name = configuration(value, where)
    elif isinstance(value, Mapping):
        name = value.get("_name_or_path") or None
    else:
        raise UserError(
            "`model` must be a mapping, a path, a name or an id on the Hub.",
            where=where,
            found=value,
            change={"model": example},
        )
    given = json.loads(json.dumps(dict(value), default=str))
    names = given.get("architectures")
    if not (isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)):
        refuse_other_kinds(given, where)
    model, alone = language_model(given)
    _check_model(model, where)
    if whole:
        return given, name
    return model, f"{name or value.get('model_type')} (language model alone)" if alone else name


def configuration(text: str, where: object) -> tuple[dict[str, Any], str]:
    """A configuration as its file has it, and what to call the model: of a name, a path or an id on the Hub."""
    path, name = _file(text, where)
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(
            "The model's configuration is not a JSON object.",
            where=where,
            found=type(value).__name__,
        )
    return value, name


# What a multimodal model's language model is, where transformers has no class of that type for it alone.
_LANGUAGE_MODELS = {
    "gemma3": "gemma3_text",
    "glm4v": "glm4",
    "glm4v_text": "glm4",
    "kimi_k2": "deepseek_v3",  # transformers/models/kimi_k25/configuration_kimi_k25.py
    "paddleocr_vl": "ernie4_5",
    "paddleocr_vl_text": "ernie4_5",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
_OTHER_PARTS = ("vision_config", "audio_config")


def _text_positions(model: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose rotary positions are those of text: of three equal axes, `mrope` is the usual kind."""
    changed = dict(model)
    for key in ("rope_scaling", "rope_parameters"):
        rope = model.get(key)
        if isinstance(rope, Mapping) and "mrope" in (rope.get("type"), rope.get("rope_type")):
            kept = {
                name: value for name, value in rope.items() if name not in ("type", "mrope_section")
            }
            changed[key] = {**kept, "rope_type": "default"}
    return changed


def language_model(model: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The language model's configuration of a multimodal one, and whether it was one: its other parts are left out."""
    text, parts = model.get("text_config"), [part for part in _OTHER_PARTS if model.get(part)]
    if isinstance(text, Mapping) and parts:
        shared = {
            key: model[key]
            for key in ("tie_word_embeddings", "quantization_config")
            if key in model
        }
        kind = text.get("model_type") or model.get("model_type")
        return _text_positions(
            {**shared, **text, "model_type": _LANGUAGE_MODELS.get(kind, kind)}
        ), True
    kind = model.get("model_type")
    if (
        parts and kind in _LANGUAGE_MODELS and size(model, "hidden_size")
    ):  # older files: the sizes lie at the top
        kept = {key: value for key, value in model.items() if key not in _OTHER_PARTS}
        return _text_positions({**kept, "model_type": _LANGUAGE_MODELS[kind]}), True
    return model, False


_FOLDER = (
    "the folder that holds the model's config.json, or the file itself; or the name or the Hub's id of what the model"
    " was made from"
)
# What folders for a training's own output are called, and no account of the Hub that is known.
_OUTPUTS = (
    "checkpoint",
    "checkpoints",
    "ckpt",
    "ckpts",
    "model",
    "models",
    "out",
    "output",
    "outputs",
    "result",
    "results",
    "run",
    "runs",
    "saves",
)


def _is_local(text: str, where: object) -> bool:
    """Whether a name can only be one of a folder here: by how it begins, or since its first part is one."""
    first = text.split("/")[0]
    return (
        text.startswith(("/", "./", "../", "~"))
        or "\\" in text
        or text.endswith(("/", ".json"))
        or (text.count("/") > 1 and "@" not in text)
        or (
            "/" in text
            and (first.lower() in _OUTPUTS or (found_beside(first, where) or Path("?")).is_dir())
        )
    )


def language_model_only(value: Any, where: object) -> Mapping[str, Any] | None:
    """The configuration of a multimodal model of which an answer without images covers the language model alone.

    None: the model has no other part. {}: it has one, and the catalogue's file, that of the language model, is all that
    is here.
    """
    if isinstance(value, str):
        hub = HubId.read(value)
        name = catalogued(hub) if hub and hub.revision is None else value
        if name and (MODELS / f"{name}.json").is_file():
            return {} if is_language_model_alone(name) else None
        value = configuration(value, where)[0]
    return value if isinstance(value, Mapping) and language_model(dict(value))[1] else None


def _file(text: str, where: object) -> tuple[Path, str]:
    """The file of a configuration, and what to call the model."""
    path = MODELS / f"{text}.json"
    if not path.is_file():
        path = found_beside(text, where)
    if path is not None and (path / _PIPELINE).is_file():
        refuse_other_kinds(read_json(path / _PIPELINE), where)
    if path is not None and path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                "`model` names a folder that holds no config.json.",
                where=where,
                found=text,
                allowed=_FOLDER,
                change={"model": "qwen2.5-coder-7b"},
            )
        path = path / "config.json"
    if path is not None:
        return path, path.parent.name if path.name == "config.json" else path.stem
    modelscope = of_modelscope(text)
    hub = named_repository(text) or HubId.read(modelscope[0] if modelscope else text)
    if hub is not None and hub.revision is None and (known := catalogued(hub)):
        return MODELS / f"{known}.json", hub.short
    if modelscope:
        name, there = modelscope
        raise UserError(
            "This model lies on ModelScope, which is not asked.",
            where=where,
            found=text,
            allowed="its id on the Hub, owner/name; or the path of a config.json, saved from"
            f" https://modelscope.cn/models/{name}/resolve/master/config.json",
            change={"model": there or (name if name != text else "config.json")},
        )
    if hub is not None and (named_repository(text) or not _is_local(text, where)):
        return fetch_config(hub, where), hub.short
    if _is_local(text, where):
        raise UserError(
            "`model` names a folder or a file that isn't there.",
            where=where,
            found=text,
            allowed=_FOLDER,
            change={"model": "qwen2.5-coder-7b"},
        )
    near = nearest(text)
    if not near and (does := by_name(text)):
        raise not_a_language_model(text, where, does)
    found_by = (
        ""
        if near
        else f", as https://huggingface.co/models?search={'+'.join(text.split('-'))} finds"
    )
    raise UserError(
        "`model` is neither the name of a known configuration nor a path to a file, nor an id on the Hub.",
        where=where,
        found=text,
        allowed=f"{', '.join(near) + ', ... (' if near else 'a name ('}config/models/ lists"
        f" {len(list(MODELS.glob('*.json')))}); an id on the Hub, owner/name{found_by}; or a path to a config.json",
        field="model",
        change={"model": likely} if (likely := near[0] if near else likely_id(text)) else None,
    )


_PIPELINE = "model_index.json"  # of a folder of diffusers, whose models lie in folders of their own


def _check_model(model: dict[str, Any], where: object) -> None:
    if not isinstance(model.get("model_type"), str) or not model["model_type"]:
        raise UserError(
            "`model.model_type` is missing: it says which architecture the sizes belong to.",
            where=where,
            found=model.get("model_type"),
            allowed="a model_type of transformers: qwen2, qwen3, llama, mistral, gemma2, phi3, gpt2, mixtral, ...",
            write="model: {model_type: qwen2, ...}",
        )
    _refuse_unsupported(model, where)
    for key, value in model.items():
        # transformers takes any key and ignores what it does not know: a misspelt size would silently be the default.
        near = _misspelt(key)
        if near and near not in model:
            raise UserError(
                f"Unknown size `model.{key}`; did you mean `model.{near}`?",
                where=where,
                found=key,
                allowed=", ".join(SIZES),
                write=f"model: {{{near}: {value}, ...}}",
            )
    if wrong := problems(model, _sizes(), where, within="model"):
        raise UserError.several(wrong)
    _check_layers(model, where)
    _check_padding(model, where)
    hidden, heads = size(model, "hidden_size"), size(model, "num_attention_heads")
    groups = model.get("num_key_value_heads")
    if (
        hidden
        and heads
        and not model.get("head_dim")
        and model["model_type"] not in OWN_HEAD_DIM
        and hidden % heads
    ):
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


# Lists with an entry for each layer, as configurations call them.
_BY_LAYER = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "indexer_types",
    "no_rope_layers",
)


def _check_layers(model: Mapping[str, Any], where: object) -> None:
    count = size(model, "num_hidden_layers")
    for key in _BY_LAYER:
        entries = model.get(key)
        if count and isinstance(entries, list) and entries and len(entries) != count:
            raise UserError(
                f"`model.{key}` says what each layer is, and has another number of entries than there are layers.",
                where=where,
                found=f"{len(entries)} entries, and num_hidden_layers {count}",
                allowed=f"{count} entries; or as many layers as entries",
                write=f"model: {{num_hidden_layers: {len(entries)}, ...}}",
            )


# The padding's token where a configuration leaves it out, of classes whose own one may lie beyond a small vocabulary.
_PADDING = {"phi3": 32000, "smollm3": 128004}


def _check_padding(model: Mapping[str, Any], where: object) -> None:
    kind, words = model["model_type"], size(model, "vocab_size")
    padding = model.get("pad_token_id", _PADDING[kind]) if kind in _PADDING else None
    if words and padding is not None and padding >= words:
        raise UserError(
            f"`model.pad_token_id` lies beyond `model.vocab_size` ({words}), so transformers can't build the model.",
            where=where,
            found=f"{padding}"
            + ("" if "pad_token_id" in model else f", which {kind} has where the file has none"),
            allowed=f"null, or 0 to {words - 1}",
            write="model: {pad_token_id: null, ...}",
        )


@cache
def _misspelt(key: str) -> str | None:
    """The size that a key looks like; None where it is a known key, or like nothing."""
    if key in SIZES or key in ALIKE:
        return None
    return next(iter(difflib.get_close_matches(key, SIZES, n=1, cutoff=0.88)), None)


def _refuse_unsupported(model: Mapping[str, Any], where: object) -> None:
    """Configurations whose answer would be about another model than the one that is asked for."""
    quantized = model.get("quantization_config")
    if quantized:
        method = (
            quantized.get("quant_method", "an unnamed method")
            if isinstance(quantized, Mapping)
            else quantized
        )
        raise UserError(
            f"The model's weights are quantized already ({method}), and only quantizing by bitsandbytes to 4 bits, of"
            " plain weights, is known.",
            where=where,
            found=f"model.quantization_config of {method}",
            allowed="the configuration of the plain model, a copy of config.json without its quantization_config:"
            " `method: qlora` quantizes it, the other methods train it in 16 or 32 bits",
            write="model: plain.json    # made by: jq 'del(.quantization_config)' config.json > plain.json",
        )
    for part in ("vision_config", "audio_config"):
        if model.get(part):
            raise UserError(
                f"The model is more than a language model: its configuration has a {part}.",
                where=where,
                found=f"model_type {model['model_type']} with {part}",
                allowed="a model whose configuration has a text_config beside it, whose language model is then taken",
                change={"model": "qwen2.5-coder-7b"},
            )


@cache
def _sizes() -> dict[str, Any]:
    usual = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "head_dim": 128}
    return {
        "properties": {
            key: {
                # Gemma 3n lists a size for each layer.
                "type": ["integer", "null", *(["array"] if name == "intermediate_size" else [])],
                "minimum": 1,
                "maximum": MOST_LAYERS if name == "num_hidden_layers" else MOST,
                "examples": [usual.get(name, 28)],
            }
            for name in SIZES
            for key in (name, *ALIASES.get(name, ()))
        }
    }
