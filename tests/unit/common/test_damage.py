"""Results that are not what their steps have written."""

from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import write_json, write_report
from scripts.common.damage import refuse_damaged
from scripts.runs import around_jobs

RUN = "results/one-r4"
CARD, FIGURE = f"{RUN}/MODEL_CARD.md", f"{RUN}/figures/memory.png"


@pytest.fixture(autouse=True)
def product(tmp_path, monkeypatch):
    """A run with a model's folder, which a report beside it lists, and with documents."""
    monkeypatch.chdir(tmp_path)
    merged = Path(RUN, "merged")
    merged.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors", "tokenizer.json"):
        (merged / name).write_bytes(b'{"' + name.encode() * 99 + b'": 1}')
    write_json(merged / "config.json", {})
    write_report(f"{merged}.json", {}, *merged.iterdir())
    Path(FIGURE).parent.mkdir()
    for path in (CARD, FIGURE):
        Path(path).write_text("as it was written" * 9)
    write_report(f"{RUN}/documents.json", {}, CARD, FIGURE)
    assert refuse_damaged([RUN]) == []
    return merged


def flip(path):
    """Sixty-four bytes become others."""
    content = bytearray(path.read_bytes())
    content[:64] = bytes(64)
    path.write_bytes(content)


SPOILT = {
    "a missing shard": Path.unlink,
    "flipped bytes": flip,
    "a cut": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("name", ["a.safetensors", "tokenizer.json"])
def test_a_damaged_product_is_not_up_to_date(product, spoil, name):
    spoil(product / name)
    with pytest.raises(UserError, match="as up to date") as error:
        refuse_damaged([RUN])
    assert f"{product / name}" in str(error.value) and f"{product}.json" in error.value.write
    refuse_damaged(
        ["results/another-r4", "results/one-r"]
    )  # folders that this command is not about
    Path(f"{product}.json").unlink()  # as the message says: Snakemake makes it again
    if (
        spoil is Path.unlink or name != "tokenizer.json"
    ):  # else it is no JSON, which no report lists any more
        refuse_damaged([RUN])


@pytest.mark.parametrize(
    ("old", "new"), [('"', "'"), ("a.safe", "b.safe")], ids=["no JSON", "another value"]
)
def test_a_damaged_report_is_not_up_to_date(product, old, new):
    report = Path(f"{product}.json")
    report.write_text(report.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match="merged"):
        refuse_damaged([RUN])


def test_an_output_that_is_missing_is_snakemakes_to_make_again():
    Path(FIGURE).unlink()
    assert refuse_damaged([RUN]) == []


def test_a_touch_a_copy_and_copies_of_ones_own_are_no_damage(product):
    for path in product.iterdir():
        path.touch()
        path.chmod(0o600)
    kept = Path(RUN, "kept", "0", "memory.json")
    kept.parent.mkdir(parents=True)
    kept.write_text("{")
    assert refuse_damaged([RUN]) == []


def test_a_card_may_be_edited_by_hand_and_the_start_says_so(capsys):
    Path(CARD).write_text("mine")
    edited = refuse_damaged([RUN])
    assert edited == [CARD]
    around_jobs.name_edited(edited)
    assert f"or damaged: {CARD}. `rm` one" in capsys.readouterr().err
    Path(CARD).unlink()  # Snakemake makes it again
    assert refuse_damaged([RUN]) == []


def test_a_figure_is_sealed_by_the_list_of_documents():
    flip(Path(FIGURE))
    with pytest.raises(UserError, match="as up to date") as error:
        refuse_damaged([RUN])
    assert error.value.write.startswith(f"rm {FIGURE} {RUN}/documents.json ")
