"""Scripts that start a training: what is exported, what launchers decide, and whose command or program it is."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dryfit.common.errors import UserError
from dryfit.readers.shell import commands
from tests.dryfit.ask.test_readers import AXOLOTL, FACTORY, asked, said
from tests.dryfit.ask.test_torchtune_reader import LORA

MODEL = "meta-llama/Llama-3.2-1B"
SWIFT = f"swift sft --model {MODEL} --max_length 512"
FILES = {
    "factory.yaml": FACTORY
    | {"finetuning_type": "lora", "cutoff_len": 256, "per_device_train_batch_size": 2},
    "axolotl.yaml": AXOLOTL | {"sequence_len": 256, "adapter": "lora", "lora_target_linear": True},
    "trl.yaml": {
        "model_name_or_path": MODEL,
        "max_length": 256,
        "use_peft": True,
        "per_device_train_batch_size": 1,
    },
    "tune.yaml": LORA,
    "accelerate.yaml": {
        "distributed_type": "FSDP",
        "num_processes": 4,
        "fsdp_config": {"fsdp_version": 2},
    },
}
PROGRAM = """
parser = argparse.ArgumentParser()
parser.add_argument("--model", default="Qwen/Qwen3-8B")
parser.add_argument("--max-length", type=int, default=128)
parser.add_argument("--bf16", action="store_true")
args = parser.parse_args()
SFTTrainer(args.model, args=SFTConfig(max_length=args.max_length, bf16=args.bf16)).train()
"""


def script(folder: Path, text: str, **options: Any) -> Any:
    for name, content in FILES.items():
        (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "own.py").write_text(PROGRAM, encoding="utf-8")
    return asked(folder, text, name="run.sh", **options)


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        ("A=1\nrun", {}),
        ("A=1 run", {"A": "1"}),
        ("A=1 \\\nB=2 \\\nrun", {"A": "1", "B": "2"}),
        ("A=1 \\\n# a comment ends it\nrun", {}),
        ("A=1\n# a comment\nB=2 run", {"B": "2"}),
        ("export A=1\nrun", {"A": "1"}),
        ("A=1\nexport A\nrun", {"A": "1"}),
        ("export A=1\nA=2\nrun", {"A": "2"}),
        ("declare -x A=1 B=2; run", {"A": "1", "B": "2"}),
        ("set -a\nA=1\nset +a\nB=2\nrun", {"A": "1"}),
        ("A=1; B=$A run", {"B": "1"}),
        ("env A=1 run", {"A": "1"}),
    ],
)
def test_variables_are_exported_as_bash_does(text: str, environment: dict[str, str]) -> None:
    (command,) = commands(text)
    assert command.words == ["run"] and command.environment == environment


def test_a_comment_ends_a_command_that_goes_on_over_lines(tmp_path: Path) -> None:
    text = f"{SWIFT} \\\n    # --lora_rank 4 \\\n    --per_device_train_batch_size 8\n"
    first, second = commands(text)
    assert (
        first.cut_off and not second.cut_off and second.words[0] == "--per_device_train_batch_size"
    )
    found = script(tmp_path, text)
    said(found, micro_batch=1)
    assert any(
        "a comment among the command's lines ends it" in note for note in found.reading.notes
    )


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (f"NPROC_PER_NODE=4 {SWIFT}", {"parallel": {"strategy": "ddp", "gpus": 4}}),
        (f"NPROC_PER_NODE=4 \\\n# note\n{SWIFT}", {"parallel": {"strategy": "none", "gpus": 1}}),
        (
            f"export PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True'\n{SWIFT}",
            {"allocator": {"expandable_segments": True}},
        ),
        (
            f"PYTORCH_ALLOC_CONF=max_split_size_mb:64,expandable_segments:True {SWIFT}",
            {"allocator": {"expandable_segments": True}},
        ),
        (
            f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\n{SWIFT}",
            {"allocator": {"expandable_segments": False}},
        ),
        (
            "llamafactory-cli train factory.yaml",
            {"sequence_length": 256, "micro_batch": 2, "method": "lora"},
        ),
        (
            "llamafactory-cli train factory.yaml cutoff_len=64 per_device_train_batch_size=1",
            {"sequence_length": 64, "micro_batch": 1},
        ),
        (
            f"llamafactory-cli train --stage sft --do_train --model_name_or_path {MODEL} --finetuning_type full --bf16",
            {"method": "full", "precision": "bf16-mixed"},
        ),
        (
            "CUDA_VISIBLE_DEVICES=0,1,2,3 llamafactory-cli train factory.yaml",
            {"parallel": {"gpus": 4}},
        ),
        (
            f"torchrun --nproc_per_node 2 --nnodes=2 src/train.py --stage sft --model_name_or_path {MODEL}",
            {"parallel": {"strategy": "ddp", "gpus": 4}},
        ),
        (
            f"deepspeed --num_gpus 2 src/train_bash.py --stage sft --model_name_or_path {MODEL}",
            {"parallel": {"strategy": "ddp", "gpus": 2}},
        ),
        (
            f"deepspeed --include localhost:0,1,2 src/train_bash.py --stage sft --model_name_or_path {MODEL}",
            {"parallel": {"gpus": 3}},
        ),
        (
            "axolotl train axolotl.yaml --micro-batch-size 3",
            {"sequence_length": 256, "micro_batch": 3},
        ),
        (
            "accelerate launch --num_processes 2 -m axolotl.cli.train axolotl.yaml",
            {"parallel": {"gpus": 2}},
        ),
        (
            "accelerate launch --config_file accelerate.yaml -m axolotl.cli.train axolotl.yaml",
            {"parallel": {"strategy": "fsdp2", "gpus": 4}},
        ),
        ("trl sft --config trl.yaml --max_length 64", {"sequence_length": 64, "method": "lora"}),
        (
            f"accelerate launch trl/scripts/sft.py --model_name_or_path {MODEL} --gradient_checkpointing false",
            {"gradient_checkpointing": False, "sequence_length": 1024},
        ),
        (
            "tune run lora_finetune_single_device --config tune.yaml batch_size=1 model.lora_rank=64",
            {"micro_batch": 1, "lora": {"rank": 64}},
        ),
        (
            "tune run --nproc_per_node 2 lora_finetune_distributed --config tune.yaml",
            {"parallel": {"strategy": "fsdp2", "gpus": 2}},
        ),
        ("python own.py --max-length 64 --bf16", {"sequence_length": 64}),
        (f"cd here && accelerate launch own.py --model {MODEL}", {"sequence_length": 128}),
    ],
)
def test_a_script_starts_a_tool_or_a_program(
    text: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    said(script(tmp_path, text), **fields)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("llamafactory-cli export factory.yaml", "trains nothing"),
        ("llamafactory-cli train gone.yaml", "isn't there"),
        ("axolotl preprocess axolotl.yaml", "trains nothing"),
        ("trl chat --model x", "not known as a training"),
        ("python gone.py --lr 1", "a program that isn't there"),
        ("python constant.py --lr 1", "can't be followed"),
        ("llamafactory-cli train $CONFIG", "isn't there"),
        ("pip install x\nls", "No command that trains"),
    ],
)
def test_a_script_that_says_too_little_has_no_answer(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "constant.py").write_text(f"SFTTrainer('{MODEL}', args=SFTConfig()).train()")
    with pytest.raises(UserError) as caught:
        script(tmp_path, text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (f"swift sft --model {MODEL}", False),  # the catalogue has its sizes
        ("swift sft --model Qwen/Qwen9-1B", True),
        ("swift sft --model Qwen/Qwen9-1B --use_hf true", False),
        ("USE_HF=1 swift sft --model Qwen/Qwen9-1B", False),
        (
            "export USE_MODELSCOPE_HUB=1\nllamafactory-cli train factory.yaml model_name_or_path=Qwen/Qwen9-1B",
            True,
        ),
        ("llamafactory-cli train factory.yaml model_name_or_path=Qwen/Qwen9-1B", False),
    ],
)
def test_a_model_of_modelscope_is_not_asked_of_the_hub_unsaid(
    text, note, tmp_path: Path, monkeypatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1}'
    )
    monkeypatch.setattr("dryfit.scenario.model.fetch_config", lambda *_: config)
    said_of = [
        one for one in script(tmp_path, text).reading.notes if "taken from ModelScope" in one
    ]
    assert bool(said_of) is note


@pytest.mark.parametrize(
    ("model", "write"),
    [
        ("LLM-Research/Meta-Llama-3-8B-Instruct", None),
        ("ms://Qwen/Qwen3-8B", None),
        ("ms://Qwen/Qwen9-1B", "Qwen/Qwen9-1B"),
        ("ZhipuAI/glm-9-1b", "zai-org/glm-9-1b"),
        ("AI-ModelScope/something-9b", "config.json"),
    ],
)
def test_an_id_of_modelscope_is_its_copy_or_an_error(
    model: str, write: str | None, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(
        "dryfit.scenario.model.fetch_config", lambda *_: pytest.fail("the Hub was asked")
    )
    if write is None:
        assert asked(tmp_path, AXOLOTL | {"base_model": model}).scenario.size("hidden_size") == 4096
        return
    with pytest.raises(UserError, match="lies on ModelScope") as caught:
        asked(tmp_path, AXOLOTL | {"base_model": model})
    assert caught.value.write == f"base_model: {write}"
