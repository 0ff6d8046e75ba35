"""Refusals lead on: what does answer is named, in one line, and a default is called one."""

import json
import shlex
from pathlib import Path

import pytest

from dryfit.ask.command import main, read
from dryfit.common.errors import UserError
from dryfit.readers.request import parse_request
from dryfit.scenario.other_models import by_name, refuse_other_kinds

OTHERS = {
    "parakeet": (
        {"model_type": "parakeet", "architectures": ["ParakeetForCTC"]},
        "turns speech into text",
    ),
    "sam": (
        {"model_type": "sam", "architectures": ["SamModel"], "hidden_size": 768},
        "sees images",
    ),
    "layoutlm": (
        {"model_type": "layoutlm", "architectures": ["LayoutLMForMaskedLM"]},
        "encodes a text",
    ),
    "t5": (
        {"model_type": "t5", "vocab_size": 32128, "is_encoder_decoder": True},
        "reads a text and writes another",
    ),
    "clip": (
        {
            "model_type": "clip",
            "text_config": {"model_type": "clip_text_model"},
            "vision_config": {"hidden_size": 768},
        },
        "compares texts with images",
    ),
    "nobody listed": (
        {"model_type": "new", "architectures": ["NewForMaskedLM"]},
        "does not continue a text",
    ),
    "two halves": (
        {"model_type": "new", "is_encoder_decoder": True},
        "reads a text and writes another",
    ),
    "kandinsky": (
        {"_class_name": "KandinskyPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
        "makes images",
    ),
}


@pytest.mark.parametrize(("model", "does"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("more", [[], ["--quick"]])
def test_another_kind_of_model_without_a_recipe_leads_to_the_program_that_trains_it(
    model, does, more, tmp_path: Path
) -> None:
    """Before torch is imported, and as well without the trace."""
    name = "model_index.json" if "_class_name" in model else "config.json"
    (tmp_path / name).write_text(json.dumps(model), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        main([str(tmp_path), "--gpu", "24GiB", *more])
    assert does in caught.value.problem and caught.value.write == "dryfit run --gpu 24GiB train.py"
    assert "qwen2" not in str(caught.value) and "is_decoder" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("openai/whisper-large-v3", "turns speech into text or classes"),
        ("google/vit-base-patch16-224", "sees images"),
        ("FacebookAI/xlm-roberta-base", "encodes a text"),
        ("black-forest-labs/FLUX.1-dev", "makes images or films"),
        ("stabilityai/stable-diffusion-3.5-large", "makes images or films"),
        ("google/flan-t5-xl@main", "reads a text and writes another"),
        ("Qwen/Qwen3-8B", None),
        ("gpt2", None),
        ("baidu/ERNIE-4.5-21B-A3B-PT", None),
    ],
)
def test_a_name_is_enough_where_no_configuration_can_be_had(
    name: str, does: str | None, monkeypatch
) -> None:
    assert by_name(name) == does
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if does:
        with pytest.raises(UserError, match=does) as caught:
            read([name, "--gpu", "4090"])
        assert caught.value.write == "dryfit run --gpu 4090 train.py"


def test_a_decoder_is_not_taken_for_another_kind() -> None:
    for model in (
        {"model_type": "bert", "is_decoder": True, "vocab_size": 30522},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {
            "model_type": "qwen2_vl",
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "vision_config": {"a": 1},
        },
        {"model_type": "new", "architectures": ["NewForCausalLM"]},
    ):
        refuse_other_kinds(model, "here")


def test_the_hub_out_of_reach_is_one_error_and_no_second_one_of_our_own(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        read(["someone/unheard-of-9b", "--gpu", "4090"])
    assert not caught.value.parts and "config.json" in caught.value.allowed


LINES = [
    [
        "qwen2.5-coder-7b",
        "--gpu",
        "4099",
        "--method",
        "qlorra",
        "-s",
        "2,048",
        "--foo",
        "--lora-r",
        "8",
    ],
    [
        "qwen2.5-coder-7b",
        "--gpu",
        "2x4090",
        "--set",
        "optimizer=muon",
        "--set",
        "lora.rnak=8",
        "--batchsize",
        "2",
    ],
    ["qwen3", "8b", "--gpu", "rtx 4090", "--quantize", "4bit", "-b", "0"],
    [
        "qwen2.5-coder-7b",
        "--gpu",
        "4090",
        "--set",
        "kernels=liger",
        "--like",
        "none",
        "--strategy",
        "ddp",
    ],
    ["longst", "qwen2.5-coder-7b", "--gpu", "4090", "-s", "512", "--price", "2"],
]


@pytest.mark.parametrize("words", LINES, ids=[" ".join(words) for words in LINES])
def test_one_error_names_all_and_its_line_works(words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read(words)
    lines = {part.write for part in caught.value.parts or (caught.value,)}
    assert len(lines) == 1
    program, *fixed = shlex.split(lines.pop())
    assert program == "dryfit" and read(fixed).question.scenario


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kernels": "liger"}, "`loss: full` is a default."),
        ({"kernels": "liger", "loss": "full"}, None),
        ({"optimizer": "muon", "gpu": "2xrtx-4090"}, "`parallel.strategy: fsdp2` is a default."),
    ],
)
def test_a_default_that_nobody_typed_is_called_one(fields, says) -> None:
    with pytest.raises(UserError) as caught:
        parse_request({"model": "qwen2.5-coder-7b", **fields})
    assert (says in caught.value.problem) if says else ("default" not in caught.value.problem)
