"""Bad input: one clear message each, and no output."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, write_json, write_report
from scripts.common.checkpoint import lay_out_shard, read_shard
from scripts.merging.adapter import _pattern_value
from scripts.merging.merge import DISK_MARGIN_BYTES, merge
from tests.unit.merging.models import edit_weights, make_adapter, make_base

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    base = make_base(folder / "base", shard="20KB")
    return base, make_adapter(folder / "adapter", base, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def inputs(good, tmp_path):
    """Copies that a test may spoil."""
    for source, name in zip(good, ("base", "adapter"), strict=True):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "base", tmp_path / "adapter"


def refuse(base: Path, adapter: Path, *words: str, **settings) -> str:
    """The merge raises, the message has the words, and nothing appears."""
    output = base.parent / "merged"
    before = sorted(path.name for path in base.parent.iterdir())
    with pytest.raises(UserError) as caught:
        merge(base, adapter, output, **settings)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert sorted(path.name for path in base.parent.iterdir()) == before
    return str(caught.value)


def edit_settings(adapter: Path, **values) -> None:
    path = adapter / "adapter_config.json"
    write_json(path, {**read_json(path), **values})


def edit_adapter(adapter: Path, edit) -> None:
    edit_weights(adapter / "adapter_model.safetensors", edit)


# --- one change, one refusal -----------------------------------------------------------------------

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
LATER, EMBEDDED = "model.layers.9.mlp.up_proj.weight", "base_model.model.model.embed_tokens.weight"
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


def shard(base: Path, number: int) -> Path:
    return sorted(base.glob("*.safetensors"))[number]


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def edit_files(base: Path, edit) -> None:
    """Edit the index's shard of each tensor."""
    content = read_json(index := base / "model.safetensors.index.json")
    edit(content["weight_map"])
    write_json(index, content)


def edit_base(base: Path, name: str, edit) -> None:
    edit_weights(base / read_json(base / "model.safetensors.index.json")["weight_map"][name], edit)


def remove(folder: Path, names: str, left: str | None = None) -> None:
    for path in folder.glob(names):
        path.unlink()
    if left:
        (folder / left).write_bytes(b"\x80\x02")


def renamed(tensors: dict, old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


CHANGES = {
    "ends in its header": (
        lambda base, _: os.truncate(shard(base, 1), 40),
        ["truncated inside its header", "00002"],
    ),
    "bytes too many": (
        lambda base, _: append(shard(base, 1)),
        ["longer than its header says", "model-00002"],
    ),
    "a shard too few": (lambda base, _: shard(base, 1).unlink(), ["is missing", "model-00002"]),
    "a tensor too many in the index": (
        lambda base, _: edit_files(base, lambda files: files.update({LATER: files[NORM]})),
        ["does not hold", LATER],
    ),
    "another shard in the index": (
        lambda base, _: edit_files(
            base, lambda files: files.update({NORM: ({*files.values()} - {files[NORM]}).pop()})
        ),
        ["does not hold", NORM],
    ),
    "a tensor too few in the index": (
        lambda base, _: edit_files(base, lambda files: files.pop(NORM)),
        ["does not name", NORM],
    ),
    "an index that leads out": (
        lambda base, _: edit_files(
            base, lambda files: files.update({NORM: "../elsewhere.safetensors"})
        ),
        ["of its own folder", "../elsewhere.safetensors"],
    ),
    "one tensor twice": (
        lambda base, _: edit_weights(
            shard(base, 1),
            lambda own: own.update({read_shard(shard(base, 0)).tensors[0].name: torch.zeros(2)}),
        ),
        ["Two shards hold the same tensor"],
    ),
    "a pickled base": (
        lambda base, _: remove(base, "model*", "pytorch_model.bin"),
        ["pickles", "pytorch_model.bin", "safetensors"],
    ),
    "no weights": (lambda base, _: remove(base, "model*"), ["no safetensors weights"]),
    "no config.json": (
        lambda base, _: remove(base, "config.json"),
        ["does not exist", "config.json"],
    ),
    "packed bytes": (
        lambda base, _: edit_base(
            base, Q, lambda own: own.update({Q: torch.zeros(32, 32, dtype=torch.uint8)})
        ),
        ["not a floating-point weight", Q, "U8"],
    ),
    "NaN where the adapter adds": (
        lambda base, _: edit_base(base, Q, lambda own: own[Q][3].fill_(math.nan)),
        ["NaN or infinity", Q],
    ),
    "NaN elsewhere": (
        lambda base, _: edit_base(base, NORM, lambda own: own[NORM][3:4].fill_(math.nan)),
        ["weights hold NaN or infinity", NORM],
    ),
    "no adapter": (
        lambda _, adapter: shutil.rmtree(adapter),
        ["adapter's folder does not exist", "/adapter"],
    ),
    "no adapter_config.json": (
        lambda _, adapter: remove(adapter, "*config.json"),
        ["no adapter_config.json"],
    ),
    "no weights of the adapter": (
        lambda _, adapter: remove(adapter, "*.safetensors"),
        ["no weights", "adapter_model.safetensors"],
    ),
    "a pickled adapter": (
        lambda _, adapter: remove(adapter, "*.safetensors", "adapter_model.bin"),
        ["pickles", "adapter_model.bin"],
    ),
    "a truncated adapter": (
        lambda _, adapter: os.truncate(shard(adapter, 0), shard(adapter, 0).stat().st_size - 100),
        ["truncated", "adapter_model.safetensors"],
    ),
    "NaN in the adapter": (
        lambda _, adapter: edit_adapter(adapter, lambda own: own[A][0, :1].fill_(math.nan)),
        ["NaN or infinity", A],
    ),
    "infinity in the adapter": (
        lambda _, adapter: edit_adapter(adapter, lambda own: own[A][0, :1].fill_(math.inf)),
        ["NaN or infinity", A],
    ),
    "other shapes": (
        lambda _, adapter: edit_adapter(
            adapter,
            lambda own: own.update(
                {name: own[name][:, :16].contiguous() for name in own if "q_proj.lora_A" in name}
            ),
        ),
        ["other shapes", "q_proj.weight", "(32, 16)", "(32, 32)"],
    ),
    "other names": (
        lambda _, adapter: edit_adapter(
            adapter, lambda own: renamed(own, "model.layers", "transformer.h")
        ),
        ["does not have", "another base", "transformer.h.0"],
    ),
    "a deeper base": (
        lambda _, adapter: edit_adapter(
            adapter,
            lambda own: own.update(
                {
                    name.replace("layers.1.", "layers.7."): own[name].clone()
                    for name in own
                    if "layers.1." in name
                }
            ),
        ),
        ["does not have", "layers.7"],
    ),
    "a shallower base": (
        lambda _, adapter: edit_adapter(
            adapter, lambda own: [own.pop(name) for name in [*own] if "layers.1." in name]
        ),
        ["no tensors for a layer that it targets", "model.layers.1.self_attn"],
    ),
    "another vocabulary": (
        lambda _, adapter: edit_adapter(
            adapter, lambda own: own.update({EMBEDDED: torch.zeros(99, 32)})
        ),
        ["another vocabulary", "(99, 32)", "(97, 32)"],
    ),
    "one factor of two": (
        lambda _, adapter: edit_adapter(adapter, lambda own: own.pop(B)),
        ["one of the two factors", "layers.0.self_attn.q_proj"],
    ),
    "another rank": (lambda _, adapter: edit_settings(adapter, r=4), ["another rank", "rank 4"]),
    "factors of two ranks": (
        lambda _, adapter: edit_adapter(
            adapter, lambda own: own.update({B: own[B][:, :4].contiguous()})
        ),
        ["another rank", "(32, 4)", "rank 8"],
    ),
    "a target that matches nothing": (
        lambda _, adapter: edit_settings(adapter, target_modules=["q_proj", "v_proj", "c_attn"]),
        ["matches nothing in the base", "c_attn", '"target_modules": ["q_proj", "v_proj"]'],
    ),
    "a target without tensors": (
        lambda _, adapter: edit_settings(adapter, target_modules=["q_proj", "v_proj", "k_proj"]),
        ["incomplete", "k_proj"],
    ),
    "nothing added": (
        lambda _, adapter: edit_adapter(adapter, lambda own: own.clear()),
        ["changes nothing"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_refused(inputs, name):
    change, words = CHANGES[name]
    change(*inputs)
    refuse(*inputs, *words)


# --- the base -----------------------------------------------------------------------------------


def test_shard_truncated(inputs):
    shard = sorted(inputs[0].glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 7)
    refuse(*inputs, "truncated", shard.name, str(shard.stat().st_size + 7))


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02pickle and so on", (20).to_bytes(8, "little") + b"{" * 20]
)
def test_shard_is_something_else(inputs, content):
    shard = sorted(inputs[0].glob("*.safetensors"))[0]
    shard.write_bytes(content)
    refuse(*inputs, "not a safetensors file", shard.name)


@pytest.mark.parametrize(("offsets", "size"), [(b"[0,8] ", 8), (b"[4,16]", 16), (b"[0,16]", 16)])
def test_header_that_does_not_fit_its_data(inputs, offsets, size):
    """Three numbers of four bytes in eight bytes, behind a hole, and in sixteen."""
    shard = sorted(inputs[0].glob("*.safetensors"))[0]
    header = lay_out_shard(shard, [("x", "F32", (3,))], {}).header
    shard.write_bytes(header.replace(b"[0,12]", offsets) + bytes(size))
    refuse(*inputs, "does not describe its data", "tensor x")


def test_base_folder_missing(inputs):
    refuse_missing = inputs[0].parent / "nowhere"
    with pytest.raises(UserError, match="does not exist"):
        merge(refuse_missing, inputs[1], inputs[0].parent / "merged")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors"])
@pytest.mark.parametrize("part", [None, "text_config"])
def test_base_quantized_by_its_configuration(inputs, method, part):
    config = inputs[0] / "config.json"
    settings = {"quantization_config": {"quant_method": method}}
    write_json(config, {**read_json(config), **({part: settings} if part else settings)})
    refuse(*inputs, "quantized", f"quantization_config: {method}", "unquantized base")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("absmax", torch.ones(4)),  # bitsandbytes
        ("qweight", torch.zeros(4, dtype=torch.int32)),  # GPTQ, AWQ
        ("weight_packed", torch.zeros(4, dtype=torch.int32)),  # compressed-tensors
        ("weight_scale_inv", torch.ones(4)),  # FP8 in blocks
        ("fp8", torch.zeros(4).to(torch.float8_e4m3fn)),
    ],
)
def test_base_quantized_by_its_tensors(inputs, name, values):
    """A quantized folder whose configuration lost its quantization_config."""
    shard = sorted(inputs[0].glob("*.safetensors"))[0]
    index = inputs[0] / "model.safetensors.index.json"
    name = f"model.layers.0.self_attn.q_proj.weight.{name}"
    edit_weights(shard, lambda tensors: tensors.update({name: values}))
    content = read_json(index)
    content["weight_map"][name] = shard.name
    write_json(index, content)
    refuse(*inputs, "quantized", name)


@pytest.mark.parametrize(
    "file", ["base/config.json", "base/SHARD", "base/INDEX", "adapter/WEIGHTS", "adapter/CONFIG"]
)
def test_links_out_of_a_folder_are_not_followed(inputs, file):
    """Whichever file it is; within the folder they are."""
    folder, name = file.split("/")
    names = {"INDEX": "model.safetensors.index.json", "WEIGHTS": "adapter_model.safetensors"}
    names |= {
        "CONFIG": "adapter_config.json",
        "SHARD": sorted(path.name for path in inputs[0].glob("model-*.safe*"))[1],
    }
    path = inputs[folder == "adapter"] / names.get(name, name)
    within = path.rename(path.with_name("renamed"))
    path.symlink_to(within.name)
    merge(*inputs, inputs[0].parent / "merged")
    shutil.rmtree(inputs[0].parent / "merged")
    path.unlink()
    path.symlink_to(within.rename(inputs[0].parent / "elsewhere"))
    refuse(*inputs, "link to somewhere outside", path.name)


@pytest.mark.parametrize(
    "sizes", [{"vocab_size": 96}, {"hidden_size": 64}, {"num_hidden_layers": 3}]
)
@pytest.mark.parametrize("part", [None, "text_config"])
def test_base_configuration_contradicts_the_tensors(inputs, sizes, part):
    config = inputs[0] / "config.json"
    write_json(config, {**read_json(config), **({part: sizes} if part else sizes)})
    refuse(*inputs, "contradict each other", next(iter(sizes)))


def test_large_weights_are_not_taken_for_infinite_ones(inputs):
    """Their sum is."""
    name = "model.layers.0.self_attn.q_proj.weight"
    shard = inputs[0] / read_json(inputs[0] / "model.safetensors.index.json")["weight_map"][name]
    edit_weights(shard, lambda tensors: tensors[name][3].fill_(3e38))
    merge(*inputs, inputs[0].parent / "merged")


def test_dtype_too_small_for_the_weights(inputs):
    edit_adapter(inputs[1], lambda tensors: tensors[f"{Q0}.lora_B.weight"].fill_(1e30))
    refuse(*inputs, "range is too small", "--dtype bfloat16", dtype="float16")


def test_unknown_dtype(inputs):
    refuse(*inputs, "Unknown dtype", "int4", dtype="int4")


@pytest.mark.parametrize("place", ["../key", "../../key"])
def test_link_out_of_the_model_s_folder(inputs, place):
    """Named like a file that goes with the model, it must not carry somebody's key into the results."""
    secret = (inputs[0] / place).resolve()
    secret.write_text("secret")
    (inputs[0] / "LICENSE").unlink()
    (inputs[0] / "LICENSE").symlink_to(secret)
    refuse(*inputs, "outside its folder", "LICENSE", str(secret), "cp --remove-destination")


def test_links_of_the_hub_s_cache_are_the_model_s_own(inputs, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0a1b", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(inputs[0].iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (snapshot / "NOTICE").unlink()
    (snapshot / "NOTICE").symlink_to("LICENSE")
    merge(snapshot, inputs[1], tmp_path / "merged")
    assert (tmp_path / "merged" / "NOTICE").read_text() == "LICENSE"
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


# --- what is not as it was written -----------------------------------------------------------------


@pytest.fixture
def recorded(inputs):
    """The folders as the workflow leaves them: each step's report beside what it wrote."""
    base, adapter = inputs
    weights = sorted(base.glob("*.safetensors"))
    write_report(
        base / "description.json", {}, *(path for path in base.iterdir() if path not in weights)
    )
    write_report(base / "weights.json", {}, *weights)
    write_report(adapter.parent / "training.json", {}, *adapter.glob("adapter_*"))
    return base, adapter


def zero(path: Path, count: int = 64) -> None:
    """Some bytes of the data become zeros, as after a crash of the file system."""
    content = path.read_bytes()
    path.write_bytes(content[:-count] + bytes(count))


@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "base/model-00002-of-*.safetensors",
        "base/config.json",
        "base/LICENSE",
        "training.json",
        "base/weights.json",
        "base/description.json",
    ],
)
def test_damage_is_noticed_and_the_file_to_delete_is_named(recorded, name):
    (path,) = recorded[0].parent.glob(name)
    if path.suffix == ".safetensors":
        zero(path)
    elif path.name in ("training.json", "weights.json", "description.json"):
        write_json(path, {**read_json(path), "edited": True})
    else:
        path.write_text(path.read_text() + " ")
    refuse(*recorded, "not what the step that made it has written", f"rm {path}")


def test_outside_the_workflow_it_says_what_was_not_checked(inputs, recorded, caplog):
    base, adapter = recorded
    output = base.parent / "merged"
    assert merge(base, adapter, output)["unchecked"] == []
    (base.parent / "training.json").unlink()
    write_json(base / "weights.json", {"somebody": "else's"})
    with caplog.at_level("INFO"):
        manifest = merge(base, adapter, output, replace=True)
    assert manifest["unchecked"] == ["adapter", "base's weights"]
    assert (
        "not compared with digests, since none are recorded beside them: the adapter, the base's w"
        in caplog.text
    )


# --- the adapter ---------------------------------------------------------------------------------


def test_adapter_with_the_tokenizer_of_another_base(inputs):
    for folder, vocabulary in zip(inputs, ({"a": 0, "b": 1}, {"a": 1, "b": 0}), strict=True):
        write_json(folder / "tokenizer.json", {"model": {"vocab": vocabulary}})
    refuse(*inputs, "another vocabulary", "another base")


@pytest.mark.parametrize(
    "change", [{"r": 0}, {"r": True}, {"r": "8"}, {"lora_alpha": -1}, {"lora_alpha": None}]
)
def test_rank_or_alpha_that_is_no_number(inputs, change):
    edit_settings(inputs[1], **change)
    refuse(*inputs, f"The adapter's {next(iter(change))} must be a number", "or more")


def test_a_pattern_matches_whole_names():
    """As in PEFT: the end of the path, from a dot on."""
    patterns = {"proj": 1, "mlp.up_proj": 2, "q_proj": 3}
    found = [
        _pattern_value(patterns, f"model.layers.0.{name}", 8)
        for name in ("self_attn.q_proj", "mlp.up_proj", "k_proj")
    ]
    assert found == [3, 2, 8]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"megatron_config": {"tp": 2}}, "megatron_config"),
        ({"velora_config": {"scale": 1.0}}, "velora_config"),
        ({"a_field_of_a_later_peft": 1}, "a_field_of_a_later_peft"),
    ],
)
def test_what_only_peft_can_merge(inputs, settings, name):
    edit_settings(inputs[1], **settings)
    refuse(*inputs, name, "use PEFT", "merge_and_unload")


def test_every_field_of_peft_s_configuration_has_been_thought_of():
    """A field that is neither merged, neutral nor refused when set would be a silent mistake after an upgrade."""
    import dataclasses

    from peft import LoraConfig

    from scripts.merging.adapter import MERGED_FIELDS, NEUTRAL_FIELDS

    refused = {
        "alora_invocation_tokens",
        "arrow_config",
        "corda_config",
        "kasa_config",
        "layer_replication",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    }
    assert {
        field.name for field in dataclasses.fields(LoraConfig)
    } == MERGED_FIELDS | NEUTRAL_FIELDS | refused


# --- the place -----------------------------------------------------------------------------------


def test_output_not_empty(inputs):
    output = inputs[0].parent / "merged"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    refuse(*inputs, "not empty", "1 entries")
    assert (output / "notes.txt").read_text() == "mine"


def test_output_is_a_file(inputs):
    (inputs[0].parent / "merged").write_text("mine")
    refuse(*inputs, "a file, not a folder")


def test_disk_too_small(inputs):
    """A base with a sparse tensor of 14 TB: the check comes before the first byte is written."""
    base, adapter = inputs
    rows = 14 * 10**12 // 4096
    shard = sorted(base.glob("*.safetensors"))[0]
    header = lay_out_shard(shard, [("huge", "F32", (rows, 1024))], {}).header
    with open(base / "huge.safetensors", "wb") as handle:
        handle.write(header)
        try:
            handle.truncate(len(header) + rows * 4096)
        except OSError:
            pytest.skip("this file system has no sparse files of that size")
    index = read_json(base / "model.safetensors.index.json")
    index["weight_map"]["huge"] = "huge.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert shard.exists()
    refuse(base, adapter, "disk is too small", "GiB free")


def test_a_margin_of_the_disk_stays_free(inputs, monkeypatch):
    """What the merge writes beside the weights, and others meanwhile, has room: to the byte, so the size is given."""
    base, adapter = inputs
    merge(base, adapter, base.parent / "first")
    needed = DISK_MARGIN_BYTES + sum(
        path.stat().st_size for path in (base.parent / "first").glob("*.safetensors")
    )
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    refuse(base, adapter, "disk is too small")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    merge(base, adapter, base.parent / "second")
