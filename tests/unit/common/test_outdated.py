"""Old documents go and old work is marked before a run; the marks go when it is made anew."""

import base64
from pathlib import Path

import pytest

from scripts.common import outdated
from scripts.common.errors import UserError


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


def test_results_that_snakemake_has_no_record_of_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["results/tiny-r4/training.json", "results/tiny-r4/MODEL_CARD.md"]
    outdated.refuse_unrecorded(paths)  # nothing is there
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    for kind, path in zip(("metadata", "incomplete"), paths, strict=True):
        with pytest.raises(UserError, match="no record of") as error:
            outdated.refuse_unrecorded(paths)
        assert path in str(error.value) and "--touch" in str(error.value)
        Path(".snakemake", kind).mkdir(parents=True)
        Path(".snakemake", kind, base64.urlsafe_b64encode(path.encode()).decode()).touch()
    outdated.refuse_unrecorded(paths)
