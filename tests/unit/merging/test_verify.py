"""The verification passes on a right merge, names what is wrong with a wrong one, and says what it could not run."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, write_json, write_jsonl, write_report
from scripts.merging.logits import Questions, choose_device
from scripts.merging.merge import merge
from scripts.merging.verify import require_passed, run, verify
from tests.unit.merging.models import VOCABULARY, edit_weights, make_adapter, make_base
from tests.warm import launchers

ROOT = Path(__file__).resolve().parents[3]
REQUESTS = ["a b c d", "d c b a a", "b"]
PLENTY = {"cpu": 10**12}
ALL = ("files", "tensors", "untouched", "layers", "logits", "answers")


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words with a chat template, small enough for the tiny models."""
    words = ["<end>", *"abcdefghijklmnop", "system", "user", "assistant", ":"]
    words += [f"w{number}" for number in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<end>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>")
    fast.chat_template = (
        "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    fast.save_pretrained(folder)


def merged_folders(folder: Path, kind: str, dtype: str, **lora) -> tuple[Path, Path, Path]:
    base = make_base(folder / "base", kind, dtype, shard="20KB")
    add_tokenizer(base)
    adapter = make_adapter(folder / "adapter", base, **lora)
    merge(base, adapter, folder / "merged", threads=1)
    return base, adapter, folder / "merged"


def states(report: dict) -> dict[str, str]:
    return {name: check["status"] for name, check in report["checks"].items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return merged_folders(tmp_path_factory.mktemp("good"), "qwen2", "float32")


@pytest.fixture
def folders(good, tmp_path):
    """Copies that a test may spoil."""
    for path in good:
        shutil.copytree(path, tmp_path / path.name)
    return tuple(tmp_path / path.name for path in good)


def renew_digests(merged: Path) -> None:
    """Make the manifest agree with spoiled files, so that the checks behind the digests have to find the damage."""
    manifest = read_json(merged / "manifest.json")
    write_report(
        merged / "manifest.json", manifest, *(merged / name for name in manifest["sha256"])
    )


def edit_tensor(merged: Path, name: str, edit) -> None:
    shard = merged / read_json(merged / "model.safetensors.index.json")["weight_map"][name]
    edit_weights(shard, lambda tensors: edit(tensors, name))
    renew_digests(merged)


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "qwen2",
            {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
        ),
        ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
        ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama-tied", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    ],
)
def test_right_merges_pass_every_check(tmp_path, kind, settings, dtype):
    base, adapter, merged = merged_folders(tmp_path, kind, dtype, **settings)
    report = verify(base, adapter, merged, questions=Questions(REQUESTS, "p", 6), free=PLENTY)
    assert states(report) == dict.fromkeys(ALL, "passed"), report
    assert report["passed"] and report["complete"]
    checks = report["checks"]
    assert checks["untouched"]["tensors"] > 0 and checks["untouched"]["bytes"] > 0
    # Where PEFT merges an embedding it rounds twice; every other weight is equal to the last bit.
    assert checks["layers"]["identical"] >= len(checks["layers"]["layers"]) - (dtype == "bfloat16")
    assert checks["logits"]["computed_in"] == "float32" and checks["logits"]["device"] == "cpu"
    assert checks["logits"]["rms_difference"] < checks["logits"]["adapter_effect"] / 10
    assert checks["answers"]["same"] + checks["answers"]["ties"] == 3
    write_json(tmp_path / "report.json", report)  # plain values


def test_converted_merge_passes(tmp_path):
    base = make_base(tmp_path / "base", "qwen2", "float32")
    add_tokenizer(base)
    adapter = make_adapter(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "merged", dtype="bfloat16")
    report = verify(
        base,
        adapter,
        tmp_path / "merged",
        questions=Questions(REQUESTS, max_new_tokens=4),
        free=PLENTY,
    )
    assert report["passed"] and report["checks"]["tensors"]["converted"] == 27


def test_damaged_file_fails(folders):
    shard = sorted(folders[2].glob("*.safetensors"))[0]
    with open(shard, "r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\x01")
    report = verify(*folders)
    assert states(report)["files"] == "failed" and report["checks"]["files"]["wrong"] == [
        shard.name
    ]
    with pytest.raises(UserError, match=f"files: .*{shard.name}"):
        require_passed(report, folders[2])


def test_adapter_other_than_training_wrote_it_fails(folders):
    """Damaged after the merge, it would make a good merge look bad."""
    base, adapter, merged = folders
    write_report(adapter.parent / "training.json", {}, *adapter.glob("adapter_*"))
    edit_weights(
        adapter / "adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).zero_()
    )
    with pytest.raises(UserError, match="not what the step that made it has written"):
        verify(base, adapter, merged)


def test_changed_shape_or_dtype_fails(folders):
    edit_tensor(
        folders[2],
        "model.norm.weight",
        lambda tensors, name: tensors.update({name: tensors[name].half()}),
    )
    report = verify(*folders, questions=Questions(REQUESTS), free=PLENTY)
    assert report["checks"]["tensors"]["wrong"] == ["model.norm.weight"]
    assert states(report)["layers"] == states(report)["logits"] == "not run"
    assert not report["passed"]


def test_an_edited_configuration_is_named_before_it_contradicts_the_weights(folders):
    path = folders[2] / "config.json"
    write_json(path, read_json(path) | {"vocab_size": 7})
    report = verify(*folders)
    assert report["checks"]["files"]["wrong"] == ["config.json"]
    assert "contradict" in report["checks"]["tensors"]["reason"] and not report["passed"]


def test_weights_beside_those_of_the_manifest_fail(folders):
    shutil.copy(sorted(folders[2].glob("*.safetensors"))[0], folders[2] / "another.safetensors")
    assert verify(*folders)["checks"]["files"]["wrong"] == ["another.safetensors"]


@pytest.mark.parametrize("chunk", [8, 2**24])
def test_changed_untouched_tensor_fails(folders, monkeypatch, chunk):
    monkeypatch.setattr("scripts.merging.verify.CHUNK_BYTES", chunk)
    edit_tensor(
        folders[2], "model.norm.weight", lambda tensors, name: tensors[name][5:6].mul_(1 + 2**-23)
    )
    report = verify(*folders)
    assert report["checks"]["untouched"]["wrong"] == ["model.norm.weight"]
    assert states(report)["files"] == states(report)["tensors"] == "passed"


def test_one_wrong_value_in_a_layer_fails(folders):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensor(folders[2], name, lambda tensors, name: tensors[name][7, 3:4].add_(1e-4))
    report = verify(*folders, layers=100)
    assert [
        layer["name"] for layer in report["checks"]["layers"]["layers"] if not layer["within"]
    ] == [name]


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_adapter_left_out_or_added_twice_fails(folders, strength):
    """The checks by layer and by logits each find it by themselves."""
    base, _, merged = folders
    for path in sorted(merged.glob("*.safetensors")):
        before = {}
        edit_weights(base / path.name, before.update)

        def spoil(tensors, before=before):
            for name in tensors:
                tensors[name] = before[name] + strength * (tensors[name] - before[name])

        edit_weights(path, spoil)
    renew_digests(merged)
    report = verify(*folders, questions=Questions(REQUESTS, "p", 6), free=PLENTY)
    assert (
        states(report)["layers"]
        == states(report)["logits"]
        == states(report)["answers"]
        == "failed"
    )
    assert states(report)["untouched"] == "passed"


def test_what_is_not_run_says_why(good):
    report = verify(*good, questions=Questions(REQUESTS), free={"cpu": 8 * 10**6})
    assert {name: states(report)[name] for name in ALL[:4]} == dict.fromkeys(ALL[:4], "passed")
    assert (
        report["checks"]["logits"]["status"] == report["checks"]["answers"]["status"] == "not run"
    )
    assert report["checks"]["logits"]["reason"] == "not run: needs 0.7 GiB, 0.0 GiB free"
    assert report["passed"] and not report["complete"]
    report = verify(*good)
    assert report["checks"]["answers"]["reason"] == "not run: no requests were given"


def test_float32_where_there_is_room_and_the_gpu_first():
    sizes = {"float32": 31, "bfloat16": 16}
    assert choose_device(sizes, {"cuda": 40, "cpu": 64}) == ("cuda", "float32")
    assert choose_device(sizes, {"cuda": 24, "cpu": 64}) == ("cuda", "bfloat16")
    assert choose_device(sizes, {"cuda": 8, "cpu": 24}) == ("cpu", "bfloat16")
    assert choose_device(sizes, {"cpu": 16}) == ("cpu", "bfloat16")
    assert choose_device(sizes, {"cpu": 15}) is None


def test_low_precision_computation_has_its_own_tolerance(tmp_path):
    base, adapter, merged = merged_folders(tmp_path, "qwen2", "bfloat16")
    needed = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    room = needed + (adapter / "adapter_model.safetensors").stat().st_size + 700_000_000
    report = verify(
        base, adapter, merged, questions=Questions(REQUESTS, "p", 4), free={"cpu": room}
    )
    assert report["checks"]["logits"]["computed_in"] == "bfloat16"
    assert report["passed"], report


def test_the_rule_s_work_writes_a_report_and_fails_without_one(folders, tmp_path):
    base, adapter, merged = folders
    prompts = tmp_path / "test.jsonl"
    write_jsonl(prompts, [{"request": request, "command": "ls"} for request in REQUESTS])
    settings = {"prompts": 2, "layers": 3, "max_new_tokens": 3, "system": "p"}
    split = tmp_path / "split.json"
    write_report(split, {}, prompts)
    run(base, adapter, merged, str(prompts), str(split), settings, tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and len(report["checks"]["layers"]["layers"]) == 3
    assert report["checks"]["answers"]["prompts"] == 2

    (merged / "config.json").write_text((merged / "config.json").read_text() + " ")
    with pytest.raises(UserError, match=r"not base plus adapter(.|\n)*config\.json"):
        run(base, adapter, merged, str(prompts), str(split), settings, tmp_path / "second.json")
    assert not (tmp_path / "second.json").exists()


def test_command_line(good):
    folders = [
        argument
        for name, path in zip(("base", "adapter", "merged"), good, strict=True)
        for argument in (f"--{name}", str(path))
    ]
    command = [f"{launchers()}/python", "-m", "scripts.merging.verify", *folders]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[0].split() == ["files", "passed"]
