"""``python -m scripts.memory.predict``: output, exit status, and every kind of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.scenario.scenario import ROOT

SMALL = """
model:
  model_type: qwen2
  hidden_size: 128
  intermediate_size: 256
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  vocab_size: 1000
  max_position_embeddings: 512
sequence_length: 128
"""


def predict(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.memory.predict", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """One run over a scenario that fits, one that does not, and one without a card."""
    folder = tmp_path_factory.mktemp("scenarios")
    files = [
        write(folder, "fits", SMALL + "gpu: t4\n"),
        write(folder, "does-not", SMALL + "method: full\nmicro_batch: 256\ngpu: {vram_gib: 0.6}\n"),
        write(folder, "none", SMALL + "method: lora\n"),
    ]
    done = predict(*files)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_one_object_a_file_in_order(answered) -> None:
    done, rows = answered
    assert done.returncode == 1, done.stderr
    assert [row["scenario"]["method"] for row in rows] == ["qlora", "full", "lora"]


def test_contract(answered) -> None:
    for row in answered[1]:
        for name in ("rule_of_thumb", "analytic", "trace"):
            assert sum(row[name]["components"].values()) == row[name]["peak_allocated_bytes"] > 0
        traced = row["trace"]
        assert {"load", "forward", "backward", "optimizer"} <= set(traced["phases"])
        assert traced["peak_allocated_bytes"] <= traced["required_bytes"] <= traced["peak_reserved_bytes"] + 2**21
        assert 0 < traced["resident_bytes"] < traced["peak_allocated_bytes"]
        assert set(row["versions"]) == {"python", "torch", "transformers", "peft", "bitsandbytes"}


def test_verdicts(answered) -> None:
    fits, does_not, none = answered[1]
    assert (fits["fits"], fits["gpu"]["name"], fits["suggestions"]) == (True, "t4", [])
    assert fits["headroom_bytes"] == fits["gpu"]["usable_bytes"] - fits["trace"]["required_bytes"] > 0
    assert does_not["fits"] is False
    assert does_not["headroom_bytes"] < 0
    assert does_not["suggestions"]
    assert (none["fits"], none["gpu"], none["headroom_bytes"]) == (None, None, None)


def test_table_for_people(tmp_path) -> None:
    done = predict("--table", write(tmp_path, "one", SMALL + "gpu: rtx-4090\n"))
    assert done.returncode == 0, done.stderr
    for words in (
        "rule of thumb",
        "analytic estimate",
        "trace",
        "least the card must have",
        "fits NVIDIA GeForce RTX 4090",
    ):
        assert words in done.stdout


def test_one_wrong_file_spoils_the_status_and_not_the_others(tmp_path) -> None:
    wrong = write(tmp_path, "wrong", SMALL + "lora: {rank: 0}\n")
    done = predict(wrong, write(tmp_path, "good", SMALL))
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert "lora.rank" in done.stderr
    assert str(wrong) in done.stderr


BAD = {
    "unknown gpu": (SMALL + "gpu: rtx-4091\n", ["gpu", "rtx-4091", "gpu: rtx-4090"]),
    "rank 0": (SMALL + "lora: {rank: 0}\n", ["lora.rank", "0", "rank: 16"]),
    "heads": (SMALL.replace("heads: 4", "heads: 3"), ["num_attention_heads", "3", "num_attention_heads: 4"]),
    "positions": (SMALL.replace("h: 128\n", "h: 1024\n"), ["sequence_length", "1024", "sequence_length: 512"]),
    "targets": (SMALL + "lora: {target_modules: [query]}\n", ["target_modules", "query", "target_modules: "]),
    "unbuildable": ("model: {model_type: qwen9, hidden_size: 64}\n", ["model_type", "qwen9", "model_type: qwen2"]),
    "not yaml": ("model: {", ["line"]),
    "unknown field": (SMALL + "seqence_length: 4\n", ["seqence_length", "sequence_length: 4"]),
    "number as text": (SMALL + "micro_batch: '2'\n", ["micro_batch", "'2'", "micro_batch: 2"]),
    "no such file": (None, ["does not exist"]),
}


def test_bad_input_is_explained(tmp_path) -> None:
    """All at once: each start of the command costs seconds."""
    files = {
        name: write(tmp_path, name.replace(" ", "-"), text) if text else tmp_path / "missing.yaml"
        for name, (text, _) in BAD.items()
    }
    done = predict(*files.values())
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for name, (_, words) in BAD.items():
        assert str(files[name]) in done.stderr
        for word in words:
            assert word in done.stderr, f"{name}: {word!r} is not in\n{done.stderr}"
