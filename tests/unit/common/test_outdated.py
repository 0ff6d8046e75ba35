"""Old documents go and old work is marked before a run; the marks go when it is made anew."""

import pytest

from scripts.common import outdated


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "results" / "tiny-r4"
    (folder / "merged").mkdir(parents=True)
    for name in ("MODEL_CARD.md", "adapter.bin", "merged/manifest.json"):
        (folder / name).write_text("old")
    return folder


def test_documents_go_and_the_rest_is_marked_until_it_is_made(run):
    card, adapter, merged, new = (
        str(run / name) for name in ("MODEL_CARD.md", "adapter.bin", "merged/manifest.json", "evaluation.json")
    )
    outdated.before([card, adapter, merged, new], [card])
    mark = run / outdated.NAME
    assert not (run / "MODEL_CARD.md").exists()
    assert mark.read_text().splitlines()[1:] == [adapter, merged], "what is not there needs no mark"
    outdated.after([adapter])  # a run with a nearer target
    assert mark.read_text().splitlines()[1:] == [merged]
    outdated.after([merged])
    assert not mark.exists()
