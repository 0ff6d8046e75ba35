"""What each file of the results was made from: a record for each job, with the digests of what it read.

Snakemake compares times and settings, and only of what a command asks for. The ledger knows the rest: a card that was
made from a training that another command has since replaced, a split that a second run with the same dataset has
written anew, a shard that somebody has removed from a merged model. A record lies in ``.snakemake/made-from/`` and is
written by the job itself, after its outputs. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from scripts.common.contents import content_digest, remember
from will_it_fit.common.errors import UserError
from will_it_fit.common.files import read_json, sealed_files

HOME = Path(".snakemake")
RESULTS = "results/"
BY_HAND = (".md", ".html")  # documents, which a person may go on with


@dataclass(frozen=True)
class Record:
    """What one job has left.

    Attributes
    ----------
    outputs
        The files that its rule declares.
    inputs
        Digests of the files below ``results/`` that it read, by path.
    sealed
        Digests of the files that its reports vouch for, and of these reports, by path.
    reports
        For each of the sealed files the report that lists it.
    """

    outputs: tuple[str, ...]
    inputs: dict[str, str | None]
    sealed: dict[str, str]
    reports: dict[str, str]
    written_nanoseconds: int


def record(inputs: Iterable[object], outputs: Iterable[object]) -> None:
    """Note what a job that has just ended has made from what; outputs that are not results are left out."""
    made = [str(path) for path in outputs if str(path).startswith(RESULTS)]
    if not made or not HOME.is_dir():
        return
    sealed: dict[str, str] = {}
    reports: dict[str, str] = {}
    for report in (path for path in made if path.endswith(".json")):
        for path, digest in sealed_files(report, made).items():
            if path.endswith(BY_HAND):
                continue
            remember(path, digest)
            sealed[path], reports[path] = digest, report
        sealed[report] = content_digest(report) or ""
        reports[report] = report
    read = {str(path): content_digest(path) for path in inputs if str(path).startswith(RESULTS)}
    value = {"inputs": read, "outputs": made, "reports": reports, "sealed": sealed}
    target = _place(made[0])
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(value, sort_keys=True), encoding="utf-8")
    partial.replace(target)


class Ledger:
    """All records of a working directory, as they are now."""

    def __init__(self) -> None:
        self.records = sorted(_read_all(), key=lambda record: record.written_nanoseconds)

    @cached_property
    def maker(self) -> dict[str, Record]:
        """The record that made each file, by path: the newest that names it."""
        return {path: record for record in self.records for path in (*record.outputs, *record.sealed)}

    def outdated(self, replaced: Iterable[str]) -> dict[str, str]:
        """Files whose inputs have changed since they were made, with the reason.

        Parameters
        ----------
        replaced
            Files that will be made again, or that an earlier command should have made again and did not.
        """
        replaced, found = set(replaced), {}
        for path in self.maker:
            if path not in replaced and os.path.exists(path) and (reason := self._reason(path, replaced, {})):
                found[path] = reason
        return found

    def _reason(self, path: str, replaced: set[str], known: dict[str, str | None]) -> str | None:
        """Why a file is outdated: an input is replaced, has changed, or is outdated itself; None where it is not."""
        if path not in known:
            known[path] = None  # Snakemake admits no circles; a broken ledger must not go round in one
            record = self.maker.get(path)
            for source, digest in (record.inputs if record else {}).items():
                if source in replaced:
                    known[path] = f"made from {source}, which will be made again"
                elif os.path.exists(source) and content_digest(source) != digest:
                    known[path] = f"made from {source}, which has changed since"
                elif self._reason(source, replaced, known):
                    known[path] = f"made from {source}, which is outdated"
                if known[path]:
                    break
        return known[path]

    def damaged(self, folders: Iterable[str]) -> dict[str, list[str]]:
        """Files of these folders that are gone or not what the step that made them has written, by their reports.

        What Snakemake makes again by itself is left out: outputs that are missing, and jobs that were killed.
        """
        found: dict[str, list[str]] = {}
        folders = tuple(f"{folder}/" for folder in folders)
        for record in self.records:
            if not record.outputs[0].startswith(folders) or any(map(self._incomplete, record.outputs)):
                continue
            for path, written in record.sealed.items():
                if self.maker[path] is not record:
                    continue
                report = record.reports[path]
                missing = not os.path.exists(path)
                if not os.path.exists(report) or (missing and path in record.outputs):
                    continue
                if missing or content_digest(path) != written:
                    found.setdefault(report, []).append(path)
        return found

    def _incomplete(self, path: str) -> bool:
        return (HOME / "incomplete" / base64.urlsafe_b64encode(path.encode()).decode()).exists()


def refuse_damaged(folders: Iterable[str]) -> None:
    """Raise where a product of these folders is missing or damaged, though Snakemake would call all up to date.

    Existence, and where size or times have changed the contents.
    """
    damaged = Ledger().damaged(folders)
    if not damaged:
        return
    paths = [path for some in damaged.values() for path in some]
    gone = [path for path in paths if not os.path.exists(path)]
    remove = dict.fromkeys([*(path for path in paths if path not in gone), *damaged])
    problem = "missing" if gone else "not what the steps that made them have written"
    raise UserError(
        f"Files of finished steps are {problem}, and all would pass as up to date.",
        where=", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else ""),
        found="missing" if len(gone) == len(paths) else "changed since, or damaged",
        allowed="the files as they were written, put back; or the steps run again",
        write=f"rm {' '.join(remove)}    # then the same command again: it makes them again",
    )


def _place(output: str) -> Path:
    """Where the record of a job lies, by its first output; names of files end at 255 bytes."""
    return HOME / "made-from" / f"{hashlib.sha256(output.encode()).hexdigest()[:32]}.json"


def _read_all() -> Iterator[Record]:
    for path in sorted((HOME / "made-from").glob("*.json")):
        try:
            value = read_json(path)
            yield Record(
                tuple(value["outputs"]), value["inputs"], value["sealed"], value["reports"], path.stat().st_mtime_ns
            )
        except (UserError, KeyError, TypeError, OSError):  # cut off by a full disk: as if there were none
            continue
