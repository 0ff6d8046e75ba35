"""How long vLLM generates: what a pass reads and computes, and what it waits for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dryfit.serving.roofline import DECODING_SHARE, SMALL_KERNELS_SECONDS, Rates, generating
from tests.dryfit.serving.test_vllm import server

RATES = Rates(
    flops=500e12,
    memory_bytes=2e12,
    copied_bytes=1.4e12,
    link_bytes=1e11,
    host_bytes=25e9,
    launch_seconds=28e-6,
)
TABLE = json.loads(Path("validation/data/vllm_cache_groups.json").read_text())["rows"]


def made(engine, **asked):
    return generating(
        engine, RATES, **{"rows": 8, "prompts": 8, "prompt": 512, "answer": 256, **asked}
    )


def test_few_rows_wait_for_the_weights_and_many_for_products():
    one = server()
    few, many = made(one, rows=1, prompts=1), made(replace(one, requests=4096), rows=2048)
    table = (
        one.text["vocab_size"] * one.text["hidden_size"] * 2
    )  # of embeddings, of which a row is picked
    reading = (one.weights() - table) / (2e12 * DECODING_SHARE)
    keys = 32 * 2 * 8 * 128 * 2 * (512 + 128) / (2e12 * DECODING_SHARE)
    assert few.decode_seconds / 256 == pytest.approx(
        reading + keys + 32 * SMALL_KERNELS_SECONDS, rel=1e-3
    )
    assert few.reads_memory
    slow = generating(
        replace(one, requests=4096),
        replace(RATES, flops=1e12),
        rows=256,
        prompts=1,
        prompt=8,
        answer=8,
    )
    assert not slow.reads_memory and many.tokens / many.seconds > few.tokens / few.seconds


def test_what_a_prompt_graphs_and_experts_cost():
    assert made(server(), prompts=1).prefill_seconds < made(server(), prompts=8).prefill_seconds / 4
    assert made(server(), prompts=1).decode_seconds == made(server(), prompts=8).decode_seconds
    small = server("qwen2.5-0.5b")
    eager = made(replace(small, cuda_graphs=False), rows=1)
    assert eager.decode_seconds == pytest.approx(256 * 24 * 10 * 28e-6)
    assert not eager.reads_memory and eager.decode_seconds > made(small, rows=1).decode_seconds
    mixed = server("qwen3-30b-a3b")
    one, many = made(mixed, rows=1), made(mixed, rows=256)
    assert one.decode_seconds / 256 < 0.2 * mixed.weights() / 2e12 + 48 * SMALL_KERNELS_SECONDS
    assert many.decode_seconds / 256 > 0.9 * mixed.weights() / 2e12


def test_where_the_cache_holds_fewer_rows_answers_wait_for_each_other():
    tight = server(total_bytes=24 * 2**30, requests=256, longest=2048)
    at_once = tight.concurrent(768)[0]
    assert 0 < at_once < 200
    found = made(tight, rows=200)
    assert found.waves == -(-200 // at_once)
    assert found.decode_seconds > made(server(), rows=200).decode_seconds


def test_cards_that_share_a_model_read_less_each_and_send_sums():
    one, two = server(), server(tensor_parallel=2)
    halved = made(two, rows=1).decode_seconds
    assert 0.5 < halved / made(one, rows=1).decode_seconds < 0.75
    slow_link = generating(
        two, replace(RATES, link_bytes=1e6), rows=1, prompts=1, prompt=512, answer=256
    )
    assert slow_link.decode_seconds - halved == pytest.approx(
        256 * 2 * 32 * 4096 * 2 / 1e6, rel=1e-2
    )


@pytest.mark.parametrize("name", ["gemma-3-4b", "DeepseekV2Config", "Qwen3NextConfig"])
def test_windows_latent_vectors_and_states_read_less_than_all_keys_would(name):
    config = TABLE[name]["config"]
    parameters = TABLE[name]["weights_bytes"] // 2
    engine = replace(
        server(), model=config, parameters=parameters, total_bytes=800 * 2**30, longest=32_768
    )
    long, short = (made(engine, prompt=prompt, rows=64).decode_seconds for prompt in (16_384, 512))
    text = config.get("text_config") or config
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    all_keys = text["num_hidden_layers"] * 2 * heads * (text.get("head_dim") or 128) * 2
    assert 0 < long - short < 0.7 * 256 * 64 * all_keys * (16_384 - 512) / (2e12 * DECODING_SHARE)
