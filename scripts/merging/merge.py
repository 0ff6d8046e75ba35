"""Merge a LoRA adapter into its unquantized base, one block of rows at a time.

PEFT's merge holds the whole base in memory. This one streams: each shard of the base is read, changed where
the adapter changes it (``W + scale * B @ A`` in float32, rounded once to the target dtype), and written to a
shard of the same name and layout. Memory is a few blocks, whatever the model's size.

The result appears under its name only when all of it is on the disk. A killed merge leaves a hidden folder
beside it, ``.NAME.partial``, whose journal lists the finished shards with their digests; the same command
again takes them over, after checking them, if the base, the adapter and the settings are still the same.

By hand::

    python -m scripts.merging.merge --base DIR --adapter DIR --output DIR [--dtype bfloat16]
"""

import errno
import fcntl
import fnmatch
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scripts.common.errors import UserError
from scripts.common.files import read_json, sha256_file, write_json
from scripts.common.job import command, job, log
from scripts.merging.adapter import CONFIG, WEIGHTS, Adapter, Plan, Update, open_adapter, plan_merge
from scripts.merging.checkpoint import (
    FLOAT_DTYPES,
    INDEX,
    ITEM_BYTES,
    SAFETENSORS_NAMES,
    Checkpoint,
    Shard,
    Tensor,
    encode_header,
    open_checkpoint,
    read_into,
    torch_dtype,
)

MANIFEST = "manifest.json"
JOURNAL = "journal.json"
FETCHED = "weights.json"  # digests that the rule fetch_weights wrote into the base's folder, where there are any
# Changes when the same inputs would give other bytes; part of what a journal is good for.
FORMAT = 1
# Elements of a block. Its float32 product, the base's rows and the result then stay in a core's cache, and a
# layer of a small model is one block, whose product is computed exactly as PEFT computes it.
BLOCK_ELEMENTS = 2**20
# How far ahead the kernel is asked to read, and how often it is told which pages will not be used again, in bytes.
READ_AHEAD = 64 * 2**20
WINDOW = 32 * 2**20
# Shards from this size on pass through the page cache instead of filling it. Finding new pages for all of them
# costs the kernel several times the copying itself; the files of a small model may stay for whoever reads them next.
STREAMED = 2**30
# Room beside the shards for tokenizer files, the journal and the file system's own needs, in bytes.
DISK_MARGIN = 64 * 2**20
VERSIONED = ("peft", "safetensors", "torch", "transformers")
# The parts of a model folder beside weights and config.json, as transformers names them, and what a licence
# obliges one to pass on. The base's README and its own manifests describe the base and stay there.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "preprocessor_config.json", "processor_config.json", "*.py",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "license*", "notice*",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A shard to be written: its header and, in order, each tensor's name, source and dtype."""

    name: str
    source: Shard
    header: bytes
    tensors: tuple[tuple[str, Tensor | None, str], ...]  # None: the tied tensor of another shard, written twice
    bytes: int
    raw_header: bool  # the base's own header, byte for byte


def lay_out(base: Checkpoint, plan: Plan, dtype: str | None) -> tuple[list[Target], dict[str, Any] | None]:
    """The shards of the merged folder and its index: the base's own layout, plus an output layer that comes untied.

    Parameters
    ----------
    dtype
        safetensors name of the dtype for all floating tensors; None keeps each tensor's own.
    """
    added_to = None
    if plan.untied is not None and plan.untied not in base.tensors:
        source = plan.updates[plan.untied].source
        assert source is not None
        added_to = base.tensors[source][0]
    targets = []
    for shard in base.shards:
        tensors: list[tuple[str, Tensor | None, str]] = [
            (tensor.name, tensor, dtype if dtype and tensor.dtype in FLOAT_DTYPES else tensor.dtype)
            for tensor in shard.tensors
        ]
        if shard is added_to:
            tied = base.tensors[plan.updates[plan.untied].source][1]  # type: ignore[index]
            tensors.append((plan.untied, None, dtype or tied.dtype))  # type: ignore[arg-type]
        if all(tensor is not None and tensor.dtype == code for _, tensor, code in tensors):
            targets.append(Target(shard.name, shard, b"", tuple(tensors), shard.bytes, True))
            continue
        entries = []
        for name, tensor, code in tensors:
            shape = (tensor or tied).shape
            size = math.prod(shape) * ITEM_BYTES[code] if code in FLOAT_DTYPES else tensor.bytes  # type: ignore[union-attr]
            entries.append((name, code, shape, size))
        header = encode_header(entries, shard.metadata)
        total = len(header) + sum(entry[3] for entry in entries)
        targets.append(Target(shard.name, shard, header, tuple(tensors), total, False))
    index = None
    if base.index is not None:
        index = json.loads(json.dumps(base.index))
        if added_to is not None:
            index["weight_map"][plan.untied] = added_to.name
        if "total_size" in (index.get("metadata") or {}):
            data = (target.bytes - (len(target.header) or target.source.data_start) for target in targets)
            index["metadata"]["total_size"] = sum(data)
    return targets, index


# --- one block of one tensor ---------------------------------------------------------------


class Workspace:
    """Memory that one worker uses again for every block; new pages for each would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[str, Any] = {}

    def read_buffer(self, size: int) -> memoryview:
        """Bytes to read a block into."""
        if len(self._memory.get("read", b"")) < size:
            self._memory["read"] = bytearray(size)
        return memoryview(self._memory["read"])[:size]

    def tensor(self, use: str, shape: Any, dtype: Any) -> Any:
        """An uninitialized tensor; the next call for the same use takes its memory back."""
        import torch

        count, held = math.prod(shape), self._memory.get(use)
        if held is None or held.dtype != dtype or held.numel() < count:
            held = self._memory[use] = torch.empty(count, dtype=dtype)
        return held[:count].view(shape)


def merge_block(
    base: Any, update: Update | None, factors: dict[str, Any], rows: slice, dtype: Any, space: Workspace
) -> Any:
    """New values of some rows of one tensor.

    Parameters
    ----------
    base
        The base's rows, shape (rows, ...), in the base's dtype.
    update
        What the adapter does to the tensor; None only converts.
    factors
        The update's tensors from the adapter, float32, whole.
    rows
        Which rows these are.
    dtype
        torch dtype of the result.
    space
        Where the result and what leads to it are kept.

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

    if update is None:
        return space.tensor("result", base.shape, dtype).copy_(base)
    original = base.dtype
    if update.replace is not None:
        # PEFT loads a replacement into a parameter of the base's dtype before it adds anything to it.
        base = factors["replace"][rows].to(original)
    if update.bias is not None:
        base = (base + factors["bias"][rows] * update.scale).to(original)
    if update.a is not None:
        a, b = factors["a"], factors["b"]
        if update.transposed:
            delta = (b @ a[:, rows]).T * update.scale
        else:
            delta = torch.mm(b[rows], a, out=space.tensor("delta", base.shape, torch.float32)).mul_(update.scale)
        norm = None
        if update.magnitude is not None and update.transposed:
            norm = torch.linalg.norm(base.T + delta.T, dim=1)  # before the sum in place: as PEFT's, also in layout
        if original == torch.float64:
            base = base + delta
        else:
            base = delta.add_(base)  # in float32, whatever the base's dtype
        if norm is not None:
            base = (factors["magnitude"] / norm).view(1, -1) * base
        elif update.magnitude is not None:
            norm = torch.linalg.norm(base, dim=1)
            base = (factors["magnitude"][rows] / norm).view(-1, 1) * base
    if base.dtype == dtype:
        return base.contiguous()
    return space.tensor("result", base.shape, dtype).copy_(base)


def _rows_per_block(shape: tuple[int, ...], update: Update | None) -> int:
    """Rows of a block: about :data:`BLOCK_ELEMENTS`, or all where the update needs whole columns."""
    if not shape:
        return 1
    if update is not None and update.magnitude is not None and update.transposed:
        return shape[0]  # the norm of a column needs every row
    return max(1, min(shape[0], BLOCK_ELEMENTS // max(1, math.prod(shape[1:]))))


class _Stopped(Exception):
    """Another worker failed or the person pressed Ctrl-C."""


class Meter:
    """Bytes done, shown as a bar on a terminal and as a line every few seconds in a log."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._started = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False)

    def add(self, count: int) -> None:
        """Count bytes; raises in a worker that should stop."""
        if self.stop.is_set():
            raise _Stopped
        with self._lock:
            self.done += count
            now = time.monotonic()
            if self._bar is not None:
                self._bar.update(count)
            elif now - self._last >= 5:
                self._last = now
                rate = self.done / (now - self._started)
                left = (self.total - self.done) / rate
                log.info(
                    "%s: %.2f of %.2f GB, %.0f MB/s, about %.0f s left",
                    self.label, self.done / 1e9, self.total / 1e9, rate / 1e6, left,
                )  # fmt: skip

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        seconds = max(1e-9, time.monotonic() - self._started)
        log.info("%s: %.2f GB in %.1f s (%.0f MB/s)", self.label, self.done / 1e9, seconds, self.done / seconds / 1e6)


class _Sink:
    """The shard being written, with the digest of what went into it."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle, self.digest, self.bytes = handle, hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        self.digest.update(data)
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        while view:
            view = view[self._handle.write(view) :]


def _read_factors(adapter: Adapter, update: Update) -> dict[str, Any]:
    keys = ("replace", "a", "b", "bias", "magnitude")
    return {name: adapter.read(key) for name in keys if (key := getattr(update, name)) is not None}


def _as_bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def merge_shard(target: Target, base: Checkpoint, adapter: Adapter, plan: Plan, path: Path, meter: Meter) -> dict:
    """Write one shard; returns its entry for the journal. The file is not synced yet."""
    import torch

    source, space, digest = target.source, Workspace(), hashlib.sha256()
    with open(source.path, "rb", buffering=0) as reader, open(path, "wb", buffering=0) as writer:
        descriptor, sink = reader.fileno(), _Sink(writer)
        header = bytearray(source.data_start)
        read_into(descriptor, memoryview(header), 0, source.path)
        digest.update(header)
        if digest.hexdigest() != source.header_sha256:
            raise UserError("The file changed while it was being read.", where=source.path)
        sink.write(header if target.raw_header else target.header)
        passing, passed = source.bytes >= STREAMED and hasattr(os, "posix_fadvise"), 0
        for name, tensor, code in target.tensors:
            update = plan.updates.get(name)
            if tensor is None:  # the output layer that was tied: from the embedding, in this same file
                assert update is not None and update.source is not None
                tensor, hashed = base.tensors[update.source][1], None
            else:
                hashed = digest
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(descriptor, tensor.end, READ_AHEAD, os.POSIX_FADV_WILLNEED)
            untouched = (update is None or update == Update(source=update.source)) and code == tensor.dtype
            factors = {} if update is None or untouched else _read_factors(adapter, update)
            count = tensor.shape[0] if tensor.shape else 1
            step = _rows_per_block(tensor.shape, update)
            row_bytes = tensor.bytes // count if count else 0
            for first in range(0, count, step):
                rows = slice(first, min(first + step, count))
                block = space.read_buffer((rows.stop - rows.start) * row_bytes)
                read_into(descriptor, block, tensor.start + first * row_bytes, source.path)
                if hashed is not None:
                    hashed.update(block)
                if untouched:
                    sink.write(block)
                elif block:
                    values = torch.frombuffer(block, dtype=torch_dtype(tensor.dtype))
                    values = values.reshape(-1, *tensor.shape[1:]) if tensor.shape else values.reshape(())
                    merged = merge_block(values, update, factors, rows, torch_dtype(code), space)
                    _require_finite(merged, name, tensor, source)
                    sink.write(_as_bytes(merged))
                meter.add(len(block))
                if passing and sink.bytes >= passed + WINDOW:
                    # The first call for a page starts writing it, a later one gives it back.
                    passed = sink.bytes
                    os.posix_fadvise(writer.fileno(), 0, passed, os.POSIX_FADV_DONTNEED)
                    os.posix_fadvise(descriptor, 0, tensor.start + first * row_bytes, os.POSIX_FADV_DONTNEED)
    if sink.bytes != target.bytes:
        raise RuntimeError(f"{path}: wrote {sink.bytes} bytes instead of {target.bytes}")
    return {"sha256": sink.digest.hexdigest(), "bytes": sink.bytes, "base_sha256": digest.hexdigest()}


def _require_finite(values: Any, name: str, tensor: Tensor, source: Shard) -> None:
    """Raise when a changed block has NaN or infinity: from the base, or beyond the range of the new dtype."""
    import torch

    # A sum is finite only if every term is; the exact test runs only when the sum overflows or is NaN.
    if not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
        raise UserError(
            "The merged tensor holds NaN or infinity: the base does, or the dtype's range is too small.",
            where=f"{source.path}, tensor {name}",
            found=f"{tensor.dtype} to {values.dtype}",
            write="--dtype bfloat16" if values.dtype == torch.float16 else None,
        )


# --- the folder ------------------------------------------------------------------------------


def _sync(path: Path) -> None:
    """Make a file's or folder's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the partial folder; a second merge into the same output would write the same files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("Another merge into this output is running.", where=folder) from None
        yield
    finally:
        os.close(descriptor)


def _identity(base: Checkpoint, adapter: Adapter, adapter_files: dict[str, Any], dtype: str | None) -> str:
    """What a finished shard depends on, as one digest. The base's data by size and modification time."""
    import torch

    facts = {
        "format": FORMAT,
        "base": [
            [shard.name, shard.header_sha256, shard.bytes, os.stat(shard.path).st_mtime_ns] for shard in base.shards
        ],
        "config": base.config,
        "adapter": adapter_files,
        "dtype": dtype,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _finished_shards(partial: Path, identity: str, targets: list[Target]) -> dict[str, dict]:
    """Entries of the journal whose shards are complete to the last bit; everything else is removed."""
    entries: dict[str, Any] = {}
    try:
        journal = json.loads((partial / JOURNAL).read_text(encoding="utf-8"))
        if journal["identity"] == identity:
            entries = journal["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    finished = {}
    for target in targets:
        path, entry = partial / target.name, entries.get(target.name)
        if (
            entry is not None
            and path.is_file()
            and path.stat().st_size == entry["bytes"] == target.bytes
            and sha256_file(path) == entry["sha256"]
        ):
            finished[target.name] = entry
    for path in partial.iterdir():
        if path.name not in finished and path.name != JOURNAL:
            path.unlink()
    return finished


def _check_output(output: Path, base: Checkpoint, adapter: Adapter) -> None:
    if output.exists() and not output.is_dir():
        raise UserError("The output is a file, not a folder.", where=output)
    if output.is_dir() and any(output.iterdir()):
        raise UserError(
            "The output folder is not empty.",
            where=output,
            found=f"{sum(1 for _ in output.iterdir())} entries",
            allowed="a new or an empty folder",
        )
    place = output.resolve()
    if place in (base.folder.resolve(), adapter.folder.resolve()):
        raise UserError("The output folder is one of the inputs.", where=output)


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed + DISK_MARGIN:
        raise UserError(
            "The disk is too small for the merged model.",
            where=parent.resolve(),
            found=f"{free / 1e9:.2f} GB free",
            allowed=f"{(needed + DISK_MARGIN) / 1e9:.2f} GB",
        )


def _merged_config(base: Checkpoint, plan: Plan, dtype: str | None) -> dict[str, Any]:
    """The base's configuration, with the dtype and the ties of the merged weights."""
    config = json.loads(json.dumps(base.config))
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        if dtype is not None:
            for key in ("dtype", "torch_dtype"):
                if key in part or (part is config and key == "dtype" and "torch_dtype" not in part):
                    part[key] = FLOAT_DTYPES[dtype]
        if plan.untied is not None and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return config


def _dtype_name(targets: list[Target]) -> str:
    """The dtype of most of the merged bytes, under torch's name."""
    sizes: dict[str, int] = {}
    for target in targets:
        for _, tensor, code in target.tensors:
            if tensor is not None and code in FLOAT_DTYPES:
                sizes[code] = sizes.get(code, 0) + tensor.bytes
    return FLOAT_DTYPES[max(sizes, key=lambda code: (sizes[code], code))] if sizes else "unknown"


def _run_shards(
    targets: list[Target],
    journal: dict[str, Any],
    partial: Path,
    base: Checkpoint,
    adapter: Adapter,
    plan: Plan,
    threads: int,
) -> None:
    """Write the shards that the journal lacks, several at a time; the journal grows as they reach the disk."""
    import torch

    todo = [target for target in targets if target.name not in journal["shards"]]
    if not todo:
        return
    meter = Meter("merging", sum(target.source.bytes - target.source.data_start for target in todo))
    lock = threading.Lock()
    recorded = read_json(base.folder / FETCHED)["files"] if (base.folder / FETCHED).exists() else {}

    def finish(name: str, entry: dict) -> None:
        _sync(partial / name)
        with lock:
            journal["shards"][name] = entry
            write_json(partial / JOURNAL, journal)

    workers = max(1, min(threads, len(todo)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the shards run side by side, and most of the work is digests and copies
    # Syncing waits for the disk, not for a core, so it has a thread of its own and the next shard goes on.
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as syncing:
        synced: list[Future] = []

        def work(target: Target) -> None:
            entry = merge_shard(target, base, adapter, plan, partial / target.name, meter)
            expected = recorded.get(target.name, {}).get("sha256", entry["base_sha256"])
            if entry["base_sha256"] != expected:
                raise UserError(
                    "The base's shard is not the one that was fetched: its digest differs from weights.json.",
                    where=target.source.path,
                    found=entry["base_sha256"],
                    allowed=expected,
                )
            synced.append(syncing.submit(finish, target.name, entry))

        futures = [pool.submit(work, target) for target in todo]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.done() and future.exception() for future in futures):
                meter.stop.set()
            errors = [error for future in futures if (error := future.exception()) is not None]
            for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
                raise error
            for future in synced:
                future.result()
        finally:
            meter.stop.set()
            torch.set_num_threads(before)
    meter.close()


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
        Cores to use; None: all that this process may.
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
    output = Path(output)
    code = None
    if dtype is not None:
        code = SAFETENSORS_NAMES.get(dtype)
        if code is None or code == "F64":
            raise UserError("Unknown dtype for the merged model.", found=dtype, allowed="float32, bfloat16, float16")
    threads = threads or len(os.sched_getaffinity(0))
    checkpoint = open_checkpoint(base)
    loaded = open_adapter(adapter)
    plan = plan_merge(checkpoint, loaded)
    targets, index = lay_out(checkpoint, plan, code)
    if replace and output.is_dir():
        shutil.rmtree(output)
    _check_output(output, checkpoint, loaded)
    adapter_files = {name: sha256_file(loaded.folder / name) for name in (CONFIG, WEIGHTS)}
    identity = _identity(checkpoint, loaded, adapter_files, code)

    partial = output.resolve().with_name(f".{output.name}.partial")
    parent = partial.parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not partial.exists():
        _check_space(existing, sum(target.bytes for target in targets))
        parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    with _locked(partial):
        journal: dict[str, Any] = {"identity": identity, "shards": _finished_shards(partial, identity, targets)}
        if journal["shards"]:
            log.info("taking over %d of %d shards of an interrupted merge", len(journal["shards"]), len(targets))
        try:
            _check_space(parent, sum(t.bytes for t in targets if t.name not in journal["shards"]))
            write_json(partial / JOURNAL, journal)
            _run_shards(targets, journal, partial, checkpoint, loaded, plan, threads)
            manifest = _complete(partial, checkpoint, loaded, plan, targets, index, journal, adapter_files, code)
        except UserError:
            shutil.rmtree(partial)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                "The disk filled up during the merge.",
                where=parent,
                allowed="free some space and run the same command again: finished shards are kept",
            ) from None
        (partial / JOURNAL).unlink()
        _sync(partial)
        os.rename(partial, output)  # replaces an empty folder, fails on any other
        _sync(parent)
    return manifest


def _complete(
    partial: Path,
    base: Checkpoint,
    adapter: Adapter,
    plan: Plan,
    targets: list[Target],
    index: dict[str, Any] | None,
    journal: dict[str, Any],
    adapter_files: dict[str, str],
    dtype: str | None,
) -> dict[str, Any]:
    """Write everything beside the weights, the manifest last."""
    if index is not None:
        if index == base.index:
            shutil.copyfile(base.folder / INDEX, partial / INDEX)
        else:
            write_json(partial / INDEX, index)
    config = _merged_config(base, plan, dtype)
    if config == base.config:
        shutil.copyfile(base.folder / "config.json", partial / "config.json")
    else:
        write_json(partial / "config.json", config)
    for path in sorted(base.folder.iterdir()):
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, partial / path.name)
    shards = {name: {key: entry[key] for key in ("sha256", "bytes")} for name, entry in journal["shards"].items()}
    others = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(partial.iterdir())
        if path.name not in shards and path.name != JOURNAL
    }
    changed = sorted(name for name, update in plan.updates.items() if update != Update(source=update.source))
    manifest = {
        "adapter": {
            "files": adapter_files,
            "rank": adapter.config["r"],
            "alpha": adapter.config["lora_alpha"],
            "dora": bool(adapter.config.get("use_dora")),
            "rslora": bool(adapter.config.get("use_rslora")),
            "target_modules": adapter.config.get("target_modules"),
        },
        "base": {
            "files": {name: entry["base_sha256"] for name, entry in journal["shards"].items()}
            | {"config.json": sha256_file(base.folder / "config.json")}
        },
        "bytes": sum(entry["bytes"] for entry in shards.values()),
        "dtype": FLOAT_DTYPES[dtype] if dtype else _dtype_name(targets),
        "files": shards | others,
        "format": FORMAT,
        "tensors": {"changed": len(changed), "total": sum(len(target.tensors) for target in targets)},
        "untied": plan.untied,
        "versions": {
            name: importlib.metadata.version(name) for name in ("peft", "safetensors", "torch", "transformers")
        },
        "weights": sorted(shards),
    }
    for name in others:
        _sync(partial / name)
    write_json(partial / MANIFEST, manifest)
    return manifest


def main() -> int:
    """Command line."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m scripts.merging.merge",
        description="Merge a LoRA adapter into its unquantized base with little memory.",
    )
    parser.add_argument("--base", required=True, metavar="DIR", help="model folder with config.json and safetensors")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder that PEFT saved the adapter to")
    parser.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the merged weights; default: the base's"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="cores to use; default: all")
    arguments = parser.parse_args()
    manifest = merge(
        arguments.base, arguments.adapter, arguments.output, dtype=arguments.dtype, threads=arguments.threads
    )
    print(
        f"{arguments.output}: {manifest['bytes'] / 1e9:.2f} GB {manifest['dtype']}, "
        f"{manifest['tensors']['changed']} of {manifest['tensors']['total']} tensors changed"
    )
    return 0


if __name__ == "__main__":
    if "snakemake" in globals():
        with job(snakemake):
            merge(
                Path(snakemake.input.base).parent,
                Path(snakemake.input.adapter).parent,
                Path(snakemake.output.manifest).parent,
                threads=snakemake.threads,
                replace=True,
                **snakemake.params.merge,
            )
    else:
        command(main)
