"""torchtune's files: what its recipes' settings come to, and which of its recipes have no answer."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dryfit.common.errors import UserError
from dryfit.readers.reading import TABLES
from dryfit.scenario.model import MODELS
from tests.dryfit.ask.test_readers import asked, said

# The settings of torchtune's recipes/configs/qwen2_5/7B_lora_single_device.yaml (bd2a0fc).
LORA = {
    "output_dir": "/tmp/out",
    "model": {
        "_component_": "torchtune.models.qwen2_5.lora_qwen2_5_7b_instruct",
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
    },
    "tokenizer": {
        "_component_": "torchtune.models.qwen2_5.qwen2_5_tokenizer",
        "path": "x",
        "max_seq_len": None,
    },
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "model_type": "QWEN2",
    },
    "resume_from_checkpoint": False,
    "seed": None,
    "shuffle": True,
    "batch_size": 2,
    "dataset": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "packed": False},
    "optimizer": {
        "_component_": "torch.optim.AdamW",
        "fused": True,
        "weight_decay": 0.01,
        "lr": "3e-4",
    },
    "lr_scheduler": {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
    },
    "loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"},
    "epochs": 1,
    "max_steps_per_epoch": None,
    "gradient_accumulation_steps": 8,
    "compile": False,
    "device": "cuda",
    "dtype": "bf16",
    "enable_activation_checkpointing": True,
    "enable_activation_offloading": False,
}
FULL = {"model": {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}}
TINY = {
    "_component_": "torchtune.models.llama2.llama2",
    "vocab_size": 32000,
    "num_layers": 22,
    "num_heads": 32,
    "num_kv_heads": 4,
    "embed_dim": 2048,
    "intermediate_dim": 5632,
    "max_seq_len": 2048,
    "attn_dropout": 0.0,
    "norm_eps": "1e-5",
}


def with_change(change: dict[str, Any], start: dict[str, Any] = LORA) -> dict[str, Any]:
    """A file with ``block.key`` changed; a block given whole replaces it, and None takes it away."""
    made = deepcopy(start)
    for key, value in change.items():
        block, _, name = key.partition(".")
        if name:
            made.setdefault(block, {})[name] = value
        elif value is None:
            made.pop(block, None)
        else:
            made[block] = deepcopy(value)
    return made


@pytest.mark.parametrize(
    ("change", "gpu", "fields", "remarks"),
    [
        (
            {},
            "24GiB",
            {
                "method": "lora",
                "precision": "bf16",
                "autocast": None,
                "adapter_precision": "base",
                "sequence_length": 2048,
                "micro_batch": 2,
                "gradient_accumulation": 8,
                "optimizer": "adamw_fused",
                "gradient_checkpointing": True,
                "lora": {
                    "rank": 8,
                    "alpha": 16,
                    "dropout": 0.0,
                    "target_modules": [
                        "q_proj",
                        "v_proj",
                        "o_proj",
                        "gate_proj",
                        "up_proj",
                        "down_proj",
                    ],
                },
            },
            {"loss._component_": "too high", "model._component_": "either way"},
        ),
        (
            {"model._component_": "torchtune.models.llama3.qlora_llama3_8b"},
            "24GiB",
            {"method": "qlora", "quantization": {"type": "nf4", "double": True}},
            {"model.quantize_base": "either way"},
        ),
        (
            {"model.quantize_base": True},
            "2x24GiB",
            {
                "method": "qlora",
                "quantization": {"storage": "bf16"},
                "parallel": {"strategy": "fsdp2", "gpus": 2},
            },
            {},
        ),
        ({"model.use_dora": True}, "24GiB", {"adapter": {"use_dora": True, "r": 8}}, {}),
        (
            {
                "model.lora_attn_modules": ["q_proj"],
                "model.apply_lora_to_mlp": False,
                "model.apply_lora_to_output": True,
            },
            "24GiB",
            {"lora": {"target_modules": ["q_proj", "lm_head"]}},
            {},
        ),
        (FULL, "24GiB", {"method": "full", "lora": None}, {}),
        (
            FULL
            | {
                "optimizer._component_": "bitsandbytes.optim.PagedAdamW8bit",
                "optimizer_in_bwd": True,
            },
            "24GiB",
            {"optimizer": "paged_adamw_8bit"},
            {"optimizer_in_bwd": "too high"},
        ),
        (
            {"dtype": "fp32", "enable_activation_checkpointing": False},
            "24GiB",
            {"precision": "fp32", "gradient_checkpointing": False},
            {},
        ),
        ({"enable_activation_offloading": True}, "24GiB", {"activation_offload": True}, {}),
        (
            {
                "tokenizer.max_seq_len": 512,
                "dataset.packed": True,
                "batch_size": "${gradient_accumulation_steps}",
            },
            "24GiB",
            {"sequence_length": 512, "micro_batch": 8},
            {"dataset.packed": "either way"},
        ),
        (
            {"fsdp_cpu_offload": True},
            "8x80GiB",
            {"parallel": {"strategy": "fsdp2", "gpus": 8, "offload": "cpu"}},
            {},
        ),
        (
            {"tensor_parallel_dim": 2},
            "4x80GiB",
            {"parallel": {"tensor": 2, "gpus": 4}},
            {"tensor_parallel_dim": "either way"},
        ),
        (
            {
                "tokenizer.max_seq_len": 1024,
                "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1},
            },
            "2x24GiB",
            {"micro_batch": 2, "objective": "dpo"},
            {"dpo with whole logits": "too low"},
        ),
        (
            FULL
            | {
                "loss._component_": "torchtune.rlhf.loss.DPOLoss",
                "ref_checkpointer": {"model_type": "LLAMA3"},
            },
            "2x24GiB",
            {"method": "full", "preference": {"reference": None}},
            {"dpo with whole logits": "too low"},
        ),
        (
            {"model": TINY},
            "24GiB",
            {"method": "full", "model": {"num_hidden_layers": 22, "rms_norm_eps": 1e-5}},
            {},
        ),
        (
            {"model._component_": "torchtune.models.phi4.lora_phi4_14b"},
            "48GiB",
            {"model": {"model_type": "llama", "num_key_value_heads": 10}, "model_name": "phi4_14b"},
            {},
        ),
        (
            {"model._component_": "torchtune.models.gemma2.lora_gemma2_2b"},
            "24GiB",
            {"attention": "eager"},
            {},
        ),
    ],
)
def test_a_recipes_settings_are_the_steps(change, gpu, fields, remarks, tmp_path: Path) -> None:
    found = asked(tmp_path, with_change(change), gpu=gpu)
    said(found, **fields)
    told = {remark.key: remark.errs for remark in found.reading.remarks}
    assert remarks.items() <= told.items() and not found.reading.unknown


def test_rows_without_a_limit_are_said_and_the_command_in_the_comments_says_how_many_gpus(
    tmp_path: Path,
) -> None:
    text = "# tune run --nproc_per_node 4 lora_finetune_distributed --config x\n" + yaml.safe_dump(
        LORA
    )
    found = asked(tmp_path, text)
    said(found, parallel={"strategy": "fsdp2", "gpus": 4})
    assert any("cuts no rows off" in note for note in found.reading.notes)
    assert found.asked.assumed["sequence_length"] == 2048
    said(asked(tmp_path, text, gpu="24GiB"), parallel={"strategy": "fsdp2", "gpus": 4})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"teacher_model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}},
            "teacher model",
        ),
        ({"policy_model": TINY}, "PPO keeps four models"),
        ({"grpo_samples": 16}, "GRPO generates"),
        (
            {"quantizer": {"_component_": "Int8DynActInt4WeightQATQuantizer", "groupsize": 256}},
            "rounds weights",
        ),
        (
            {"optimizer": None, "quantizer": {"_component_": "Int8", "groupsize": 256}},
            "quantizes, and trains nothing",
        ),
        ({"optimizer": None, "tasks": ["truthfulqa_mc2"]}, "evaluates, and trains nothing"),
        (
            {"optimizer": None, "prompt": {"user": "Tell me a joke."}},
            "generates, and trains nothing",
        ),
        (
            {"model._component_": "torchtune.models.llama3_2_vision.lora_llama3_2_vision_11b"},
            "image's encoder",
        ),
        (
            {"model._component_": "torchtune.models.llama4.lora_llama4_scout_17b_16e"},
            "torchtune's own",
        ),
        ({"model._component_": "my_models.lora_mine_7b"}, "not known here"),
        ({"model": {"lora_rank": 8}}, "not known here"),
        (
            {"model": {"_component_": "torchtune.models.llama2.llama2", "vocab_size": 32000}},
            "needs the sizes",
        ),
        ({"model.lora_rnak": 8}, "model.lora_rank: ..."),
        ({"dtype": "fp16"}, "bf16 or fp32"),
        ({"batch_size": "many"}, "a whole number"),
    ],
)
def test_what_is_not_described_has_no_answer(change, says, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        asked(tmp_path, with_change(change), gpu="24GiB")
    assert says in str(caught.value)


def test_each_builders_model_is_in_the_catalogue() -> None:
    table = yaml.safe_load((TABLES / "torchtune.yaml").read_text(encoding="utf-8"))
    assert {
        name for name in table["models"].values() if not (MODELS / f"{name}.json").is_file()
    } == set()
    needed = set(list(table["arguments"])[:6])
    assert all(needed <= set(sizes) for sizes in table["sizes"].values())


# --- whose file it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"train": {"epochs": 1}, "checkpoint_dir": "x", "precision": "bf16-true"},
            "looks like a file of litgpt",
        ),
        (
            {"training": {"epochs": 1}, "memory": {}, "trainig": 3},
            "pipeline with sections that it doesn't have (trainig)",
        ),
        ({"dataset": {"path": "x"}, "learning_rate": 1e-4, "hidden": 3}, "No tool is known"),
        ({"model": {"name": "x"}, "data": {}, "optim": {}, "hooks": []}, "No tool is known"),
        ({"services": {"app": {}}}, "Docker Compose"),
        (["just", "a", "list"], "holds no keys"),
    ],
)
def test_a_file_of_nobodys_is_no_runs_and_has_no_answer(
    content, says, tmp_path: Path, capsys
) -> None:
    with pytest.raises(UserError) as caught:
        asked(tmp_path, content, gpu="24GiB")
    assert says in str(caught.value) and "torchtune (model._component_)" in str(caught.value)
