"""Packages as data: fetched from PyPI by their digest, not installed; dependencies stay away.

None of a wheel's code runs. Of a source distribution pip asks its name and version, so that its own ``setup.py`` runs,
after the digest has been compared.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from dryfit.common.errors import UserError
from dryfit.common.terminal import log

# What pip says when no index answers; it then goes on to say that there is no such release.
_UNREACHABLE = (
    "establish a new connection",
    "NameResolutionError",
    "ConnectTimeout",
    "Max retries",
    "ProxyError",
)


class Unreachable(UserError):
    """No index can be reached, so nobody knows whether the package exists."""


def download_wheel(
    requirement: str,
    sha256: str,
    folder: Path,
    key: str,
    otherwise: str = "",
    *,
    source: bool = False,
) -> Path:
    """Let pip fetch the one file that has this digest; pip knows the user's index, proxy and certificates.

    Parameters
    ----------
    requirement, sha256
        The package, pinned (``name==version``), and the wheel's digest.
    key
        The section of the configuration that names it, for messages.
    otherwise
        What can be written instead, for messages.
    source
        Whether it is a source distribution and no wheel.

    Raises
    ------
    UserError
        When there is no such file or no room on the disk; :class:`Unreachable` when there is no index in reach.
    """
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += [
        f"--{'no' if source else 'only'}-binary=:all:",
        "--require-hashes",
        "--dest",
        str(folder),
    ]
    command += ["--requirement", str(pinned)]
    # Its own temporary files there too: they go with the folder, also when this process is killed.
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)}
    )
    if run.returncode:
        log.info("%s", run.stderr)
        if "No space left on device" in run.stderr:
            raise UserError(
                f"The disk filled up while pip fetched {requirement}.",
                where=folder.parent,
                allowed="free some space (the wheel and what is unpacked from it), and run the same command again",
            )
        reason = next(
            (line for line in reversed(run.stderr.splitlines()) if line.startswith("ERROR")),
            "see the log",
        )
        file = "archive" if source else "wheel"
        kind = Unreachable if any(words in run.stderr for words in _UNREACHABLE) else UserError
        raise kind(
            f"pip could not fetch {requirement}: {reason}",
            where=f"{key} in the configuration",
            found=requirement,
            allowed=f"a release on PyPI whose {file} has the digest in {key}.sha256; a reachable index{otherwise}",
        )
    return next(folder.glob("*.tar.gz" if source else "*.whl"))


def licence(archive: zipfile.ZipFile) -> bytes:
    """The text of the licences that a wheel carries."""
    names = [
        name for name in archive.namelist() if ".dist-info/" in name and "LICEN" in name.upper()
    ]
    return b"\n".join(archive.read(name) for name in names)
