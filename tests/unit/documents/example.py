"""The documents of a finished run, as docs/example/ shows them: its JSON, its figures, what templates make of these.

    make run && python -m tests.unit.documents.example take     # of the default run, in the project's folder
    python -m tests.unit.documents.example                      # the documents anew, after a template has changed

``run.json`` has what the documents read, with timelines of few points, which the figures show and no text prints.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from dryfit.common.files import read_json, write_json
from scripts.documents import render
from tests.repository import ROOT
from tests.unit.documents.record import few_points, read_by_documents

EXAMPLE = ROOT / "docs" / "example"
DOCUMENTS = {
    "MODEL_CARD.md": ("MODEL_CARD.md", "docs/details.md", "docs/publication.md"),
    "memory-profile.md": ("docs/memory-profile.md", "planner.html"),
}


def take() -> None:
    """Keep what the default run's documents in the working directory were made from."""
    keep(*read_by_documents(Path("config/config.yaml")))


def keep(
    paths: dict[str, Any], contents: dict[str, Any], settings: dict[str, Any], figures: list[str]
) -> None:
    """Write ``run.json`` and the figures."""
    content = {"files": _shorter(contents), "paths": paths, "settings": settings}
    write_json(EXAMPLE / "run.json", content, indent=None)
    shutil.rmtree(EXAMPLE / "figures", ignore_errors=True)
    (EXAMPLE / "figures").mkdir()
    for figure in figures:
        shutil.copy(figure, EXAMPLE / "figures")


def _shorter(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: few_points(one) if key == "timeline" else _shorter(one)
            for key, one in value.items()
        }
    return [_shorter(one) for one in value] if isinstance(value, list) else value


def write(target: Path) -> None:
    """Render the documents of ``run.json`` into a folder, by today's templates."""
    kept = read_json(EXAMPLE / "run.json")
    paths, settings = kept["paths"], kept["settings"]
    validation = "validation/data/validation.json"
    content = {**kept["files"], "validation": [read_json(ROOT / validation)]}
    paths = {**paths, "validation": [validation]}
    folder, templates = Path("results", settings["run"]), ROOT / "config" / "templates"
    files = {name: render.with_sources(content[name], paths[name]) for name in content}
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            shutil.copytree(EXAMPLE / "figures", folder / "figures")
            figures = sorted(map(str, folder.glob("figures/*.png")))
            for documents in DOCUMENTS.values():
                listed = folder / f"{Path(documents[0]).stem}.json"
                render.write_documents(
                    [str(templates / f"{Path(name).name}.j2") for name in documents],
                    render.derive(files, render.from_rule(settings), paths),
                    figures,
                    [*(str(folder / name) for name in documents), str(listed)],
                )
                for name in documents:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / name, target / name)
        finally:
            os.chdir(before)


def main() -> None:
    """Command line."""
    if "take" in sys.argv[1:]:
        take()
    write(EXAMPLE)


if __name__ == "__main__":
    main()
