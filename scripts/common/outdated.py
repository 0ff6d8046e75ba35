"""What a run is about to replace, or was made from what has been replaced, must not pass for its result.

Documents are made in seconds and are gone before the first job of a run that makes them again. What costs time stays
(going back to the settings that it was made with needs it), and ``OUTDATED.txt`` at the top of its folder names it
until it has been made again. It names the documents of other runs too whose provenance lists a file that is another
now, since they share a dataset or a base model. Standard library only.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from dryfit.common.files import write_text
from scripts.common.contents import content_digest

NAME = "OUTDATED.txt"
HEAD = "These files were made with earlier settings or data; they are listed here until they are made again.\n"
AGAIN = "should have been made again"
SHARED = (
    "dataset",
    "evaluation",
    "memory",
    "models",
)  # folders of results/ that hold one folder for each name
RECORDS = (
    "provenance.json",
    "sweep.json",
)  # list what a run's, or a sweep's, documents were made from
# What a run makes one out of the other, the first first.
CHAIN = (
    "training.json",
    "merged.json",
    "merged-verification.json",
    "evaluation/answers.jsonl",
    "evaluation/metrics.json",
    "evaluation/comparison.json",
)


def before(planned: Iterable[str], documents: Iterable[str], current: Iterable[str] = ()) -> None:
    """Remove planned documents; mark the other planned outputs that exist, and what was made from them.

    Parameters
    ----------
    planned
        Outputs of the jobs that are about to run, below ``results/``.
    documents
        Those of them that are cheap to make.
    current
        Outputs that Snakemake has just found to be up to date.
    """
    documents = set(documents)
    for path in documents:
        Path(path).unlink(missing_ok=True)
    there = {path for path in planned if path not in documents and Path(path).exists()}
    for path in tuple(there):
        there |= set(_later(path))
    _mark(_waiting() - set(current) | there)


def after(made: Iterable[str] = ()) -> list[str]:
    """Bring the marks up to date after a run, whether it has got to its end or not; returns them.

    ``made``: outputs of the jobs that have ended well.
    """
    return _mark(_waiting() - set(made))


def folder_of(path: str) -> str:
    """The folder of the results that a file belongs to: its run's, its dataset's, its model's."""
    parts = Path(path).parts
    return "/".join(parts[: 3 if parts[1] in SHARED else 2])


def _later(path: str) -> Iterator[str]:
    """What a run has made out of one of its files."""
    folder = folder_of(path)
    name = path.removeprefix(f"{folder}/")
    for later in CHAIN[CHAIN.index(name) + 1 :] if name in CHAIN else ():
        if Path(folder, later).exists():
            yield f"{folder}/{later}"


def _marks() -> Iterator[Path]:
    for pattern in ("*", "*/*"):
        yield from Path("results").glob(f"{pattern}/{NAME}")


def _waiting() -> set[str]:
    """Outputs that should have been made again and were not yet, by the marks."""
    lines = [
        line.partition("  # ")
        for mark in _marks()
        for line in mark.read_text(encoding="utf-8").splitlines()
    ]
    return {path for path, _, reason in lines if reason == AGAIN}


def _made_from_others(waiting: set[str]) -> Iterator[tuple[str, str]]:
    """Files of runs whose record lists a file that waits or is another now, each with the reason."""
    for record in (path for name in RECORDS for path in Path("results").glob(f"*/{name}")):
        try:
            value = json.loads(record.read_text(encoding="utf-8"))
            read = {**value["inputs"], **value.get("outputs", {})}
        except (OSError, ValueError, KeyError):  # whoever reads it says that it is damaged
            continue
        for path, entry in read.items():
            if path in waiting:
                reason = f"made from {path}, which will be made again"
            elif Path(path).exists() and content_digest(path) != entry["sha256"]:
                reason = f"made from {path}, which has changed since"
            else:
                continue
            folder = record.parent
            documents = (*folder.glob("*.md"), *folder.glob("*.html"), *folder.glob("docs/*.md"))
            yield from ((str(document), reason) for document in documents)
            first = f"{folder}/{CHAIN[0]}"
            if path.startswith(("results/dataset/", "results/models/")):
                later = [first, *_later(first)]
            else:
                later = _later(path) if folder_of(path) == str(folder) else ()
            yield from ((name, reason) for name in later if Path(name).exists())


def _mark(waiting: set[str]) -> list[str]:
    """Write the marks for what waits, and for what was made from it; remove the others."""
    reasons = dict.fromkeys(waiting, AGAIN)
    for path, reason in _made_from_others(waiting):
        reasons.setdefault(path, reason)
    marks: dict[Path, list[str]] = {}
    for path in sorted(reasons):
        marks.setdefault(Path(folder_of(path), NAME), []).append(f"{path}  # {reasons[path]}\n")
    for old in {*_marks()} - marks.keys():
        old.unlink()
    for mark, lines in marks.items():
        write_text(mark, HEAD + "".join(lines))
    return sorted(map(str, marks))
