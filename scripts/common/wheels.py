"""Wheels as data: fetched from PyPI by their digest, not installed; none of their code runs, dependencies stay away."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from scripts.common.errors import UserError
from scripts.common.job import log


def download_wheel(requirement: str, sha256: str, folder: Path, key: str, otherwise: str = "") -> Path:
    """Let pip fetch the one wheel that has this digest; pip knows the user's index, proxy and certificates.

    Parameters
    ----------
    requirement, sha256
        The package, pinned (``name==version``), and the wheel's digest.
    folder
        Where to put it.
    key
        The section of the configuration that names it, for messages.
    otherwise
        What can be written instead, for messages.

    Raises
    ------
    UserError
        When there is no such wheel, no index in reach, or no room on the disk.
    """
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(folder), "--requirement", str(pinned)]
    # Its own temporary files there too: they go with the folder, also when this process is killed.
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    if run.returncode:
        log.info("%s", run.stderr)
        if "No space left on device" in run.stderr:
            raise UserError(
                f"The disk filled up while pip fetched {requirement}.",
                where=folder.parent,
                allowed="free some space (the wheel and what is unpacked from it), and run the same command again",
            )
        reason = next((line for line in reversed(run.stderr.splitlines()) if line.startswith("ERROR")), "see the log")
        raise UserError(
            f"pip could not fetch {requirement}: {reason}",
            where=f"{key} in the configuration",
            found=requirement,
            allowed=f"a release on PyPI whose wheel has the digest in {key}.sha256; a reachable index{otherwise}",
        )
    return next(folder.glob("*.whl"))


def licence(archive: zipfile.ZipFile) -> bytes:
    """The text of the licences that a wheel carries."""
    names = [name for name in archive.namelist() if ".dist-info/" in name and "LICEN" in name.upper()]
    return b"\n".join(archive.read(name) for name in names)
