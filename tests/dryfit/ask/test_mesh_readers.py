"""Files that divide a step on a mesh: torchtitan's, accelerate's and axolotl's."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dryfit import readers
from dryfit.ask.question import Question, QuestionOptions, question
from dryfit.common.errors import UserError
from tests.dryfit.ask.test_readers import AXOLOTL, FACTORY, TRL, asked, said

LARGE = "meta-llama/Llama-3.1-8B"  # with a head of its own
TITAN = """
[job]
dump_folder = "./outputs"
[model]
name = "llama3"
flavor = "{flavor}"
converters = {converters}
[optimizer]
name = "AdamW"
lr = 3e-4
[training]
local_batch_size = 2
seq_len = 4096
[parallelism]
{parallelism}
[activation_checkpoint]
mode = "{mode}"
[compile]
enable = false
"""
REGISTRY = """
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.trainer import Trainer


def large() -> Trainer.Config:
    spec = model_registry("70B")
    return Trainer.Config(
        loss=ChunkedLossWrapper.Config(loss_fn=None),
        model_spec=spec,
        optimizer=default_adamw(lr=1.5e-4),
        training=TrainingConfig(num_tokens_per_microbatch_per_dp_rank=8 * 2048, max_context_length=2048),
        parallelism=ParallelismConfig(tensor_parallel_degree=4),
        activation_checkpoint=FullAC.Config(),
    )


def larger() -> Trainer.Config:
    config = large()
    config.training.max_context_length = 4096
    config.parallelism = ParallelismConfig(tensor_parallel_degree=8)
    config.model_spec = model_registry("405B", converters=[Float8LinearConverter.Config(emulate=True)])
    config.activation_checkpoint = SelectiveAC.Config()
    return config
"""


def titan(folder: Path, parallelism: str = "", gpu: str = "8x80GiB", **given: Any) -> Question:
    given = {"flavor": "8B", "mode": "full", "converters": "[]", **given}
    path = folder / "llama3.toml"
    path.write_text(TITAN.format(parallelism=parallelism, **given), encoding="utf-8")
    return question([path], QuestionOptions(gpu=gpu))


def remarks(found: Question) -> dict[str, str]:
    return {one.key: one.errs for one in found.reading.remarks}


# --- torchtitan ------------------------------------------------------------------------------------------------------


LOSSLESS = {"strategy": "fsdp2", "gpus": 16, "tensor": 4}
STAGES = 'data_parallel_shard_degree = 1\npipeline_parallel_degree = 2\npipeline_parallel_schedule = "1F1B"'


@pytest.mark.parametrize(
    ("parallelism", "flavor", "gpu", "parallel", "rows"),
    [
        ("", "8B", "8x80GiB", {"strategy": "fsdp2", "gpus": 8, "reduce_in_fp32": True}, (2, 1)),
        (
            "tensor_parallel_degree = 4",
            "70B",
            "16x80GiB",
            {**LOSSLESS, "sequence_parallel": True, "loss_parallel": True},
            (2, 1),
        ),
        (
            "tensor_parallel_degree = 4\nenable_sequence_parallel = false\ndisable_loss_parallel = true",
            "70B",
            "16x80GiB",
            {**LOSSLESS, "sequence_parallel": False, "loss_parallel": False},
            (2, 1),
        ),
        (
            "context_parallel_degree = 2\ndata_parallel_shard_degree = 4",
            "8B",
            "8x80GiB",
            {"strategy": "fsdp2", "gpus": 8, "context": 2},
            (2, 1),
        ),
        (
            "data_parallel_replicate_degree = 2\ndata_parallel_shard_degree = 4",
            "8B",
            "8x80GiB",
            {"strategy": "fsdp2", "gpus": 8, "replicate": 2},
            (2, 1),
        ),
        (
            f"{STAGES}\npipeline_parallel_microbatch_size = 1",
            "8B",
            "2x80GiB",  # a pipeline cuts the rows
            {"strategy": "none", "gpus": 2, "pipeline": 2},
            (1, 2),
        ),
        (
            f"{STAGES}\ntensor_parallel_degree = 2",
            "8B",
            "4x80GiB",
            {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "loss_parallel": True},
            None,
        ),
    ],
)
def test_torchtitans_degrees_make_a_mesh(tmp_path, parallelism, flavor, gpu, parallel, rows):
    found = titan(tmp_path, parallelism, flavor=flavor, gpu=gpu)
    said(
        found,
        sequence_length=4096,
        precision="bf16-mixed",
        gradient_checkpointing=True,
        optimizer="adamw_fused",
        parallel=parallel,
    )
    if rows:
        said(found, micro_batch=rows[0], gradient_accumulation=rows[1])
    assert found.scenario.model["num_hidden_layers"] == {"8B": 32, "70B": 80}[flavor]
    assert not found.reading.remarks and not found.reading.unknown


def test_what_torchtitan_combines_and_the_libraries_do_not_is_refused_in_the_files_words(tmp_path):
    with pytest.raises(UserError, match=r"`parallel.pipeline: 2` and `parallel.strategy: fsdp2`"):
        titan(tmp_path, "pipeline_parallel_degree = 2")
    with pytest.raises(UserError, match="No model here has the sizes") as caught:
        titan(tmp_path, flavor="debugmodel")
    assert "8B, 70B, 405B" in str(caught.value) and 'flavor = "8B"' in str(caught.value)
    with pytest.raises(UserError, match="takes a whole number") as caught:
        titan(tmp_path, 'tensor_parallel_degree = "two"')
    assert "parallelism.tensor_parallel_degree" in str(caught.value)


def test_torchtitans_products_in_8_bits_and_compiled_layers(tmp_path, monkeypatch):
    """Where the packages are installed, which follow them."""
    for reader in ("torchtitan", "common"):
        monkeypatch.setattr(f"dryfit.readers.{reader}.find_spec", lambda name: name)
    path = tmp_path / "llama3.toml"
    text = TITAN.format(
        flavor="8B", mode="full", converters='["quantize.linear.float8"]', parallelism=""
    )
    text = text.replace("enable = false", "enable = true")
    path.write_text(
        text + "[quantize.linear.float8]\nenable_fsdp_float8_all_gather = true\n", encoding="utf-8"
    )
    found = question([path], QuestionOptions(gpu="8x80GiB"))
    said(
        found,
        compile="layers",
        float8="tensorwise",
        parallel={"strategy": "fsdp2", "float8_all_gather": True},
    )
    path.write_text(
        text.replace("[parallelism]", "[parallelism]\ntensor_parallel_degree = 2"), encoding="utf-8"
    )
    said(
        question([path], QuestionOptions(gpu="8x80GiB")),
        compile="layers",
        float8="tensorwise",
        parallel={"tensor": 2},
    )
    pipeline = "[parallelism]\npipeline_parallel_degree = 2\ndata_parallel_shard_degree = 1"
    path.write_text(text.replace("[parallelism]", pipeline), encoding="utf-8")
    found = question([path], QuestionOptions(gpu="2x80GiB"))
    said(found, compile="none", float8="none")
    assert {"model.converters", "torch_compile"} <= set(remarks(found))


def test_what_is_not_described_of_torchtitan_says_which_way_it_errs(tmp_path):
    found = titan(tmp_path, mode="selective", converters='["float8", "mx"]')
    assert remarks(found)["activation_checkpoint.mode"] == "too low"
    assert "mx" in {one.value for one in found.reading.remarks}
    (tmp_path / "broken.toml").write_text("[model\n", encoding="utf-8")
    with pytest.raises(UserError, match="This is not TOML"):
        question([tmp_path / "broken.toml"], QuestionOptions())


def test_torchtitans_older_sections_are_read(tmp_path):
    older = """
[job]
description = "x"
[model]
name = "llama3"
flavor = "8B"
[training]
batch_size = 1
seq_len = 8192
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
compile = false
[experimental]
context_parallel_degree = 2
[float8]
enable_float8_linear = false
"""
    path = tmp_path / "old.toml"
    path.write_text(older, encoding="utf-8")
    found = question([path], QuestionOptions(gpu="4x80GiB"))
    said(
        found,
        micro_batch=1,
        optimizer="adamw",
        parallel={"strategy": "fsdp2", "gpus": 4, "context": 2},
    )
    assert not found.reading.unknown


def test_a_function_of_a_registry_is_named_behind_the_file(tmp_path):
    folder = tmp_path / "llama3"
    folder.mkdir()
    path = folder / "config_registry.py"
    path.write_text(REGISTRY, encoding="utf-8")
    found = question([f"{path}:large"], QuestionOptions(gpu="8x80GiB"))
    said(
        found,
        micro_batch=8,
        sequence_length=2048,
        gradient_checkpointing=True,
        parallel={"strategy": "fsdp2", "gpus": 8, "tensor": 4},
    )
    assert (
        found.scenario.model["num_hidden_layers"] == 80
        and remarks(found)["loss.kind"] == "too high"
    )
    found = question([f"{path}:larger"], QuestionOptions(gpu="8x80GiB"))
    said(found, micro_batch=4, parallel={"strategy": "none", "gpus": 8, "tensor": 8})
    said(found, parallel={"sequence_parallel": True, "loss_parallel": True})
    assert found.scenario.model["num_hidden_layers"] == 126
    assert remarks(found)["activation_checkpoint.mode"] == "too low"
    for asked_for in (str(path), f"{path}:small"):
        with pytest.raises(UserError, match="configuration") as caught:
            question([asked_for], QuestionOptions())
        assert "large, larger" in str(caught.value) and f"{path}:large" in str(caught.value)


# --- accelerate's ParallelismConfig ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["trl", "llama-factory", "ms-swift"])
def test_the_block_is_read_of_all_whose_files_are_training_arguments(tmp_path, tool):
    own = {
        "llama-factory": FACTORY,
        "ms-swift": {"model": LARGE, "tuner_type": "full"},
        "trl": TRL,
    }[tool]
    given = own | {
        "fsdp": "full_shard",
        "fsdp_config": {"version": 2},
        "parallelism_config": {"dp_replicate_size": 2},
    }
    found = asked(tmp_path, given, tool=tool, gpu="4x80GiB")
    said(found, parallel={"strategy": "fsdp2", "gpus": 4, "replicate": 2})


def sizes(**given: int) -> dict[str, int]:
    return {f"parallelism_config_{name}_size": size for name, size in given.items()}


ACCELERATE = {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 2}}


@pytest.mark.parametrize(
    ("more", "block", "mesh"),
    [
        (ACCELERATE, sizes(dp_shard=4, cp=2), {"context": 2, "gpus": 8}),
        (ACCELERATE, sizes(dp_shard=4, tp=2), {"tensor": 2, "gpus": 8}),
        (ACCELERATE, sizes(dp_shard=4, dp_replicate=2), {"replicate": 2, "gpus": 8}),
        ({}, {"cp_size": 2}, {"context": 2, "gpus": 4}),  # in TRL's own file
    ],
)
def test_accelerates_block_makes_a_mesh(tmp_path, more, block, mesh):
    given, block = (
        TRL | {"model_name_or_path": LARGE, "loss_type": "nll"},
        {"parallelism_config": block},
    )
    own = given | {"fsdp": "full_shard", "fsdp_config": {"version": 2}} | block
    files = (given, more | block) if more else (own,)
    said(
        asked(tmp_path, *files, tool="trl", gpu=None if more else "4x80GiB"),
        parallel={"strategy": "fsdp2", **mesh},
    )


def test_accelerates_sp_size_is_deepspeeds_ulysses_and_told_beside_fsdp(tmp_path):
    deepspeed = {
        "distributed_type": "DEEPSPEED",
        "num_processes": 8,
        "deepspeed_config": {"zero_stage": 3},
    }
    undivided = {"strategy": "fsdp2", "gpus": 8, "reshard_after_forward": True, "offload": "none"}
    for beside, parallel, told in (
        (
            deepspeed | {"parallelism_config": sizes(sp=2)},
            {"strategy": "zero3", "gpus": 8, "ulysses": 2},
            [],
        ),
        (
            ACCELERATE | {"parallelism_config": sizes(dp_shard=4, sp=2)},
            undivided,
            [("parallelism_config: sp_size", "too high")],
        ),
    ):
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump(beside), encoding="utf-8")
        reading = readers.read_tool(path, "accelerate", readers.mapping_of(path), None)
        assert reading.fields["parallel"] == parallel
        assert [(one.key, one.errs) for one in reading.remarks] == told


# --- axolotl ---------------------------------------------------------------------------------------------------------


def test_axolotls_sizes_make_a_mesh(tmp_path):
    sharded = AXOLOTL | {
        "base_model": LARGE,
        "fsdp_version": 2,
        "fsdp_config": {"reshard_after_forward": True},
    }
    found = asked(
        tmp_path, sharded | {"dp_shard_size": 2, "dp_replicate_size": 2, "tensor_parallel_size": 2}
    )
    said(found, parallel={"strategy": "fsdp2", "gpus": 8, "tensor": 2, "replicate": 2})
    context = {"dp_shard_size": 2, "context_parallel_size": 2}
    found = asked(tmp_path, sharded | context | {"flash_attention": True})
    said(found, attention="sdpa", parallel={"strategy": "fsdp2", "gpus": 4, "context": 2})
    assert remarks(found)["context_parallel_size"] == "either way"
    found = asked(tmp_path, AXOLOTL | {"deepspeed": "zero3.json", "context_parallel_size": 2})
    assert remarks(found)["context_parallel_size"] == "either way"
    assert {"strategy": "zero3", "ulysses": 2}.items() <= found.reading.fields["parallel"].items()
    with pytest.raises(UserError, match="can't be combined: accelerate's tensor parallel"):
        asked(tmp_path, sharded | context | {"tensor_parallel_size": 2})


def test_ms_swifts_sequence_parallel_is_ulysses(tmp_path):
    path = tmp_path / "train.sh"
    words = "swift sft --model Qwen/Qwen2.5-7B-Instruct --tuner_type full --sequence_parallel_size 2 --max_length 8192"
    path.write_text(f"NPROC_PER_NODE=4 {words} --deepspeed zero3\n", encoding="utf-8")
    found = question([path], QuestionOptions())
    said(found, gradient_accumulation=8)
    assert found.reading.fields["parallel"]["ulysses"] == 2
    assert remarks(found)["sequence_parallel_size"] == "either way"
    said(found, parallel={"strategy": "zero3", "gpus": 4, "ulysses": 2})  # under no other name
    path.write_text(f"NPROC_PER_NODE=4 {words}\n", encoding="utf-8")
    found = question([path], QuestionOptions())
    said(
        found, parallel={"strategy": "ddp", "gpus": 4}, sequence_length=4096
    )  # its own division, of plain rows
