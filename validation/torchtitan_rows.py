"""Every row of torchtitan's pages that gives a peak of memory: traced, and which of them stayed unread until the end.

    python -m validation.torchtitan_rows --draw               which rows were drawn to stay unread
    python -m validation.torchtitan_rows --trace NAME ...     trace rows, and keep what came out
    python -m validation.torchtitan_rows --table              all traced rows

The rows are all of torchtitan's own pages at commit b5bcd76 that give a peak of memory. Five of them had been read
before the draw and belong to the other half. Of each group, half of the rest was drawn, rounded up, before a row was
traced. ``validation/data/torchtitan_rows.csv`` keeps the traces and the published figures. Tracing needs
the extra `run` (Linux) and torchao.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dryfit.common.files import write_text
from dryfit.common.terminal import command
from validation.rows import FOLDER

TABLE = FOLDER / "torchtitan_rows.csv"
SEED = 38
DECEMBER = "benchmarks/llama3_h100_202412_torchtitan.md"
JUNE = "benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md"
MXFP8 = "torchtitan/components/quantization/mxfp8.md"
NVFP4 = "torchtitan/components/quantization/nvfp4.md"
OPEN = ("table1-fsdp", "table1-compile", "table3-fsdp", "table3-compile", "table4-2d")  # read before the draw


class Row(NamedTuple):
    """A published row: its page and line there, what it is, and how it is traced; ``why_not``: why it is not."""

    page: str
    line: int
    what: str
    settings: dict[str, Any] | None = None
    why_not: str = ""


def _eight(gpus: int, **more: Any) -> dict[str, Any]:
    return {"llama": "8B", "rows": 2, "shard": gpus, "selective": True, **more}


def _context(parts: int) -> dict[str, Any]:
    divided = {"shard": 8 // parts, "context": parts, "tokens": 32768 * parts}
    return {"llama": "8B", "rows": 1, **divided, **_FULL}


def _large(parts: int = 1, **more: Any) -> dict[str, Any]:
    divided = {"shard": 8 // parts, "context": parts, "tensor": 8, "pipeline": 8}
    return {"llama": "405B", **divided, **_FULL, **more}


_FULL = {"compiled": True, "float8": True}
_LATER = {"compiled": True, "compiled_loss": True}
_SCRIPT = {"rows": 1, "expandable": True}  # torchao's benchmark starts torchtitan's run_train.sh, which sets it
_FORMAT = "products in {} of Blackwell, which are not modelled"
_PROGRAM = "torchtitan's program of 2026, with its loss in chunks{}, is not written here"
GROUPS = {
    "8B, FSDP": {
        "table1-fsdp": Row(DECEMBER, 27, "8B, 8 GPUs, FSDP", _eight(8)),
        "table1-compile": Row(DECEMBER, 28, "8B, 8 GPUs, FSDP, compiled", _eight(8, compiled=True)),
        "table1-float8": Row(DECEMBER, 29, "8B, 8 GPUs, FSDP, compiled, float8", _eight(8, **_FULL)),
        "table3-fsdp": Row(DECEMBER, 44, "8B, 128 GPUs, FSDP", _eight(128)),
        "table3-compile": Row(DECEMBER, 45, "8B, 128 GPUs, FSDP, compiled", _eight(128, compiled=True)),
        "table3-float8": Row(DECEMBER, 46, "8B, 128 GPUs, FSDP, compiled, float8", _eight(128, **_FULL)),
    },
    "8B, context": {
        f"table2-cp{parts}": Row(DECEMBER, line, f"8B, 8 GPUs, context {parts}, {32 * parts}k tokens", _context(parts))
        for line, parts in zip(range(35, 39), (1, 2, 4, 8), strict=True)
    },
    "70B, 2D": {
        "table4-2d": Row(DECEMBER, 52, "70B, FSDP 32 x tensor 8",
                         {"llama": "70B", "rows": 16, "shard": 32, "tensor": 8, **_FULL}),
        "table4-async": Row(DECEMBER, 53, "the same, asynchronous tensor parallel",
                            {"llama": "70B", "rows": 16, "shard": 32, "tensor": 8, **_FULL}),
    },
    "405B, 3D": {
        "table5-1f1b": Row(DECEMBER, 59, "405B, FSDP 8 x tensor 8 x pipeline 8, 1F1B", _large(rows=32)),
        "table5-interleaved": Row(DECEMBER, 60, "the same, interleaved", _large(rows=32, interleaved=True)),
    },
    "405B, 4D": {
        f"table6-cp{parts}": Row(DECEMBER, line, f"405B, tensor 8 x pipeline 8, context {parts}, {32 * parts}k tokens",
                                 _large(parts, rows=8, tokens=32768 * parts))
        for line, parts in zip(range(66, 70), (1, 2, 4, 8), strict=True)
    },
    "8B, H200": {
        f"h200-{gpus}": Row(JUNE, line, f"8B, {gpus} H200, FSDP, compiled, float8",
                            _eight(gpus, float8=True, **_LATER))
        for line, gpus in ((46, 32), (47, 64))
    },
    "8B, B200": {
        "b200-bf16": Row(MXFP8, 161, "8B, 8 B200, FSDP, compiled", _eight(8, **_LATER) | _SCRIPT),
        "b200-mxfp8": Row(MXFP8, 162, "8B, 8 B200, mxfp8", None, _FORMAT.format("mxfp8")),
        "b200-mxfp8-rceil": Row(MXFP8, 163, "8B, 8 B200, mxfp8", None, _FORMAT.format("mxfp8")),
        "b200-float8": Row(MXFP8, 164, "8B, 8 B200, FSDP, compiled, float8",
                           _eight(8, float8=True, **_LATER) | _SCRIPT),
    },
    "Llama 3 8B, NVFP4": {
        "llama-nvfp4": Row(NVFP4, 83, "8B, 4 B200, NVFP4", None, _FORMAT.format("NVFP4")),
        "llama-mxfp8": Row(NVFP4, 84, "8B, 4 B200, mxfp8", None, _FORMAT.format("mxfp8")),
        "llama-bf16": Row(NVFP4, 85, "8B, 4 B200, compiled", None, _PROGRAM.format("")),
    },
    "Qwen3 8B, NVFP4": {
        "qwen-nvfp4": Row(NVFP4, 105, "Qwen3 8B, 4 B200, NVFP4", None, _FORMAT.format("NVFP4")),
        "qwen-mxfp8": Row(NVFP4, 106, "Qwen3 8B, 4 B200, mxfp8", None, _FORMAT.format("mxfp8")),
        "qwen-bf16": Row(NVFP4, 107, "Qwen3 8B, 4 B200, compiled", None, _PROGRAM.format(" and its Qwen3")),
    },
}  # fmt: skip
ROWS = {name: row for group in GROUPS.values() for name, row in group.items()}


def drawn() -> list[str]:
    """The rows whose figures nobody read before the trace was finished."""
    draw, unread = random.Random(SEED), []
    for rows in GROUPS.values():
        rest = sorted(set(rows).difference(OPEN))
        unread += sorted(draw.sample(rest, -(-len(rest) // 2)))
    return unread


class Traced(NamedTuple):
    """A row's trace: of a pipeline, of the GPU of one stage. Figures in GiB; ``published`` "" while unread."""

    id: str
    half: str
    place: str
    allocated_gib: str
    reserved_gib: str
    published_gib: str

    @property
    def error_percent(self) -> float | None:
        """Of reserved memory, which torchtitan's logs show."""
        return 100 * (float(self.reserved_gib) / float(self.published_gib) - 1) if self.published_gib else None


def read() -> list[Traced]:
    """The kept traces, in the order of the file."""
    with open(TABLE, encoding="utf-8", newline="") as handle:
        return [Traced(**row) for row in csv.DictReader(handle)]


def highest(traces: Iterable[Traced]) -> Iterator[Traced]:
    """Of each row the GPU that reserves most: torchtitan publishes the maximum."""
    found: dict[str, Traced] = {}
    for one in traces:
        if one.id not in found or float(one.reserved_gib) > float(found[one.id].reserved_gib):
            found[one.id] = one
    yield from (found[name] for name in ROWS if name in found)


def _trace(name: str, place: int) -> Traced:
    from validation.torchtitan import Training, trace
    from validation.torchtitan_llama import LLAMAS

    settings = dict(ROWS[name].settings or {})
    report = trace(Training(LLAMAS[settings.pop("llama")], **settings), place)
    sizes = (f"{size / 2**30:.2f}" for size in (report.peak_allocated_bytes, report.peak_reserved_bytes))
    return Traced(name, "unread" if name in drawn() else "read", str(place), *sizes, "")


def places(name: str) -> tuple[int, ...]:
    """The stages to trace: the first holds most micro-batches, the second a layer more, the last the scores."""
    length = (ROWS[name].settings or {}).get("pipeline", 1)
    return (0,) if length == 1 else (0, 1, length - 1)


def _keep(traced: Traced) -> None:
    kept = {(one.id, one.place): one for one in (read() if TABLE.exists() else [])}
    before = kept.get((traced.id, traced.place))
    kept[traced.id, traced.place] = traced._replace(published_gib=before.published_gib if before else "")
    order = list(ROWS)
    rows = sorted(kept.values(), key=lambda one: (order.index(one.id), int(one.place)))
    lines = [",".join(Traced._fields), *(",".join(row) for row in rows)]
    write_text(TABLE, "\n".join(lines) + "\n")


def table(traces: list[Traced]) -> str:
    """Each row with both figures, and each half's median and worst, as Markdown."""
    lines = ["| row | | published | reserved | allocated | difference |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    errors: dict[str, list[float]] = {}
    for one in highest(traces):
        error = one.error_percent
        if error is not None:
            errors.setdefault(one.half, []).append(abs(error))
        difference = "" if error is None else f"{error:+.1f} %"
        lines.append(
            f"| {one.id}{', unread' if one.half == 'unread' else ''} | {ROWS[one.id].what} |"
            f" {one.published_gib} | {one.reserved_gib} | {one.allocated_gib} | {difference} |"
        )
    for half, found in errors.items():
        lines += ["", f"{half}: {len(found)} rows, median {statistics.median(found):.1f} %, worst {max(found):.1f} %"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw, trace or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="print which rows stayed unread")
    parser.add_argument("--trace", nargs="+", metavar="NAME", choices=[name for name in ROWS if ROWS[name].settings])
    parser.add_argument("--table", action="store_true", help="print the rows that are kept")
    asked = parser.parse_args()
    if asked.draw:
        print(*drawn(), sep="\n")
    for name in asked.trace or ():
        for place in places(name):
            _keep(_trace(name, place))
            print(name, place, flush=True)
    if asked.table:
        print(table(read()))


if __name__ == "__main__":
    command(main)
