"""``will-it-fit``: the command line, whose options :mod:`will_it_fit.ask.options` lists, and what it prints."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

from will_it_fit.ask.options import RUN_OPTIONS, check, parser, suggested, without
from will_it_fit.common.errors import UserError
from will_it_fit.common.text import gib, printable

if TYPE_CHECKING:
    from will_it_fit.ask.question import Question


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises
    ------
    UserError
        For all words that are wrong, with the whole line as it was meant.
    """
    made = parser()
    check(words, made)
    _refuse_contradictions(words, made)
    return made.parse_args(words)


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:
        from will_it_fit.ask import run_program

        return run_program.main(words[1:])
    if words[:1] in (["diff"], ["check"]):
        from will_it_fit.ask import diff

        return (diff.main if words[0] == "diff" else diff.check)(words[1:])
    if words[:1] == ["mcp"]:
        from will_it_fit.ask import mcp_server

        return mcp_server.main(words[1:])
    if {"--measure", "--measured", "--snapshot"} & {word.partition("=")[0] for word in words}:
        from will_it_fit.ask import measure

        return measure.main(words)
    options = parse(words)
    if options.fresh:  # it belongs neither to the question nor to a line to type next
        words = [word for word in words if not (word.startswith("--fre") and "--fresh".startswith(word))]
    given: list[str] = []
    try:
        from will_it_fit.ask.question import Options, question
        from will_it_fit.ask.run_cost import parse_run_options, with_run

        run = parse_run_options(options) if any(getattr(options, name) for name in RUN_OPTIONS) else None
        asking = Options(
            gpu=options.gpu, method=options.method, sequence_length=options.sequence_length,
            micro_batch=options.micro_batch, strategy=options.strategy, settings=options.set, tool=options.tool,
            like=options.like, least_rows=2 if options.largest_batch else 1,
        )  # fmt: skip
        given = asking.given
        asked = question(options.what, asking)
        if run:
            asked = with_run(asked, run, gpu_needed=not options.all_gpus)
        if options.yaml:
            print(scenario_yaml(asked.scenario.to_mapping(), asked.model))
            return 0
        alone = question(options.what, replace(asking, least_rows=1, micro_batch=1)) if options.largest_batch else None
        answer = partial(_answer, asked, options, words, alone)
        return answer() if options.quick else _kept(words, [asked, alone], answer, fresh=options.fresh)
    except _Stopped as stopped:
        return stopped.status
    except UserError as error:
        raise _as_typed(error, words, given) from None
    except ModuleNotFoundError as error:
        problem = f"The package {error.name} is not installed, which the trace needs."
        print(UserError(problem, allowed="--quick, which does without", write=_INSTALL), file=sys.stderr)
        return 3


def _as_typed(error: UserError, words: Sequence[str], given: Iterable[str]) -> UserError:
    """An error of a field that the command line set, with the corrected command line as what to write.

    Parameters
    ----------
    given
        The fields that options set, ``lora.rank`` for a part.
    """
    if error.parts:
        return UserError.several([_as_typed(part, words, given) for part in error.parts])
    field, where = error.field or "", str(error.where or "")
    here = where.startswith(("--", "the command line")) or any(
        own == field or own.partition(".")[0] == field or field.startswith(f"{own}.") for own in given
    )
    if not here or not error.change:
        return error
    where = error.where if where.startswith("--") else "the command line"
    return error.with_values(where=where, write=suggested(words, error.change, instead_of=field))


_INSTALL = "pip install torch transformers peft bitsandbytes accelerate pyarrow"


def _kept(words: Sequence[str], asked: Sequence[Question | None], answer: Callable[[], int], *, fresh: bool) -> int:
    """Print the kept answer, unless a fresh one is asked for or none is kept; a fresh one is kept."""
    from will_it_fit.ask.kept import KeptAnswer

    kept = KeptAnswer(words, asked)
    status = None if fresh else kept.show()
    return kept.give(answer) if status is None else status


class _Stopped(Exception):
    """Ctrl-C ended the searches after the verdict: the answer stands as far as it goes, and is not kept."""

    def __init__(self, status: int) -> None:
        self.status = status


def _answer(asked: Question, options: argparse.Namespace, words: Sequence[str], alone: Question | None) -> int:
    """Answer in the form that was asked for; ``alone``: the step of one row, where the largest batch is asked for."""
    if options.serve:
        from will_it_fit.ask.serve import serve

        return _print(serve(asked, options.requests, options.weights), options.json)
    if options.all_gpus:
        return _print_cards(asked, options.json)
    if options.divide or options.fewest:
        from will_it_fit.ask.divisions import print_divisions, print_fewest

        progress = _Progress()
        try:
            return (print_divisions if options.divide else print_fewest)(asked, progress, options.json)
        finally:
            progress.end()
    tensors = options.count is not None or options.layers
    if tensors and not (options.explain or options.json):
        words = [*words, "--explain"]
        raise UserError(
            "--count and --layers list tensors of --explain or --json.", where="the command line",
            write=shlex.join(["will-it-fit", *words]),
        )  # fmt: skip
    if options.longest or options.largest_batch:
        return _print_largest(asked, "sequence_length" if options.longest else "micro_batch", options.json, alone)
    return _print_answer(asked, options, words)


_FORMS = ("--json", "--yaml", "--explain")  # of one answer
_KINDS = ("--longest", "--largest-batch", "--all-gpus", "--divide", "--fewest", "--compare", "--serve")  # of question
# Options that exclude each other, and why; the second goes.
_APART = (
    ("--longest", "--quick", "what is shown as fitting is traced"),
    ("--largest-batch", "--quick", "what is shown as fitting is traced"),
    ("--all-gpus", "--quick", "what is shown as fitting is traced"),
    ("--divide", "--quick", "what is shown as fitting is traced"),
    ("--fewest", "--quick", "what is shown as fitting is traced"),
    ("--compare", "--quick", "the trace is compared"),
    ("--count", "--quick", "tensors are traced"),
    ("--layers", "--quick", "tensors are traced"),
    ("--all-gpus", "--gpu", "the one asks about every GPU, the other about one"),
    *((one, other, "they are two forms of one answer") for one, other in combinations(_FORMS, 2)),
    *((one, other, "they are two questions") for one, other in combinations(_KINDS, 2)),
)  # fmt: skip


def _refuse_contradictions(words: Sequence[str], made: argparse.ArgumentParser) -> None:
    named = {word.partition("=")[0] for word in words}
    for kept, other, why in _APART:
        if kept in named and other in named:
            write = " ".join(["will-it-fit", *map(shlex.quote, without(words, made, other))])
            raise UserError(
                f"{other} and {kept} contradict each other: {why}.", where="the command line", allowed="one of them",
                write=write,
            )  # fmt: skip


def _print(answered: Any, as_json: bool) -> int:
    """Print a typed answer, and say whether it fits."""
    print(json.dumps(answered.to_mapping(), sort_keys=True) if as_json else answered.text())
    return 0 if answered.fits or answered.gpu is None else 1


class _Progress:
    """One line on standard error about the searches after the verdict: on a terminal always the same one."""

    def __init__(self, speaks: bool = True) -> None:
        self.speaks, self.found, self._width, self._stopped = speaks, [], 0, False

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let Ctrl-C raise :class:`KeyboardInterrupt` once, wherever it comes.

        Python drops an exception that is raised while an object is deleted. Then the next search does not begin.
        """

        def stop(*_: Any) -> None:
            self._stopped = True
            raise KeyboardInterrupt

        def unraisable(dropped: Any) -> None:
            if not isinstance(dropped.exc_value, KeyboardInterrupt):
                hook(dropped)

        hook, before = sys.unraisablehook, signal.signal(signal.SIGINT, stop)
        sys.unraisablehook = unraisable
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            sys.unraisablehook = hook

    def __call__(self, what: str, left: int, found: Sequence[Any]) -> None:
        self.found = found
        if self._stopped:
            raise KeyboardInterrupt
        more = f"; {left} more to try" if left else ""
        stand = f", {len(found)} found" if found else ""
        self._write(f"tracing alternatives: {what.replace('_', ' ')}{more}{stand} (Ctrl-C stops)")

    def _write(self, text: str) -> None:
        if not self.speaks:
            return
        if sys.stderr.isatty():
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the line away."""
        if self.speaks and self._width:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)


def _print_answer(asked: Any, options: argparse.Namespace, words: Sequence[str]) -> int:
    from will_it_fit.ask import answer, text

    if options.quick:
        return _print_quick(asked, options, words)
    if options.json or options.compare:
        progress = _Progress(sys.stderr.isatty())
        answered = answer.traced(asked, watch=progress, suggested=options.suggest)
        progress.end()
        if options.compare:
            from will_it_fit.ask.explain_measurement import difference

            print(difference(asked, answered, options.compare))
            return 0
        print(json.dumps(answered | _tensors(asked, options), sort_keys=True))
        return answer.exit_status(answered)
    return _print_as_it_comes(asked, options, words, text)


def _tensors(asked: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The largest tensors at the peak, where they are asked for; else nothing."""
    if options.count is None and not options.layers:
        return {}
    from will_it_fit.ask.explain import explain

    return explain(asked.scenario, asked.where, count=options.count or 10, layers=options.layers)


def _print_quick(asked: Any, options: argparse.Namespace, words: Sequence[str]) -> int:
    from will_it_fit.ask import answer, text
    from will_it_fit.ask.text import explanation

    answered = answer.quick(asked)
    if answered["analytic"] is None:
        print(printable("\n".join([answered["sentence"], *text.reading_lines(asked, answered)])), file=sys.stderr)
        return 3
    if options.json:
        print(json.dumps(answered, sort_keys=True))
    else:
        print("\n".join([text.full_text(asked, answered, words), *(explanation(answered) if options.explain else ())]))
    return answer.exit_status(answered)


def _print_as_it_comes(asked: Any, options: argparse.Namespace, words: Sequence[str], text: Any) -> int:
    """The verdict as soon as it stands, then what is found after it; Ctrl-C ends the searches, not the verdict."""
    from will_it_fit.ask import answer
    from will_it_fit.ask.text import explanation

    if sys.stderr.isatty():
        first = answer.quick(replace(asked, run=None), others=False)
        line = first["sentence"] if first["analytic"] else "No estimate of this step"
        print(f"{printable(line)}\nTracing the step itself, which takes some seconds ...", file=sys.stderr, flush=True)
    progress, verdict = _Progress(), {}

    def shown(stands: Mapping[str, Any]) -> None:
        verdict.update(stands)
        lines = [text.first_text(asked, stands), *(explanation(stands) if options.explain else ())]
        if tensors := _tensors(asked, options):
            from will_it_fit.ask.explain import table

            lines.append(table(tensors))
        print("\n".join(lines), flush=True)

    try:
        with progress.stoppable():
            answered = answer.traced(asked, shown, progress)
        progress.end()
    except KeyboardInterrupt:
        if not verdict:
            raise
        progress.end()
        print("stopped: what is shown was found until now", file=sys.stderr)
        answered = verdict | {"suggestions": [asdict(item) for item in progress.found]}
        if rest := text.rest_text(replace(asked, run=None), answered, words):
            print(rest)
        raise _Stopped(answer.exit_status(answered)) from None
    if rest := text.rest_text(asked, answered, words):
        print(rest)
    return answer.exit_status(answered)


def _print_cards(asked: Any, as_json: bool) -> int:
    from will_it_fit.ask import answer, run_cost
    from will_it_fit.ask.text import step_line
    from will_it_fit.cards.sentences import said

    rows = answer.on_all_gpus(asked)
    fitting = sum(row["fits"] is True for row in rows)
    status = 0 if as_json or any(row["fits"] and not run_cost.is_late(row) for row in rows) else 1
    if as_json:
        print(json.dumps(rows, sort_keys=True))
        return status
    print(f"FITS {fitting} of {len(rows)} GPUs: {step_line(asked.scenario.to_mapping())}")
    for row in rows:
        print(
            f"  {row['gpu']:<20}{gib(row['required_bytes']):>12} of {gib(row['usable_bytes']):>11}"
            f"   {said(row['verdict']):<21}{row['headroom_bytes'] / 2**30:+.2f} GiB"
            + (run_cost.cells(row["run"]) if "run" in row else "")
        )
    if asked.run:
        print("\n".join(run_cost.ranked(rows)))
    return status


def _print_largest(asked: Any, field: str, as_json: bool, alone: Question | None) -> int:
    from will_it_fit.ask import answer
    from will_it_fit.ask.text import step_line
    from will_it_fit.cards.gpus import EXPANDABLE_LINE
    from will_it_fit.cards.sentences import card

    largest = answer.largest_that_fits(asked, field, alone)
    if as_json:
        print(json.dumps({"field": field, **largest}, sort_keys=True))
        return 0 if largest["value"] else 1
    if "required_bytes" not in largest:  # of a cycle beside a server, which has phases instead of one figure
        found = f"answers of {largest['value']:,} tokens fit" if largest["value"] else "NOTHING FITS"
        print(f"{found} {card(asked.gpu.to_mapping())}, in steps of 256\nfor: {step_line(asked.scenario.to_mapping())}")
        return 0 if largest["value"] else 1
    what = "tokens" if field == "sequence_length" else "rows"
    step = step_line(asked.scenario.changed(**{field: max(largest["value"], 1)}).to_mapping())
    if not largest["value"]:
        print(f"NOTHING FITS {card(asked.gpu.to_mapping())}, not even the smallest: {step}")
        return 1
    end = "; the model's positions end it" if largest["limited_by_positions"] else ""
    on = card(asked.gpu.to_mapping())
    print(f"{largest['value']:,} {what} fit {on}, {gib(largest['headroom_bytes'])} to spare{end}")
    grown = asked.scenario.allocator.expandable_segments
    print(f"{largest['with_other_allocator']:,} {what} {'without' if grown else 'with'} {EXPANDABLE_LINE}")
    print(f"for: {step}")
    if not (grown or end):
        print(f"everything below fits as well; more {what} may fit by chance, depending on fragmentation")
    return 0


def scenario_yaml(mapping: dict[str, Any], asked: str) -> str:
    """The scenario as a file; fields as the defaults have them are left out, the model stands by its name if it can."""
    import yaml

    from will_it_fit.scenario.fields import scenario_defaults
    from will_it_fit.scenario.model import read_model

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
    from will_it_fit.common.terminal import command
    from will_it_fit.tracing import imports

    imports.ends_with_its_answer = True
    command(main)


if __name__ == "__main__":
    run()
