"""The table of measured steps: a row for each, with what decides its memory and its time, and the predictions' errors.

``data/measured_steps.csv`` holds what others published; ``python -m validation.evidence`` makes it of the tables in
``validation/data``. Rows of your own machine stand in a file of the same form beside it (:func:`own_table`).
"""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.files import atomic_open
from dryfit.data import data_path
from dryfit.scenario.description import say_way
from dryfit.scenario.model import EXPERT_COUNTS
from dryfit.scenario.scenario import Scenario

PUBLISHED = data_path("measured_steps.csv")
UNREAD, READ, FITTED = (
    "unread",
    "read",
    "fitted",
)  # how much a row was looked at while the predictions were made
# Families whose layers are not attention alone, by `model_type` in transformers, and keys that others of them have.
_HYBRID = (
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "zamba",
    "zamba2",
)
_HYBRID_KEYS = (
    "linear_num_value_heads",
    "linear_attn_config",
    "mamba_d_state",
    "mamba_num_heads",
    "conv_L_cache",
    "block_types",
    "hybrid_override_pattern",
)
_EXPERTS = (*EXPERT_COUNTS, "moe_num_experts")


class Kinds(NamedTuple):
    """What two steps must have in common so that one says something about the other, in words; "": not known.

    The order is that in which differences are looked for: what changes most comes first.
    """

    method: str  # full, lora, qlora; another kind of adapters or of packed weights by its name
    layers: str  # attention, hybrid kinds, a diffusion model, an encoder; with experts or images
    objective: str  # sft, dpo, ...
    program: str  # a Trainer, a loop of one's own, or a program whose model is not transformers'
    compiled: str  # no, layers, model
    parallel: str  # one GPU; the strategy, the mesh and the number of GPUs
    capability: str  # compute capability of the GPU, which decides the kernels; not CUDA
    platform: str  # linux, windows
    kernels: str  # whose: transformers, packages, liger, unsloth
    preparation: str  # of a quantized base: none, peft, trl
    precision: str  # of the weights, and whether autocast computes over them
    optimizer: str
    attention: str  # eager, fused
    checkpointing: str  # yes, no
    loss: str  # full, chunked, liger
    rows: str  # apart, padded, packed: a mask takes another attention kernel
    offload: str  # none; what lies in the CPU's memory


def kinds_of(scenario: Scenario, capability: tuple[int, int] | None) -> Kinds:
    """The kinds of a scenario's step on a GPU of a compute capability; None: no GPU is named, or a size alone."""
    parallel = scenario.parallel
    offloaded = [
        parallel.offload,
        scenario.experts.offload,
        "activations" if scenario.activation_offload else "none",
    ]
    return Kinds(
        method=_method(scenario),
        layers=layers_of(scenario.model) + (" and images" if scenario.images else ""),
        objective=scenario.objective,
        program="a Trainer" if scenario.loop == "trainer" else "a loop of its own",
        compiled={"none": "no"}.get(scenario.compile, scenario.compile),
        parallel="one GPU"
        if parallel.gpus == 1
        else f"{say_way(asdict(parallel))} on {parallel.gpus} GPUs",
        capability=f"{capability[0]}.{capability[1]}" if capability else "",
        platform=scenario.platform,
        kernels=scenario.kernels,
        preparation=scenario.kbit_preparation,
        precision=", ".join(_precision(scenario)),
        optimizer="adamw" if scenario.optimizer == "adamw_fused" else scenario.optimizer,
        attention="eager" if scenario.attention == "eager" else "fused",
        checkpointing="yes" if scenario.gradient_checkpointing else "no",
        loss=scenario.loss,
        rows="packed"
        if scenario.packing != "none"
        else "padded"
        if scenario.attention_mask == "padding"
        else "apart",
        offload=" and ".join(word for word in offloaded if word != "none") or "none",
    )


def _precision(scenario: Scenario) -> Iterator[str]:
    yield scenario.precision + (" under autocast" if scenario.autocast else "")
    for name in ("float8", "qat"):
        if (value := getattr(scenario, name)) not in (None, "none", False):
            yield f"{name} {value}"
    if scenario.experts.quantized != "none":
        yield f"experts in {scenario.experts.quantized}"


def layers_of(model: Mapping[str, Any]) -> str:
    """What a decoder's layers are made of, by its configuration."""
    if model.get("model_type") in _HYBRID or any(model.get(key) for key in _HYBRID_KEYS):
        return "hybrid kinds"
    return (
        "attention and experts"
        if any((model.get(key) or 0) > 1 for key in _EXPERTS)
        else "attention"
    )


def _method(scenario: Scenario) -> str:
    if scenario.method == "full":
        return "full"
    adapter = scenario.adapter or {}
    kind = str(adapter.get("peft_type") or "lora").lower()
    kind = "dora" if kind == "lora" and adapter.get("use_dora") else kind
    if scenario.method == "lora":
        return kind
    packed = "" if scenario.quantization.type == "nf4" else f" {scenario.quantization.type}"
    if (
        scenario.parallel.gpus > 1 and scenario.quantization.storage != "uint8"
    ):  # which sharding can divide
        packed += f" stored as {scenario.quantization.storage}"
    return f"qlora{packed}" + ("" if kind == "lora" else f" {kind}")


@dataclass(frozen=True)
class MeasuredStep:
    """A step that somebody measured.

    Attributes
    ----------
    card, kinds, model, micro_batch, sequence_length
        On what it ran (a name of gpus.yaml), and what ran; sizes of one GPU. A length of 0 is not published.
    """

    # Its name, and where it was published
    id: str
    source: str
    card: str
    kinds: Kinds
    model: str
    parameters: float | None  # of the model, in millions; None: not known
    micro_batch: int
    sequence_length: int
    # Versions that were measured; "" where they are not published
    torch: str = ""
    transformers: str = ""
    peft: str = ""
    bitsandbytes: str = ""
    # ``max_memory_allocated``, ``max_memory_reserved`` and the time of a step; None: not measured
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    step_seconds: float | None = None
    # How far the trace's figures and the analytic estimate's peak were off, as shares: -0.02 is 2 % too low
    allocated_error: float | None = None
    reserved_error: float | None = None
    time_error: float | None = None
    form_error: float | None = None
    # ``unread``: the prediction stood before anybody looked at the row; ``read``; ``fitted``: a rule or a figure comes
    # from the row. "" where there is no prediction.
    memory_known: str = ""
    time_known: str = ""

    def cells(self) -> dict[str, str]:
        """The row of the table."""
        values = {name: value for name, value in asdict(self).items() if name != "kinds"}
        shown = {
            name: ""
            if value is None
            else f"{value:.6g}"
            if isinstance(value, float)
            else str(value)
            for name, value in values.items()
        }
        return shown | self.kinds._asdict()


COLUMNS = tuple(
    column
    for field in fields(MeasuredStep)
    for column in (Kinds._fields if field.name == "kinds" else (field.name,))
)
_WHOLE = ("micro_batch", "sequence_length", "allocated_bytes", "reserved_bytes")
_SHARES = (
    "parameters",
    "step_seconds",
    "allocated_error",
    "reserved_error",
    "time_error",
    "form_error",
)


def own_table() -> Path:
    """Where rows of your own machine are kept: ``DRYFIT_MEASURED``, or a file in your data folder."""
    if named := os.environ.get("DRYFIT_MEASURED"):
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "dryfit" / "measured_steps.csv"


@cache
def published() -> tuple[MeasuredStep, ...]:
    """The rows that are installed with the library."""
    return tuple(read(PUBLISHED))


def measured_steps() -> list[MeasuredStep]:
    """Every row that is known here: the published ones, then your own."""
    own = own_table()
    return [*published(), *(read(own) if own.is_file() else ())]


def read(path: Path) -> list[MeasuredStep]:
    """The rows of a table.

    UserError: if it is not such a table, with the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise UserError(
                "The file is not a table of measured steps of this version.",
                where=str(path),
                found=", ".join(table.fieldnames or ())[:80],
                allowed=", ".join(COLUMNS),
                write="move it away; `dryfit measure` begins a new one",
            )
        return [_step(cells, f"{path}, line {number}") for number, cells in enumerate(table, 2)]


def _step(cells: Mapping[str, str], where: str) -> MeasuredStep:
    values: dict[str, Any] = {name: cells[name] for name in COLUMNS if name not in Kinds._fields}
    try:
        values |= {name: int(cells[name]) if cells[name] else None for name in _WHOLE}
        values |= {name: float(cells[name]) if cells[name] else None for name in _SHARES}
    except (TypeError, ValueError) as error:
        raise UserError(
            "A row of measured steps has a cell that is no number.", where=where, found=error
        ) from None
    return MeasuredStep(kinds=Kinds(**{name: cells[name] for name in Kinds._fields}), **values)


def write(path: Path, steps: Iterable[MeasuredStep]) -> None:
    """Write a table whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(step.cells() for step in steps)
