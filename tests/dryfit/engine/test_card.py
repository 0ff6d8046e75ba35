"""A simulated card: what it answers, what it leaves as it was, and what nobody may start."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from torch import nn

from dryfit.engine.card import A100, H100, Card, active_simulation
from dryfit.engine.errors import TraceError
from dryfit.engine.patching import on_meta
from dryfit.engine.simulation import simulated
from dryfit.engine.trace import Options, trace_step

MIB = 2**20


def test_pytorch_hears_of_the_card_inside_and_of_none_outside():
    before = {
        name: vars(torch.cuda)[name]
        for name in ("is_available", "get_device_properties", "current_stream")
    }
    available = torch.cuda.is_available()
    with simulated(H100) as simulation:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        properties = torch.cuda.get_device_properties(0)
        assert (properties.name, properties.multi_processor_count) == (H100.name, 132)
        assert properties.shared_memory_per_block_optin == 232_448
        assert torch.cuda.get_device_capability() == (9, 0) and torch.cuda.is_bf16_supported()
        assert torch.cuda.nccl.version() >= (2, 0)
        assert torch.cuda.mem_get_info() == (H100.memory_bytes, H100.memory_bytes)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.manual_seed_all(3)
        assert torch.cuda.memory_allocated() == 0
        assert isinstance(torch.Generator("cuda"), torch.Generator)
        assert active_simulation() is simulation
    assert active_simulation() is None and torch.cuda.is_available() == available
    assert {name: vars(torch.cuda)[name] for name in before} == before


def test_what_is_made_on_the_card_lies_on_meta():
    with simulated(A100):
        made = [
            torch.empty(3, device="cuda"),
            torch.tensor([1.0, 2.0], device="cuda:0"),
            torch.ones(3).cuda(),
            torch.ones(3).to("cuda"),
            nn.Linear(2, 2, device="cuda").weight,
        ]
        assert all(tensor.is_meta for tensor in made)
        assert made[0].to("cuda").untyped_storage()._cdata == made[0].untyped_storage()._cdata, (
            "it is there already"
        )
        assert torch.ones(3).device.type == "cpu"


def test_a_module_moves_in_place_and_keeps_what_hangs_on_its_parameters():
    """As PyTorch does from the CPU to a GPU: tied weights stay tied, labels and hooks stay where they are."""
    with simulated(A100):
        model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
        model[1].weight = model[0].weight
        weight = model[0].weight
        weight.label = "embed"
        assert model.cuda() is model and model[0].weight is weight is model[1].weight
        assert weight.is_meta and weight.label == "embed"
        weight.register_post_accumulate_grad_hook(lambda parameter: heard.append(parameter.label))
        heard: list[str] = []
        model.load_state_dict(
            {name: torch.empty_like(value) for name, value in model.state_dict().items()}
        )
        model(torch.zeros(3, dtype=torch.long, device="cuda")).sum().backward()
        assert heard == ["embed"]
    assert not torch.__future__.get_swap_module_params_on_conversion()


def test_a_kernel_in_cuda_is_neither_compiled_nor_run():
    def step(batch):
        kernel = torch.cuda._compile_kernel(
            "__global__ void twice(float* x) {}", "twice", compute_capability="80"
        )
        kernel.set_shared_memory_config(1024)
        kernel((1, 1, 1), (32, 1, 1), (batch[0], 3), shared_mem=1024)

    with simulated(A100):
        report = trace_step(nn.Module(), None, step, [torch.empty(4)], Options(steps=1))
    assert report.triton_kernels == {"twice": 1}


def test_tensors_say_cuda_to_packages_with_kernels_alone():
    asked = "where = tensor.device.type, tensor.is_cuda"
    tensor = torch.empty(3, device="meta")
    names = {"__name__": "liger_kernel.ops", "tensor": tensor}
    with simulated(A100):
        exec(asked, names)
        assert names["where"] == ("cuda", True)
        for own in (
            {"__name__": "transformers.modeling"},
            {"__name__": "torch.nn.linear", "triton": 1},
        ):
            others = own | {"tensor": tensor}
            exec(asked, others)
            assert others["where"] == ("meta", False)


def test_a_card_is_one_at_a_time_and_says_what_it_lacks():
    with (
        simulated(A100),
        pytest.raises(TraceError, match="simulated already") as caught,
        simulated(H100),
    ):
        pass
    assert "a process of its own" in str(caught.value)
    with simulated(H100):
        assert torch.cuda.get_device_name() == H100.name
    with pytest.raises(TraceError, match="shared_memory_bytes="):
        Card("NVIDIA X", (99, 0), 10, 2**30, MIB)
    assert (
        Card("NVIDIA X", (99, 0), 10, 2**30, MIB, 65_536).properties().shared_memory_per_block_optin
        == 65_536
    )


def test_programs_that_change_the_system_are_not_started():
    with simulated(A100) as simulation:
        assert os.system("ldconfig /usr/lib64-nvidia") != 0
        with pytest.raises(FileNotFoundError):
            subprocess.run(["/sbin/ldconfig", "-p"], check=False)
        package = {"__name__": "unsloth.models", "subprocess": subprocess}
        with pytest.raises(FileNotFoundError):
            exec("subprocess.check_output(['true'])", package)
        assert subprocess.run(["true"], check=True).returncode == 0
    assert simulation.programs == ["ldconfig /usr/lib64-nvidia", "/sbin/ldconfig -p", "true"]
    assert subprocess.run(["true"], check=True).returncode == 0


# --- custom operators ---------------------------------------------------------------------------------------------


@torch.library.custom_op("steptest::scratch", mutates_args=())
def scratch(inputs: torch.Tensor) -> torch.Tensor:
    wide = torch.empty(inputs.numel() * 256, device=inputs.device)
    return inputs + wide[: inputs.numel()].view_as(inputs)


@scratch.register_fake
def _(inputs):
    return torch.empty_like(inputs)


scratch.register_autograd(lambda ctx, grad: grad)


class Scratch(nn.Module):
    """A model with a custom operator whose code makes a large tensor that its shape function doesn't know."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(64, 64)

    def forward(self, inputs):
        return scratch(self.features(inputs)).sum()


def forward_peak(simulates: bool) -> tuple[int, tuple[str, ...]]:
    with on_meta():
        model, batch = Scratch(), torch.empty(64, 64)

    def step(inputs):
        model(inputs).backward()

    def traced():
        report = trace_step(model, None, step, batch, Options(target="cpu"))
        return report.phases["forward"], report.warnings

    if not simulates:
        return traced()
    with simulated(A100):
        return traced()


def test_a_custom_operators_own_code_runs_where_a_card_is_simulated():
    without, warnings = forward_peak(simulates=False)
    assert any("steptest::scratch is opaque" in text for text in warnings)
    followed, warnings = forward_peak(simulates=True)
    assert not any("opaque" in text for text in warnings)
    assert followed == without + 64 * 64 * 256 * 4


def test_an_operator_that_is_one_kernel_is_neither_followed_nor_told(monkeypatch):
    expected, _ = forward_peak(simulates=False)
    monkeypatch.setattr(scratch, "one_kernel", True, raising=False)
    for simulates in (False, True):
        assert forward_peak(simulates) == (expected, ())


def test_the_cards_capability_is_the_traces():
    """cuBLAS takes 32 MiB on an H100, 8.1 MiB on an A100: `cuda_rules.cublas_workspace_bytes`."""
    found = {}
    for card in (A100, H100):
        with simulated(card), on_meta():
            model, batch = nn.Linear(64, 64), torch.empty(64, 64)
        with simulated(card):
            found[card] = trace_step(
                model, None, lambda inputs, model=model: model(inputs).sum().backward(), batch
            )
    difference = found[H100].peak_allocated_bytes - found[A100].peak_allocated_bytes
    assert difference == 2 * (32 * MIB - 8_519_680)
