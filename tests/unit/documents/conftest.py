"""What tests of the documents stand on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.documents import render
from tests.unit.documents import inputs


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Render a document of a run whose JSON is the given content; returns its text."""
    monkeypatch.chdir(tmp_path)

    def written(
        name: str, content: dict[str, Any] | None = None, settings: dict[str, Any] | None = None
    ) -> str:
        content = content or inputs.files()
        run = inputs.RUN
        figures = [
            run / "figures" / f"{figure}.png"
            for figure in ("memory", "timeline", "training_curve", "evaluation")
        ]
        for figure in figures:
            figure.parent.mkdir(parents=True, exist_ok=True)
            figure.touch()
        given = {
            **inputs.write(Path("json"), content),
            "figures": [str(figure) for figure in figures],
        }
        templates = {
            "templates": [str(inputs.TEMPLATES / inputs.DOCUMENTS[name])],
            "macros": str(inputs.TEMPLATES / "macros.j2"),
        }
        outputs = [str(run / name), str(run / "documents.json")]
        render.main({**given, **templates}, settings or inputs.CARD_SETTINGS, outputs)
        return (run / name).read_text(encoding="utf-8")

    return written
