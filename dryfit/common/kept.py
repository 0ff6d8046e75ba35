"""Answers that were given before: kept for each user, and shown again where nothing that decides them has changed.

A question is read anew each time, with all its files. So what decides an answer is the question as it was read, the
words that asked and the folder it was asked in, the library's own code and data, the installed packages, Python, the
kind of machine, and the variables of the environment that PyTorch and its neighbours read. A package that somebody
edits counts as another one, in a checkout and where it was installed. The digest of all that is the name of the
answer's file. No package is imported to look it up.

An answer of a question that depends on the state of this machine must not be kept: no option asks such a question yet.
"""

import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dryfit.common.files import write_json

FOLDER = "DRYFIT_CACHE"  # names another folder; empty: nothing is kept
MOST_BYTES = (
    16 * 2**20
)  # of all answers of a user: some 1,000 of them; what was not asked for longest goes first
# Beginnings of variables that PyTorch, CUDA, transformers and the packages beside them read.
VARIABLES = (
    "ACCELERATE",
    "BNB_",
    "CUBLAS",
    "CUDA",
    "DS_",
    "ENABLE_",
    "FLA_",
    "FLASH_",
    "FSDP_",
    "HF_",
    "KMP_",
    "LIGER",
    "MKL",
    "NVIDIA",
    "OMP_",
    "PEFT",
    "PYTHON",
    "PYTORCH",
    "TORCH",
    "TRANSFORMERS",
    "TRITON",
    "TRL",
    "USE_",
    "XFORMERS",
    "XLA_",
)
# Packages that a trace runs. Each one's modules count by their size and time. PyTorch's wheel counts by its version: it
# has as many modules as all others together.
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "causal_conv1d",
    "deepspeed",
    "diffusers",
    "fla",
    "galore_torch",
    "liger_kernel",
    "mamba_ssm",
    "peft",
    "sentence_transformers",
    "timm",
    "torch",
    "torchao",
    "transformers",
    "trl",
)
_CODE = Path(__file__).resolve().parents[1]


def folder() -> Path | None:
    """Where this user's answers lie, by the XDG base directories; None where none are kept."""
    if (named := os.environ.get(FOLDER)) is not None:
        return Path(named) if named else None
    with suppress(RuntimeError):  # a user without a home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dryfit", "answers")
    return None


class KeptAnswer:
    """The answer to one question, in its file.

    ``words``: the command line, without ``--fresh``. ``asked``: the question as it was read: a value, or several.
    """

    def __init__(self, words: Sequence[str], asked: object) -> None:
        kept = folder()
        self._key = _digest([list(words), _plain(asked), _surroundings()]) if kept else ""
        self._path = kept and kept / f"{self._key[:32]}.json"

    def show(self) -> int | None:
        """Print the answer and return its exit status; None, and nothing is printed, where none is kept."""
        if self._path is None:
            return None
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return None if isinstance(error, OSError) else self._damaged()
        try:
            answer = json.loads(text)
            sound = answer["digest"] == _digest([self._key, answer["text"], answer["status"]])
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            return self._damaged()
        with suppress(OSError):
            os.utime(self._path)  # the last time that it was asked for
        if sys.stderr.isatty():
            print("kept from an earlier time; --fresh asks anew", file=sys.stderr)
        sys.stdout.write(answer["text"])
        return answer["status"]

    def _damaged(self) -> None:
        print(
            f"The kept answer {self._path} is damaged, so the question is asked anew.",
            file=sys.stderr,
        )

    def give(self, answer: Callable[[], int]) -> int:
        """Print an answer by a function that returns its exit status, and keep it; after an exception nothing is."""
        tee = _Tee(sys.stdout)
        with redirect_stdout(tee):
            status = answer()
        if self._path is not None and status in (0, 1):
            self._keep(tee.getvalue(), status)
        return status

    def _keep(self, text: str, status: int) -> None:
        answer = {"text": text, "status": status, "digest": _digest([self._key, text, status])}
        with suppress(
            OSError
        ):  # a folder that can't be written, a full disk: the answer is asked anew next time
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(self._path, answer)
            _remove_oldest(self._path.parent)


def kept_or_given(
    words: Sequence[str], asked: object, answer: Callable[[], int], *, fresh: bool
) -> int:
    """Print the kept answer to a line, or with ``fresh``, or where none is kept, the one that a function prints."""
    kept = KeptAnswer([word for word in words if word != "--fresh"], asked)
    status = None if fresh else kept.show()
    return kept.give(answer) if status is None else status


def _remove_oldest(kept: Path) -> None:
    answers = []
    for path in kept.glob("*.json"):
        with suppress(OSError):  # another process has removed it
            answers.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(answers, reverse=True):
        total += size
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)


class _Tee(io.StringIO):
    """Remembers what is written, and writes it where it was to go."""

    def __init__(self, to: Any) -> None:
        super().__init__()
        self._to = to

    def write(self, text: str) -> int:
        self._to.write(text)
        return super().write(text)

    def flush(self) -> None:
        self._to.flush()

    def isatty(self) -> bool:
        return self._to.isatty()

    @property
    def encoding(self) -> str | None:
        return getattr(self._to, "encoding", None)


def _surroundings() -> list[Any]:
    variables = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    return [
        os.path.realpath("."),
        _code(),
        _packages(),
        _edited(),
        sys.version,
        platform.platform(),
        variables,
    ]


def _code() -> str:
    content = hashlib.sha256()
    for path in sorted(_CODE.rglob("*")):
        if (
            path.is_file()
            and "__pycache__" not in path.parts
            and path.suffix not in (".so", ".pyd")
        ):
            content.update(f"{path.relative_to(_CODE)}\0".encode())
            content.update(hashlib.sha256(path.read_bytes()).digest())
    return content.hexdigest()


def _packages() -> list[tuple[str, str, int]]:
    """The installed packages: where each lies, its name with its version, and when it was installed."""
    packages = []
    for place in sys.path:
        with suppress(OSError):
            for entry in os.scandir(place or "."):
                if entry.name.endswith((".dist-info", ".egg-info")):
                    packages.append((place, entry.name, entry.stat().st_mtime_ns))
    return sorted(packages)


def _edited() -> str:
    """Digest of names, sizes and times of the packages' modules, wherever Python finds them."""
    content = hashlib.sha256()
    for name in PACKAGES:
        spec = None
        with suppress(
            ImportError, ValueError
        ):  # one that is half imported, or stands in for itself
            spec = find_spec(name)
        for place in map(Path, (spec and spec.submodule_search_locations) or ()):
            if name != "torch" or not any(place.parent.glob("torch-*.dist-info")):
                _add_modules(content, str(place))
    return content.hexdigest()


def _add_modules(content: Any, folder: str) -> None:
    """Tell a digest of a folder's modules, those of folders within it too."""
    with suppress(OSError):  # a folder that goes while it is read
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.endswith(".py"):
                status = entry.stat()
                content.update(f"{entry.path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            elif entry.is_dir(follow_symlinks=False) and entry.name != "__pycache__":
                _add_modules(content, entry.path)


def _plain(value: Any) -> Any:
    """A value as JSON has it, the same in each process."""
    if is_dataclass(value) and not isinstance(value, type):
        return [
            type(value).__name__,
            {field.name: _plain(getattr(value, field.name)) for field in fields(value)},
        ]
    if isinstance(value, Mapping):
        return [
            [str(name), _plain(item)]
            for name, item in sorted(value.items(), key=lambda pair: str(pair[0]))
        ]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
