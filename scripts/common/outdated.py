"""What a run is about to replace must not pass for its result when the run ends half-way.

Documents are made in seconds and are gone before the first job starts. What costs time stays (going back to the
settings that it was made with needs it), and ``OUTDATED.txt`` at the top of its run names it until it has been made
anew. Nor may what nobody knows the origin of. Standard library only.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

from scripts.common.errors import UserError

NAME = "OUTDATED.txt"
HEAD = "These files belong to settings of before: the last command was to replace them and has not got there yet.\n"


def before(planned: Iterable[str], documents: Iterable[str]) -> None:
    """Remove the documents that will be written anew, and mark what else is planned and there.

    Parameters
    ----------
    planned
        Outputs of the jobs that are about to run, below ``results/<run>/``.
    documents
        Those of them that are cheap to make.
    """
    documents = set(documents)
    for path in documents:
        Path(path).unlink(missing_ok=True)
    _change({path for path in planned if path not in documents and Path(path).exists()}, set())


def after(made: Iterable[str]) -> None:
    """Take what has been made from the marks; a mark that names nothing any more goes."""
    _change(set(), set(made))


def refuse_unrecorded(paths: Iterable[str], home: Path = Path(".snakemake")) -> None:
    """Raise where results lie that Snakemake has no record of: an older version's, a copy without its ``.snakemake``.

    A record says what code and settings a file was made with. Without one Snakemake goes by times alone, and whatever
    lies there passes as up to date. A job that was killed has its file marked as incomplete, which is made anew.

    Parameters
    ----------
    paths
        Outputs, of which some may not be there.
    home
        Snakemake's folder.
    """
    if (home / "metadata.db").exists():  # its other way to keep records, which only it can read
        return
    for path in paths:
        record = base64.urlsafe_b64encode(str(path).encode()).decode()
        if Path(path).exists() and not any((home / kind / record).exists() for kind in ("metadata", "incomplete")):
            raise UserError(
                f"Results lie here that {home} has no record of; an older version's would pass as up to date.",
                where=path,
                allowed=f"results together with the {home} of the runs that made them, or none",
                write="mv results results.before  # if they are this version's: snakemake --cores 1 --touch --forceall",
            )


def _change(more: set[str], fewer: set[str]) -> None:
    for mark in {_mark_of(path) for path in more | fewer}:
        listed = set(mark.read_text(encoding="utf-8").splitlines()[1:]) if mark.is_file() else set()
        listed = {path for path in (listed | more) - fewer if _mark_of(path) == mark}
        if listed:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(HEAD + "".join(f"{path}\n" for path in sorted(listed)), encoding="utf-8")
        else:
            mark.unlink(missing_ok=True)


def _mark_of(path: str) -> Path:
    """The mark at the top of the run that a file belongs to."""
    parts = Path(path).parts
    return Path(*parts[: parts.index("results") + 2], NAME)
