"""A folder of safetensors files, read without loading it: names, dtypes, shapes and the place of each byte.

Whoever fetches, trains on or merges a model asks here which files are its weights. The merge and its verification
work on byte ranges, so this module reads the headers itself (8 bytes of length, then JSON, then the data;
https://huggingface.co/docs/safetensors) and checks everything that can be wrong with a folder before any work begins.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import own_file, read_json

# Bytes of one element of each dtype that the format knows. Four- and six-bit types have no whole number of
# bytes and only occur in quantized folders, which are refused anyway.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# The floating dtypes that a merge computes with, under the names that torch and config.json use.
FLOAT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
SAFETENSORS_NAMES = {name: code for code, name in FLOAT_DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 2**24  # read at once, where all of a file is
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")
HEADER_LIMIT_BYTES = 100_000_000  # the format's own
QUANTIZED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Endings of tensors that only a quantized checkpoint holds: bitsandbytes, GPTQ/AWQ, compressed-tensors, FP8.
QUANTIZED_ENDINGS = (
    ".absmax",
    ".nested_absmax",
    ".quant_map",
    ".SCB",
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
)


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a file's header; ``start`` and ``end`` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file, on the disk or yet to be written. ``tensors`` stand in the order of their bytes."""

    path: Path
    header: bytes  # all before the data
    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]

    @property
    def bytes(self) -> int:
        return self.tensors[-1].end if self.tensors else len(self.header)


@dataclass(frozen=True)
class WeightFolder:
    """A model folder: its configuration, its shards, and where each tensor lies."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    tensors: dict[str, StoredTensor]


def lay_out_shard(
    path: Path, entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> Shard:
    """The file that holds ``(name, dtype, shape)`` entries one after the other.

    The header is padded with spaces, so that the data begins at a multiple of eight bytes as the format asks.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return parse_header(path, len(text).to_bytes(8, "little") + text)


def parse_header(path: Path, header: bytes) -> Shard:
    """The file that begins with ``header``; nothing is checked."""
    entries = json.loads(header[8:])
    metadata = entries.pop("__metadata__", None) or {}
    tensors = [
        StoredTensor(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            path,
            *(len(header) + at for at in entry["data_offsets"]),
        )
        for name, entry in entries.items()
    ]
    return Shard(
        path,
        header,
        metadata,
        tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))),
    )


def read_shard(path: str | os.PathLike) -> Shard:
    """Read and check the header of one safetensors file; a truncated or malformed one is a :class:`UserError`."""
    path, again = Path(path), "copy or download it again."
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            header = handle.read(8)
            needed = 8 + int.from_bytes(header, "little")
            if size < 8 or needed > HEADER_LIMIT_BYTES:
                raise UserError("This is not a safetensors file.", where=path)
            header += handle.read(needed - 8)
    except FileNotFoundError:
        raise UserError(f"A file of weights is missing: {again}", where=path) from None
    if size < needed:
        problem = f"The file is truncated inside its header: {again}"
        raise UserError(
            problem, where=path, found=f"{size} bytes", allowed=f"at least {needed} bytes"
        )
    try:
        shard = parse_header(path, header)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            "This is not a safetensors file: its header is malformed.", where=path
        ) from None
    offset = needed
    for tensor in shard.tensors:
        item = ITEM_BYTES.get(tensor.dtype)
        if tensor.start != offset or (
            item is not None and math.prod(tensor.shape) * item != tensor.bytes
        ):
            raise UserError(
                "The header does not describe its data: offsets overlap, leave holes or disagree with the shape.",
                where=f"{path}, tensor {tensor.name}",
            )
        offset = tensor.end
    if size != offset:
        problem = "is truncated" if size < offset else "is longer than its header says"
        raise UserError(
            f"The file {problem}: {again}",
            where=path,
            found=f"{size} bytes",
            allowed=f"{offset} bytes",
        )
    return shard


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


def _refuse_quantized(
    folder: Path, config: dict[str, Any], tensors: Iterable[StoredTensor]
) -> None:
    """Raise for a quantized base: adding to rounded four- or eight-bit weights is not what was trained."""
    quantized = [
        f"tensor {tensor.name}: {tensor.dtype}"
        for tensor in tensors
        if tensor.name.endswith(QUANTIZED_ENDINGS) or tensor.dtype in QUANTIZED_DTYPES
    ]
    for part in (config, config.get("text_config") or {}):
        if settings := part.get("quantization_config"):
            quantized.insert(0, f"quantization_config: {settings.get('quant_method', 'unnamed')}")
    if quantized:
        raise UserError(
            "The base folder is quantized; an adapter is merged into the unquantized base that it was quantized from.",
            where=folder,
            found=quantized[0],
            allowed="float16, bfloat16 or float32 weights",
        )


def _refuse_contradictions(
    folder: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]
) -> None:
    """Raise for sizes in ``config.json`` that the tensors contradict: no program could load the two together."""
    sizes = {**config, **(config.get("text_config") or {})}
    hidden, layers = (
        sizes.get(old) or sizes.get(new)
        for old, new in (("n_embd", "hidden_size"), ("n_layer", "num_hidden_layers"))
    )
    contradictions = []
    embedding = next((tensor for name, tensor in tensors.items() if EMBEDDING.search(name)), None)
    if embedding is not None and len(embedding.shape) == 2:
        contradictions += [
            ("vocab_size", sizes.get("vocab_size"), embedding.shape[0], embedding.name)
        ]
        if not sizes.get("word_embed_proj_dim") and not sizes.get(
            "embedding_size"
        ):  # which are projected afterwards
            contradictions += [("hidden_size", hidden, embedding.shape[1], embedding.name)]
    numbers = {int(match[3]) for match in map(LAYER.search, tensors) if match}
    if (
        numbers and isinstance(layers, int) and layers > max(numbers) + 1
    ):  # more tensors: heads for more tokens at once
        contradictions += [
            ("num_hidden_layers", layers, max(numbers) + 1, "the last layer's tensors")
        ]
    for key, told, is_so, where in contradictions:
        if isinstance(told, int) and told != is_so:
            raise UserError(
                f"config.json and the weights contradict each other: {key} is {told}, and the tensors say {is_so}.",
                where=f"{folder}: {where}",
                found=told,
                allowed="config.json and weights of one model, saved together",
                write=f'"{key}": {is_so}    # in {folder / "config.json"}, if the weights are the right ones',
            )


def weight_files(folder: Path) -> list[str]:
    """Names of the files that are a model's weights, none where there are no safetensors.

    Of a single file and an index ``from_pretrained`` takes the single file, and so do all who ask here.

    UserError: for an index of another form, or one that names files in other folders.
    """
    if os.path.lexists(folder / SINGLE):
        return [SINGLE]
    if not os.path.lexists(folder / INDEX):
        return []
    index = read_json(own_file(folder / INDEX))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("The index has no weight_map.", where=folder / INDEX)
    files = sorted(map(str, set(weight_map.values())))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            problem = "The index may only name safetensors files of its own folder."
            raise UserError(problem, where=folder / INDEX, found=name)
    return files


def open_checkpoint(folder: str | os.PathLike) -> WeightFolder:
    """Open a model folder, checking everything that its headers can tell.

    UserError: No configuration, no safetensors, pickles instead, a shard missing, truncated or outside the folder, an
    index or a configuration that disagrees with the shards, a quantized base.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("The base model's folder does not exist.", where=folder)
    config = read_json(own_file(folder / "config.json"))
    if not isinstance(config, dict):
        raise UserError("config.json must hold one JSON object.", where=folder / "config.json")
    index, files = None, weight_files(folder)
    if not files:
        refuse_pickles(folder, "base model")
        problem = "The base model's folder has no safetensors weights."
        raise UserError(problem, where=folder, allowed=f"{SINGLE} or {INDEX}")
    if files != [SINGLE]:
        index = read_json(folder / INDEX)
    weight_map = index["weight_map"] if index else None
    shards = tuple(read_shard(own_file(folder / name)) for name in files)
    tensors: dict[str, StoredTensor] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in tensors:
            raise UserError("Two shards hold the same tensor.", where=folder, found=tensor.name)
        tensors[tensor.name] = tensor
        if weight_map is not None and tensor.name not in weight_map:
            raise UserError(
                "A shard holds a tensor that the index does not name.",
                where=folder,
                found=tensor.name,
            )
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].path.name != file:
            raise UserError(
                "The index names a tensor that its shard does not hold.",
                where=folder / file,
                found=name,
            )
    _refuse_quantized(folder, config, tensors.values())
    _refuse_contradictions(folder, config, tensors)
    return WeightFolder(folder, config, shards, index, tensors)


def checked_digest(shard: Shard) -> str:
    """SHA-256 of a shard's file, which is read once; NaN or infinity in it is a :class:`UserError`."""
    import torch

    digest = hashlib.sha256(shard.header)
    with open(shard.path, "rb", buffering=0) as handle:
        for tensor in shard.tensors:
            for start in range(tensor.start, tensor.end, BLOCK_BYTES):
                block = memoryview(bytearray(min(BLOCK_BYTES, tensor.end - start)))
                read_into(handle.fileno(), block, start, shard.path)
                digest.update(block)
                if tensor.dtype in FLOAT_DTYPES:
                    values = torch.frombuffer(block, dtype=torch_dtype(tensor.dtype))
                    require_finite(values, f"{shard.path}, tensor {tensor.name}")
    return digest.hexdigest()


def require_finite(values: Any, where: str, changed_from: str | None = None) -> None:
    """Raise where values are NaN or infinite.

    ``changed_from``: the dtype that a merge has changed them from; None for values as they lie in the file.
    """
    import torch

    # A sum is finite only if every term is; the exact test runs only when the sum overflows or is NaN.
    if torch.isfinite(values.sum(dtype=torch.float32)) or torch.isfinite(values).all():
        return
    if changed_from is None:
        raise UserError(
            "The model's weights hold NaN or infinity, so nothing can be trained on them or merged into them.",
            where=where,
            allowed="finite weights: download or copy the model again, or take another one if it was published so",
        )
    raise UserError(
        "The merged tensor holds NaN or infinity: the base does, or the dtype's range is too small.",
        where=where,
        found=f"{changed_from} to {values.dtype}",
        write="--dtype bfloat16" if values.dtype == torch.float16 else None,
    )


def read_tensor(tensor: StoredTensor) -> Any:
    """One tensor as a ``torch.Tensor`` of its own (not a view of the file)."""
    import torch

    buffer = bytearray(tensor.bytes)
    with open(tensor.path, "rb", buffering=0) as handle:
        read_into(handle.fileno(), memoryview(buffer), tensor.start, tensor.path)
    if not buffer:
        return torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
    return torch.frombuffer(buffer, dtype=torch_dtype(tensor.dtype)).reshape(tensor.shape)


def read_into(descriptor: int, view: memoryview, offset: int, path: object) -> None:
    """Fill ``view`` from a file at ``offset``; a file that ends early is a :class:`UserError`, not a crash."""
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise UserError("The file became shorter while it was being read.", where=path)
        view, offset = view[count:], offset + count


def torch_dtype(code: str) -> Any:
    import torch

    return getattr(torch, FLOAT_DTYPES[code])
