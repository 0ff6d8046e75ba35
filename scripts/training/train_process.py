"""One process of a training: build the model, run the loop, write the adapter, the curve and the report.

Rule ``train_adapter`` (:mod:`scripts.training.train`) calls :func:`train` for one GPU, and starts this module once for
each of several. All run the same loop on different rows of each step. What is saved is whole, and rank 0 writes it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dryfit.common.device import multiplies_bf16
from dryfit.common.files import (
    atomic_folder,
    read_folder,
    read_json,
    read_report,
    write_json,
    write_jsonl,
    write_report,
)
from dryfit.common.terminal import log
from dryfit.common.versions import versions
from dryfit.scenario.scenario import Scenario, rows_in_a_step
from scripts.common.job import keep_host_memory
from scripts.common.tokenizer import read_tokenizer
from scripts.training.initial_adapter import keep_start
from scripts.training.loop import Fit, Fitted, check_rows, plan_steps, token_shares
from scripts.training.loop_state import LoopState
from scripts.training.processes import ALONE, ProcessGroup, started
from scripts.training.tracking import Trackers
from scripts.training.trl_backend import TrlFit
from scripts.training.validation import ValidationRows

if TYPE_CHECKING:
    from dryfit.step.batches import Row


@dataclass(frozen=True)
class TrainingJob:
    """What a process is given, as JSON has it."""

    base: str  # folder of the model
    scenario: dict[str, Any]  # the step as a whole mapping, its model included
    loop: dict[str, Any]
    seed: int
    # The rule's, by name
    inputs: dict[str, str]
    outputs: dict[str, str]
    threads: int  # of this process
    device: str  # ``cpu`` or ``cuda``: the current one
    checkpoint: str  # folder of the run's state
    report_to: list[str] = field(default_factory=list)

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a training, and what they have in common."""

    rows: list[Row]
    held_out: list[Row]
    pad_token_id: int
    prefix: int  # tokens that all rows begin with
    shared: int  # tokens of the prefix that rows share in a pack

    @classmethod
    def read(cls, work: TrainingJob, scenario: Scenario) -> TrainingRows:
        """Read the encoded splits; refuse what can be known to go wrong later."""
        from dryfit.step.batches import read_rows
        from dryfit.step.packing import common_prefix

        tokenizer = read_tokenizer(Path(work.base))
        padding = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        rows, held_out = (read_rows(work.inputs[name]) for name in ("train", "validation"))
        held_out = held_out[: work.loop["validation_rows"]]
        prefix = common_prefix(rows)
        shared = prefix if scenario.packing == "shared_prefix" else 0
        check_rows(rows, held_out, scenario, work.loop, work.seed, shared)
        return cls(rows, held_out, padding, prefix, shared)


def train(work: TrainingJob, group: ProcessGroup = ALONE) -> None:
    """Train, in the one process or in one of several, and write the adapter, the curve and the report."""
    import torch

    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.packing_self_test import self_test

    scenario, loop, device = (
        Scenario.from_mapping(work.scenario, where="training"),
        work.loop,
        work.device,
    )
    description = read_folder(Path(work.base, "description.json"))
    predicted = read_report(work.inputs["gate"]) if "gate" in work.inputs else None
    _set_up(work)
    warn_of_slow_bf16(scenario, device)
    data = TrainingRows.read(work, scenario)
    curve_path, settings = Path(work.outputs["curve"]), {**work.loop, **plain_settings(scenario)}
    trackers = Trackers(work.report_to if group.rank == 0 else (), curve_path.parent, settings)
    _log_plan(work, scenario, data, group)
    began = time.monotonic()
    model, about = _model(work, scenario, base_name(description))
    start = keep_start(model, scenario, Path(work.checkpoint))
    if scenario.parallel.kind.replicates:
        _order_buckets(model, scenario, data, device)
    # Dropout draws other numbers in each process, but in those that compute the same rows together by a tensor plan.
    if draw := group.rank // scenario.parallel.tensor:
        torch.manual_seed(work.seed + draw)
    exactness = None
    if scenario.packing != "none":
        exactness = self_test(model, scenario, data.rows, data.shared, data.pad_token_id)
        log.info("packed rows against rows alone: %s", json.dumps(exactness, sort_keys=True))
    rates = {key: loop[key] for key in ("learning_rate", "weight_decay")}
    optimizer = build_optimizer(model, scenario, **rates, largest_steps=False)
    loaded = time.monotonic()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    state = LoopState(Path(work.checkpoint), group)
    kind = partial(TrlFit, base=Path(work.base)) if loop["backend"] == "trl" else Fit
    fit = kind(
        model,
        optimizer,
        data.rows,
        scenario,
        loop,
        work.seed,
        data.pad_token_id,
        state,
        data.shared,
        predicted,
        ValidationRows.of(data.held_out, scenario, data.pad_token_id),
    )
    fitted = fit.run(trackers.report)
    trackers.end()
    folder = Path(work.outputs["adapter"]).parent
    # Before anything that can fail: the checkpoint of the last step, and these.
    save_adapter(model, folder, base_name(description), group, start)
    if group.rank == 0:
        write_jsonl(curve_path, fitted.curve)
    peaks = group.collected(torch.cuda.max_memory_allocated() if device == "cuda" else None)
    if group.rank:
        return
    report = _report(work, scenario, data, fitted)
    report["times"]["load_wall_seconds"] = loaded - began
    report["packing"] = {
        "exactness": exactness,
        "kind": scenario.packing,
        "prefix_tokens": data.prefix,
    }
    report |= {
        **about,
        "base": {"source": description["source"]},
        "versions": versions(),
    }
    report["peak_allocated_bytes"] = (
        max(peaks) if device == "cuda" else None
    )  # of the GPU with most
    report["ranks"] = [
        {"rank": rank, "peak_allocated_bytes": peak} for rank, peak in enumerate(peaks)
    ]
    adapter = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    write_report(Path(work.outputs["report"]), report, *adapter, curve_path)


def plain_settings(scenario: Scenario) -> dict[str, Any]:
    """The step's settings without the model's configuration, as the report and trackers have them."""
    return {key: value for key, value in scenario.to_mapping().items() if key != "model"}


def _set_up(work: TrainingJob) -> None:
    """Let torch compute the same numbers in each run."""
    import torch

    torch.set_num_threads(work.threads)
    if work.device == "cpu":
        keep_host_memory()
    torch.use_deterministic_algorithms(True, warn_only=work.device == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # finds reads of it; here it is a twentieth of the time
    )
    torch.manual_seed(work.seed)


def warn_of_slow_bf16(scenario: Scenario, device: str) -> None:
    """Say that bf16 is slow on a CPU that does not multiply faster in it."""
    if device == "cpu" and scenario.compute_precision == "bf16" and not multiplies_bf16():
        log.warning(
            "This CPU has no fast bf16: steps take several times as long in it as in fp32. Write"
            " `training: {precision: auto}`, which computes in fp32 here."
        )


def _steps(work: TrainingJob, scenario: Scenario, data: TrainingRows) -> tuple[int, int]:
    rows_per_step = rows_in_a_step(scenario, work.loop)
    return plan_steps(len(data.rows), rows_per_step, work.loop["epochs"], work.loop["max_steps"])


def _log_plan(
    work: TrainingJob, scenario: Scenario, data: TrainingRows, group: ProcessGroup
) -> None:
    per_epoch, total = _steps(work, scenario, data)
    forms = {
        "none": "padded",
        "rows": "packed",
        "shared_prefix": f"packed behind {data.shared} shared tokens",
    }
    log.info(
        "%d rows per step, %s; %d rows make %d steps per epoch; %d steps; micro-batches of at most %d x %d tokens; %s, "
        "%d threads%s",
        *(
            rows_in_a_step(scenario, work.loop),
            forms[scenario.packing],
            len(data.rows),
            per_epoch,
            total,
        ),
        *(scenario.micro_batch, scenario.sequence_length, work.device, work.threads),
        f"; {group.size} processes, {scenario.parallel.strategy}" if group.size > 1 else "",
    )


def _model(work: TrainingJob, scenario: Scenario, name: str) -> tuple[Any, dict[str, Any]]:
    """The model on its device, sharded where it is; and what the report says of it."""
    import torch

    from dryfit.step.model import build_model
    from dryfit.step.parallel import parallelize, where_to_build
    from dryfit.step.quantized import assert_quantized

    model = build_model(
        scenario, where_to_build(scenario, work.device), weights=Path(work.base), seed=work.seed
    )
    quantized = assert_quantized(model, scenario)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        "%s: %d trainable parameters; %s", name, trainable, json.dumps(quantized, sort_keys=True)
    )
    place = "cpu" if work.device == "cpu" else f"cuda:{torch.cuda.current_device()}"
    return parallelize(model, scenario, place), {
        "quantized": quantized,
        "trainable_parameters": trainable,
    }


def _order_buckets(model: Any, scenario: Scenario, data: TrainingRows, device: str) -> None:
    """A backward pass for nothing, before the first step.

    DDP orders its buckets again after the first backward pass, and with them the sums of three or more GPUs round
    otherwise. So a resumed run has the order of one that was not killed.
    """
    import torch

    from dryfit.step.packing import collate_packs
    from dryfit.step.parallel import bare
    from dryfit.step.step import forward_backward

    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        packs = [[min(data.rows, key=lambda row: len(row.input_ids))]]
        batch = collate_packs(
            packs, scenario, data.shared, data.pad_token_id, bare(model).config, device
        )
        forward_backward(model, batch, scenario)
    model.zero_grad(set_to_none=True)


def _report(
    work: TrainingJob, scenario: Scenario, data: TrainingRows, fitted: Fitted
) -> dict[str, Any]:
    import torch

    from dryfit.step.batches import answer_tokens

    curve, stepping = fitted.curve, fitted.seconds - fitted.progress.seconds
    per_epoch, total = _steps(work, scenario, data)
    validated = [row for row in curve if "validation_loss" in row]
    kept = fitted.progress.best_step if work.loop["keep"] == "best" else len(curve)
    halved = [row for row in curve if row["micro_batch"] < scenario.micro_batch]
    totals = {
        key: sum(row[key] for row in curve)
        for key in ("answer_tokens", "computed_tokens", "rows", "tokens")
    }
    return {
        **{key: totals[key] for key in ("answer_tokens", "computed_tokens", "tokens")},
        "device": torch.cuda.get_device_name() if work.device == "cuda" else "cpu",
        "effective_batch": rows_in_a_step(scenario, work.loop),
        "epochs": len(curve) / per_epoch,
        "final_loss": sum(row["loss"] for row in curve[-10:]) / len(curve[-10:]),
        "first_loss": curve[0]["loss"],
        "kept_step": kept if kept < len(curve) else None,  # None: the last
        "loop": work.loop,
        "out_of_memory": {"micro_batch": halved[-1]["micro_batch"], "steps": len(halved)}
        if halved
        else None,
        "resumed_from_step": fitted.start or None,
        "scenario": plain_settings(scenario),
        "seed": work.seed,
        "steps": len(curve),
        "stopped_early": {"of_steps": total} if fitted.stopped_early else None,
        "times": {
            **{f"{key}_per_second": totals[key] / stepping for key in totals},
            "train_wall_seconds": stepping,
            "validation_wall_seconds": fitted.progress.seconds,
        },
        "threads": work.threads,
        "token_shares": token_shares(curve, data.prefix),
        "train_rows": len(data.rows),
        "validation_answer_tokens": answer_tokens(data.held_out),
        "validation_loss": next(row["validation_loss"] for row in validated if row["step"] == kept),
        "validations": len(validated),
        "validation_rows": len(data.held_out),
    }


def save_adapter(
    model: Any,
    folder: Path,
    base: str,
    group: ProcessGroup = ALONE,
    start: Path | None = None,
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, the same bytes for the same adapter.

    ``start``: the adapter as it started, where it was taken out of the base (:mod:`scripts.training.initial_adapter`).
    Called by all processes, which each hold a part of a sharded adapter; rank 0 writes it.
    """
    from dryfit.step.adapters import adapter_names
    from dryfit.step.parallel import bare, full_tensor

    model, tensors = bare(model), None
    if group.size > 1:
        # Of a model that transformers has divided PEFT would gather all that it is given, in rank 0 alone.
        saved = adapter_names(model) | {
            name for name, value in model.named_parameters() if value.requires_grad
        }
        tensors = {
            name: full_tensor(value) for name, value in model.state_dict().items() if name in saved
        }
    if group.rank:
        return
    with atomic_folder(folder.with_name(folder.name + ".new")) as partial:
        # PEFT splits the path into a folder and an adapter's name.
        converted = os.fspath(start) if start else None
        model.save_pretrained(
            partial, state_dict=tensors, path_initial_model_for_weight_conversion=converted
        )
        config = read_json(partial / "adapter_config.json")
        config["base_model_name_or_path"] = base
        for key, value in config.items():
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                config[key] = sorted(value)  # PEFT keeps sets, whose order differs from run to run
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(partial / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json", config)
    shutil.rmtree(folder.with_name(folder.name + ".new"))


def base_name(description: Mapping[str, Any]) -> str:
    """What an adapter calls its base: the Hub's name, of a copy too, or the name of the base's folder."""
    source = description["source"]
    for key in ("repository", "hub_id"):
        if key in source:
            return source[key]
    return Path(source["path"]).name


if __name__ == "__main__":
    with started(Path(sys.argv[1])) as (given, own_group):
        train(TrainingJob(**given), own_group)
