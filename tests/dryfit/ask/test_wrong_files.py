"""Files with something wrong in them: what is said names the file's own key, and nothing ends in a traceback."""

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from dryfit.ask.command import main
from dryfit.ask.question import Question, QuestionOptions, question
from dryfit.common.errors import UserError
from dryfit.readers.reading import keys
from dryfit.scenario.hub import likely_id, nearest

AXOLOTL = {"base_model": "smollm2-135m", "adapter": "qlora", "load_in_4bit": True}


def asked(tmp_path: Path, content: Any, tool: str | None = None, **options: Any) -> Question:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return question([path], QuestionOptions(tool=tool, **options))


@pytest.mark.parametrize(
    ("more", "where", "write"),
    [
        (
            {"deepspeed": {"zero_optimization": {"stage": 5}}},
            "deepspeed: zero_optimization",
            "stage: 3",
        ),
        ({"deepspeed": {"zero_optimization": 7}}, "zero_optimization", "zero_optimization: {...}"),
        ({"deepspeed": "{bad"}, "deepspeed", "deepspeed: ds_z3_config.json"),
        (
            {"fsdp": ["full_shard"], "fsdp_config": {"version": "abc"}},
            "fsdp_config: version",
            "version: 1",
        ),
        ({"fsdp": ["full_shard"], "fsdp_config": [1]}, "fsdp_config", "fsdp_config: {...}"),
        ({"bnb_config_kwargs": 3}, "bnb_config_kwargs", "bnb_config_kwargs: {...}"),
        ({"micro_batch_size": "many"}, "micro_batch_size", "micro_batch_size: 1"),
        ({"lora_dropout": False}, "lora_dropout", "lora_dropout: 0.05"),  # no switch
        ({"sequence_len": [2048]}, "sequence_len", "sequence_len: 2048"),
        ({"sequence_len": 0}, "sequence_len", "sequence_len: 512"),
        ({"lora_r": -3, "lora_alpha": 8, "lora_target_linear": True}, "lora_r", "lora_r: 16"),
        ({"base_model": "smolm2-135m"}, "base_model", "base_model: smollm2-135m"),
        ({"base_model": "./nothing/here"}, "base_model", "base_model: qwen2.5-coder-7b"),
    ],
)
def test_a_wrong_value_in_a_tools_file_names_its_key(more, where, write, tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        asked(tmp_path, AXOLOTL | more)
    error = caught.value
    assert str(error.where) == f"{tmp_path / 'train.yaml'}: {where}" and error.write == write


def test_a_deepspeed_file_of_text_and_a_model_of_llama_factory(tmp_path) -> None:
    (tmp_path / "ds.json").write_text("just text", encoding="utf-8")
    with pytest.raises(UserError, match="takes keys below it"):
        asked(tmp_path, AXOLOTL | {"deepspeed": "ds.json"})
    with pytest.raises(UserError) as caught:
        asked(
            tmp_path,
            {"model_name_or_path": "smolm2-135m", "stage": "sft", "finetuning_type": "lora"},
        )
    assert caught.value.write == "model_name_or_path: smollm2-135m"


def test_what_the_advice_says_to_write_is_read(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VISION), encoding="utf-8")
    found = asked(tmp_path, AXOLOTL | {"base_model": "config.json"})
    assert found.scenario.size("hidden_size") == 256


@pytest.mark.thorough
def test_no_value_of_a_known_key_ends_in_a_traceback(tmp_path) -> None:
    values = [
        "many",
        -1,
        0,
        7.5,
        True,
        [],
        [1],
        ["a"],
        {},
        {"stage": 5},
        {"version": "abc"},
        "",
        [[]],
        {"name": 3},
        10**30,
        float("nan"),
        "{bad",
    ]
    starts = {
        ("axolotl",): AXOLOTL,
        ("trl", "transformers"): {
            "model_name_or_path": "smollm2-135m",
            "use_peft": True,
            "load_in_4bit": True,
        },
        ("llama-factory", "transformers"): {"model_name_or_path": "smollm2-135m", "stage": "sft"},
    }
    dice, refused = random.Random(30), 0
    for names, start in starts.items():
        for key in keys(*names).understood:
            for value in dice.sample(values, 6):
                try:
                    asked(tmp_path, start | {key: value}, tool=names[0])
                except UserError:
                    refused += 1
    for value in values:
        for key in (
            "distributed_type",
            "num_processes",
            "fsdp_config",
            "deepspeed_config",
            "mixed_precision",
        ):
            for kind in ("FSDP", "DEEPSPEED"):
                beside = tmp_path / "accelerate.yaml"
                beside.write_text(
                    yaml.safe_dump({"distributed_type": kind, "num_processes": 2, key: value})
                )
                try:
                    question(["smollm2-135m", beside], QuestionOptions())
                except UserError:
                    refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "name", ["outputs/mine", "there/mine", "empty/folder", "./mine", "saves/a/b"]
)
def test_a_local_folder_is_not_sent_to_the_hub(name, tmp_path, monkeypatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    monkeypatch.setattr(
        "dryfit.scenario.model.fetch_config", lambda *_: pytest.fail("the Hub was asked")
    )
    with pytest.raises(UserError, match=r"isn't there|holds no config.json"):
        asked(tmp_path, AXOLOTL | {"base_model": name})


def test_escape_sequences_of_a_file_do_not_reach_the_terminal(tmp_path, capsys) -> None:
    path = tmp_path / "step.yaml"
    path.write_text(
        yaml.safe_dump(
            {"model": "smollm2-135m", "model_name": "a\x1b[2Jb\u202ec\nFITS: all", "gpu": "t4"}
        )
    )
    assert main([str(path), "--quick"]) == 0
    assert "  a\\x1b[2Jb\\u202ec FITS: all" in capsys.readouterr().out
    assert main(["explain", str(path), "--quick"]) == 0
    out = capsys.readouterr().out
    assert (
        "\x1b" not in out
        and "\u202e" not in out
        and "for: a\\x1b[2Jb\\u202ec FITS: all; QLoRA" in out
    )
    path.write_text(yaml.safe_dump({"model": "\x1b[2Jqwen", "gpu": "t4"}))
    with pytest.raises(UserError) as caught:
        main([str(path), "--quick"])
    assert "\x1b" not in str(caught.value)


VISION = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vocab_size": 1000,
    "image_token_id": 991,
    "vision_start_token_id": 990,
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 256,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
}


@pytest.mark.thorough
def test_a_vision_model_without_images_says_what_the_answer_covers_and_mrope_loads(
    tmp_path, capsys
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(VISION), encoding="utf-8")
    assert main([str(path), "--gpu", "t4"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    options = re.search(
        r"the answer covers the language model alone, .+ \((--set '[^']+')\)", text
    )[1]
    assert main([str(path), "--gpu", "t4", *shlex.split(options)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "language model alone" not in text and "1 image of 448 x 448 in a row" in text
    main(["gemma-3-4b", "--gpu", "t4", "--quick"])
    assert "the answer covers the language model alone" in capsys.readouterr().out
    main(["gemma-2-2b", "--gpu", "t4", "--quick"])
    assert "language model alone" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "first", "likely"),
    [
        ("gemma-3-9b-it", None, "google/gemma-3-9b-it"),
        ("google/gemma-3-9b-it", None, None),
        ("gemma-3-12b-it", "gemma-3-12b", "google/gemma-3-12b-it"),
        ("deepseek-r1-distill-14b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", None),
        ("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", "meta-llama/llama-3.3-70b"),
        ("Qwen3-8B-Instruct", "qwen3-8b", "Qwen/Qwen3-8B-Instruct"),
        ("Qwen/Qwen3-8B-Instruct", "Qwen/Qwen3-8B", None),
        ("qwen3-30b", "qwen3-30b-a3b", "Qwen/qwen3-30b"),
        ("llama3-8b", "llama-3-8b", None),
        ("qwen2-7b", "qwen2-7b", "Qwen/qwen2-7b"),
        ("qwen2.5-codr-7b", "qwen2.5-coder-7b", None),
        ("mistral-7b", "mistral-7b-v0.3", None),  # the newest
        ("nonsense", None, None),
    ],
)
def test_the_nearest_model_has_the_size_and_the_version_of_the_family(
    written, first, likely
) -> None:
    assert next(iter(nearest(written)), None) == first and likely_id(written) == likely
