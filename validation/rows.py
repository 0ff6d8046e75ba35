"""The training steps that others ran, measured and published: what ran, and what it took.

Each source has a table in ``validation/data``; :func:`read` gives all of them one form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dryfit.common.files import read_json, read_yaml
from dryfit.common.text import MIB
from dryfit.scenario.scenario import Scenario
from validation.tables import FOLDER, rows_of

STAGES = (
    "resident",
    "forward",
    "backward",
    "optimizer",
    "allocated",
    "reserved",
)  # what may have been measured
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_COLUMNS = {  # of a table of the T4, by what was measured
    "resident": "resident_before_step_mib",
    "forward": "peak_forward_mib",
    "backward": "peak_backward_mib",
    "optimizer": "peak_optimizer_mib",
    "allocated": "peak_allocated_mib",
    "reserved": "peak_reserved_mib",
}
# What the model card of PowerLM-3b says beyond its sizes; that attention and MLP have biases is not published, and
# follows from its number of parameters.
_GRANITE = {
    "attention_bias": True,
    "mlp_bias": True,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 9.0,
}


@dataclass(frozen=True)
class PublishedSource:
    """Where rows come from.

    ``title``: for tables. ``file``: in ``validation/data``. ``sessions``: how the ids of its rows begin.
    ``developed_with``: whether something about the trace was found, or changed, on these rows. ``environment``: the
    file in ``envs`` with the versions that were measured. ``unread``: the report keeps what came out at the first try;
    ``changed``: what was changed after that.
    """

    title: str
    file: str
    sessions: tuple[str, ...]
    developed_with: str
    environment: str
    unread: bool = False
    changed: str = ""


SOURCES = {
    name: PublishedSource(**{**said, "sessions": tuple(said["sessions"])})
    for name, said in read_yaml(FOLDER / "sources.yaml").items()
}


@dataclass(frozen=True)
class MeasuredRow:
    """A step that somebody measured.

    Attributes
    ----------
    id, source, licence, gpu, model
        Its name here, where it was published, under which licence, on what it ran, and which model.
    scenario
        What of it a scenario says.
    program
        Whose loop ran it, a function of :mod:`validation.programs`.
    settings
        What that program needs beyond the scenario.
    measured_bytes
        By stage, see :data:`STAGES`.
    outcome
        ``ran`` or ``out of memory`` where that was the question; else None.
    """

    id: str
    source: str
    licence: str
    gpu: str
    model: str
    scenario: Scenario
    program: str
    measured_bytes: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    outcome: str | None = None

    @property
    def session(self) -> str:
        """How its id begins: rows of one session ran one after the other on one machine."""
        sessions = (session for source in SOURCES.values() for session in source.sessions)
        return next(session for session in sessions if self.id.startswith(f"{session}-"))


def read(source: str) -> list[MeasuredRow]:
    """All rows of a source."""
    path, sessions = FOLDER / SOURCES[source].file, SOURCES[source].sessions
    if path.suffix == ".json":
        return _peft(path)
    make = _TABLES.get(path.stem, _a100)
    return [
        make(row, path)
        for row in rows_of(path)
        if any(row["id"].startswith(f"{name}-") for name in sessions)
    ]


def _scenario(row: Mapping[str, str], path: Path, **more: Any) -> Scenario:
    """What a row of a table says in the words of a scenario; ``more`` of its fields."""
    model: dict[str, Any] = {name: int(row[name]) for name in _SIZES}
    model |= {
        "model_type": row["architecture"],
        "tie_word_embeddings": row["tie_word_embeddings"] == "True",
        "max_position_embeddings": 8192,  # at least every row's length; no tensor depends on it
    }
    if (
        row["architecture"] == "mistral"
    ):  # Mistral-7B-v0.1 has a window of 4,096, as long as the rows' texts
        model["sliding_window"] = None
    if row["architecture"] == "granite":
        model |= _GRANITE
    mapping: dict[str, Any] = {
        "model": model,
        "method": row["method"],
        "precision": DTYPES[row["base_dtype"]],
        "sequence_length": int(row["sequence_length"]),
        "micro_batch": int(row["micro_batch"]),
        "attention": "flash" if row["attention"] == "flash_attention_2" else row["attention"],
        "optimizer": "adamw",
    }
    if row["method"] != "full":
        mapping["adapter_precision"] = DTYPES[row["adapter_dtype"]]
        mapping["lora"] = {
            "rank": int(row["lora_rank"]),
            "dropout": float(row.get("lora_dropout") or 0),
            "target_modules": row["lora_targets"].split(),
        }
    if row["method"] == "qlora":
        mapping["quantization"] = {"type": "nf4", "double": row["quantization"] == "nf4-double"}
        if row.get("storage"):
            mapping["quantization"]["storage"] = row["storage"]
    if row.get("strategy"):
        mapping["parallel"] = {"strategy": row["strategy"], "gpus": int(row["gpus"])}
    return Scenario.from_mapping(mapping | more, where=f"{path.name}, row {row['id']}")


def _row(row: Mapping[str, str], **more: Any) -> MeasuredRow:
    return MeasuredRow(
        **{name: row[name] for name in ("id", "source", "licence", "gpu", "model")}, **more
    )


def _t4(row: Mapping[str, str], path: Path) -> MeasuredRow:
    """A run of fitcheck-llm's script. Measured columns end in ``_mib``; an empty cell was not measured."""
    return _row(
        row,
        scenario=_scenario(
            row,
            path,
            kbit_preparation=row["kbit_preparation"],
            gradient_checkpointing=row["gradient_checkpointing"] == "True",
            loop="manual",
        ),
        program="fitcheck",
        measured_bytes={
            stage: round(float(row[name]) * MIB) for stage, name in _COLUMNS.items() if row[name]
        },
        outcome=row.get("outcome"),
    )


def _a100(row: Mapping[str, str], path: Path) -> MeasuredRow:
    """A run of fms-acceleration's benchmark, on one GPU or several."""
    return _row(
        row,
        scenario=_scenario(
            row,
            path,
            autocast=DTYPES.get(row["autocast"]),
            gradient_checkpointing=row["gradient_checkpointing"],
            kbit_preparation=row["kbit_preparation"],
            loss=row["loss"],
        ),
        program="trainer",
        measured_bytes={"allocated": int(row["peak_allocated_bytes"])},
    )


def _torchtitan(row: Mapping[str, str], path: Path) -> MeasuredRow:
    """A run of torchtitan: what its program does stands in :mod:`validation.torchtitan`."""
    scenario = {
        "model": "llama-3.1-8b",
        "method": "full",
        "precision": "bf16-mixed",
        "attention": "flash",
        "sequence_length": int(row["sequence_length"]),
        "micro_batch": int(row["micro_batch"]),
        "parallel": {"strategy": "fsdp2", "gpus": int(row["gpus"])},
    }
    return _row(
        row,
        scenario=Scenario.from_mapping(scenario, where=f"{path.name}, row {row['id']}"),
        program="torchtitan",
        measured_bytes={"reserved": round(float(row["peak_reserved_gib"]) * 2**30)},
    )


# What tiny-gpt2 is: its dropout is GPT-2's.
_TINY_GPT2 = {
    "model_type": "gpt2",
    "n_embd": 2,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def _canifinetune(row: Mapping[str, str], path: Path) -> MeasuredRow:
    """A run of canifinetune's ``bench``; measured columns end in ``_gib``."""
    quantized = row["method"] == "qlora"
    checkpointing = row["gradient_checkpointing"] == "True"
    scenario: dict[str, Any] = {
        "model": row["configuration"] or _TINY_GPT2,
        "method": row["method"],
        "precision": "bf16",
        "lora": {"rank": int(row["lora_rank"]), "target_modules": row["lora_targets"].split()},
        "kbit_preparation": "peft" if quantized else "none",
        "sequence_length": int(row["sequence_length"]),
        "micro_batch": int(row["micro_batch"]),
        "gradient_checkpointing": checkpointing,
        "use_cache": not checkpointing,  # the model's default, which checkpointing turns off
        "optimizer": "paged_adamw_8bit",
        "loop": "manual",
        "keeps_outputs": True,
        "platform": "windows",
    }
    if quantized:
        scenario["quantization"] = {"type": "nf4", "double": row["quantization"] == "nf4-double"}
    columns = {
        "resident": "resident_gib",
        "allocated": "peak_allocated_gib",
        "reserved": "peak_reserved_gib",
    }
    return _row(
        row,
        scenario=Scenario.from_mapping(scenario, where=f"{path.name}, row {row['id']}"),
        program="canifinetune",
        settings={"steps": int(row["steps"])},
        measured_bytes={stage: round(float(row[name]) * 2**30) for stage, name in columns.items()},
    )


_TABLES = {"public": _t4, "held-out": _t4, "torchtitan": _torchtitan, "canifinetune": _canifinetune}


def _peft(path: Path) -> list[MeasuredRow]:
    """Runs of peft's comparison of methods: one model, one data set; ``scenario``: what a row has otherwise."""
    table = read_json(path)
    common = {
        "model": {key: value for key, value in table["model"].items() if key != "name"},
        "precision": "bf16",
        "sequence_length": table["sequence_length"],
        "previous_sequence_length": table["previous_sequence_length"],
        "micro_batch": table["micro_batch"],
        "attention_mask": "padding",
        "use_cache": True,
        "gradient_checkpointing": False,
        "loop": "manual",
    }

    def scenario(row: Mapping[str, Any]) -> Scenario:
        method = (
            {"method": "lora", "adapter": row["adapter"]} if row["adapter"] else {"method": "full"}
        )
        return Scenario.from_mapping(
            common | method | row.get("scenario", {}), where=f"{path.name}, row {row['id']}"
        )

    return [
        MeasuredRow(
            id=row["id"],
            source=f"{table['source'].split(',')[0]}{row['file']}",
            licence=table["licence"],
            gpu=table["gpu"],
            model=table["model"]["name"],
            scenario=scenario(row),
            program="peft_comparison",
            settings={
                name: row[name]
                for name in ("optimizer", "optimizer_options", "trainable_parameters")
            },
            measured_bytes={"reserved": row["peak_reserved_bytes"]},
        )
        for row in table["rows"]
    ]
