"""After ``kill -9``: the lock of a Snakemake that is dead goes, the lock of a living one stays.

Snakemake's lock is a few files below ``.snakemake/locks``, which outlive it and do not say whose they are. Beside
them, whoever works in a folder (Snakemake from the moment it reads the Snakefile, and each job) holds a shared
``flock`` on ``.snakemake/living``. The kernel gives that up when a process ends, however it ends. So an exclusive one
can be had only when nobody is at work, and then a lock that a Snakemake of this machine has recorded as its own is a
dead one's. Another workflow's locks in the folder, and another machine's, are never touched. Standard library only.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FOLDER = Path(".snakemake")


class WorkingDirectoryLock:
    """A lock on the working directory, which this Snakemake holds until its process ends."""

    def __init__(self) -> None:
        """Remove a dead Snakemake's lock; if it is not dead, say who is at work."""
        self._before = _locks()
        self._file = _open()
        if self._file is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self._before:
                print(_at_work(), file=sys.stderr)
        except OSError:  # a file system without it: nothing can be known
            return
        else:
            self._remove_the_dead()
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def record(self) -> None:
        """Note the lock that Snakemake has just taken as this process's own."""
        if self._file is not None:
            mine = {name: since for name, since in _locks().items() if self._before.get(name) != since}
            self._file.write(json.dumps({"host": socket.gethostname(), "locks": mine, "pid": os.getpid()}) + "\n")
            self._file.flush()

    def _remove_the_dead(self) -> None:
        """Called while nobody else is at work here."""
        self._file.seek(0)
        for line in self._file.read().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off: killed while it wrote, or a full disk
                continue
            dead = {name: since for name, since in record["locks"].items() if self._before.get(name) == since}
            if dead and record["host"] == socket.gethostname():
                for name in dead:
                    (FOLDER / "locks" / name).unlink(missing_ok=True)
                told = (
                    f"The Snakemake that had locked this folder (process {record['pid']}) was killed; its lock is gone."
                )
                print(told, file=sys.stderr)
        self._before = _locks()
        self._file.truncate(0)


@contextmanager
def at_work() -> Iterator[None]:
    """A job: it may go on when its Snakemake was killed, and then the folder is not free yet."""
    file = _open()
    try:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        pass
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _open() -> IO | None:
    if fcntl is None:
        return None
    try:
        FOLDER.mkdir(exist_ok=True)
        return open(FOLDER / "living", "a+", encoding="utf-8")
    except OSError:  # a folder that can't be written to
        return None


def _locks() -> dict[str, str]:
    """Snakemake's lock files, each with what tells it from one of the same name."""
    files = {path.name: path.stat() for path in (FOLDER / "locks").glob("*.lock")}
    return {name: f"{stat.st_ino} {stat.st_mtime_ns}" for name, stat in files.items()}


def _at_work() -> str:
    """Who holds the folder, as far as the kernel says (proc(5), /proc/locks)."""
    inode = (FOLDER / "living").stat().st_ino
    try:
        rows = [line.split() for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines()]
        pids = sorted(
            {int(row[4]) for row in rows if row[1] == "FLOCK" and row[5].endswith(f":{inode}")} - {os.getpid()}
        )
    except (OSError, IndexError, ValueError):
        pids = []
    who = f" (process {', '.join(map(str, pids))})" if pids else ""
    return (
        f"Another Snakemake, or a job that one has left behind, is at work in this folder{who}.\n"
        "  Wait until it has ended, or end it, and give the same command again: its lock then goes by itself.\n"
        "  (`snakemake --unlock` would take the lock from under it.)"
    )
