"""vLLM's budget by its rules: graphs as its logs count them, weights as its own model has them, regimes of versions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dryfit.analytic.setting import describe
from dryfit.common.text import GIB, MIB
from dryfit.data import data_path
from dryfit.serving.vllm import (
    DIVIDED_NON_TORCH_BYTES,
    NON_TORCH_BYTES,
    Server,
    nf4_bytes,
    release,
    sampler_bytes_a_logit,
    serve_defaults,
)

TABLE = json.loads(Path("validation/data/vllm_cache_groups.json").read_text())["rows"]
MODELS = Path("dryfit/data/models")


def server(name="llama-3.1-8b", **fields) -> Server:
    model = json.loads((MODELS / f"{name}.json").read_text())
    parameters = describe(model).parameter_counts()["total"]
    return Server(
        **{
            "model": model,
            "parameters": parameters,
            "total_bytes": 80 * GIB,
            "utilization": 0.9,
            "requests": 256,
            "longest": 8192,
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("requests", "graphs"), [(8, 5 + 4), (32, 11 + 7), (64, 19 + 11), (128, 35 + 19), (256, 86)]
)
def test_graphs_are_captured_for_so_many_sizes(requests, graphs):
    assert server(requests=requests).graphs() == graphs
    assert server(requests=requests, cuda_graphs=False).graph_bytes() == (0, 0)


def test_graphs_take_at_most_what_a_driver_keeps_of_each_kernel():
    one = server(requests=32)
    assert one.kernels() == 32 * 18 + 4
    assert replace(one, lora_rank=16, packed=True).kernels() == 32 * 42 + 4
    assert replace(one, tensor_parallel=2).kernels() == 32 * 20 + 4
    low, high = one.graph_bytes()
    pool = 64 * 3 * (14336 + 4096) * 2  # 64 tokens of the largest graph
    assert (low, high) == (18 * MIB, 150 * MIB + pool + 18 * one.kernels() * MIB // 16)
    assert one.believed_bytes() == (0, high + pool)


def test_what_a_share_a_slot_a_version_and_experts_add():
    sparse, dense = server("qwen3-30b-a3b"), server("qwen3-4b")
    assert (sparse.kernels() - 4) / 48 - (dense.kernels() - 4) / 36 == 13
    assert server(total_bytes=101, utilization=0.5).budget_bytes == 51
    assert server(requests=256, tokens_at_once=100).graphs() == 2 * len((1, 2, 4, *range(8, 97, 8)))
    one = server()
    assert replace(one, lora_rank=16).weights() - one.weights() == 16 * 2 * 32 * (
        2 * 4096 + 2 * (4096 + 1024) + 2 * 4096 + 3 * (4096 + 14336)
    )
    assert 2 * replace(one, cache_dtype="fp8").cache().block_bytes == one.cache().block_bytes
    assert [
        sampler_bytes_a_logit(version) for version in ("0.10.2", "0.22.0", "0.26.0", "0.31.0")
    ] == [38.9, 14, 2, 2]
    assert release("0.31.0") == (0, 31) and server(version="0.10.2").believed_bytes() == (0, 0)


@pytest.mark.parametrize(
    "name", ["qwen2.5-7b", "llama-3.1-8b", "llama-3.2-3b", "qwen3-4b", "gemma-2-2b"]
)
def test_weights_are_those_of_vllms_own_model(name):
    assert server(name).weights() == pytest.approx(TABLE[name]["weights_bytes"], rel=1e-4)


@pytest.mark.parametrize(("tokens", "seen"), [(20_000, 2.060), (29_000, 2.987)])
def test_a_profile_run_takes_what_vllms_forward_pass_does(tokens, seen):
    assert server(tokens_at_once=tokens, requests=1).activations() / GIB == pytest.approx(
        seen, abs=0.005
    )


def test_a_budget_is_shared_out_and_the_least_holds_one_request():
    one = server()
    low, high = one.cache_bytes()
    known = one.budget_bytes - one.weights() - one.activations() - NON_TORCH_BYTES
    assert high <= known < high + one.cache().block_bytes
    assert known - low == pytest.approx(one.believed_bytes()[1], abs=one.cache().block_bytes)
    assert replace(one, cuda_graphs=False).cache_bytes() == (high, high)
    one = server(utilization=1.0)
    least = replace(one, total_bytes=one.least_budget_bytes())
    assert least.concurrent(one.longest)[0] == 1
    short = replace(least, total_bytes=least.total_bytes - one.cache().block_bytes)
    assert short.concurrent(one.longest)[0] == 0


@pytest.mark.parametrize(("name", "seen_gib"), [("qwen3-8b", 5.91)])
def test_weights_in_4_bits_are_as_a_log_of_unsloths_says(name, seen_gib):
    """Its slots for adapters of rank 32 may be among them: 0.16 GiB more."""
    model = json.loads((MODELS / f"{name}.json").read_text())
    packed = nf4_bytes(model, describe(model).parameter_counts()["total"])
    assert packed / GIB == pytest.approx(seen_gib, rel=0.01)


@pytest.mark.parametrize(
    "version, gib, settings, expected",
    [
        ("0.9", 79.2, {}, (8192, 1024)),
        ("0.9", 79.2, {"offline": True}, (16_384, 1024)),
        ("0.9", 79.2, {"a100": True}, (2048, 256)),
        ("0.9", 23.6, {"offline": True}, (8192, 256)),
        ("0.8", 79.2, {}, (2048, 256)),
        ("0.31.0", 69.9, {}, (2048, 256)),
    ],
)
def test_large_cards_take_more_requests_by_default(
    version: str, gib: float, settings: dict[str, bool], expected: tuple[int, int]
) -> None:
    assert serve_defaults(version, int(gib * GIB), **settings) == expected


def test_a_mixture_in_fp8_on_four_cards_is_near_its_log() -> None:
    """Qwen3-235B-A22B-FP8 on 4 H100 (vllm_logs.csv, qwen3-235b-fp8): 8.11 GiB; with 256 requests it was 15.3."""
    model = json.loads(data_path("models/qwen3-235b-a22b.json").read_text(encoding="utf-8"))
    parameters = describe(model).parameter_counts()["total"]
    tokens, requests = serve_defaults("0.9", total := int(79.22 * GIB))
    weights = int(
        55.04 * GIB
    )  # a byte a number, a fp32 scale for 128 x 128 of them, and tables in 16 bits
    engine = Server(
        model,
        parameters,
        total,
        0.9,
        requests,
        40_960,
        tokens,
        tensor_parallel=4,
        weights_bytes=weights,
        version="0.9",
    )
    least, most = (size / GIB for size in engine.cache_bytes())
    assert (least, most) == (pytest.approx(9.35, abs=0.01), pytest.approx(10.42, abs=0.01))
    assert engine.non_torch_bytes() == DIVIDED_NON_TORCH_BYTES
