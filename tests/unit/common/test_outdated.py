"""Old documents go, and old work is marked with all that follows of it, until it is made anew."""

import time
from pathlib import Path

import pytest

from dryfit.common.files import sha256_file, write_report
from scripts.common import outdated

SPLIT, TRAINING = "results/dataset/own/splits/split.json", "results/one-r4/training.json"
MERGED, CARD = "results/one-r4/merged.json", "results/one-r4/MODEL_CARD.md"
OTHERS = "results/two-r4/training.json"


def made(*paths, text=None):
    """A job that writes files."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or str(time.perf_counter_ns()))


def documented(folder, *sources, name="provenance.json", card="MODEL_CARD.md"):
    """The last jobs of a run: its record and its card."""
    inputs = {path: {"sha256": sha256_file(path)} for path in sources}
    write_report(f"results/{folder}/{name}", {"inputs": inputs})
    made(f"results/{folder}/{card}")


@pytest.fixture(autouse=True)
def chain(tmp_path, monkeypatch):
    """A run from its splits to its card, another run on the same splits, and a sweep of both."""
    monkeypatch.chdir(tmp_path)
    made(SPLIT, TRAINING, MERGED, OTHERS)
    documented("one-r4", SPLIT, TRAINING, MERGED)
    documented("two-r4", SPLIT, OTHERS)
    documented("one-sweep", TRAINING, OTHERS, name="sweep.json", card="SWEEP.md")
    outdated.after()
    assert not marks()


def marks():
    """The files that the marks name, by the folder of the mark."""
    found = {}
    for mark in sorted(Path("results").rglob(outdated.NAME)):
        head, *lines = mark.read_text().splitlines()
        assert head.startswith("These files were made with earlier settings")
        found[mark.parent.name] = [line.partition("  # ")[0] for line in lines]
    return found


SWEEP = {"one-sweep": ["results/one-sweep/SWEEP.md"]}


def test_documents_go_and_the_rest_is_marked_until_it_is_made():
    """The next command is killed after its first job, and then the one after it ends."""
    outdated.before([TRAINING, MERGED, CARD, "results/one-r4/new.json"], [CARD])
    assert not Path(CARD).exists()
    assert marks() == {"one-r4": [MERGED, TRAINING], **SWEEP}
    made(TRAINING)
    outdated.before([MERGED, CARD], [CARD], current=[TRAINING])
    assert marks()["one-r4"] == [MERGED]
    made(MERGED)
    documented("one-r4", SPLIT, TRAINING, MERGED)
    assert outdated.after([MERGED, CARD]) == ["results/one-sweep/OUTDATED.txt"]
    documented("one-sweep", TRAINING, OTHERS, name="sweep.json", card="SWEEP.md")
    assert outdated.after() == [] and not marks()


def test_what_a_nearer_target_leaves_behind_is_marked():
    outdated.before([TRAINING], [])
    old = Path(TRAINING).read_text()
    made(TRAINING)
    outdated.after([TRAINING])
    assert marks()["one-r4"] == [CARD, MERGED]
    made(TRAINING, text=old)  # the settings of before come back, and with them the same file
    outdated.before([], [], current=[TRAINING, MERGED, CARD])
    assert not marks()


def test_what_runs_share_marks_each_of_them():
    made(SPLIT)
    outdated.after()
    assert marks() == {
        "one-r4": [CARD, MERGED, TRAINING],
        "two-r4": ["results/two-r4/MODEL_CARD.md", OTHERS],
    }


def test_a_step_that_fails_leaves_what_comes_after_it_marked():
    """Snakemake takes the outputs of a failed job away; what it would have made later stays."""
    outdated.before([SPLIT, TRAINING], [])
    Path(SPLIT).unlink()
    outdated.after()
    assert set(marks()) == {"own", "one-r4", "two-r4", "one-sweep"}
    assert TRAINING in marks()["one-r4"]


def test_a_dataset_has_a_mark_of_its_own():
    outdated.before([SPLIT], [])
    assert marks()["own"] == [SPLIT]


def test_an_input_that_was_cleared_away_makes_nothing_outdated():
    Path(SPLIT).unlink()
    outdated.after()
    assert not marks()
