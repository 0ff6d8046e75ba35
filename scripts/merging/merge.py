"""Merge a LoRA adapter into its unquantized base, one block of rows at a time.

PEFT's merge holds the whole base in memory. This one streams: each shard of the base is read, changed where
the adapter changes it (``W + scale * B @ A`` in float32, rounded once to the target dtype), and written to a
shard of the same name and layout. Memory is a few blocks, whatever the model's size. The result appears under
its name only when all of it is on the disk.

By hand::

    python -m scripts.merging.merge --base DIR --adapter DIR --output DIR [--dtype bfloat16]
"""

import argparse
import copy
import errno
import fnmatch
import hashlib
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import (
    atomic_folder,
    copy_own,
    read_folder,
    read_json,
    read_report,
    sha256_file,
    standing_for,
    write_json,
    write_report,
)
from dryfit.common.terminal import command, log, progress
from dryfit.common.text import gib
from dryfit.common.versions import versions
from scripts.common.checkpoint import (
    FLOAT_DTYPES,
    INDEX,
    SAFETENSORS_NAMES,
    Shard,
    lay_out_shard,
    open_checkpoint,
    parse_header,
    read_into,
    require_finite,
    torch_dtype,
)
from scripts.common.job import job, keep_host_memory
from scripts.merging.adapter import CONFIG, WEIGHTS, MergePlan, Update, open_adapter, plan_merge

MANIFEST = "manifest.json"
# Reports in which the workflow's steps recorded digests of what a merge reads: training's lies beside the adapter's
# folder; describe_model's and fetch_weights' lie in the base's.
TRAINING, DESCRIPTION, FETCHED = "training.json", "description.json", "weights.json"
DTYPES = ("float32", "bfloat16", "float16")
# Elements of a block. Its float32 product, the base's rows and the result then stay in a core's cache, and a
# layer of a small model is one block, whose product is computed exactly as PEFT computes it.
BLOCK_ELEMENTS = 2**20
# Shards from STREAMED_BYTES on pass through the page cache instead of filling it: every WINDOW_BYTES the kernel is
# told which pages will not be used again. Finding new pages for all of them costs it several times the copying
# itself; the files of a small model may stay for whoever reads them next.
STREAMED_BYTES = 2**30
WINDOW_BYTES = 32 * 2**20
READ_AHEAD_BYTES = 64 * 2**20
# Room beside the shards for tokenizer files and the file system's own needs.
DISK_MARGIN_BYTES = 64 * 2**20
# The parts of a model folder beside weights and config.json, as transformers names them, and what a licence
# obliges one to pass on. The base's README and its own manifests describe the base and stay there.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
    "license*",
    "notice*",
)


def lay_out(plan: MergePlan, output: Path, dtype: str | None) -> list[Shard]:
    """The shards of the merged folder: the base's own layout, plus an output layer that comes untied.

    ``dtype``: torch's name of the dtype for all floating tensors; None keeps each tensor's own.
    """
    code = SAFETENSORS_NAMES[dtype] if dtype else None
    shards = []
    for shard in plan.base.shards:
        names = [tensor.name for tensor in shard.tensors]
        if (
            plan.untied
            and plan.untied not in plan.base.tensors
            and plan.source(plan.untied).path == shard.path
        ):
            names.append(plan.untied)
        entries = []
        for name in names:
            source = plan.source(name)
            entries.append(
                (
                    name,
                    code if code and source.dtype in FLOAT_DTYPES else source.dtype,
                    source.shape,
                )
            )
        path = output / shard.path.name
        if entries == [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors]:
            shards.append(parse_header(path, shard.header))  # the same, byte for byte
        else:
            shards.append(lay_out_shard(path, entries, shard.metadata))
    return shards


def merge_block(base: Any, update: Update, factors: dict[str, Any], rows: slice, dtype: Any) -> Any:
    """New values of some rows of one tensor.

    Parameters
    ----------
    base
        The base's rows, shape (rows, ...), in the base's dtype.
    update
        What the adapter does to the tensor.
    factors
        The update's tensors from the adapter by use, float32, whole.
    dtype
        torch dtype of the result.

    Returns
    -------
    torch.Tensor
        Contiguous, shape and order of ``base``.

    Notes
    -----
    Operands and their order are PEFT's (``lora.Linear.get_delta_weight``, ``DoraLinearVariant.merge_unsafe``),
    so that in float32 the last bit agrees as well; a low-precision base is widened, added to and rounded once.
    """
    import torch

    original = base.dtype
    if "replace" in factors:
        # PEFT loads a replacement into a parameter of the base's dtype before it adds anything to it.
        base = factors["replace"][rows].to(original)
    if "bias" in factors:
        base = (base + factors["bias"][rows] * update.scale).to(original)
    if "a" in factors:
        a, b = factors["a"], factors["b"]
        delta = (
            (b @ a[:, rows]).T * update.scale
            if update.transposed
            else (b[rows] @ a).mul_(update.scale)
        )
        if "magnitude" in factors and update.transposed:
            norm = torch.linalg.norm(
                base.T + delta.T, dim=1
            )  # before the sum in place: as PEFT's, also in layout
        # In float32, whatever the base's dtype, unless that is wider.
        base = base + delta if original == torch.float64 else delta.add_(base)
        if "magnitude" in factors and update.transposed:
            base = (factors["magnitude"] / norm).view(1, -1) * base
        elif "magnitude" in factors:
            base = (factors["magnitude"][rows] / torch.linalg.norm(base, dim=1)).view(-1, 1) * base
    return base.to(dtype).contiguous()


def _rows_per_block(shape: tuple[int, ...], update: Update) -> int:
    """Rows of a block: about :data:`BLOCK_ELEMENTS`, or all where the update needs whole columns."""
    if update.magnitude is not None and update.transposed:
        return shape[0]  # the norm of a column needs every row
    return max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))


def merge_shard(plan: MergePlan, source: Shard, target: Shard, folder: Path) -> tuple[str, str]:
    """Write one shard into ``folder``; returns the SHA-256 of the base's file as it was read and of the one written."""
    import torch

    was, now = hashlib.sha256(source.header), hashlib.sha256()
    path = folder / target.path.name
    with open(source.path, "rb", buffering=0) as reader, open(path, "wb", buffering=0) as writer:

        def write(data: Any) -> None:
            now.update(data)
            view = memoryview(data).cast("B")
            while view:
                view = view[writer.write(view) :]

        write(target.header)
        streamed = source.bytes >= STREAMED_BYTES and hasattr(os, "posix_fadvise")  # not on macOS
        given_back = 0
        for tensor in target.tensors:
            name, base, update = tensor.name, plan.source(tensor.name), plan.update(tensor.name)
            in_order = (
                name in plan.base.tensors
            )  # an output layer that was tied reads the embedding a second time
            if streamed:
                os.posix_fadvise(
                    reader.fileno(), base.end, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED
                )
            factors = {use: plan.adapter.read(key) for use, key in update.keys.items()}
            count = base.shape[0] if base.shape else 1
            row_bytes = base.bytes // max(1, count)
            step = min(count, _rows_per_block(base.shape, update))
            buffer = memoryview(bytearray(step * row_bytes))
            for first in range(0, count if base.bytes else 0, max(1, step)):
                rows = slice(first, min(first + step, count))
                start, block = (
                    base.start + first * row_bytes,
                    buffer[: (rows.stop - first) * row_bytes],
                )
                read_into(reader.fileno(), block, start, source.path)
                if in_order:
                    was.update(block)
                where = f"{source.path}, tensor {name}"
                values = (
                    torch.frombuffer(block, dtype=torch_dtype(base.dtype))
                    if base.dtype in FLOAT_DTYPES
                    else None
                )
                if not factors and tensor.dtype == base.dtype:
                    if values is not None:
                        require_finite(values, where)
                    write(block)
                else:
                    values = values.view(-1, *base.shape[1:]) if base.shape else values.view(())
                    merged = merge_block(values, update, factors, rows, torch_dtype(tensor.dtype))
                    require_finite(merged, where, changed_from=base.dtype)
                    write(merged.view(-1).view(torch.uint8).numpy())
                if streamed and start >= given_back + WINDOW_BYTES:
                    # The first call for a page starts writing it, a later one gives it back.
                    given_back = start
                    for handle in (reader, writer):
                        os.posix_fadvise(handle.fileno(), 0, given_back, os.POSIX_FADV_DONTNEED)
        os.fsync(writer.fileno())
    return was.hexdigest(), now.hexdigest()


def _merge_shards(
    plan: MergePlan, shards: list[Shard], folder: Path, threads: int
) -> dict[str, tuple[str, str]]:
    """Write the shards, several at a time; the digests of what was read and of what was written, by file."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the shards run side by side, and most of the work is digests and copies
    try:
        with ThreadPoolExecutor(max(1, min(threads, len(shards)))) as pool:
            work = pool.map(partial(merge_shard, plan, folder=folder), plan.base.shards, shards)
            digests = list(progress(work, "merging", len(shards), "shard"))
    finally:
        torch.set_num_threads(before)
    return {shard.path.name: each for shard, each in zip(shards, digests, strict=True)}


def _check_place(plan: MergePlan, output: Path, needed: int) -> None:
    """The output is new or empty, none of the inputs, and on a disk with ``needed`` bytes of room."""
    if output.exists() and not output.is_dir():
        raise UserError("The output is a file, not a folder.", where=output)
    if output.resolve() in (plan.base.folder.resolve(), plan.adapter.folder.resolve()):
        raise UserError("The output folder is one of the inputs.", where=output)
    if output.is_dir() and (entries := len(list(output.iterdir()))):
        problem = "The output folder is not empty."
        raise UserError(
            problem, where=output, found=f"{entries} entries", allowed="a new or an empty folder"
        )
    disk = next(folder for folder in output.resolve().parents if folder.exists())
    free, needed = shutil.disk_usage(disk).free, needed + DISK_MARGIN_BYTES
    if free < needed:
        raise UserError(
            "The disk is too small for the merged model.",
            where=disk,
            found=f"{gib(free)} free",
            allowed=gib(needed),
        )


def merge(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Merge an adapter folder into a base folder and write a complete model folder.

    Parameters
    ----------
    base
        Unquantized model folder: config.json and safetensors.
    adapter
        adapter_config.json and adapter_model.safetensors.
    output
        New or empty folder.
    dtype
        float32, bfloat16 or float16 for all floating weights; None keeps the base's.
    threads
        Cores to use; None: as many as torch would.
    replace
        Remove what lies under ``output`` first. For a workflow that owns the folder.

    Returns
    -------
    dict
        The manifest, as written to ``manifest.json``.

    Raises
    ------
    UserError
        Anything wrong with the inputs or the place; nothing is left under ``output`` then.
    """
    import torch

    output = Path(output)
    if dtype not in (None, *DTYPES):
        raise UserError(
            "Unknown dtype for the merged model.", found=dtype, allowed=", ".join(DTYPES)
        )
    unchecked = check_small_inputs(Path(base), Path(adapter))
    plan = plan_merge(open_checkpoint(base), open_adapter(adapter))
    shards = lay_out(plan, output, dtype)
    if replace and output.is_dir():
        shutil.rmtree(output)
    _check_place(plan, output, sum(shard.bytes for shard in shards))
    try:
        with atomic_folder(output) as beside:
            digests = _merge_shards(plan, shards, beside, threads or torch.get_num_threads())
            _check_weights(plan.base.folder, {name: read for name, (read, _) in digests.items()})
            others = _write_companions(plan, shards, beside, dtype)
            manifest = {**_manifest(plan, shards, dtype, digests), "unchecked": unchecked}
            write_report(beside / MANIFEST, manifest, *others)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        again = "free some space and run the same command again"
        raise UserError(
            "The disk filled up during the merge.", where=output.parent, allowed=again
        ) from None
    return read_json(output / MANIFEST)


def check_small_inputs(base: Path, adapter: Path) -> list[str]:
    """The adapter and the base's configuration and tokenizer must be what the workflow's steps wrote.

    Returns
    -------
    list
        What could not be checked, as outside the workflow, for want of recorded digests.

    Raises
    ------
    UserError
        Naming the file to delete.
    """
    unchecked = []
    if _is_report(adapter.parent / TRAINING):
        read_report(adapter.parent / TRAINING, adapter / CONFIG, adapter / WEIGHTS)
    else:
        unchecked.append("adapter")
    if _is_report(base / DESCRIPTION):
        read_folder(base / DESCRIPTION)
    else:
        unchecked.append("base's configuration and tokenizer")
    if _is_report(base / FETCHED):
        read_report(base / FETCHED)  # what it says of the weights is checked where they are read
    else:
        unchecked.append("base's weights")
    if unchecked:
        log.info(
            "not compared with digests, since none are recorded beside them: the %s",
            ", the ".join(unchecked),
        )
    return unchecked


def _is_report(report: Path) -> bool:
    """Whether a report of the workflow lies there, and not somebody else's file of that name."""
    return report.is_file() and "sha256" in read_json(report)


def _check_weights(base: Path, read: dict[str, str]) -> None:
    """What was read of the base's shards is what ``fetch_weights`` wrote, where it did."""
    if not _is_report(base / FETCHED):
        return
    recorded = read_report(base / FETCHED)["sha256"]
    for name, digest in read.items():
        if recorded.get(name) != digest:
            read_report(
                base / FETCHED, base / name, remove=[standing_for(base / FETCHED)]
            )  # says what to delete
            raise UserError("The base's weights changed while they were read.", where=base / name)


def _write_companions(
    plan: MergePlan, shards: list[Shard], folder: Path, dtype: str | None
) -> list[Path]:
    """Configuration and index as the merged weights need them, and the base's tokenizer, licence and the like."""
    base = plan.base
    for path in sorted(base.folder.iterdir()):
        if path.is_file() and any(
            fnmatch.fnmatchcase(path.name, pattern) for pattern in COMPANIONS
        ):
            copy_own(path, folder)
    config, index = copy.deepcopy(base.config), copy.deepcopy(base.index)
    for part in [config, *filter(None, [config.get("text_config")])]:
        if dtype is not None:
            part |= {key: dtype for key in ("dtype", "torch_dtype") if key in part}
            if part is config and "torch_dtype" not in part:
                part["dtype"] = dtype
        if plan.untied is not None and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if index is not None:
        index["weight_map"] = {
            tensor.name: shard.path.name for shard in shards for tensor in shard.tensors
        }
        if "total_size" in (index.get("metadata") or {}):
            index["metadata"]["total_size"] = sum(
                shard.bytes - len(shard.header) for shard in shards
            )
    for name, ours, theirs in (("config.json", config, base.config), (INDEX, index, base.index)):
        if ours == theirs and ours is not None:
            copy_own(base.folder / name, folder)  # byte for byte
        elif ours is not None:
            write_json(folder / name, ours)
    return sorted(path for path in folder.iterdir() if path.suffix != ".safetensors")


def _manifest(
    plan: MergePlan, shards: list[Shard], dtype: str | None, digests: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """What was merged into what; ``sha256`` names every file of the folder."""
    adapter, base = plan.adapter, plan.base
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    sizes = {
        code: sum(x.bytes for x in tensors if x.dtype == code) for code in sorted(FLOAT_DTYPES)
    }
    return {
        "adapter": {
            "files": {name: sha256_file(adapter.folder / name) for name in (CONFIG, WEIGHTS)},
            "rank": adapter.config["r"],
            "alpha": adapter.config["lora_alpha"],
            "dora": bool(adapter.config.get("use_dora")),
            "rslora": bool(adapter.config.get("use_rslora")),
            "target_modules": adapter.config.get("target_modules"),
        },
        "base": {
            "files": {
                **{name: read for name, (read, _) in digests.items()},
                "config.json": sha256_file(base.folder / "config.json"),
            }
        },
        "bytes": sum(shard.bytes for shard in shards),
        "dtype": dtype or FLOAT_DTYPES[max(sizes, key=lambda code: sizes[code])],
        "sha256": {name: written for name, (_, written) in digests.items()},
        "tensors": {
            "changed": sum(bool(update.keys) for update in plan.updates.values()),
            "total": len(tensors),
        },
        "untied": plan.untied,
        "versions": versions(("peft", "safetensors", "torch", "transformers")),
        "weights": sorted(digests),
    }


def main() -> int:
    about = "Merge a LoRA adapter into its unquantized base with little memory."
    parser = argparse.ArgumentParser(prog="python -m scripts.merging.merge", description=about)
    parser.add_argument(
        "--base", required=True, metavar="DIR", help="model folder with config.json and safetensors"
    )
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="folder that PEFT saved the adapter to"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the merged weights; default: the base's"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="cores to use; default: all")
    arguments = parser.parse_args()
    keep_host_memory()
    manifest = merge(**vars(arguments))
    print(
        f"{arguments.output}: {gib(manifest['bytes'])} {manifest['dtype']}, "
        f"{manifest['tensors']['changed']} of {manifest['tensors']['total']} tensors changed"
    )
    return 0


if __name__ == "__main__":
    if "snakemake" in globals():
        with job(snakemake):
            keep_host_memory()
            manifest = merge(
                snakemake.input.base,
                Path(snakemake.input.adapter).parent,
                snakemake.output.merged,
                threads=snakemake.threads,
                replace=True,
                **snakemake.params.merge,
            )
            del manifest["sha256"][MANIFEST]
            write_report(snakemake.output.manifest, manifest)
    else:
        command(main)
