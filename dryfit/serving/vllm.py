"""vLLM's memory at its start, by its own rules: what it takes of a card, what sleeps, what stays.

Read in vLLM 0.31.0, the newest that TRL 1.16 admits: ``v1/worker/gpu_worker.py``, ``v1/worker/utils.py``,
``config/vllm.py``, ``lora/layers``, ``device_allocator/cumem.py``. It takes a share of the card's total memory. Of that
go the weights, the most that a profile run allocates, and what it believes CUDA graphs will take. The cache of keys and
values gets the rest. Two of these are measured by vLLM on the card: the memory of graphs, and what it believes of them.
Both are brackets here: the most follows from the kernels that are captured, and what a driver keeps for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from dryfit.common.text import GIB, MIB
from dryfit.serving.kv_cache import BLOCK_TOKENS, CACHE_BYTES, KvCache, kv_cache, layers_of

NEWEST = "0.31.0"
TOKENS_AT_ONCE = (
    4096  # `max_num_batched_tokens` that TRL passes (trl/generation/vllm_generation.py)
)
NON_TORCH_BYTES = (
    50 * MIB
)  # cuBLAS and kernels beside PyTorch's allocator: 0.03 to 0.14 GiB in logs of one GPU
# With NCCL, on each of several GPUs: 0.20 GiB in a log of 16 without NVLink, 1.27 in one of 4 H100 (vllm_logs.csv).
DIVIDED_NON_TORCH_BYTES = int(0.2 * GIB), int(1.27 * GIB)
_GRAPH_LOW = 1 * MIB  # the least of a graph that vLLM's own estimate allows (cudagraph_utils.py)
# Of a driver, for each kernel of a graph: 66 and 63 kB from 500 to 1,000 and to 2,000 kernels with driver 470
# (forums.developer.nvidia.com, thread 244901). Newer drivers keep less: logs of 86 graphs show a tenth of it.
_KERNEL_BYTES = MIB // 16
_GRAPHS_ALONE = (
    150 * MIB
)  # kernels that are loaded and workspaces that are made while graphs are captured
# Kernels of a dense layer at most: two norms, norms of queries and keys, rotation, cache, three of attention (parts and
# their sum), an activation, and four products of matrices, each with a sum of its parts.
_LAYER_KERNELS = 18
_SLOT_KERNELS = 12  # beside each product: a buffer of zeros, and both factors of an adapter
_PACKED_KERNELS = 12  # before each product: scales, their offset, weights are unpacked
_EXPERT_KERNELS = (
    13  # a router, five that sort tokens, a sum, and an MLP that every token goes through
)
_DIVIDED_KERNELS = 2  # sums over cards
_OTHER_KERNELS = 4  # embedding, last norm, choice of rows
# Buffers in which a trainer packs weights for a server of its own: vllm/distributed/weight_transfer/packed_tensor.py.
SENDING_BYTES = 2 * GIB
_VOCABULARY_ALIGNMENT = 64  # rows of embeddings and head (VocabParallelEmbedding)
WIDTH = 2  # bytes of a number that is computed in

Range = tuple[int, int]


def sampler_bytes_a_logit(version: str) -> float:
    """What the profile run's sampler holds for each number of its logits, with these.

    From 0.26 on the profile runs the sampler without its processors, and 16-bit logits are all. Before, it sorted:
    38.9 and 14 bytes were fitted on logs of 0.6 to 0.10 and of 0.11, since no source says them.
    """
    number = release(version)
    return 2 if number >= (0, 26) else 14 if number >= (0, 11) else 38.9


def believes_in_graphs(version: str) -> bool:
    """Whether what graphs will take is put aside before the cache is made (from 0.21 on)."""
    return release(version) >= (0, 21)


def serve_defaults(
    version: str, total_bytes: int, *, a100: bool = False, offline: bool = False
) -> tuple[int, int]:
    """Tokens at once and requests of ``vllm serve``, or of ``LLM(...)`` where ``offline``, that are not told otherwise.

    ``engine/arg_utils.py``, ``get_batch_defaults`` (``_set_default_args_v1`` before): from 0.9 on cards of 70 GiB
    and more take 1,024 requests, but for the A100. Each of them has logits in the profile run.
    """
    large = release(version) >= (0, 9) and total_bytes >= 70 * GIB and not a100
    if offline:
        return (16_384, 1024) if large else (8192, 256)
    return (8192, 1024) if large else (2048, 256)


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(version)
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Server:
    """An engine, as its arguments say."""

    model: Mapping[str, Any]  # the configuration of what it generates with
    parameters: int  # of that model
    total_bytes: int  # of the card, of which `utilization` is a share
    utilization: float
    # `max_num_seqs`, `max_num_batched_tokens` and `max_model_len`.
    requests: int
    longest: int
    tokens_at_once: int = TOKENS_AT_ONCE
    cache_dtype: str = "auto"  # one of `CACHE_BYTES`
    block_tokens: int = BLOCK_TOKENS
    tensor_parallel: int = 1
    cuda_graphs: bool = True
    lora_rank: int = 0  # of its slot for an adapter; 0: without
    weights_bytes: int | None = (
        None  # where they are known, such as quantized ones; None: of `parameters` in 16 bits
    )
    version: str = NEWEST
    packed: bool = False  # whether weights are unpacked before each product, as bitsandbytes does

    @property
    def text(self) -> Mapping[str, Any]:
        """The configuration of the language model."""
        return self.model.get("text_config") or self.model

    @property
    def budget_bytes(self) -> int:
        """What it may take of the card."""
        return ceil(self.total_bytes * self.utilization)

    def weights(self) -> int:
        """Its weights and its slots for adapters, on each card."""
        if self.weights_bytes is not None:
            return self.weights_bytes + self._slots()
        text = self.text
        rows = (
            -text["vocab_size"]
            % _VOCABULARY_ALIGNMENT
            * (1 if text.get("tie_word_embeddings") else 2)
        )
        numbers = self.parameters + rows * text["hidden_size"]
        return numbers * WIDTH // self.tensor_parallel + self._slots()

    def _slots(self) -> int:
        """One slot: both factors of each linear layer of the decoder, whose outputs are divided (lora/layers)."""
        text = self.text
        hidden, inner = text["hidden_size"], text.get("intermediate_size") or 0
        heads = text["num_attention_heads"]
        head = text.get("head_dim") or hidden // heads
        keys = (text.get("num_key_value_heads") or heads) * head
        shapes = [(hidden, heads * head), (hidden, keys), (hidden, keys), (heads * head, hidden)]
        shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
        each = sum(given + made // self.tensor_parallel for given, made in shapes)
        return self.lora_rank * each * WIDTH * text["num_hidden_layers"]

    def _body(self, tokens: int) -> int:
        """What a layer holds at most of so many tokens."""
        text = self.text
        hidden, inner = (
            text["hidden_size"],
            (text.get("intermediate_size") or 0) // self.tensor_parallel,
        )
        if experts := text.get("num_experts_per_tok") or 0:
            own = text.get("moe_intermediate_size") or text.get("intermediate_size") or 0
            return tokens * (experts * (max(2 * own, hidden) + own) + 3 * hidden) * WIDTH
        return tokens * (3 * inner + 3 * hidden) * WIDTH

    def non_torch_bytes(self) -> Range:
        """What lies beside PyTorch's allocator, with NCCL's buffers where GPUs share the model."""
        return (
            DIVIDED_NON_TORCH_BYTES
            if self.tensor_parallel > 1
            else (NON_TORCH_BYTES, NON_TORCH_BYTES)
        )

    def activations(self) -> int:
        """The most that the profile run allocates: a layer on all tokens, or the logits of a token for each request.

        A gated layer holds three tensors of its inner size and three of its hidden size (live bytes of vLLM's own
        forward pass on ``meta``: 2.060 of 2.06 GiB, 2.987 of 2.99). A mixture of experts has a copy of a token for
        each of its experts (fused_moe's two caches).
        """
        numbers = min(self.requests, self.tokens_at_once) * self.text["vocab_size"]
        return max(
            self._body(self.tokens_at_once), int(numbers * sampler_bytes_a_logit(self.version))
        )

    def graphs(self) -> int:
        """How many CUDA graphs it captures: piecewise ones for all sizes, whole ones for sizes up to ``requests``."""
        if not self.cuda_graphs:
            return 0
        most = self._largest_graph()
        sizes = [
            size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if size <= most
        ]
        return len(sizes) + sum(size <= self.requests for size in sizes)

    def _largest_graph(self) -> int:
        return min(2 * self.requests, 512, self.tokens_at_once)

    def kernels(self) -> int:
        """The most kernels of one graph."""
        layer = (
            _LAYER_KERNELS + _SLOT_KERNELS * (self.lora_rank > 0) + _PACKED_KERNELS * self.packed
        )
        layer += _DIVIDED_KERNELS * (self.tensor_parallel > 1)
        layer += _EXPERT_KERNELS if self.text.get("num_experts_per_tok") else 0
        return self.text["num_hidden_layers"] * layer + _OTHER_KERNELS

    def graph_bytes(self) -> Range:
        """What the graphs take, as a bracket: vLLM measures it at its start.

        All share one pool, which is as large as the largest needs. Beside it the driver keeps something of each kernel
        of each graph.
        """
        count = self.graphs()
        if not count:
            return 0, 0
        return (
            count * _GRAPH_LOW,
            _GRAPHS_ALONE + self._pool() + count * self.kernels() * _KERNEL_BYTES,
        )

    def _pool(self) -> int:
        return self._body(self._largest_graph())

    def believed_bytes(self) -> Range:
        """What vLLM puts aside for them before it makes its cache: the same measured on a few, the pool once a mode."""
        if not believes_in_graphs(self.version) or not self.graphs():
            return 0, 0
        return 0, self.graph_bytes()[1] + self._pool()

    def cache(self) -> KvCache:
        """How its cache is made up."""
        numbers = CACHE_BYTES[self.cache_dtype]
        layers = layers_of(self.model, number_bytes=numbers, tensor_parallel=self.tensor_parallel)
        return kv_cache(layers, self.block_tokens)

    def cache_bytes(self) -> Range:
        """What is left for keys and values, in whole blocks; below 0 where so much is missing."""
        known = self.budget_bytes - self.weights() - self.activations()
        besides = zip(self.believed_bytes(), self.non_torch_bytes(), strict=True)
        most, least = (known - believed - non_torch for believed, non_torch in besides)
        block = self.cache().block_bytes
        return tuple(size if size < 0 else size // block * block for size in (least, most))

    def request_bytes(self, tokens: int) -> int:
        """What a request of so many tokens takes of the cache at most."""
        cache = self.cache()
        return cache.blocks_of_request(tokens, self.tokens_at_once) * cache.block_bytes

    def least_budget_bytes(self) -> int:
        """The budget with which a request of ``longest`` tokens fits for sure, and the null block."""
        needed = self.request_bytes(self.longest) + self.cache().block_bytes
        return (
            self.weights()
            + self.activations()
            + self.non_torch_bytes()[1]
            + self.believed_bytes()[1]
            + needed
        )

    def concurrent(self, tokens: int) -> Range:
        """How many requests of so many tokens run at once."""
        cache = self.cache()
        each = cache.blocks_of_request(tokens, self.tokens_at_once)
        return tuple(
            min(max(cache.blocks(size) - 1, 0) // each, self.requests)
            for size in self.cache_bytes()
        )


def nf4_bytes(model: Mapping[str, Any], parameters: int) -> int:
    """Weights that vLLM packs with bitsandbytes while it loads: 4 bits and a fp32 scale for 64 numbers.

    ``model_loader/bitsandbytes_loader.py`` of 0.10 to 0.27: scales of scales are unpacked again. Embeddings and the
    head stay in 16 bits.
    """
    text = model.get("text_config") or model
    tables = (
        text["vocab_size"] * text["hidden_size"] * (1 if text.get("tie_word_embeddings") else 2)
    )
    packed = parameters - tables
    return packed // 2 + packed // 64 * 4 + tables * WIDTH


def merging_bytes(model: Mapping[str, Any]) -> int:
    """What adapters take while they are merged for the server: a layer's product and its scaled copy, in fp32.

    ``peft/tuners/lora/layer.py``: one layer after the other, of which the largest counts.
    """
    text = model.get("text_config") or model
    return (
        2 * 4 * text["hidden_size"] * max(text.get("intermediate_size") or 0, text["hidden_size"])
    )
