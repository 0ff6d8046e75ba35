"""will-it-fit: whether a fine-tuning step fits a GPU, asked in one line.

    will-it-fit Qwen/Qwen2.5-Coder-7B-Instruct --gpu 4090
    will-it-fit qwen2.5-coder-7b --method lora --gpu 2x3090 -s 2048 -b 4 --set lora.rank=64
    will-it-fit my-axolotl.yaml --gpu 24GiB
    will-it-fit qwen2.5-coder-7b --gpu 4070 --longest
    will-it-fit qwen2.5-coder-7b --all-gpus --rows 50000 --epochs 3 --price a100-80gb=1.29 --deadline 24h

WHAT is a model (a name in config/models/, an id on the Hub, a folder, a config.json), a scenario, a run's settings, or
a file of axolotl, LLaMA-Factory or TRL; a Python program or notebook with TRL or Unsloth; an adapter_config.json. Files
of accelerate, DeepSpeed or PEFT may follow. Nothing is executed. Exit status: 0 fits (or no GPU is named), 1 does not
fit, not by the deadline, or with --quick is too close to call, 2 something is wrong in the question, 3 no answer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from scripts.common.errors import UserError
from scripts.common.sizes import gib

if TYPE_CHECKING:
    from scripts.ask.question import Question

METHODS = ("full", "lora", "qlora")
STRATEGIES = ("none", "ddp", "fsdp1", "fsdp2", "zero2", "zero3")


class _Parser(argparse.ArgumentParser):
    """Errors of the command line in the form of all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"The command line is wrong: {message}.", where="will-it-fit",
            allowed="will-it-fit --help lists all options", write="will-it-fit qwen2.5-coder-7b --gpu 4090",
        )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = _Parser(prog="will-it-fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", nargs="+", metavar="WHAT", help="a model or a file; then files beside it")
    step = made.add_argument_group("the step")
    step.add_argument("--gpu", help="4090, 'A100 80GB', 2x3090, 24GiB, ...")
    step.add_argument("--method", choices=METHODS)
    step.add_argument("-s", "--sequence-length", type=_count, metavar="TOKENS")
    step.add_argument("-b", "--micro-batch", type=_count, metavar="ROWS")
    step.add_argument("--strategy", choices=STRATEGIES, help="how several GPUs are used (fsdp2 if --gpu names several)")
    step.add_argument("--like", choices=("trl", "peft", "axolotl"), help="what is not named as such scripts have it")
    step.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of a scenario")
    step.add_argument("--from", dest="tool", choices=("axolotl", "llama-factory", "trl"), help="who wrote the file")
    form = made.add_argument_group("the answer")
    form.add_argument("--json", action="store_true", help="for programs: the object of scripts.memory.predict")
    form.add_argument("--yaml", action="store_true", help="the scenario that the question means, to keep")
    form.add_argument("--quick", action="store_true", help="the analytic estimate alone, at once and without torch")
    form.add_argument("--explain", action="store_true", help="what is alive at the peak")
    kinds = made.add_mutually_exclusive_group()
    kinds.add_argument("--longest", action="store_true", help="the longest sequence that fits")
    kinds.add_argument("--largest-batch", action="store_true", help="the largest micro-batch that fits")
    kinds.add_argument("--all-gpus", action="store_true", help="every GPU of the catalogue")
    kinds.add_argument("--compare", metavar="nvidia-smi=14.2GiB", help="why something else was measured")
    kinds.add_argument("--serve", action="store_true", help="serving the model instead of training it")
    run = made.add_argument_group("the run", "hours, cost and energy, with --gpu or --all-gpus")
    run.add_argument("--rows", type=_count, metavar="N", help="rows of the training data")
    run.add_argument("--tokens-per-row", metavar="N", help="their mean length (all are as long as the longest)")
    run.add_argument("--epochs", metavar="N", help="how often each is seen (1)")
    run.add_argument("--price", action="append", default=[], metavar="NAME=PER_HOUR",
                     help="of one card an hour, in any currency; or a YAML file with a line for each card")  # fmt: skip
    run.add_argument("--deadline", metavar="24h", help="the run has to end within it: 90min, 24h, 3d")
    run.add_argument("--grams-per-kwh", metavar="GRAMS", help="CO2 of the electricity")
    serve = made.add_argument_group("with --serve")
    serve.add_argument("--requests", type=_count, default=1, metavar="N", help="requests at once (1)")
    serve.add_argument("--weights", default=None, help="bf16, fp16, nf4, or a GGUF quantization such as q4_k_m")
    return made


def _count(text: str) -> int:
    try:
        value = int(text.replace(",", "").replace("_", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    _refuse_contradictions(options)
    from scripts.ask.question import Options, question
    from scripts.ask.run import asked_of, of_run

    run = asked_of(options)
    try:
        asked = question(
            options.what,
            Options(
                gpu=options.gpu, method=options.method, sequence_length=options.sequence_length,
                micro_batch=options.micro_batch, strategy=options.strategy, settings=options.set, tool=options.tool,
                like=options.like,
            ),
        )  # fmt: skip
    except UserError as error:
        raise _of_the_command_line(error) from None
    asked = of_run(asked, run, gpu_needed=not options.all_gpus)
    if options.yaml:
        print(scenario_yaml(asked.scenario.to_mapping(), asked.model))
        return 0
    try:
        return _answer(asked, options, words)
    except ModuleNotFoundError as error:
        problem = f"The package {error.name} is not installed, which the trace needs."
        print(UserError(problem, allowed="--quick, which does without", write=_INSTALL), file=sys.stderr)
        return 3


_INSTALL = "pip install torch transformers peft bitsandbytes accelerate pyarrow"


def _answer(asked: Question, options: argparse.Namespace, words: Sequence[str]) -> int:
    """Answer in the form that was asked for."""
    if options.serve:
        from scripts.ask.serve import serve

        return _print(serve(asked, options.requests, options.weights), options.json)
    if options.all_gpus:
        return _print_cards(asked, options.json)
    if options.longest or options.largest_batch:
        return _print_largest(asked, "sequence_length" if options.longest else "micro_batch", options.json)
    return _print_answer(asked, options, words)


def _refuse_contradictions(options: argparse.Namespace) -> None:
    chosen = [f"--{name}" for name in ("json", "yaml", "explain") if getattr(options, name)]
    special = next((name for name in ("longest", "largest_batch", "all_gpus", "serve") if getattr(options, name)), None)
    problems = (
        (len(chosen) > 1, f"{' and '.join(chosen)} are several forms of one answer", chosen[:1]),
        (options.quick and special in ("longest", "largest_batch", "all_gpus"),
         f"--quick and --{(special or '').replace('_', '-')} contradict each other: what is shown as fitting is traced",
         [f"--{(special or '').replace('_', '-')}"]),
        (options.all_gpus and options.gpu is not None, "--all-gpus and --gpu contradict each other", ["--all-gpus"]),
        (options.quick and options.compare, "--quick and --compare contradict each other: the trace is compared",
         ["--compare", str(options.compare)]),
    )  # fmt: skip
    for wrong, problem, write in problems:
        if wrong:
            raise UserError(
                f"{problem}.", where="the command line", allowed="one of them",
                write=" ".join(["will-it-fit", *options.what, *write]),
            )  # fmt: skip


def _of_the_command_line(error: UserError) -> UserError:
    """An error of a scenario's field as one of the option that set it."""
    if error.parts:
        return UserError.several([_of_the_command_line(part) for part in error.parts])
    write = error.write or ""
    if str(error.where) == "--gpu" and write.startswith("gpu: "):
        write = f"--gpu {write.removeprefix('gpu: ')}"
    elif str(error.where) == "the command line" and re.match(r"\w+:\s", write):
        write = _as_options(write)
    return UserError(error.problem, where=error.where, found=error.found, allowed=error.allowed, write=write or None)


def _as_options(line: str) -> str:
    """A line of a scenario as options."""
    import yaml

    try:
        given = yaml.safe_load(line)
    except yaml.YAMLError:
        return line
    if not isinstance(given, dict):
        return line
    flags = {"model": "will-it-fit", "sequence_length": "-s", "micro_batch": "-b", "method": "--method", "gpu": "--gpu"}
    words = []
    for name, value in given.items():
        if name in flags and not isinstance(value, dict):
            words.append(f"{flags[name]} {value}")
        elif isinstance(value, dict):
            words += [f"--set {name}.{part}={json.dumps(item).strip(chr(34))}" for part, item in value.items()]
        else:
            words.append(f"--set {name}={json.dumps(value).strip(chr(34))}")
    return " ".join(words)


def _print(found: Any, as_json: bool) -> int:
    """Print a typed answer, and say whether it fits."""
    print(json.dumps(found.to_mapping(), sort_keys=True) if as_json else found.text())
    return 1 if found.fits is False else 0


def _print_answer(asked: Any, options: argparse.Namespace, words: Sequence[str]) -> int:
    from scripts.ask import answer, text
    from scripts.memory.answer_text import explanation, verdict_line

    if not (options.quick or options.json) and sys.stderr.isatty():
        first = answer.quick(replace(asked, run=None), others=False)
        line = verdict_line(first) if first["analytic"] else "No estimate of this step"
        print(f"{line}\nTracing the step itself, which takes some seconds ...", file=sys.stderr, flush=True)
    found = answer.quick(asked) if options.quick else answer.traced(asked)
    if options.quick and found["analytic"] is None:
        print("\n".join([verdict_line(found), *text.reading_lines(asked, found)]), file=sys.stderr)
        return 3
    if options.compare:
        from scripts.ask.difference import difference

        print(difference(asked, found, options.compare))
        return 0
    if options.json:
        print(json.dumps(found, sort_keys=True))
    else:
        print(text.full_text(asked, found, words))
        if options.explain:
            print("\n".join(explanation(found)))
    return answer.exit_status(found)


def _print_cards(asked: Any, as_json: bool) -> int:
    from scripts.ask import answer, run
    from scripts.memory.answer_text import step_line

    rows = answer.on_all_gpus(asked)
    fitting = sum(row["fits"] for row in rows)
    status = 0 if as_json or any(row["fits"] and not run.is_late(row) for row in rows) else 1
    if as_json:
        print(json.dumps(rows, sort_keys=True))
        return status
    print(f"FITS {fitting} of {len(rows)} GPUs: {step_line(asked.scenario.to_mapping())}")
    for row in rows:
        word = "fits" if row["fits"] else "does not fit"
        print(
            f"  {row['gpu']:<20}{gib(row['required_bytes']):>12} of {gib(row['usable_bytes']):>11}"
            f"   {word:<14}{row['headroom_bytes'] / 2**30:+.2f} GiB" + (run.cells(row["run"]) if "run" in row else "")
        )
    if asked.run:
        print("\n".join(run.ranked(rows)))
    return status


def _print_largest(asked: Any, field: str, as_json: bool) -> int:
    from scripts.ask import answer
    from scripts.memory.answer_text import card, step_line
    from scripts.memory.gpus import EXPANDABLE_LINE

    found = answer.largest_that_fits(asked, field)
    if as_json:
        print(json.dumps({"field": field, **found}, sort_keys=True))
        return 0 if found["value"] else 1
    what = "tokens" if field == "sequence_length" else "rows"
    step = step_line(asked.scenario.changed(**{field: max(found["value"], 1)}).to_mapping())
    if not found["value"]:
        print(f"NOTHING FITS {card(asked.gpu.to_mapping())}, not even the smallest: {step}")
        return 1
    end = "; the model's positions end it" if found["limited_by_positions"] else ""
    on = card(asked.gpu.to_mapping())
    print(f"{found['value']:,} {what} fit {on}, {gib(found['headroom_bytes'])} to spare{end}")
    grown = asked.scenario.allocator.expandable_segments
    print(f"{found['with_other_allocator']:,} {what} {'without' if grown else 'with'} {EXPANDABLE_LINE}")
    print(f"for: {step}")
    if not (grown or end):
        print(f"everything below fits as well; if more {what} fit, it is by luck: what is free lies in fragments")
    return 0


def scenario_yaml(mapping: dict[str, Any], asked: str) -> str:
    """The scenario as a file; fields as the defaults have them are left out, the model stands by its name if it can."""
    import yaml

    from scripts.settings.model import read_model
    from scripts.settings.scenario import scenario_defaults

    defaults = scenario_defaults()
    kept = {name: value for name, value in mapping.items() if value is not None and value != defaults.get(name)}
    kept = {"model": kept.pop("model"), **kept}
    try:
        if asked and read_model(asked, "the scenario")[0] == mapping["model"]:
            kept["model"] = asked
            kept.pop("model_name", None)
    except UserError:
        pass
    return yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, width=100).rstrip()


def run() -> None:
    """The console script."""
    from scripts.common.job import command

    command(main)


if __name__ == "__main__":
    run()
