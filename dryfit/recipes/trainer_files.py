"""Files of programs that train images, as options: which program's a file is, and what it says, key by key.

A script that starts a program; the TOML of sd-scripts and of diffusion-pipe; the YAML of ai-toolkit; the JSON of
SimpleTuner and of OneTrainer. Nested keys come out as ``section.key``. What a tool says by several keys is one option
with sd-scripts' name (``resolution``, ``cache_latents``, ``cache_text_encoder_outputs``,
``pretrained_model_name_or_path``) or the recipe's (``rank``, ``frames``, ``samples``, ``texts_trained``).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, read_toml, read_yaml, yaml_value
from dryfit.common.text import yaml_text
from dryfit.data import data_path
from dryfit.readers.shell import beside as file_beside
from dryfit.readers.shell import commands, is_known, options

SUFFIXES = (".sh", ".toml", ".txt", ".yaml", ".yml", ".json", ".env")
Options = dict[str, Any]


class Written(NamedTuple):
    """What a file says: a tool and one of its programs, by the table's keys, and the options."""

    tool: str
    program: str
    options: Options


@cache
def tools() -> dict[str, dict[str, Any]]:
    """The table of tools and their options."""
    return read_yaml(data_path("recipes", "trainers.yaml"))


def written(path: Path) -> Written | None:
    """What a file says; None: it is no file of a program that the table has.

    UserError: if the file, or one that it names, can't be read, or the table has no row for its kind of model.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        return None
    if path.suffix in (".sh", ".txt"):
        return _script(path)
    content = _environment(path) if path.suffix == ".env" else _content(path)
    shapes = _SHAPES[path.suffix.replace("yml", "yaml")] if isinstance(content, dict) else ()
    try:
        return next((found for shape in shapes if (found := shape(content, path))), None)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "A value of the file is of another type than its program takes.",
            where=path,
            found=str(error),
            allowed="numbers as numbers, lists as lists",
        ) from None


def area(resolution: Any, path: Path) -> int:
    """The pixels of ``1024``, ``"1024,768"`` or ``[1024, 768]``.

    UserError: if it is no size.
    """
    parts = resolution if isinstance(resolution, list) else re.split(r"[,x]", str(resolution))
    try:
        sides = [int(part) for part in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or min(sides, default=0) < 1:
        raise UserError(
            "The size of the images can't be read.",
            where=path,
            found=f"resolution={yaml_text(resolution)}",
            allowed="a number of pixels, or width and height",
            write="resolution=1024",
            field="resolution",
        )
    return sides[0] * sides[-1]


# --- what every shape of a file needs ---------------------------------------------------------------------------------


def _content(path: Path) -> Any:
    """A file's content; None: it is broken, and whoever else reads such files says so."""
    if path.suffix == ".toml":
        return read_toml(path)
    try:
        return read_json(path) if path.suffix == ".json" else read_yaml(path)
    except (ValueError, UserError):
        return None


def _flat(content: Mapping[str, Any]) -> Options:
    """Nested mappings as ``section.key``; lists stay values."""
    flat: Options = {}
    for key, value in content.items():
        inner = _flat(value) if isinstance(value, dict) else None
        flat |= (
            {key: value}
            if inner is None
            else {f"{key}.{name}": each for name, each in inner.items()}
        )
    return flat


def _mappings(listed: Any) -> list[Mapping[str, Any]]:
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []


def _largest(sizes: Iterable[Any], path: Path, usual: Any) -> Any:
    return max(sizes, key=lambda each: area(each, path), default=usual)


def _numbers(listed: Any) -> list[int]:
    """The whole numbers of a value, a list or a text with commas."""
    each = listed if isinstance(listed, list) else str(listed).split(",")
    return [int(one) for one in each if str(one).strip().isdigit()]


def _beside(named: Any, path: Path, what: str) -> Path:
    """A file that another one names, in its folder or above.

    UserError: if it is not there.
    """
    text = str(named)
    found = (
        file_beside(path, text) or file_beside(path, Path(text).name) if is_known(text) else None
    )
    if found is None:
        raise UserError(
            f"{what} stands in a file that is not there.",
            where=path,
            found=text,
            allowed="the file beside this one",
        )
    return found


def _row(tool: str, named: Any, path: Path, key: str) -> str:
    """The table's key of a kind of model.

    UserError: if there is none.
    """
    rows = tools()[tool]["programs"]
    if named not in rows:
        raise UserError(
            f"No recipe trains the architecture {named} of {tools()[tool]['name']}.",
            where=path,
            found=f"{key}: {named}",
            field=key,
            allowed=", ".join(rows),
            write="dryfit run train.py",
        )
    return str(named)


# --- scripts, and sd-scripts' TOML ------------------------------------------------------------------------------------


def _script(path: Path) -> Written | None:
    for command in commands(path.read_text(encoding="utf-8", errors="replace")):
        for tool, table in tools().items():
            names = [(place, Path(word).name) for place, word in enumerate(command.words)]
            found = next(
                (
                    (place, name)
                    for place, name in names
                    if name in table["programs"] and "." in name
                ),
                None,
            )
            if found:
                place, program = found
                before, own = (
                    options(words, path)
                    for words in (command.words[:place], command.words[place + 1 :])
                )
                launch = {
                    key: before[key] for key in ("mixed_precision",) if key in before
                }  # accelerate's own
                if before.get("multi_gpu") or before.get("num_processes", 1) != 1:
                    launch["num_processes"] = before.get("num_processes", 2)
                return Written(tool, program, _of_its_own(tool, _kohya({**launch, **own}, path)))
    return None


def _kohya(own: Options, path: Path) -> Options:
    """Options with those of the files that they name."""
    named = own.pop("config_file", None)
    if named is not None:
        name = str(named) if Path(str(named)).suffix else f"{named}.toml"
        own = {**_of_all_sections(read_toml(_beside(name, path, "What is trained"))), **own}
    dataset = own.pop("dataset_config", None)
    if dataset is not None:
        found = _beside(dataset, path, "The size of the images")
        content = read_toml(found)
        datasets = [{**content.get("general", {}), **each} for each in content.get("datasets", [])]
        batches = [each["batch_size"] for each in datasets if "batch_size" in each]
        frames = [
            max(_numbers(each["target_frames"]))
            for each in datasets
            if _numbers(each.get("target_frames", ""))
        ]
        own |= {"train_batch_size": max(batches)} if batches else {}
        own |= {"frames": max(frames)} if frames else {}
        if sizes := [each["resolution"] for each in datasets if "resolution" in each]:
            own["resolution"] = _largest(sizes, found, None)
    return own


def _of_its_own(tool: str, own: Options) -> Options:
    """What options of a tool say together: sd-scripts trains the text encoders too, if it is not told otherwise."""
    if tool == "sd-scripts":
        before = (
            "network_train_unet_only",
            "cache_text_encoder_outputs",
            "cache_text_encoder_outputs_to_disk",
        )
        own["texts_trained"] = not any(own.get(key) for key in before)
    if names := tools()[tool].get("names"):
        own["pretrained_model_name_or_path"] = names.get(own.get("task"))
    return own


def _of_all_sections(content: Mapping[str, Any]) -> Options:
    flat: Options = {}
    for key, value in content.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _sd_scripts(content: Options, path: Path) -> Written | None:
    """A configuration is meant for the program that the network's module or the model's name says."""
    own = _of_all_sections(content)
    if not {"pretrained_model_name_or_path", "network_module"} & set(own):
        return None
    module, model = (
        str(own.get("network_module", "")),
        str(own.get("pretrained_model_name_or_path", "")).lower(),
    )
    parts = {"flux": "flux", "sd3": "sd3", "sdxl": "xl"}
    kinds = [kind for kind, part in parts.items() if part in module or part in model]
    if kinds or any(part in model for part in ("v1-5", "v1.5", "sd15")):
        return Written(
            "sd-scripts",
            f"{kinds[0]}_train_network.py" if kinds else "train_network.py",
            _of_its_own("sd-scripts", _kohya(own, path)),
        )
    raise UserError(
        "The file does not say which program of sd-scripts takes it.",
        where=path,
        found=f"pretrained_model_name_or_path: {own.get('pretrained_model_name_or_path')}",
        allowed="a script (.sh) whose line starts the program with `--config_file`",
        write=f"accelerate launch sdxl_train_network.py --config_file {path.name}",
    )


# --- ai-toolkit -------------------------------------------------------------------------------------------------------


def _ai_toolkit(content: Options, path: Path) -> Written | None:
    config = content.get("config") if content.get("job") == "extension" else None
    process = next(
        (one for one in _mappings((config or {}).get("process")) if "model" in one), None
    )
    if process is None:
        return None
    model = process["model"]
    older = {"is_flux": "flux", "is_v3": "sd3", "is_xl": "sdxl"}
    others = next(
        (key for key in model if key.startswith("is_") and key != "is_v_pred" and model[key]), "sd1"
    )
    plain = str(model.get("arch") or older.get(others, others)).partition(":")[0]
    # One level deep: what is deeper is one value.
    own = {key: value for key, value in process.items() if not isinstance(value, dict | list)}
    sections = [(name, part) for name, part in process.items() if isinstance(part, dict)]
    own |= {f"{name}.{key}": value for name, part in sections for key, value in part.items()}
    own |= {} if "network" in process else {"network.linear": 0}  # then all weights are trained
    datasets = _mappings(process.get("datasets"))
    own |= {f"datasets.{key}": value for one in datasets for key, value in one.items()}
    sides = [one.get("resolution", 512) for one in datasets] or [512]
    sides = [side for each in sides for side in (each if isinstance(each, list) else [each])]
    disk = ("cache_latents", "cache_latents_to_disk")
    texts = [own.get(key) for key in ("train.cache_text_embeddings", "train.unload_text_encoder")]
    own["pretrained_model_name_or_path"] = own.pop("model.name_or_path", None)
    own["resolution"] = _largest(sides, path, 512)
    own["cache_latents"] = bool(datasets) and all(
        any(one.get(key) for key in disk) for one in datasets
    )
    own["cache_text_encoder_outputs"] = any(texts) or own.get(
        "datasets.cache_text_embeddings", False
    )
    kind, _, recovery = str(
        own.get("model.qtype", "qfloat8") if own.get("model.quantize") else "none"
    ).partition("|")
    own |= {"model.qtype": kind} | (
        {"model.accuracy_recovery_adapter": recovery} if recovery else {}
    )
    beside = own.get("datasets.control_path")
    own |= {"references": len(beside) if isinstance(beside, list) else 1} if beside else {}
    stages = [
        (own.get("model.model_kwargs") or {}).get(f"train_{each}_noise", True)
        for each in ("high", "low")
    ]
    own["second_transformer"] = plain.startswith("wan22_14b") and (
        all(stages) or not own.get("model.low_vram")
    )
    own["ema"] = bool((own.pop("train.ema_config", None) or {}).get("use_ema"))
    if (own.get("sample.prompts") or own.get("sample.samples")) and not own.get(
        "train.disable_sampling"
    ):
        own["samples"] = max(own.get("sample.width", 512), own.get("sample.height", 512))
    if (
        own.get("model.quantize")
        and own.get("model.quantize_te") is False
        and not own["cache_text_encoder_outputs"]
    ):
        own["quantized_model_alone"] = True
    return Written("ai-toolkit", _row("ai-toolkit", plain, path, "arch"), own)


# --- diffusion-pipe ---------------------------------------------------------------------------------------------------


def _diffusion_pipe(content: Options, path: Path) -> Written | None:
    model = content.get("model")
    if not isinstance(model, dict) or "type" not in model or "dataset" not in content:
        return None
    own = _flat(content)
    found = _beside(own.pop("dataset"), path, "The size of the images")
    data = read_toml(found)
    folders = [{**data, **one} for one in _mappings(data.get("directory"))] or [data]
    own |= {
        f"dataset.{key}": value
        for one in folders
        for key, value in one.items()
        if key != "directory"
    }
    buckets = [
        each for one in folders for each in one.get("size_buckets", [])
    ]  # width, height, frames
    sizes = [
        [*(each if isinstance(each, list) else [each])]
        for one in folders
        for each in one.get("resolutions", [])
    ]
    own["resolution"] = _largest([*sizes, *(each[:2] for each in buckets)], found, 512)
    frames = [number for one in folders for number in _numbers(one.get("frame_buckets", [1]))]
    own["frames"] = max(*frames, *(each[2] for each in buckets if len(each) > 2), 1)
    # A batch for each size is [[512, 4], [1024, 1]]: the largest batch beside the largest size is the most.
    batches = [
        own.get(key, 1) for key in ("micro_batch_size_per_gpu", "image_micro_batch_size_per_gpu")
    ]
    own["micro_batch"] = max(
        max(pair[1] for pair in each) if isinstance(each, list) else each for each in batches
    )
    paths = [
        f"model.{name}"
        for name in ("diffusers_path", "ckpt_path", "checkpoint_path", "transformer_path")
    ]
    own["pretrained_model_name_or_path"] = next((own[name] for name in paths if name in own), None)
    own["rank"] = own.get("adapter.rank", 32) if "adapter" in content else 0
    own["checkpoints"] = "host" if own.get("activation_checkpointing") == "unsloth" else "card"
    own |= {
        "cache_latents": True,
        "cache_text_encoder_outputs": own.get("model.cache_text_embeddings", True),
    }
    # Of SDXL alone: its text encoders have adapters, unless their learning rate is 0.
    rates = [own.get(f"model.text_encoder_{number}_lr") for number in (1, 2)]
    if model["type"] == "sdxl" and any(rate != 0 for rate in rates):
        own |= {"texts_trained": True, "cache_text_encoder_outputs": False}
    return Written("diffusion-pipe", _row("diffusion-pipe", model["type"], path, "model.type"), own)


# --- OneTrainer -------------------------------------------------------------------------------------------------------


def _one_trainer(content: Options, path: Path) -> Written | None:
    if not {"training_method", "model_type"} <= content.keys():
        return None
    program = _row("OneTrainer", content["model_type"], path, "model_type")
    own, row = _flat(content), tools()["OneTrainer"]["programs"][program]
    part, encoders = ("unet" if row["recipe"] == "unet_lora" else "transformer"), row["encoders"]
    if not isinstance(content.get("optimizer", {}), dict):  # as it was written before
        own["optimizer.optimizer"] = own.pop("optimizer")
    concepts = [
        one["image"]
        for one in _mappings(content.get("concepts"))
        if isinstance(one.get("image"), dict)
    ]
    sizes = [
        one["resolution_override"] for one in concepts if one.get("enable_resolution_override")
    ]
    sizes = [each for one in (own.get("resolution", "512"), *sizes) for each in str(one).split(",")]
    own["resolution"] = _largest(sizes, path, 512)
    own["frames"] = max(_numbers(own.get("frames", 25)), default=1)
    own["rank"] = 0 if content["training_method"] == "FINE_TUNE" else own.get("lora_rank", 16)
    own["weight_dtype"] = own["base_weight_dtype"] = own.get(
        f"{part}.weight_dtype", own.get("weight_dtype", "FLOAT_32")
    )
    own["pretrained_model_name_or_path"] = own.pop("base_model_name", None)
    everywhere = not own.get("layer_filter") and own.get("layer_filter_preset", "full") == "full"
    own["convolutions"] = part == "unet" and own["rank"] > 0 and everywhere
    before = own.get("gradient_checkpointing", "ON")  # of the whole, as it was written before
    own["gradient_checkpointing"] = own.get(
        f"{part}.gradient_checkpointing", before not in ("OFF", False)
    )
    fraction = own.get("layer_offload_fraction", 0.0) if before == "CPU_OFFLOADED" else 0.0
    own["offload_fraction"] = float(own.get(f"{part}.offload_fraction", fraction))
    own["activation_offloading"] = own.get(
        f"{part}.activation_offloading", before == "CPU_OFFLOADED"
    )
    own["texts_trained"] = any(own.get(f"{each}.train", True) for each in encoders)
    own["cache_latents"] = own.get("latent_caching", True)
    own["cache_text_encoder_outputs"] = own["cache_latents"] and not own["texts_trained"]
    own["ema"] = own.get("ema", "OFF") == "GPU"
    file = own.get("sample_definition_file_name")
    there = file_beside(path, str(file)) if file else None
    drawn = _mappings(own.pop("samples", None) or (_content(there) if there else None))
    drawn = [one for one in drawn if one.get("enabled", True)]
    if own.get("sample_after_unit") != "NEVER" and (drawn or (file and not there)):
        own["samples"] = max(
            [max(one.get("width", 512), one.get("height", 512)) for one in drawn], default=1024
        )
    return Written("OneTrainer", program, own)


# --- SimpleTuner ------------------------------------------------------------------------------------------------------


def _environment(path: Path) -> Options:
    """The variables of SimpleTuner's config.env, by its options' names."""
    text, names = (
        path.read_text(encoding="utf-8", errors="replace"),
        tools()["SimpleTuner"]["variables"],
    )
    lines = re.findall(r"^(?:export\s+)?([A-Z_]+)\s*=\s*(.*)$", text, re.M)
    own = {names.get(name, name.lower()): value.strip("\"' ") for name, value in lines}
    return {**own, **options(own.pop("trainer_extra_args", "").split(), path)}


def _simple_tuner(content: Options, path: Path) -> Written | None:
    own = {key.removeprefix("--"): _plain(value, path) for key, value in content.items()}
    if "model_family" not in own:
        return None
    program = _row("SimpleTuner", own["model_family"], path, "model_family")
    if own.get("model_flavour") and not own.get("pretrained_model_name_or_path"):
        own["pretrained_model_name_or_path"] = _flavour(own, program, path)
    own |= _backends(own, path)
    own["rank"] = 0 if own.get("model_type") == "full" else own.get("lora_rank", 16)
    own["cache_latents"] = not (own.get("vae_cache_ondemand") or own.get("vae_cache_disable"))
    own["texts_trained"] = bool(own.get("train_text_encoder"))
    stay = ("texts_trained", "text_cache_ondemand", "text_cache_disable")
    own["cache_text_encoder_outputs"] = not any(own.get(key) for key in stay)
    # Its document says that the CPU quantizes by default, and its registry that the card does: the safer one.
    is_quantized = str(own.get("base_model_precision")).endswith(("quanto", "torchao"))
    own["quantized_on_card"] = is_quantized and own.get("quantize_via", "accelerator") != "cpu"
    own["low_vram"] = not own["quantized_on_card"]
    own["checkpoints"] = (
        "host" if own.get("gradient_checkpointing_backend") == "unsloth" else "card"
    )
    own["ema"] = bool(own.pop("use_ema", False)) and own.get("ema_device", "cpu") == "accelerator"
    if own.get("validation_prompt") and not own.get("validation_disable"):
        own["samples"] = max(
            _numbers(re.split(r"[x,]", str(own.get("validation_resolution", 256)))), default=256
        )
    return Written("SimpleTuner", program, own)


def _plain(value: Any, path: Path) -> Any:
    """What SimpleTuner writes in quotes as what it is."""
    is_text = isinstance(value, str) and re.fullmatch(r"true|false|[\d.]+", value)
    return yaml_value(value, path) if is_text else value


def _flavour(own: Options, program: str, path: Path) -> str:
    flavours = tools()["SimpleTuner"]["programs"][program].get("flavours", {})
    named = own["model_flavour"]
    if named not in flavours:
        raise UserError(
            f"The configuration of {own['model_family']} {named} is not at hand.",
            where=path,
            field="model_flavour",
            found=f"model_flavour: {named}",
            allowed=", ".join(flavours) or "the file without it",
            write="dryfit run train.py",
        )
    return str(flavours[named])


def _backends(own: Options, path: Path) -> Options:
    """What the data's own file says: the largest size and batch, and whether something stands beside each image."""
    named = own.get("data_backend_config")
    listed = _mappings(_content(_beside(named, path, "The size of the images"))) if named else [own]
    data = [
        {**own, **one} for one in listed if one.get("dataset_type", "image") in ("image", "video")
    ]
    data = [one for one in data if not one.get("disabled")] or [own]
    found: Options = {"resolution": max(_side_of(one, path) for one in data)}
    found["train_batch_size"] = max(one.get("train_batch_size", 4) for one in data)
    videos = [one.get("video") or {} for one in data if one.get("dataset_type") == "video"]
    found["frames"] = max([one.get("num_frames", 125) for one in videos], default=1)
    found["conditioning"] = any(
        one.get("conditioning_data") or one.get("conditioning") for one in data
    )
    square = [one.get("crop") and one.get("crop_aspect", "square") == "square" for one in data]
    shorter = [one.get("resolution_type") == "pixel" for one in data]
    return found | {
        "uncropped": any(side and not whole for side, whole in zip(shorter, square, strict=True))
    }


def _side_of(dataset: Mapping[str, Any], path: Path) -> int:
    """The side of a square of a dataset's pixels; ``area`` counts megapixels of 1024 x 1024."""
    resolution = dataset.get("resolution", 1024)
    if dataset.get("resolution_type") == "area" and isinstance(resolution, int | float):
        return isqrt(int(resolution * 1024 * 1024))
    return isqrt(area(resolution, path))


_SHAPES: dict[str, tuple[Callable[[Options, Path], Written | None], ...]] = {
    ".toml": (_diffusion_pipe, _sd_scripts),
    ".yaml": (_ai_toolkit,),
    ".json": (_one_trainer, _simple_tuner),
    ".env": (_simple_tuner,),
}
