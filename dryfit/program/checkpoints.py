"""Models of transformers without their weights: the configuration is enough, and nothing is read or downloaded.

transformers loads a model as ever, with its own code, dtypes, quantization and threads. Of a checkpoint it sees names,
shapes and dtypes; large tensors stand for themselves. Where no checkpoint is at hand, one is made up from the
configuration: files with headers and no content.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dryfit.engine.tracker import Tracker
from dryfit.scenario.hub import MODELS, HubId, catalogued, published_dtype

from .devices import HOST_ELEMENTS

SHARD_BYTES = 2**31
_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


class Checkpoints:
    """What stands in for the checkpoints that a program loads."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._folder = Path(
            tempfile.gettempdir(), "dryfit-checkpoints"
        )  # of this process's own, see `.process`
        self.made_up: list[str] = []  # names of models whose weights were not at hand

    def of_models(self, module: Any) -> list[tuple[Any, str, Any]]:
        """Patches of ``transformers.modeling_utils``."""
        load = module.PreTrainedModel.from_pretrained.__func__

        def from_pretrained(cls: Any, name: Any = None, *args: Any, **options: Any) -> Any:
            if (
                name is not None
                and options.get("state_dict") is None
                and not _has_weights(name, options)
            ):
                name = self._make_up(cls, str(name), options)
                options.pop("subfolder", None)
            return load(cls, name, *args, **options)

        def safe_open(file: Any, *_: Any, **__: Any) -> _Opened:
            return _Opened(str(file), self._tracker)

        return [
            (module.PreTrainedModel, "from_pretrained", classmethod(from_pretrained)),
            (module, "safe_open", safe_open),
        ]

    def of_diffusers(self, module: Any) -> list[tuple[Any, str, Any]]:
        """Patches of ``diffusers.models.modeling_utils``: of checkpoints, names, shapes and dtypes are seen."""
        kind = module.ModelMixin
        load, read = kind.from_pretrained.__func__, module.load_state_dict

        def from_pretrained(cls: Any, name: Any, **options: Any) -> Any:
            if not _has_weights(name, options):
                name = self._make_up_part(cls, str(name), options)
                options.pop("subfolder", None)
                options["use_safetensors"] = True
            return load(cls, name, **options)

        def load_state_dict(file: Any, *args: Any, **options: Any) -> Any:
            if not str(file).endswith(".safetensors"):
                return read(file, *args, **options)
            opened = _Opened(str(file), self._tracker)
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118

        return [
            (kind, "from_pretrained", classmethod(from_pretrained)),
            *(
                (each, "load_state_dict", load_state_dict)
                for each in (module, sys.modules[read.__module__])
            ),
        ]

    def of_configurations(self, module: Any) -> list[tuple[Any, str, Any]]:
        """Patches of ``transformers.configuration_utils``: known models' configurations are in the catalogue."""
        kind = module.PreTrainedConfig
        read = kind.get_config_dict.__func__

        def get_config_dict(cls: Any, name: Any, **options: Any) -> Any:
            try:
                return read(cls, name, **options)
            except OSError:
                hub = HubId.read(str(name))
                known = hub and catalogued(hub)
                if not known:
                    raise
                config, unused = read(cls, str(MODELS / f"{known}.json"), **options)
                return {"dtype": published_dtype(hub)} | config, unused

        return [(kind, "get_config_dict", classmethod(get_config_dict))]

    def _make_up(self, cls: Any, name: str, options: Mapping[str, Any]) -> str:
        """A folder with a configuration and files of weights that have no content."""
        from transformers import AutoConfig

        config = options.get("config")
        if config is None or isinstance(config, (str, Path)):
            told = {
                "trust_remote_code": options.get("trust_remote_code"),
                "subfolder": options.get("subfolder") or "",
            }
            config = AutoConfig.from_pretrained(config or name, **told)

        def make() -> torch.nn.Module:
            dtype = getattr(config, "dtype", None) or torch.float32
            return (
                cls._from_config(config, dtype=dtype)
                if hasattr(cls, "_from_config")
                else cls(config)
            )

        return self._folder_of(
            name, options, make, lambda model, folder: config.save_pretrained(folder), "model"
        )

    def _make_up_part(self, cls: Any, name: str, options: Mapping[str, Any]) -> str:
        """The same for a part of a pipeline of diffusers, which lies in a folder of its own."""

        def make() -> torch.nn.Module:
            config, usual = (
                cls.load_config(name, subfolder=options.get("subfolder")),
                torch.get_default_dtype(),
            )
            torch.set_default_dtype(
                options.get("torch_dtype") or torch.float32
            )  # a conversion would make tensors anew
            try:
                return cls.from_config(config)
            finally:
                torch.set_default_dtype(usual)

        save = lambda model, folder: model.save_config(folder)  # noqa: E731
        return self._folder_of(name, options, make, save, "diffusion_pytorch_model")

    def _folder_of(
        self,
        name: str,
        options: Mapping[str, Any],
        make: Callable[[], torch.nn.Module],
        save: Callable[[Any, Path], None],
        stem: str,
    ) -> str:
        part = options.get("subfolder") or ""
        folder = Path(self._folder, name.replace("/", "--"), part)
        if not folder.exists():
            folder.mkdir(parents=True)
            with torch.device("meta"):
                model = make()
            _write(folder, dict(_own_tensors(model)), stem)
            save(model, folder)
            self.made_up.append(f"{name}/{part}".rstrip("/"))
        return str(folder)


def _has_weights(name: Any, options: Mapping[str, Any]) -> bool:
    """Whether a checkpoint lies in a folder, or in the cache of the Hub."""
    place = Path(name, options.get("subfolder") or "")
    if place.is_dir():
        return any(found for pattern in _WEIGHTS for found in place.glob(pattern))
    from huggingface_hub import try_to_load_from_cache

    names = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    revision = options.get("revision")
    return any(
        isinstance(try_to_load_from_cache(str(name), each, revision=revision), str)
        for each in names
    )


def _own_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds: each tensor once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], stem: str = "model") -> None:
    """A checkpoint in files of usual sizes (:func:`write_tensors`)."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = (
            f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else f"{stem}.safetensors"
        )
        files |= dict.fromkeys(shard, file)
        write_tensors(folder / file, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(each.nbytes for each in tensors.values())},
            "weight_map": files,
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_tensors(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A file of safetensors with a header alone: its content is a hole, which takes no place on the disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        with suppress(OSError):  # larger than a file of the program may be: nobody reads the hole
            written.truncate(8 + len(text) + offset)


class _Opened:
    """A file of weights as ``safetensors.safe_open`` gives it, of which only the header and small tensors are read."""

    def __init__(self, path: str, tracker: Tracker) -> None:
        self._path, self._tracker = path, tracker
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
        self._metadata, self._begin = self._header.pop("__metadata__", {}), 8 + size

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def keys(self) -> list[str]:
        return list(self._header)

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._header[name], self._read, self._tracker)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.get_slice(name)[...]

    def _read(self, begin: int, end: int) -> bytearray:
        with open(self._path, "rb") as file:
            file.seek(self._begin + begin)
            return bytearray(file.read(end - begin))


class _Slice:
    """A tensor of such a file, before it is read."""

    def __init__(
        self, entry: Mapping[str, Any], read: Callable[[int, int], bytearray], tracker: Tracker
    ) -> None:
        self._entry, self._read, self._tracker = entry, read, tracker

    def get_shape(self) -> list[int]:
        return list(self._entry["shape"])

    def get_dtype(self) -> str:
        return self._entry["dtype"]

    def __getitem__(self, place: Any) -> torch.Tensor:
        shape, dtype = torch.Size(self._entry["shape"]), _DTYPES[self._entry["dtype"]]
        if dtype.is_floating_point and shape.numel() > HOST_ELEMENTS:
            return self._tracker.values.stand_in(shape, dtype)[place]
        content = self._read(*self._entry["data_offsets"])
        made = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return made.reshape(shape)[place]
