"""Files of GRPO trainings: what of the cycle is understood, and what decides and is not described."""

from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from dryfit.common.text import GIB
from dryfit.planner.omissions import omissions
from tests.dryfit.ask.test_readers import asked, said

needs_trl = pytest.mark.skipif("not __import__('importlib').util.find_spec('trl')")
TRL = {
    "model_name_or_path": "meta-llama/Llama-3.2-1B",
    "dataset_name": "x",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 256,
}


@needs_trl
def test_a_file_of_trl_is_its_own_step_and_not_supervised_fine_tuning(tmp_path: Path) -> None:
    found = asked(tmp_path, TRL)
    said(
        found,
        objective="grpo",
        sequence_length=512 + 256,
        loss="full",
        preference={"generations": 4, "completion_length": 256, "reference": None},
        generation={"engine": "transformers", "steps_per_generation": None, "iterations": 1},
    )
    assert not any(remark.key == "trainer" for remark in found.reading.remarks)


@needs_trl
@pytest.mark.parametrize(("adapters", "reference"), [(False, "model"), (True, "adapter_off")])
def test_beta_brings_a_reference(adapters: bool, reference: str, tmp_path: Path) -> None:
    found = asked(
        tmp_path,
        TRL | {"beta": 0.04, "use_peft": adapters, "steps_per_generation": 4, "num_iterations": 2},
    )
    said(
        found,
        preference={"reference": reference},
        generation={"steps_per_generation": 4, "iterations": 2},
    )


@needs_trl
def test_vllm_of_trl_takes_its_share_and_sleeps(tmp_path: Path) -> None:
    server = {
        "use_vllm": True,
        "vllm_gpu_memory_utilization": 0.4,
        "vllm_enable_sleep_mode": True,
        "vllm_max_model_length": 2048,
        "dtype": "bfloat16",
    }
    found = asked(tmp_path, TRL | server, gpu="h100-80gb")
    said(
        found,
        generation={
            "engine": "vllm",
            "mode": "colocate",
            "utilization": 0.4,
            "sleep_level": 2,
            "max_model_length": 2048,
        },
    )
    assert not found.reading.remarks
    found = asked(tmp_path, TRL | {"use_vllm": True, "vllm_mode": "server"}, gpu="h100-80gb")
    said(
        found, generation={"engine": "vllm", "mode": "server", "utilization": 0.9, "sleep_level": 0}
    )


@needs_trl
@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"use_peft": True, "load_in_4bit": True}, "use_vllm"),
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size"),
    ],
)
def test_what_of_vllm_is_not_described_says_that_the_answer_is_too_low(
    more: dict, key: str, tmp_path: Path
) -> None:
    found = asked(tmp_path, TRL | {"use_vllm": True} | more, gpu="h100-80gb")
    said(found, objective="grpo", generation={"engine": "none"})
    assert {remark.key: remark.errs for remark in found.reading.remarks} == {key: "too low"}


@needs_trl
def test_axolotls_blocks_are_trls_settings(tmp_path: Path) -> None:
    content = {
        "base_model": "meta-llama/Llama-3.2-1B",
        "datasets": [{"path": "x"}],
        "rl": "grpo",
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "sequence_len": 1024,
        "adapter": "lora",
        "lora_target_linear": True,
        "trl": {
            "beta": 0.01,
            "num_generations": 4,
            "max_completion_length": 256,
            "use_vllm": True,
            "vllm_mode": "colocate",
        },
        "vllm": {"gpu_memory_utilization": 0.45, "max_model_len": 2048},
    }
    found = asked(tmp_path, content, gpu="h100-80gb")
    said(
        found,
        objective="grpo",
        preference={"generations": 4, "completion_length": 256, "reference": "adapter_off"},
        generation={"engine": "vllm", "utilization": 0.45, "max_model_length": 2048},
    )


NOTEBOOK = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Llama-3.2-1B-Instruct", max_seq_length=1024, load_in_4bit=False, fast_inference=True,
    gpu_memory_utilization=0.6)
model = FastLanguageModel.get_peft_model(model, r=32, target_modules=["q_proj", "v_proj"])
from trl import GRPOConfig, GRPOTrainer
args = GRPOConfig(per_device_train_batch_size=4, num_generations=4, max_prompt_length=256, max_completion_length=768)
trainer = GRPOTrainer(model=model, args=args)
"""


@needs_trl
def test_a_notebook_of_unsloth_is_trls_cycle_and_says_what_unsloth_does_otherwise(
    tmp_path: Path,
) -> None:
    found = asked(tmp_path, NOTEBOOK, name="program.py")
    said(
        found,
        objective="grpo",
        sequence_length=1024,
        preference={"generations": 4, "completion_length": 768},
    )
    assert {"unsloth", "gpu_memory_utilization"} <= {remark.key for remark in found.reading.remarks}


@needs_trl
@pytest.mark.parametrize(
    ("more", "taken", "in_the_update"),
    [("", 0.6, True), ("import os\nos.environ['UNSLOTH_VLLM_STANDBY'] = '1'", 0.87875, False)],
)
def test_unsloths_vllm_has_the_one_copy_of_the_weights(
    more, taken, in_the_update, tmp_path: Path
) -> None:
    """``standby``: what Unsloth sets for a card of 80 GB, whatever the program asks for."""
    found = asked(tmp_path, f"{more}\n{NOTEBOOK}", name="program.py", gpu="a100-80gb")
    adapters, weights, states, step = 10_000_000, 3 * 2**30, 2**20, 5 * 2**30
    trace = {
        "trainable_parameters": adapters,
        "resident_bytes": weights + 4 * adapters,
        "components": {},
        "components_by_phase": {"update": {"optimizer_states": states}},
        "peak_allocated_bytes": step,
    }
    left_out = {
        one.what: one for one in omissions(found.readings, found.scenario, {"trace": trace})
    }
    share = int(taken * found.gpu.total_bytes)
    more_bytes = share - weights if in_the_update else share + 4 * adapters + states - step
    assert left_out["gpu_memory_utilization"].too_low_bytes == more_bytes


@needs_trl
def test_a_group_that_the_batch_cuts_is_refused_as_trl_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="doesn't divide"):
        asked(tmp_path, TRL | {"num_generations": 6})


PROGRAMS = {
    "rloo": (
        "from trl import RLOOConfig, RLOOTrainer\n"
        "args = RLOOConfig(num_generations=4, per_device_train_batch_size=4, max_completion_length=128)\n"
        "RLOOTrainer(model='meta-llama/Llama-3.2-1B', args=args)",
        {
            "sequence_length": 640,
            "preference": {"generations": 4, "reference": "model"},
            "method": "full",
        },
    ),
    "distillation": (
        "from trl import DistillationConfig, DistillationTrainer\n"
        "args = DistillationConfig(teacher_model_name_or_path='qwen2.5-7b', use_vllm=True, max_completion_length=64,\n"
        "                          vllm_gpu_memory_utilization=0.25)\n"
        "DistillationTrainer(model='qwen2.5-0.5b', args=args)",
        {
            "preference": {"teacher": "qwen2.5-7b", "completion_length": 64},
            "generation": {"engine": "vllm", "utilization": 0.25},
        },
    ),
    "online_dpo": (
        "from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer\n"
        "args = OnlineDPOConfig(max_new_tokens=32, per_device_train_batch_size=2)\n"
        "OnlineDPOTrainer(model='meta-llama/Llama-3.2-1B', args=args)",
        {"sequence_length": 512, "preference": {"completion_length": 32}, "micro_batch": 2},
    ),
}


@needs_trl
@pytest.mark.parametrize("objective", PROGRAMS)
def test_programs_of_trls_other_trainers_that_generate(objective: str, tmp_path: Path) -> None:
    text, fields = PROGRAMS[objective]
    found = asked(tmp_path, text, name="program.py", gpu="h100-80gb")
    said(found, objective=objective, **fields)
    assert not found.reading.remarks


SLEEPS, ADAPTERS = {"vllm_enable_sleep_mode": True}, {"use_peft": True}
SHARE, MODEL = 40 * GIB, 2 * 10**10  # of 80 GiB; a model of ten billion weights in 16 bits


@pytest.mark.parametrize(
    ("strategy", "more", "taken"),
    [
        ("MULTI_GPU", {"dtype": "bfloat16"}, {"use_vllm": SHARE, "beta": MODEL}),
        ("MULTI_GPU", {}, {"use_vllm": SHARE, "beta": 2 * MODEL}),  # weights in fp32
        ("MULTI_GPU", {"beta": 0.0}, {"use_vllm": SHARE}),
        (
            "MULTI_GPU",
            {"beta": 0.0} | SLEEPS,
            {"use_vllm": SHARE + 4 * GIB - 10 * GIB},
        ),  # it sleeps at the peak
        ("MULTI_GPU", ADAPTERS, {"use_vllm": SHARE}),
        ("DEEPSPEED", {"bf16": True}, {"use_vllm": SHARE, "beta": MODEL // 4}),
        # At a share of 1 % the sync decides: vLLM's weights, and the model that is gathered for its adapters.
        (
            "DEEPSPEED",
            ADAPTERS | SLEEPS | {"vllm_gpu_memory_utilization": 0.01},
            {"use_vllm": 2 * MODEL - 6 * GIB},
        ),
    ],
)
def test_what_lies_beside_a_training_of_several_gpus_has_a_size(
    strategy, more, taken, tmp_path: Path
) -> None:
    """A reference as the strategy has it, and what vLLM takes of the card while it is awake."""
    beside = {
        "distributed_type": strategy,
        "num_processes": 4,
        "deepspeed_config": {"zero_stage": 3},
    }
    content = TRL | {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.5,
        "beta": 0.04,
    }
    found = asked(tmp_path, content | more, beside, gpu="{vram_gib: 80, count: 4}")
    trace = {
        "parameters": 10**10,
        "components": {},
        "resident_bytes": 4 * GIB,
        "peak_allocated_bytes": 10 * GIB,
    }
    sizes = {
        one.what: one.too_low_bytes
        for one in omissions([found.reading], found.scenario, {"trace": trace})
    }
    assert {key: size for key, size in sizes.items() if key in ("use_vllm", "beta")} == taken


def test_a_refusal_that_asks_for_a_mapping_is_told(tmp_path: Path, monkeypatch) -> None:
    from dryfit.ask import answer

    def refuse(*_, **__):
        raise UserError(
            "vLLM can't start.", change={"generation": {"engine": "vllm", "max_model_length": 1024}}
        )

    monkeypatch.setattr(answer, "whole_answer", refuse)
    with pytest.raises(UserError, match="can't start"):
        answer.traced(asked(tmp_path, TRL))
