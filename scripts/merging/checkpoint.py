"""A folder of safetensors files, read without loading it: names, dtypes, shapes and the place of each byte.

The merge and its verification both work on byte ranges, so this module reads the headers itself
(8 bytes of length, then JSON, then the data; https://huggingface.co/docs/safetensors) and checks
everything that can be wrong with a folder before any work begins.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_json

# Bytes of one element of each dtype that the format knows. Four- and six-bit types have no whole number of
# bytes and only occur in quantized folders, which are refused anyway.
ITEM_BYTES = {
    **{name: 1 for name in ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")},
    **{name: 2 for name in ("U16", "I16", "F16", "BF16")},
    **{name: 4 for name in ("U32", "I32", "F32")},
    **{name: 8 for name in ("U64", "I64", "F64", "C64")},
}
# The floating dtypes that a merge computes with, under the names that torch and config.json use.
FLOAT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
SAFETENSORS_NAMES = {name: code for code, name in FLOAT_DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Endings of tensors that only a quantized checkpoint holds: bitsandbytes, GPTQ/AWQ, compressed-tensors, HQQ.
QUANTIZED_ENDINGS = (
    ".absmax", ".nested_absmax", ".quant_map", ".SCB", ".qweight", ".qzeros", ".weight_packed", ".weight_scale_inv",
)  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One entry of a header; ``start`` and ``end`` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file. ``tensors`` stand in the order of their bytes."""

    path: Path
    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]
    data_start: int
    bytes: int
    header_sha256: str

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its configuration, its shards, and where each tensor lies."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    tensors: dict[str, tuple[Shard, Tensor]] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def encode_header(entries: list[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """A safetensors header for ``(name, dtype, shape, bytes)`` entries laid out one after the other.

    Padded with spaces so that the data begins at a multiple of eight bytes, as the format asks.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_shard(path: str | os.PathLike) -> Shard:
    """Read and check the header of one safetensors file; a truncated or malformed one is a :class:`UserError`."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            prefix = handle.read(8)
            length = int.from_bytes(prefix, "little")
            # 100 MB is the format's own limit; beyond it (or beyond the file) this is something else.
            if len(prefix) < 8 or length > 100_000_000:
                raise UserError("This is not a safetensors file.", where=path)
            text = handle.read(length)
    except FileNotFoundError:
        raise UserError("The file does not exist.", where=path) from None
    if len(text) < length:
        raise UserError(
            "The file is truncated inside its header: copy or download it again.",
            where=path,
            found=f"{size} bytes",
            allowed=f"at least {8 + length} bytes",
        )
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        tensors = sorted(
            (
                Tensor(
                    name,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                    8 + length + entry["data_offsets"][1],
                )
                for name, entry in header.items()
            ),
            key=lambda tensor: (tensor.start, tensor.end),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError("This is not a safetensors file: its header is malformed.", where=path) from None
    offset = 8 + length
    for tensor in tensors:
        item = ITEM_BYTES.get(tensor.dtype)
        if tensor.start != offset or (item is not None and math.prod(tensor.shape) * item != tensor.bytes):
            raise UserError(
                "The header does not describe its data: offsets overlap, leave holes or disagree with the shape.",
                where=f"{path}, tensor {tensor.name}",
            )
        offset = tensor.end
    if size != offset:
        raise UserError(
            "The file is truncated: copy or download it again."
            if size < offset
            else "The file is longer than its header says: copy or download it again.",
            where=path,
            found=f"{size} bytes",
            allowed=f"{offset} bytes",
        )
    return Shard(path, tuple(tensors), metadata, 8 + length, size, hashlib.sha256(prefix + text).hexdigest())


def refuse_pickles(folder: Path, what: str) -> None:
    """Raise for a folder whose weights are pickles: unpickling runs code that came with the file."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"The {what} holds its weights as pickles, which can run code when opened.",
            where=folder,
            found=", ".join(pickles[:3]),
            allowed="safetensors files",
            write="model.save_pretrained(FOLDER)  # with a current transformers or peft, which write safetensors",
        )


def refuse_quantized(config: dict[str, Any], names: Any, folder: Path) -> None:
    """Raise for a quantized base: adding to rounded four- or eight-bit weights is not what was trained."""
    found = None
    for part in (config, config.get("text_config") or {}):
        quantization = part.get("quantization_config")
        if quantization:
            found = f"quantization_config: {quantization.get('quant_method', 'unnamed')}"
    if found is None:
        found = next((f"tensor {name}" for name in names if name.endswith(QUANTIZED_ENDINGS)), None)
    if found:
        raise UserError(
            "The base folder is quantized; an adapter is merged into the unquantized base that it was quantized from.",
            where=folder,
            found=found,
            allowed="float16, bfloat16 or float32 weights",
        )


def open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Open a model folder, checking everything that its headers can tell.

    Raises
    ------
    UserError
        No configuration, no safetensors, pickles instead, a shard missing or truncated, an index that
        disagrees with the shards, a quantized base.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("The base model's folder does not exist.", where=folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError("config.json must hold one JSON object.", where=folder / "config.json")
    index = None
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError("The index has no weight_map.", where=folder / INDEX)
        files = sorted(set(weight_map.values()))
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    "The index may only name safetensors files of its own folder.", where=folder / INDEX, found=name
                )
            if not (folder / name).exists():
                raise UserError(
                    "A shard that the index names is missing: copy or download it again.",
                    where=folder,
                    found=f"{sum((folder / other).exists() for other in files)} of {len(files)} shards",
                    allowed=name,
                )
    elif (folder / SINGLE).exists():
        weight_map, files = None, [SINGLE]
    else:
        refuse_pickles(folder, "base model")
        raise UserError(
            "The base model's folder has no safetensors weights.", where=folder, allowed=f"{SINGLE} or {INDEX}"
        )
    shards = tuple(read_shard(folder / name) for name in files)
    tensors: dict[str, tuple[Shard, Tensor]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in tensors:
                raise UserError("Two shards hold the same tensor.", where=folder, found=tensor.name)
            tensors[tensor.name] = shard, tensor
    if weight_map is not None:
        for name, file in weight_map.items():
            if name not in tensors or tensors[name][0].name != file:
                raise UserError(
                    "The index names a tensor that its shard does not hold.", where=folder / file, found=name
                )
        for name in tensors:
            if name not in weight_map:
                raise UserError("A shard holds a tensor that the index does not name.", where=folder, found=name)
    refuse_quantized(config, tensors, folder)
    return Checkpoint(folder, config, shards, index, tensors)


def read_tensor(shard: Shard, tensor: Tensor) -> Any:
    """One tensor as a ``torch.Tensor`` of its own (not a view of the file)."""
    import torch

    count = math.prod(tensor.shape)
    buffer = bytearray(tensor.bytes)
    with open(shard.path, "rb", buffering=0) as handle:
        read_into(handle.fileno(), memoryview(buffer), tensor.start, shard.path)
    if not count:
        return torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
    return torch.frombuffer(buffer, dtype=torch_dtype(tensor.dtype), count=count).reshape(tensor.shape)


def read_into(descriptor: int, view: memoryview, offset: int, path: object) -> None:
    """Fill ``view`` from a file at ``offset``; a file that ends early is a :class:`UserError`, not a crash."""
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise UserError("The file became shorter while it was being read.", where=path)
        view, offset = view[count:], offset + count


def torch_dtype(code: str) -> Any:
    """The torch dtype of a floating safetensors dtype."""
    import torch

    return getattr(torch, FLOAT_DTYPES[code])
