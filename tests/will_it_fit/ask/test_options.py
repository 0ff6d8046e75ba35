"""Slips on the command line: what to write is the asker's own line, corrected, and the corrected line is answered."""

from __future__ import annotations

import json
import shlex

import pytest

from will_it_fit.ask.command import main, parse
from will_it_fit.ask.options import suggested
from will_it_fit.common.errors import UserError

MODEL = "qwen2.5-coder-7b"


def corrected(line: str) -> str:
    """What an error says to write instead of a line."""
    with pytest.raises(UserError) as caught:
        main(shlex.split(line))
    return caught.value.write


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--gpu 4090 -s 2048 --method dpo", "--gpu 4090 -s 2048 --set objective=dpo"),
        ("--gpu 4090 --method 4bit -b 2", "--gpu 4090 --method qlora --set quantization.type=nf4 -b 2"),
        ("--gpu 4090 --method=qlroa -b 2", "--gpu 4090 --method qlora -b 2"),
        ("--seq-len 2048 --gpu 4090", "-s 2048 --gpu 4090"),
        ("--max_seq_length=2048 --gpu 4090", "-s 2048 --gpu 4090"),
        ("--gpu 4090 --lora-r 64 -s 1024", "--gpu 4090 --set lora.rank=64 -s 1024"),
        ("--gpu 4090 --rank 64", "--gpu 4090 --set lora.rank=64"),
        ("--gpu 4090 --precision fp16", "--gpu 4090 --set precision=fp16"),
        ("--gpu 4090 --dtype bfloat16", "--gpu 4090 --set precision=bf16"),
        ("-s 2k --gpu 4090", "-s 2048 --gpu 4090"),
        ("-s 2.5k -b 1k", "-s 2560 -b 1024"),
        ("--gpu 4090 --quantization int8 -b 2", "--gpu 4090 --set quantization.type=int8 -b 2"),
        ("--gpu 4090 --load-in-4bit -b 2", "--gpu 4090 --method qlora -b 2"),
        ("--gpu 'MacBook Pro M3 Max' -s 2048", "--gpu apple-32gb -s 2048"),
        ("--gpu colab -s 2048", "--gpu t4 -s 2048"),
        ("-s 64 --gpus 2 --gpu 3090", "-s 64 --gpu 2x3090"),
        ("--gup 4090 -s 64", "--gpu 4090 -s 64"),
        ("--gpu 4900 -s 64", "--gpu rtx-4090 -s 64"),
        ("--set lora.rnak=64 -s 64", "--set lora.rank=64 -s 64"),
        ("--set attention=flsh -s 64", "--set attention=flash -s 64"),
        ("--set sequence_length=0100 --gpu 4090", "-s 100 --gpu 4090"),
        ("--grad-accum 8 --optim adamw_8bit", "--set gradient_accumulation=8 --set optimizer=adamw_8bit"),
        ("--gpu 3090 --strategy ddp -s 64", "--gpu 2xrtx-3090 --strategy ddp -s 64"),
        ("--gpu", "--gpu 4090"),
        ("--gpu 4090 --attention flash_attention_2", "--gpu 4090 --set attention=flash"),
        ("--gpu 4090 --optim adamw_bnb_8bit", "--gpu 4090 --set optimizer=adamw_8bit"),
        ("--gpu 2x4090 --strategy deepspeed", "--gpu 2x4090 --strategy zero3"),
        ("--gpu 4090 --context 4k --bf16", "--gpu 4090 -s 4096 --set precision=bf16"),
        ("--vram 24 -b 2", "--gpu 24GiB -b 2"),
        ("--gpu 4090 --lora 32", "--gpu 4090 --set lora.rank=32"),
        ("-s 64 --longest --largest-batch --gpu 8GiB", "-s 64 --longest --gpu 8GiB"),
        ("-s 99999 --gpu 4090", "-s 32768 --gpu 4090"),
    ],
)
def test_what_to_write_is_the_own_line_corrected(typed: str, meant: str, capsys) -> None:
    assert corrected(f"{MODEL} {typed}") == f"will-it-fit {MODEL} {meant}"
    if "--longest" not in meant and "objective" not in meant:
        assert main([MODEL, *shlex.split(meant), "--yaml"]) == 0


def test_every_slip_of_a_line_is_put_right_at_once() -> None:
    with pytest.raises(UserError) as caught:
        main(["qwen2.5-coder-7b", "--seq-len", "2k", "--lora-r", "8", "--method", "lroa"])
    assert len(caught.value.parts) == 3
    assert caught.value.write == "will-it-fit qwen2.5-coder-7b -s 2048 --set lora.rank=8 --method lora"


def test_a_model_that_is_misspelt_or_missing_keeps_the_rest() -> None:
    assert corrected("--gpu 4090 qwen3-9b -s 2048") == "will-it-fit --gpu 4090 qwen3.5-9b -s 2048"
    assert corrected("qwen3 8b --gpu 4090") == "will-it-fit qwen3-8b --gpu 4090"
    assert corrected("Qwen3-8B-Instruct --gpu 4090") == "will-it-fit qwen3-8b --gpu 4090"
    assert corrected("gemma-3-12b-it --gpu 4090") == "will-it-fit google/gemma-3-12b-it --gpu 4090"
    assert corrected("--gpu 4090 --model qwen3-8b -s 2048") == "will-it-fit qwen3-8b --gpu 4090 -s 2048"
    assert corrected("qwen2.5-3b --gpu 4090 --model qwen3-8b") == "will-it-fit qwen3-8b --gpu 4090"
    assert corrected("nothere.yaml --gpu 4090") == "will-it-fit qwen2.5-coder-7b --gpu 4090"
    assert corrected("--gpu 4090 -s 2048") == "will-it-fit qwen2.5-coder-7b --gpu 4090 -s 2048"


def test_a_slip_in_an_option_beside_a_file_is_one_of_the_command_line(tmp_path) -> None:
    path = tmp_path / "step.yaml"
    path.write_text(json.dumps({"model": MODEL, "lora": {"rank": 8}}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        main([str(path), "--set", "lora.alhpa=16", "--gpu", "t4"])
    assert caught.value.where == "the command line"
    assert caught.value.write == f"will-it-fit {path} --set lora.alpha=16 --gpu t4"
    path.write_text(json.dumps({"model": MODEL, "lora": {"rnak": 8}}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        main([str(path), "--gpu", "t4"])
    assert caught.value.where == str(path) and caught.value.write == "lora:\n  rank: 8"


def test_numbers_of_set_are_those_of_files() -> None:
    for text in ("sequence_length=0100", "sequence_length=1:30", "lora.rank=010"):
        with pytest.raises(UserError, match="YAML reads"):
            main([MODEL, "--set", text, "--yaml"])


def test_what_is_right_is_left_alone() -> None:
    options = parse([MODEL, "-s2048", "--gpu=4090", "--largest", "--set", "lora.rank=4"])
    assert options.sequence_length == 2048 and options.gpu == "4090" and options.largest_batch


@pytest.mark.parametrize(
    ("typed", "changes", "meant"),
    [
        ("m --gpu=t4 -s 64", {"gpu": "l4"}, "m --gpu l4 -s 64"),
        ("m --sequence-length 64 -b 2", {"sequence_length": 32}, "m -s 32 -b 2"),
        ("m --set lora.rank=4 -b 2", {"lora": {"rank": 2, "alpha": None}}, "m --set lora.rank=2 -b 2"),
        ("m --set quantization.double=true", {"quantization": None}, "m"),
        ("m -b 2", {"autocast": None}, "m -b 2 --set autocast=null"),
        ("m --set autocast=fp16", {"autocast": None}, "m"),
        ("m --set parallel.gpus=3", {"parallel": {"gpus": 2}}, "m --set parallel.gpus=2"),
        ("m", {"--rows": 5}, "m --rows 5"),
    ],
)
def test_a_change_stands_where_what_it_replaces_stood(typed, changes, meant) -> None:
    assert suggested(typed.split(), changes) == f"will-it-fit {meant}"
