"""What took long is kept: going back to earlier settings, or a slip, costs seconds.

Snakemake deletes a rule's outputs before the rule runs again, and those of a job that failed. So the outputs of a
long job are also laid aside in a folder named after everything that shaped them, and put back when the same is asked
for again. The folder may be deleted at any time; then the work is done again.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import atomic_folder, atomic_open, digest, read_report
from dryfit.common.terminal import log


class ResultCache:
    """The outputs of one job, laid aside.

    Parameters
    ----------
    folder
        Where all jobs of the kind lay their outputs aside.
    state
        What shaped them: settings, digests of inputs and code; as JSON has it.
    report
        The output that :func:`dryfit.common.files.write_report` wrote; it lists the others.
    others
        The other outputs, with file names that differ.
    """

    def __init__(
        self, folder: Path, state: Mapping[str, Any], report: Path, others: list[Path]
    ) -> None:
        self.folder = folder / digest(state)
        self.report, self.others = report, others

    def restore(self) -> bool:
        """Copy what was laid aside to its places, the report last; False where there is nothing, or it is damaged."""
        if not self.folder.is_dir():
            return False
        try:
            read_report(
                self.folder / self.report.name, *(self.folder / path.name for path in self.others)
            )
        except UserError as error:
            log.warning("Ignoring the kept result in %s: %s", self.folder, error.problem)
            return False
        for path in (*self.others, self.report):
            with open(self.folder / path.name, "rb") as source, atomic_open(path, "wb") as target:
                shutil.copyfileobj(source, target)
        log.info(
            "Results of an earlier run restored from %s (delete that folder to compute them again)",
            self.folder,
        )
        return True

    def store(self) -> None:
        """Copy the finished outputs; a full disk costs the copy, not the outputs."""
        try:
            with atomic_folder(self.folder) as partial:
                for path in (*self.others, self.report):
                    shutil.copyfile(path, partial / path.name)
        except OSError as error:
            log.warning("The results could not be kept in %s: %s", self.folder, error)
