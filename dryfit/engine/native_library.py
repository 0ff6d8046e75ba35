"""Shared libraries of the engine: found, or compiled where there is a compiler. Python's replay needs none.

The sources lie in ``native/``. What was compiled is named by digests of the sources and of itself, and by the platform.
So another version's file, another machine's and a damaged one are left alone. It lies beside the sources where the
wheel brought it, else in a folder that the user alone can write: whoever could put a file there would have it run.
``DRYFIT_REPLAY=python`` asks for Python's replay.

Without a library a line says why, once for each user and reason.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SOURCES = Path(__file__).with_name("native")
SETTING = "DRYFIT_REPLAY"
_SECONDS = 120  # that a compiler may take; it takes one
_DIGITS = 16
log = logging.getLogger(__name__)


class NotCompiled(Exception):
    """There is no compiler, or it does not make a library that can be loaded; says why."""


@dataclass(frozen=True)
class Sources:
    """What a shared library is compiled from, and how."""

    files: Sequence[Path]  # the first one is compiled; the others it includes
    _: KW_ONLY
    compilers: Sequence[str]  # commands, of which the first that is found compiles
    variable: str  # the variable of the environment that names another compiler
    # Arguments before and behind the file that is compiled.
    flags: Sequence[str]
    links: Sequence[str] = ()
    also: str = ""  # what else decides whether a kept library serves, such as a version

    @property
    def stem(self) -> str:
        """How names of libraries from these sources begin."""
        texts = b"".join(path.read_bytes() for path in self.files) + self.also.encode()
        return f"{self.files[0].stem}-{_digest(texts)}-{sysconfig.get_platform()}"

    def load(self, *brought: Path) -> Any:
        """The library: out of folders that an installation brought, out of the user's, or compiled now.

        Raises :class:`NotCompiled` if there is none and none can be made.
        """
        kept = cache_folder()
        for folder in (*brought, kept) if _is_the_users_alone(kept) else brought:
            for path in self._compiled_in(folder):
                try:
                    return _loaded(path)
                except NotCompiled:  # another C library's, or another processor's
                    continue
        try:  # kept for the next time if the user can write the folder, and nobody else can
            return _loaded(self.compile_into(_made_private(kept)))
        except OSError:
            with TemporaryDirectory(prefix="dryfit-", ignore_cleanup_errors=True) as folder:
                try:
                    return _loaded(self.compile_into(Path(folder)))
                except OSError as error:
                    raise NotCompiled(f"no folder can be written: {error}") from None

    def compile_into(self, folder: Path) -> Path:
        """Compile the sources; the library's path in a folder.

        Raises
        ------
        NotCompiled
            Without a compiler, or with its last line where it fails.
        OSError
            If the folder can't be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(
            prefix="compiling-", dir=folder
        ) as beside:  # processes may compile at the same time
            made = Path(beside, "library")
            compiler, files = self._compiler(), [str(self.files[0])]
            command = [
                *compiler,
                *self.flags,
                "-shared",
                "-fPIC",
                "-o",
                str(made),
                *files,
                *self.links,
            ]
            try:
                run = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", timeout=_SECONDS
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NotCompiled(f"the compiler can't be run: {error}") from None
            if run.returncode or not made.is_file():
                said = (run.stderr or run.stdout).strip().splitlines() or [
                    f"exit status {run.returncode}, and no file"
                ]
                raise NotCompiled(f"the compiler {compiler[0]} fails: {said[-1]}")
            path = folder / f"{self.stem}-{_digest(made.read_bytes())}{_suffix()}"
            os.replace(made, path)
        return path

    def _compiled_in(self, folder: Path) -> Iterator[Path]:
        """Whole files that were made from these sources for this platform, the last made first."""
        try:
            libraries = sorted(
                folder.glob(f"{self.stem}-*{_suffix()}"), key=lambda path: -path.stat().st_mtime
            )
            yield from (
                path for path in libraries if path.stem.endswith(f"-{_digest(path.read_bytes())}")
            )
        except OSError:
            return

    def _compiler(self) -> Sequence[str]:
        if named := shlex.split(os.environ.get(self.variable, "")):
            return named
        compiler = next(filter(None, map(shutil.which, self.compilers)), None)
        if compiler is None:
            raise NotCompiled(f"there is no compiler ({', '.join(self.compilers)})")
        return [compiler]


_OWN = [SOURCES / "replay.c", *sorted(SOURCES.glob("*.h"))]
REPLAY = Sources(_OWN, compilers=("cc", "gcc", "clang"), variable="CC", flags=("-std=c99", "-O2"))


@cache
def library() -> Any:
    """The compiled replay as ctypes loads it; None: replays run in Python."""
    if os.environ.get(SETTING) == "python" or sys.platform in ("emscripten", "wasi"):
        return None
    try:
        return REPLAY.load(SOURCES)
    except NotCompiled as reason:
        _say_once(str(reason))
        return None


def cache_folder() -> Path:
    """Where a user's programs keep what was compiled, and whether they have said why nothing was."""
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = home / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or base) / "dryfit" / "native"


def _is_the_users_alone(folder: Path) -> bool:
    """Whether nobody else can put a file into a folder. Windows keeps a user's folders apart by itself."""
    if sys.platform == "win32":
        return True
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _made_private(folder: Path) -> Path:
    """A folder that the user alone can write, made if it is not there.

    Raises :class:`OSError` if it can't be made, or others can write it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_the_users_alone(folder):
        raise PermissionError(f"others can write to {folder}")
    return folder


def _loaded(path: Path) -> Any:
    import ctypes

    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotCompiled(f"what the compiler made can't be loaded: {error}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


def _suffix() -> str:
    return ".dll" if sys.platform == "win32" else ".so"


def _say_once(reason: str) -> None:
    """Say why replays run in Python, unless this user has heard so."""
    heard = cache_folder() / f"{REPLAY.stem}.reason"
    try:
        if heard.read_text(encoding="utf-8") == reason:
            return
    except (OSError, ValueError):
        pass
    log.warning(
        "The allocator is replayed in Python: %s. Answers are the same and take longer.", reason
    )
    try:
        _made_private(heard.parent)
        beside = heard.with_suffix(f".{os.getpid()}")
        beside.write_text(reason, encoding="utf-8")
        os.replace(beside, heard)
    except OSError:  # then it is said again the next time
        pass
