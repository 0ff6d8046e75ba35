"""Shell scripts that start a training with ms-swift, verl or OpenRLHF, and those tools' YAML files."""

from pathlib import Path

import pytest

from dryfit.ask.question import QuestionOptions, question
from dryfit.common.errors import UserError
from dryfit.common.text import GIB
from dryfit.readers.reading import TOO_LOW
from dryfit.readers.shell import commands, is_known
from tests.dryfit.ask.test_readers import asked, left_out, said, told

needs_trl = pytest.mark.skipif("not __import__('importlib').util.find_spec('trl')")
MODEL = "meta-llama/Llama-3.2-1B"

SHELL = r"""
#!/bin/bash
set -x   # a comment with 'quotes
NAME=${NAME:-"model one"}
rows=$((1024 * 2 + 8)); half=$(expr $rows / 2)
OPTIONS=(
    --alpha 1   # of an array
    --path "$HOME/x"
)
OPTIONS+=(--beta '$kept')
LAST=$(date) A=1 \
run "${OPTIONS[@]}" --rows $rows --half ${half} "$NAME" --when "${LAST}" $@ && echo "done; not a command"
"""


def test_words_of_a_command_have_the_variables_that_the_script_sets():
    own = next(command for command in commands(SHELL) if command.words[0] == "run")
    assert own.words == [
        "run",
        "--alpha",
        "1",
        "--path",
        "~/x",
        "--beta",
        "$kept",
        "--rows",
        "2056",
        "--half",
        "1028",
        "model one",
        "--when",
        "$(date)",
    ]
    assert own.environment == {"A": "1", "LAST": "$(date)"}  # NAME is not exported
    assert not is_known("$(date)") and is_known("~/x")
    assert ["echo", "done; not a command"] in [command.words for command in commands(SHELL)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("A=2; x $((A + 3)) $((A * )) $((2 ** 3))", ["x", "5", "$((A * ))", "$((2 ** 3))"]),
        ("x ${B:-${C:-4}} ${D}", ["x", "4", "${D}"]),
        ("if [ -f y ]; then x a\\ b; fi", ["x", "a b"]),
        ("P=$(pwd)/z\nx $P", ["x", "./z"]),
        ("x 'it''s' \"a\\\"b\"", ["x", "its", 'a"b']),
        ("x a\\$ b\\\\", ["x", "a$", "b\\"]),
    ],
)
def test_expansions(line, words):
    assert words in [command.words for command in commands(line)]


SWIFT = f"""
# swift rollout --model other
NPROC_PER_NODE=$gpus \\
swift rlhf --rlhf_type grpo --model {MODEL} --tuner_type lora --lora_rank 16 \\
    --target_modules q_proj v_proj --use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.4 \\
    --vllm_max_model_len 2048 --sleep_level 1 --vllm_enforce_eager true --vllm_enable_lora true \\
    --max_length 1024 --max_completion_length 512 --num_generations 4 --beta 0 --steps_per_generation 4 \\
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --torch_dtype bfloat16 \\
    --reward_funcs accuracy format --dataset 'a#10' b
"""


@needs_trl
def test_a_command_of_ms_swift_is_a_cycle_beside_vllm(tmp_path: Path) -> None:
    found = asked(tmp_path, SWIFT, name="run.sh", gpu="h100-80gb")
    said(
        found,
        objective="grpo",
        sequence_length=1536,
        micro_batch=4,
        gradient_accumulation=2,
        method="lora",
        precision="bf16",
        autocast="bf16",
        lora={"rank": 16, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        preference={"generations": 4, "completion_length": 512, "reference": None},
        generation={
            "engine": "vllm",
            "mode": "colocate",
            "utilization": 0.4,
            "max_model_length": 2048,
            "sleep_level": 1,
            "cuda_graphs": False,
            "lora_slots": 1,
            "steps_per_generation": 4,
        },
    )
    assert [(remark.key, remark.errs) for remark in found.reading.remarks] == [
        ("rlhf_type", TOO_LOW)
    ]
    assert "logits" in found.reading.remarks[0].why and not found.reading.unknown


@needs_trl
def test_ms_swifts_defaults_are_its_own(tmp_path: Path) -> None:
    found = asked(
        tmp_path,
        f"swift rlhf --rlhf_type grpo --model {MODEL} --per_device_train_batch_size 8",
        name="x.sh",
    )
    said(
        found,
        sequence_length=1024,
        gradient_accumulation=2,
        lora={"rank": 8, "alpha": 32, "dropout": 0.05},
    )
    said(
        found,
        preference={"generations": 8, "reference": "adapter_off"},
        generation={"engine": "transformers"},
    )
    assert "max_length" in found.reading.notes[0]


def test_several_gpus_of_ms_swift_say_what_the_server_takes(tmp_path: Path) -> None:
    script = SWIFT.replace("$gpus", "4").replace(
        "--beta 0", "--deepspeed zero2_offload --reward_model m"
    )
    found = asked(tmp_path, script, name="run.sh", gpu="80GiB")
    said(found, parallel={"strategy": "zero2", "gpus": 4}, objective="sft")
    said(
        found,
        zero={
            "reduce_bucket_size": 200_000_000,
            "offload_optimizer": "cpu",
            "offload_param": "none",
        },
    )
    said_of = {remark.key: remark for remark in found.reading.remarks}
    assert "0.4 of each card" in said_of["use_vllm"].why and said_of["use_vllm"].errs == TOO_LOW
    assert "reward_model" in said_of and not any("offload" in key for key in said_of)


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        (
            "--tuner_type full --attn_impl flash_attn",
            {"method": "full", "attention": "flash", "precision": "bf16"},
        ),
        ("--quant_bits 4", {"method": "qlora", "quantization": {"type": "nf4", "double": True}}),
        ("--torch_dtype float32", {"precision": "fp16-mixed"}),
        ("--gradient_checkpointing false --padding_free true", {"gradient_checkpointing": False}),
        (
            "--gradient_checkpointing_kwargs '{\"use_reentrant\": true}'",
            {"gradient_checkpointing": "reentrant"},
        ),
        ("--fsdp fsdp2", {"parallel": {"strategy": "fsdp2", "gpus": 2}}),
        ("--tuner_type vera", {"method": "lora"}),
        (
            "--tuner_backend peft --use_liger true",
            {"kernels": "liger", "gradient_checkpointing": True, "activation_offload": False},
        ),
        (
            "--tuner_backend unsloth --use_liger true",
            {"kernels": "unsloth", "gradient_checkpointing": True, "activation_offload": False},
        ),
    ],
)
def test_a_supervised_command_of_ms_swift(more: str, fields: dict, tmp_path: Path) -> None:
    line = f"NPROC_PER_NODE={1 + ('fsdp' in more)} swift sft --model {MODEL} --max_length 2048"
    found = asked(tmp_path, f"{line} {more}", name="x.sh")
    said(found, sequence_length=2048, micro_batch=1, **fields)
    assert told(found).get("tuner_backend") == ("too high" if "unsloth" in more else None)


def test_what_a_command_of_ms_swift_divides_and_leaves_frozen(tmp_path: Path) -> None:
    line = (
        f"NPROC_PER_NODE=4 swift sft --model {MODEL} --max_length 2046 --sequence_parallel_size 4"
    )
    found = asked(tmp_path, line, name="x.sh", gpu="80GiB")
    said(found, sequence_length=512, parallel={"strategy": "ddp", "gpus": 4, "ulysses": 1})
    assert (
        "4 GPUs share a row of 2,046 tokens" in found.reading.notes[-1]
        and not found.reading.remarks
    )
    line = f"swift sft --model {MODEL} --max_length 512 --tuner_type full --lisa_activated_layers 2"
    (lisa,) = asked(tmp_path, line, name="x.sh").reading.remarks
    assert (lisa.key, lisa.errs, lisa.bound) == ("lisa_activated_layers", "too high", "frozen")
    line = f"swift sft --model {MODEL} --max_length 512 --tuner_type full --use_galore true"
    for more, spared in (("", None), (" --galore_optim_per_parameter true", 7)):
        gone = left_out(asked(tmp_path, line + more, name="run.sh", gpu="80GiB")).get(
            "galore_optim_per_parameter"
        )
        assert (gone and gone.too_high_bytes) == spared


def test_names_of_ms_swift_before_version_3_are_read(tmp_path: Path) -> None:
    """ReleaseNote3.0.md of ms-swift has the list."""
    line = f"swift sft --model_id_or_path {MODEL} --sft_type lora --dtype fp16 --quantization_bit 4 --batch_size 3"
    found = asked(
        tmp_path,
        f"{line} --lora_target_modules ALL --use_flash_attn true --max_length 512",
        name="x.sh",
    )
    said(
        found,
        method="qlora",
        micro_batch=3,
        precision="fp16",
        attention="flash",
        sequence_length=512,
    )
    said(found, lora={"target_modules": "all-linear"}, model={"hidden_size": 2048})
    assert not found.reading.unknown and any(
        "before version 3" in note for note in found.reading.notes
    )


def test_a_yaml_file_of_ms_swift_is_known_by_its_keys_and_read_from_a_command(
    tmp_path: Path,
) -> None:
    content = {
        "model": MODEL,
        "tuner_type": "lora",
        "max_length": 512,
        "dataset": ["x"],
        "deepspeed": "zero2",
    }
    said(asked(tmp_path, content, gpu="2x24GiB"), sequence_length=512, parallel={"gpus": 2})
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/run.sh").write_text("swift sft file.yaml --max_length 256\n")
    said(question([tmp_path / "deep/run.sh"], QuestionOptions(gpu="2x24GiB")), sequence_length=256)


VERL = f"""
MODEL_PATH={MODEL}
max_prompt_length=$((256 * 2))
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo data.train_batch_size=64 data.max_prompt_length=${{max_prompt_length}} \\
    data.max_response_length=1024 +data.unheard=1 actor_rollout_ref.model.path=$MODEL_PATH \\
    actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \\
    actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=4 \\
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 trainer.n_gpus_per_node=2 MORE $@
"""


VERLS = {
    "sequence_length": 1536,
    "micro_batch": 4,
    "gradient_accumulation": 16,
    "method": "full",
    "loss": "full",
    "precision": "bf16-mixed",
    "attention": "flash",
    "parallel": {"strategy": "fsdp1", "gpus": 2},
    "objective": "sft",
}


@pytest.mark.parametrize(
    ("more", "fields", "key"),
    [
        ("", VERLS, "actor_rollout_ref.actor.use_kl_loss"),
        (
            "actor_rollout_ref.model.lora_rank=32",
            {"method": "lora", "lora": {"rank": 32, "alpha": 16}},
            None,
        ),
        (
            "actor_rollout_ref.rollout.free_cache_engine=False",
            {},
            "actor_rollout_ref.rollout.free_cache_engine",
        ),
        ("algorithm.adv_estimator=gae", {}, "algorithm.adv_estimator"),
        (
            "actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.offload_policy=True",
            {"parallel": {"strategy": "fsdp2", "offload": "cpu"}},
            None,
        ),
        (
            "actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4608",
            {"micro_batch": 3},
            None,
        ),
        (
            "actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2500"
            " actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",  # 5,000 tokens for both
            {"micro_batch": 3, "sequence_length": 768, "gradient_accumulation": 43},
            None,
        ),
        (
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
            {"micro_batch": 4, "sequence_length": 768},
            None,
        ),
        ("reward_model.enable=True", {}, "reward_model.enable"),
        ("actor_rollout_ref.ref.fsdp_config.param_offload=True", {"micro_batch": 4}, None),
        ("actor_rollout_ref.actor.fsdp_config.model_dtype=bf16", {"precision": "bf16"}, None),
        (
            "trainer.n_gpus_per_node=1",
            {"parallel": {"strategy": "none"}, "gradient_accumulation": 32},
            None,
        ),
        ("trainer.nnodes=2", {"parallel": {"gpus": 4}}, None),
    ],
)
def test_a_setting_of_verl(more: str, fields: dict, key: str | None, tmp_path: Path) -> None:
    found = asked(tmp_path, VERL.replace("MORE", more), name="run.sh", gpu="80GiB")
    said(found, **fields)
    keys = [remark.key for remark in found.reading.remarks]
    assert key is None or key in keys
    if not more:
        assert (
            keys == [key]
            and "vllm takes 0.6 of each card while it generates" in found.reading.notes[-1]
        )


def test_verls_yaml_is_nested_and_its_sft_trainer_is_read(tmp_path: Path) -> None:
    content = {
        "defaults": ["ppo_trainer"],
        "data": {"max_prompt_length": 128, "max_response_length": 128},
        "actor_rollout_ref": {"model": {"path": MODEL}, "rollout": {"name": "sglang"}},
    }
    said(asked(tmp_path, content, gpu="80GiB"), sequence_length=256, parallel={"gpus": 8})
    line = (
        f"torchrun -m verl.trainer.fsdp_sft_trainer model.partial_pretrain={MODEL} data.max_length=512"
        " data.micro_batch_size_per_gpu=2 data.train_batch_size=16"
    )
    said(
        asked(tmp_path, line, name="sft.sh", gpu="2x80GiB"),
        sequence_length=512,
        gradient_accumulation=4,
    )


def test_a_command_takes_the_configuration_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/own.yaml").write_text("data: {max_prompt_length: 64}\n")
    found = asked(
        tmp_path,
        VERL.replace("data.max_prompt_length=${max_prompt_length}", "--config-name='own'").replace(
            "MORE", ""
        ),
        name="run.sh",
        gpu="80GiB",
    )
    said(found, sequence_length=64 + 1024)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("swift infer --model x", "trains nothing"),
        ("megatron rlhf --rlhf_type grpo --model x", "Megatron-SWIFT divides"),
        ("megatron sft --model x --tensor_model_parallel_size 2", "Megatron-SWIFT divides"),
        (
            VERL.replace("MORE", "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2"),
            "Megatron engine",
        ),
        ("python -m verl.trainer.main_generation model.path=x", "trains nothing"),
        ("echo hello", "No command that trains"),
        (f"swift sft --model {MODEL} --max_length long", "a whole number"),
        (VERL.replace("MORE", "actor_rollout_ref.rollout.n=many"), "a whole number"),
        (
            SWIFT.replace("--num_generations 4", "--num_generations 6"),
            "--per_device_train_batch_size 6",
        ),
    ],
)
def test_what_can_not_be_read_has_a_reason(script: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        asked(tmp_path, script, name="run.sh", gpu="80GiB")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("more", "times"),
    [
        ("", 131072 / 2048 - 1),
        ("--attn_impl eager", (131072 / 2048) ** 2 - 1),
        ("--max_length 2048", None),
    ],
)
def test_ms_swift_cuts_rows_at_the_models_length_where_nobody_says(
    more: str, times: float, tmp_path: Path
) -> None:
    """The answer is about 2,048 tokens, and nothing fits that rows as long as the model's do not."""
    found = asked(tmp_path, f"swift sft --model {MODEL} {more}", name="run.sh", gpu="80GiB")
    said(found, sequence_length=2048)
    longer = left_out(found).get("max_length")
    assert (longer and (longer.too_low_bytes, longer.too_high_bytes)) == (
        times and (times * 3 * GIB, 0)
    )


OPENRLHF = f"""ray job submit --address=http://127.0.0.1:8265 -- python3 -m openrlhf.cli.train_ppo_ray \\
    --pretrain {MODEL} --actor_num_nodes 2 --actor_num_gpus_per_node 4 --micro_train_batch_size 2 \\
    --micro_rollout_batch_size 32 --prompt_max_len 512 --generate_max_len 1536 --zero_stage 3 --adam_offload --bf16 \\
    --flash_attn --gradient_checkpointing --advantage_estimator group_norm MORE
"""


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ("", ["micro_rollout_batch_size"]),
        ("--micro_rollout_batch_size 2", []),
        (
            "--micro_rollout_batch_size 2 --use_dynamic_batch --rollout_max_tokens_per_gpu 65536",
            ["micro_rollout_batch_size"],
        ),
        ("--micro_rollout_batch_size 2 --colocate_actor_ref", ["init_kl_coef"]),
        ("--micro_rollout_batch_size 2 --colocate_actor_ref --init_kl_coef 0", []),
        (
            "--micro_rollout_batch_size 2 --init_kl_coef 0 --colocate_all_models",
            ["vllm_gpu_memory_utilization"],
        ),
        (
            "--micro_rollout_batch_size 2 --init_kl_coef 0 --colocate_all_models --advantage_estimator gae",
            ["advantage_estimator", "vllm_gpu_memory_utilization"],
        ),
    ],
)
def test_a_command_of_openrlhf_is_the_actors_update_and_says_what_lies_beside(
    more, keys, tmp_path: Path
) -> None:
    found = asked(tmp_path, OPENRLHF.replace("MORE", more), name="run.sh")
    if "dynamic" not in more:
        said(found, micro_batch=2, gradient_accumulation=8)
    said(
        found,
        sequence_length=2048,
        method="full",
        precision="bf16-mixed",
        attention="flash",
        gradient_checkpointing=True,
        parallel={"strategy": "zero3", "gpus": 8},
        zero={"offload_optimizer": "cpu", "reduce_bucket_size": "auto"},
    )
    assert found.reading.unknown == {}
    assert [remark.key for remark in found.reading.remarks if remark.errs == TOO_LOW] == keys


def test_log_probabilities_of_many_rows_count_with_their_logits(tmp_path: Path) -> None:
    """OpenRLHF has them in fp32 too; verl has their softmax, and its product with them."""
    verl = (
        f"python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path={MODEL} algorithm.adv_estimator=grpo"
        " actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 data.max_prompt_length=1024"
        " data.max_response_length=1024 actor_rollout_ref.rollout.log_prob"
    )
    for line, key, rows, width in (
        (OPENRLHF.replace("MORE", ""), "micro_rollout_batch_size", 32, 10),
        (f"{verl}_micro_batch_size_per_gpu=16", "log_prob_micro_batch_size", 16, 6),
        (f"{verl}_micro_batch_size=128", "log_prob_micro_batch_size", 16, 6),
        (
            f"{verl}_use_dynamic_bsz=True actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=32768",
            "log_prob_micro_batch_size",
            16,
            6,
        ),
        (f"{verl}_micro_batch_size_per_gpu=4", "log_prob_micro_batch_size", None, 6),
    ):
        one = left_out(asked(tmp_path, line, name="run.sh")).get(key)
        sizes = (rows * 2048 * 128256 * width - 3 * GIB, 0) if rows else None
        assert (one and (one.too_low_bytes, one.too_high_bytes)) == sizes, line


def test_openrlhfs_newer_names_and_its_supervised_trainer(tmp_path: Path) -> None:
    newer = (
        f"deepspeed --module openrlhf.cli.train_sft --model.model_name_or_path {MODEL} --data.max_len 4096"
        " --train.micro_batch_size 2 --ds.zero_stage 2 --ds.packing_samples --ds.lora.rank 16"
        " --model.gradient_checkpointing_enable --ds.attn_implementation eager"
    )
    found = asked(tmp_path, newer, name="run.sh", gpu="8xa100-80gb")
    said(
        found,
        sequence_length=4096,
        micro_batch=2,
        method="lora",
        lora={"rank": 16, "alpha": 16},
        attention="eager",
        parallel={"strategy": "zero2", "gpus": 8},
        attention_mask="none",
    )
    with pytest.raises(UserError, match="is not known here"):
        asked(tmp_path, newer.replace("train_sft", "serve_rm"), name="run.sh")
    whole = {"pretrain": MODEL, "micro_train_batch_size": 4, "zero_stage": 0}
    said(asked(tmp_path, whole), micro_batch=4, sequence_length=2048, attention="flash")
