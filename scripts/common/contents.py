"""Digests of files' contents, remembered for as long as the file system says that a file is the same.

The content of a file decides whether something is made again or was damaged, and never its time: ``cp -p``,
``rsync -t`` and ``tar`` leave times that lie. To read gigabytes at each start would take minutes, so a digest is kept
in ``.snakemake/contents.json`` with the file's size and its times of change (the second, ``ctime``, can't be set back).
Standard library only.
"""

import atexit
import hashlib
import json
import os
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from dryfit.common.files import digest, sealed_files, sha256_file, write_json

STORE = Path(".snakemake", "contents.json")
# A file that changed less than this ago may change again within the same tick of the clock: its digest is not kept.
UNSETTLED_NANOSECONDS = 50_000_000
SAMPLES, SAMPLE_BYTES = 256, 2**16  # of a file of weights


def content_digest(path: str | os.PathLike) -> str | None:
    """SHA-256 of a file's bytes; for a folder of the report that lists its files; None where it can't be read."""
    try:
        path = f"{path}.json" if os.path.isdir(path) else path
        state, known = _state(path), _remembered(STORE.absolute())
        kept = known.get(os.fspath(path))
        if kept is not None and kept[:-1] == state:
            return kept[-1]
        digest = sha256_file(path)
    except OSError:
        return None
    remember(path, digest)
    return digest


def remember(path: str | os.PathLike, digest: str) -> None:
    """Keep a digest that is known, of a file as it lies there now."""
    state = _state(path)
    if time.time_ns() - max(state[1:]) > UNSETTLED_NANOSECONDS:
        _remembered(STORE.absolute())[os.fspath(path)] = [*state, digest]


def remember_written(outputs: Iterable[object]) -> None:
    """Keep the digests that a job's reports state of what it has just written: nobody reads gigabytes once more."""
    for report in (path for path in map(str, outputs) if path.endswith(".json")):
        for path, written in sealed_files(report).items():
            if path.exists():
                remember(path, written)


def job_digest(code: str, inputs: Iterable[str]) -> str:
    """One text of what a job computes with: its code, and the files that no job makes.

    It is the same before and after other jobs have made the rest of its inputs.
    """
    given = [path for path in inputs if not path.startswith(("results/", ".snakemake/"))]
    if not given:
        return code
    # Names and contents, and not where the files lie.
    files = digest(sorted((Path(path).name, content_digest(path)) for path in given))
    return f"{code}, reads {files}"


def missing_inputs(inputs: Iterable[str]) -> str:
    """Which inputs of a job are not there, as one text.

    While Snakemake plans, this tells a result whose input a failed job (or a person) has removed from one that is up
    to date. When the job runs its inputs are there, and that is what is recorded.
    """
    missing = []
    for path in inputs:
        if not os.path.exists(path) and not path.startswith(".snakemake/"):
            missing.append(path)
    return f"missing: {', '.join(missing) or 'nothing'}"


def folder_digest(folder: str | os.PathLike, patterns: Iterable[str]) -> str | None:
    """One digest of the files of a folder that match; None where there is no such folder.

    Of weights, which may be hundreds of gigabytes, their size and samples throughout the file: other weights differ in
    every sample, whatever time they carry.
    """
    if not Path(folder).is_dir():
        return None
    files = sorted(
        {file for pattern in patterns for file in Path(folder).glob(pattern) if file.is_file()}
    )
    return digest(
        [
            (file.name, _sampled(file) if file.suffix == ".safetensors" else content_digest(file))
            for file in files
        ]
    )


def _sampled(path: Path) -> str:
    size, sha256 = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as handle:
        for start in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
            handle.seek(start)
            sha256.update(handle.read(SAMPLE_BYTES))
    return f"{size} {sha256.hexdigest()}"


def _state(path: str | os.PathLike) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


@cache
def _remembered(store: Path) -> dict[str, list]:
    """What is known by path; written when the process ends, with what others have written meanwhile."""
    known = _read(store)
    before = dict(known)

    def save() -> None:
        if known != before and store.parent.is_dir() and os.access(store.parent, os.W_OK):
            home = store.parent.parent
            both = {
                path: kept
                for path, kept in {**_read(store), **known}.items()
                if (home / path).exists()
            }
            write_json(store, both, indent=None)

    atexit.register(save)
    return known


def _read(store: Path) -> dict[str, list]:
    try:
        return json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut off
        return {}
