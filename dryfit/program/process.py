"""Runs a program in a process of its own, with limits: somebody else's code gets no more of this machine than it needs.

It works in a shadow of the folder that it was asked in: folders are made anew, small files copied, large ones linked.
So it finds its data, and what it writes does not come between the files of its author. What it gives up where the
platform allows it is in :mod:`.confinement`: the network, and files elsewhere to write.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.versions import INSTALL_TRACE, can_trace

from .confinement import caches
from .request import ProgramRequest

MODULE = "dryfit.program.child"
END_SECONDS = 5  # that a process gets to end those that its program has started
GRACE_SECONDS = 60  # after its own limit a process is killed
FIRST_SECONDS, REPEATED_SECONDS = 2, 30  # until a line of progress, and until it is said again
COPIED_BYTES = 2**20  # files up to this size are copied into the shadow, larger ones linked
MOST_FILES = 20_000  # of a folder that is shadowed
MOST_NEIGHBOURS = 1_000  # files and folders beside it
_LEFT_OUT = frozenset((".git", "__pycache__", "node_modules", ".venv", "wandb"))


def run(asked: ProgramRequest, output: Any = None, label: str = "") -> dict[str, Any]:
    """Run a program; what :mod:`.child` found, and what the run took of this machine.

    A program that runs out of the card's memory and does not go on runs once more, on a card without a border: so the
    answer says what it needs.

    ``written``: files that it wrote in its folder; ``held``: what it had given up (:class:`.confinement.Held`);
    ``host``: the most memory of its process in bytes, and seconds.

    ``output``: where the program's own output goes; None: to standard error. ``label``: which of several runs this is,
    for the lines of progress.

    Raises :class:`UserError` if the folder is too large to be shadowed, or PyTorch is not installed.
    """
    if not can_trace():
        raise UserError(
            "A program is followed with PyTorch and its packages, and some of them are not installed.",
            where=asked.program,
            allowed="the environment that trains, with dryfit in it",
            write=INSTALL_TRACE,
        )
    found = _run_once(asked, output, Progress(label or asked.program))
    if found.get("ran_out") and (found["outcome"] == "failed" or not found.get("updates")):
        again = Progress(
            f"{label or asked.program}, once more without a border, to see what it needs"
        )
        again.say(f"the card's memory ran out at {found['ran_out'][-1]}")
        return _run_once(replace(asked, runs_out=False), output, again)
    return found


class Progress:
    """Lines on standard error about a program that runs: one after two seconds, then where something has happened."""

    def __init__(self, label: str) -> None:
        self._label, self._began, self._told, self._last = label, time.monotonic(), "", 0.0

    def tick(self, stand: Path) -> None:
        """Tell what the process has written of itself, if there is something new."""
        now = time.monotonic() - self._began
        with suppress(OSError):
            text = (
                stand.read_text(encoding="utf-8") if stand.exists() else "Python and PyTorch start"
            )
            long_ago = now - self._last >= (
                FIRST_SECONDS if text != self._told else REPEATED_SECONDS
            )
            if now >= FIRST_SECONDS and long_ago:
                self.say(text)
                self._told, self._last = text, now

    def say(self, text: str) -> None:
        """A line."""
        seconds = time.monotonic() - self._began
        print(f"dryfit: {self._label}: {text} ({seconds:.0f} s)", file=sys.stderr, flush=True)


def _run_once(asked: ProgramRequest, output: Any, progress: Progress) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dryfit-") as place:
        request, result = Path(place, "request.json"), Path(place, "result.json")
        folder = Path.cwd() if asked.in_place else Path(place, "around", Path.cwd().name or "root")
        if not asked.in_place:
            shadow(Path.cwd(), folder)
            link_neighbours(Path.cwd(), folder)
            for name, text in asked.files.items():
                (folder / name).unlink()  # a large one is a link
                (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        before = _state(folder)
        Path(place, "tmp").mkdir()
        kept, led = caches(Path(place, "tmp"))
        writable = (folder, Path(place), *map(Path, asked.writable), *kept)
        confined = replace(asked, writable=tuple(str(each.resolve()) for each in writable))
        request.write_text(confined.to_json(), encoding="utf-8")
        began = time.monotonic()
        _begin(asked, folder, [str(request), str(result)], led, output or sys.stderr, progress)
        found = _read(result)
        written = sorted(
            name for name, state in _state(folder).items() if before.get(name) != state
        )
        peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        host = {"peak_bytes": peak_bytes, "seconds": round(time.monotonic() - began, 1)}
        held = found.get("held") or {}
        network = (
            "allowed"
            if asked.network
            else "none"
            if held.get("network")
            else "could not be taken away"
        )
        return found | {"network": network, "written": written, "host": host}


def _begin(
    asked: ProgramRequest,
    folder: Path,
    words: list[str],
    led: dict[str, str],
    output: Any,
    progress: Progress,
) -> None:
    """Run the child to its end; ``led``: variables of its environment."""
    root = Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment |= {"TMPDIR": str(Path(words[0]).with_name("tmp")), **led}
    if not asked.network:
        environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    limits = asked.limits

    def prepare() -> None:
        for kind, size in (
            (resource.RLIMIT_DATA, limits.memory_bytes),
            (resource.RLIMIT_FSIZE, limits.file_bytes),
        ):
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(
                kind, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard)
            )
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    command = [sys.executable, "-P", "-m", MODULE, *words]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        preexec_fn=prepare,
        start_new_session=True,
    ) as process:
        try:
            ends = time.monotonic() + limits.seconds + GRACE_SECONDS
            while process.returncode is None and time.monotonic() < ends:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                progress.tick(Path(words[1]).with_suffix(".stand"))
        finally:
            _end(process)
    Path(words[1]).with_suffix(".status").write_text(str(process.returncode))


def _end(process: subprocess.Popen) -> None:
    """End a process and those that it started: told to end, it ends the others itself (`.confinement`)."""
    if process.returncode is None:
        os.kill(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(result: Path) -> dict[str, Any]:
    try:
        return json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        status = int(result.with_suffix(".status").read_text())
    return {"outcome": "killed", "status": status}


# --- the shadow of a folder ----------------------------------------------------------------------------------------


def shadow(folder: Path, into: Path) -> None:
    """Make a folder that looks like another.

    Raises :class:`UserError` if it has more files than :data:`MOST_FILES`.
    """
    count = 0
    for place, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        inside = into / Path(place).relative_to(folder)
        inside.mkdir(parents=True, exist_ok=True)
        for name in folders:
            if Path(place, name).is_symlink():
                (inside / name).symlink_to(Path(place, name).resolve())
        for name in files:
            count += 1
            if count > MOST_FILES:
                raise UserError(
                    f"The folder {folder} has more than {MOST_FILES:,} files, and the program works in a copy of it.",
                    allowed="a smaller folder, or --in-place: the program then writes where it would",
                    write="dryfit run --in-place ...",
                )
            _shadow_file(Path(place, name), inside / name)


def link_neighbours(folder: Path, shadowed: Path) -> None:
    """Link what lies beside a folder beside its shadow: many programs read ``../data``. Nothing is written there."""
    with suppress(OSError):  # a folder above that can't be read
        for neighbour in sorted(folder.parent.iterdir())[:MOST_NEIGHBOURS]:
            place = shadowed.with_name(neighbour.name)
            if neighbour != folder and not place.exists():
                place.symlink_to(neighbour)


def _shadow_file(file: Path, into: Path) -> None:
    try:
        if file.is_file() and file.stat().st_size <= COPIED_BYTES:
            shutil.copy2(file, into)
        else:
            into.symlink_to(file.resolve())
    except OSError:  # one that can't be read, a socket, a link to nothing
        pass


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of a folder's files, by their names within it."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in files:
            path = Path(place, name)
            if path.is_file():
                status = path.stat()
                found[str(path.relative_to(folder))] = status.st_size, status.st_mtime_ns
    return found
