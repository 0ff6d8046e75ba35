"""``config``: the fastest settings that fit, as the complete file of the tool that will train with them.

Each candidate is the tool's own file (``data/writers.yaml``). Our reader reads it, and what it reads is answered. So
the file that is printed has the verdict that is printed, and no second description of the tool's keys stands here.

The search is the planner's (:mod:`dryfit.planner.fastest`): the traced time of a token ranks what fits. Where nobody
knows the card's speed, or nothing is traced, rules of thumb rank, and the file says so.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dryfit.readers as readers
from dryfit.ask.answer import quick, traced
from dryfit.ask.options import json_line
from dryfit.ask.question import Question, QuestionOptions, question
from dryfit.cards.gpus import Gpu
from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml, write_text, yaml_value
from dryfit.common.text import gib, yaml_text
from dryfit.common.versions import INSTALL_TRACE, can_trace
from dryfit.hours.run_time import Run
from dryfit.planner.fastest import Candidate, Search, Way
from dryfit.readers import torchtune
from dryfit.scenario.hub import repository_of

WRITERS = Path(__file__).resolve().parents[1] / "data" / "writers.yaml"
MICRO_BATCHES = (16, 8, 4, 2, 1)
ROWS_OF_AN_UPDATE = 16  # micro-batch x accumulation x GPUs, as the examples of these tools have it
_FLASH_CAPABILITY = (8, 0)  # github.com/Dao-AILab/flash-attention, README: Ampere and newer
_BF16_CAPABILITY = (
    8,
    0,
)  # CUDA C++ Programming Guide, arithmetic instructions: bfloat16 from 8.0 on
_RATE = {"qlora": 2e-4, "lora": 2e-4, "full": 1e-5}
_DATA = "YOUR_DATA"
_FOLLOW_THE_METHOD = ("quantized", "adapter")  # places in a file where the method's text goes on
_TAKES = ("lora.rank", "lora.alpha", "lora.dropout")
# Fields that may be set beside the question, with the knob that each one is, and its values as files' knobs call them.
_PINS: dict[str, tuple[str, Mapping[str, str]]] = {
    "attention": ("attention", {}),
    "gradient_checkpointing": ("checkpointing", {"True": "on", "False": "off"}),
    "kernels": ("kernels", {}),
    "optimizer": ("optimizer", {}),
    "packing": ("packing", {"none": "off", "rows": "on"}),
}


@cache
def writers() -> dict[str, dict[str, Any]]:
    """What ``data/writers.yaml`` says of each tool."""
    return read_yaml(WRITERS)


@dataclass(frozen=True)
class Wanted:
    """What a file is written for."""

    tool: str
    method: str | None
    # What the text of a file takes: model, sequence_length, rank, alpha, dropout, epochs, learning_rate, data
    values: Mapping[str, Any]
    options: QuestionOptions
    gpu: Gpu
    fill: float  # share of a padded row that is no padding: the rows' mean length over the longest
    run: Run | None
    pins: Mapping[str, str]  # knobs that the question sets, with their values
    notes: Sequence[
        str
    ]  # what was asked for that the tool's file can't say, and what stands there instead


def named(one: Candidate) -> str:
    """What sets a candidate apart, in words."""
    said = [
        f"{knob} {value}"
        for knob, value in one.way.items()
        if knob not in (*_FOLLOW_THE_METHOD, "parallel")
    ]
    return ", ".join([f"{one.micro_batch} row{'s' * (one.micro_batch != 1)} a micro-batch", *said])


@dataclass(frozen=True)
class Configured:
    """The file, and what else would do; ``best.fits`` False: nothing fits, and this is the nearest."""

    best: Candidate
    others: Sequence[Candidate]
    is_timed: bool
    start: str
    goal: Wanted

    def text(self) -> str:
        """The whole file, its header a comment."""
        return "\n".join([*(f"# {line}" for line in self.header()), self.best.text.rstrip(), ""])

    def header(self) -> list[str]:
        answer = self.best.answer or {}
        lines = [answer["sentence"], f"start: {self.start}", f"settings: {named(self.best)}"]
        if rate := self.best.tokens_per_second(self.goal.fill):
            lines.append(f"about {rate:,.0f} tokens of your data a second")
        if not answer.get("trace"):
            lines.append("Estimated, not traced: ranked by rules of thumb, not by times.")
        elif not self.is_timed:
            lines.append("No speed of this GPU is known: ranked by rules of thumb, not by times.")
        if run := answer.get("run"):
            cost = f", {run['cost']:.2f} at your price" if run.get("cost") else ""
            lines.append(f"the run: {run['hours']:.1f} hours{cost}")
        lines += [*self.goal.notes, *_own_ways(self.goal.tool)]
        if _DATA in self.best.text:
            lines.append(f"write your data in the place of {_DATA}")
        if self.others:
            lines.append("the next best:")
        for other in self.others:
            rate = other.tokens_per_second(self.goal.fill)
            speed = f"; {rate:,.0f} tokens a second" if rate else ""
            size = f": {gib(other.required_bytes)}" if other.required_bytes else ""
            lines.append(f"  {named(other)}{size}{speed}")
        return lines

    def to_mapping(self) -> dict[str, Any]:
        return {
            "tool": self.goal.tool,
            "file": writers()[self.goal.tool]["file"],
            "text": self.text(),
            "start": self.start,
            "answer": self.best.answer,
            "settings": {**self.best.way, "micro_batch": self.best.micro_batch},
            "others": [{**one.way, "micro_batch": one.micro_batch} for one in self.others],
            "ranked_by": "traced times" if self.is_timed else "rules of thumb",
        }


def _own_ways(tool: str) -> list[str]:
    """Settings that other tools' files have and this one's does not."""
    lacks = [knob for knob, _ in _PINS.values() if len(writers()[tool]["knobs"].get(knob, ())) < 2]
    return [f"{tool} has no key here for {', '.join(lacks)}: its own way stands"] if lacks else []


def wanted(asked: Question, tool: str, options: QuestionOptions, run: Run | None) -> Wanted:
    """What a file has to be for, from the question about a model.

    UserError: if the tool can't express what was asked.
    """
    form, scenario = writers()[tool], asked.scenario
    if asked.reading is not None and asked.reading.tool not in ("", "Hub"):
        raise UserError(
            "A file is written for a model, and this is a file already.",
            where="the command line",
            found=asked.where,
            allowed="a model's name or its id on the Hub",
            change={"model": asked.model or "qwen2.5-coder-7b"},
        )
    if not asked.gpu.is_modelled:
        raise UserError(
            "A file is written for a GPU.",
            where="the command line",
            allowed="--gpu NAME or NxNAME",
            change={"gpu": "4090"},
        )
    pins, notes = _pins(tool, options.settings)
    if options.method and options.method not in form["knobs"]["method"]:
        near = next(iter(form["knobs"]["method"]))
        raise UserError(
            f"{tool} has no file for method {options.method}.",
            where="--method",
            found=options.method,
            allowed=", ".join(form["knobs"]["method"]),
            change={"method": near},
        )
    lora, has_bf16 = (
        scenario.lora,
        asked.gpu.capability is None or asked.gpu.capability >= _BF16_CAPABILITY,
    )
    half = "bf16" if has_bf16 else "fp16"
    if half in form.get("instead", {}):
        half, why = form["instead"][half]
        notes.append(why)
    model = repository_of(asked.model)
    values = {
        "model": model,
        "sequence_length": scenario.sequence_length,
        "data": _DATA,
        "rank": lora.rank if lora else 16,
        "alpha": lora.alpha if lora else 32,
        "dropout": lora.dropout if lora else 0.0,
        "epochs": f"{run.epochs if run else 1:g}",
        "half": half,
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[half],
    }
    if tool == "torchtune":
        values |= torchtune.named_in_a_file(scenario.model, asked.model, form)
    if tool == "pipeline":
        values |= _pipeline(asked, model) | {"epochs": ceil(run.epochs) if run else 1}
    mean = run.tokens_per_row if run and run.tokens_per_row else scenario.sequence_length
    fill = min(1.0, mean / scenario.sequence_length)
    return Wanted(tool, options.method, values, options, asked.gpu, fill, run, pins, notes)


def _pins(tool: str, settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The knobs that ``--set`` names, and what of them the tool's file can't say."""
    pins, notes, knobs = {}, [], writers()[tool]["knobs"]
    for text in settings:
        name, _, written = (part.strip() for part in text.partition("="))
        if name in _TAKES:
            continue
        if name not in _PINS:
            raise UserError(
                f"`config` chooses the settings itself; {name} can't be set beside them.",
                where="--set",
                found=text,
                allowed=f"{', '.join([*_TAKES, *_PINS])}; --method, -s, -b",
                field=name,
                change={name.partition(".")[0]: None},
            )
        knob, words = _PINS[name]
        value = str(yaml_value(written, "--set"))
        value = words.get(value, value)
        if value in knobs.get(knob, ()):
            pins[knob] = value
        else:
            known = ", ".join(knobs.get(knob, ())) or "its own way"
            notes.append(f"{tool}'s file can't say {text} here; chosen from {known}")
    return pins, notes


def _pipeline(asked: Question, model: str) -> dict[str, Any]:
    """What a run's settings say of a model: where its weights come from, and what folders are called."""
    readers.pipeline("--for", {"--for": "axolotl"})
    folder = Path(asked.model)
    title = folder.resolve().name if folder.exists() else model.rpartition("/")[2]
    hub = f"type: hub\n    repository: {model}\n    revision: main"
    return {
        "title": title,
        "slug": re.sub(r"[^a-z0-9._-]+", "-", title.lower()).strip("-._") or "model",
        "source": f"type: folder\n    path: {folder}" if folder.exists() else hub,
        "profiled": asked.model,
        "gpu": yaml_text(asked.gpu.setting),
        "gpus": asked.gpu.count,
    }


def ways(goal: Wanted) -> Iterator[dict[str, str]]:
    """The ways in which the tool can take the step on this card, without micro-batches."""
    knobs = {name: list(values) for name, values in writers()[goal.tool]["knobs"].items()}
    knobs |= {knob: [value] for knob, value in goal.pins.items()}
    methods = [goal.method] if goal.method else [name for name in knobs["method"] if name != "full"]
    follows = [knob for knob in _FOLLOW_THE_METHOD if knobs.pop(knob, None)]
    parallel = knobs.pop("parallel", None)
    for values in product(*({**knobs, "method": methods}).values()):
        way = dict(zip(knobs, values, strict=True))
        has_flash = goal.gpu.capability is not None and goal.gpu.capability >= _FLASH_CAPABILITY
        if way.get("attention") == "flash" and not has_flash:
            continue
        if (
            way.get("packing") == "on"
            and goal.pins.get("packing") != "on"
            and way.get("attention", "flash") != "flash"
        ):
            continue  # rows of a pack see each other where the kernel has no borders
        way |= dict.fromkeys(follows, way["method"])
        if parallel:
            way["parallel"] = (
                "one" if goal.gpu.count == 1 else "fsdp2" if way["method"] == "full" else "ddp"
            )
        yield way


def rendered(goal: Wanted, way: Mapping[str, str], micro_batch: int) -> str:
    """The tool's file for a way and a micro-batch."""
    form, rows = writers()[goal.tool], micro_batch * goal.gpu.count
    values = {
        **goal.values,
        "micro_batch": micro_batch,
        "gradient_accumulation": max(1, round(ROWS_OF_AN_UPDATE / rows)),
        "learning_rate": f"{_RATE[way['method']]:.1e}",
    }
    blocks: dict[str, str] = {}
    for knob in reversed(form["knobs"]):  # `method` may hold the others
        blocks[knob] = form["knobs"][knob][way[knob]].format(**values, **blocks)
    lines = form["text"].format(**values, **blocks).splitlines()
    return "\n".join(
        line.rstrip() for line in lines if line.strip() or form["file"].endswith(".py")
    )


def configure(
    goal: Wanted,
    watch: Callable[[str, int, Sequence[Any]], None] | None = None,
    *,
    is_traced: bool = True,
) -> Configured:
    """Search for the most tokens a second that fit; without a trace the estimate answers.

    UserError: if the tool's reader can't read what the tool would be given, or nothing answers without a trace.
    """
    form = writers()[goal.tool]
    method = goal.method or next(iter(form["knobs"]["method"]))
    all_ways = list(ways(goal))
    # The most frugal has the last values of all knobs but the method.
    saving = [
        way
        for way in reversed(all_ways)
        if way["method"] == method and way.get("checkpointing") != "off"
    ]
    with TemporaryDirectory() as folder:
        path = Path(folder) / form["file"]

        def made(way: Way, micro_batch: int) -> Candidate:
            text = rendered(goal, way, micro_batch)
            path.write_text(text + "\n", encoding="utf-8")
            asked = question([path], QuestionOptions(gpu=goal.options.gpu))
            return Candidate(way, micro_batch, text, replace(asked, run=goal.run))

        answer = partial(traced, suggested=False) if is_traced else partial(quick, others=False)
        search = Search(all_ways, saving, _micro_batches(goal), goal.fill, is_traced, made, answer)
        done = search.answered(watch, named)
    if not done:
        raise UserError(
            "The estimate describes none of these steps.",
            where="--quick",
            allowed="a trace, without --quick",
            write=None if can_trace() else INSTALL_TRACE,
            field="--quick",
        )
    fitting = [one for one in done if one.fits]
    is_timed = all(one.tokens_per_second(goal.fill) is not None for one in done)

    def speed(one: Candidate) -> float:
        return one.tokens_per_second(goal.fill) if is_timed else one.prior(goal.fill)

    if fitting:
        best, *others = sorted(fitting, key=speed, reverse=True)
    else:  # the nearest, with what is missing
        best, *others = sorted(done, key=lambda one: one.required_bytes or 0)
    start = form[
        "start" if goal.gpu.count == 1 or "start_several" not in form else "start_several"
    ].format(
        file=shlex.quote(form["file"]),
        gpus=goal.gpu.count,
        trains="full" if best.way["method"] == "full" else "lora",
    )
    return Configured(best, others[:2], is_timed, start, goal)


def _micro_batches(goal: Wanted) -> Sequence[int]:
    own = goal.options.micro_batch
    return (
        (own,)
        if own
        else [size for size in MICRO_BATCHES if size * goal.gpu.count <= ROWS_OF_AN_UPDATE] or [1]
    )


def print_config(found: Configured, options: Any, read_as: str) -> int:
    """Print and write the file; exit status 0, or 1 where nothing fits or the run ends too late."""
    if options.output:
        _write(Path(options.output), found)
    print(json_line(found.to_mapping(), read_as) if options.json else found.text().rstrip())
    run = (found.best.answer or {}).get("run") or {}
    return 0 if found.best.fits and run.get("in_time") is not False else 1


def _write(path: Path, found: Configured) -> None:
    if path.exists():
        raise UserError(
            "The file is there already.",
            where="--output",
            found=str(path),
            allowed="a new file",
            change={"--output": f"{path.stem}-{found.goal.tool}{path.suffix}"},
        )
    write_text(path, found.text())
