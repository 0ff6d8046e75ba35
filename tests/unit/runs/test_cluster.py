"""Which GPU a cluster's job asks for: the smallest that fits, and clear words when none does."""

from pathlib import Path

import pytest

from dryfit.cards.gpus import GIB, find
from dryfit.common.errors import UserError
from scripts.runs.cluster import read_map, smallest

MAP = """
- {gpu: a100-80gb, partition: large, gres: a100}
- {gpu: t4, partition: small, gres: t4}
- {gpu: {vram_gib: 24}, gres: any24}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gpus.yaml"
    path.write_text(text)
    return path


def test_smallest_that_fits(tmp_path: Path) -> None:
    entries = read_map(write(tmp_path, MAP))
    t4 = find("t4").usable_bytes
    assert smallest(1, entries)["gres"] == "t4"
    assert smallest(t4, entries)["gres"] == "t4"
    assert smallest(t4 + 1, entries)["gres"] == "any24"
    assert smallest(40 * GIB, entries)["partition"] == "large"


def test_none_fits_names_one_that_would_if_there_is_one(tmp_path: Path) -> None:
    entries = read_map(write(tmp_path, "- {gpu: t4, partition: small}"))
    with pytest.raises(UserError) as error:
        smallest(20 * GIB, entries)
    for words in ("20.00 GiB", "Tesla T4", "the cluster's GPUs", "would do", "- {gpu: "):
        assert words in str(error.value)
    with pytest.raises(UserError, match="no GPU known"):
        smallest(10**13, read_map(write(tmp_path, MAP)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is a list"),
        ("gpu: t4", "is a list"),
        ("- t4", "needs `gpu`"),
        ("- {gpu: t4}", "needs `partition` or `gres`"),
        ("- {gpu: nosuch, gres: x}", "is not known"),
        ("- {gpu: t4, gress: x}", "did you mean `gres`"),
    ],
)
def test_wrong_maps(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_map(write(tmp_path, text))
