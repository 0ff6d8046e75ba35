"""The picture of a cycle: a column for each phase on the trainer's card, as high as its owners together."""

import json
from pathlib import Path

from dryfit.common.text import GIB
from scripts.documents.draw_cycle import OWNERS, draw_cycle, main


def phase(name: str, card: str = "trainer", **owners: float) -> dict:
    sizes = {f"{owner}_bytes": [int(size * GIB)] * 2 for owner, size in owners.items()}
    return {"phase": name, "card": card, "owners": sizes}


ANSWER = {"phases_of_cycle": {"usable_bytes": 24 * GIB, "phases": [
    phase("generate", trainer=4, server_cache=10), phase("update", trainer=9), phase("load", "server", server_cache=20),
]}}  # fmt: skip


def test_columns_are_as_high_as_their_owners_and_the_servers_card_is_left_out():
    figure = draw_cycle({"awake": ANSWER, "asleep": ANSWER})
    assert [axes.get_title() for axes in figure.axes] == ["awake", "asleep"]
    for axes in figure.axes:
        tops = [max(bar.get_y() + bar.get_height() for bar in axes.patches if bar.get_x() + 0.5 == x) for x in (0, 1)]
        assert tops == [14, 9]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["generate", "update"]


def test_the_same_answer_gives_the_same_file(tmp_path: Path):
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps(ANSWER))
    pictures = []
    for name in ("one.png", "two.png"):
        main([str(tmp_path / name), f"awake={answer}"])
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and pictures[0].startswith(b"\x89PNG")
    assert len(set(OWNERS.values())) == len(OWNERS)
