"""What the closed form says of GPUs near the border, against replays of the traced steps at those GPUs' own sizes.

python -m validation.quick_verdicts --count 200 --seed 1 --append FILE   one row a step: how far it is off
python -m validation.quick_verdicts --judge --count 300 --seed 2         verdicts, and those that are refuted
python -m validation.quick_verdicts --judge --with '{attention_mask: padding}' ...   the same of altered questions

Questions are drawn at random: models of config/models/, most of them with two to six of their layers so that a trace
takes a second, every method, and a GPU of any size from 16 % below to 19 % above what the closed form says is needed.
The rows that ``dryfit/analytic/certainty.py`` reads come from seeds 1 to 4. Seed 300 was set before the first row was
drawn, and kept for the end.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from dryfit.analytic.allocations import form_events, variations
from dryfit.analytic.certainty import Needs, follows_allocations
from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.analytic.setting import describe
from dryfit.cards.gpus import catalogue
from dryfit.common.errors import UserError
from dryfit.common.files import read_json
from dryfit.common.terminal import command, progress
from dryfit.engine.capacities import capacities
from dryfit.engine.replay import peak_blocks
from dryfit.scenario.fields import line
from dryfit.scenario.model import MODELS
from dryfit.scenario.scenario import Scenario
from validation.tables import markdown

METHODS = ("full", "lora", "qlora")
WHOLE = 2e9  # parameters: larger models are drawn with fewer layers alone, whose traces take a second or two
MOST_BYTES = 180 * 2**30  # steps beyond this are drawn anew: no GPU known has it
NEAR = 0.25  # powers of two to either side of what is needed
SPOTS = 8  # sizes below the border of which each row says whether they suffice
COLUMNS = (
    "seed",
    "model",
    "layers",
    "experts",
    "parameters",
    "method",
    "strategy",
    "gpus",
    "precision",
    "optimizer",
    "expandable",
    "micro_batch",
    "sequence_length",
    "gradient_accumulation",
    "loss",
    "checkpointing",
    "attention",
    "kbit_preparation",
    "capability",
    "peak_form",
    "required_form",
    "lowest_form",
    "highest_form",
    "peak_trace",
    "required_trace",
    "least_trace",
)


class Drawn(NamedTuple):
    """A step, the compute capability of the GPU, and how large that is beside what the closed form says."""

    scenario: Scenario
    capability: tuple[int, int]
    size: float


def models(draw: Random) -> Iterator[tuple[str, Mapping[str, Any], int | None]]:
    """Names, configurations, and how many layers to keep of them, without end."""
    names = sorted(path.stem for path in MODELS.glob("*.json"))
    while True:
        yield (
            (name := draw.choice(names)),
            read_json(MODELS / f"{name}.json"),
            draw.choice((2, 2, 3, 4, 6, None)),
        )


def drawn(seed: int) -> Iterator[Drawn]:
    """Questions without end."""
    draw = Random(seed)
    for name, model, layers in models(draw):
        method = draw.choice(METHODS)
        fields: dict[str, Any] = {
            "model_name": name,
            "method": method,
            "sequence_length": 64 * draw.choice((2, 4, 8, 9, 12, 16, 20, 24, 31, 32, 48, 64, 100))
            - draw.choice((0, 0, 0, 13)),
            "micro_batch": draw.choice((1, 1, 2, 2, 3, 4, 6, 8)),
            "precision": draw.choice(("bf16", "bf16", "bf16", "fp16", "fp32", "bf16-mixed")),
            "attention": draw.choice(("sdpa", "sdpa", "sdpa", "mem_efficient", "eager")),
            "gradient_checkpointing": draw.choice((True, True, True, False)),
            "gradient_accumulation": draw.choice((1, 1, 2, 4)),
            "optimizer": draw.choice(
                ("adamw", "adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit")
            ),
            "loss": draw.choice(("full", "full", "full", "chunked")),
            "loop": draw.choice(("trainer", "trainer", "trainer", "manual")),
            "allocator": {"expandable_segments": draw.random() < 0.3},
        }
        if method != "full":
            fields["lora"] = {
                "rank": draw.choice((4, 8, 16, 32, 64)),
                "target_modules": "all-linear",
            }
            fields["lora"]["dropout"] = draw.choice((0.0, 0.0, 0.05))
            fields["adapter_precision"] = draw.choice(("fp32", "fp32", "base"))
            fields["kbit_preparation"] = draw.choice(("none", "none", "peft", "trl"))
            fields["autocast"] = draw.choice((None, None, "bf16"))
        strategy = draw.choice(("none",) * 8 + ("ddp", "fsdp2"))
        if strategy != "none":
            fields["parallel"] = {"strategy": strategy, "gpus": draw.choice((2, 4, 8))}
        capability, size = (
            draw.choice(((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))),
            2 ** draw.uniform(-NEAR, NEAR),
        )
        try:
            scenario = Scenario.from_mapping(fields | {"model": cut(model, layers)})
            parameters = describe(scenario.model).parameter_counts()["total"]
            form = analytic_estimate(scenario, capability=capability, blocks=False)
        except (UserError, NotDescribed):
            continue
        if (layers is None and parameters > WHOLE) or form["peak_allocated_bytes"] > MOST_BYTES:
            continue
        yield Drawn(scenario, capability, size)


def altered(questions: Iterator[Drawn], fields: Mapping[str, Any]) -> Iterator[Drawn]:
    """The questions with other values of some fields; those that can't have them, or already do, stay out."""
    for question in questions:
        try:
            scenario = question.scenario.changed(**fields)
            analytic_estimate(scenario, capability=question.capability, blocks=False)
        except (UserError, NotDescribed):
            continue
        if scenario != question.scenario:
            yield question._replace(scenario=scenario)


def cut(model: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """A model's configuration with fewer layers."""
    if layers is None:
        return dict(model)
    shallower = {**model, "num_hidden_layers": min(layers, model.get("num_hidden_layers", layers))}
    if "layer_types" in shallower:
        shallower["layer_types"] = shallower["layer_types"][: shallower["num_hidden_layers"]]
    return shallower


def measured(seed: int, question: Drawn) -> dict[str, Any] | None:
    """A row: what the closed form and the trace say of a step; None where it can't be traced."""
    from dryfit.tracing.trace import record

    scenario, capability, _ = question
    expandable, parallel = scenario.allocator.expandable_segments, scenario.parallel
    peak = analytic_estimate(scenario, capability=capability, blocks=False)["peak_allocated_bytes"]
    forms = [peak]
    if follows_allocations(scenario):
        events = form_events(scenario, capability=capability)
        forms = [
            capacities(one, expandable_segments=expandable).required_bytes
            for one in variations(events)
        ]
    try:
        recording = record(scenario, capability)
    except UserError:
        return None
    required = recording.required_bytes(expandable_segments=expandable)
    spots = [round(required * (1 - 0.1 * (spot + 1) / SPOTS)) for spot in range(SPOTS)]
    served = [spot for spot in spots if recording.fits(spot, expandable_segments=expandable)]
    return {
        "seed": seed,
        "model": scenario.model_name,
        "layers": scenario.size("num_hidden_layers"),
        "experts": describe(scenario.model).experts or 0,
        "parameters": describe(scenario.model).parameter_counts()["total"],
        "method": scenario.method,
        "strategy": parallel.strategy,
        "gpus": parallel.gpus,
        "precision": scenario.precision + (f"+{scenario.autocast}" if scenario.autocast else ""),
        "optimizer": scenario.optimizer,
        "expandable": int(expandable),
        "micro_batch": scenario.micro_batch,
        "sequence_length": scenario.sequence_length,
        "gradient_accumulation": scenario.gradient_accumulation,
        "loss": scenario.loss,
        "checkpointing": int(bool(scenario.gradient_checkpointing)),
        "attention": scenario.attention,
        "kbit_preparation": scenario.kbit_preparation,
        "capability": "{}.{}".format(*capability),
        "peak_form": peak,
        "required_form": forms[0],
        "lowest_form": min(forms),
        "highest_form": max(forms),
        "peak_trace": max(peak_blocks(events) for events in recording.sequences),
        "required_trace": required,
        "least_trace": min([required, *served]),
    }


class Judged(NamedTuple):
    """A verdict of the closed form, and what the replay of the traced step says at the GPU's size."""

    method: str
    says: bool | None
    fits: bool
    what: str


def judged(question: Drawn, cards: Random | None = None) -> Judged | None:
    """Ask the closed form about a GPU, and then the trace; None where the step can't be traced.

    With ``cards`` the GPU is one of the catalogue, drawn from them, and not one near the border.
    """
    from dryfit.tracing.trace import record

    scenario, capability, size = question
    if cards:
        card = cards.choice(list(catalogue().values()))
        capability = card.capability
    peak = analytic_estimate(scenario, capability=capability, blocks=False)["peak_allocated_bytes"]
    needs = Needs(scenario, peak, capability)
    about = needs.about_bytes if follows_allocations(scenario) else peak
    usable = card.usable_bytes if cards else round(about * size)
    says = needs.fits(usable)
    try:
        fits = record(scenario, capability).fits(
            usable, expandable_segments=scenario.allocator.expandable_segments
        )
    except UserError:
        return None
    layers = scenario.size("num_hidden_layers")
    what = f"{scenario.model_name} of {layers} layers, {line(scenario.to_mapping())}, on {usable / 2**30:.2f} GiB"
    return Judged(scenario.method, says, fits, what)


def judge(questions: Iterator[Drawn], count: int, cards: Random | None) -> int:
    """Print verdicts by method, and those that the trace refutes; exit status 1 if there is one."""
    judgements: list[Judged] = []
    for question in progress(islice(questions, count), "questions", total=count, unit="questions"):
        one = judged(question, cards)
        if one is None:
            continue
        judgements.append(one)
        if one.says not in (None, one.fits):
            print(f"refuted: {one.says} of {one.what}", flush=True)
    rows = []
    refuted = [one for one in judgements if one.says not in (None, one.fits)]
    for method in (*METHODS, "all"):
        own = [one for one in judgements if method in (one.method, "all")]
        counts = [sum(one.says is says for one in own) for says in (True, False, None)]
        wrong = sum(one in refuted for one in own)
        rows.append((method, len(own), *counts, wrong))
    print(
        markdown(
            ("method", "questions:", "fits:", "does not fit:", "too close to call:", "refuted:"),
            rows,
        )
    )
    return 1 if refuted else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation.quick_verdicts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        help="questions of the seed to pass over, for several processes",
    )
    parser.add_argument(
        "--append",
        type=Path,
        metavar="FILE",
        help="where rows of the closed form's errors go, as CSV",
    )
    parser.add_argument("--judge", action="store_true", help="verdicts instead, against the trace")
    parser.add_argument(
        "--cards", action="store_true", help="with GPUs of the catalogue, not those near the border"
    )
    parser.add_argument(
        "--with",
        dest="fields",
        type=yaml.safe_load,
        metavar="MAPPING",
        help="the same questions with other values: '{attention_mask: padding}'",
    )
    options = parser.parse_args(arguments)
    questions = drawn(options.seed)
    questions = islice(
        altered(questions, options.fields) if options.fields else questions, options.skip, None
    )
    if options.judge:
        return judge(questions, options.count, Random(options.skip) if options.cards else None)
    with options.append.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for _ in progress(range(options.count), "steps", total=options.count, unit="steps"):
            row = None
            while row is None:
                row = measured(options.seed, next(questions))
            writer.writerow(row)
            file.flush()
    return 0


if __name__ == "__main__":
    command(main)
