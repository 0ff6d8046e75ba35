"""What each file of the results was made from: a record for each job, with the digests of what it read.

Snakemake compares times and settings, and only of what a command asks for. The ledger knows the rest: a card that was
made from a training that another command has since replaced, a split that a second run with the same dataset has
written anew, a shard that somebody has removed from a merged model, a figure with a flipped byte. A record lies in
``.snakemake/made-from/`` and is written by the job itself, after its outputs. Results without a readable record are
refused: damage to them could not be seen. Standard library only.
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

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, sealed_files
from scripts.common.contents import content_digest, remember

HOME = Path(".snakemake")
FOLDER = "made-from"
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
        Digests by path: of the files that its reports list, of these reports, and of its other outputs.
    reports
        For each of the sealed files the report that lists it; the file itself where none does.
    """

    outputs: tuple[str, ...]
    inputs: dict[str, str | None]
    sealed: dict[str, str]
    reports: dict[str, str]
    written_nanoseconds: int


def record(inputs: Iterable[object], outputs: Iterable[object], *, adopted: bool = False) -> None:
    """Note what a job that has just ended has made from what; outputs that are not results are left out.

    ``adopted``: the files were there before, and somebody says that they are this version's (``--touch``). Then only
    what their reports list is sealed.
    """
    made = [str(path) for path in outputs if str(path).startswith(RESULTS)]
    if not made or not HOME.is_dir():
        return
    sealed: dict[str, str] = {}
    reports: dict[str, str] = {}
    for report in (path for path in made if path.endswith(".json") and os.path.exists(path)):
        try:
            listed = sealed_files(report, made)
        except UserError:
            if not adopted:
                raise
            continue
        for path, digest in listed.items():
            remember(path, digest)
            sealed[path], reports[path] = digest, report
        sealed[report] = content_digest(report) or ""
        reports[report] = report
    for path in () if adopted else made:
        if path not in sealed and not os.path.isdir(path) and (digest := content_digest(path)):
            sealed[path], reports[path] = digest, path
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
        self.unreadable: list[str] = []
        self.records = sorted(self._read_all(), key=lambda record: record.written_nanoseconds)

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
        replaced, reasons = set(replaced), {}
        for path in self.maker:
            if path not in replaced and os.path.exists(path) and (reason := self._reason(path, replaced, {})):
                reasons[path] = reason
        return reasons

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

        What Snakemake makes again by itself is left out: outputs that are missing, and jobs that were killed. So are
        documents: see :meth:`edited`.
        """
        return {
            report: kept
            for report, paths in self._changed(folders).items()
            if (kept := [path for path in paths if not path.endswith(BY_HAND)])
        }

    def edited(self, folders: Iterable[str]) -> list[str]:
        """Documents of these folders that somebody has gone on with, or that were damaged."""
        changed = [path for paths in self._changed(folders).values() for path in paths]
        return sorted(path for path in changed if path.endswith(BY_HAND) and os.path.exists(path))

    def unrecorded(self, paths: Iterable[str]) -> list[str]:
        """Those of these files that are there, and that no readable record names."""
        return [
            path for path in paths if path not in self.maker and os.path.exists(path) and not self._incomplete(path)
        ]

    def _changed(self, folders: Iterable[str]) -> dict[str, list[str]]:
        changed: dict[str, list[str]] = {}
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
                    changed.setdefault(report, []).append(path)
        return changed

    def _read_all(self) -> Iterator[Record]:
        for path in sorted((HOME / FOLDER).glob("*.json")):
            try:
                value = read_json(path)
                yield Record(
                    tuple(value["outputs"]), value["inputs"], value["sealed"], value["reports"], path.stat().st_mtime_ns
                )
            except (UserError, KeyError, TypeError, OSError):  # cut off by a full disk: as if there were none
                self.unreadable.append(str(path))

    def _incomplete(self, path: str) -> bool:
        return (HOME / "incomplete" / base64.urlsafe_b64encode(path.encode()).decode()).exists()


def refuse_damaged(folders: Iterable[str]) -> list[str]:
    """Raise where a product of these folders is missing or damaged, though Snakemake would call all up to date.

    Existence, and where size or times have changed the contents. Returns the documents that differ from what was
    written: a person may go on with these.
    """
    folders, ledger = list(folders), Ledger()
    damaged = ledger.damaged(folders)
    if not damaged:
        return ledger.edited(folders)
    paths = [path for some in damaged.values() for path in some]
    gone = [path for path in paths if not os.path.exists(path)]
    remove = dict.fromkeys([*(path for path in paths if path not in gone), *damaged])
    problem = "missing" if gone else "not what the steps that made them have written"
    raise UserError(
        f"Files of finished steps are {problem}, but Snakemake would take these steps as up to date.",
        where=", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else ""),
        found="missing" if len(gone) == len(paths) else "changed since, or damaged",
        allowed="the files as they were written, put back; or the steps run again",
        write=f"rm {' '.join(remove)}    # then the same command again: it makes them again",
    )


def refuse_unrecorded(paths: Iterable[str]) -> None:
    """Raise where no readable record says what a result was made from: damage to it could not be seen."""
    ledger = Ledger()
    unknown = ledger.unrecorded(paths)
    if not unknown:
        return
    places = [str(_place(path)) for path in unknown]
    remove = f"rm {' '.join(unknown)}" if len(unknown) <= 5 else "mv results results.before"
    cut = [place for place in places if place in ledger.unreadable] or ledger.unreadable
    raise UserError(
        "Nothing records what a result was made from, so damage to it could not be seen.",
        where=", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""),
        found=f"a record that can't be read: {', '.join(cut[:5])}" if cut else f"no record in {HOME / FOLDER}",
        allowed=f"results together with the {HOME} of the runs that made them; or the steps run again",
        write=f"{remove}    # then the same command again; if they are this version's and whole:"
        " snakemake --cores 1 --touch --forceall",
    )


def _place(output: str) -> Path:
    """Where the record of a job lies, by its first output; names of files end at 255 bytes."""
    return HOME / FOLDER / f"{hashlib.sha256(output.encode()).hexdigest()[:32]}.json"
