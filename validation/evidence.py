"""The library's table of measured steps, made of the tables of ``validation/data``.

    python -m validation.evidence --write   dryfit/data/measured_steps.csv
    python -m validation.evidence           whether it is up to date, and its summary as Markdown

Nothing is traced: the errors are those of the kept reports (``validation.json``, ``times.json``, ``litgpt.json``), and
of the tables of single tries. Only the analytic estimate is computed anew, for each row that it describes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.analytic.setting import describe
from dryfit.cards.gpus import known
from dryfit.common.errors import UserError
from dryfit.common.files import read_json
from dryfit.common.terminal import command
from dryfit.evidence.measured import (
    FITTED,
    PUBLISHED,
    READ,
    UNREAD,
    Kinds,
    MeasuredStep,
    kinds_of,
    write,
)
from dryfit.evidence.nearest import summary
from dryfit.scenario.description import say_way
from dryfit.scenario.scenario import Scenario
from validation import other_rows, rows, times
from validation import torchtitan_rows as torchtitan_pages
from validation.rows import MIB, SOURCES, MeasuredRow
from validation.tables import FOLDER, markdown, rows_of
from validation.timed_rows import TimedRow, scenario_of
from validation.timed_rows import read as timed_rows

_CARDS = {
    "Tesla T4": "t4",
    "A100-SXM4-80GB": "a100-80gb",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4080": "rtx-4080",
    "H100 96 GB": "h100-96gb",
    "8 x H100": "h100-80gb",
    "h100-96gb-500w": "h100-96gb",
}
_OTHER_CAPABILITIES = {
    "a10g": (8, 6),
    "h100-96gb": (9, 0),
}  # of cards that the catalogue does not have
_TITANS_CARDS = {"h200": "h200", "b200": "b200"}  # by the beginning of a row's name
_TITANS_MILLIONS = {"8B": 8030.3, "70B": 70553.7, "405B": 405853.4}
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
# Programs whose models are their own, not transformers'.
OWN_PROGRAMS = {
    "torchtitan": "torchtitan",
    "fitcheck": "a loop of its own",
    "canifinetune": "a loop of its own",
    "peft_comparison": "a loop of its own",
    "trainer": "a Trainer",
}


def card_of(title: str) -> str:
    """The catalogue's name of a card as a table has it."""
    title = title.split(" (")[0].split(", ")[0]
    return _CARDS.get(title, title)


def _capability(card: str) -> tuple[int, int] | None:
    return _OTHER_CAPABILITIES.get(card) or known()[card].capability


def _kinds(card: str, **given: str) -> Kinds:
    """The kinds of a step that no scenario describes."""
    major, minor = _capability(card)
    usual = {
        "method": "full",
        "layers": "attention",
        "objective": "sft",
        "program": "a program of its own",
        "compiled": "no",
        "parallel": "one GPU",
        "capability": f"{major}.{minor}",
        "platform": "linux",
        "kernels": "transformers",
        "preparation": "none",
        "precision": "bf16",
        "optimizer": "adamw",
        "attention": "fused",
        "checkpointing": "no",
        "loss": "full",
        "rows": "apart",
        "offload": "none",
    }
    return Kinds(**{**usual, **given})


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def parameters(model: Mapping[str, Any]) -> float | None:
    """Of a decoder, in millions."""
    try:
        return round(describe(model).parameter_counts()["total"] / 1e6, 1)
    except NotDescribed:
        return None


def _form_error(scenario: Scenario, card: str, measured_bytes: int | None) -> float | None:
    if measured_bytes is None:
        return None
    try:
        peak = analytic_estimate(scenario, capability=_capability(card), blocks=False)[
            "peak_allocated_bytes"
        ]
    except (NotDescribed, UserError):
        return None
    return peak / measured_bytes - 1


@cache
def _versions() -> Mapping[str, Mapping[str, str]]:
    """The versions that a row was measured with, by its name."""
    found = {}
    for source in SOURCES.values():
        if source.file.endswith(".json"):
            table = read_json(FOLDER / source.file)
            found |= {row["id"]: table["versions"] for row in table["rows"]}
            continue
        found |= {
            row["id"]: {name: row.get(name) or "" for name in VERSIONS}
            for row in rows_of(source.file)
        }
    return found


def memory_rows() -> Iterator[MeasuredStep]:
    """The rows whose step the trace takes from a scenario."""
    traced = {row["id"]: row for row in read_json(FOLDER / "validation.json")["rows"]}
    for name, source in SOURCES.items():
        for row in rows.read(name):
            if row.measured_bytes:
                yield _memory_row(row, traced.get(row.id, {}), source)


def _memory_row(
    row: MeasuredRow, traced: Mapping[str, Any], source: rows.PublishedSource
) -> MeasuredStep:
    errors, first = traced.get("error_percent") or {}, traced.get("first_error_percent")
    card, scenario = card_of(row.gpu), row.scenario
    known_before = FITTED if source.developed_with.startswith("yes") else READ
    if source.developed_with == "no" and (first is None or first == errors):
        known_before = UNREAD
    settings = {"program": OWN_PROGRAMS[row.program]}
    if name := row.settings.get("optimizer"):  # PEFT's rows name the class
        settings["optimizer"] = {"AdamW": "adamw"}.get(name, str(name).lower())
    return MeasuredStep(
        id=row.id,
        source=row.source,
        card=card,
        kinds=kinds_of(scenario, _capability(card))._replace(**settings),
        model=row.model,
        parameters=parameters(scenario.model),
        micro_batch=scenario.micro_batch,
        sequence_length=scenario.sequence_length,
        **{name: _versions()[row.id].get(name) or "" for name in VERSIONS},
        allocated_bytes=row.measured_bytes.get("allocated"),
        reserved_bytes=row.measured_bytes.get("reserved"),
        allocated_error=_share(errors.get("allocated")),
        reserved_error=_share(errors.get("reserved")),
        form_error=_form_error(scenario, card, row.measured_bytes.get("allocated")),
        memory_known=known_before if errors else "",
    )


def timed(steps: Mapping[str, MeasuredStep]) -> Iterator[MeasuredStep]:
    """The rows with a time: those whose memory is known too with both, the others beside them."""
    report = {row["id"]: row for row in read_json(times.REPORT)["rows"]}
    merged = dict(steps)
    for row in timed_rows():
        predicted = report.get(row.id, {})
        error = _share(predicted.get("error_percent"))
        known_before = FITTED if predicted.get("fitted") else UNREAD if row.unread else READ
        time = {
            "step_seconds": row.step_seconds,
            "time_error": error,
            "time_known": known_before if predicted else "",
        }
        same = merged.get(row.id.removeprefix("time-"))
        merged[same.id if same else row.id] = replace(same or _timed_row(row), **time)
    for tried in other_rows.read():
        if tried.what == "time" and tried.id in merged:
            error = _share(tried.error_percent)
            merged[tried.id] = replace(
                merged[tried.id],
                step_seconds=float(tried.measured),
                time_error=error,
                time_known=UNREAD,
            )
    yield from merged.values()


def _timed_row(row: TimedRow) -> MeasuredStep:
    card, scenario = card_of(row.gpu), scenario_of(row)
    settings = {"program": "torchtitan"} if "torchtitan" in row.source else {}
    if "foak" in row.framework:
        settings["kernels"] = "fms-acceleration"
    return MeasuredStep(
        id=row.id,
        source=row.source,
        card=card,
        kinds=kinds_of(scenario, _capability(card))._replace(**settings),
        model=row.model,
        parameters=parameters(scenario.model),
        micro_batch=row.micro_batch,
        sequence_length=row.sequence_length,
    )


def compiled_rows() -> Iterator[MeasuredStep]:
    """Compiled steps of programs of their own; two of them state no figure."""
    timed_steps = {row["id"]: row for row in rows_of("compiled_times.csv")}
    for row in rows_of("compiled.csv"):
        titan = row["id"].startswith("torchtitan")
        card, gpus = ("h100-96gb" if titan else "h100-80gb"), int(row["gpu"].split()[0])
        published = {
            key: float(row[f"published_{key}_mib"] or 0) for key in ("allocated", "reserved")
        }
        if not any(published.values()):
            continue
        errors = {
            key: round(float(row[f"traced_{key}_mib"]) / published[key] - 1, 6)
            if row[f"traced_{key}_mib"] and published[key]
            else None
            for key in published
        }
        time = timed_steps.get(row["id"], {})
        seconds, guess = (
            float(time.get(f"{key}_seconds") or 0) for key in ("measured", "predicted")
        )
        yield MeasuredStep(
            id=row["id"],
            source=row["source"],
            card=card,
            kinds=_kinds(
                card,
                program="torchtitan" if titan else "modded-nanogpt",
                compiled="layers" if titan else "model",
                optimizer="adamw" if titan else "muon",
                parallel=f"{'fsdp2' if titan else 'ddp'} on {gpus} GPUs",
                rows="packed",
                precision="bf16-mixed",
                checkpointing="yes" if titan else "no",
            ),
            model="meta-llama/Llama-3.1-8B" if titan else "modded-nanogpt",
            parameters=8030.3 if titan else None,
            micro_batch=2 if titan else 1,
            sequence_length=8192 if titan else 0,
            allocated_bytes=round(published["allocated"] * MIB) or None,
            reserved_bytes=round(published["reserved"] * MIB) or None,
            allocated_error=errors["allocated"],
            reserved_error=errors["reserved"],
            step_seconds=seconds or None,
            time_error=round(guess / seconds - 1, 6) if guess and seconds else None,
            memory_known=(UNREAD if row["known"] == "unread" else FITTED)
            if any(errors.values())
            else "",
            time_known=time["known"] if guess and seconds else "",
        )


def torchtitan_rows() -> Iterator[MeasuredStep]:
    """torchtitan's pages, but for the four rows that older tables have."""
    older = {"table1-fsdp", "table1-compile", "table3-fsdp", "table3-compile"}
    for one in torchtitan_pages.highest(torchtitan_pages.read()):
        row = torchtitan_pages.ROWS[one.id]
        if one.id in older or one.error_percent is None or row.settings is None:
            continue
        given = {"tensor": 1, "context": 1, "pipeline": 1, "tokens": 8192, **row.settings}
        gpus = given["shard"] * given["tensor"] * given["context"] * given["pipeline"]
        card = next(
            (card for start, card in _TITANS_CARDS.items() if one.id.startswith(start)), "h100-96gb"
        )
        mesh = {name: given[name] for name in ("tensor", "context", "pipeline")}
        mesh |= dict.fromkeys(("sequence_parallel", "loss_parallel"), given["tensor"] > 1)
        schedule = "interleaved" if given.get("interleaved") else "1f1b"
        way = say_way({"strategy": "fsdp2", "gpus": gpus, **mesh, "schedule": schedule})
        precision = "bf16-mixed" + (", float8 tensorwise" if given.get("float8") else "")
        yield MeasuredStep(
            id=f"torchtitan-{one.id}",
            source=f"pytorch/torchtitan@b5bcd76:{row.page}, line {row.line}",
            card=card,
            kinds=_kinds(
                card,
                program="torchtitan",
                compiled="layers" if given.get("compiled") else "no",
                parallel=f"{way} on {gpus} GPUs",
                precision=precision,
                rows="packed",
                checkpointing="yes",
            ),
            model=f"meta-llama/Llama-3.1-{given['llama']}",
            parameters=_TITANS_MILLIONS[given["llama"]],
            micro_batch=given["rows"],
            sequence_length=given["tokens"],
            reserved_bytes=round(float(one.published_gib) * 2**30),
            reserved_error=_share(round(one.error_percent, 4)),
            memory_known=UNREAD if one.half == "unread" else READ,
        )


def litgpt_rows() -> Iterator[MeasuredStep]:
    """litgpt's recipes on an A10G; three states less than its states alone, and is left out with the reason there."""
    traced = {row["config"]: row for row in read_json(FOLDER / "litgpt.json")["rows"]}
    for row in rows_of("litgpt.csv"):
        prediction = traced[row["config"]]
        if prediction["error"] is None:
            continue
        yield MeasuredStep(
            id=row["id"],
            source=f"Lightning-AI/litgpt@{row['commit']}:config_hub/finetune/README.md, {row['config']}",
            card="a10g",
            kinds=_kinds("a10g", method=row["method"], program="litgpt"),
            model=row["model"],
            parameters=None,
            micro_batch=int(row["micro_batch"]),
            sequence_length=int(row["sequence_length"]),
            torch="2.3.0",
            bitsandbytes="0.42.0" if row["method"] == "qlora" else "",
            allocated_bytes=round(float(row["peak_allocated_gb"]) * 1e9),
            allocated_error=_share(prediction["error"]),
            memory_known=READ,
        )


def single_rows() -> Iterator[MeasuredStep]:
    """Steps that were traced once: diffusion, an encoder, a vision transformer."""
    what = {
        "flux": {
            "layers": "a diffusion model",
            "program": "a loop of its own",
            "checkpointing": "yes",
        },
        "bert": {"layers": "an encoder", "program": "a Trainer", "precision": "fp32"},
        "torchao": {"layers": "an encoder"},
    }
    models = {
        "flux": "black-forest-labs/FLUX.2-klein",
        "bert": "bert-large-uncased",
        "torchao": "vit_giant_dinov2",
    }
    steps: dict[str, MeasuredStep] = {}
    for tried in other_rows.read():
        if tried.group not in what:
            continue
        kinds = dict(what[tried.group])
        if tried.group == "flux":
            name = tried.id.removeprefix("flux-").split("-")[0]
            kinds["method"] = {"full": "full"}.get(name, name)
        if tried.group == "bert":
            kinds["checkpointing"] = "yes" if "reentrant" in tried.settings else "no"
            kinds["precision"] = "fp16-mixed" if "autocast" in tried.settings else "fp32"
            kinds["optimizer"] = next(
                name
                for sign, name in (
                    ("Adam8bit", "adamw_8bit"),
                    ("adafactor", "adafactor"),
                    ("adamw_hf", "adamw"),
                )
                if sign in tried.settings
            )
        step = steps.get(tried.id) or MeasuredStep(
            id=tried.id,
            source=tried.source,
            card=tried.gpu,
            kinds=_kinds(tried.gpu, **kinds),
            model=models[tried.group],
            parameters=None,
            micro_batch=0,
            sequence_length=0,
        )
        steps[tried.id] = _with_try(step, tried)
    yield from steps.values()


def _with_try(step: MeasuredStep, tried: other_rows.TriedRow) -> MeasuredStep:
    """The last try counts; a second one was made after the first was read."""
    before = UNREAD if tried.attempt == "first" else READ
    error = None if tried.error_percent is None else round(tried.error_percent / 100, 6)
    if tried.what == "time":
        return replace(
            step, step_seconds=float(tried.measured), time_error=error, time_known=before
        )
    size = round(float(tried.measured) * (MIB if tried.unit == "MiB" else 1e9))
    return replace(
        step, **{f"{tried.what}_bytes": size, f"{tried.what}_error": error}, memory_known=before
    )


def table() -> list[MeasuredStep]:
    """Every row, in the order of the sources."""
    known_memory = {step.id: step for step in memory_rows()}
    return [
        *timed(known_memory),
        *compiled_rows(),
        *torchtitan_rows(),
        *litgpt_rows(),
        *single_rows(),
    ]


def summary_table(steps: list[MeasuredStep]) -> str:
    """The table's summary for a document."""
    rows = []
    for group in summary(steps):
        card, method, parallel, program, platform, compiled = group["key"]
        what = [
            program,
            *([parallel] if parallel != "one GPU" else []),
            *([platform] if platform != "linux" else []),
        ]
        what += [f"compiled: {compiled}"] if compiled != "no" else []
        cells = [
            f"{100 * one.median_size:.2g} %, {100 * one.worst_size:.2g} %" if one else ""
            for one in (group[figure] for figure in ("allocated", "reserved", "time", "estimate"))
        ]
        rows.append((card, method, ", ".join(what), group["rows"], *cells))
    columns = (
        "card",
        "method",
        "what ran",
        "rows:",
        "allocated",
        "reserved",
        "time",
        "analytic estimate",
    )
    return markdown(columns, rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation.evidence", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--write", action="store_true", help=f"write {PUBLISHED.name} of the library"
    )
    if parser.parse_args().write:
        write(PUBLISHED, table())
        return 0
    from dryfit.evidence.measured import published

    print(summary_table(list(published())))
    fresh = [step.cells() for step in table()] == [step.cells() for step in published()]
    print("up to date" if fresh else "out of date: python -m validation.evidence --write")
    return 0 if fresh else 1


if __name__ == "__main__":
    command(main)
