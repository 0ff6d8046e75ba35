"""Files of the results that are not what their step has written, found by the reports at each start.

A step's report lists what the step wrote (:func:`dryfit.common.files.write_report`), and each step checks what it
reads. This finds what no step would read: a figure with a flipped byte, a merged model without one of its shards.
Standard library only.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from dryfit.common.errors import UserError
from dryfit.common.files import sealed_files
from scripts.common.contents import content_digest

BY_HAND = (".md", ".html")  # documents, which a person may go on with
NO_RESULTS = ("kept", "checkpoints")  # checked by who reads them


def refuse_damaged(folders: Iterable[str]) -> list[str]:
    """Raise where a file of these folders is not what its step has written, though Snakemake calls it up to date.

    Returns the documents that differ from what was written: a person may go on with these. A missing output is no
    damage: Snakemake makes it again.
    """
    changed = {report: paths for folder in folders for report, paths in _changed(Path(folder))}
    no_documents = {
        report: [path for path in paths if path.suffix not in BY_HAND]
        for report, paths in changed.items()
    }
    damaged = {report: paths for report, paths in no_documents.items() if paths}
    if not damaged:
        return sorted(str(path) for paths in changed.values() for path in paths)
    paths = [path for some in damaged.values() for path in some]
    gone = [path for path in paths if not path.exists()]
    remove = dict.fromkeys([*(path for path in paths if path not in gone), *damaged])
    problem = "missing" if gone else "not what the steps that made them have written"
    raise UserError(
        f"Files of finished steps are {problem}, but Snakemake would take these steps as up to date.",
        where=", ".join(map(str, paths[:5]))
        + (f" and {len(paths) - 5} more" if len(paths) > 5 else ""),
        found="missing" if len(gone) == len(paths) else "changed since, or damaged",
        allowed="the files as they were written, put back; or the steps run again",
        write=f"rm {' '.join(map(str, remove))}    # then the same command again: it makes them again",
    )


def _changed(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each report of a folder with those of its files, or itself, that are not as they were written."""
    known: set[Path] = set()
    for report in sorted(folder.rglob("*.json")):
        if set(NO_RESULTS) & set(report.parts) or (
            report in known and b'"sha256"' not in report.read_bytes()
        ):
            continue  # a tokenizer, say, of megabytes that a model's report lists
        try:
            listed = sealed_files(report)
        except UserError:
            yield report, [report]
            continue
        known |= listed.keys()
        if paths := [path for path, digest in listed.items() if content_digest(path) != digest]:
            yield report, paths
