"""``dryfit run``: somebody's whole CUDA program, as it stands, on a machine without a GPU."""

import argparse
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dryfit.ask.options import json_line, whole_number
from dryfit.ask.text import allocators, card_line, explanation, seconds, warning_lines
from dryfit.cards.gpus import find
from dryfit.cards.sentences import of_program, said
from dryfit.common.errors import UserError
from dryfit.common.files import write_json
from dryfit.common.kept import folder
from dryfit.common.text import GIB, gib, printable, size_text
from dryfit.program import answer
from dryfit.program.largest import largest, to_mapping
from dryfit.program.process import run
from dryfit.program.request import Limits, ProgramRequest
from dryfit.program.settings import length, setting

_REPEATED = frozenset(("--answer", "--write"))  # options that may stand several times


def main(options: argparse.Namespace) -> int:
    """The command; its exit status: 0 fits or no GPU is named, 1 does not fit or is too close to call."""
    try:
        return _answer_request(options)
    except UserError as error:
        raise error.with_values(write=whole_line(error.write, options)) from None


def whole_line(write: str | None, options: argparse.Namespace) -> str | None:
    """A line to write, as messages shorten it (``dryfit run --network ...``), with all that the asker wrote."""
    start, end = "dryfit run ", " ..."
    if not write or not (write.startswith(start) and write.endswith(end)):
        return write
    new = shlex.split(write[len(start) : -len(end)])
    program = [*(["-m"] if options.module else []), options.program, *options.arguments]
    own = options.words[: len(options.words) - len(program)]
    replaced = {word.partition("=")[0] for word in new if word.startswith("--")} - _REPEATED
    kept = []
    while own:
        name, given, _ = own.pop(0).partition("=")
        told = [name + given + _]
        while own and not own[0].startswith("-"):
            told.append(own.pop(0))
        if name not in replaced and not (name == "--longest" and "--vary" in replaced):
            kept += told
    return shlex.join(["dryfit", "run", *new, *kept, *program])


def _answer_request(options: argparse.Namespace) -> int:
    asked = request(options)
    check(asked)
    if not options.yes:
        consent(asked)
    ranks = _ranks(options.ranks, asked)
    if options.vary or options.longest:
        return _vary(asked, ranks, options)
    answered = answer_of(asked, ranks)
    remember(asked)
    rows = answer.on_all_gpus(answered) if options.all_gpus else []
    if options.json:
        print(json_line(answered | ({"all_gpus": rows} if rows else {})))
    else:
        print(printable("\n".join([*text(answered), *_cards(rows, answered)])))
    return 0 if answered["fits"] or answered["gpu"] is None else 1


def answer_of(asked: ProgramRequest, ranks: Sequence[int], label: str = "") -> dict[str, Any]:
    """The answer of the process that needs most, of those that are asked about: each runs alone.

    UserError: if one of them came to no update.
    """
    from dataclasses import replace

    answers = {}
    for rank in ranks:
        one = replace(asked, rank=rank)
        try:
            of_rank = f"rank {rank}" if len(ranks) > 1 else ""
            answers[rank] = answer.answer(
                one, run(one, label=", ".join(filter(None, (label, of_rank))))
            )
        except UserError as error:
            if len(ranks) == 1:
                raise
            raise error.at(f"the process of rank {rank}, {error.where}") from None
    return answer.of_ranks(answers)


def _ranks(text: str | None, asked: ProgramRequest) -> list[int]:
    """The processes that ``--ranks`` names: ``all``, or numbers from 0 on."""
    if text is None:
        return [0]
    words = [str(rank) for rank in range(asked.gpus)] if text == "all" else text.split(",")
    ranks = [int(word) for word in words if word.strip().isdecimal()]
    if len(ranks) != len(words) or max(ranks) >= asked.gpus:
        raise UserError(
            "`--ranks` names a process that the program does not have.",
            where="--ranks",
            found=text,
            allowed=f"all, or numbers from 0 to {asked.gpus - 1}: as many as --gpus says",
            write=f"dryfit run --gpus {max(asked.gpus, 2)} --ranks all ...",
        )
    return list(dict.fromkeys(ranks))


def _vary(asked: ProgramRequest, ranks: Sequence[int], options: argparse.Namespace) -> int:
    """Answer ``--vary`` and ``--longest``; the exit status: 0 if some value fits."""
    name, _, step = (options.vary or "").partition(":")
    multiple = whole_number(step) if step else 0
    if multiple is None or not asked.gpu or options.all_gpus or bool(name) == options.longest:
        raise UserError(
            "A search takes one GPU, and steps of 1 or more.",
            where="--vary, --longest",
            found=options.vary,
            allowed="NAME or NAME:STEP, or --longest in its place; with --gpu and without --all-gpus",
            write=f"dryfit run --{f'vary {name}:64' if name else 'longest'} --gpu 4090 ...",
        )
    found = setting(asked, name) if name else length(asked)
    multiple = multiple or (64 if found.value >= 64 else 1)

    def needs(value: int) -> tuple[int, bool]:
        answered = answer_of(found.changed(value), ranks, f"{found.name} {value}")
        remember(asked)
        required = answered["trace"]["required_bytes"]
        print(
            f"{found.name} {value}: {gib(required)}, {said(answered['verdict'])}",
            file=sys.stderr,
            flush=True,
        )
        return required, answered["fits"] is True

    gpu = find(asked.gpu)
    tried = largest(needs, gpu.usable_bytes, found.value, multiple)
    if tried.is_flat:
        raise UserError(
            f"The program takes the same memory with {found.name} at {' and '.join(map(str, sorted(tried.required)))}.",
            where=found.where,
            allowed="a setting that decides how large a batch is, and data with rows as long",
            write=None if asked.batch else f"dryfit run --batch 8x{found.value} ...",
        )
    if options.json:
        values = to_mapping(tried, found.name, multiple) | {
            "where": found.where,
            "gpu": gpu.to_mapping(),
        }
        print(json_line(values))
    else:
        print(
            printable(
                "\n".join(
                    [*_varied(tried, found.name, gpu), f"{found.name} was found at: {found.where}"]
                )
            )
        )
    return 0 if tried.largest else 1


def _varied(tried: Any, name: str, gpu: Any) -> list[str]:
    size = gib(gpu.usable_bytes)
    if tried.largest is None:
        lines = [
            f"DOES NOT FIT: {name} {tried.too_large} is too large for the {gpu.title}, which has {size} usable"
        ]
    else:
        lines = [f"FITS up to {name} {tried.largest} on the {gpu.title}, which has {size} usable"]
    for value in sorted(tried.fits):
        need = gib(tried.required[value]) if value in tried.required else tried.refused[value]
        lines.append(
            f"  {value:>10}  {need:>10}  {'fits' if tried.fits[value] else 'does not fit for sure'}"
        )
    return lines


def request(options: argparse.Namespace) -> ProgramRequest:
    """The request that a command line makes.

    UserError: if an option's value is wrong.
    """
    gpu = find(options.gpu, "--gpu") if options.gpu else None
    for name in ("gpus", "steps", "seconds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(
                f"--{name} is a whole number from 1 on.",
                found=value,
                where="the command line",
                write=f"--{name} {2 if name == 'steps' else 8}",
            )
    gpus = options.gpus or (gpu.count if gpu else 1)
    limits = Limits(
        _size(options.memory, "--memory"), _size(options.file_size, "--file-size"), options.seconds
    )
    return ProgramRequest(
        options.program,
        tuple(options.arguments),
        module=options.module,
        gpus=gpus,
        torchrun=options.gpus is not None or gpus > 1,
        gpu=gpu.name if gpu else None,
        steps=options.steps,
        answers=dict(_answer(text) for text in options.answer),
        batch=_batch(options.batch),
        network=options.network,
        in_place=options.in_place,
        limits=limits,
        writable=_folders(options.write),
    )


def _folders(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if not Path(name).is_dir():
            raise UserError(
                "There is no such folder.",
                where="--write",
                found=name,
                allowed="a folder that exists",
                write=f"mkdir -p {name}",
            )
    return tuple(str(Path(name).resolve()) for name in names)


def _size(text: str, option: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|M)", text.strip(), re.IGNORECASE)
    if not found:
        raise UserError(
            "This is no size.",
            where=option,
            found=text,
            allowed="GiB or MiB",
            write=f"{option} 16GiB",
        )
    return round(float(found[1]) * (GIB if found[2][0] in "gG" else 2**20))


def _batch(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    rows, _, tokens = text.lower().partition("x")
    sizes = whole_number(rows), whole_number(tokens)
    if None in sizes:
        raise UserError(
            "This is no batch.",
            where="--batch",
            found=text,
            allowed="rows x tokens",
            write="--batch 8x1024",
        )
    return sizes


def _answer(text: str) -> tuple[str, float]:
    line, _, value = text.rpartition("=")
    try:
        if not re.search(r":\d+$", line):
            raise ValueError
        return line, float({"true": "1", "false": "0"}.get(value.lower(), value))
    except ValueError:
        raise UserError(
            "This does not say what a line reads.",
            where="--answer",
            found=text,
            allowed="a file, its line and a number",
            write="--answer train.py:57=0.5",
        ) from None


def check(asked: ProgramRequest) -> None:
    """What can be known before the program runs.

    UserError: if there is no such program, or it is not Python.
    """
    if sys.platform == "win32":
        raise UserError(
            "Programs run on Linux and macOS.",
            where="dryfit run",
            allowed="Linux, also within Windows (WSL)",
            write="wsl dryfit run train.py",
        )
    if asked.module:
        return
    path = Path(asked.program)
    if not path.is_file():
        raise UserError(
            "There is no such program.",
            where="the command line",
            found=asked.program,
            allowed="a file of Python, or -m and a module",
            write="dryfit run train.py",
        )
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"This program is not Python {sys.version_info.major}.{sys.version_info.minor}: {error}.",
            where=asked.program,
            allowed="a file of Python",
        ) from None


# --- a program that did not run before -----------------------------------------------------------------------------


def _known_programs() -> Path | None:
    kept = folder()
    return kept and kept.parent / "programs.json"


def _identity(asked: ProgramRequest) -> str:
    content = asked.program.encode() if asked.module else Path(asked.program).read_bytes()
    return hashlib.sha256(content).hexdigest()


def consent(asked: ProgramRequest) -> None:
    """Ask whether a program may run that did not run before.

    UserError: if the answer is no, or nobody can be asked.
    """
    place = _known_programs()
    if place and place.is_file() and _identity(asked) in place.read_text(encoding="utf-8"):
        return
    where = "the folder itself" if asked.in_place else "a copy of this folder"
    about = f"{asked.program} will run on this machine, in {where}, {'with' if asked.network else 'without'} network."
    if sys.stdin.isatty():
        print(f"{about} Run it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
        raise UserError("The program was not run.", where=asked.program)
    raise UserError(
        f"{about} It did not run before.",
        where=asked.program,
        allowed="a program that you trust",
        write="dryfit run --yes ...",
    )


def remember(asked: ProgramRequest) -> None:
    """Ask no more about this program, as long as it stays as it is."""
    place = _known_programs()
    if place is None:
        return
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, known | {_identity(asked): Path(asked.program).name})


# --- the answer in words -------------------------------------------------------------------------------------------

_PHASES = {
    "load": "loading",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "evaluation": "evaluation",
}


def text(answered: Mapping[str, Any]) -> list[str]:
    """The answer, a line each."""
    trace, program = answered["trace"], answered["program"]
    lines = [
        of_program(answered) + _beyond(program),
        f"for: {' '.join([program['name'], *program['arguments']])}, {_how_far(answered)}",
    ]
    peak, reserved = trace["peak_allocated_bytes"], trace["peak_reserved_bytes"]
    lines.append(
        f"  {'peak':<20}{gib(peak):>10} allocated, {gib(reserved)} reserved on a GPU with memory to spare"
    )
    if (known := trace.get("peak_allocated_range_bytes")) is not None:
        most = "without a bound" if known[1] is None else gib(known[1])
        lines.append(f"  {'peak, as a range':<20}{gib(known[0]):>10} to {most}: see the warning")
    lines.append(f"  {'required':<20}{gib(trace['required_bytes']):>10} of usable GPU memory")
    lines += allocators(
        answered["allocators"], answered["allocators"]["own"] == "expandable_segments"
    )
    peaks = ", ".join(
        f"{word} {gib(size)}"
        for name, word in _PHASES.items()
        if (size := trace["phases"].get(name))
    )
    lines.append(f"  {'by phase':<20}{peaks}")
    if len(answered["ranks"]) > 1:
        told = (f"rank {row['rank']} {gib(row['required_bytes'])}" for row in answered["ranks"])
        lines.append(f"  {'required by rank':<20}{', '.join(told)}")
    if program["peak_line"]:
        below = f" (there {program['library_line']})" if program["library_line"] else ""
        lines.append(f"  {'the peak is made at':<20}{program['peak_line']}{below}")
    if time := answered["time"]:
        told = f"{seconds(time, ', not validated')}, without loading data; limited by {time['limited_by']}"
        lines.append(f"  {'time of a step':<20}{told}")
    lines.append(f"  {'evidence':<20}{answered['evidence']['text']}")
    lines += explanation({"trace": trace, "analytic": None})
    lines.append("the same by module:")
    modules = sorted(trace["modules"].items(), key=lambda item: -item[1])[:8]
    width = max([44, *(len(name) for name, _ in modules)])
    lines += [
        f"  {name or '(outside modules)':<{width}}{size_text(size):>11}" for name, size in modules
    ]
    lines += [
        line.replace("`peak_allocated_range_bytes`", "the range above")
        for line in warning_lines(answered)
    ]
    host = answered["host"]
    lines.append(
        f"  here it took {host['seconds']:.0f} s and {gib(host['peak_bytes'])} of this machine's memory"
    )
    if program["written"]:
        shown = ", ".join(program["written"][:6]) + (", ..." if len(program["written"]) > 6 else "")
        lines.append(f"  the program wrote {len(program['written'])} files: {shown}")
    return lines


def _beyond(program: Mapping[str, Any]) -> str:
    """What the verdict does not cover, as the end of its sentence."""
    told = list(program["not_followed"])
    if not told:
        return ""
    names = " and ".join(filter(None, (", ".join(told[:-1]), told[-1])))
    verb = "are" if len(told) > 1 or "batches" in told[0] else "is"
    return f"; {names} {verb} not covered"


def _how_far(answered: Mapping[str, Any]) -> str:
    updates, gpus = answered["program"]["updates"], answered["gpus"]
    on = f", as rank {answered['rank']} of {gpus} processes" if gpus > 1 else ""
    word = "stopped after" if answered["program"]["outcome"] == "stopped" else "ended after"
    return f"{word} {updates} update{'s' if updates > 1 else ''}{on}"


def _cards(rows: Sequence[Mapping[str, Any]], answered: Mapping[str, Any]) -> list[str]:
    chosen = f"of {answered['gpu']['name']}" if answered["gpu"] else "of an A100"
    return [f"on each GPU, with the kernels {chosen}:", *map(card_line, rows)] if rows else []
