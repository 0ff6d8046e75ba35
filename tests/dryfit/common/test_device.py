"""Devices that are asked for and not there."""

import os

import pytest

from dryfit.common import device
from dryfit.common.errors import UserError


@pytest.mark.parametrize(
    ("there", "wanted", "gpus", "words"),
    [
        (1, "auto", 2, ["for 2 GPUs", "this machine has 1", "strategy: none, gpus: 1"]),
        (3, "cuda", 4, ["for 4 GPUs", "this machine has 3", "strategy: fsdp2, gpus: 3"]),
        (0, "cuda", 2, ["No CUDA device", "device: auto"]),
        (0, "auto", 2, None),  # two processes on the CPU
        (1, "cpu", 2, None),
        (4, "cuda", 4, None),
    ],
)
def test_more_gpus_than_there_are(monkeypatch, there, wanted, gpus, words):
    monkeypatch.setattr(device, "cuda_devices", lambda: there)
    if words is None:
        device.refuse_missing(wanted, gpus)
        return
    with pytest.raises(UserError) as error:
        device.refuse_missing(wanted, gpus)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("vendor", "flags", "faster"),
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2 fma", False),
    ],
)
def test_which_processors_are_faster_in_bf16(tmp_path, vendor, flags, faster):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\nbogomips\t: 5000\n"
    )
    assert device.multiplies_bf16(cpuinfo) is faster
    assert not device.multiplies_bf16(tmp_path / "none")


def test_no_processor_is_said_to_be_faster_in_bf16_that_pytorch_does_not_know_it_of():
    torch = pytest.importorskip("torch")
    assert not device.multiplies_bf16() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.fixture
def no_allocator_settings(monkeypatch):
    for name in device.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # put back afterwards


@pytest.mark.parametrize(
    ("wanted", "given", "left", "named"),
    [
        (False, "", "expandable_segments:False", False),
        (True, "", "expandable_segments:True", False),
        (True, "max_split_size_mb:64", "max_split_size_mb:64,expandable_segments:True", False),
        (True, "expandable_segments:False", "expandable_segments:False", True),
        (False, "expandable_segments:True", "expandable_segments:True", True),
    ],
)
def test_the_allocator_works_as_the_trace_assumed(
    no_allocator_settings, monkeypatch, caplog, wanted, given, left, named
):
    name = device.ALLOCATOR_VARIABLES[1 if given else 0]
    monkeypatch.setenv(name, given)
    monkeypatch.setattr(device, "version", lambda package: "2.13.0+cpu")
    with caplog.at_level("WARNING", logger="securecli"):
        device.set_allocator(wanted)
    assert os.environ[name] == left
    assert (name in caplog.text) == named


def test_training_has_expandable_segments_on_cuda_unless_somebody_says_no(
    no_allocator_settings, monkeypatch
):
    assert device.expandable_segments_here("cuda") and device.expandable_segments_here("auto")
    assert not device.expandable_segments_here("cpu")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:False")
    assert not device.expandable_segments_here("cuda")
    monkeypatch.setattr(device.sys, "platform", "win32")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    assert not device.expandable_segments_here("cuda")


@pytest.mark.parametrize(
    ("torch", "name"), [("2.8.0+cu126", "PYTORCH_CUDA_ALLOC_CONF"), ("2.9.1", "PYTORCH_ALLOC_CONF")]
)
def test_the_allocators_variable_is_one_that_this_pytorch_reads(
    no_allocator_settings, monkeypatch, torch, name
):
    for one in device.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setattr(device, "version", lambda package: torch)
    device.set_allocator(True)
    assert os.environ.pop(name) == "expandable_segments:True"


@pytest.mark.parametrize(
    ("driver", "write"),
    [
        ("12.4", "whl/cu118"),
        ("12.6", "whl/cu126"),
        ("13.1", "whl/cu130"),
        ("11.4", "update the driver"),
    ],
)
def test_the_line_to_install_has_a_build_that_the_driver_runs(driver, write):
    assert device.install_line(driver).endswith(write) or write in device.install_line(driver)
