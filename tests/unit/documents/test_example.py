"""docs/example/ shows what today's templates make of a finished run."""

import pytest

from tests.unit.documents import example


@pytest.mark.thorough
def test_the_committed_documents_are_those_of_todays_templates(tmp_path):
    example.write(tmp_path)
    names = [name for documents in example.DOCUMENTS.values() for name in documents]
    stale = [
        name
        for name in names
        if (tmp_path / name).read_bytes() != (example.EXAMPLE / name).read_bytes()
    ]
    assert not stale, (
        f"write them anew: python -m tests.unit.documents.example ({', '.join(stale)})"
    )


@pytest.mark.thorough
def test_every_figure_that_the_documents_show_is_there():
    shown = [
        (document.parent / place.split(")")[0]).resolve()
        for document in example.EXAMPLE.rglob("*.md")
        for place in document.read_text(encoding="utf-8").split("](")[1:]
        if place.split(")")[0].endswith(".png")
    ]
    assert len(shown) >= 4 and all(path.is_file() for path in shown)
