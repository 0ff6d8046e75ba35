"""The command line: what :mod:`dryfit.ask.options` says of it, read, answered and printed."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dryfit.ask.options import (
    COMMANDS,
    OPTIONS,
    PROGRAM,
    RUN_OPTIONS,
    json_line,
    own_parser,
    parsed,
    parser,
    split,
)
from dryfit.common.errors import UserError
from dryfit.common.terminal import now_doing, working
from dryfit.common.text import printable
from dryfit.common.versions import INSTALL_TRACE, can_trace

if TYPE_CHECKING:
    from dryfit.ask.question import Question


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        parser().print_help()
        return 0 if words else 2
    if words[0] == "--version":
        print(version())
        return 0
    if words[-2:] == ["--set", "list"]:
        from dryfit.ask.text import field_lines

        print("\n".join(field_lines()))
        return 0
    if words[0].partition("=")[0] == "--print-completion":
        from dryfit.ask.completion import script

        print(script("".join(words[1:]) or words[0].partition("=")[2]))
        return 0
    command, rest = split(words)
    if command in _OF_OTHERS:  # each is imported alone, behind its help
        options = own_parser(command).parse_args(rest, argparse.Namespace(words=rest))
        module, function = _OF_OTHERS[command]
        return getattr(import_module(f"dryfit.ask.{module}"), function)(options)
    cut = rest.index("--") if "--" in rest and command == "measure" else len(rest)
    program, words = rest[cut + 1 :], words[: len(words) - len(rest) + cut]
    if {"-h", "--help"} & set(words):
        parsed(words)  # prints the command's own help, and ends
    if command == "fit":
        from dryfit.ask import recipe

        if (status := recipe.answered(words)) is not None:
            return status
    try:
        return _answered(read(words), program)
    except _Stopped as stopped:
        return stopped.status


# Commands that are not about a WHAT: their modules and functions.
_OF_OTHERS = {
    "run": ("run_program", "main"),
    "diff": ("diff", "main"),
    "check": ("diff", "check"),
    "mcp": ("mcp_server", "main"),
}


def version() -> str:
    """Versions of this package and of what the trace runs, and the catalogue's date."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from dryfit.cards.gpus import catalogue_date
    from dryfit.common.versions import STACK, VERSION

    def known(name: str) -> str:
        try:
            return installed(name)
        except PackageNotFoundError:
            return "not installed"

    stack = ", ".join(f"{name} {known(name)}" for name in STACK)
    return f"{PROGRAM} {VERSION}; {stack}; GPUs as of {catalogue_date()}"


# --- a line, read -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnderstoodLine:
    """A line that was understood; ``alone``: the step of one row, where the largest batch is asked for."""

    words: Sequence[str]
    options: argparse.Namespace
    question: Question
    alone: Question | None


def read(words: Sequence[str]) -> UnderstoodLine:
    """Read a line and what it names. ``read_as`` of its question is the line, where it was asked in plain words.

    UserError: for all that is wrong in it, with one line in which all of it is put right.
    """
    from dryfit.ask.words import PASTED, Understood, changed, lost_format, meant, read_as

    kept, errors, asked = list(words), list[UserError](), None
    for _ in range(_MOST_ERRORS):
        kept, found = meant(kept)
        errors += found
        if found:
            continue
        options = parsed(kept)
        asking = _asking(options)
        try:
            asked = UnderstoodLine(kept, options, *_questions(options, asking))
            break
        except UserError as error:
            before = kept
            for part in error.parts or (error,):
                if _is_typed(part, asking.given):
                    where = part.where if str(part.where).startswith("--") else "the command line"
                    kept = changed(kept, part.change, instead_of=part.field)
                    part = part.with_values(
                        where=where,
                        write=PASTED,
                        problem=part.problem + lost_format(part.found, part.change.get("model")),
                    )
                errors.append(part)
            if kept == before:
                break
    if asked and all(isinstance(error, Understood) for error in errors):
        asked.question.read_as = (
            read_as(asked.words, asked.question.gpu and asked.question.gpu.name) if errors else ""
        )
        return asked
    raise UserError.several(_with_the_line(errors, kept, asked is not None))


def _with_the_line(
    errors: Sequence[UserError], kept: Sequence[str], is_right: bool
) -> list[UserError]:
    """Errors of a line with the one in which all of them are put right.

    That line was read once more. It is shown where nothing is wrong in it but files that it names, or a model's name
    alone.
    """
    from dryfit.ask.words import PASTED, suggested
    from dryfit.scenario.other_models import RUN

    line = shlex.join([PROGRAM, *kept])
    if any(part.write == RUN for part in errors):  # no line of this command answers
        gpu = next((value for flag, value in pairwise(kept) if flag == "--gpu"), None)
        line = RUN.replace(" run ", f" run --gpu {shlex.quote(gpu)} ") if gpu else RUN
        return [part.with_values(write=line) for part in errors]
    left = [
        part
        for part in errors
        if part.write != PASTED and str(part.where).startswith(("--", "the command line"))
    ]
    model = [part for part in left if part.field == "model" and not part.change]
    if model and "/" not in str(
        model[0].found
    ):  # a name that is not known; an id was asked of the Hub
        line = suggested(kept, {"model": "OWNER/NAME"})
        errors = [part.with_values(write=PASTED) if part in model else part for part in errors]
    if not is_right and len(model) < len(left):
        line = None
    return [
        part.with_values(write=line, change=None) if part.write == PASTED else part
        for part in errors
    ]


_MOST_ERRORS = 8  # of one line: some are found only when others are put right


def _asking(options: argparse.Namespace) -> Any:
    from dryfit.ask.question import QuestionOptions

    least_rows = 2 if options.command == "batch" else 1
    return QuestionOptions.of({**vars(options), "settings": options.set, "least_rows": least_rows})


def _questions(options: argparse.Namespace, asking: Any) -> tuple[Question, Question | None]:
    from dryfit.ask.question import question
    from dryfit.ask.run_cost import parse_run_options, with_run

    run = (
        parse_run_options(options) if any(getattr(options, name) for name in RUN_OPTIONS) else None
    )
    asked = question(options.what, asking)
    if asked.gpu is None and "--gpu" in COMMANDS[options.command].needs:
        raise UserError(
            f"`{PROGRAM} {options.command}` needs a GPU, and the file names none.",
            where="the command line",
            allowed=OPTIONS["--gpu"]["help"],
            change={"gpu": "24GiB"},
        )
    if run:
        asked = with_run(asked, run, gpu_needed=options.command != "gpus")
    if options.command == "serve":
        from dryfit.ask.serve import refuse_several

        refuse_several(asked)
    if options.command == "config":
        from dryfit.ask.configure import wanted

        wanted(asked, options.tool_for, asking, run)
    is_batch = options.command == "batch"
    alone = (
        question(options.what, replace(asking, least_rows=1, micro_batch=1)) if is_batch else None
    )
    return asked, alone


def _is_typed(error: UserError, given: Iterable[str]) -> bool:
    """Whether the line itself is wrong, and not a file that it names; ``given``: the fields that its options set."""
    field, where = error.field or "", str(error.where or "")
    here = where.startswith(("--", "the command line")) or any(
        own == field or own.partition(".")[0] == field or field.startswith(f"{own}.")
        for own in given
    )
    return here and bool(error.change)


# --- a question, answered ---------------------------------------------------------------------------------------------


_ends_with_its_answer = (
    False  # whether the process is the console script's (dryfit.tracing.imports)
)


def _answered(asked: UnderstoodLine, program: Sequence[str]) -> int:
    if _ends_with_its_answer:
        from dryfit.tracing import imports

        imports.ends_with_its_answer = True
    options, command = asked.options, asked.options.command
    if not can_trace() and not (options.quick or options.yaml or command == "serve"):
        missing = "The packages that trace a step are not installed"
        if "--quick" not in (COMMANDS[command].takes or ()) or (
            options.rows and command in ("fit", "gpus")
        ):
            problem = (
                f"{missing}, and `{PROGRAM} {'--rows' if options.rows else command}` needs a trace."
            )
            print(
                UserError(
                    problem, allowed=f"`{PROGRAM} fit`, which estimates", write=INSTALL_TRACE
                ),
                file=sys.stderr,
            )
            return 3
        print(
            f"{missing}: the estimate answers. For the exact answer: {INSTALL_TRACE}",
            file=sys.stderr,
        )
        options.quick = True
    if command in ("measure", "compare"):
        from dryfit.ask import measure

        if command == "measure":
            return measure.measure(asked.question, program, options.record and Path(options.record))
        return measure.compare(asked.question, options.measured)
    if question_line := asked.question.read_as:
        mark = "# " if options.yaml or command == "config" else ""
        to = sys.stderr if options.json else sys.stdout
        if not options.json or command == "gpus":
            print(f"{mark}Read as: {question_line}", file=to, flush=True)
    if options.yaml:
        from dryfit.ask.text import scenario_yaml

        print(scenario_yaml(asked.question.scenario.to_mapping(), asked.question.model))
        return 0
    if options.quick:
        return _print_kind(asked)
    from dryfit.common.kept import kept_or_given

    asked = replace(asked, words=[word for word in asked.words if word != "--fresh"])
    return kept_or_given(
        asked.words,
        [asked.question, asked.alone],
        partial(_print_kind, asked),
        fresh=bool(options.fresh),
    )


def _print_kind(asked: UnderstoodLine) -> int:
    options, question = asked.options, asked.question
    match options.command:
        case "serve":
            from dryfit.ask.serve import serve

            served = serve(question, options.requests or 1, options.weights)
            print(
                json_line(served.to_mapping(), question.read_as) if options.json else served.text()
            )
            return 0 if served.verdict.fits or served.gpu is None else 1
        case "config":
            from dryfit.ask.configure import configure, print_config, wanted

            goal = wanted(question, options.tool_for, _asking(options), question.run)
            with working("looking for the fastest settings that fit"):
                found = configure(goal, _Progress(), is_traced=not options.quick)
            return print_config(found, options, question.read_as)
        case "divide":
            from dryfit.ask.divisions import print_divisions, print_fewest

            return (print_fewest if options.fewest else print_divisions)(
                question, _Progress(), options.json
            )
        case "gpus" | "longest" | "batch":
            return _print_searched(asked)
    return _print_answer(question, options, asked.words)


def _print_searched(asked: UnderstoodLine) -> int:
    """The cards, or the largest step, that fit; then what the answer leaves out of the model, and how to go on."""
    from dryfit.ask import answer, run_cost, text

    options, question = asked.options, asked.question
    if options.command == "gpus":
        with working("tracing the step for every GPU"):
            found = answer.on_all_gpus(question, estimated=bool(options.quick))
        is_found = options.json or any(row["fits"] and not run_cost.is_late(row) for row in found)
        shown = (
            json.dumps(found, sort_keys=True)
            if options.json
            else text.cards_text(question, found, options.quick)
        )
    else:
        field = "sequence_length" if options.command == "longest" else "micro_batch"
        with working("looking for the largest step"):
            found = answer.largest_that_fits(
                question, field, asked.alone, estimated=bool(options.quick)
            )
        is_found = found["value"]
        mapping = {"field": field, **found}
        shown = (
            json_line(mapping, question.read_as)
            if options.json
            else text.largest_text(question, field, found)
        )
    print(shown)
    if not options.json:
        print(*(f"  warning: {warning}\n" for warning in question.asked.warnings), sep="", end="")
        if not is_found and options.command != "gpus":
            fit = [word for word in asked.words[1:] if word != "--quick"]
            print(f"for what would fit: {shlex.join([PROGRAM, *fit])}")
    return 0 if is_found else 1


class _Stopped(Exception):
    """Ctrl-C ended the searches after the verdict: the answer stands as far as it goes, and is not kept."""

    def __init__(self, status: int) -> None:
        self.status = status


class _Progress:
    """Hears of the searches after the verdict, says which one runs, and lets Ctrl-C end them."""

    def __init__(self) -> None:
        self.found: Sequence[Any] = []
        self._stopped = False

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
        now_doing(f"tracing alternatives: {what.replace('_', ' ')}{more}{stand} (Ctrl-C stops)")


def _print_answer(asked: Any, options: argparse.Namespace, words: Sequence[str]) -> int:
    from dryfit.ask import answer, short, text

    if not options.quick and not options.json:
        return _print_as_it_comes(asked, options, words)
    if options.quick:
        answered = answer.quick(asked)
        if answered["analytic"] is None and answered["verdict"] is None:
            print(
                printable("\n".join([answered["sentence"], *text.reading_lines(asked, answered)])),
                file=sys.stderr,
            )
            return 3
    else:
        with working("tracing the step"):
            answered = answer.traced(asked, watch=_Progress(), suggested=bool(options.suggest))
        answered |= _tensors(asked, options)
    if options.json:
        print(json_line(answered, asked.read_as))
    elif options.command == "explain":
        print(text.full_text(asked, answered, words))
        print("\n".join(text.explanation(answered)))
    else:
        print(short.first_lines(asked, answered))
        print(short.last_lines(asked, answered, words))
    return answer.exit_status(answered)


def _tensors(asked: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The largest tensors at the peak, where ``explain`` asks for them; else nothing."""
    if options.command != "explain":
        return {}
    from dryfit.ask.explain import explain

    return explain(asked.scenario, asked.where, count=options.count or 10, layers=options.layers)


def _print_as_it_comes(asked: Any, options: argparse.Namespace, words: Sequence[str]) -> int:
    """The verdict as soon as it stands, then what is found after it; Ctrl-C ends the searches, not the verdict."""
    from dryfit.ask import answer, short, text

    is_short = options.command != "explain"
    if sys.stderr.isatty():
        first = answer.quick(replace(asked, run=None), others=False)
        line = (
            first["sentence"]
            if first["analytic"] or first["verdict"]
            else "No estimate of this step"
        )
        print(
            f"{printable(line)}\nTracing the step itself, which takes some seconds ...",
            file=sys.stderr,
            flush=True,
        )
    progress, verdict, stopped = _Progress(), {}, False

    def shown(stands: Mapping[str, Any]) -> None:
        now_doing("")
        verdict.update(stands)
        if is_short:
            print(short.first_lines(asked, stands), flush=True)
            return
        lines = [text.first_text(asked, stands), *text.explanation(stands)]
        if tensors := _tensors(asked, options):
            from dryfit.ask.explain import table

            lines.append(table(tensors))
        print("\n".join(lines), flush=True)

    try:
        with progress.stoppable(), working("tracing the step"):
            answered = answer.traced(asked, shown, progress)
    except KeyboardInterrupt:
        if not verdict:
            raise
        print("stopped: what is shown was found until now", file=sys.stderr)
        stopped, asked = True, replace(asked, run=None)
        answered = verdict | {"suggestions": [asdict(item) for item in progress.found]}
    rest = short.last_lines if is_short else text.rest_text
    if lines := rest(asked, answered, words):
        print(lines)
    if stopped:
        raise _Stopped(answer.exit_status(answered))
    return answer.exit_status(answered)


def run() -> None:
    """The console script."""
    from dryfit.common.terminal import command

    global _ends_with_its_answer
    _ends_with_its_answer = True
    command(main)


if __name__ == "__main__":
    run()
