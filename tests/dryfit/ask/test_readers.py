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


def asked(folder: Path, content: Any, *others: Any, name: str = "file.yaml", **options: Any) -> Question:
    paths = []
    for number, mapping in enumerate((content, *others)):
        path = folder / (name if number == 0 else f"beside-{number}.yaml")
        path.write_text(mapping if isinstance(mapping, str) else yaml.safe_dump(mapping), encoding="utf-8")
        paths.append(path)
    return question(paths, QuestionOptions(**options))


def said(found: Question, **fields: Any) -> None:
    mapping = found.scenario.to_mapping()
    for name, value in fields.items():
        given = mapping[name]
        if isinstance(value, dict):
            given = {key: given[key] for key in value}
        assert given == value, f"{name}: {mapping[name]}"


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


def test_each_key_is_one_of_four() -> None:
    table = keys("axolotl")
    kinds = {
        key: table.kind(key)
        for key in ("sequence_len", "tiled_mlp", "wandb_project", "dsv4_bf16_all", "sequence_length")
    }
    assert list(kinds.values()) == ["understood", "not described", "harmless", "not described", "unknown"]


def test_a_readers_code_asks_only_for_what_its_table_calls_understood() -> None:
    get, _ = readers.reading.begin(AXOLOTL, keys("axolotl"), Path("x"))
    with pytest.raises(LookupError, match="wandb_project"):
        get("wandb_project")


@pytest.mark.parametrize("given", ["axolotl", "factory", "trl"])
@pytest.mark.parametrize(("more", "triton", "compile", "hint"), [
    ({}, True, "model", None),
    ({}, False, "none", "the extra `run`"),
    ({"torch_compile_mode": "max-autotune-no-cudagraphs"}, True, "model", None),
    ({"torch_compile_mode": "reduce-overhead"}, False, "none", "its own buffers"),
])  # fmt: skip
def test_torch_compile_is_followed_where_it_can_be(given, more, triton, compile, hint, tmp_path, monkeypatch):
    found_before = readers.common.find_spec
    monkeypatch.setattr(
        readers.common, "find_spec", lambda name: (triton or None) if name == "triton" else found_before(name)
    )
    file = {"axolotl": AXOLOTL, "factory": FACTORY, "trl": TRL}[given]
    found = asked(tmp_path, file | {"torch_compile": True} | more)
    said(found, compile=compile)
    told = [str(remark) for remark in found.reading.remarks if remark.key == "torch_compile"]
    assert not told if hint is None else hint in told[0] and "too high" in told[0]
    if compile == "model":
        said(found, compile_mode=more.get("torch_compile_mode", "default"))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize(("more", "mode_read"), [(0, None), (1, "default")])
def test_cuda_graphs_go_with_one_micro_batch_on_one_gpu(mode, more, mode_read, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.common, "find_spec", lambda name: name)
    file = TRL | {"torch_compile": True, "torch_compile_mode": mode, "gradient_accumulation_steps": 1 + more}
    found = asked(tmp_path, file)
    said(found, compile="model", compile_mode=mode_read or mode)
    if not more:
        assert not [remark for remark in found.reading.remarks if remark.key == "torch_compile_mode"]
        return
    (told,) = [str(remark) for remark in found.reading.remarks if remark.key == "torch_compile_mode"]
    assert "pools of their own" in told and "too low" in told


LIGER = {"liger_fused_linear_cross_entropy": True, "liger_rms_norm": True, "liger_rope": True, "liger_swiglu": True}


@pytest.mark.parametrize(("file", "more", "kernels", "loss", "told"), [
    ("trl", {"use_liger_kernel": True}, "liger", "liger", None),
    ("factory", {"enable_liger_kernel": True}, "liger", "liger", None),
    ("factory", {"use_unsloth": True}, "unsloth", "chunked", "use_unsloth"),
    ("axolotl", LIGER, "liger", "liger", None),
    ("axolotl", LIGER | {"liger_rope": None}, "transformers", "liger", "liger_rms_norm"),
    ("trl", {"use_liger_kernel": True, "fsdp": "full_shard"}, "transformers", "full", "kernels"),
])  # fmt: skip
def test_whose_kernels_a_file_asks_for(file, more, kernels, loss, told, tmp_path):
    found = asked(tmp_path, {"axolotl": AXOLOTL, "factory": FACTORY, "trl": TRL}[file] | more)
    said(found, kernels=kernels, loss=loss)
    remarks = {remark.key: remark.errs for remark in found.reading.remarks}
    assert remarks.get(told or "kernels") == (told and "too high")


# --- axolotl -------------------------------------------------------------------------------------------------------


def test_axolotls_defaults_are_its_own(tmp_path: Path) -> None:
    found = asked(tmp_path, AXOLOTL)
    said(found, method="full", sequence_length=512, micro_batch=1, precision="bf16", autocast="bf16",
         gradient_checkpointing=False, optimizer="adamw_fused", loss="full")  # fmt: skip
    assert "norms, embeddings and head in fp32" in " ".join(map(str, found.reading.remarks))


def test_axolotls_qlora(tmp_path: Path) -> None:
    content = AXOLOTL | {
        "adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05,
        "lora_target_linear": True, "sequence_len": 2048, "micro_batch_size": 2, "sample_packing": True,
        "gradient_checkpointing": True, "optimizer": "paged_adamw_8bit", "attn_implementation": "flash_attention_2",
        "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
    }  # fmt: skip
    found = asked(tmp_path, content)
    said(found, method="qlora", quantization={"type": "nf4", "double": True, "storage": "bf16"},
         lora={"rank": 32, "alpha": 16, "dropout": 0.05, "target_modules": "all-linear"}, sequence_length=2048,
         micro_batch=2, gradient_checkpointing="reentrant", optimizer="paged_adamw_8bit", attention="flash",
         loss="chunked", kbit_preparation="none")  # fmt: skip
    assert not found.reading.unknown


@pytest.mark.parametrize(("given", "fields"), [
    ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
     {"gradient_checkpointing": True}),
    ({"fp16": True, "bf16": False}, {"precision": "fp16", "autocast": "fp16"}),
    ({"bf16": False}, {"precision": "fp32", "autocast": None}),
    ({"bf16": "full"}, {"precision": "bf16", "autocast": None}),
    ({"flash_attention": True}, {"attention": "flash"}),
    ({"xformers_attention": True}, {"attention": "mem_efficient"}),
    ({"micro_batch_size": 4}, {"attention_mask": "padding"}),
    ({"micro_batch_size": 4, "flash_attention": True}, {"attention_mask": "none"}),
    ({"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"fsdp_offload_params": True}, "fsdp_version": 2},
     {"parallel": {"strategy": "fsdp2", "gpus": 2, "offload": "cpu"}}),
    ({"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}, "world_size": 4},
     {"parallel": {"strategy": "fsdp2", "gpus": 4, "reshard_after_forward": False}}),
    ({"adapter": "lora", "lora_target_modules": ["q_proj"], "lora_modules_to_save": ["embed_tokens", "lm_head"]},
     {"method": "lora", "adapter": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}}),
    ({"rl": "dpo"}, {"micro_batch": 1, "objective": "dpo"}),
    ({"rl": "dpo", "optimizer": "paged_adamw_8bit"}, {"micro_batch": 2, "objective": "sft"}),
])  # fmt: skip
def test_axolotls_settings(given: dict, fields: dict, tmp_path: Path) -> None:
    said(asked(tmp_path, AXOLOTL | given), **fields)


def test_what_is_not_described_says_which_way_the_answer_errs(tmp_path: Path) -> None:
    given = {
        "tiled_mlp": True,
        "vllm": {"host": "x"},
        "eval_batch_size": 8,
        "sequence_lenn": 4096,
        "lora_o_kernel": False,
    }
    found = asked(tmp_path, AXOLOTL | given)
    errs = {remark.key: remark.errs for remark in found.reading.remarks}
    assert errs["tiled_mlp"] == "too high" and errs["vllm"] == errs["eval_batch_size"] == "too low"
    assert "lora_o_kernel" not in errs
    assert found.reading.unknown == {"sequence_lenn": "sequence_len"}


def test_axolotls_packed_experts_are_followed_on_one_gpu(tmp_path: Path) -> None:
    packed = AXOLOTL | {"base_model": "qwen3-30b-a3b", "adapter": "qlora", "load_in_4bit": True,
                        "quantize_moe_experts": True, "lora_target_modules": ["q_proj"]}  # fmt: skip
    found = asked(tmp_path, packed)
    assert found.scenario.experts.quantized == "bitsandbytes" and not found.reading.remarks
    linear = {"quantize_moe_experts": None, "llama4_linearized_experts": True}
    found = asked(tmp_path, packed | linear)
    assert found.scenario.experts.quantized == "bitsandbytes"
    assert [(one.key, one.errs) for one in found.reading.remarks] == [("llama4_linearized_experts", "too high")]
    eight = {"load_in_4bit": False, "load_in_8bit": True, "adapter": "lora"}
    said(asked(tmp_path, packed | eight), experts={"quantized": "bitsandbytes"}, quantization={"type": "int8"})
    numbers = 48 * 128 * 3 * 2048 * 768  # layers, experts, matrices
    for more, why, spared in (
        ({"lora_target_parameters": ["experts.down_proj"]}, "without adapters of their own", numbers * 95 // 64),
        (eight | {"lora_target_parameters": ["experts.down_proj"]}, "without adapters of their own", numbers),
        ({"base_model": "meta-llama/Llama-3.2-1B"}, "beside a quantized base alone", None),
    ):
        other = asked(tmp_path, packed | more)
        assert other.scenario.experts.quantized == "none"
        assert [remark.errs for remark in other.reading.remarks if why in remark.why] == ["too high"]
        left_out = {one.what: one for one in omissions(other.readings, other.scenario, {"trace": TRACED})}
        assert left_out["quantize_moe_experts"].too_high_bytes == spared
        assert left_out["quantize_moe_experts"].too_low_bytes == 0


def test_eight_bits_are_llm_int8_and_16_where_it_can_not_be_divided(tmp_path: Path) -> None:
    eight = AXOLOTL | {"adapter": "lora", "load_in_8bit": True, "lora_target_linear": True}
    said(asked(tmp_path, eight), method="qlora", quantization={"type": "int8"})
    found = asked(tmp_path, eight | {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}})
    said(found, method="lora")
    assert any(remark.bound == "int8" and remark.errs == "too high" for remark in found.reading.remarks)


# --- LLaMA-Factory -------------------------------------------------------------------------------------------------


def test_llama_factorys_defaults_are_its_own(tmp_path: Path) -> None:
    found = asked(tmp_path, FACTORY | {"bf16": True})
    said(found, method="lora", sequence_length=2048, micro_batch=8, lora={"rank": 8, "alpha": 16, "dropout": 0.0},
         gradient_checkpointing="reentrant", precision="bf16", autocast="bf16", attention_mask="padding")  # fmt: skip


@pytest.mark.parametrize(("given", "fields"), [
    ({"finetuning_type": "full"}, {"method": "full", "precision": "bf16-mixed"}),
    ({"finetuning_type": "full", "pure_bf16": True, "bf16": False}, {"precision": "bf16", "autocast": None}),
    ({"finetuning_type": "full", "pure_bf16": True, "bf16": False, "deepspeed": "ds_z3_config.json"},
     {"precision": "fp32", "autocast": None}),
    ({"quantization_bit": 4}, {"method": "qlora", "quantization": {"double": True, "storage": "bf16"}}),
    ({"quantization_bit": 4, "double_quantization": False}, {"quantization": {"double": False}}),
    ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
    ({"use_reentrant_gc": False}, {"gradient_checkpointing": True}),
    ({"flash_attn": "fa2"}, {"attention": "flash"}),
    ({"lora_target": "q_proj,v_proj"}, {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
    ({"finetuning_type": "oft"}, {"adapter": {"peft_type": "OFT", "oft_block_size": 32}}),
    ({"stage": "dpo", "per_device_train_batch_size": 1}, {"micro_batch": 1, "objective": "dpo"}),
    ({"enable_liger_kernel": True}, {"loss": "liger"}),
])  # fmt: skip
def test_llama_factorys_settings(given: dict, fields: dict, tmp_path: Path) -> None:
    said(asked(tmp_path, FACTORY | {"bf16": True} | given), **fields)


def test_llama_factorys_newer_files(tmp_path: Path) -> None:
    content = {"model": "Qwen/Qwen3-0.6B", "model_class": "llm", "dist_config": {"name": "fsdp2"}, "cutoff_len": 1024,
               "peft_config": {"name": "lora", "r": 16, "target_modules": "all"},
               "quant_config": {"name": "bnb", "quantization_bit": 4}}  # fmt: skip
    said(asked(tmp_path, content), method="qlora", sequence_length=1024, lora={"rank": 16},
         parallel={"strategy": "fsdp2", "gpus": 2})  # fmt: skip


def test_a_file_that_only_merges_is_told(tmp_path: Path) -> None:
    content = {"model_name_or_path": "x", "template": "llama3", "export_dir": "out", "finetuning_type": "lora"}
    with pytest.raises(UserError, match="trains nothing"):
        asked(tmp_path, content)


# --- TRL -----------------------------------------------------------------------------------------------------------


def test_trls_defaults_are_its_own(tmp_path: Path) -> None:
    said(asked(tmp_path, TRL), method="full", precision="bf16-mixed", sequence_length=1024, micro_batch=8,
         gradient_checkpointing=True, loss="chunked", attention_mask="padding")  # fmt: skip


@pytest.mark.parametrize(("given", "fields"), [
    ({"use_peft": True, "load_in_4bit": True},
     {"method": "qlora", "quantization": {"double": False}, "adapter_precision": "bf16", "precision": "fp32",
      "autocast": "bf16"}),
    ({"use_peft": True, "dtype": "bfloat16", "lora_target_modules": "all-linear"},
     {"method": "lora", "precision": "bf16", "lora": {"rank": 16, "dropout": 0.05}}),
    ({"loss_type": "nll"}, {"loss": "full"}),
    ({"packing": True}, {"attention_mask": "none"}),
    ({"attn_implementation": "kernels-community/flash-attn3"}, {"attention": "flash"}),
    ({"fp16": True}, {"precision": "fp16-mixed"}),
])  # fmt: skip
def test_trls_settings(given: dict, fields: dict, tmp_path: Path) -> None:
    said(asked(tmp_path, TRL | given), **fields)


def test_accelerates_file_beside_says_how_gpus_are_used(tmp_path: Path) -> None:
    beside = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_processes": 4,
              "mixed_precision": "bf16", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": False}}  # fmt: skip
    said(asked(tmp_path, TRL, beside), parallel={"strategy": "fsdp2", "gpus": 4}, loss="full")


@pytest.mark.parametrize(("dynamo", "others", "fields", "told"), [
    ({"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": True}, {}, {"compile": "layers"}, None),
    ({"backend": "INDUCTOR", "mode": "reduce-overhead"}, {},
     {"compile": "model", "compile_mode": "reduce-overhead"}, None),
    ({"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune"}, {"gradient_accumulation_steps": 4},
     {"compile": "model", "compile_mode": "default"}, "torch_compile_mode"),
    ({"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": True}, {"loss_type": "sigmoid", "beta": 0.1},
     {"compile": "none"}, "compile"),
    ({"dynamo_backend": "AOT_EAGER"}, {}, {"compile": "none"}, "dynamo_config"),
    ({"dynamo_backend": "NO"}, {}, {"compile": "none"}, None),
    ({}, {}, {"compile": "none"}, None),
])  # fmt: skip
def test_accelerate_compiles_a_model_or_its_layers(dynamo, others, fields, told, tmp_path, monkeypatch) -> None:
    """What ``accelerate launch`` hands to the program, as ``accelerate config`` writes it or with the older keys."""
    monkeypatch.setattr(readers.common, "find_spec", lambda name: name)
    beside = {"distributed_type": "NO", "mixed_precision": "bf16", "dynamo_config": dynamo}
    found = asked(tmp_path, TRL | others, beside)
    said(found, **fields)
    keys = [remark.key for reading in found.readings for remark in reading.remarks]
    assert [key for key in keys if key in (told, "compile", "dynamo_config")] == ([told] if told else [])


def test_a_remark_about_accelerates_older_key_names_that_key(tmp_path) -> None:
    found = asked(tmp_path, TRL, {"distributed_type": "NO", "mixed_precision": "bf16", "dynamo_backend": "AOT_EAGER"})
    keys = {remark.key for reading in found.readings for remark in reading.remarks}
    assert "dynamo_backend" in keys and "dynamo_config" not in keys


@pytest.mark.parametrize("regional", [False, True])
def test_accelerate_compiles_on_several_gpus(regional, tmp_path, monkeypatch) -> None:
    """Layers go with FSDP2; a whole model does not, and is told."""
    monkeypatch.setattr(readers.common, "find_spec", lambda name: name)
    beside = {"distributed_type": "FSDP", "num_processes": 4, "mixed_precision": "bf16"}
    beside |= {"fsdp_config": {"fsdp_version": 2}}
    beside |= {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": regional}}
    found = asked(tmp_path, TRL, beside)
    said(found, compile="layers" if regional else "none", parallel={"strategy": "fsdp2", "gpus": 4})
    errs = [remark.errs for reading in found.readings for remark in reading.remarks if remark.key == "dynamo_config"]
    assert errs == ([] if regional else ["too high"])


def test_deepspeeds_file_is_found_beside_or_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    for named in ("ds.json", "examples/deepspeed/ds_z3_config.json"):
        found = asked(tmp_path, FACTORY | {"bf16": True, "deepspeed": named})
        assert found.scenario.parallel.gpus == 2
    with pytest.raises(UserError, match="isn't there"):
        asked(tmp_path, FACTORY | {"deepspeed": "mine.json"})


TWO, THREE = {"stage": 2}, {"stage": 3}


@pytest.mark.parametrize(("config", "zero"), [
    ({"stage": 1}, {"reduce_bucket_size": 500_000_000, "overlap_comm": None}),
    (TWO | {"reduce_bucket_size": "5e7", "overlap_comm": True}, {"reduce_bucket_size": 50_000_000}),
    (TWO | {"reduce_bucket_size": 2e8, "round_robin_gradients": True}, {"round_robin_gradients": True}),
    (TWO | {"cpu_offload": True}, {"offload_optimizer": "cpu"}),
    (TWO | {"offload_param": {"device": "cpu"}}, {"offload_param": "none"}),  # which DeepSpeed ignores
    (THREE | {"offload_param": {"device": "cpu"}}, {"offload_param": "cpu", "offload_optimizer": "none"}),
    (THREE | {"reduce_bucket_size": "auto"}, {"reduce_bucket_size": "auto"}),
    (THREE | {"max_live_parameters": 0, "prefetch_bucket_size": 7}, {"stage3_max_live_parameters": 0,
                                                                  "stage3_prefetch_bucket_size": 7}),
    (THREE | {"sub_group_size": "auto"}, {"sub_group_size": 1_000_000_000}),
    (THREE | {"zero_quantized_weights": False, "zero_hpz_partition_size": 1}, {"other": None}),
    (THREE | {"zero_quantized_weights": True}, {"other": {"zero_optimization": {"zero_quantized_weights": True}}}),
    (THREE | {"offload_optimizer": {"device": "nvme"}},
     {"other": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer": "none"}),
])  # fmt: skip
def test_what_deepspeeds_file_says_of_zero(config: dict, zero: dict, tmp_path: Path) -> None:
    """What has no rule is kept for DeepSpeed's own package."""
    found = asked(tmp_path, FACTORY | {"bf16": True, "deepspeed": {"zero_optimization": config}})
    said(found, parallel={"strategy": f"zero{config['stage']}", "gpus": 2}, zero=zero)


def test_gradients_summed_in_another_dtype_are_for_deepspeeds_package(tmp_path: Path) -> None:
    dtypes = {"grad_accum_dtype": "fp32"}
    deepspeed = {"zero_optimization": {"stage": 2}, "data_types": dtypes, "bf16": {"enabled": "auto"}}
    said(asked(tmp_path, FACTORY | {"bf16": True, "deepspeed": deepspeed}), zero={"other": {"data_types": dtypes}})


@pytest.mark.parametrize(("tool", "name", "parallel", "zero"), [
    (FACTORY | {"bf16": True}, "examples/deepspeed/ds_z2_config.json", "zero2", {"round_robin_gradients": True}),
    (FACTORY | {"bf16": True}, "ds_z3_offload_config.json", "zero3", {"offload_param": "cpu"}),
    (FACTORY | {"bf16": True}, "default-zero2", "zero2", {}),
    (AXOLOTL, "deepspeed_configs/zero1.json", "zero1", {"overlap_comm": True}),
    (AXOLOTL, "deepspeed_configs/zero2.json", "zero2", {"offload_optimizer": "cpu"}),
    (AXOLOTL, "deepspeed_configs/zero3_bf16.json", "zero3", {"sub_group_size": 0, "reduce_bucket_size": "auto"}),
    (AXOLOTL, "zero3_bf16_cpuoffload_params.json", "zero3", {"offload_param": "cpu", "offload_optimizer": "none"}),
])  # fmt: skip
def test_files_that_come_with_the_tools_are_known_by_tool_and_name(tool, name, parallel, zero, tmp_path: Path) -> None:
    said(asked(tmp_path, tool | {"deepspeed": name}), parallel={"strategy": parallel}, zero=zero)


def test_a_sharding_strategy_of_gradients_keeps_gathered_weights(tmp_path: Path) -> None:
    for strategy, reshards in (("SHARD_GRAD_OP", False), ("FULL_SHARD", True)):
        beside = {"distributed_type": "FSDP", "num_processes": 2, "mixed_precision": "bf16",
                  "fsdp_config": {"fsdp_version": 2, "fsdp_sharding_strategy": strategy}}  # fmt: skip
        said(asked(tmp_path, TRL, beside), parallel={"strategy": "fsdp2", "reshard_after_forward": reshards})


ZERO2 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


@pytest.mark.parametrize(("gpu", "count"), [("24GiB", 1), ("4x24GiB", 4), (None, 2)])
def test_zero_without_a_number_of_gpus_is_on_those_that_are_asked_about(gpu, count, tmp_path: Path) -> None:
    for content, others in ((TRL, (ZERO2,)), (TRL | {"deepspeed": ZERO2}, ())):
        found = asked(tmp_path, content, *others, gpu=gpu)
        said(found, parallel={"strategy": "zero2" if count > 1 else "none", "gpus": count})


@pytest.mark.parametrize(
    ("flag", "stage", "more_gib"), [(False, 3, 11.0), (True, 3, None), (None, 3, None), (False, 2, None)]
)
def test_a_model_that_zero_init_has_not_made_lies_whole_on_each_gpu(flag, stage, more_gib, tmp_path: Path) -> None:
    config = {"zero_stage": stage} | ({} if flag is None else {"zero3_init_flag": flag})
    beside = {
        "distributed_type": "DEEPSPEED",
        "num_processes": 4,
        "mixed_precision": "bf16",
        "deepspeed_config": config,
    }
    found = asked(tmp_path, TRL | {"bf16": True}, beside)
    trace = {"parameters": 8 * 2**30, "peak_allocated_bytes": 5 * 2**30, "components": {}}
    sizes = {one.what: one.too_low_bytes for one in omissions(found.beside, found.scenario, {"trace": trace})}
    assert sizes.get("zero3_init_flag") == (more_gib and more_gib * 2**30)


def test_an_objective_that_is_typed_beside_trls_file_is_its_trainer(tmp_path: Path) -> None:
    """As `trl dpo --config FILE`: nothing of the supervised trainer's defaults contradicts it."""
    beside = {"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": {"zero_stage": 3}}
    found = asked(tmp_path, TRL | {"bf16": True}, beside, settings=["objective=dpo"])
    said(found, objective="dpo", loss="full", parallel={"strategy": "zero3", "gpus": 4})


def test_an_adapter_that_is_there(tmp_path: Path) -> None:
    content = {"peft_type": "LORA", "r": 64, "base_model_name_or_path": "Qwen/Qwen3-0.6B", "target_modules": ["q_proj"]}
    found = asked(tmp_path, content, name="adapter_config.json")
    said(found, adapter={"r": 64})
    assert found.scenario.model["hidden_size"] == 1024


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
PLAIN = """
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", torch_dtype=torch.bfloat16,
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True))
model = prepare_model_for_kbit_training(model)
args = TrainingArguments("out", per_device_train_batch_size=2, bf16=True, gradient_checkpointing=True)
trainer = SFTTrainer(model, args=args, peft_config=LoraConfig(r=8, target_modules="all-linear"), max_seq_length=512)
"""


def test_a_notebook_of_unsloth_is_read_and_never_run(tmp_path: Path) -> None:
    lines = "%%capture\n!pip install unsloth\n" + UNSLOTH
    cells = [{"cell_type": "code", "source": lines.splitlines(keepends=True)}, {"cell_type": "markdown", "source": []}]
    found = asked(tmp_path, json.dumps({"cells": cells}), name="book.ipynb")
    said(found, method="qlora", sequence_length=4096, micro_batch=2, lora={"rank": 32}, optimizer="adamw_8bit")
    remarks = {remark.key: remark for remark in found.reading.remarks}
    assert remarks["unsloth"].bound == "step" and remarks["packing"].value == "PACK"
    said(found, kernels="unsloth", loss="chunked", attention="mem_efficient", attention_mask="none")
    said(found, gradient_checkpointing="reentrant", activation_offload=True)  # layers' inputs wait on the host


@pytest.mark.parametrize(("trainer", "loss"), [("SFT", "chunked"), ("DPO", "full"), ("ORPO", "full")])
def test_the_logits_of_pairs_are_whole_with_unsloth(trainer: str, loss: str, tmp_path: Path, monkeypatch) -> None:
    """Unsloth computes them in chunks where an environment variable asks for it, and else as TRL does."""
    found_before = readers.common.find_spec
    monkeypatch.setattr(readers.common, "find_spec", lambda name: None if name == "trl" else found_before(name))
    text = UNSLOTH.replace("SFTTrainer", f"{trainer}Trainer").replace("SFTConfig", f"{trainer}Config")
    said(asked(tmp_path, text, name="train.py"), loss=loss, micro_batch=2 if trainer == "SFT" else 4)


def test_a_program_of_trl_is_read_by_its_calls(tmp_path: Path) -> None:
    found = asked(tmp_path, PLAIN, name="train.py")
    said(found, method="qlora", kbit_preparation="peft", sequence_length=512, micro_batch=2,
         lora={"rank": 8}, quantization={"double": True}, gradient_checkpointing=True, autocast="bf16")  # fmt: skip


@pytest.mark.parametrize(("text", "says"), [
    ("import torch\n", "No trainer that dryfit knows"),
    ("SFTTrainer(model=script.model)\n", "names no model"),
    ("def broken(:\n", "not Python"),
])  # fmt: skip
def test_programs_that_say_too_little(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        asked(tmp_path, text, name="train.py")


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "says", "write"), [
    ({"trainer": "x", "lr": 1}, "No tool is known", "model:"),
    ({"model_name_or_path": "x", "per_device_train_batch_size": 1, "do_train": True}, "Several tools", "--from"),
    ({"model_name_or_path": "x", "per_device_train_batch_size": 1, "bf16": True}, "Several tools", "--from"),
    ({"model_name_or_path": "x", "lora_r": 8, "lora_rank": 8}, "Several tools", "--from"),
    ("[1, 2]", "holds no keys", "model:"),
    ("", "holds no keys", "model:"),
    (AXOLOTL | {"base_model": "./no/such/folder"}, "isn't there", "model:"),
    (AXOLOTL | {"base_model": "meta-llama/$MODEL"}, "neither the name", "model:"),
])  # fmt: skip
def test_files_that_can_not_be_read_say_what_to_write(content: Any, says: str, write: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        asked(tmp_path, content)
    assert says in caught.value.problem and write in caught.value.write


def test_from_decides_between_tools(tmp_path: Path) -> None:
    content = {"model_name_or_path": "Qwen/Qwen3-0.6B", "per_device_train_batch_size": 1, "do_train": True}
    assert asked(tmp_path, content, tool="trl").scenario.sequence_length == 1024
    assert asked(tmp_path, content, tool="llama-factory").scenario.sequence_length == 2048


def test_two_questions_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Give one model or training file"):
        asked(tmp_path, AXOLOTL, TRL)


@pytest.mark.parametrize(("tool", "content"), [
    ("axolotl", {"base_model": "smollm2-135m", "micro_batch_size": 1, "flash_attention": False}),
    ("trl", {"model_name_or_path": "smollm2-135m", "per_device_train_batch_size": 1, "use_peft": True}),
    ("llama-factory", {"model_name_or_path": "smollm2-135m", "stage": "sft", "per_device_train_batch_size": 1}),
])  # fmt: skip
def test_a_file_of_one_row_asked_about_with_several_carries_the_mask_of_padded_rows(tool, content, tmp_path) -> None:
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
        assert one.scenario.parallel == asked[0].scenario.parallel and one.scenario.parallel.gpus == 8
    with pytest.raises(UserError, match="more than `gpu` has"):
        question(words, QuestionOptions(settings=["gpu=2xh100-80gb", "parallel={strategy: fsdp2, gpus: 8}"]))
    with pytest.raises(UserError, match="two numbers of GPUs"):
        question(words, QuestionOptions(settings=["gpu={name: 2xh100-80gb, count: 8}"]))


@pytest.mark.parametrize("divided, offloaded", [({}, True), ({"fsdp_version": 2, "fsdp_config": {"x": 1}}, False)])
def test_offloaded_activations_of_a_divided_model_are_read_as_an_upper_bound(divided, offloaded, tmp_path) -> None:
    """Where the model is divided, the step keeps its activations on the GPU: the answer says that it is too high."""
    given = {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "sequence_len": 256,
        "micro_batch_size": 1,
        "activation_offloading": True,
    }
    found = asked(tmp_path, {**given, "datasets": [], "gradient_checkpointing": True, **divided})
    assert found.scenario.activation_offload is offloaded
    remarks = [one for one in found.reading.remarks if one.key == "activation_offloading"]
    assert [one.errs for one in remarks] == ([] if offloaded else ["too high"])


def test_target_modules_of_a_whole_model_are_those_of_its_language_model(tmp_path) -> None:
    """Whatever the text model is called; a full stop may be escaped."""
    given = {"base_model": "Qwen/Qwen2.5-0.5B", "sequence_len": 256, "datasets": [], "adapter": "lora", "lora_r": 8}
    for name in ("language_model.", "text_model.", "language_model\\."):
        targets = f"model.{name}layers.[\\d]+.self_attn.q_proj"
        found = asked(tmp_path, {**given, "lora_target_modules": targets})
        assert found.scenario.adapter["target_modules"] == "model.layers.[\\d]+.self_attn.q_proj"


@pytest.mark.parametrize("more, router_loss", [({}, True), ({"cut_cross_entropy": True}, False)])
def test_a_routers_loss_is_read_or_said_to_be_missing(more, router_loss, tmp_path) -> None:
    """Two tools' keys; a loss that runs past the model's own keeps no routers' logits here."""
    axolotl = {"base_model": "Qwen/Qwen3-30B-A3B", "sequence_len": 256, "micro_batch_size": 1, "datasets": []}
    found = asked(tmp_path, {**axolotl, "model_config": {"output_router_logits": True}, **more})
    assert found.scenario.experts.router_loss is router_loss
    assert any(one.key == "model_config" and one.errs == "too low" for one in found.reading.remarks) is not router_loss
    factory = {"model_name_or_path": "Qwen/Qwen3-30B-A3B", "stage": "sft", "finetuning_type": "lora", "do_train": True}
    assert asked(tmp_path, {**factory, "moe_aux_loss_coef": 0.01}).scenario.experts.router_loss
    assert not asked(tmp_path, factory).scenario.experts.router_loss


@pytest.mark.parametrize(("offload", "remarked"), [({}, True), ({"offload_optimizer": {"device": "cpu"}}, False)])
def test_zero_on_one_gpu_keeps_fp32_copies_that_count_against_the_card(offload, remarked, tmp_path: Path) -> None:
    file = {"zero_optimization": {"stage": 3, **offload}}
    alone = {"model": "Qwen/Qwen3-0.6B", "tuner_type": "full", "nproc_per_node": 1, "deepspeed": file}
    remarks = asked(tmp_path, alone, gpu="4090").reading.remarks
    assert any(one.bound == "masters" and one.errs == TOO_LOW for one in remarks) == remarked


# --- what a file leaves open ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "older"), [
    ({}, {"gradient_checkpointing": False, "loss": "full", "precision": "fp32"}),
    ({"dtype": "bfloat16", "loss_type": "nll"}, {"gradient_checkpointing": False}),
    ({"bf16": True, "gradient_checkpointing": True, "loss_type": "chunked_nll"}, {}),  # the precision is the same
    ({"load_in_4bit": True, "use_peft": True}, {"gradient_checkpointing": False, "loss": "full"}),
])  # fmt: skip
def test_older_versions_of_trl_have_other_defaults(more: dict, older: dict, tmp_path: Path) -> None:
    found = asked(tmp_path, TRL | more)
    assert found.reading.older == older and found.reading.older_is == "TRL before 1.7"


def test_what_is_typed_is_no_default_of_an_older_version(tmp_path: Path) -> None:
    found = asked(tmp_path, TRL, settings=("gradient_checkpointing=true", "loss=chunked"))
    assert found.reading.older == {"precision": "fp32"}


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
    trace = {"phases": {"backward": backward * GIB}, "peak_allocated_bytes": 9 * GIB, "required_bytes": 9 * GIB}
    for usable, short in ((9 * GIB + logits - 1, True), (9 * GIB + logits, False)):
        texts = list(of_an_older_loss([found.reading], found.scenario, trace, usable))
        assert bool(texts) == (told and short) and all("transformers before 4.49" in text for text in texts)
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
    assert list(of_older_tools(found.readings, found.scenario, 26 * 2**30, traced)) == [], "it fits all the same"
    typed = found.scenario.changed(gradient_checkpointing=False, loss="full")
    assert list(of_older_tools(found.readings, typed, 1, traced)) == []  # the asker's own settings


TRACED = {"phases": {"forward": 3 * 2**30, "backward": 2 * 2**30}, "peak_allocated_bytes": 4 * 2**30,
          "resident_bytes": 2**30, "components": {"gradients": 7},
          "components_by_phase": {"optimizer": {}}}  # fmt: skip
VOCABULARY = 128256  # Llama-3.2-1B's


@pytest.mark.parametrize(("content", "what", "size"), [
    # 8 rows of 2,048 tokens: logits in 16 bits, in fp32, and log_softmax's; beside 1 GiB of weights
    (FACTORY | {"eval_strategy": "steps", "bf16": True}, "evaluation", 8 * 2048 * VOCABULARY * 10 - 3 * 2**30),
    (FACTORY | {"do_eval": True, "per_device_eval_batch_size": 1, "bf16": True}, "evaluation", 0),
    # 8 pairs of 1,024 tokens, in 16 bits: 10 bytes for each logit, beside forward's 3 GiB
    (TRL | {"command": "dpo", "dtype": "bfloat16"}, "dpo with whole logits", 16 * 1024 * VOCABULARY * 10 - 2**30),
    (FACTORY | {"use_unsloth": True, "per_device_train_batch_size": 2, "bf16": True},
     "older Unsloth with whole logits", 2 * 2048 * VOCABULARY * 6 - 2**30),
])  # fmt: skip
def test_what_is_left_open_counts_by_its_bytes(content: dict, what: str, size: int, tmp_path: Path) -> None:
    found = asked(tmp_path, content)
    more = {one.what: one.too_low_bytes for one in omissions(found.readings, found.scenario, {"trace": TRACED})}
    assert more[what] == size


def test_an_evaluation_that_nobody_asks_for_is_not_counted(tmp_path: Path) -> None:
    found = asked(tmp_path, FACTORY | {"per_device_eval_batch_size": 8, "eval_strategy": "no"})
    assert "evaluation" not in {remark.key for remark in found.reading.remarks}


@pytest.mark.parametrize(
    ("model", "attention"), [("gemma-3-4b", "eager"), ("gemma-2-9b", "mem_efficient"), ("llama-3-8b", "mem_efficient")]
)
def test_unsloth_computes_gemma_3_with_eager_attention(model: str, attention: str, tmp_path: Path) -> None:
    found = asked(tmp_path, FACTORY | {"model_name_or_path": model, "use_unsloth": True})
    said(found, attention=attention, gradient_checkpointing="reentrant", activation_offload=True)
    more = {one.what: one.too_low_bytes for one in omissions(found.readings, found.scenario, {"trace": TRACED})}
    assert more.get("vision tower") == (2 * 416_866_032 if attention == "eager" else None)


def test_unsloths_copy_of_gpt_oss_has_experts_in_4_bits(tmp_path: Path) -> None:
    factory = FACTORY | {"model_name_or_path": "openai/gpt-oss-20b", "use_unsloth": True}
    names = {"lora_target": "q_proj,gate_proj,up_proj,down_proj", "lora_rank": 8}
    found = asked(tmp_path, factory | names | {"quantization_bit": 4})
    said(found, experts={"quantized": "bitsandbytes"}, lora={"target_modules": ["q_proj"]})
    more = {one.what: one.too_low_bytes for one in omissions(found.readings, found.scenario, {"trace": TRACED})}
    assert more["target_modules of experts"] == 24 * 32 * 8 * (4 * 2880 + 2880) * 16
    attention = asked(tmp_path, factory | {"lora_target": "q_proj", "quantization_bit": 4})
    assert "target_modules of experts" not in {remark.key for remark in attention.reading.remarks}
    said(asked(tmp_path, factory | {"lora_target": "q_proj"}), experts={"quantized": "none"})
    for model, attention in (("openai/gpt-oss-20b", "flash"), ("google/gemma-2-9b", "mem_efficient")):
        loaded = factory | {"model_name_or_path": model, "lora_target": "q_proj", "pure_bf16": True}
        said(asked(tmp_path, loaded), attention=attention)  # flex_attention keeps no scores either


@pytest.mark.parametrize(("more", "decides"), [
    ({}, []),
    ({"freeze_vision_tower": True}, []),
    ({"image_max_pixels": 262144}, ["images (image_max_pixels)"]),
    ({"freeze_vision_tower": False}, ["images (freeze_vision_tower)"]),
])  # fmt: skip
def test_nothing_fits_beside_images_that_the_answer_leaves_out(
    tmp_path, more: dict[str, Any], decides: list[str]
) -> None:
    """The weights and rows of a vision tower are not counted, so the answer is half of the story."""
    for model, expected in (("Qwen/Qwen2.5-VL-7B-Instruct", decides), ("Qwen/Qwen2.5-7B-Instruct", [])):
        found = asked(tmp_path, FACTORY | {"model_name_or_path": model, "finetuning_type": "lora"} | more)
        left_out = omissions(found.readings, found.scenario, {})
        assert [one.what for one in left_out if one.decides] == expected


def test_columns_that_int8_keeps_count(tmp_path: Path) -> None:
    found = asked(tmp_path, FACTORY | {"quantization_bit": 8, "per_device_train_batch_size": 1})
    (kept,) = omissions([], found.scenario, {})
    assert kept.too_low_bytes == 16 * (5 * 2048 + 2048 + 8192) * 2048 * 2 // 100
    (nothing,) = [list(omissions([], asked(tmp_path, FACTORY).scenario, {}))]
    assert nothing == []


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


def test_gradients_that_go_at_once_are_known_in_bytes(tmp_path: Path) -> None:
    assert keys("torchtune").remark("optimizer_in_bwd")[2] == "gradients"
    found = asked(tmp_path, FACTORY | {"optim": "apollo_adamw_layerwise"})
    (gone,) = [one for one in omissions(found.readings, found.scenario, {"trace": TRACED}) if one.too_high_bytes == 7]
    assert gone.what == "optim"


def test_ligers_loss_under_zero3_is_read_as_a_loss_in_chunks(tmp_path: Path) -> None:
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}, "bf16": True, "use_liger_kernel": True}
    found = asked(tmp_path, TRL | zero3, gpu="8xh100", tool="trl")
    said(found, loss="chunked", parallel={"strategy": "zero3"})
    remarks = {remark.key: (remark.errs, remark.bound) for reading in found.readings for remark in reading.remarks}
    assert remarks["loss"] == ("too low", "liger_loss")


def test_4_bit_weights_are_stored_in_deepspeeds_dtype(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2}}
    given = {"adapter": "qlora", "load_in_4bit": True, "bf16": False, "fp16": True, "deepspeed": config}
    found = asked(tmp_path, AXOLOTL | given, gpu="2xt4")
    said(found, quantization={"storage": "fp16"}, autocast="fp16")
    assert "bnb_4bit_quant_storage" in {remark.key for remark in found.reading.remarks}


def test_fsdp1_with_offload_keeps_the_shards_of_gradients(tmp_path: Path) -> None:
    """They are in fp32 under autocast, and in the dtype of the weights without; FSDP2 gives them to the host."""
    offloads = {"fsdp": "full_shard auto_wrap offload"}
    for precision, width in (({"bf16": True}, 4), ({"pure_bf16": True}, 2), ({}, 4)):
        found = asked(tmp_path, FACTORY | {"finetuning_type": "full"} | offloads | precision, gpu="4xa100-80gb")
        said(found, parallel={"strategy": "fsdp2", "offload": "cpu"})
        trace = TRACED | {"parameters": 4000, "trainable_parameters": 4000}
        (kept,) = [one for one in omissions(found.readings, found.scenario, {"trace": trace}) if one.what == "offload"]
        assert (kept.too_low_bytes, kept.too_high_bytes) == (1000 * width, 0)
    newer = {"fsdp_config": {"version": 2}}
    found = asked(tmp_path, FACTORY | offloads | newer | {"bf16": True}, gpu="4xa100-80gb")
    assert "offload" not in {remark.key for remark in found.reading.remarks}


@pytest.mark.parametrize(("given", "precision", "spoken"), [
    ({"finetuning_type": "full"}, "fp32", True),
    ({"finetuning_type": "full", "deepspeed": {"zero_optimization": {"stage": 2}}}, "fp32", True),
    ({}, "bf16", True),
    ({"finetuning_type": "full", "bf16": True}, "bf16-mixed", False),
    ({"finetuning_type": "full", "pure_bf16": True}, "bf16", False),
])  # fmt: skip
def test_what_llama_factory_trains_without_a_stated_precision(given, precision, spoken, tmp_path: Path) -> None:
    found = asked(tmp_path, FACTORY | given, gpu="4xa100-80gb")
    said(found, precision=precision)
    assert any("none of bf16, fp16 and pure_bf16" in note for note in found.reading.notes) == spoken


@pytest.mark.parametrize(("more", "whole"), [
    ({"fsdp": "full_shard"}, True),
    ({"fsdp": "full_shard auto_wrap"}, False),
    ({"fsdp": "full_shard", "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}, False),
])  # fmt: skip
def test_a_model_that_nothing_wraps_is_one_unit(more: dict, whole: bool, tmp_path: Path) -> None:
    found = asked(tmp_path, FACTORY | {"bf16": True, **more}, gpu="4xa100-40gb")
    said(found, parallel={"strategy": "fsdp1"})
    trace = TRACED | {"parameters": 1000, "trainable_parameters": 10}
    more = {one.what: one.too_low_bytes for one in omissions(found.readings, found.scenario, {"trace": trace})}
    assert more.get("no auto_wrap") == (2 * 1010 if whole else None)
