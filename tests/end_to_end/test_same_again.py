"""The same configuration once more, elsewhere: the same adapter, the same merged model, the same card."""

import re
import shutil
from pathlib import Path

import pytest

from tests.end_to_end import chain
from tests.end_to_end.chain import RUN

pytestmark = pytest.mark.thorough


def test_the_same_configuration_gives_the_same_adapter_and_card(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """All that follows from the same base model, data and memory figures is made once more, elsewhere."""
    folder, _ = finished
    again = tmp_path / "again"

    def left_out(place: str, names: list[str]) -> list[str]:
        # Without what was kept of finished work, or nothing would be made again.
        return [
            name
            for name in names
            if name == "kept" or (name != "memory" and Path(place) == folder / RUN)
        ]

    shutil.copytree(folder, again, ignore=left_out)
    rerun = chain.finished_rules(chain.snakemake(again))
    assert {"train_adapter", "merge_adapter", "evaluate_tuned", "render_documents"} <= rerun
    assert not rerun & {"fetch_weights", "encode_dataset", "measure_memory", "evaluate_base"}
    for path in (
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "merged/manifest.json",
    ):
        assert (again / RUN / path).read_bytes() == (folder / RUN / path).read_bytes(), path
    cards = [
        (place / RUN / "MODEL_CARD.md").read_text(encoding="utf-8").splitlines()
        for place in (folder, again)
    ]
    # The training's duration, rates of tokens and rows, and the rates of each kind of token.
    times = re.compile(
        r"(?i)(tokens|rows) per second|training took|^\| (answers|requests|prefix|padding) \|"
    )
    assert 2 <= sum(bool(times.search(line)) for line in cards[0]) <= 7
    first, second = ([line for line in card if not times.search(line)] for card in cards)
    assert first == second
