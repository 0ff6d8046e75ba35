"""Triton kernels where a card is simulated: trace and Triton's interpreter agree, and nothing reaches a cache."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="`make test-kernels` runs it")
import triton.language as tl  # noqa: E402

from dryfit.engine.card import A100, H100  # noqa: E402
from dryfit.engine.launches import FLUSHED_BYTES  # noqa: E402
from dryfit.engine.patching import on_meta  # noqa: E402
from dryfit.engine.simulation import simulated  # noqa: E402
from dryfit.engine.trace import Options, trace_step  # noqa: E402
from tests.repository import ROOT  # noqa: E402

CONFIGURATIONS = [triton.Config({"BLOCK": 64 * 2**power}) for power in range(3)]


def add(source, target, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index < count) + 1, mask=index < count)


plain = triton.jit(add)
tuned = triton.autotune(CONFIGURATIONS, key=["count"], cache_results=True)(triton.jit(add))


def launched(kernel, source: torch.Tensor) -> torch.Tensor:
    target, count = torch.empty_like(source), source.numel()
    kernel[lambda given: (triton.cdiv(count, given["BLOCK"]),)](source, target, count)
    return target


@pytest.fixture(scope="module")
def figures() -> dict[str, dict]:
    def run(how: str) -> dict:
        command = [sys.executable, "-m", "tests.dryfit.engine.triton_steps", how]
        return json.loads(
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        )

    return {how: run(how) for how in ("trace", "measure")}


@pytest.mark.parametrize(
    ("step", "kernels"),
    [
        ("own", {"scale_kernel": 4}),  # forward and backward of two steps
        ("liger", {"liger_cross_entropy_kernel": 2}),
        ("liger_fused", {"liger_cross_entropy_kernel": 20}),  # ten chunks a step
    ],
)
def test_a_traced_launch_is_what_the_interpreter_runs(figures, step, kernels):
    traced, measured = figures["trace"][step], figures["measure"][step]
    assert traced["phases"] == measured["phases"] and traced["components"] == measured["components"]
    assert traced["kernels"] == kernels


@pytest.mark.parametrize(
    ("step", "kernel"),
    [
        ("fla_delta", "chunk_gated_delta_rule_fwd_kernel_h_blockdim64"),
        ("fla_gated", "chunk_gla_fwd_kernel_o"),
        ("fla_recurrent", "fused_recurrent_bwd_kernel"),
    ],
)
def test_linear_attention_of_fla_is_what_the_interpreter_runs(figures, step, kernel):
    traced, measured = figures["trace"][step], figures["measure"][step]
    assert traced["phases"] == measured["phases"] and traced["components"] == measured["components"]
    assert traced["kernels"][kernel] and traced["kernels"]["layer_norm_gated_bwd_kernel"]


@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize("tokens", [2048, 4096])
def test_the_hand_written_copy_of_ligers_loss_is_the_packages(trained_head, tokens, monkeypatch):
    """Where Triton isn't, `loss: liger` is traced by a copy. The package's bookkeeping of some scalars differs."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    from dryfit.step.liger import fused_linear_cross_entropy

    def traced(loss):
        with on_meta():
            head = torch.nn.Linear(1024, 32_000, bias=False, dtype=torch.bfloat16)
            hidden = torch.empty(tokens, 1024, dtype=torch.bfloat16)
        head.weight.requires_grad_(trained_head)

        def step(batch):
            loss(batch[0].requires_grad_(), head.weight, batch[1]).backward()

        return trace_step(head, None, step, (hidden, torch.empty(tokens, dtype=torch.long)))

    with simulated(H100):
        package = traced(liger_fused_linear_cross_entropy)
        monkeypatch.setattr("dryfit.step.liger.package_installed", lambda: False)
        copied = traced(fused_linear_cross_entropy)
    assert (
        package.triton_kernels["liger_cross_entropy_kernel"] > 0 and copied.triton_kernels is None
    )
    assert copied.warnings == package.warnings == ()
    for phase in ("forward", "backward"):
        assert abs(package.phases[phase] - copied.phases[phase]) <= 16 * 1024, phase


def test_a_launch_costs_its_arguments_and_ligers_loss_reads_its_logits_twice():
    from liger_kernel.transformers.functional import liger_cross_entropy

    model = torch.nn.Linear(10, 10, device="meta")
    logits = torch.empty(256, 32_000, dtype=torch.bfloat16)

    def step(batch):
        plain[(16,)](batch[0], torch.empty_like(batch[0]), batch[0].numel(), BLOCK=64)
        liger_cross_entropy(batch[0].requires_grad_(), batch[1])

    with simulated(H100):
        given = (logits, torch.zeros(256, dtype=torch.long))
        costs = trace_step(model, None, step, given, Options(costs=True, scalars=1.0)).costs
    by_name = {one.name: one for one in costs.operators}
    assert by_name["triton::add"].bytes == 2 * logits.nbytes
    assert (
        3 * logits.nbytes
        < by_name["triton::liger_cross_entropy_kernel"].bytes
        < 3.01 * logits.nbytes
    )


def test_cut_cross_entropy_runs_through_its_package_and_makes_no_logits():
    """Its kernels multiply: one product forward, that one again and two more backward."""
    tokens, hidden, words = 2048, 512, 32_000
    labels = torch.zeros(1, tokens, dtype=torch.long)
    with simulated(H100):
        from cut_cross_entropy import linear_cross_entropy

        with on_meta():
            head = torch.nn.Linear(hidden, words, bias=False, dtype=torch.bfloat16)
            inputs = torch.empty(1, tokens, hidden, dtype=torch.bfloat16)

        def step(batch):
            linear_cross_entropy(batch[0].requires_grad_(), head.weight, batch[1]).backward()
            head.weight.grad = None

        options = Options(compiled="follow", scalars=1.0, costs=True)
        report = trace_step(head, None, step, (inputs, labels), options)
    assert {name: count // 2 for name, count in report.triton_kernels.items()} == {
        "_cce_backward_kernel": 1,
        "_cce_lse_forward_kernel": 1,
        "_indexed_neg_dot_forward_kernel": 1,
    }
    assert report.warnings == () and report.compiled["graphs"] == 1, (
        "the package compiles one of its functions"
    )
    logits, weights = 2 * tokens * words, head.weight.nbytes
    held = report.peak_allocated_bytes - report.components.get("workspaces", 0)
    assert held < 2 * weights + 4 * inputs.nbytes + 2**20 < 2 * weights + logits
    products = {one.name: one.flops for one in report.costs.operators if one.kind == "products"}
    once = 2 * tokens * hidden * words
    assert products == {
        "triton::_cce_lse_forward_kernel": once,
        "triton::_cce_backward_kernel": 3 * once,
    }


def test_an_autotuner_takes_what_it_is_told_and_believes_no_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    asked = []

    def last(name, configurations):
        asked.append((name, len(configurations)))
        return len(configurations) - 1

    before = dict(tuned.cache)
    with simulated(H100, choose=last) as simulation:
        launched(tuned, torch.empty(1000, device="cuda"))
        launched(tuned, torch.empty(1000, device="cuda"))
        assert tuned.best_config == CONFIGURATIONS[-1]
    assert asked == [("add", 3)], "one benchmark for one key"
    assert simulation.chosen["add"] == (3, str(CONFIGURATIONS[-1]))
    assert tuned.cache == before, "no choice of the simulation stays"
    assert not list(tmp_path.rglob("*")), "no time reaches the disk"


def test_a_benchmark_allocates_what_triton_clears_once():
    model = torch.nn.Linear(10, 10, device="meta")

    def step(batch):
        launched(tuned, batch)

    def traced(steps):
        with simulated(A100):
            return trace_step(
                model, None, step, torch.empty(1000), Options(target="cpu", steps=steps)
            )

    first, second = traced(1), traced(2)
    assert first.peak_allocated_bytes - second.peak_allocated_bytes == FLUSHED_BYTES
    assert second.triton_kernels == {
        "add": 2 * 3 + 2
    }  # two calls of each configuration, then one a step


def test_a_launch_without_an_argument_names_it():
    with simulated(A100), pytest.raises(TypeError, match="add is launched without count, BLOCK"):
        plain[(1,)](torch.empty(3, device="meta"), torch.empty(3, device="meta"))


def test_what_a_kernel_writes_is_not_known_any_more():
    model = torch.nn.Linear(10, 10, device="meta")

    def step(batch):
        assert batch.sum().item() == 6
        written = torch.ones_like(batch)
        assert written.sum().item() == 3
        plain[(1,)](batch, written, 3, BLOCK=64)
        assert written.sum().item() == 77

    with simulated(A100):
        trace_step(model, None, step, torch.tensor([1, 2, 3]), Options(scalars=77.0))
