"""Which kernels a GPU's compute capability decides in a step: GPUs that run the same ones share what was traced."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from dryfit.analytic.setting import Setting, described
from dryfit.engine.cuda_rules import (
    DEFAULT_CAPABILITY,
    Capability,
    cublas_workspace_bytes,
    efficient_workspace_bytes,
)
from dryfit.scenario.fields import CHUNK_TOKENS
from dryfit.scenario.scenario import Scenario

UNEVEN = 4001  # a length that no block of a kernel divides
LONGEST = 2**20  # of models that don't say how long a sequence may be


def kernels_of(scenario: Scenario, capability: Capability | None) -> tuple[Any, ...]:
    """What of a step a GPU's compute capability decides, at any length and number of rows.

    The first entry is the workspace of cuBLAS in bytes; attention's kernels and their workspaces follow.

    NotDescribed: for what the estimate does not describe.
    """
    decoder, capability = described(scenario), capability or DEFAULT_CAPABILITY
    longest = scenario.size("max_position_embeddings") or LONGEST
    kernels: list[Any] = [cublas_workspace_bytes(capability)]
    for length, rows in _sizes(scenario, decoder.window, longest):
        setting = Setting(
            decoder, replace(scenario, sequence_length=length, micro_batch=rows), capability
        )
        for width in (2, 4):
            kernel, dtype = setting.attention_kernel(width), setting.attention_dtype(width)
            kernels.append(kernel)
            if kernel == "mem_efficient":
                kernels += [
                    efficient_workspace_bytes(n, n, decoder.sizes["d"], dtype, capability)
                    for n in (64, 128)
                ]
    return tuple(kernels)


def _sizes(scenario: Scenario, window: int, longest: int) -> Iterator[tuple[int, int]]:
    """A length and rows on each side of where a step's structure changes: attention's window, one row, a loss's chunks.

    More than 3,072 tokens, if possible, so that an embedding's gradient is computed as in large steps.
    """
    lengths = [min(longest - 1, UNEVEN, window - 1 if window else longest)]
    if 0 < window <= longest:
        lengths.append(max(window, min(longest, window + 97)))
    row_counts = [1, 2] if scenario.attention == "eager" else [1]
    targets = [0, CHUNK_TOKENS + 1] if scenario.loss == "chunked" else [0]
    for length, from_rows, from_targets in product(lengths, row_counts, targets):
        rows = 1 if row_counts == [1, 2] and from_rows == 1 else max(2, -(-4096 // length))
        if scenario.loss == "chunked" and not from_targets:
            length = min(length, CHUNK_TOKENS // rows - 1)
        yield length, rows
