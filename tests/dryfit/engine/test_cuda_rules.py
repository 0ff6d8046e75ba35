"""CUDA's rules by hand, each at its edge, and that the analytic estimate asks them."""

import pytest

from dryfit.analytic.estimate import analytic_estimate
from dryfit.analytic.setting import Setting, describe
from dryfit.analytic.step import TrainingStep
from dryfit.engine.components import GROUPS, grouped, weights
from dryfit.engine.cuda_rules import (
    DEFAULT_CAPABILITY,
    MIB,
    attention_kernel,
    cublas_workspace_bytes,
    dequantization_bytes,
    efficient_workspace_bytes,
    embedding_backward_bytes,
    flash_padding,
    keeps_cublaslt_workspace,
)
from dryfit.scenario.scenario import Scenario

MODEL = {
    "model_type": "llama",
    "hidden_size": 288,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # of 72
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
}


def make(**fields) -> Scenario:
    fields = {
        "model": MODEL,
        "sequence_length": 100,
        "gradient_checkpointing": False,
        "method": "full",
        **fields,
    }
    return Scenario.from_mapping(fields)


def backward_sizes(scenario: Scenario) -> list[int]:
    """Bytes of what the analytic estimate allocates in the backward pass, in order."""

    class Recorded(TrainingStep):
        def make_blocks(self) -> None:
            starts = dict(self._starts)
            found.extend(self.events[starts["backward"] : starts["optimizer"]])

    found: list[tuple[int, int]] = []
    Recorded(Setting(describe(scenario.model), scenario, DEFAULT_CAPABILITY), blocks=True).run()
    return [size for identity, size in found if identity > 0]


def test_workspaces_of_cublas_are_32_mib_on_hopper_alone() -> None:
    assert [cublas_workspace_bytes(c) for c in ((8, 0), (9, 0), (12, 0))] == [
        8_519_680,
        32 * MIB,
        8_519_680,
    ]
    ampere, hopper = (
        analytic_estimate(make(), capability=c, blocks=False)["phases"] for c in ((8, 0), (9, 0))
    )
    assert hopper["forward"] - ampere["forward"] == 2 * (
        32 * MIB - 8_519_680
    )  # forward thread and autograd's


def test_an_embedding_sorts_its_indices_from_3073_on() -> None:
    assert embedding_backward_bytes(3072, 1000, 64) == []
    rows = 1000 + 307  # a run for each word, and one more for each ten indices
    assert embedding_backward_bytes(3073, 1000, 64) == [3073 * 8] * 2 + [1000 * 8] * 3 + [
        rows * 64 * 4
    ]
    short, long = (backward_sizes(make(sequence_length=n)) for n in (3072, 3073))
    size = -(-rows * 288 * 4 // 512) * 512
    assert size not in short and long.count(size) == 1


def test_what_backward_passes_allocate_beside_their_results() -> None:
    assert [flash_padding(n, d) for n, d in ((128, 64), (129, 65), (1, 129))] == [
        (128, 64),
        (256, 96),
        (128, 192),
    ]
    sizes = backward_sizes(make())
    assert sizes.count(4 * 128 * 4) == 2 and sizes.count(4 * 128 * 96 * 4) == 2  # once a layer
    sizes = backward_sizes(make(attention="eager"))
    # Of a layer's scores in fp32: the gradient of the result, of the input, and their product.
    assert sizes.count(160_256) == 2 * 3  # 160,000 in whole 512
    assert dequantization_bytes(128, 2, 2) == [8, 8, 256]
    assert dequantization_bytes(128, 2, 0) == [256]
    sizes = backward_sizes(make(method="qlora", lora={"rank": 4}))
    assert (
        sizes.count(288 * 512 // 64 * 4 + (-288 * 512 // 64 * 4) % 512) >= 2 * 3 * 2
    )  # three matrices, two layers


def test_the_memory_efficient_kernels_workspace() -> None:
    workspace = efficient_workspace_bytes(100, 100, 72, "bf16", DEFAULT_CAPABILITY)
    assert workspace == 16 + 128 * 128 * 4
    sizes = backward_sizes(make(attention="mem_efficient"))
    assert sizes.count(-(-4 * workspace // 512) * 512) == 2
    # 128 x 64 blocks; heads of more than 128 don't fit a T4's registers, so keys and values have fp32 sums too.
    query = 4 * (16 + 128 * 64 * 4)  # four blocks of columns
    assert efficient_workspace_bytes(128, 128, 256, "fp16", (7, 5)) == query + 2 * 128 * 256 * 4
    assert efficient_workspace_bytes(128, 128, 128, "fp16", (7, 5)) == 2 * (16 + 128 * 64 * 4)


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "grouped", "masked", "kernel"),
    [
        ((8, 0), "bf16", 256, True, False, "flash"),
        ((8, 0), "bf16", 264, False, False, "mem_efficient"),
        ((8, 0), "bf16", 128, False, True, "mem_efficient"),
        ((8, 0), "fp32", 128, False, False, "mem_efficient"),
        ((7, 5), "fp16", 128, True, False, "math"),
        ((7, 5), "bf16", 128, False, False, "math"),
        ((8, 0), "fp32", 6, False, False, "math"),  # heads of 24 bytes
    ],
)
def test_which_kernel_attention_takes(capability, dtype, head, grouped, masked, kernel) -> None:
    taken = attention_kernel(
        dtype, head, head, grouped=grouped, masked=masked, capability=capability
    )
    assert taken == kernel


def test_no_kernel_where_none_that_can_is_enabled() -> None:
    only = {"grouped": False, "masked": True, "capability": (8, 0), "enabled": ["flash"]}
    assert attention_kernel("bf16", 64, 64, **only) is None


def test_every_component_has_one_group() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names)) and weights("int8") in names
    assert grouped({"gradients": 2, "weights_bf16": 1}, adapters=True) == {
        "parameters": 1,
        "adapters": 2,
    }


@pytest.mark.parametrize(
    ("version", "keeps"),
    [("2.4.1", False), ("2.6.0", False), ("2.7.0", True), ("2.13.0+cpu", True), ("3.0.0", True)],
)
def test_the_workspace_of_cublaslt_stays_from_torch_2_7_on(version, keeps) -> None:
    assert keeps_cublaslt_workspace(version) is keeps


@pytest.mark.parametrize(
    ("head", "capability", "count"),
    [
        (
            96,
            (8, 9),
            16 + 128 * 64 * 4,
        ),  # one block of 128 queries and 64 values, twice: 96 of them
        (96, (8, 6), 16 + 128 * 64 * 4),
        (96, (12, 0), 2 * (16 + 64 * 64 * 4)),
        (64, (12, 0), 2 * (16 + 64 * 64 * 4)),
    ],
)
def test_the_memory_efficient_kernels_block_follows_the_shared_memory(head, capability, count):
    """cutlassB.h: with 99 KB the block of 128 x 64 serves heads up to 96 on 8.6 and 8.9, and on 12.0 none."""
    expected = count * -(-head // 64)
    if capability == (12, 0) and head > 64:  # keys and values don't stay in registers
        expected += 2 * 128 * 128 * 4
    assert efficient_workspace_bytes(128, 128, head, "bf16", capability) == expected
