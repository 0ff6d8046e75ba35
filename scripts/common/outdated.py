"""What a run is about to replace, or was made from what has been replaced, must not pass for its result.

Documents are made in seconds and are gone before the first job of a run that makes them again. What costs time stays
(going back to the settings that it was made with needs it), and ``OUTDATED.txt`` at the top of its folder names it
until it has been made again. So it does with all that the ledger (:mod:`scripts.common.made_from`) knows to have been
made from such files, in whichever run. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dryfit.common.files import write_text
from scripts.common.made_from import HOME, Ledger

NAME = "OUTDATED.txt"
HEAD = "These files were made with earlier settings or data; they are listed here until they are made again.\n"
SHARED = ("dataset", "evaluation", "memory", "models")  # folders of results/ that hold one folder for each name


def before(planned: Iterable[str], documents: Iterable[str], current: Iterable[str] = ()) -> None:
    """Remove planned documents; mark the other planned outputs that exist, and all that was made from them.

    Parameters
    ----------
    planned
        Outputs of the jobs that are about to run, below ``results/``.
    documents
        Those of them that are cheap to make.
    current
        Outputs that Snakemake has just found to be up to date.
    """
    documents, ledger = set(documents), Ledger()
    for path in documents:
        Path(path).unlink(missing_ok=True)
    waiting = _waiting(ledger)
    for path in current:
        waiting.pop(path, None)
    there = {path: _written(ledger, path) for path in planned if path not in documents and Path(path).exists()}
    _mark({**waiting, **there}, ledger)


def after(made: Iterable[str] = ()) -> list[str]:
    """Bring the marks up to date after a run, whether it has got to its end or not; returns them.

    ``made``: outputs of jobs that have ended well, for those whose record lies on another machine.
    """
    ledger, made = Ledger(), set(made)
    return _mark({path: written for path, written in _waiting(ledger).items() if path not in made}, ledger)


def _waiting(ledger: Ledger) -> dict[str, int]:
    """Outputs that should have been made again and were not yet, each with the time of its old record."""
    try:
        kept = json.loads((HOME / "outdated.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    return {path: written for path, written in kept.items() if written == _written(ledger, path)}


def _written(ledger: Ledger, path: str) -> int:
    record = ledger.maker.get(path)
    return record.written_nanoseconds if record else 0


def _mark(waiting: dict[str, int], ledger: Ledger) -> list[str]:
    """Write what is waiting, and the marks that follow of it; remove the others."""
    if waiting or (HOME / "outdated.json").exists():
        write_text(HOME / "outdated.json", json.dumps(waiting, indent=2, sort_keys=True))
    reasons = {path: "should have been made again" for path in waiting if Path(path).exists()} | ledger.outdated(
        waiting
    )
    marks: dict[Path, list[str]] = {}
    for path in sorted(reasons):
        marks.setdefault(_mark_of(path), []).append(f"{path}  # {reasons[path]}\n")
    for old in {*Path("results").glob(f"*/{NAME}"), *Path("results").glob(f"*/*/{NAME}")} - marks.keys():
        old.unlink()
    for mark, lines in marks.items():
        write_text(mark, HEAD + "".join(lines))
    return sorted(map(str, marks))


def folder_of(path: str) -> str:
    """The folder of the results that a file belongs to: its run's, its dataset's, its model's."""
    parts = Path(path).parts
    return "/".join(parts[: 3 if parts[1] in SHARED else 2])


def _mark_of(path: str) -> Path:
    return Path(folder_of(path), NAME)
