"""How long vLLM generates, by the roofline: what a pass computes and what it reads, over what a card can do.

A pass that decodes reads all weights and the keys and values of each row; one that reads prompts computes. Each takes
the longer of both. The small kernels of a layer come on top. Without CUDA graphs the host launches each kernel, which
small models wait for. What vLLM's scheduler and sampler take between passes is left out: from version 0.8 on they run
beside the card.

Two constants were fitted, on Qwen2.5 with 1.5, 3 and 7 billion parameters on an A100; ``python -m
validation.vllm_speeds`` has these rows and others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from dryfit.serving.kv_cache import CACHE_BYTES, FULL, LATENT, SLIDING, layers_of
from dryfit.serving.vllm import WIDTH, Server

# Of a decoder's layer in vLLM: norm, queries and keys and values, rotation, cache, attention, output, norm, two of the
# gated layer, activation (vllm/model_executor/models/llama.py).
KERNELS_OF_A_LAYER = 10
DECODING_SHARE = (
    0.85  # of the memory's rate, that reading weights and keys and values reaches: fitted
)
SMALL_KERNELS_SECONDS = 67e-6  # of a layer in a CUDA graph, beside what reads weights: fitted
_SAMPLES = 16  # lengths at which a row is looked at while it grows


@dataclass(frozen=True)
class Rates:
    """What kernels reach on a card."""

    # A second: what products in 16 bits reach, and the datasheet's rate of memory.
    flops: float
    memory_bytes: float
    copied_bytes: float  # a second, read and written, that copies on the card reach
    link_bytes: float  # a second, to another card
    host_bytes: float  # a second, from pinned memory of the host
    launch_seconds: float  # the host's time for a kernel


@dataclass(frozen=True)
class Generating:
    """What generating so many answers takes."""

    # Of the prompts, and of all tokens after them.
    prefill_seconds: float
    decode_seconds: float
    waves: int  # how often the cache is filled: answers wait for each other where it holds fewer than there are
    tokens: int  # of all answers
    reads_memory: (
        bool  # whether decoding waits for memory; False: for products, or for the host's launches
    )

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.prefill_seconds + self.decode_seconds


def generating(
    server: Server, rates: Rates, *, rows: int, prompts: int, prompt: int, answer: int
) -> Generating:
    """The time of ``rows`` answers of ``answer`` tokens each.

    ``prompts``: how many of their prompts differ: one that several answers share is computed once, since prefix caching
    is on. ``prompt``: tokens of each.
    """
    at_once = max(server.concurrent(prompt + answer)[0], 1)
    waves = [min(at_once, rows - first) for first in range(0, rows, at_once)]
    passes = {
        running: list(_passes(server, rates, running, prompt, answer)) for running in set(waves)
    }
    decoding = sum(
        answer * sum(seconds for seconds, _ in passes[running]) / _SAMPLES for running in waves
    )
    tokens = prompts * prompt
    computed = _flops(server, tokens, prompt / 2, scored=prompts) / rates.flops
    reach = rates.memory_bytes * DECODING_SHARE
    read = (
        ceil(tokens / server.tokens_at_once) * _weights_read(server, server.tokens_at_once) / reach
    )
    reads = [by_memory for _, by_memory in passes[waves[0]]]
    return Generating(
        max(computed, read), decoding, len(waves), rows * answer, sum(reads) * 2 > len(reads)
    )


def _passes(
    server: Server, rates: Rates, rows: int, prompt: int, answer: int
) -> Iterator[tuple[float, bool]]:
    """Seconds of a pass over so many rows while they grow, and whether memory decides about it."""
    weights, layers = _weights_read(server, rows), len(_layers(server))
    launches = 0.0 if server.cuda_graphs else KERNELS_OF_A_LAYER * layers * rates.launch_seconds
    for sample in range(_SAMPLES):
        context = prompt + answer * (2 * sample + 1) / (2 * _SAMPLES)
        reading = (weights + rows * _row_read(server, context)) / (
            rates.memory_bytes * DECODING_SHARE
        )
        computing = _flops(server, rows, context, scored=rows) / rates.flops
        exchanged = _exchanged(server, rows) / rates.link_bytes
        busy = max(reading, computing) + exchanged + layers * SMALL_KERNELS_SECONDS
        yield max(busy, launches), reading > max(computing, launches)


def _layers(server: Server) -> list:
    numbers = CACHE_BYTES[server.cache_dtype]
    return layers_of(server.model, number_bytes=numbers, tensor_parallel=server.tensor_parallel)


def _row_read(server: Server, context: float) -> float:
    """Bytes of keys, values and states that a token of one row reads; states are written too."""
    return sum(
        2 * layer.state_bytes
        + layer.token_bytes * (min(context, layer.window) if layer.kind == SLIDING else context)
        for layer in _layers(server)
    )


def _experts(server: Server) -> tuple[int, int, int]:
    """Parameters of all routed experts, how many a layer has, and how many a token takes; without experts 0."""
    text = server.text
    count = next(
        (
            text[name]
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
            if text.get(name)
        ),
        0,
    )
    chosen = text.get("num_experts_per_tok") or 0
    if not (count and chosen):
        return 0, 0, 0
    inner = text.get("moe_intermediate_size") or text["intermediate_size"]
    layers = text["num_hidden_layers"] - (text.get("first_k_dense_replace") or 0)
    return layers * count * 3 * text["hidden_size"] * inner, count, chosen


def _weights_read(server: Server, rows: int) -> float:
    """Bytes of weights that a pass over so many rows reads: experts that no row chooses are left out, and so is a table
    of embeddings that is not the head too."""
    text, parameters = server.text, server.parameters
    table = 0 if text.get("tie_word_embeddings") else text["vocab_size"] * text["hidden_size"]
    routed, count, chosen = _experts(server)
    idle = routed * (1 - chosen / count) ** rows if count else 0
    return server.weights() * (parameters - table - idle) / parameters


def _flops(server: Server, tokens: float, context: float, *, scored: float) -> float:
    """Of products and attention, for so many tokens that each look back on ``context`` others; on each card.

    ``scored``: tokens whose logits are computed.
    """
    text = server.text
    routed, count, chosen = _experts(server)
    table = text["vocab_size"] * text["hidden_size"]
    body = server.parameters - table * (1 if text.get("tie_word_embeddings") else 2)
    active = body - (routed * (1 - chosen / count) if count else 0)
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    seen = 0.0
    for layer in _layers(server):
        width = (
            2 * text["kv_lora_rank"] + text["qk_rope_head_dim"]
            if layer.kind == LATENT
            else 2 * head
        )
        if layer.kind in (FULL, SLIDING, LATENT):
            seen += 2 * heads * width * (min(context, layer.window) if layer.window else context)
    return (tokens * (2 * active + seen) + 2 * scored * table) / server.tensor_parallel


def _exchanged(server: Server, rows: int) -> float:
    """Bytes that a card sends in a pass where several share the model: two sums over all cards in a layer."""
    cards, text = server.tensor_parallel, server.text
    each = 2 * (cards - 1) / cards * rows * text["hidden_size"] * WIDTH
    return 2 * text["num_hidden_layers"] * each if cards > 1 else 0.0
