"""What a followed program is told and asked, part by part: no program runs here."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

from dryfit.ask.run_program import _how_far
from dryfit.engine.trace import Options, make_tracker
from dryfit.program import checkpoints
from dryfit.program.child import own_place
from dryfit.program.data import MadeUpData
from dryfit.program.loop import Loop, _vocabulary_of_layers


@pytest.mark.parametrize(
    ("embedding", "answers", "width"),
    [(1000, 1000, 1000), (999, 999, 0), (1000, 1001, 0), (0, 1000, 0)],
)
def test_a_vocabulary_is_an_embedding_that_a_layer_answers(embedding, answers, width) -> None:
    layers = [nn.Linear(4, answers, device="meta")]
    layers += [nn.Embedding(embedding, 4, device="meta")] if embedding else []
    assert _vocabulary_of_layers(nn.Sequential(*layers)) == width


@pytest.mark.parametrize("tokens", [1, 12, 100])
def test_a_text_that_is_made_up_has_as_many_words_as_a_row_and_hardly_more(tokens) -> None:
    assert tokens <= len(MadeUpData((1, tokens))._text().split()) <= 2 * tokens + 14


def test_files_of_a_checkpoint_are_filled_to_the_byte(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 16)
    checkpoints._write(
        tmp_path, {name: torch.empty(2, device="meta") for name in "abcde"}
    )  # of 8 bytes each
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert [files[name][6:11] for name in "abcde"] == ["00001", "00001", "00002", "00002", "00003"]


@pytest.mark.parametrize(
    "text",
    [
        "from dryfit.common.text import gib\ngib(None)",
        "exec('1 / 0')",
        "import json\njson.loads('{')",
    ],
)
def test_an_errors_place_is_the_last_one_in_the_programs_own_files(text) -> None:
    with pytest.raises((TypeError, ZeroDivisionError, ValueError)) as caught:
        exec(compile(text, "own.py", "exec"))
    assert own_place(caught.value).tb_frame.f_code.co_filename == "own.py"


@pytest.mark.parametrize(
    ("outcome", "updates", "gpus", "said"),
    [
        ("stopped", 2, 1, "stopped after 2 updates"),
        ("ended", 1, 1, "ended after 1 update"),
        ("ended", 3, 4, "ended after 3 updates, as rank 0 of 4 processes"),
    ],
)
def test_how_far_a_program_was_followed(outcome, updates, gpus, said) -> None:
    answered = {"program": {"outcome": outcome, "updates": updates}, "gpus": gpus, "rank": 0}
    assert _how_far(answered) == said


def test_a_model_that_the_program_lets_go_is_freed() -> None:
    """As text encoders that make way for a diffusion model."""
    tracker, _ = make_tracker(nn.Module(), Options(steps=1, origins=True), on_gpu=True)
    loop = Loop(tracker, 2, lambda: 0)
    model = nn.Sequential(nn.Linear(2, 2))
    loop._learn(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
