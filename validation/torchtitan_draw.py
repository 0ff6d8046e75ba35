"""Which of torchtitan's published rows stay unread until the end: drawn before the first of them was traced.

    python -m validation.torchtitan_draw      the names of the rows that were drawn

The rows are all of torchtitan's own pages at commit b5bcd76 that give a peak of memory. Five of them had been read
before the draw and belong to the other half. Of each group, half of the rest was drawn, rounded up, so that each kind
of step is in both halves where it can be.
"""

from __future__ import annotations

import random

from will_it_fit.common.terminal import command

SEED = 38
DECEMBER = "benchmarks/llama3_h100_202412_torchtitan.md"
JUNE = "benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md"
MXFP8 = "torchtitan/components/quantization/mxfp8.md"
NVFP4 = "torchtitan/components/quantization/nvfp4.md"
# By group: a row's name, its page and its line there.
ROWS = {
    "8B, FSDP": {
        "table1-fsdp": (DECEMBER, 27),
        "table1-compile": (DECEMBER, 28),
        "table1-float8": (DECEMBER, 29),
        "table3-fsdp": (DECEMBER, 44),
        "table3-compile": (DECEMBER, 45),
        "table3-float8": (DECEMBER, 46),
    },
    "8B, context": {
        "table2-cp1": (DECEMBER, 35),
        "table2-cp2": (DECEMBER, 36),
        "table2-cp4": (DECEMBER, 37),
        "table2-cp8": (DECEMBER, 38),
    },
    "70B, 2D": {"table4-2d": (DECEMBER, 52), "table4-async": (DECEMBER, 53)},
    "405B, 3D": {"table5-1f1b": (DECEMBER, 59), "table5-interleaved": (DECEMBER, 60)},
    "405B, 4D": {
        "table6-cp1": (DECEMBER, 66),
        "table6-cp2": (DECEMBER, 67),
        "table6-cp4": (DECEMBER, 68),
        "table6-cp8": (DECEMBER, 69),
    },
    "8B, H200": {"h200-32": (JUNE, 46), "h200-64": (JUNE, 47)},
    "8B, B200": {
        "b200-bf16": (MXFP8, 161),
        "b200-mxfp8": (MXFP8, 162),
        "b200-mxfp8-rceil": (MXFP8, 163),
        "b200-float8": (MXFP8, 164),
    },
    "Llama 3 8B, NVFP4": {"llama-nvfp4": (NVFP4, 83), "llama-mxfp8": (NVFP4, 84), "llama-bf16": (NVFP4, 85)},
    "Qwen3 8B, NVFP4": {"qwen-nvfp4": (NVFP4, 105), "qwen-mxfp8": (NVFP4, 106), "qwen-bf16": (NVFP4, 107)},
}
OPEN = ("table1-fsdp", "table1-compile", "table3-fsdp", "table3-compile", "table4-2d")  # read before the draw


def drawn() -> list[str]:
    """The rows whose figures nobody reads before the trace is finished."""
    draw, unread = random.Random(SEED), []
    for rows in ROWS.values():
        rest = sorted(set(rows).difference(OPEN))
        unread += sorted(draw.sample(rest, -(-len(rest) // 2)))
    return unread


def main() -> None:
    """Print what was drawn, and what the other half is."""
    unread = drawn()
    for group, rows in ROWS.items():
        print(f"{group}:", *(f"{name}{' (unread)' if name in unread else ''}" for name in rows))


if __name__ == "__main__":
    command(main)
