"""Your own measurement beside the prediction: three updates of your program, or a memory snapshot of PyTorch.

    dryfit measure config.yml --gpu 4090 -- python train.py           runs the program until its third update
    dryfit compare config.yml --gpu 4090 --measured run.json          a record (measure --record run.json)
    dryfit compare config.yml --gpu 4090 --measured mem.pickle        the first event that differs from the trace
    dryfit compare config.yml --gpu 4090 --measured 14.2GiB           what nvidia-smi shows, put into causes

A measured run becomes a row of your own table of measured steps, which later answers name
(:mod:`dryfit.evidence.measured`). Nothing is sent. The program saves nothing: it ends after its third update.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dryfit.ask.answer import traced
from dryfit.ask.explain_measurement import difference
from dryfit.ask.explain_measurement import measured as figure
from dryfit.ask.question import Question
from dryfit.cards.gpus import GIVEN, MIB, Gpu, find, from_device
from dryfit.common.errors import UserError
from dryfit.common.files import write_json
from dryfit.common.schema import validate
from dryfit.common.text import gib, printable, size_text, yaml_text
from dryfit.engine.periods import Unlike
from dryfit.evidence import recorder
from dryfit.evidence.measured import UNREAD, MeasuredStep, kinds_of, own_table, read, write
from dryfit.tracing.snapshot import compare_snapshot, read_snapshot
from dryfit.tracing.trace import step_record

_SITE = """import importlib.util, sys
spec = importlib.util.spec_from_file_location("dryfit_recorder", {recorder!r})
recorder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recorder)
recorder.install()
sys.path.remove({folder!r})      # another sitecustomize of the program's own environment comes now
sys.modules.pop("sitecustomize", None)
try:
    import sitecustomize
except ImportError:
    pass
"""
_MEASURED = ("allocated_bytes", "reserved_bytes")  # of each update, above 0 where it used the GPU
_CLOSE = 0.02  # of the measured peak: what needs no cause
_SIZE = {"type": ["integer", "null"], "minimum": 0}
_RECORD = {
    "type": "object",
    "properties": {
        "form": {"enum": [1]},
        "platform": {"type": "string"},
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        "device": {
            "type": ["object", "null"],
            "properties": {
                "name": {"type": "string"},
                "total_bytes": {"type": "integer"},
                "capability": {"type": "array", "items": {"type": "integer"}},
                "beside_allocator_bytes": {"type": "integer"},
                "gpus": {"type": "integer", "minimum": 1},
            },
            "required": ["name", "total_bytes", "capability", "beside_allocator_bytes"],
        },
        "updates": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "seconds": {"type": ["number", "null"]},
                    "allocated_bytes": _SIZE,
                    "reserved_bytes": _SIZE,
                },
                "required": ["seconds", "allocated_bytes", "reserved_bytes"],
            },
        },
    },
    "required": ["form", "updates", "device", "versions"],
}


def measure(asked: Question, program: Sequence[str], record_path: Path | None) -> int:
    """``measure``: exit status 0, or 1 where the prediction was too low."""
    if not program:
        raise UserError(
            "`dryfit measure` has no program to run.",
            where="the command line",
            allowed="a command behind --",
            write="dryfit measure config.yml --gpu 4090 -- python train.py",
        )
    record = run(program)
    if record_path:
        write_json(record_path, record)
    return _print_compared(asked, record)


def compare(asked: Question, measured: str) -> int:
    """``compare``: a figure, a record or a snapshot beside the prediction; exit status 0, or 1 where they differ."""
    if measured.endswith((".pickle", ".pkl")):
        return _snapshot(asked, Path(measured))
    if measured.endswith(".json"):
        return _print_compared(asked, read_record(Path(measured)))
    figure(measured)  # before the trace, which takes longer
    print(printable(difference(asked, traced(asked, suggested=False), measured)))
    return 0


def _print_compared(asked: Question, record: Mapping[str, Any]) -> int:
    asked, step, answer = compared(asked, record)
    keep(step)
    print(printable(text(asked, step, answer, record)))
    return 1 if step.allocated_error < -_CLOSE else 0


def _snapshot(asked: Question, path: Path) -> int:
    read_snapshot(path)  # before the trace, which takes longer
    try:
        record = step_record(asked.scenario, asked.gpu and asked.gpu.capability)
    except Unlike as error:
        raise UserError(
            f"The step's events are not known one by one: {error}.",
            where="--measured",
            allowed="one GPU, and transformers 5.4 or newer",
        ) from None
    found = compare_snapshot(record, path)
    print(printable(str(found)))
    return 0 if found.trace is None and found.snapshot is None else 1


def run(program: Sequence[str]) -> dict[str, Any]:
    """Run a program until its third update, and give its record.

    UserError: if it can't be started, or ends before.
    """
    with TemporaryDirectory() as folder:
        site, target = Path(folder) / "site", Path(folder) / "record.json"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            _SITE.format(recorder=recorder.__file__, folder=str(site))
        )
        before = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            recorder.TARGET: str(target),
            "PYTHONPATH": f"{site}{os.pathsep}{before}" if before else str(site),
        }
        try:
            status = subprocess.run(program, env=environment, stdout=sys.stderr).returncode
        except OSError as error:
            raise UserError(
                "The program can't be started.",
                where="measure",
                found=f"{program[0]}: {error.strerror}",
                write="dryfit measure config.yml -- python train.py",
            ) from None
        if target.is_file():
            return _whole(
                json.loads(target.read_text(encoding="utf-8")),
                f"the program (its status was {status})",
            )
    return _whole({"updates": []}, f"the program (its status was {status})")


def _whole(record: dict[str, Any], where: object) -> dict[str, Any]:
    count = len(record["updates"])
    if count < recorder.UPDATES:
        raise UserError(
            f"The run ended after {count} update{'s' if count != 1 else ''}, and {recorder.UPDATES} are needed: the"
            " first one makes the optimizer's states, and the time is that of the others.",
            where=where,
            allowed=f"a program whose PyTorch optimizer makes {recorder.UPDATES} updates",
            write="more rows, or a smaller gradient accumulation",
        )
    return record


def read_record(path: Path) -> dict[str, Any]:
    """A record from its file, checked."""
    wrong = {"where": str(path), "allowed": "a file that --record wrote"}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("The file isn't there.", **wrong) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"The file is no record: {type(error).__name__}.", **wrong) from None
    if not isinstance(content, dict):
        raise UserError("The file is no record: it holds no keys.", **wrong)
    validate(content, _RECORD, str(path))
    return _whole(content, path)


def compared(
    asked: Question, record: Mapping[str, Any]
) -> tuple[Question, MeasuredStep, dict[str, Any]]:
    """The question for the very card that a record was made on, the row that the record is, and the answer.

    UserError: if the run used no GPU.
    """
    device = record["device"]
    if device is None or not all(one[name] for one in record["updates"] for name in _MEASURED):
        raise UserError(
            "The run used no GPU, so there is no GPU memory to compare.",
            where="measure",
            allowed="a program that trains on CUDA",
            write="dryfit compare config.yml --measured run.json",
        )
    card = from_device(device["name"], device["total_bytes"], tuple(device["capability"]))
    if asked.gpu is None:
        asked = replace(asked, gpu=card, scenario=asked.scenario.changed(gpu=card.setting))
    answer = traced(asked, suggested=False)
    updates, trace, time = record["updates"], answer["trace"], answer.get("time")
    allocated, reserved = (max(one[name] for one in updates) for name in _MEASURED)
    seconds = statistics.median(one["seconds"] for one in updates if one["seconds"] is not None)
    scenario, platform = (
        asked.scenario,
        "windows" if record.get("platform", "").startswith("win") else "linux",
    )
    versions = {
        name: record["versions"].get(name, "")
        for name in ("torch", "transformers", "peft", "bitsandbytes")
    }
    form = answer["analytic"]
    step = MeasuredStep(
        id=f"own-{datetime.now(UTC):%Y%m%dT%H%M%S%f}",
        source="measured here",
        card=card.name,
        kinds=kinds_of(scenario, card.capability)._replace(platform=platform),
        model=asked.model or scenario.model["model_type"],
        parameters=round(trace["parameters"] / 1e6, 1),
        micro_batch=scenario.micro_batch,
        sequence_length=scenario.sequence_length,
        **versions,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        step_seconds=round(seconds, 6),
        allocated_error=round(trace["peak_allocated_bytes"] / allocated - 1, 6),
        reserved_error=round(trace["peak_reserved_bytes"] / reserved - 1, 6),
        time_error=round(time["seconds_per_step"] / seconds - 1, 6) if time else None,
        form_error=round(form["peak_allocated_bytes"] / allocated - 1, 6) if form else None,
        memory_known=UNREAD,
        time_known=UNREAD if time else "",
    )
    return asked, step, answer


def keep(step: MeasuredStep) -> Path:
    """Add a row to your own table."""
    path = own_table()
    write(path, [*(read(path) if path.is_file() else ()), step])
    return path


def _beside(found: int, gpu: Gpu | None) -> list[str]:
    """What the card held beside PyTorch's allocator, and how later questions count it."""
    if gpu is None:
        return [f"beside the allocator, with the CUDA context: {size_text(found)}"]
    predicted = size_text(gpu.context_bytes)
    lines = [
        f"beside the allocator, with the CUDA context: {size_text(found)}  (predicted: {predicted})"
    ]
    if abs(found - gpu.context_bytes) >= MIB:
        own = replace(gpu, context_bytes=-(-found // MIB) * MIB, context_source=GIVEN, count=1)
        write = (
            f'write `gpu: {yaml_text(own.setting)}` in a file, or --gpu "{yaml_text(own.setting)}"'
        )
        lines.append(f"{write}: {size_text(find(own.setting).usable_bytes)} are usable then")
    return lines


def text(
    asked: Question, step: MeasuredStep, answer: Mapping[str, Any], record: Mapping[str, Any]
) -> str:
    """What was measured beside what was predicted, the card's own figures, and where the difference may come from."""
    trace, time, device = answer["trace"], answer.get("time"), record["device"]
    rows = [
        (
            "allocated",
            gib(step.allocated_bytes),
            gib(trace["peak_allocated_bytes"]),
            step.allocated_error,
        ),
        (
            "reserved",
            gib(step.reserved_bytes),
            gib(trace["peak_reserved_bytes"]),
            step.reserved_error,
        ),
    ]
    if time:
        rows.append(
            (
                "a step",
                f"{step.step_seconds:.4g} s",
                f"{time['seconds_per_step']:.4g} s",
                step.time_error,
            )
        )
    lines = [f"{'':<12}{'measured':>12}{'predicted':>12}{'difference':>12}"]
    lines += [
        f"{name:<12}{own:>12}{other:>12}{100 * error:>+10.2f} %" for name, own, other, error in rows
    ]
    lines += _beside(device["beside_allocator_bytes"], asked.gpu)
    if abs(step.allocated_error) > _CLOSE:
        lines += [
            "",
            difference(asked, answer, f"allocated={step.allocated_bytes / 2**20:.0f}MiB"),
            "",
        ]
    lines.append(f"kept as a row of {own_table()}; later answers name it")
    return "\n".join(lines)
