"""The disk that each stage of a run needs, by numbers of parameters. Standard library only: the rules call this.

Weights decide: the base's, the adapter's with its checkpoints, the merged model's. What lies beside them is some MB.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.text import gib, size_text
from dryfit.scenario.optimizers import OPTIMIZERS
from scripts.common.resource_table import Stage, judged, refused, table

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number
Q8_0 = 34 / 32  # bytes of a number in blocks of 32 with a scale of 16 bits: gguf.GGML_QUANT_SIZES
# Tokenizer and licence beside the base and beside the merged model; answers, reports, figures and documents. Of a run
# with the default model: 3.5 and 5.3 MB; one with a larger vocabulary or test split has some MB more.
COMPANIONS_BYTES, DOCUMENTS_BYTES = 3_600_000, 5_400_000
STAGES = ("base model", "training", "merged model", "evaluation and documents", "export")
# Which rule writes which.
RULES = dict(
    zip(
        ("fetch_weights", "train_adapter", "merge_adapter", "evaluate_tuned", "export_gguf"),
        STAGES,
        strict=True,
    )
)


@dataclass(frozen=True)
class ParameterCounts:
    """What decides how much is written: numbers of parameters, and bytes of a number.

    ``trainable`` may be 0 where it is not known yet; then the training's share is left out.
    """

    parameters: int
    trainable: int
    base_width: int
    merged_width: int
    adapter_width: int
    optimizer: str
    state_width: int  # of a number of an optimizer state, where the optimizer leaves it open

    @classmethod
    def of(
        cls, step: Mapping[str, Any], base: str, merged: str, parameters: int, trainable: int
    ) -> ParameterCounts:
        """Of a training step as a scenario's mapping, and of the dtypes of the base's and the merged weights."""
        int8 = (step.get("quantization") or {}).get(
            "type"
        ) == "int8"  # PEFT leaves adapters of such a base in fp32
        wide = step["adapter_precision"] == "fp32" or step["precision"].startswith("fp32")
        own = 4 if wide or (int8 and step["adapter_precision"] == "base") else 2
        states = 4 if step.get("optimizer_state_precision") == "fp32" else own
        return cls(
            parameters, trainable, WIDTHS[base], WIDTHS[merged], own, step["optimizer"], states
        )


def written(sizes: ParameterCounts, exports: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Bytes of each stage that stay, and the most that it needs while it runs.

    Training writes each checkpoint beside the one before, and removes the last when the adapter and its copy in
    ``kept/`` are there. A checkpoint holds the adapter, its optimizer's states, and the best adapter so far, which
    ``training.keep: last`` leaves out.

    ``exports``: types of the GGUF files that are asked for: f32, f16, bf16, q8_0.
    """
    adapter = sizes.trainable * sizes.adapter_width
    # Adafactor, Muon and GaLore are counted with AdamW's two states: mostly they keep less.
    states = OPTIMIZERS[sizes.optimizer].state_bytes(sizes.state_width)
    checkpoint = 2 * adapter + int(sizes.trainable * states)
    merged = sizes.parameters * sizes.merged_width + COMPANIONS_BYTES
    types = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": Q8_0}
    export = int(sum(sizes.parameters * types[kind] for kind in exports))
    base = sizes.parameters * sizes.base_width
    written_bytes = {
        "base model": (base, base),
        "training": (2 * adapter, max(2 * checkpoint, checkpoint + 2 * adapter)),
        "merged model": (merged, merged),
        "evaluation and documents": (DOCUMENTS_BYTES, DOCUMENTS_BYTES),
    }
    return written_bytes | ({"export": (export, export)} if exports else {})


def free_bytes(folder: str | os.PathLike) -> int:
    """What a user may still write where a folder is, or will be."""
    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def stages(
    sizes: ParameterCounts, free: int, there: Sequence[str] = (), exports: Sequence[str] = ()
) -> list[Stage]:
    """Each stage against what the stages before it leave of the disk.

    ``there`` names stages whose files are on the disk already.
    """
    rows = []
    for name, (kept, peak) in written(sizes, exports).items():
        if name in there:
            rows.append(judged(name, "disk", 0, free, "computed", "on the disk already"))
            continue
        change = None
        if peak > free:
            change = f"free {gib(peak - free)}, or another disk: snakemake --directory"
            if name in ("merged model", "export") and sizes.merged_width == 4 and peak // 2 <= free:
                change = "merging: {dtype: bfloat16}"
        rows.append(
            judged(
                name,
                "disk",
                peak,
                max(0, free),
                "computed",
                f"{size_text(kept)} of it stay",
                change=change,
            )
        )
        free -= kept
    return rows


class Planned(NamedTuple):
    """What is about to be written: the stages of one run (or of a base model that runs share), and their sizes."""

    name: str
    sizes: ParameterCounts
    stages: Collection[str]
    exports: Sequence[str] = ()


def refuse_full(planned: Iterable[Planned], folder: str | os.PathLike = "results") -> None:
    """Refuse, before any job, what the disk can't hold.

    UserError: with the stages that are planned, each against what those before it leave.
    """
    free = left = free_bytes(folder)
    lacking = 0
    rows: list[Stage] = []
    for one in planned:
        there = [name for name in STAGES if name not in one.stages]
        stage_rows = stages(one.sizes, left, there, one.exports)
        rows += [
            replace(row, stage=f"{row.stage} of {one.name}")
            for row in stage_rows
            if row.stage in one.stages
        ]
        for name, (kept, peak) in written(one.sizes, one.exports).items():
            if name in one.stages:
                lacking = max(lacking, peak - left)
                left -= kept
    if lacking > 0:
        raise UserError(
            "The disk is too small for what is planned, and no job was started:\n    "
            + "\n    ".join(table(rows)),
            where=Path(folder).resolve(),
            found=f"{gib(free)} free",
            allowed=f"{gib(lacking)} more, another disk (snakemake --directory), or memory.gate.override: true,"
            " which starts all the same",
            write=next(
                (row.change for row in refused(rows) if row.change.startswith("merging")), None
            ),
        )
