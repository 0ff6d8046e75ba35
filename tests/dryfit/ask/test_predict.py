"""``python -m dryfit.ask.predict``: output, exit status, and every kind of bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dryfit.analytic.estimate import estimate
from dryfit.ask import predict as prediction
from dryfit.ask.text import table
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.scenario_trace import traced
from tests.dryfit.decoders import T4, TINY
from tests.repository import ROOT
from tests.warm import launchers

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


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    call = [f"{launchers()}/python", "-m", "dryfit.ask.predict", *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True)


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
    done = command(*files)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_an_answer_has_what_its_contract_says(answered) -> None:
    done, rows = answered
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""  # no library's words
    assert [row["scenario"]["method"] for row in rows] == ["qlora", "full", "lora"]
    for row in answered[1]:
        for name in ("rule_of_thumb", "analytic", "trace"):
            assert sum(row[name]["components"].values()) == row[name]["peak_allocated_bytes"] > 0
        traced = row["trace"]
        assert {"load", "forward", "backward", "optimizer"} <= set(traced["phases"])
        assert (
            traced["peak_allocated_bytes"]
            <= traced["required_bytes"]
            <= traced["peak_reserved_bytes"] + 2**21
        )
        assert 0 < traced["resident_bytes"] < traced["peak_allocated_bytes"]
        assert set(row["versions"]) == {"python", "torch", "transformers", "peft", "bitsandbytes"}
    fits, does_not, none = answered[1]
    assert (fits["fits"], fits["gpu"]["name"], fits["suggestions"]) == (True, "t4", [])
    assert (
        fits["headroom_bytes"] == fits["gpu"]["usable_bytes"] - fits["trace"]["required_bytes"] > 0
    )
    assert does_not["fits"] is False
    assert does_not["headroom_bytes"] < 0
    assert does_not["suggestions"]
    assert (none["fits"], none["gpu"], none["headroom_bytes"]) == (None, None, None)
    for row in answered[1]:
        both = row["allocators"]
        assert both["default"]["required_bytes"] == row["trace"]["required_bytes"]
        assert both["default"]["fits"] == row["fits"]
        assert both["expandable_segments"]["required_bytes"] >= row["trace"]["resident_bytes"]
        assert (both["expandable_segments"]["fits"] is None) == (row["gpu"] is None)
    fits, does_not, _ = answered[1]
    assert "method" in fits["assumed"] and "sequence_length" not in fits["assumed"]
    assert {"method", "micro_batch", "lora"}.isdisjoint(does_not["assumed"])
    assert all(row["like"] is None and isinstance(row["warnings"], list) for row in answered[1])


def test_table_for_people(tmp_path, capsys) -> None:
    assert prediction.main(["--table", str(write(tmp_path, "one", SMALL + "gpu: rtx-4090\n"))]) == 0
    shown = capsys.readouterr().out
    first, tools, second, head, assumed, *_ = shown.splitlines()
    assert re.fullmatch(
        r"FITS: the step needs [\d.]+ GiB, the NVIDIA GeForce RTX 4090 has 23.14 GiB usable; [\d.]+ GiB to spare",
        first,
    )
    assert second == f"file: {tmp_path / 'one.yaml'}"
    for words in (
        "QLoRA of rank 16",
        "without autocast",
        "no k-bit preparation",
        "checkpointing",
        "adamw",
        "sdpa",
    ):
        assert words in head
    assert tools.startswith(
        "With each tool's defaults, estimated: TRL 0.02, PEFT 0.02, axolotl 0.02 GiB at the peak"
    )
    assert assumed.startswith("defaults used: 1 row a micro-batch, method qlora")
    assert "tokens" not in assumed  # the file says it
    for words in (
        "rule of thumb",
        "analytic estimate",
        "trace of the step",
        "GiB free",
        "with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which fits",
        "logits and loss",
    ):
        assert words in shown
    assert not re.search(r"\d GB", shown)  # sizes are GiB; a card's name may have its own


def test_both_allocators_are_replays_of_one_trace(monkeypatch) -> None:
    from dryfit.tracing import trace

    taken = []
    step = trace.trace_step
    monkeypatch.setattr(
        trace, "trace_step", lambda *given, **more: taken.append(1) or step(*given, **more)
    )
    both = traced(Scenario.from_mapping({"model": TINY, "sequence_length": 128})).trace
    assert len(taken) == 1 and set(both["required_bytes_by_allocator"]) == {
        "default",
        "expandable_segments",
    }


@pytest.mark.thorough
def test_several_cards_are_all_of_them(tmp_path) -> None:
    path = write(tmp_path, "two", SMALL + "gpu: {name: rtx-3090, count: 2}\n")
    found = prediction.outcome(path)
    assert found.status == 0 and found.answer["scenario"]["parallel"]["strategy"] == "fsdp2"
    assert found.answer["assumed"]["parallel"]["gpus"] == 2
    assert found.answer["strategies"]["ddp"]["required_bytes"] > 0
    text = table("two.yaml", found.answer)
    assert (
        "on each of 2 GPUs with FSDP2" in text.splitlines()[0]
        and "fsdp2 on 2 GPUs" in text
        and "with DDP" in text
    )


def test_one_wrong_file_spoils_the_status_and_not_the_others(tmp_path, capsys) -> None:
    wrong = write(tmp_path, "wrong", SMALL + "lora: {rank: 0}\n")
    assert prediction.main([str(wrong), str(write(tmp_path, "good", SMALL))]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert "lora.rank" in said.err
    assert str(wrong) in said.err


BAD = {
    "unknown gpu": (SMALL + "gpu: rtx-4091\n", ["gpu", "rtx-4091", "gpu: rtx-4090"]),
    "rank 0": (SMALL + "lora: {rank: 0}\n", ["lora.rank", "0", "rank: 16"]),
    "heads": (
        SMALL.replace("heads: 4", "heads: 3"),
        ["num_attention_heads", "3", "num_attention_heads: 4"],
    ),
    "positions": (
        SMALL.replace("h: 128\n", "h: 1024\n"),
        ["sequence_length", "1024", "sequence_length: 512"],
    ),
    "targets": (
        SMALL + "lora: {target_modules: [query]}\n",
        ["target_modules", "query", "target_modules: "],
    ),
    "unbuildable": (
        "model: {model_type: qwen9, hidden_size: 64}\n",
        ["model_type", "qwen9", "qwen2"],
    ),
    "not yaml": ("model: {", ["line"]),
    "unknown field": (SMALL + "seqence_length: 4\n", ["seqence_length", "sequence_length: 4"]),
    "number as text": (SMALL + "micro_batch: '2'\n", ["micro_batch", "'2'", "micro_batch: 2"]),
    "no such file": (None, ["does not exist"]),
    "null scenario": ("qlora: null\n", ["qlora", "lora"]),
    "empty": ("", ["A scenario is a mapping", "model: qwen2.5-coder-7b"]),
    "unknown model": ("model: nosuch\n", ["nosuch", "qwen2.5-coder-7b"]),
    "absurd vocabulary": (
        SMALL.replace("size: 1000", "size: 1000000000000"),
        ["vocab_size", "at most 16777216"],
    ),
    "dropout on experts": (
        SMALL.replace("qwen2", "mixtral") + "lora: {dropout: 0.1}\n",
        ["no dropout for adapters of experts", "lora: "],
    ),
}


def test_bad_input_is_explained(tmp_path, capfd) -> None:
    files = {
        name: write(tmp_path, name.replace(" ", "-"), text)
        if text is not None
        else tmp_path / "missing.yaml"
        for name, (text, _) in BAD.items()
    }
    assert prediction.main([*map(str, files.values())]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err and "Warning" not in said.err
    for name, (_, words) in BAD.items():
        assert str(files[name]) in said.err
        for word in words:
            assert word in said.err, f"{name}: {word!r} is not in\n{said.err}"


def test_no_answer_is_status_3(tmp_path) -> None:
    """What is missing or fails is no verdict: neither "does not fit" nor a wrong scenario."""
    files = [write(tmp_path, "one", SMALL), write(tmp_path, "two", SMALL + "micro_batch: '2'\n")]
    code = (
        "import sys; sys.modules['torch'] = None; from dryfit.ask.predict import main; "
        f"sys.exit(main({[str(path) for path in files]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert "torch is not installed" in done.stderr and "dryfit[trace]" in done.stderr
    assert "micro_batch: 2" in done.stderr and "Traceback" not in done.stderr


def test_a_failure_says_which_file_and_what(tmp_path) -> None:
    huge = SMALL.replace("hidden_size: 128", "hidden_size: 16777216").replace(
        "size: 256", "size: 16777216"
    )
    path = write(tmp_path, "huge", huge + "method: full\n")
    found = prediction.outcome(path)
    assert (found.status, found.answer) == (3, None)
    assert str(path) in found.message and "OverflowError" in found.message


def test_another_gpu_is_answered_by_its_own_kernels() -> None:
    """Before compute capability 8.0 grouped attention keeps its scores: the estimate must know as the trace does."""
    fields = {key: value for key, value in T4.items() if key != "gpu"}
    old, new = (
        estimate(Scenario.from_mapping({**fields, "gpu": gpu})).analytic["peak_allocated_bytes"]
        for gpu in ("t4", None)
    )
    assert DEFAULT_CAPABILITY == (8, 0)
    assert (round(old / 1e9, 2), round(new / 1e9, 2)) == (21.21, 17.14)


def test_a_card_that_the_step_does_not_use_is_told(tmp_path) -> None:
    one = "gpu: {name: rtx-3090, count: 2}\nparallel: {strategy: none, gpus: 1}\n"
    found = prediction.outcome(write(tmp_path, "one", SMALL + one)).answer
    assert found["strategies"] == {} and found["scenario"]["parallel"]["gpus"] == 1
    assert "(of 2 GPUs the step uses 1)" in table("one.yaml", found).splitlines()[0]
