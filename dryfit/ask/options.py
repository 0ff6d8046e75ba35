"""The grammar of the command line: its commands, the options of each, and a line with something changed in it.

A first word that is no command is a WHAT, and the command is ``fit``. A command refuses an option that it does not use.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dryfit.common.errors import UserError
from dryfit.program.request import STEPS, Limits

PROGRAM = "dryfit"
# Words that options take, as the modules that know them have them: --help is answered without importing those.
TOOLS = (
    "axolotl",
    "llama-factory",
    "trl",
    "torchtitan",
    "torchtune",
    "ms-swift",
    "verl",
    "openrlhf",
)
LIKE = ("trl", "peft", "axolotl", "unsloth")
METHODS = ("full", "lora", "qlora")
STRATEGIES = ("none", "ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
# Tools whose files `config` writes (data/writers.yaml, which is not read to answer --help).
FILES = (
    "axolotl",
    "llama-factory",
    "trl",
    "trl-script",
    "unsloth",
    "ms-swift",
    "torchtune",
    "pipeline",
)
# Bits a weight of llama.cpp's quantizations (its README and `llama-quantize --help`, which gives them for 7B and 8B
# models); NF4 with double quantization as bitsandbytes stores it.
BITS = {
    "f16": 16.0,
    "fp16": 16.0,
    "bf16": 16.0,
    "fp32": 32.0,
    "int8": 8.0,
    "nf4": 4.127,
    "q8_0": 8.5,
    "q6_k": 6.56,
    "q5_k_m": 5.7,
    "q5_0": 5.5,
    "q4_k_m": 4.9,
    "q4_k_s": 4.6,
    "q4_0": 4.5,
    "q3_k_m": 3.9,
    "q2_k": 3.2,
}
RUN_OPTIONS = (
    "rows",
    "tokens_per_row",
    "epochs",
    "price",
    "deadline",
    "grams_per_kwh",
)  # options about a whole run
_EXAMPLE = "qwen2.5-coder-7b"
NO_TOOL = "none"  # of --like: the defaults of a scenario's fields


def whole_number(text: str, thousand: int = 1000) -> int | None:
    """A count as it is written on a command line, thousands set apart or not, or as 10k; None for anything else."""
    plain = re.sub(r"(?<=\d)[,_](?=\d{3})", "", text.strip().lower())
    number = re.fullmatch(r"([1-9]\d*)(k?)", plain)
    return int(number[1]) * (thousand if number[2] else 1) if number else None


def tokens(text: str) -> int | None:
    """A length of rows: 8k are 8,192 tokens."""
    return whole_number(text, 1024)


class Parser(argparse.ArgumentParser):
    """Errors of the command line in the form of all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"The command line is wrong: {message}.",
            where="the command line",
            allowed=f"{self.prog} --help lists all options",
            write=f"{PROGRAM} {_EXAMPLE} --gpu 4090",
        )


# --- the options, each stated once ------------------------------------------------------------------------------------

_GPU = "4090, 'A100 80GB', 2x3090, 24GiB, ..."
_WHAT = {"nargs": "+", "metavar": "WHAT", "help": "a model or a file; then files beside it"}
_STEP = {
    "--gpu": {"metavar": "GPU", "help": _GPU},
    "--method": {"choices": METHODS, "help": "which weights are trained"},
    "-s": {
        "long": "--sequence-length",
        "type": tokens,
        "metavar": "TOKENS",
        "help": "tokens of a row",
    },
    "-b": {
        "long": "--micro-batch",
        "type": whole_number,
        "metavar": "ROWS",
        "help": "rows of a micro-batch",
    },
    "--strategy": {
        "choices": STRATEGIES,
        "help": "how several GPUs are used (fsdp2 if --gpu names several)",
    },
    "--like": {
        "choices": (*LIKE, NO_TOOL),
        "help": "take unset fields from this tool's defaults (trl for a model alone); none: a scenario's own",
    },
    "--set": {
        "action": "append",
        "metavar": "FIELD=VALUE",
        "help": "any field of a scenario, lora.rank=64; list: all",
    },
    "--from": {"dest": "tool", "choices": TOOLS, "help": "tool that the file belongs to"},
}
_ANSWER = {
    "--json": {"action": "store_true", "help": "for programs: the object of dryfit.ask.predict"},
    "--suggest": {"action": "store_true", "help": "with --json: search for what would fit"},
    "--yaml": {"action": "store_true", "help": "print the scenario as YAML and exit"},
    "--quick": {
        "action": "store_true",
        "help": "the analytic estimate alone, at once and without torch",
    },
    "--fresh": {
        "action": "store_true",
        "help": "ask anew, though an answer is kept from an earlier time",
    },
}
_RECIPE = {
    "--recipe": {
        "metavar": "NAME",
        "help": "of a model that continues no text: the program that trains it; list: all",
    }
}
_RUN = {
    "--rows": {
        "type": whole_number,
        "metavar": "N",
        "help": "rows of the training data: hours, cost and energy",
    },
    "--tokens-per-row": {"metavar": "N", "help": "mean row length (default: the sequence length)"},
    "--epochs": {"metavar": "N", "help": "number of epochs (default: 1)"},
    "--price": {
        "action": "append",
        "metavar": "PER_HOUR",
        "help": "price per GPU-hour, any currency: a number, NAME=1.29, or a YAML file of them",
    },
    "--deadline": {"metavar": "24h", "help": "the run has to end within it: 90min, 24h, 3d"},
    "--grams-per-kwh": {"metavar": "GRAMS", "help": "CO2 of the electricity"},
}
_OWN = {
    "--count": {"type": whole_number, "metavar": "N", "help": "how many tensors (10)"},
    "--layers": {
        "action": "store_true",
        "help": "one line for tensors that are alike in all layers",
    },
    "--fewest": {
        "action": "store_true",
        "help": "instead: the least number of GPUs that hold the step",
    },
    "--measured": {
        "metavar": "FIGURE",
        "help": "14.2GiB (nvidia-smi's), allocated=9543MiB, reserved=..., oom=...;"
        " a record of `measure --record`; a memory snapshot of PyTorch (.pickle)",
    },
    "--record": {"metavar": "FILE", "help": "keep what was recorded"},
    "--for": {"dest": "tool_for", "choices": FILES, "help": "the tool whose file is written"},
    "--output": {"metavar": "FILE", "help": "write the file too, which must not be there"},
    "--requests": {"type": whole_number, "metavar": "N", "help": "requests at once (1)"},
    "--weights": {
        "metavar": "FORMAT",
        "help": "bf16, fp16, nf4, or a GGUF quantization such as q4_k_m",
    },
}
_LIMITS: dict[str, dict[str, Any]] = {
    "--network": {
        "action": "store_true",
        "help": "let it use the network; on Linux it has none else",
    },
    "--in-place": {"action": "store_true", "help": "this folder itself, instead of a copy of it"},
    "--write": {
        "action": "append",
        "default": [],
        "metavar": "FOLDER",
        "help": "a folder elsewhere to write in (Linux: without it none but caches)",
    },
    "--memory": {"default": "16GiB", "metavar": "SIZE", "help": "of this machine (16GiB)"},
    "--seconds": {
        "type": int,
        "default": Limits.seconds,
        "help": f"until an update ({Limits.seconds})",
    },
    "--file-size": {
        "default": "4GiB",
        "metavar": "SIZE",
        "help": "of the largest file it writes (4GiB)",
    },
}
_PROGRAM: dict[str, dict[str, Any]] = {
    "--gpus": {
        "type": int,
        "metavar": "N",
        "help": "as torchrun with N processes; without it: python PROGRAM",
    },
    "--gpu": {
        "metavar": "CARD",
        "help": "4090, 'A100 80GB', 8xh100-80gb, ... (default: an A100 80GB)",
    },
    "--steps": {
        "type": int,
        "default": STEPS,
        "metavar": "N",
        "help": f"updates until it is stopped ({STEPS})",
    },
    "--batch": {
        "metavar": "8x1024",
        "help": "made up data of so many rows and tokens, if its own is missing",
    },
    "--answer": {
        "action": "append",
        "default": [],
        "metavar": "LINE=VALUE",
        "help": "what a number is that this line reads: train.py:57=0.5",
    },
    "--json": {"action": "store_true", "help": "for programs"},
    "--ranks": {"metavar": "all|0,7", "help": "which processes run, one after the other (0)"},
    "--longest": {"action": "store_true", "help": "the largest length of its rows that fits"},
    "--vary": {
        "metavar": "NAME[:STEP]",
        "help": "the largest value of this setting that fits, in steps of 64 (below 64: 1)",
    },
    "--all-gpus": {"action": "store_true", "help": "every GPU of the catalogue"},
    "--yes": {
        "action": "store_true",
        "help": "do not ask before a program runs for the first time",
    },
    **{name: {"group": "what the program may use", **form} for name, form in _LIMITS.items()},
    "-m": {
        "dest": "module",
        "action": "store_true",
        "help": "PROGRAM is a module, as with python -m",
    },
    "program": {"metavar": "PROGRAM"},
    "arguments": {"nargs": argparse.REMAINDER, "metavar": "ARGS"},
}
_DIFF = {
    "base": {"metavar": "BASE", "help": "a revision: main, HEAD~1, a commit"},
    "head": {
        "metavar": "HEAD",
        "nargs": "?",
        "help": "another one; without it the working tree as it is",
    },
    "--file": {
        "required": True,
        "metavar": "FILE",
        "help": "the training file, from the repository's root",
    },
    "--gpu": {"help": f"{_GPU}; without it the file's own, if it names one"},
    "--from": {"dest": "tool", "help": "tool that the file belongs to"},
    "--most": {"metavar": "0.5GiB", "help": "status 1 where HEAD takes so much more"},
    "--markdown": {"action": "store_true", "help": "the text of a comment"},
    "--json": {"action": "store_true", "help": "for programs"},
}
_CHECK = {"files": {"nargs": "+", "metavar": "FILE"}, "--gpu": {"required": True, "help": _GPU}}
OPTIONS: dict[str, dict[str, Any]] = {**_STEP, **_ANSWER, **_RUN, **_RECIPE, **_OWN}
EXAMPLES = {
    "--gpu": "4090",
    "-s": 2048,
    "-b": 4,
    "--set": "lora.rank=64",
    "--rows": 50000,
    "--tokens-per-row": 350,
    "--epochs": 3,
    "--price": 1.29,
    "--deadline": "24h",
    "--grams-per-kwh": 380,
    "--count": 10,
    "--recipe": "list",
    "--measured": "14.2GiB",
    "--for": "axolotl",
    "--output": "train.yaml",
    "--record": "run.json",
    "--requests": 4,
    "--weights": "q4_k_m",
}


@dataclass(frozen=True)
class Subcommand:
    """A question: its options, and what its help says."""

    about: str
    # Its options, by their names in :data:`OPTIONS`; None for a command that is not about a WHAT
    takes: Sequence[str] | None = None
    examples: Sequence[str] = ()
    needs: Sequence[str] = ()  # options without which it has no answer
    # The arguments of a command that is not about a WHAT, and how argparse takes each
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    text: str = ""  # what the help of such a command says first


_OF_RUN = """
    dryfit run train.py --batch_size=16
    dryfit run --gpus 8 --gpu h100-80gb train_gpt.py
    dryfit run --json -m package.train --depth 4

The program runs here, in a process with limits, over a card that is simulated. It is stopped after its second update.
Options of this command stand before the program, and the program's own behind it.
"""
_OF_DIFF = """
    dryfit diff main HEAD --file configs/qlora.yml --gpu 4090
    dryfit diff main --file configs/qlora.yml          the working tree against main
    dryfit diff main HEAD --file train.yaml --gpu 24GiB --most 0.5GiB --markdown

BASE and HEAD are revisions of git. The file is any that dryfit reads; files that it names are those of the same
revision. Exit status: 0 the step of HEAD fits (or no GPU is named), 1 it does not fit, or takes more than --most beyond
BASE's, 2 something is wrong in the question, 3 no answer.
"""


def _all_but(*names: str) -> list[str]:
    return [name for name in _STEP if name not in names]


COMMANDS: dict[str, Subcommand] = {
    "fit": Subcommand(
        "whether a training step fits (the word may be left out)",
        [*_STEP, *_ANSWER, *_RUN, *_RECIPE],
        (
            "Qwen/Qwen2.5-Coder-7B-Instruct --gpu 4090",
            "qwen2.5-coder-7b --method lora --gpu 2x3090 -s 2048 -b 4 --set lora.rank=64",
            "my-axolotl.yaml --gpu 24GiB --rows 50000 --epochs 3 --price 0.35",
            "openai/whisper-large-v3 --gpu t4 -b 8",
        ),
    ),
    "longest": Subcommand(
        "the longest rows that fit",
        [*_all_but("-s"), "--json", "--quick", "--fresh"],
        ("longest qwen2.5-coder-7b --gpu 4090 -b 2",),
        ("--gpu",),
    ),
    "batch": Subcommand(
        "the largest micro-batch that fits",
        [*_all_but("-b"), "--json", "--quick", "--fresh"],
        ("batch qwen2.5-coder-7b --gpu 4090 -s 1024",),
        ("--gpu",),
    ),
    "gpus": Subcommand(
        "every GPU of the catalogue; with --rows also hours and cost",
        [*_all_but("--gpu"), "--json", "--quick", "--fresh", *_RUN],
        (
            "gpus qwen2.5-coder-7b -s 2048",
            "gpus qwen3-8b --rows 50000 --epochs 3 --price a100-80gb=1.29",
        ),
    ),
    "divide": Subcommand(
        "how to divide a step among several GPUs",
        [*_STEP, "--fewest", "--json", "--fresh"],
        ("divide llama-3.1-70b --gpu 8xh100-80gb", "divide llama-3.1-70b --gpu h100-80gb --fewest"),
        ("--gpu",),
    ),
    "config": Subcommand(
        "the fastest settings that fit, as the file of the tool that trains with them",
        ["--gpu", "--method", "-s", "-b", "--set", "--for", "--output", "--json", "--quick", *_RUN],
        (
            "config qwen2.5-coder-7b --gpu 4090 -s 2048 --for axolotl",
            "config Qwen/Qwen3-8B --gpu a100-40gb --for llama-factory --rows 50000 --tokens-per-row 350",
        ),
        ("--gpu", "--for"),
    ),
    "explain": Subcommand(
        "which tensors are alive at the peak",
        [*_STEP, "--count", "--layers", "--json", "--quick", "--fresh"],
        ("explain qwen2.5-coder-7b --gpu 4090 --count 30 --layers",),
    ),
    "serve": Subcommand(
        "serving the model instead of training it",
        ["--gpu", "-s", "--set", "--from", "--requests", "--weights", "--json", "--fresh"],
        ("serve llama-3.1-8b --gpu 24GiB --requests 4 -s 4096 --weights q4_k_m",),
    ),
    "compare": Subcommand(
        "why your own measurement differs",
        [*_STEP, "--measured"],
        (
            "compare config.yml --gpu 4090 --measured 14.2GiB",
            "compare config.yml --gpu 4090 --measured run.json",
        ),
        ("--measured",),
    ),
    "measure": Subcommand(
        "run your program until its third update, and compare",
        [*_STEP, "--record"],
        ("measure config.yml --gpu 4090 -- python train.py",),
    ),
    "run": Subcommand(
        "somebody's CUDA program as it stands, without a GPU", own=_PROGRAM, text=_OF_RUN
    ),
    "diff": Subcommand(
        "what a change of a training file does to its memory, for a pull request",
        own=_DIFF,
        text=_OF_DIFF,
    ),
    "check": Subcommand(
        "which of these training files' steps do not fit, for a commit hook", own=_CHECK
    ),
    "mcp": Subcommand("the answers as tools for an assistant"),
}
_FILES = """
WHAT is a model (a name in config/models/, an id on the Hub, a folder, a config.json), a scenario, a run's settings, or
a file of axolotl, LLaMA-Factory, TRL, torchtune, torchtitan, ms-swift, verl or OpenRLHF (a script too); a program or
notebook with TRL or Unsloth; an adapter_config.json. Files of accelerate, DeepSpeed or PEFT may follow. None is run.
"""
_ASKED = """
A question in plain words is answered if all of it is understood: dryfit can i train qwen3 8b with lora on a 4090
Else the line to paste is shown, with what it leaves out.
"""
_STATUS = """
Exit status: 0 fits (or no GPU named), 1 does not fit, not in time, or too close to call, 2 a wrong question, 3 no
answer.
"""


def parser() -> Parser:
    """The commands. Each one's options are those of :func:`own_parser`."""
    made = Parser(
        prog=PROGRAM,
        description="Whether a fine-tuning step fits a GPU, asked in one line.",
        epilog=_epilog("fit"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--version", action="store_true", help="versions of this package, torch and the catalogue"
    )
    made.add_argument(
        "--print-completion", metavar="SHELL", help="what completes it in bash, zsh or fish"
    )
    adds = made.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        adds.add_parser(name, help=command.about)
    return made


def own_parser(name: str) -> Parser:
    """The options of a command."""
    command = COMMANDS[name]
    made = Parser(
        prog=f"{PROGRAM} {name}",
        description=f"{command.about[0].upper()}{command.about[1:]}.\n{command.text}".rstrip(),
        epilog=_epilog(name) if command.takes else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(made, name)
    return made


def add_options(made: argparse.ArgumentParser, name: str) -> None:
    """Add a command's arguments to a parser."""
    command = COMMANDS[name]
    taken: Mapping[str, Any] = command.own
    if command.takes:
        taken = {"what": _WHAT, **{option: OPTIONS[option] for option in command.takes}}
    groups: dict[str | None, Any] = {None: made}
    for option, form in taken.items():
        given = dict(form)
        names = [option, given.pop("long")] if "long" in given else [option]
        if (title := given.pop("group", None)) not in groups:
            groups[title] = made.add_argument_group(title)
        groups[title].add_argument(*names, **given)


def _epilog(name: str) -> str:
    return "\n".join(
        [
            *(f"  {PROGRAM} {one}" for one in COMMANDS[name].examples),
            _ASKED,
            _FILES[1:],
            _STATUS.strip(),
        ]
    )


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command of a line, and the words behind it."""
    if words and words[0] in COMMANDS:
        return words[0], list(words[1:])
    return "fit", list(words)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The options of a line that is right (:mod:`dryfit.ask.words`); None for what its command does not take."""
    command, rest = split(words)
    given = own_parser(command).parse_args(rest)
    missing = {
        (one.get("dest") or dest(one.get("long") or name)): []
        if one.get("action") == "append"
        else None
        for name, one in OPTIONS.items()
    }
    known = {name: value for name, value in vars(given).items() if value is not None}
    return argparse.Namespace(**{**missing, **known}, command=command)


def json_line(answer: Mapping[str, Any], read_as: str = "") -> str:
    """An answer for programs; that of a question in plain words has the line that it was read as."""
    return json.dumps({**answer, **({"read_as": read_as} if read_as else {})}, sort_keys=True)


def dest(option: str) -> str:
    return option.lstrip("-").replace("-", "_")
