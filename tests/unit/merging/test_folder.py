"""What a merged folder holds, how an interrupted merge goes on, and the command line."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, read_report, sha256_file, write_json
from scripts.common.checkpoint import read_shard
from scripts.merging.merge import merge
from tests.benchmarks.synthetic_checkpoint import make_adapter as synthetic_adapter
from tests.benchmarks.synthetic_checkpoint import make_base as synthetic_base
from tests.unit.merging.models import (
    distance,
    edit_weights,
    load_weights,
    logits,
    make_adapter,
    make_base,
    with_adapter,
)
from tests.warm import launchers

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A base of several shards with its adapter."""
    folder = tmp_path_factory.mktemp("sharded")
    base = make_base(folder / "base", "qwen2", "bfloat16", shard="20KB")
    return base, make_adapter(folder / "adapter", base)


def test_exact_files_layout_and_digests(sharded, tmp_path):
    base, adapter = sharded
    output = tmp_path / "merged"
    manifest = merge(base, adapter, output)

    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    others = {
        "LICENSE",
        "NOTICE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
    }
    others |= {"model.safetensors.index.json", "tokenizer_config.json"}
    assert {path.name for path in output.iterdir()} == others | set(shards)  # not the base's README
    for name in sorted(others - {"manifest.json"}):
        assert (output / name).read_bytes() == (base / name).read_bytes(), name
    for name in shards:
        before, after = read_shard(base / name), read_shard(output / name)
        assert after.header == before.header and after.bytes == before.bytes
    assert read_json(output / "manifest.json") == manifest
    assert set(manifest["sha256"]) == {path.name for path in output.iterdir()}
    assert (
        read_report(
            output / "manifest.json",
            *(output / name for name in (others | set(shards)) - {"manifest.json"}),
        )
        == manifest
    )
    assert manifest["base"]["files"] == {
        name: sha256_file(base / name) for name in [*shards, "config.json"]
    }
    assert manifest["adapter"]["files"]["adapter_model.safetensors"] == sha256_file(
        adapter / "adapter_model.safetensors"
    )
    assert manifest["dtype"] == "bfloat16" and manifest["weights"] == shards
    assert set(manifest["versions"]) == {"peft", "python", "safetensors", "torch", "transformers"}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]  # nothing left beside it


def test_two_merges_are_equal_bytes_and_untouched_tensors_those_of_the_base(sharded, tmp_path):
    base, adapter = sharded
    assert merge(base, adapter, tmp_path / "one", threads=1) == merge(
        base, adapter, tmp_path / "two", threads=4
    )
    base, adapter = sharded
    merge(base, adapter, tmp_path / "merged")
    before, after = load_weights(base), load_weights(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj.weight" in name}


def test_large_shards_pass_through_the_page_cache_and_stay_the_same(sharded, tmp_path, monkeypatch):
    base, adapter = sharded
    reference = merge(base, adapter, tmp_path / "one")
    monkeypatch.setattr("scripts.merging.merge.STREAMED_BYTES", 0)
    monkeypatch.setattr("scripts.merging.merge.WINDOW_BYTES", 1024)
    monkeypatch.setattr(
        "scripts.merging.merge.BLOCK_ELEMENTS", 2048
    )  # blocks of untouched and of changed rows
    assert merge(base, adapter, tmp_path / "two")["sha256"] == reference["sha256"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_for_everything(sharded, tmp_path, dtype):
    base, adapter = sharded
    manifest = merge(base, adapter, tmp_path / "merged", dtype=dtype)
    assert manifest["dtype"] == dtype
    assert read_json(tmp_path / "merged" / "config.json")["dtype"] == dtype
    before, after = load_weights(base), load_weights(tmp_path / "merged")
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    norm = "model.norm.weight"
    assert torch.equal(after[norm], before[norm].to(after[norm].dtype))
    index = read_json(tmp_path / "merged" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == getattr(torch, dtype)
    assert distance(logits(merged.float()), logits(with_adapter(base, adapter, "float32"))) < 1e-2


def test_a_model_of_two_dtypes_is_called_by_the_one_of_most_bytes(sharded, tmp_path):
    base = shutil.copytree(sharded[0], tmp_path / "base")
    name = "model.norm.weight"
    shard = base / read_json(base / "model.safetensors.index.json")["weight_map"][name]
    edit_weights(shard, lambda tensors: tensors.update({name: tensors[name].float()}))
    assert merge(base, sharded[1], tmp_path / "merged")["dtype"] == "bfloat16"
    assert load_weights(tmp_path / "merged")[name].dtype == torch.float32


def test_whole_numbers_keep_their_dtype(sharded, tmp_path):
    base = shutil.copytree(sharded[0], tmp_path / "base")
    index = read_json(base / "model.safetensors.index.json")
    shard = index["weight_map"]["model.norm.weight"]
    edit_weights(base / shard, lambda tensors: tensors.update({"model.steps": torch.arange(5)}))
    write_json(
        base / "model.safetensors.index.json",
        {"weight_map": {**index["weight_map"], "model.steps": shard}},
    )
    merge(base, sharded[1], tmp_path / "merged", dtype="float32")
    after = load_weights(tmp_path / "merged")
    assert (
        torch.equal(after["model.steps"], torch.arange(5))
        and after["model.norm.weight"].dtype == torch.float32
    )


def test_untied_output_layer_joins_the_embedding_s_shard_and_the_index(tmp_path):
    base = make_base(tmp_path / "base", "llama-tied", shard="15KB")
    adapter = make_adapter(
        tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    manifest = merge(base, adapter, tmp_path / "merged")
    for name in manifest["weights"]:  # the embedding is read twice and counts once
        assert manifest["base"]["files"][name] == sha256_file(base / name)
    index = read_json(tmp_path / "merged" / "model.safetensors.index.json")
    assert index["weight_map"]["lm_head.weight"] == index["weight_map"]["model.embed_tokens.weight"]
    after = load_weights(tmp_path / "merged")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(model.lm_head.weight, after["lm_head.weight"])


def test_replace_is_for_the_workflow_alone(sharded, tmp_path):
    base, adapter = sharded
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model.safetensors").write_text(
        "an earlier merge, whose manifest the workflow removed"
    )
    with pytest.raises(UserError, match="not empty"):
        merge(base, adapter, tmp_path / "merged")
    merge(base, adapter, tmp_path / "merged", replace=True)
    assert not (tmp_path / "merged" / "model.safetensors").exists()


# --- interruption -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Large enough to be killed in the middle: 130 MB in many shards."""
    folder = tmp_path_factory.mktemp("large")
    config = {
        "model_type": "qwen2",
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    synthetic_base(config, folder / "base", "float32", 8_000_000, seed=0)
    synthetic_adapter(config, folder / "adapter", rank=8, seed=1)
    reference = merge(folder / "base", folder / "adapter", folder / "reference")
    return folder / "base", folder / "adapter", reference


def start(
    base: Path, adapter: Path, output: Path, python: str = sys.executable
) -> subprocess.Popen:
    arguments = ["--base", base, "--adapter", adapter, "--output", output, "--threads", "1"]
    command = [python, "-m", "scripts.merging.merge", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.thorough
def test_a_killed_merge_leaves_nothing_that_counts_and_nothing_for_good(large, tmp_path):
    base, adapter, reference = large
    output = tmp_path / "merged"
    process = start(base, adapter, output)
    while (
        len(list(tmp_path.glob(".merged.*.partial/*.safetensors"))) < 3 and process.poll() is None
    ):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".merged.") and not (left / "config.json").exists()

    assert merge(base, adapter, output) == reference
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.thorough
def test_a_disk_that_fills_up_midway_leaves_nothing(large, tmp_path):
    """A file system of 60 MB, whose room somebody else takes after it was looked at."""
    base, adapter, _ = large
    (tmp_path / "small").mkdir()
    code = "import sys, scripts.merging.merge as m; m._check_place = lambda *_: None; m.command(m.main)"
    arguments = [
        "--base",
        str(base),
        "--adapter",
        str(adapter),
        "--output",
        str(tmp_path / "small" / "merged"),
    ]
    script = (
        'mount -t tmpfs -o size=60m tmpfs "$1" && shift && { "$@"; echo "status $?"; ls -A "$0"; }'
    )
    inside = [tmp_path / "small", tmp_path / "small", sys.executable, "-c", code, *arguments]
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", script, *inside]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if not process.stdout:
        pytest.skip(f"no file system can be mounted here: {process.stderr[-200:]}")
    assert process.stdout == "status 2\n"  # and an empty list of files
    assert (
        "The disk filled up during the merge." in process.stderr
        and "Traceback" not in process.stderr
    )


# --- command line -------------------------------------------------------------------------------


def test_command_line(sharded, tmp_path):
    base, adapter = sharded
    python = f"{launchers()}/python"
    process = start(base, adapter, tmp_path / "merged", python)
    output, messages = process.communicate(timeout=600)
    assert process.returncode == 0, messages
    assert "not compared with digests" in messages
    assert output.startswith(f"{tmp_path / 'merged'}: 0.00 GiB bfloat16, 14 of ")

    again = start(base, adapter, tmp_path / "merged", python)
    output, messages = again.communicate(timeout=600)
    assert again.returncode == 2 and output == ""
    assert "The output folder is not empty." in messages and "Traceback" not in messages
