"""Hours, cost and energy of a run on the command line: what was asked, and the answer as text."""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dryfit.ask.options import RUN_OPTIONS
from dryfit.ask.question import Question
from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.text import gib
from dryfit.hours.run_time import LEFT_OUT, Run, RunTime, cheapest

_HOURS = {"m": 1 / 60, "min": 1 / 60, "h": 1.0, "d": 24.0}


def parse_run_options(options: argparse.Namespace) -> Run | None:
    """What was asked about the run; None where nothing was."""
    if options.rows is None:
        for name in RUN_OPTIONS:
            if getattr(options, name):
                raise _wrong(f"--{name.replace('_', '-')} needs --rows", None, {"--rows": 50000})
        return None
    other = [f"--{name}" for name in ("quick", "yaml") if getattr(options, name.replace("-", "_"))]
    if other:
        raise _wrong(
            f"--rows and {other[0]} contradict each other: hours come from one traced step",
            None,
            {other[0]: None},
        )
    deadline, grams, tokens = options.deadline, options.grams_per_kwh, options.tokens_per_row
    return Run(
        rows=options.rows,
        epochs=_number("--epochs", options.epochs or "1", 3),
        price_per_hour=_prices(options.price),
        deadline_hours=None if deadline is None else _deadline(deadline),
        grams_per_kwh=None if grams is None else _number("--grams-per-kwh", grams, 380),
        tokens_per_row=None if tokens is None else _number("--tokens-per-row", tokens, 350),
    )


def with_run(asked: Question, run: Run, *, gpu_needed: bool = True) -> Question:
    """The question with the run whose hours are asked for.

    UserError: if the run can't be one of this step.
    """
    if gpu_needed and asked.gpu is None:
        raise UserError(
            "--rows needs --gpu.",
            where="the command line",
            allowed="--gpu; or `dryfit gpus`",
            change={"gpu": "a100-80gb"},
        )
    if asked.gpu is None and not isinstance(run.price_per_hour, Mapping):
        raise UserError(
            "--price names no GPU, and no single one is asked about.",
            where="the command line",
            found=f"{run.price_per_hour:g}",
            allowed="NAME=PER_HOUR; or a number, with --gpu",
            change={"--price": f"a100-80gb={run.price_per_hour:g}"},
        )
    most = asked.scenario.sequence_length
    if (run.tokens_per_row or 0) > most:
        raise UserError(
            f"--tokens-per-row is larger than the sequence length ({most}).",
            where="--tokens-per-row",
            found=f"{run.tokens_per_row:g}",
            allowed=f"up to {most}, or a longer sequence",
            change={"--tokens-per-row": most},
        )
    return dataclasses.replace(asked, run=run)


def _wrong(
    problem: str, found: Any, change: Mapping[str, Any], where: object = "the command line"
) -> UserError:
    return UserError(f"{problem}.", where=where, found=found, change=change)


def _number(
    name: str, text: Any, example: Any, where: object = "the command line", key: str | None = None
) -> float:
    """A number above 0; thousands may be set apart by commas or underscores. ``key``: where to write it."""
    try:
        value = float(re.sub(r"(?<=\d)[,_](?=\d)", "", text) if isinstance(text, str) else text)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(text, bool) or not (math.isfinite(value) and value > 0):
        change = {key or name: example}
        raise UserError(
            f"{name} takes a number above 0.",
            where=where,
            found=text,
            allowed="above 0",
            change=change,
        )
    return value


def _deadline(text: str) -> float:
    number, unit = re.fullmatch(r"\s*(.*?)\s*(m|min|h|d)?\s*", text).groups()
    value = re.sub(r"(?<=\d)[,_](?=\d)", "", number)
    try:
        hours = float(value) * _HOURS[unit or "h"]
    except ValueError:
        hours = math.nan
    if not (math.isfinite(hours) and hours > 0):
        raise UserError(
            "--deadline takes a number above 0 of minutes, hours or days.",
            where="the command line",
            found=text,
            allowed="90min, 24h, 3d",
            change={"--deadline": "24h"},
        )
    return hours


def _prices(texts: Sequence[str]) -> dict[str, float] | float:
    """``NAME=PER_HOUR``, or files of ``NAME: PER_HOUR``; or a number alone, for the GPU that is asked about."""
    if (
        len(texts) == 1
        and re.match(r"[-+.\d]", texts[0])
        and "=" not in texts[0]
        and not Path(texts[0]).is_file()
    ):
        return _number("--price", texts[0], 1.29)
    prices: dict[str, float] = {}
    for text in texts:
        name, equals, price = text.partition("=")
        prices |= dict([_price(name, price, "--price")]) if equals else _price_file(text)
    return prices


def _price_file(path: str) -> dict[str, float]:
    if not Path(path).is_file():
        raise UserError(
            "--price takes a number, NAME=PER_HOUR, or a file with a price for each GPU.",
            where="the command line",
            found=path,
            change={"--price": "a100-80gb=1.29"},
        )
    content = read_yaml(path)
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            "A price file must map GPU names to prices, one per line.",
            where=path,
            found=content,
            write="a100-80gb: 1.29",
        )
    return dict(_price(str(name), price, path) for name, price in content.items())


def _price(name: str, price: Any, where: str) -> tuple[str, float]:
    def change(gpu: str) -> dict[str, Any]:
        return {"--price": f"{gpu}=1.29"} if where == "--price" else {gpu: 1.29}

    try:
        gpu = find(name.strip(), where)
    except UserError as error:
        raise UserError(
            error.problem,
            where=where,
            found=name,
            allowed=error.allowed,
            change=change(str((error.change or {}).get("gpu", "a100-80gb"))),
        ) from None
    if gpu.count > 1:
        raise _wrong("A price is for one GPU: leave the count out", name, change(gpu.name), where)
    ((key, example),) = change(gpu.name).items()
    return gpu.name, _number(f"The price of {gpu.name}", price, example, where, key)


def is_late(row: Mapping[str, Any]) -> bool:
    """Whether the run on a GPU, a row of the table, ends after the deadline."""
    return (row.get("run") or {}).get("in_time") is False


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines below a table of GPUs: warnings, then which is the cheapest, or the nearest to the deadline."""
    fitting = [row for row in rows if row["fits"]]
    runs = [RunTime(**row["run"]) for row in fitting if row["run"]]
    warned: dict[str, list[str]] = {}
    for row in fitting:
        for warning in row["warnings"]:
            warned.setdefault(warning, []).append(row["gpu"])
    lines = [f"  {', '.join(cards)}: {warning}" for warning, cards in warned.items()]
    best = cheapest(runs)
    if runs and all(run.in_time is False for run in runs):
        nearest = min(runs, key=lambda run: run.hours)
        lines.append(
            f"NO GPU that fits ends by the deadline. The nearest is {nearest.gpu}: {_hours(nearest)}"
        )
    elif best is None:
        lines += ["no price was given: --price NAME=PER_HOUR ranks by cost"] if runs else []
    else:
        by = " that ends by the deadline" if best.in_time else ""
        lines.append(f"the cheapest{by}: {best.gpu}, {_hours(best)}, {_cost(best)}")
        sure = cheapest([run for run in runs if run.hours_range])
        if best.hours_range is None:
            lines[-1] += (
                ". No step was measured on this GPU: its hours are an estimate without a range"
            )
            lines += (
                [f"of GPUs with measured steps: {sure.gpu}, {_hours(sure)}, {_cost(sure)}"]
                if sure
                else []
            )
    return lines


def run_lines(run: Mapping[str, Any] | None, asked: Run) -> list[str]:
    """Hours, cost and energy of the run."""
    if run is None:
        return ["hours and cost: not known without the time of a step"]
    time = RunTime(**run)
    each = f" on each of {time.gpus} GPUs" if time.gpus > 1 else ""
    epochs = f"{time.epochs:g} epoch{'s' * (time.epochs != 1)}"
    length = "on average, without padding"
    if time.longest:
        length = "the longest: shorter ones take less (--tokens-per-row 350 for a mean)"
    lines = [
        f"the run: {time.rows:,} rows, {epochs}, {time.steps:,} steps: {_hours(time)}",
        f"  each row counts as {time.tokens_per_row:,.6g} tokens, {length}; {LEFT_OUT}",
    ]
    if time.cost is not None:
        lines.append(f"  {_cost(time)} at {time.price_per_hour:g} an hour{each}")
    else:
        lines.append(
            f"  cost: not known, since no price of {time.gpu} was given (--price {time.gpu}=1.29)"
        )
    co2 = "" if time.co2_kg_at_most is None else f", {time.co2_kg_at_most:.2g} kg of CO2"
    lines.append(f"  at most {time.kwh_at_most:.3g} kWh{co2}, if the boards take all that they can")
    if time.in_time is not None:
        word = "ends by the deadline" if time.in_time else "DOES NOT END BY THE DEADLINE"
        other = "" if time.in_time else "; `dryfit gpus` names the nearest GPU"
        lines.append(f"  {word} of {asked.deadline_hours:.3g} hours{other}")
    return lines


def sooner_lines(
    changes: Sequence[Mapping[str, Any]], shown: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    """What would end in time on the same GPU; ``shown`` makes the line to type."""
    if not changes:
        return []
    runs = [RunTime(**item["run"]) for item in changes]
    lines = ["what would end in time, the mildest change first:"]
    if not runs[0].in_time:
        lines = ["no change that fits this GPU ends in time; the soonest:"]
    for item, run in zip(changes, runs, strict=True):
        lines.append(
            f"  {shown(item)}\n      {item['cost']}; {_hours(run)}; {gib(item['headroom_bytes'])} to spare"
        )
    return lines


def cells(run: Mapping[str, Any] | None) -> str:
    """Hours and cost of a GPU in a table."""
    if run is None:
        return "   time not known"
    time = RunTime(**run)
    late = "   too late" if time.in_time is False else ""
    return f"   {_hours(time)}{'' if time.hours_range else ' (not measured)'}   {_cost(time)}{late}".rstrip()


def _hours(run: RunTime) -> str:
    between = " ({:.3g} to {:.3g})".format(*run.hours_range) if run.hours_range else ""
    return f"{run.hours:.3g} hours{between}"


def _cost(run: RunTime) -> str:
    if run.cost is None:
        return ""
    between = " ({:.2f} to {:.2f})".format(*run.cost_range) if run.cost_range else ""
    return f"cost {run.cost:.2f}{between}"
