"""Other tools' files, key by key: what comes out of them, with the tools' own defaults, and that nothing is dropped."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dryfit import readers
from dryfit.ask.question import Question, QuestionOptions, question
from dryfit.common.errors import UserError
from dryfit.common.text import GIB
from dryfit.planner.omissions import of_an_older_loss, of_older_tools, omissions
from dryfit.readers.reading import TABLES, TOO_LOW, keys
from dryfit.scenario.fields import BY_NAME

AXOLOTL = {"base_model": "meta-llama/Llama-3.2-1B", "datasets": [{"path": "x"}]}
FACTORY = {"model_name_or_path": "meta-llama/Llama-3.2-1B", "stage": "sft", "do_train": True}
TRL = {"model_name_or_path": "meta-llama/Llama-3.2-1B", "dataset_name": "x"}


def asked(
    folder: Path, content: Any, *others: Any, name: str = "file.yaml", **options: Any
) -> Question:
    paths = []
    for number, mapping in enumerate((content, *others)):
        path = folder / (name if number == 0 else f"beside-{number}.yaml")
        path.write_text(
            mapping if isinstance(mapping, str) else yaml.safe_dump(mapping), encoding="utf-8"
        )
        paths.append(path)
    return question(paths, QuestionOptions(**options))


def said(found: Question, **fields: Any) -> None:
    mapping = found.scenario.to_mapping()
    for name, value in fields.items():
        given = mapping[name]
        if isinstance(value, dict):
            given = {key: given[key] for key in value}
        assert given == value, f"{name}: {mapping[name]}"


def told(found: Question) -> dict[str, str]:
    """Which way the answer errs, by the key of each remark and by what bounds it."""
    remarks = [remark for reading in found.readings for remark in reading.remarks]
    return {f"bound {one.bound}": one.errs for one in remarks} | {
        one.key: one.errs for one in remarks
    }


def left_out(found: Question, **trace: Any) -> dict[str, Any]:
    return {
        one.what: one
        for one in omissions(found.readings, found.scenario, {"trace": TRACED | trace})
    }


# --- the tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_table_says_each_key_once(path: Path) -> None:
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert table["tool"] and table["version"]
    assert not set(table["understood"]) & set(table["not_described"])
    for errs, why, *_ in table["not_described"].values():
        assert errs in ("too high", "too low", "either way") and len(why) > 10
    listed = table["does_not_matter"].split()
    assert not {key for key in table["understood"] if key in listed}


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_understood_names_fields_of_the_scenario(path: Path) -> None:
    later = {"objective", "preference", "activation_offload"}  # fields of newer scenarios
    for key, sets in yaml.safe_load(path.read_text(encoding="utf-8"))["understood"].items():
        for name in sets.partition(" (")[0].split(", "):
            assert name.partition(".")[0] in {*BY_NAME, *later}, f"{key}: {sets}"


def test_each_key_is_one_of_four_and_code_asks_only_for_what_is_understood() -> None:
    table = keys("axolotl")
    kinds = {
        key: table.kind(key)
        for key in (
            "sequence_len",
            "tiled_mlp",
            "wandb_project",
            "dsv4_bf16_all",
            "sequence_length",
        )
    }
    assert list(kinds.values()) == [
        "understood",
        "not described",
        "harmless",
        "not described",
        "unknown",
    ]
    get, _ = readers.reading.begin(AXOLOTL, keys("axolotl"), Path("x"))
    with pytest.raises(LookupError, match="wandb_project"):
        get("wandb_project")


# --- what a tool's settings come to, and which of them say how the answer errs -------------------------------------

STARTS = {
    "axolotl": AXOLOTL,
    "factory": FACTORY,
    "factory16": FACTORY | {"bf16": True},
    "trl": TRL,
    "nothing": {},
}
PACKED = {
    "r": 64,
    "peft_type": "LORA",
    "base_model_name_or_path": "Qwen/Qwen3-0.6B",
    "target_modules": ["q_proj"],
}
LIGER = {
    "liger_fused_linear_cross_entropy": True,
    "liger_rms_norm": True,
    "liger_rope": True,
    "liger_swiglu": True,
}
EIGHT = {"adapter": "lora", "load_in_8bit": True, "lora_target_linear": True}
QWEN = {"base_model": "Qwen/Qwen2.5-0.5B", "sequence_len": 256}
ROUTED = {"base_model": "Qwen/Qwen3-30B-A3B", "model_config": {"output_router_logits": True}}
ON_ONE = {"model": "Qwen/Qwen3-0.6B", "tuner_type": "full", "nproc_per_node": 1}
PURE = {"finetuning_type": "full", "pure_bf16": True, "bf16": False}
OFFLOADED = {"activation_offloading": True, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("start", "more", "fields", "remarks"),
    [
        (
            "trl",
            {"use_liger_kernel": True},
            {"kernels": "liger", "loss": "liger"},
            {"kernels": None},
        ),
        (
            "factory",
            {"enable_liger_kernel": True},
            {"kernels": "liger", "loss": "liger"},
            {"kernels": None},
        ),
        (
            "factory",
            {"use_unsloth": True},
            {"kernels": "unsloth", "loss": "chunked"},
            {"use_unsloth": "too high"},
        ),
        ("axolotl", LIGER, {"kernels": "liger", "loss": "liger"}, {"kernels": None}),
        (
            "axolotl",
            LIGER | {"liger_rope": None},
            {"kernels": "transformers", "loss": "liger"},
            {"liger_rms_norm": "too high"},
        ),
        (
            "trl",
            {"use_liger_kernel": True, "fsdp": "full_shard"},
            {"kernels": "transformers", "loss": "full"},
            {"kernels": "too high"},
        ),
        (
            "axolotl",
            {},
            {
                "method": "full",
                "sequence_length": 512,
                "micro_batch": 1,
                "precision": "bf16",
                "autocast": "bf16",
                "gradient_checkpointing": False,
                "optimizer": "adamw_fused",
                "loss": "full",
            },
            {"bound head_fp32": "too low"},
        ),
        (
            "axolotl",
            {
                "adapter": "qlora",
                "load_in_4bit": True,
                "lora_r": 32,
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "lora_target_linear": True,
                "sequence_len": 2048,
                "micro_batch_size": 2,
                "sample_packing": True,
                "gradient_checkpointing": True,
                "optimizer": "paged_adamw_8bit",
                "attn_implementation": "flash_attention_2",
                "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
            },
            {
                "method": "qlora",
                "quantization": {"type": "nf4", "double": True, "storage": "bf16"},
                "sequence_length": 2048,
                "lora": {"rank": 32, "alpha": 16, "dropout": 0.05, "target_modules": "all-linear"},
                "attention": "flash",
                "micro_batch": 2,
                "gradient_checkpointing": "reentrant",
                "optimizer": "paged_adamw_8bit",
                "loss": "chunked",
                "kbit_preparation": "none",
            },
            {},
        ),
        (
            "axolotl",
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            },
            {"gradient_checkpointing": True},
            {},
        ),
        ("axolotl", {"fp16": True, "bf16": False}, {"precision": "fp16", "autocast": "fp16"}, {}),
        ("axolotl", {"bf16": False}, {"precision": "fp32", "autocast": None}, {}),
        ("axolotl", {"bf16": "full"}, {"precision": "bf16", "autocast": None}, {}),
        ("axolotl", {"flash_attention": True}, {"attention": "flash"}, {}),
        ("axolotl", {"xformers_attention": True}, {"attention": "mem_efficient"}, {}),
        ("axolotl", {"micro_batch_size": 4}, {"attention_mask": "padding"}, {}),
        (
            "axolotl",
            {"micro_batch_size": 4, "flash_attention": True},
            {"attention_mask": "none"},
            {},
        ),
        (
            "axolotl",
            {
                "fsdp": ["full_shard", "auto_wrap"],
                "fsdp_config": {"fsdp_offload_params": True},
                "fsdp_version": 2,
            },
            {"parallel": {"strategy": "fsdp2", "gpus": 2, "offload": "cpu"}},
            {},
        ),
        (
            "axolotl",
            {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}, "world_size": 4},
            {"parallel": {"strategy": "fsdp2", "gpus": 4, "reshard_after_forward": False}},
            {},
        ),
        (
            "axolotl",
            {
                "adapter": "lora",
                "lora_target_modules": ["q_proj"],
                "lora_modules_to_save": ["embed_tokens", "lm_head"],
            },
            {
                "method": "lora",
                "adapter": {
                    "modules_to_save": ["embed_tokens", "lm_head"],
                    "target_modules": ["q_proj"],
                },
            },
            {},
        ),
        ("axolotl", {"rl": "dpo"}, {"micro_batch": 1, "objective": "dpo"}, {}),
        (
            "axolotl",
            {"rl": "dpo", "optimizer": "paged_adamw_8bit"},
            {"micro_batch": 2, "objective": "sft"},
            {},
        ),
        (
            "axolotl",
            {
                "tiled_mlp": True,
                "vllm": {"host": "x"},
                "eval_batch_size": 8,
                "sequence_lenn": 4096,
                "lora_o_kernel": False,
            },
            {},
            {
                "tiled_mlp": "too high",
                "vllm": "too low",
                "eval_batch_size": "too low",
                "lora_o_kernel": None,
            },
        ),
        ("axolotl", EIGHT, {"method": "qlora", "quantization": {"type": "int8"}}, {}),
        (
            "axolotl",
            EIGHT | {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}},
            {"method": "lora"},
            {"bound int8": "too high"},
        ),
        (
            "axolotl",
            QWEN | OFFLOADED,
            {"activation_offload": True},
            {"activation_offloading": None},
        ),
        # Where the model is divided, the step keeps its activations on the GPU: the answer says that it is too high.
        (
            "axolotl",
            QWEN | OFFLOADED | {"fsdp_version": 2, "fsdp_config": {"x": 1}},
            {"activation_offload": False},
            {"activation_offloading": "too high"},
        ),
        *(
            (
                "axolotl",
                QWEN
                | {
                    "adapter": "lora",
                    "lora_r": 8,  # whatever the text model is called; a stop may be escaped
                    "lora_target_modules": f"model.{name}layers.[\\d]+.self_attn.q_proj",
                },
                {"adapter": {"target_modules": "model.layers.[\\d]+.self_attn.q_proj"}},
                {},
            )
            for name in ("language_model.", "text_model.", "language_model\\.")
        ),
        # A loss that runs past the model's own keeps no routers' logits here.
        ("axolotl", ROUTED, {"experts": {"router_loss": True}}, {"model_config": None}),
        (
            "axolotl",
            ROUTED | {"cut_cross_entropy": True},
            {"experts": {"router_loss": False}},
            {"model_config": "too low"},
        ),
        (
            "factory",
            {"model_name_or_path": "Qwen/Qwen3-30B-A3B", "moe_aux_loss_coef": 0.01},
            {"experts": {"router_loss": True}},
            {},
        ),
        (
            "factory",
            {"model_name_or_path": "Qwen/Qwen3-30B-A3B"},
            {"experts": {"router_loss": False}},
            {},
        ),
        (
            "axolotl",
            {
                "adapter": "qlora",
                "load_in_4bit": True,
                "bf16": False,
                "fp16": True,
                "gpu": "2xt4",
                "deepspeed": {"zero_optimization": {"stage": 2}},
            },
            {"quantization": {"storage": "fp16"}, "autocast": "fp16"},
            {"bnb_4bit_quant_storage": "either way"},
        ),
        (
            "axolotl",
            {"deepspeed": "deepspeed_configs/zero1.json"},
            {"parallel": {"strategy": "zero1"}, "zero": {"overlap_comm": True}},
            {},
        ),
        (
            "axolotl",
            {"deepspeed": "deepspeed_configs/zero2.json"},
            {"parallel": {"strategy": "zero2"}, "zero": {"offload_optimizer": "cpu"}},
            {},
        ),
        (
            "axolotl",
            {"deepspeed": "deepspeed_configs/zero3_bf16.json"},
            {
                "parallel": {"strategy": "zero3"},
                "zero": {"sub_group_size": 0, "reduce_bucket_size": "auto"},
            },
            {},
        ),
        (
            "axolotl",
            {"deepspeed": "zero3_bf16_cpuoffload_params.json"},
            {
                "parallel": {"strategy": "zero3"},
                "zero": {"offload_param": "cpu", "offload_optimizer": "none"},
            },
            {},
        ),
        (
            "factory16",
            {"deepspeed": "examples/deepspeed/ds_z2_config.json"},
            {"parallel": {"strategy": "zero2"}, "zero": {"round_robin_gradients": True}},
            {},
        ),
        (
            "factory16",
            {"deepspeed": "ds_z3_offload_config.json"},
            {"parallel": {"strategy": "zero3"}, "zero": {"offload_param": "cpu"}},
            {},
        ),
        ("factory16", {"deepspeed": "default-zero2"}, {"parallel": {"strategy": "zero2"}}, {}),
        (
            "factory16",
            {},
            {
                "method": "lora",
                "sequence_length": 2048,
                "micro_batch": 8,
                "precision": "bf16",
                "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
                "gradient_checkpointing": "reentrant",
                "autocast": "bf16",
                "attention_mask": "padding",
            },
            {},
        ),
        (
            "factory16",
            {"finetuning_type": "full"},
            {"method": "full", "precision": "bf16-mixed"},
            {},
        ),
        ("factory16", PURE, {"precision": "bf16", "autocast": None}, {}),
        (
            "factory16",
            PURE | {"deepspeed": "ds_z3_config.json"},
            {"precision": "fp32", "autocast": None},
            {},
        ),
        (
            "factory16",
            {"quantization_bit": 4},
            {"method": "qlora", "quantization": {"double": True, "storage": "bf16"}},
            {},
        ),
        (
            "factory16",
            {"quantization_bit": 4, "double_quantization": False},
            {"quantization": {"double": False}},
            {},
        ),
        (
            "factory16",
            {"disable_gradient_checkpointing": True},
            {"gradient_checkpointing": False},
            {},
        ),
        ("factory16", {"use_reentrant_gc": False}, {"gradient_checkpointing": True}, {}),
        ("factory16", {"flash_attn": "fa2"}, {"attention": "flash"}, {}),
        (
            "factory16",
            {"lora_target": "q_proj,v_proj"},
            {"lora": {"target_modules": ["q_proj", "v_proj"]}},
            {},
        ),
        (
            "factory16",
            {"finetuning_type": "oft"},
            {"adapter": {"peft_type": "OFT", "oft_block_size": 32}},
            {},
        ),
        (
            "factory16",
            {"stage": "dpo", "per_device_train_batch_size": 1},
            {"micro_batch": 1, "objective": "dpo"},
            {},
        ),
        (
            "factory16",
            {
                "deepspeed": {
                    "zero_optimization": {"stage": 2},
                    "data_types": {"grad_accum_dtype": "fp32"},
                    "bf16": {"enabled": "auto"},
                }
            },
            {"zero": {"other": {"data_types": {"grad_accum_dtype": "fp32"}}}},
            {},
        ),
        (
            "factory",
            {"per_device_eval_batch_size": 8, "eval_strategy": "no"},
            {},
            {"evaluation": None},
        ),
        (
            "nothing",
            {
                "model": "Qwen/Qwen3-0.6B",
                "model_class": "llm",
                "dist_config": {"name": "fsdp2"},
                "cutoff_len": 1024,
                "peft_config": {"name": "lora", "r": 16, "target_modules": "all"},
                "quant_config": {"name": "bnb", "quantization_bit": 4},
            },  # LLaMA-Factory's newer files
            {
                "method": "qlora",
                "sequence_length": 1024,
                "lora": {"rank": 16},
                "parallel": {"strategy": "fsdp2", "gpus": 2},
            },
            {},
        ),
        (
            "nothing",
            ON_ONE | {"gpu": "4090", "deepspeed": {"zero_optimization": {"stage": 3}}},
            {},
            {"bound masters": TOO_LOW},
        ),  # fp32 copies that count against the card
        (
            "nothing",
            ON_ONE
            | {
                "gpu": "4090",
                "deepspeed": {
                    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}
                },
            },
            {},
            {"bound masters": None},
        ),
        (
            "nothing",
            PACKED,
            {"adapter": {"r": 64}, "model": {"hidden_size": 1024}},
            {},
        ),  # an adapter that is there
        (
            "trl",
            {},
            {
                "method": "full",
                "precision": "bf16-mixed",
                "sequence_length": 1024,
                "micro_batch": 8,
                "gradient_checkpointing": True,
                "loss": "chunked",
                "attention_mask": "padding",
            },
            {},
        ),
        (
            "trl",
            {"use_peft": True, "load_in_4bit": True},
            {
                "method": "qlora",
                "quantization": {"double": False},
                "adapter_precision": "bf16",
                "precision": "fp32",
                "autocast": "bf16",
            },
            {},
        ),
        (
            "trl",
            {"use_peft": True, "dtype": "bfloat16", "lora_target_modules": "all-linear"},
            {"method": "lora", "precision": "bf16", "lora": {"rank": 16, "dropout": 0.05}},
            {},
        ),
        ("trl", {"loss_type": "nll"}, {"loss": "full"}, {}),
        ("trl", {"packing": True}, {"attention_mask": "none"}, {}),
        (
            "trl",
            {"attn_implementation": "kernels-community/flash-attn3"},
            {"attention": "flash"},
            {},
        ),
        ("trl", {"fp16": True}, {"precision": "fp16-mixed"}, {}),
        (
            "trl",
            {
                "deepspeed": {"zero_optimization": {"stage": 3}},
                "bf16": True,
                "use_liger_kernel": True,
                "gpu": "8xh100",
                "tool": "trl",
            },
            {"loss": "chunked", "parallel": {"strategy": "zero3"}},
            {"loss": "too low", "bound liger_loss": "too low"},
        ),
    ],
)
def test_settings_are_fields_or_remarks(start, more, fields, remarks, tmp_path: Path) -> None:
    options = {name: more[name] for name in ("gpu", "tool") if name in more}
    name = "adapter_config.json" if more == PACKED else "file.yaml"
    given = STARTS[start] | {key: value for key, value in more.items() if key not in options}
    found = asked(tmp_path, given, name=name, **options)
    said(found, **fields)
    errs = told(found)
    assert {key: errs.get(key) for key in remarks} == remarks
    assert found.reading.unknown == (
        {"sequence_lenn": "sequence_len"} if "sequence_lenn" in more else {}
    )


INDUCTOR, REGIONS = {"dynamo_backend": "INDUCTOR"}, {"dynamo_use_regional_compilation": True}
FSDP = {"distributed_type": "FSDP", "num_processes": 4, "mixed_precision": "bf16"}
FSDP2 = {"fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": False}}
COMPILED = {"torch_compile": True}


@pytest.mark.parametrize(
    ("more", "beside", "fields", "remarks"),
    [
        *(
            (
                COMPILED | {"torch_compile_mode": mode},
                None,
                {"compile": "model", "compile_mode": mode},
                {"torch_compile_mode": None},
            )
            for mode in ("reduce-overhead", "max-autotune")
        ),
        *(
            (
                {
                    "torch_compile": True,
                    "torch_compile_mode": mode,
                    "gradient_accumulation_steps": 2,
                },
                None,
                {"compile": "model", "compile_mode": "default"},
                {"torch_compile_mode": "too low"},
            )  # pools of their own
            for mode in ("reduce-overhead", "max-autotune")
        ),
        # What `accelerate launch` hands to the program, as `accelerate config` writes it or with the older keys.
        (
            {},
            {"dynamo_config": INDUCTOR | REGIONS},
            {"compile": "layers"},
            {"compile": None, "dynamo_config": None},
        ),
        (
            {},
            {"dynamo_config": {"backend": "INDUCTOR", "mode": "reduce-overhead"}},
            {"compile": "model", "compile_mode": "reduce-overhead"},
            {"compile": None, "dynamo_config": None},
        ),
        (
            {"gradient_accumulation_steps": 4},
            {"dynamo_config": INDUCTOR | {"dynamo_mode": "max-autotune"}},
            {"compile": "model", "compile_mode": "default"},
            {"torch_compile_mode": "too low", "dynamo_config": None},
        ),
        (
            {"loss_type": "sigmoid", "beta": 0.1},
            {"dynamo_config": INDUCTOR | REGIONS},
            {"compile": "none"},
            {"compile": "too high", "dynamo_config": None},
        ),
        (
            {},
            {"dynamo_config": {"dynamo_backend": "AOT_EAGER"}},
            {"compile": "none"},
            {"compile": None, "dynamo_config": "either way"},
        ),
        (
            {},
            {"dynamo_config": {"dynamo_backend": "NO"}},
            {"compile": "none"},
            {"compile": None, "dynamo_config": None},
        ),
        ({}, {"dynamo_config": {}}, {"compile": "none"}, {"compile": None, "dynamo_config": None}),
        (
            {},
            {"dynamo_backend": "AOT_EAGER"},
            {},
            {"dynamo_backend": "either way", "dynamo_config": None},
        ),
        # On several GPUs layers go with FSDP2; a whole model does not, and is told.
        (
            {},
            FSDP | FSDP2 | {"dynamo_config": INDUCTOR | REGIONS},
            {"compile": "layers", "parallel": {"strategy": "fsdp2", "gpus": 4}},
            {"dynamo_config": None},
        ),
        (
            {},
            FSDP | FSDP2 | {"dynamo_config": INDUCTOR},
            {"compile": "none", "parallel": {"strategy": "fsdp2", "gpus": 4}},
            {"dynamo_config": "too high"},
        ),
        (
            {},
            FSDP | FSDP2 | {"compute_environment": "LOCAL_MACHINE"},
            {"parallel": {"strategy": "fsdp2", "gpus": 4}, "loss": "full"},
            {},
        ),
        *(
            (
                {},
                FSDP | {"fsdp_config": {"fsdp_version": 2, "fsdp_sharding_strategy": strategy}},
                {"parallel": {"strategy": "fsdp2", "reshard_after_forward": reshards}},
                {},
            )
            for strategy, reshards in (("SHARD_GRAD_OP", False), ("FULL_SHARD", True))
        ),
        # As `trl dpo --config FILE`: nothing of the supervised trainer's defaults contradicts it.
        (
            {"bf16": True, "settings": ["objective=dpo"]},
            {
                "distributed_type": "DEEPSPEED",
                "num_processes": 4,
                "deepspeed_config": {"zero_stage": 3},
            },
            {"objective": "dpo", "loss": "full", "parallel": {"strategy": "zero3", "gpus": 4}},
            {},
        ),
    ],
)
def test_trls_file_and_accelerates_beside_it(
    more, beside, fields, remarks, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(readers.common, "find_spec", lambda name: name)
    beside = [{"distributed_type": "NO", "mixed_precision": "bf16"} | beside] if beside else []
    content = TRL | {key: value for key, value in more.items() if key != "settings"}
    found = asked(tmp_path, content, *beside, settings=more.get("settings", ()))
    said(found, **fields)
    errs = told(found)
    assert {key: errs.get(key) for key in remarks} == remarks


@pytest.mark.parametrize("given", ["axolotl", "factory", "trl"])
@pytest.mark.parametrize(
    ("more", "triton", "compile", "hint"),
    [
        ({}, True, "model", None),
        ({}, False, "none", "the extra `run`"),
        ({"torch_compile_mode": "max-autotune-no-cudagraphs"}, True, "model", None),
        ({"torch_compile_mode": "reduce-overhead"}, False, "none", "its own buffers"),
    ],
)
def test_torch_compile_is_followed_where_it_can_be(
    given, more, triton, compile, hint, tmp_path, monkeypatch
):
    found_before = readers.common.find_spec
    monkeypatch.setattr(
        readers.common,
        "find_spec",
        lambda name: (triton or None) if name == "triton" else found_before(name),
    )
    found = asked(tmp_path, STARTS[given] | {"torch_compile": True} | more)
    said(found, compile=compile)
    hints = [str(remark) for remark in found.reading.remarks if remark.key == "torch_compile"]
    assert not hints if hint is None else hint in hints[0] and "too high" in hints[0]
    if compile == "model":
        said(found, compile_mode=more.get("torch_compile_mode", "default"))


TWO, THREE = {"stage": 2}, {"stage": 3}


@pytest.mark.parametrize(
    ("config", "zero"),
    [
        ({"stage": 1}, {"reduce_bucket_size": 500_000_000, "overlap_comm": None}),
        (
            TWO | {"reduce_bucket_size": "5e7", "overlap_comm": True},
            {"reduce_bucket_size": 50_000_000},
        ),
        (
            TWO | {"reduce_bucket_size": 2e8, "round_robin_gradients": True},
            {"round_robin_gradients": True},
        ),
        (TWO | {"cpu_offload": True}, {"offload_optimizer": "cpu"}),
        (
            TWO | {"offload_param": {"device": "cpu"}},
            {"offload_param": "none"},
        ),  # which DeepSpeed ignores
        (
            THREE | {"offload_param": {"device": "cpu"}},
            {"offload_param": "cpu", "offload_optimizer": "none"},
        ),
        (THREE | {"reduce_bucket_size": "auto"}, {"reduce_bucket_size": "auto"}),
        (
            THREE | {"max_live_parameters": 0, "prefetch_bucket_size": 7},
            {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 7},
        ),
        (THREE | {"sub_group_size": "auto"}, {"sub_group_size": 1_000_000_000}),
        (THREE | {"zero_quantized_weights": False, "zero_hpz_partition_size": 1}, {"other": None}),
        (
            THREE | {"zero_quantized_weights": True},
            {"other": {"zero_optimization": {"zero_quantized_weights": True}}},
        ),
        (
            THREE | {"offload_optimizer": {"device": "nvme"}},
            {
                "other": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
                "offload_optimizer": "none",
            },
        ),
    ],
)
def test_what_deepspeeds_file_says_of_zero(config: dict, zero: dict, tmp_path: Path) -> None:
    """What has no rule is kept for DeepSpeed's own package."""
    found = asked(tmp_path, FACTORY | {"bf16": True, "deepspeed": {"zero_optimization": config}})
    said(found, parallel={"strategy": f"zero{config['stage']}", "gpus": 2}, zero=zero)


def test_axolotls_packed_experts_are_followed_on_one_gpu(tmp_path: Path) -> None:
    packed = AXOLOTL | {
        "base_model": "qwen3-30b-a3b",
        "adapter": "qlora",
        "load_in_4bit": True,
        "quantize_moe_experts": True,
        "lora_target_modules": ["q_proj"],
    }
    found = asked(tmp_path, packed)
    assert found.scenario.experts.quantized == "bitsandbytes" and not found.reading.remarks
    linear = {"quantize_moe_experts": None, "llama4_linearized_experts": True}
    found = asked(tmp_path, packed | linear)
    assert found.scenario.experts.quantized == "bitsandbytes"
    assert [(one.key, one.errs) for one in found.reading.remarks] == [
        ("llama4_linearized_experts", "too high")
    ]
    eight = {"load_in_4bit": False, "load_in_8bit": True, "adapter": "lora"}
    said(
        asked(tmp_path, packed | eight),
        experts={"quantized": "bitsandbytes"},
        quantization={"type": "int8"},
    )
    numbers = 48 * 128 * 3 * 2048 * 768  # layers, experts, matrices
    for more, why, spared in (
        (
            {"lora_target_parameters": ["experts.down_proj"]},
            "without adapters of their own",
            numbers * 95 // 64,
        ),
        (
            eight | {"lora_target_parameters": ["experts.down_proj"]},
            "without adapters of their own",
            numbers,
        ),
        ({"base_model": "meta-llama/Llama-3.2-1B"}, "beside a quantized base alone", None),
    ):
        other = asked(tmp_path, packed | more)
        assert other.scenario.experts.quantized == "none"
        assert [remark.errs for remark in other.reading.remarks if why in remark.why] == [
            "too high"
        ]
        whole = left_out(other)["quantize_moe_experts"]
        assert (whole.too_low_bytes, whole.too_high_bytes) == (0, spared)


# --- LLaMA-Factory -------------------------------------------------------------------------------------------------


# --- TRL -----------------------------------------------------------------------------------------------------------


def test_deepspeeds_file_is_found_beside_or_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8"
    )
    for named in ("ds.json", "examples/deepspeed/ds_z3_config.json"):
        found = asked(tmp_path, FACTORY | {"bf16": True, "deepspeed": named})
        assert found.scenario.parallel.gpus == 2
    with pytest.raises(UserError, match="isn't there"):
        asked(tmp_path, FACTORY | {"deepspeed": "mine.json"})


ZERO2 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


@pytest.mark.parametrize(("gpu", "count"), [("24GiB", 1), ("4x24GiB", 4), (None, 2)])
def test_zero_without_a_number_of_gpus_is_on_those_that_are_asked_about(
    gpu, count, tmp_path: Path
) -> None:
    for content, others in ((TRL, (ZERO2,)), (TRL | {"deepspeed": ZERO2}, ())):
        found = asked(tmp_path, content, *others, gpu=gpu)
        said(found, parallel={"strategy": "zero2" if count > 1 else "none", "gpus": count})


# --- programs ------------------------------------------------------------------------------------------------------

UNSLOTH = """
from unsloth import FastLanguageModel
import torch
max_seq_length = 4096
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Llama-3.2-1B-Instruct", max_seq_length=max_seq_length, load_in_4bit=True, dtype=None)
model = FastLanguageModel.get_peft_model(
    model, r=32, target_modules=["q_proj", "v_proj"], lora_alpha=16, use_gradient_checkpointing="unsloth")
trainer = SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=2, optim="adamw_8bit", packing=PACK))
raise SystemExit("this is never run")
"""


def test_a_notebook_of_unsloth_is_read_and_never_run(tmp_path: Path) -> None:
    lines = "%%capture\n!pip install unsloth\n" + UNSLOTH
    cells = [
        {"cell_type": "code", "source": lines.splitlines(keepends=True)},
        {"cell_type": "markdown", "source": []},
    ]
    found = asked(tmp_path, json.dumps({"cells": cells}), name="book.ipynb")
    said(
        found,
        method="qlora",
        sequence_length=4096,
        micro_batch=2,
        lora={"rank": 32},
        optimizer="adamw_8bit",
        kernels="unsloth",
        loss="chunked",
        attention="mem_efficient",
        attention_mask="none",
        gradient_checkpointing="reentrant",
        activation_offload=True,
    )
    remarks = {remark.key: remark for remark in found.reading.remarks}
    assert remarks["unsloth"].bound == "step" and remarks["packing"].value == "PACK"
    plain = """
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", torch_dtype=torch.bfloat16,
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True))
model = prepare_model_for_kbit_training(model)
args = TrainingArguments("out", per_device_train_batch_size=2, bf16=True, gradient_checkpointing=True)
trainer = SFTTrainer(model, args=args, peft_config=LoraConfig(r=8, target_modules="all-linear"), max_seq_length=512)
"""
    said(
        asked(tmp_path, plain, name="train.py"),
        method="qlora",
        kbit_preparation="peft",
        sequence_length=512,
        micro_batch=2,
        lora={"rank": 8},
        quantization={"double": True},
        gradient_checkpointing=True,
        autocast="bf16",
    )


@pytest.mark.parametrize(
    ("trainer", "loss"), [("SFT", "chunked"), ("DPO", "full"), ("ORPO", "full")]
)
def test_the_logits_of_pairs_are_whole_with_unsloth(
    trainer: str, loss: str, tmp_path: Path, monkeypatch
) -> None:
    """Unsloth computes them in chunks where an environment variable asks for it, and else as TRL does."""
    found_before = readers.common.find_spec
    monkeypatch.setattr(
        readers.common, "find_spec", lambda name: None if name == "trl" else found_before(name)
    )
    text = UNSLOTH.replace("SFTTrainer", f"{trainer}Trainer").replace(
        "SFTConfig", f"{trainer}Config"
    )
    said(
        asked(tmp_path, text, name="train.py"), loss=loss, micro_batch=2 if trainer == "SFT" else 4
    )


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says", "write"),
    [
        ({"trainer": "x", "lr": 1}, "No tool is known", "model:"),
        (
            {"model_name_or_path": "x", "per_device_train_batch_size": 1, "do_train": True},
            "Several tools",
            "--from",
        ),
        (
            {"model_name_or_path": "x", "per_device_train_batch_size": 1, "bf16": True},
            "Several tools",
            "--from",
        ),
        ({"model_name_or_path": "x", "lora_r": 8, "lora_rank": 8}, "Several tools", "--from"),
        ("[1, 2]", "holds no keys", "model:"),
        ("", "holds no keys", "model:"),
        (AXOLOTL | {"base_model": "./no/such/folder"}, "isn't there", "model:"),
        (AXOLOTL | {"base_model": "meta-llama/$MODEL"}, "neither the name", "model:"),
        (
            {
                "model_name_or_path": "x",
                "template": "llama3",
                "export_dir": "out",
                "finetuning_type": "lora",
            },
            "trains nothing",
            "",
        ),
        ((AXOLOTL, TRL), "Give one model or training file", ""),
        ("import torch\n", "No trainer that dryfit knows", ""),
        ("SFTTrainer(model=script.model)\n", "names no model", ""),
        ("def broken(:\n", "not Python", ""),
    ],
)
def test_files_that_can_not_be_read_say_what_to_write(
    content: Any, says: str, write: str, tmp_path: Path
) -> None:
    name = "train.py" if isinstance(content, str) and content.endswith("\n") else "file.yaml"
    with pytest.raises(UserError) as caught:
        asked(tmp_path, *(content if isinstance(content, tuple) else [content]), name=name)
    assert says in caught.value.problem and write in (caught.value.write or "")


def test_from_decides_between_tools(tmp_path: Path) -> None:
    content = {
        "model_name_or_path": "Qwen/Qwen3-0.6B",
        "per_device_train_batch_size": 1,
        "do_train": True,
    }
    assert asked(tmp_path, content, tool="trl").scenario.sequence_length == 1024
    assert asked(tmp_path, content, tool="llama-factory").scenario.sequence_length == 2048


@pytest.mark.parametrize(
    ("tool", "content"),
    [
        (
            "axolotl",
            {"base_model": "smollm2-135m", "micro_batch_size": 1, "flash_attention": False},
        ),
        (
            "trl",
            {
                "model_name_or_path": "smollm2-135m",
                "per_device_train_batch_size": 1,
                "use_peft": True,
            },
        ),
        (
            "llama-factory",
            {
                "model_name_or_path": "smollm2-135m",
                "stage": "sft",
                "per_device_train_batch_size": 1,
            },
        ),
    ],
)
def test_a_file_of_one_row_asked_about_with_several_carries_the_mask_of_padded_rows(
    tool, content, tmp_path
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")

    def mask(**options) -> str:
        return question([path], QuestionOptions(tool=tool, **options)).scenario.attention_mask

    assert [mask(), mask(micro_batch=4), mask(least_rows=2)] == ["none", "padding", "padding"]
    assert mask(micro_batch=4, settings=["attention_mask=none"]) == "none"


def test_a_gpu_as_text_keeps_its_count(tmp_path) -> None:
    words = ["qwen2.5-coder-7b"]
    asked = [
        question(words, QuestionOptions(gpu="8xh100-80gb")),
        question(words, QuestionOptions(settings=["gpu=8xh100-80gb"])),
        question(words, QuestionOptions(settings=["gpu=h100-80gb x 8"])),
        question(words, QuestionOptions(settings=["gpu={name: h100-80gb, count: 8}"])),
        question(words, QuestionOptions(settings=["gpu.name=h100-80gb", "gpu.count=8"])),
    ]
    path = tmp_path / "step.yaml"
    path.write_text("model: qwen2.5-coder-7b\ngpu: 8xh100-80gb\n", encoding="utf-8")
    asked.append(question([path], QuestionOptions()))
    for one in asked:
        assert one.gpu.count == 8 and one.scenario.gpu == asked[0].scenario.gpu
        assert (
            one.scenario.parallel == asked[0].scenario.parallel and one.scenario.parallel.gpus == 8
        )
    with pytest.raises(UserError, match="more than `gpu` has"):
        question(
            words,
            QuestionOptions(settings=["gpu=2xh100-80gb", "parallel={strategy: fsdp2, gpus: 8}"]),
        )
    with pytest.raises(UserError, match="two numbers of GPUs"):
        question(words, QuestionOptions(settings=["gpu={name: 2xh100-80gb, count: 8}"]))


# --- what a file leaves open ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "older"),
    [
        ({}, {"gradient_checkpointing": False, "loss": "full", "precision": "fp32"}),
        ({"dtype": "bfloat16", "loss_type": "nll"}, {"gradient_checkpointing": False}),
        (
            {"bf16": True, "gradient_checkpointing": True, "loss_type": "chunked_nll"},
            {},
        ),  # the precision is the same
        (
            {"load_in_4bit": True, "use_peft": True},
            {"gradient_checkpointing": False, "loss": "full"},
        ),
        (
            {"settings": ("gradient_checkpointing=true", "loss=chunked")},
            {"precision": "fp32"},
        ),  # typed: no default
    ],
)
def test_older_versions_of_trl_have_other_defaults(more: dict, older: dict, tmp_path: Path) -> None:
    content = TRL | {key: value for key, value in more.items() if key != "settings"}
    found = asked(tmp_path, content, settings=more.get("settings", ()))
    assert found.reading.older == older and found.reading.older_is == "TRL before 1.7"


@pytest.mark.parametrize(
    ("more", "backward", "told"),
    [({}, 9, True), ({}, 4, False), ({"enable_liger_kernel": True}, 9, False)],
    ids=["at the loss", "peak elsewhere", "no whole logits"],
)
def test_an_older_loss_copies_the_logits(more, backward, told, tmp_path: Path) -> None:
    """1 GiB of logits in fp32; the peak of 9 GiB lies in the backward pass, or in the update."""
    content = FACTORY | {"cutoff_len": 2048, "per_device_train_batch_size": 1, "bf16": True} | more
    found = asked(tmp_path, content)
    logits = 4 * found.scenario.tokens * found.scenario.model["vocab_size"]
    trace = {
        "phases": {"backward": backward * GIB},
        "peak_allocated_bytes": 9 * GIB,
        "required_bytes": 9 * GIB,
    }
    for usable, short in ((9 * GIB + logits - 1, True), (9 * GIB + logits, False)):
        texts = list(of_an_older_loss([found.reading], found.scenario, trace, usable))
        assert bool(texts) == (told and short) and all(
            "transformers before 4.49" in text for text in texts
        )
    assert not list(of_an_older_loss([], found.scenario, trace, 9 * GIB))


def test_a_program_that_names_no_dtype_loads_in_fp32_before_transformers_5(tmp_path: Path) -> None:
    load = "AutoModelForCausalLM.from_pretrained('meta-llama/Llama-3.2-1B'{})"
    rest = "from trl import *\nt = SFTTrainer(model={}, args=SFTConfig(max_length=64, bf16=True))\nt.train()\n"
    for more, precision in (("", "bf16-mixed"), (", torch_dtype=torch.bfloat16", None)):
        found = asked(tmp_path, rest.format(load.format(more)), name="a.py")
        assert found.reading.older.get("precision") == precision
        assert found.reading.older["loss"] == "full"


def test_an_older_version_whose_step_does_not_fit_is_named(tmp_path: Path) -> None:
    found = asked(tmp_path, TRL | {"dtype": "bfloat16"})
    needs = {(True, "chunked"): 10 * 2**30, (False, "full"): 25 * 2**30}

    def traced(scenario: Any) -> int:
        return needs[scenario.gradient_checkpointing, scenario.loss]

    (said,) = of_older_tools(found.readings, found.scenario, 24 * 2**30, traced)
    assert said.startswith(
        "with TRL before 1.7, whose defaults are no checkpointing and whole logits, the step needs 25"
    )
    assert list(of_older_tools(found.readings, found.scenario, 26 * 2**30, traced)) == [], (
        "it fits all the same"
    )
    typed = found.scenario.changed(gradient_checkpointing=False, loss="full")
    assert list(of_older_tools(found.readings, typed, 1, traced)) == []  # the asker's own settings


TRACED = {
    "phases": {"forward": 3 * 2**30, "backward": 2 * 2**30},
    "peak_allocated_bytes": 4 * 2**30,
    "resident_bytes": 2**30,
    "components": {"gradients": 7},
    "components_by_phase": {"optimizer": {}},
}
VOCABULARY = 128256  # Llama-3.2-1B's
UNSLOTHED = FACTORY | {"use_unsloth": True}
OSS = UNSLOTHED | {"model_name_or_path": "openai/gpt-oss-20b", "lora_target": "q_proj"}
OSS_ALL = OSS | {
    "lora_target": "q_proj,gate_proj,up_proj,down_proj",
    "lora_rank": 8,
    "quantization_bit": 4,
}
WAITS = {"gradient_checkpointing": "reentrant", "activation_offload": True}
FSDP1 = FACTORY | {
    "fsdp": "full_shard auto_wrap offload",
    "finetuning_type": "full",
    "gpu": "4xa100-80gb",
}
TRAINED = {"parameters": 4000, "trainable_parameters": 4000}
UNIT = FACTORY | {"bf16": True, "gpu": "4xa100-40gb"}


def zero_init(flag: bool | None, stage: int) -> dict[str, Any]:
    config = {"zero_stage": stage} | ({} if flag is None else {"zero3_init_flag": flag})
    return {
        "distributed_type": "DEEPSPEED",
        "num_processes": 4,
        "mixed_precision": "bf16",
        "deepspeed_config": config,
    }


@pytest.mark.parametrize(
    ("content", "fields", "what", "low", "trace"),
    [
        # 8 rows of 2,048 tokens: logits in 16 bits, in fp32, and log_softmax's; beside 1 GiB of weights
        (
            FACTORY | {"eval_strategy": "steps", "bf16": True},
            {},
            "evaluation",
            8 * 2048 * VOCABULARY * 10 - 3 * GIB,
            {},
        ),
        (
            FACTORY | {"do_eval": True, "per_device_eval_batch_size": 1, "bf16": True},
            {},
            "evaluation",
            0,
            {},
        ),
        # 8 pairs of 1,024 tokens, in 16 bits: 10 bytes for each logit, beside forward's 3 GiB
        (
            TRL | {"command": "dpo", "dtype": "bfloat16"},
            {},
            "dpo with whole logits",
            16 * 1024 * VOCABULARY * 10 - GIB,
            {},
        ),
        (
            UNSLOTHED | {"per_device_train_batch_size": 2, "bf16": True},
            {},
            "older Unsloth with whole logits",
            2 * 2048 * VOCABULARY * 6 - GIB,
            {},
        ),
        (
            UNSLOTHED | {"model_name_or_path": "gemma-3-4b"},
            WAITS | {"attention": "eager"},
            "vision tower",
            2 * 416_866_032,
            {},
        ),
        *(
            (
                UNSLOTHED | {"model_name_or_path": model},
                WAITS | {"attention": "mem_efficient"},
                "vision tower",
                None,
                {},
            )
            for model in ("gemma-2-9b", "llama-3-8b")
        ),
        # Unsloth's copy of gpt-oss has experts in 4 bits; flex_attention keeps no scores either.
        (
            OSS_ALL,
            {"experts": {"quantized": "bitsandbytes"}, "lora": {"target_modules": ["q_proj"]}},
            "target_modules of experts",
            24 * 32 * 8 * (4 * 2880 + 2880) * 16,
            {},
        ),
        (OSS | {"quantization_bit": 4}, {}, "target_modules of experts", None, {}),
        (OSS, {"experts": {"quantized": "none"}}, "target_modules of experts", None, {}),
        (OSS | {"pure_bf16": True}, {"attention": "flash"}, "target_modules of experts", None, {}),
        (
            OSS | {"pure_bf16": True, "model_name_or_path": "google/gemma-2-9b"},
            {"attention": "mem_efficient"},
            "target_modules of experts",
            None,
            {},
        ),
        # FSDP1's shards of gradients are in fp32 under autocast, else in the weights' dtype.
        # FSDP2 gives them to the host.
        (
            FSDP1 | {"bf16": True},
            {"parallel": {"strategy": "fsdp2", "offload": "cpu"}},
            "offload",
            4000,
            TRAINED,
        ),
        (FSDP1 | {"pure_bf16": True}, {}, "offload", 2000, TRAINED),
        (FSDP1, {}, "offload", 4000, TRAINED),
        (
            FSDP1 | {"fsdp_config": {"version": 2}, "bf16": True, "finetuning_type": "lora"},
            {},
            "offload",
            None,
            TRAINED,
        ),
        # A model that nothing wraps is one unit.
        (
            UNIT | {"fsdp": "full_shard"},
            {"parallel": {"strategy": "fsdp1"}},
            "no auto_wrap",
            2 * 1010,
            {"parameters": 1000, "trainable_parameters": 10},
        ),
        (UNIT | {"fsdp": "full_shard auto_wrap"}, {}, "no auto_wrap", None, TRAINED),
        (
            UNIT
            | {
                "fsdp": "full_shard",
                "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
            },
            {},
            "no auto_wrap",
            None,
            TRAINED,
        ),
        # A model that zero.Init has not made lies whole on each GPU.
        *(
            (
                TRL | {"bf16": True, "beside": zero_init(flag, stage)},
                {},
                "zero3_init_flag",
                low,
                {"parameters": 8 * GIB},
            )
            for flag, stage, low in (
                (False, 3, 12 * GIB),
                (True, 3, None),
                (None, 3, None),
                (False, 2, None),
            )
        ),
    ],
)
def test_what_is_left_open_counts_by_its_bytes(
    content, fields, what, low, trace, tmp_path: Path
) -> None:
    given = {key: value for key, value in content.items() if key not in ("gpu", "beside")}
    beside = [content["beside"]] if "beside" in content else []
    found = asked(tmp_path, given, *beside, gpu=content.get("gpu"))
    said(found, **fields)
    one = left_out(found, **trace).get(what)
    assert (one and one.too_low_bytes) == low and (one is None or one.too_high_bytes == 0)
    assert low is not None or what not in told(found)


def test_gradients_that_go_and_columns_that_stay_are_known_in_bytes(tmp_path: Path) -> None:
    assert keys("torchtune").remark("optimizer_in_bwd")[2] == "gradients"
    found = asked(tmp_path, FACTORY | {"optim": "apollo_adamw_layerwise"})
    (gone,) = [
        one
        for one in omissions(found.readings, found.scenario, {"trace": TRACED})
        if one.too_high_bytes == 7
    ]
    assert gone.what == "optim"
    found = asked(tmp_path, FACTORY | {"quantization_bit": 8, "per_device_train_batch_size": 1})
    (kept,) = omissions([], found.scenario, {})
    assert kept.too_low_bytes == 16 * (5 * 2048 + 2048 + 8192) * 2048 * 2 // 100
    assert list(omissions([], asked(tmp_path, FACTORY).scenario, {})) == []


@pytest.mark.parametrize(
    ("more", "decides"),
    [
        ({}, []),
        ({"freeze_vision_tower": True}, []),
        ({"image_max_pixels": 262144}, ["images (image_max_pixels)"]),
        ({"freeze_vision_tower": False}, ["images (freeze_vision_tower)"]),
    ],
)
def test_nothing_fits_beside_images_that_the_answer_leaves_out(
    tmp_path, more: dict, decides: list[str]
) -> None:
    """The weights and rows of a vision tower are not counted, so the answer is half of the story."""
    for model, expected in (
        ("Qwen/Qwen2.5-VL-7B-Instruct", decides),
        ("Qwen/Qwen2.5-7B-Instruct", []),
    ):
        found = asked(
            tmp_path, FACTORY | {"model_name_or_path": model, "finetuning_type": "lora"} | more
        )
        assert [
            one.what for one in omissions(found.readings, found.scenario, {}) if one.decides
        ] == expected


def test_a_model_made_of_a_configuration_is_named_by_it(tmp_path: Path) -> None:
    program = (
        "from trl import *\nmodel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("
        "'meta-llama/Llama-3.2-1B'))\nt = SFTTrainer(model=model, args=SFTConfig(max_length=64, bf16=False))\n"
        "t.train()\n"
    )
    found = asked(tmp_path, program, name="a.py")
    assert found.model == "meta-llama/Llama-3.2-1B"
    said(found, precision="fp32", method="full")
    with pytest.raises(UserError, match="names no model"):
        asked(tmp_path, program.replace("'meta-llama/Llama-3.2-1B'", "chosen()"), name="a.py")


@pytest.mark.parametrize(
    ("given", "precision", "spoken"),
    [
        ({"finetuning_type": "full"}, "fp32", True),
        (
            {"finetuning_type": "full", "deepspeed": {"zero_optimization": {"stage": 2}}},
            "fp32",
            True,
        ),
        ({}, "bf16", True),
        ({"finetuning_type": "full", "bf16": True}, "bf16-mixed", False),
        ({"finetuning_type": "full", "pure_bf16": True}, "bf16", False),
    ],
)
def test_what_llama_factory_trains_without_a_stated_precision(
    given, precision, spoken, tmp_path: Path
) -> None:
    found = asked(tmp_path, FACTORY | given, gpu="4xa100-80gb")
    said(found, precision=precision)
    assert any("none of bf16, fp16 and pure_bf16" in note for note in found.reading.notes) == spoken
