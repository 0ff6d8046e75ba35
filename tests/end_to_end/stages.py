"""The pipeline's stages that compute, on ``device: cuda`` over a simulated card: a tiny model, and no GPU.

    python -m tests.end_to_end.stages FOLDER make | trace               what the rules before leave; a step's trace
    python -m tests.end_to_end.stages FOLDER merge CASE [real]          the adapter that a training has left, merged
    python -m tests.end_to_end.stages FOLDER CASE [RANK] [resumed] [real]      a stage on the card

With ``real`` the card is a GPU of this machine, and nothing is lifted or exchanged.

A case prints what its stage wrote, or its error, as a line of JSON. Nobody knows values on a simulated card: what is
tested is that each line runs there and leaves its files. So where a stage compares values with each other before it
goes on, the tolerance is lifted.
"""

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dryfit.common import device
from dryfit.common.files import read_json, read_jsonl, write_json, write_jsonl, write_report
from dryfit.program.child import simulated_machine, torchrun_variables
from dryfit.program.request import ProgramRequest
from dryfit.scenario.scenario import Scenario
from scripts.evaluation import evaluate
from scripts.merging import logits, verify
from scripts.merging.merge import merge
from scripts.training import loop_state, processes, train, train_process
from tests.task_parts import text
from tests.unit.merging.models import make_adapter
from tests.unit.training import prepared

GPU = "rtx-4090"
LOOP = {
    **prepared.LOOP,
    "device": "cuda",
    "max_steps": 2,
    "on_out_of_memory": "stop",
    "save_every_steps": 1,
}
STEP = {
    **prepared.STEP,
    "precision": "bf16",
    "micro_batch": 2,
    "gradient_accumulation": 2,
    "optimizer": "adamw_fused",
    "loss": "chunked",
    "loop": "trainer",
}
LORA = {"method": "lora"}
EIGHT = {"micro_batch": 8, "gradient_accumulation": 1}
PACKED = {"micro_batch": 1, "gradient_accumulation": 2}
BORDER_BYTES = 18_000_000  # eight rows take more, four too, two do not
LIFTED = 1e9
SPLIT = ("train", "test", "harmful", "benchmark")


def several(strategy: str) -> dict[str, Any]:
    return {"loss": "full", "parallel": {"strategy": strategy, "gpus": 2}}


TRAININGS: dict[str, tuple[dict, dict]] = {
    "qlora": ({}, {}),
    "lora": (LORA, {}),
    "autocast": ({"autocast": "bf16", "gradient_checkpointing": True}, {}),
    "fp16": ({**LORA, "precision": "fp16-mixed"}, {}),
    "rows": ({**PACKED, "packing": "rows"}, {"rows_per_step": 4}),
    "shared_prefix": ({**PACKED, "packing": "shared_prefix"}, {"rows_per_step": 4}),
    "lora ddp": ({**LORA, **several("ddp")}, {}),
    "qlora ddp": (several("ddp"), {}),
    "lora fsdp2": ({**LORA, **several("fsdp2")}, {}),
    "qlora fsdp2": (several("fsdp2"), {}),
    "halve": (EIGHT, {"on_out_of_memory": "halve"}),
    "stop": (EIGHT, {}),
}


def make(folder: Path) -> None:
    """A base, encoded rows, rows to be asked, an adapter and the merged model."""
    base = prepared.describe(prepared.save_model(folder / "source", layers=1), folder / "base")
    prepared.encode(folder / "encoded", train=9)
    merge(base, make_adapter(folder / "adapter", base, r=4), folder / "merged", threads=1)
    rows = [{"request": f"Show line {n}.", "command": f"sed -n {n}p log"} for n in range(4)]
    write_jsonl(folder / "harmful.jsonl", [{**rows[0], "category": "deletion"}])
    for name in ("train", "test"):
        write_jsonl(folder / f"{name}.jsonl", rows)
    write_jsonl(folder / "benchmark.jsonl", [])
    write_report(folder / "split.json", {}, *(folder / f"{name}.jsonl" for name in SPLIT))


def merge_trained(folder: Path, case: str, real: bool) -> None:
    """Put what a training has left, and its merge, in the place of the adapter and the merged model of :func:`make`.

    A simulated card leaves tensors of the right names, shapes and dtypes with any values: these are drawn.
    """
    (trained,) = folder.glob(f"{case} */adapter")
    for name in ("adapter", "merged"):
        shutil.rmtree(folder / name)
    shutil.copytree(trained, folder / "adapter")
    if not real:
        draw_values(folder / "adapter" / "adapter_model.safetensors")
    merge(folder / "base", folder / "adapter", folder / "merged", threads=1)


def draw_values(path: Path) -> None:
    """Fill the tensors of a file with small numbers."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    tensors = {name: torch.randn_like(tensor) / 100 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


# --- stages ---------------------------------------------------------------------------------------------------------


def training(folder: Path, case: str) -> dict[str, Any]:
    """Rule ``train_adapter``; the report and the curve where this process writes them."""
    step, loop = TRAININGS[case]
    out, encoded = folder / f"{case} {os.environ.get('RANK', '')}", folder / "encoded"
    inputs = {name: str(encoded / f"{name}.parquet") for name in ("train", "validation")}
    inputs |= {
        "encoded": str(encoded / "encode.json"),
        "weights": str(folder / "base" / "weights.json"),
    }
    outputs = {
        "adapter": "adapter/adapter_model.safetensors",
        "report": "training.json",
        "curve": "training.jsonl",
    }
    outputs = {name: str(out / path) for name, path in outputs.items()}
    out.mkdir(exist_ok=True)
    train.main(
        folder / "base",
        train.Settings({**STEP, **step}, {**LOOP, **loop}, 0, "code"),
        inputs,
        outputs,
        1,
    )
    if not Path(outputs["report"]).exists():
        return {}
    found = {name: Path(outputs[name]).stat().st_size for name in ("adapter",)}
    return {
        "report": read_json(outputs["report"]),
        "curve": list(read_jsonl(outputs["curve"])),
        **found,
    }


def resumed(folder: Path, case: str) -> dict[str, Any]:
    """A training that is killed behind its first checkpoint, and started again."""
    save = loop_state.LoopState.save

    def save_and_die(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    loop_state.LoopState.save = save_and_die
    try:
        training(folder, case)
    except KeyboardInterrupt:
        loop_state.LoopState.save = save
    return training(folder, case)


def this_rank(module: str, work: Mapping[str, Any], gpus: int, resumed: str) -> None:
    """In the place of ``launch``: this process is one of those that it would start."""
    folder = Path(work["outputs"]["report"]).parent
    write_json(folder / "work.json", {**work, "folder": str(folder)})
    with processes.started(folder / "work.json") as (given, group):
        train_process.train(train_process.TrainingJob(**given), group)


def evaluation(folder: Path, case: str) -> dict[str, Any]:
    """Rule ``evaluate_base``, or ``evaluate_tuned`` with the base's files too."""
    out = folder / case
    of_base = case != "evaluation merged"
    weights = folder / ("base/weights.json" if of_base else "merged/manifest.json")
    out.mkdir()
    inputs = {name: f"{folder}/{name}.jsonl" for name in SPLIT}
    inputs |= {"split": f"{folder}/split.json", "weights": str(weights)}
    outputs = {name: f"{out}/{name}.jsonl" for name in ("answers", "nearest_row", "few_shot")}
    outputs["metrics"] = f"{out}/metrics.json"
    settings = {
        "requests": 4,
        "benchmark": 0,
        "max_new_tokens": 3,
        "batch_size": 4,
        "dtype": "auto",
    }
    evaluate.main(
        text("scores"), inputs, outputs, {"system": prepared.SYSTEM}, settings, "cuda", 1, "code"
    )
    return {
        "answers": list(read_jsonl(outputs["answers"])),
        "metrics": read_json(outputs["metrics"]),
    }


def merge_check(folder: Path, case: str) -> dict[str, Any]:
    """Rule ``verify_merge``."""
    settings = {"prompts": 2, "layers": 2, "max_new_tokens": 3, "system": prepared.SYSTEM}
    paths = [
        folder / name
        for name in ("base", "adapter", "merged", "test.jsonl", "split.json", f"{case}.json")
    ]
    verify.run(*paths[:5], settings, paths[5])
    return read_json(paths[5])


def scenario(folder: Path) -> Scenario:
    return Scenario.from_mapping({**STEP, "model": read_json(folder / "base" / "config.json")})


def measurement(folder: Path, case: str) -> dict[str, Any]:
    """What rule ``measure_memory`` measures; :func:`main` traces, which simulates a card of its own."""
    from dryfit.tracing.measure import measure

    return measure(scenario(folder), "cuda")


STAGES: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    **dict.fromkeys(TRAININGS, training),
    "evaluation": evaluation,
    "evaluation apart": evaluation,
    "evaluation merged": evaluation,
    "merge check": merge_check,
    "measurement": measurement,
}


# --- the card -------------------------------------------------------------------------------------------------------


def on_card(folder: Path, case: str, rank: int, is_resumed: bool) -> dict[str, Any]:
    """A stage in a process that has one of a machine's simulated cards."""
    import torch

    gpus = TRAININGS.get(case, ({},))[0].get("parallel", {}).get("gpus", 1)
    device.cuda_devices = lambda: gpus  # the driver's answer
    if gpus > 1:
        os.environ.update(torchrun_variables(gpus, rank))
        train.launch = this_rank
    lines = Path(logits.__file__).read_text(encoding="utf-8").splitlines()
    same = {
        f"logits.py:{number}": 0.0 for number, line in enumerate(lines, 1) if ".nonzero()" in line
    }
    asked = ProgramRequest(
        case, gpus=gpus, torchrun=gpus > 1, rank=rank, gpu=GPU, steps=10**6, answers=same
    )
    scaled, step = [], torch.amp.GradScaler.step
    torch.amp.GradScaler.step = lambda *given: (scaled.append(1), step(*given))[1]
    with simulated_machine(asked) as running:
        if case in ("halve", "stop"):
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(BORDER_BYTES / total)
        if case != "evaluation apart":
            lift_tolerances()
        found = (resumed if is_resumed else STAGES[case])(folder, case)
        return found | {"ran_out": running.memory.ran_out, "scaled_steps": len(scaled)}


def on_gpu(folder: Path, case: str, is_resumed: bool) -> dict[str, Any]:
    """A stage on this machine's GPUs."""
    return (resumed if is_resumed else STAGES[case])(folder, case)


def lift_tolerances() -> None:
    """Let every comparison of values with values end well."""
    from dryfit.step import generation, packing_self_test

    logits.LOGITS_TOLERANCE = dict.fromkeys(logits.LOGITS_TOLERANCE, LIFTED)
    packing_self_test.TOLERANCE = dict.fromkeys(packing_self_test.TOLERANCE, (LIFTED, LIFTED))
    generation.TOLERANCE = dict.fromkeys(generation.TOLERANCE, LIFTED)


def main() -> None:
    folder, case = Path(sys.argv[1]), sys.argv[2]
    if case == "make":
        make(folder)
        return
    if case == "merge":
        merge_trained(folder, sys.argv[3], "real" in sys.argv)
        return
    if case == "trace":
        from dryfit.tracing.trace import trace

        print(json.dumps(trace(scenario(folder), capability=(8, 9), timeline=False)), flush=True)
        return
    words = sys.argv[3:]
    try:
        if "real" in words:
            found = on_gpu(folder, case, "resumed" in words)
        else:
            found = on_card(folder, case, int((words or ["0"])[0]), "resumed" in words)
    except BaseException as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found | {"cpu_seconds": time.process_time()}), flush=True)
    os._exit(0)  # not through the interpreter's end: exchanged functions may trip it


if __name__ == "__main__":
    main()
