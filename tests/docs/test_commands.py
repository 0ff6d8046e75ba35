"""Every command block of README and its companions is run, as a person would: in one checkout, page after page.

Above a block that can't run whole here, a comment says what a person's machine has and this one may not::

    <!-- only planned: needs a GPU and the Hub -->      each `snakemake` gets --dry-run
    <!-- not run: tests/end_to_end does -->             and says where it is run instead
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end import chain
from tests.warm import launchers

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "dryfit/README.md",
    "CONTRIBUTING.md",
    "config/README.md",
    "config/screen/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
)
BLOCK = re.compile(
    r"(?:^<!-- (only planned|not run): (.+?) -->\n+)?^```(?:bash|sh|console)\n(.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """Commands of a page."""

    page: str
    line: int
    how: str | None
    why: str | None
    text: str

    @property
    def commands(self) -> str:
        """What is run: with ``only planned`` no job starts."""
        if self.how != "only planned":
            return self.text
        return re.sub(r"(?m)^(.*\bsnakemake\b[^#\n]*?)( *#.*)?$", r"\1 --dry-run", self.text)


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield Block(page, text.count("\n", 0, found.start()) + 1, *found.groups())


ALL = [block for page in PAGES for block in blocks(page)]
# `make test` plans what the first page shows.
CASES = [
    pytest.param(
        one,
        marks=[pytest.mark.thorough] if one.page != "README.md" else [],
        id=f"{one.page}:{one.line}",
    )
    for one in ALL
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout, as a person has one for all pages; the environment is the one that runs the tests."""
    folder = chain.checkout(tmp_path_factory.mktemp("pages"))
    for name in ("Makefile", "uv.lock"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / ".venv").symlink_to(Path(sys.prefix))
    return folder


@pytest.mark.parametrize("block", CASES)
def test_block_runs(block: Block, project: Path) -> None:
    if block.how == "not run":
        pytest.skip(f"{block.page}, line {block.line}: {block.why}")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    places = (launchers(environment), str(Path(sys.executable).parent), os.environ["PATH"])
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", block.commands],
        cwd=project,
        env={**environment, "PATH": os.pathsep.join(places)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (
        f"{block.page}, line {block.line}:\n{block.commands}\n{(done.stdout + done.stderr)[-4000:]}"
    )


def test_what_is_not_run_says_where_it_is() -> None:
    for block in ALL:
        assert block.how is None or len(block.why) > 10, f"{block.page}, line {block.line}"


def test_pages_name_files_that_are_there() -> None:
    """Links and paths in backticks: what lies in the repository is there."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        folder = (ROOT / page).parent
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (folder / link).exists(), f"{page} links to {link}"
        for path in re.findall(
            r"`((?:dryfit|validation|scripts|rules|config|docs|tests|envs|profiles)/[\w./-]+\w)`",
            text,
        ):
            assert (ROOT / path).exists() or any(
                (ROOT / path).parent.glob(Path(path).name + "*")
            ), f"{page} names {path}"


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and the site make them."""
    text = re.sub(
        r"^(`{3,}).*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links_name_headings_that_are_there() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", text):
            place = (ROOT / page).parent / target if target else ROOT / page
            assert anchor in headings(place), f"{page} links to {target}#{anchor}"
