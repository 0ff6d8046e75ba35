"""Old documents go, and old work is marked with all that follows of it, until it is made anew."""

import base64
import time
from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import write_json, write_report
from scripts.common import made_from, outdated
from scripts.runs import around_jobs


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with Snakemake's folder."""
    monkeypatch.chdir(tmp_path)
    Path(".snakemake").mkdir()
    return tmp_path


def made(path, *sources, text=None):
    """A job that writes one file out of others."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text or str(time.perf_counter_ns()))
    made_from.record(sources, [path])


SPLIT, TRAINING = "results/dataset/own/splits/split.json", "results/one-r4/training.json"
MERGED, CARD = "results/one-r4/merged/manifest.json", "results/one-r4/MODEL_CARD.md"


@pytest.fixture
def chain():
    """A run from its splits to its card, and another run on the same splits."""
    made(SPLIT)
    made(TRAINING, SPLIT)
    made(MERGED, TRAINING)
    made(CARD, MERGED, SPLIT)
    made("results/two-r4/training.json", SPLIT)
    made("results/two-r4/MODEL_CARD.md", "results/two-r4/training.json")
    made("results/one-sweep/SWEEP.md", TRAINING, "results/two-r4/training.json")
    outdated.after()
    assert not marks()


def marks():
    """The files that the marks name, by the folder of the mark."""
    found = {}
    for mark in sorted(Path("results").rglob(outdated.NAME)):
        head, *lines = mark.read_text().splitlines()
        assert head.startswith("These files were made with earlier settings")
        found[str(mark.parent)] = [line.partition("  # ")[0] for line in lines]
    return found


def test_documents_go_and_the_rest_is_marked_until_it_is_made(chain):
    """The next command is killed after its first job, and then the one after it ends."""
    outdated.before([TRAINING, MERGED, CARD, "results/one-r4/new.json"], [CARD])
    assert not Path(CARD).exists()
    expected = {"results/one-r4": [MERGED, TRAINING], "results/one-sweep": ["results/one-sweep/SWEEP.md"]}
    assert marks() == expected
    made(TRAINING, SPLIT)
    outdated.before([MERGED, CARD], [CARD])
    assert marks()["results/one-r4"] == [MERGED]
    made(MERGED, TRAINING)
    made(CARD, MERGED)
    assert outdated.after() == ["results/one-sweep/OUTDATED.txt"]
    made("results/one-sweep/SWEEP.md", TRAINING, "results/two-r4/training.json")
    assert outdated.after() == [] and not marks()


def test_what_a_nearer_target_leaves_behind_is_marked(chain):
    outdated.before([TRAINING], [])
    old = Path(TRAINING).read_text()
    made(TRAINING, SPLIT)
    outdated.after()
    assert marks()["results/one-r4"] == [CARD, MERGED]
    made(TRAINING, SPLIT, text=old)  # the settings of before come back, and with them the same file
    outdated.after()
    assert not marks()


def test_what_runs_share_marks_each_of_them(chain):
    made(SPLIT)
    outdated.after()
    assert set(marks()) == {"results/one-r4", "results/two-r4", "results/one-sweep"}
    assert marks()["results/two-r4"] == ["results/two-r4/MODEL_CARD.md", "results/two-r4/training.json"]


def test_a_step_that_fails_leaves_what_comes_after_it_marked(chain):
    """Snakemake takes the outputs of a failed job away; what it would have made later stays."""
    outdated.before([SPLIT, TRAINING], [])
    Path(SPLIT).unlink()
    outdated.after()
    assert set(marks()) == {"results/one-r4", "results/two-r4", "results/one-sweep"}
    assert TRAINING in marks()["results/one-r4"]


def test_what_snakemake_finds_up_to_date_again_is_named_no_longer(chain):
    outdated.before([TRAINING], [])
    outdated.before([], [], current=[TRAINING])
    assert not marks()


def test_a_dataset_has_a_mark_of_its_own(chain):
    outdated.before([SPLIT], [])
    assert marks()["results/dataset/own"] == [SPLIT]


def test_an_input_that_was_cleared_away_makes_nothing_outdated(chain):
    Path(SPLIT).unlink()
    outdated.after()
    assert not marks()


# --- products that are missing or damaged -----------------------------------------------------------------


@pytest.fixture
def product():
    """A model's folder whose manifest vouches for its files, as a job leaves it."""
    merged = Path("results/one-r4/merged")
    merged.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors", "tokenizer.json"):
        (merged / name).write_bytes(name.encode() * 99)
    write_json(merged / "config.json", {})
    write_report(merged / "manifest.json", {}, *merged.iterdir())
    made_from.record([], [merged / "manifest.json", merged / "config.json"])
    check()
    return merged


def check():
    """What happens at each start of Snakemake."""
    made_from.refuse_damaged(["results/one-r4"])


def flip(path):
    """Sixty-four bytes become others."""
    content = bytearray(path.read_bytes())
    content[:64] = bytes(64)
    path.write_bytes(content)


SPOILT = {"a missing shard": Path.unlink, "flipped bytes": flip, "a cut": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("name", ["a.safetensors", "tokenizer.json"])
def test_a_damaged_product_is_not_up_to_date(product, spoil, name):
    spoil(product / name)
    with pytest.raises(UserError, match="as up to date") as error:
        check()
    assert f"{product / name}" in str(error.value) and f"{product}/manifest.json" in error.value.write
    made_from.refuse_damaged(["results/another-r4", "results/one-r"])  # folders that this command is not about
    (product / "manifest.json").unlink()  # as the message says: Snakemake makes it again
    check()


def test_a_damaged_report_is_not_up_to_date(product):
    (product / "manifest.json").write_text((product / "manifest.json").read_text().replace('"', "'", 1))
    with pytest.raises(UserError, match="manifest"):
        check()


def test_what_snakemake_makes_again_by_itself_is_no_damage(product):
    (product / "config.json").unlink()  # an output of the rule
    check()
    flip(product / "a.safetensors")
    incomplete = Path(
        ".snakemake/incomplete", base64.urlsafe_b64encode(str(product / "manifest.json").encode()).decode()
    )
    incomplete.parent.mkdir()
    incomplete.touch()  # a job that was killed
    check()


def test_a_touch_or_a_copy_is_no_damage(product):
    for path in product.iterdir():
        path.touch()
        path.chmod(0o600)
    check()


def test_a_card_may_be_edited_by_hand_and_the_start_says_so(capsys):
    made(CARD)
    write_report("results/one-r4/documents.json", {}, CARD)
    made_from.record([], [CARD, "results/one-r4/documents.json"])
    assert made_from.refuse_damaged(["results/one-r4"]) == []
    Path(CARD).write_text("mine")
    assert made_from.refuse_damaged(["results/one-r4"]) == [CARD]
    around_jobs.name_edited([CARD])
    assert f"or damaged: {CARD}. `rm` one" in capsys.readouterr().err
    Path(CARD).unlink()  # Snakemake makes it again
    assert made_from.refuse_damaged(["results/one-r4"]) == []


def test_a_figure_that_no_report_lists_is_sealed_too():
    figure = "results/one-r4/figures/memory.png"
    made(figure, text="a picture" * 9)
    check()
    flip(Path(figure))
    with pytest.raises(UserError, match="as up to date") as error:
        check()
    assert error.value.write.startswith(f"rm {figure} ")


# --- records that are missing or can't be read ------------------------------------------------------------

NO_RECORD = {"gone": Path.unlink, "cut": lambda path: path.write_text(path.read_text()[:300])}


@pytest.mark.parametrize("spoil", NO_RECORD.values(), ids=NO_RECORD)
def test_a_product_without_a_readable_record_is_refused(product, spoil):
    """Its damage would pass in silence: 64 inverted bytes of the merged model did."""
    manifest = str(product / "manifest.json")
    made_from.refuse_unrecorded([manifest, "results/one-r4/not-made-yet.json"])
    (record,) = Path(".snakemake/made-from").iterdir()
    spoil(record)
    flip(product / "a.safetensors")
    check()  # sees nothing
    with pytest.raises(UserError, match="damage to it could not be seen") as error:
        made_from.refuse_unrecorded([manifest])
    assert error.value.where == manifest and f"rm {manifest} " in error.value.write
    assert (str(record) in error.value.found) == record.exists()
    (product / "manifest.json").unlink()  # as the message says
    made_from.refuse_unrecorded([manifest])


def test_what_is_adopted_has_a_record_and_what_its_reports_list_is_sealed(product):
    """After `--touch`, and for jobs whose machine has no made_from."""
    (record,) = Path(".snakemake/made-from").iterdir()
    record.unlink()
    manifest, empty = str(product / "manifest.json"), "results/one-r4/figures/memory.json"
    Path(empty).parent.mkdir()
    Path(empty).touch()
    around_jobs.record_unrecorded([([], [manifest]), ([manifest], [empty])], touched=False)
    made_from.refuse_unrecorded([manifest, empty])
    check()
    flip(product / "a.safetensors")
    with pytest.raises(UserError, match="as up to date"):
        check()
