"""Rule ``describe_model``: everything of the base model but its weights.

Configuration, tokenizer with its chat template, generation settings and licence: a few MB at most, so that
the memory is known, and the gate has spoken, before a weight is downloaded. What could not be trained in the end, a
quantized base or one whose code would have to be run, is refused here.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import copy_own, digest, read_json, write_report
from dryfit.common.hub_errors import Failure, meaning
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.common.tokenizer import read_tokenizer

# What a model repository may hold beside its weights; the rest (other formats' weights, images) stays away.
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*"]
# Of other origin, or about the weights.
OTHERS = ("description.json", "weights.json", "model.safetensors.index.json", "OUTDATED.txt")


def small_files(folder: Path) -> list[Path]:
    """What lies beside the weights in a model's folder, sorted by name."""
    files = {
        file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.name not in OTHERS
    }
    return sorted(files)


@contextmanager
def read_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, and make the table of its tensors' names once instead of per module.

    SmolLM2's vocabulary alone has 100,000 fields, and transformers reads them for each of configuration and tokenizer.
    """
    import gguf

    from dryfit.engine.patching import (
        patched,
    )  # the engine loads torch, and the rules import this module

    with patched(
        [(gguf, name, cache(getattr(gguf, name))) for name in ("GGUFReader", "get_tensor_name_map")]
    ):
        yield


def from_gguf(gguf: str, license: str, folder: Path, dtype: str) -> dict:
    """Save configuration and tokenizer that the GGUF file carries; returns where they came from."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    where: dict[str, Any] = {
        "gguf_file": Path(gguf).name,
        "pretrained_model_name_or_path": str(Path(gguf).parent),
    }
    where["trust_remote_code"] = False
    with read_once():
        config = AutoConfig.from_pretrained(**where)
        config.dtype = dtype
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    if Path(license).stat().st_size:
        shutil.copyfile(license, folder / "LICENSE")
    return {}


def unreachable(error: Exception, repository: str, revision: str) -> UserError:
    """Why a model could not be had from the Hub, and how to go on without it."""
    failure = Failure.of(error)
    copy = 'a copy of the folder, fetched where there is a network (docs/first-hour.md, "No model hub")'
    problem, allowed = meaning(failure, "model", repository, instead=copy)
    folder = f"/models/{repository.rpartition('/')[2]}"
    return UserError(
        problem,
        where="model.source in the configuration",
        found=f"{repository} at {revision}: {type(error).__name__}: {failure.message}",
        allowed=allowed,
        write=f"model:\n  source: {{type: folder, path: {folder}}}"
        f"    # made by: hf download {repository} --revision {revision} --local-dir {folder}",
    )


def from_hub(repository: str, revision: str, folder: Path) -> dict:
    """Download the small files of a model repository; returns the commit that the revision resolved to."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = HfApi().model_info(repository, revision=revision).sha
        snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=SMALL_FILES)
    except (
        Exception
    ) as error:  # of the Hub's library, its transport or the disk, each of a kind of its own
        raise unreachable(error, repository, revision) from None
    return {"commit": commit}


def from_folder(path: str, folder: Path) -> dict:
    """Copy the small files of a model folder on this machine."""
    source = Path(path)
    if not (source / "config.json").is_file():
        raise UserError(
            "There is no config.json in the model's folder.",
            where="model.source.path",
            found=path,
            allowed="a folder with config.json, tokenizer.json and *.safetensors, as save_pretrained writes them",
        )
    for file in small_files(source):
        copy_own(file, folder)
    return {}


def refuse_what_cannot_be_trained(folder: Path, config: Any) -> None:
    """A base that is quantized already, or whose architecture is code in its repository or not known here.

    UserError: Saying what to use instead.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not kind:
        raise UserError(
            "The model's configuration does not say which architecture it is of.",
            where=f"{folder / 'config.json'}: model_type",
            allowed="a config.json as save_pretrained writes it",
        )
    if quantization := config.get("quantization_config") or config.get("compression_config"):
        named = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        method = str(named or "bitsandbytes").lower()
        raise UserError(
            f"The base model is quantized already ({method}). An adapter is trained on, and merged into, unquantized"
            " weights; method qlora quantizes them while they load.",
            where=f"{folder / 'config.json'}: quantization_config",
            found=quantization,
            allowed="the model that this one was quantized from, with 16- or 32-bit weights",
            write="model:\n  source: {type: hub, repository: OWNER/THE-UNQUANTIZED-MODEL}",
        )
    for part in ("vision_config", "audio_config"):
        if config.get(part):
            raise UserError(
                f"The model is more than a language model (it has a {part}), and only language models are trained here."
                " Its memory can be asked for: `python -m dryfit.ask.predict` takes its text_config.",
                where=f"{folder / 'config.json'}",
                found=kind,
                allowed="a model of text alone",
                write="model:\n  source: {type: hub, repository: OWNER/THE-TEXT-MODEL}",
            )
    from transformers import CONFIG_MAPPING, __version__

    if kind in CONFIG_MAPPING:
        return
    if not config.get("auto_map"):
        raise UserError(
            f"transformers {__version__} knows no such architecture.",
            where=f"{folder / 'config.json'}: model_type",
            found=kind,
            allowed="an architecture that it has: qwen2, llama, mistral, gemma2, phi3, gpt2, ...",
        )
    raise UserError(
        "The model's architecture is Python code in its own repository, and nobody's code is run here.",
        where=f"{folder / 'config.json'}: auto_map",
        found=config["auto_map"],
        allowed="an architecture that transformers has itself: qwen2, llama, mistral, gemma2, phi3, gpt2, ...",
    )


def main(source: dict, folder: Path, gguf: str | None, license: str | None) -> None:
    """Fill ``folder`` and write its ``description.json``: what the model is and where it came from.

    Its title and its licence are for people: documents take them from the configuration, so that another text makes
    nothing again but these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in small_files(folder):  # of another source, described here before
        file.unlink()
    if source["type"] == "wheel":
        origin = from_gguf(gguf, license, folder, source["dtype"])
    elif source["type"] == "hub":
        origin = from_hub(source["repository"], source["revision"], folder)
    else:
        origin = from_folder(source["path"], folder)

    config = read_json(folder / "config.json")
    refuse_what_cannot_be_trained(folder, config)
    tokenizer = read_tokenizer(folder)
    if not tokenizer.chat_template:
        raise UserError(
            "The model has no chat template, so a request cannot be put to it.",
            where=folder / "tokenizer_config.json",
            allowed="an instruction-tuned model, or a chat_template.jinja file beside the tokenizer",
        )
    tokenizer.save_pretrained(folder)  # always a tokenizer.json, whatever the source had
    log.info("%s: vocabulary %d", config["model_type"], len(tokenizer))
    write_report(
        folder / "description.json",
        {
            "architecture": config["model_type"],
            "chat_template_digest": digest(tokenizer.chat_template),
            "dtype": source["dtype"],
            "source": {**source, **origin},
            "vocabulary_size": len(tokenizer),
        },
        *small_files(folder),
    )


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.params.source,
            Path(snakemake.output.config).parent,
            snakemake.input.gguf or None,
            snakemake.input.license or None,
        )
