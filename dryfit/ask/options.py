"""The grammar of the command line: its commands, the options of each, and a line with something changed in it.

A first word that is no command is a WHAT, and the command is ``fit``. A command refuses an option that it does not use.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dryfit.common.errors import UserError
from dryfit.common.text import closest, yaml_text

PROGRAM = "dryfit"
# Words that options take, as the modules that know them have them: --help is answered without importing those.
TOOLS = ("axolotl", "llama-factory", "trl", "torchtitan", "torchtune", "ms-swift", "verl", "megatron")
LIKE = ("trl", "peft", "axolotl", "unsloth")
METHODS = ("full", "lora", "qlora")
STRATEGIES = ("none", "ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
# Tools whose files `config` writes (data/writers.yaml, which is not read to answer --help).
FILES = ("axolotl", "llama-factory", "trl", "trl-script", "unsloth", "ms-swift", "torchtune", "pipeline")
RUN_OPTIONS = ("rows", "tokens_per_row", "epochs", "price", "deadline", "grams_per_kwh")  # options about a whole run
_EXAMPLE = "qwen2.5-coder-7b"
NO_TOOL = "none"  # of --like: the defaults of a scenario's fields
PASTED = "the line with all of it put right"  # stands for it until it is known


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
            f"The command line is wrong: {message}.", where="the command line",
            allowed=f"{self.prog} --help lists all options", write=f"{PROGRAM} {_EXAMPLE} --gpu 4090",
        )  # fmt: skip


# --- the options, each stated once ------------------------------------------------------------------------------------

_STEP = {
    "--gpu": {"metavar": "GPU", "help": "4090, 'A100 80GB', 2x3090, 24GiB, ..."},
    "--method": {"choices": METHODS, "help": "which weights are trained"},
    "-s": {"long": "--sequence-length", "type": tokens, "metavar": "TOKENS", "help": "tokens of a row"},
    "-b": {"long": "--micro-batch", "type": whole_number, "metavar": "ROWS", "help": "rows of a micro-batch"},
    "--strategy": {"choices": STRATEGIES, "help": "how several GPUs are used (fsdp2 if --gpu names several)"},
    "--like": {
        "choices": (*LIKE, NO_TOOL),
        "help": "take unset fields from this tool's defaults (trl for a model alone); none: a scenario's own",
    },
    "--set": {"action": "append", "metavar": "FIELD=VALUE", "help": "any field of a scenario, lora.rank=64"},
    "--from": {"dest": "tool", "choices": TOOLS, "help": "tool that the file belongs to"},
}
_ANSWER = {
    "--json": {"action": "store_true", "help": "for programs: the object of dryfit.ask.predict"},
    "--suggest": {"action": "store_true", "help": "with --json: search for what would fit"},
    "--yaml": {"action": "store_true", "help": "print the scenario as YAML and exit"},
    "--quick": {"action": "store_true", "help": "the analytic estimate alone, at once and without torch"},
    "--fresh": {"action": "store_true", "help": "ask anew, though an answer is kept from an earlier time"},
}
_RECIPE = {
    "--recipe": {"metavar": "NAME", "help": "of a model that continues no text: the program that trains it; list: all"}
}
_RUN = {
    "--rows": {"type": whole_number, "metavar": "N", "help": "rows of the training data: hours, cost and energy"},
    "--tokens-per-row": {"metavar": "N", "help": "mean row length (default: the sequence length)"},
    "--epochs": {"metavar": "N", "help": "number of epochs (default: 1)"},
    "--price": {"action": "append", "metavar": "PER_HOUR",
                "help": "price per GPU-hour, any currency: a number, NAME=1.29, or a YAML file of them"},
    "--deadline": {"metavar": "24h", "help": "the run has to end within it: 90min, 24h, 3d"},
    "--grams-per-kwh": {"metavar": "GRAMS", "help": "CO2 of the electricity"},
}  # fmt: skip
_OWN = {
    "--count": {"type": whole_number, "metavar": "N", "help": "how many tensors (10)"},
    "--layers": {"action": "store_true", "help": "one line for tensors that are alike in all layers"},
    "--fewest": {"action": "store_true", "help": "instead: the least number of GPUs that hold the step"},
    "--measured": {"metavar": "FIGURE", "help": "14.2GiB (nvidia-smi's), allocated=9543MiB, reserved=..., oom=...;"
                   " a record of `measure --record`; a memory snapshot of PyTorch (.pickle)"},
    "--record": {"metavar": "FILE", "help": "keep what was recorded"},
    "--for": {"dest": "tool_for", "choices": FILES, "help": "the tool whose file is written"},
    "--output": {"metavar": "FILE", "help": "write the file too, which must not be there"},
    "--requests": {"type": whole_number, "metavar": "N", "help": "requests at once (1)"},
    "--weights": {"metavar": "FORMAT", "help": "bf16, fp16, nf4, or a GGUF quantization such as q4_k_m"},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {**_STEP, **_ANSWER, **_RUN, **_RECIPE, **_OWN}
_EXAMPLES = {"--gpu": "4090", "-s": 2048, "-b": 4, "--set": "lora.rank=64", "--rows": 50000, "--tokens-per-row": 350,
             "--epochs": 3, "--price": 1.29, "--deadline": "24h", "--grams-per-kwh": 380, "--count": 10,
             "--recipe": "list", "--measured": "14.2GiB", "--for": "axolotl", "--output": "train.yaml",
             "--record": "run.json", "--requests": 4, "--weights": "q4_k_m"}  # fmt: skip

_MEMORY = ("vram", "vram_gb", "gpu_memory")
# What people type for an option of ours, beside the names of a scenario's fields.
_ALSO = {
    **dict.fromkeys((*_MEMORY, "card", "device"), "--gpu"),
    **dict.fromkeys(("bs", "batch", "batchsize", "train_batch_size"), "-b"),
    **dict.fromkeys(("ctx", "context", "context_length", "seq", "seqlen", "seq_length"), "-s"),
    **dict.fromkeys(("quant", "quantization", "dtype"), "--weights"),
    **dict.fromkeys(("examples", "samples", "num_rows", "dataset_size"), "--rows"),
    **dict.fromkeys(("format", "framework", "tool"), "--for"),
}
_COUNTS = ("gpus", "num_gpus", "n_gpus", "ngpus", "num_processes", "nproc_per_node", "world_size")  # 4 of --gpu
# Words between a model and a GPU in a question in plain English.
_FILLERS = frozenset("a an the i can will would does do fit fits on in with for my of into to train finetune".split())


@dataclass(frozen=True)
class Command:
    """A question: its options, and what its help says.

    Attributes
    ----------
    takes
        Its options, by their names in :data:`OPTIONS`; None for a command with a parser of its own.
    needs
        Options without which it has no answer.
    """

    about: str
    takes: Sequence[str] | None = None
    examples: Sequence[str] = ()
    needs: Sequence[str] = ()


def _all_but(*names: str) -> list[str]:
    return [name for name in _STEP if name not in names]


COMMANDS: dict[str, Command] = {
    "fit": Command(
        "whether a training step fits (the word may be left out)",
        [*_STEP, *_ANSWER, *_RUN, *_RECIPE],
        ("Qwen/Qwen2.5-Coder-7B-Instruct --gpu 4090",
         "qwen2.5-coder-7b --method lora --gpu 2x3090 -s 2048 -b 4 --set lora.rank=64",
         "my-axolotl.yaml --gpu 24GiB --rows 50000 --epochs 3 --price 0.35",
         "openai/whisper-large-v3 --gpu t4 -b 8"),
    ),
    "longest": Command(
        "the longest rows that fit", [*_all_but("-s"), "--json", "--fresh"],
        ("longest qwen2.5-coder-7b --gpu 4090 -b 2",), ("--gpu",),
    ),
    "batch": Command(
        "the largest micro-batch that fits", [*_all_but("-b"), "--json", "--fresh"],
        ("batch qwen2.5-coder-7b --gpu 4090 -s 1024",), ("--gpu",),
    ),
    "gpus": Command(
        "every GPU of the catalogue; with --rows also hours and cost",
        [*_all_but("--gpu"), "--json", "--fresh", *_RUN],
        ("gpus qwen2.5-coder-7b -s 2048", "gpus qwen3-8b --rows 50000 --epochs 3 --price a100-80gb=1.29"),
    ),
    "divide": Command(
        "how to divide a step among several GPUs", [*_STEP, "--fewest", "--json", "--fresh"],
        ("divide llama-3.1-70b --gpu 8xh100-80gb", "divide llama-3.1-70b --gpu h100-80gb --fewest"), ("--gpu",),
    ),
    "config": Command(
        "the fastest settings that fit, as the file of the tool that trains with them",
        ["--gpu", "--method", "-s", "-b", "--set", "--for", "--output", "--json", "--quick", *_RUN],
        ("config qwen2.5-coder-7b --gpu 4090 -s 2048 --for axolotl",
         "config Qwen/Qwen3-8B --gpu a100-40gb --for llama-factory --rows 50000 --tokens-per-row 350"),
        ("--gpu", "--for"),
    ),
    "explain": Command(
        "which tensors are alive at the peak", [*_STEP, "--count", "--layers", "--json", "--fresh"],
        ("explain qwen2.5-coder-7b --gpu 4090 --count 30 --layers",),
    ),
    "serve": Command(
        "serving the model instead of training it",
        ["--gpu", "-s", "--set", "--from", "--requests", "--weights", "--json", "--fresh"],
        ("serve llama-3.1-8b --gpu 24GiB --requests 4 -s 4096 --weights q4_k_m",),
    ),
    "compare": Command(
        "why your own measurement differs", [*_STEP, "--measured"],
        ("compare config.yml --gpu 4090 --measured 14.2GiB", "compare config.yml --gpu 4090 --measured run.json"),
        ("--measured",),
    ),
    "measure": Command(
        "run your program until its third update, and compare", [*_STEP, "--record"],
        ("measure config.yml --gpu 4090 -- python train.py",),
    ),
    "run": Command("somebody's CUDA program as it stands, without a GPU"),
    "diff": Command("what a change of a training file does to its memory, for a pull request"),
    "check": Command("which of these training files' steps do not fit, for a commit hook"),
    "mcp": Command("the answers as tools for an assistant"),
}  # fmt: skip
_FILES = """
WHAT is a model (a name in config/models/, an id on the Hub, a folder, a config.json), a scenario, a run's settings, or
a file of axolotl, LLaMA-Factory, TRL, torchtune, torchtitan, ms-swift or verl (a script too); a program or notebook
with TRL or Unsloth; an adapter_config.json. Files of accelerate, DeepSpeed or PEFT may follow. Nothing is executed.
"""
_STATUS = """
Exit status: 0 fits (or no GPU named), 1 does not fit, not in time, or too close to call, 2 a wrong question, 3 no
answer.
"""


def parser() -> Parser:
    """The commands. Each one's options are those of :func:`own_parser`."""
    made = Parser(prog=PROGRAM, description="Whether a fine-tuning step fits a GPU, asked in one line.",
                  epilog=_epilog("fit"), formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("--version", action="store_true", help="versions of this package, torch and the catalogue")
    made.add_argument("--print-completion", metavar="SHELL", help="what completes it in bash, zsh or fish")
    adds = made.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        adds.add_parser(name, help=command.about)
    return made


def own_parser(name: str) -> Parser:
    """The options of a command that shares this grammar."""
    command = COMMANDS[name]
    made = Parser(
        prog=f"{PROGRAM} {name}",
        description=f"{command.about[0].upper()}{command.about[1:]}.",
        epilog=_epilog(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("what", nargs="+", metavar="WHAT", help="a model or a file; then files beside it")
    add_options(made, name)
    return made


def add_options(made: argparse.ArgumentParser, name: str) -> None:
    """Add a command's options to a parser."""
    for option in COMMANDS[name].takes or ():
        given = dict(OPTIONS[option])
        names = [option, given.pop("long")] if "long" in given else [option]
        made.add_argument(*names, **given)


def _epilog(name: str) -> str:
    return "\n".join([*(f"  {PROGRAM} {one}" for one in COMMANDS[name].examples), _FILES, _STATUS.strip()])


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command of a line, and the words behind it."""
    if words and words[0] in COMMANDS:
        return words[0], list(words[1:])
    return "fit", list(words)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The options of a line about which :func:`slips` says nothing; what its command does not take is None."""
    command, rest = split(words)
    given = own_parser(command).parse_args(rest)
    missing = {(one.get("dest") or _dest(one.get("long") or name)): [] if one.get("action") == "append" else None
               for name, one in OPTIONS.items()}  # fmt: skip
    known = {name: value for name, value in vars(given).items() if value is not None}
    return argparse.Namespace(**{**missing, **known}, command=command)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a line whose words are checked, and whose model is not looked up.

    Raises
    ------
    UserError
        For all words that are wrong, with the line in which they are put right.
    """
    if found := slips(words):
        line = shlex.join([PROGRAM, *put_right(words, found)])
        raise UserError.several([slip.error().with_values(write=line) for slip in found])
    return parsed(words)


def _dest(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


# --- slips: each wrong word, and the nearest right one ----------------------------------------------------------------


class Slip(NamedTuple):
    """Words of a line that are wrong, and what may stand in their place; ``meant`` None: nothing is near."""

    at: int
    count: int
    problem: str
    found: str
    allowed: str
    meant: Sequence[str] | None

    def error(self) -> UserError:
        """The error, whose line to write is not known before all slips are put right."""
        return UserError(self.problem, where="the command line", found=self.found or None, allowed=self.allowed,
                         write=PASTED)  # fmt: skip


def put_right(words: Sequence[str], found: Sequence[Slip]) -> list[str]:
    """The line with what may have been meant in the place of each slip."""
    kept = list(words)
    for slip in sorted(found, key=lambda slip: -slip.at):
        kept[slip.at : slip.at + slip.count] = map(str, slip.meant or ())
    return kept


def slips(words: Sequence[str]) -> list[Slip]:
    """All words of a line that its command does not understand: no model's name is looked up for it."""
    command, rest = split(words)
    start = len(words) - len(rest)
    takes = COMMANDS[command].takes
    if takes is None or {"-h", "--help"} & set(rest):
        return []
    found, places = list(_wrong_options(command, rest, start)), list(_positions(words))
    plain = list(_plain_english(words, places))
    found += plain
    places = [place for place in places if not any(slip.at == place for slip in plain)]
    near = closest(words[places[0]], COMMANDS) if command == "fit" and len(places) > 1 else None
    if near and not words[places[0]].startswith(("/", ".")) and "." not in words[places[0]]:
        word = words[places[0]]
        found.append(Slip(places[0], 1, f"{PROGRAM} has no command `{word}`.", word, ", ".join(COMMANDS), [near]))
    elif not places:
        problem = "No model or file is named."
        found.append(Slip(start, 0, problem, "", "a model's name, its id on the Hub, or a file", [_EXAMPLE]))
    typed = {_named(word) for word in words}
    for name in COMMANDS[command].needs:
        if not {name, OPTIONS[name].get("long")} & typed and not any(name in (slip.meant or ()) for slip in found):
            found.append(Slip(len(words), 0, f"`{PROGRAM} {command}` needs {name}.", "", OPTIONS[name]["help"],
                              [name, "24GiB" if name == "--gpu" else _EXAMPLES[name]]))  # fmt: skip
    return found


def _plain_english(words: Sequence[str], places: Sequence[int]) -> Iterator[Slip]:
    """Words beside the model that are no files: ``on 4090``, ``lora``, ``does ... fit``."""
    beside = [place for place in places if not Path(words[place]).exists()]
    if len(beside) < 2:
        return
    asks = any(words[place].lower() in _FILLERS for place in beside)
    named = {_named(word) for word in words}
    for place in beside if asks else beside[1:]:
        word = words[place]
        problem, allowed = "A question is a model and options.", "a model's name, then options"
        if asks and word.lower() in _FILLERS:
            yield Slip(place, 1, problem, word, allowed, [])
        elif word.lower() in METHODS and "--method" not in named:
            named.add("--method")
            yield Slip(place, 1, problem, word, allowed, ["--method", word.lower()])
        elif "--gpu" not in named and _is_gpu(word):
            named.add("--gpu")
            yield Slip(place, 1, problem, word, allowed, ["--gpu", word])


def _is_gpu(word: str) -> bool:
    from dryfit.cards.gpus import find

    try:
        return bool(find(word))
    except UserError:
        return False


def _named(word: str) -> str:
    short = re.match(r"(-[a-z])\d", word)
    return short[1] if short else word.partition("=")[0]


def _wrong_options(command: str, words: Sequence[str], start: int) -> Iterator[Slip]:
    takes, at = COMMANDS[command].takes or (), 0
    table = {name: option for option in takes for name in (option, OPTIONS[option].get("long")) if name}
    while at < len(words):
        word, here, at = words[at], at, at + 1
        if not word.startswith("-") or len(word) == 1 or re.match(r"-\d", word):
            continue
        name, equals, value = word.partition("=")
        short = re.fullmatch(r"(-[a-z])(\d.*)", word)
        name, value, equals = (short[1], short[2], "=") if short else (name, value, equals)
        follows = words[at] if at < len(words) and not re.match(r"-[^\d.]", words[at]) else None
        option = table.get(name)
        form = OPTIONS[option] if option else {}
        if form.get("action") == "store_true":
            continue
        takes_next = not equals and follows is not None and (option is not None or not _is_switch(name))
        value = value if equals else follows if takes_next else None
        count = 2 if takes_next else 1
        at += takes_next
        if option is None:
            yield from _unknown(command, start + here, count, name, value, table, words, start)
        elif value is None:
            example = _EXAMPLES.get(option) or form["choices"][0]
            yield Slip(start + here, 1, f"`{name}` has no value.", word, form["help"], [option, str(example)])
        elif form.get("choices") and value not in form["choices"]:
            near = closest(value, form["choices"]) or form["choices"][0]
            yield Slip(start + here, count, f"`{name}` does not take {value}.", shlex.join(words[here:at]),
                       ", ".join(form["choices"]), [option, near])  # fmt: skip
        elif form.get("type") and form["type"](value) is None:
            yield Slip(start + here, count, f"`{name}` takes a whole number of at least 1, not {value}.",
                       shlex.join(words[here:at]), "1, 2, 3, ...; thousands may be set apart, as in 2,048",
                       [option, str(_EXAMPLES[option])])  # fmt: skip


def _is_switch(name: str) -> bool:
    """Whether an option that this command does not take has no value: ``--full`` and ``--no-...`` have none."""
    key = name.lstrip("-")
    return OPTIONS.get(name, {}).get("action") == "store_true" or key in METHODS or key.startswith(("no-", "no_"))


def _unknown(
    command: str, at: int, count: int, name: str, value: str | None, table: Mapping[str, str],
    words: Sequence[str], start: int,
) -> Iterator[Slip]:  # fmt: skip
    """An option that the command does not take: another command's, or the nearest of its own and of the fields."""
    found = name if value is None else f"{name} {value}"
    elsewhere = [other for other, one in COMMANDS.items() if name in (one.takes or ())]
    if elsewhere:
        do = "do" if elsewhere[1:] else "does"
        problem = f"`{PROGRAM} {command}` does not use {name}; {', '.join(elsewhere)} {do}."
        yield Slip(at, count, problem, found, ", ".join(table), [])
        return
    key = name.lstrip("-").replace("-", "_").lower()
    problem = f"{PROGRAM} has no option `{name}`."
    allowed = f"{PROGRAM} {command} --help lists all; --set takes any field of a scenario"
    gpu = next((place for place, word in enumerate(words) if place and words[place - 1] == "--gpu"), None)
    if key in _COUNTS and gpu is not None and (value or "").isdigit():  # one option says both
        yield Slip(at, count, problem, found, "--gpu 2x4090", [])
        yield Slip(start + gpu, 1, "How many GPUs stands with their name.", words[gpu], "--gpu 2x4090",
                   [f"{value}x{words[gpu]}"])  # fmt: skip
        return
    known = {_dest(option): option for option in table} | (_fields() if "--set" in table else {})
    known |= {also: option for also, option in _ALSO.items() if option in table}
    denied = key.startswith("no_") and key not in known
    key = key.removeprefix("no_") if denied else key
    near = key if key in known else closest(key, known, 0.65)  # --tokens is not --set kernels
    meant = _typed(known[near], "false" if denied else value) if near else []
    if key in METHODS and value is None and "--method" in table:
        meant = ["--method", key]
    if not meant:
        problem = f"{PROGRAM} has no option `{name}`, and the line below leaves it out."
    if meant[:1] == ["--gpu"] and re.fullmatch(r"[\d.]+", meant[1]) and key in _MEMORY:
        meant[1] += "GiB"
    yield Slip(at, count, problem, found, allowed, meant)


def _fields() -> dict[str, str]:
    """Fields and their parts by what may be typed for them: ``lora_rank``, and other tools' names."""
    from dryfit.scenario.fields import BY_NAME, ELSEWHERE

    parts = {
        f"{field.name}_{part.name}": f"{field.name}.{part.name}" for field in BY_NAME.values() for part in field.parts
    }
    return {**ELSEWHERE, **parts, **{name: name for name in BY_NAME}}


def nearest_field(name: str) -> str | None:
    """The field, with its part, whose name is nearest to one that no field has; None: nothing is near."""
    known = _fields()
    near = closest(name.replace(".", "_"), known)
    return known[near] if near else None


def _typed(meant: str, value: str | None) -> list[str]:
    """An option or a field with a value, as it is typed."""
    option = meant if meant.startswith("-") else FLAGS.get(meant)
    if option is None:
        return ["--set", f"{meant}={value if value is not None else 'true'}"]
    short = next((name for name, one in OPTIONS.items() if one.get("long") == option), option)
    if OPTIONS[short].get("action") == "store_true":
        return [short]
    return [short, value if value is not None else str(_EXAMPLES.get(short) or OPTIONS[short]["choices"][0])]


# --- a line as it was typed, with something changed in it -------------------------------------------------------------

FLAGS = {"sequence_length": "-s", "micro_batch": "-b", "method": "--method", "gpu": "--gpu", "like": "--like"}


def suggested(command: Sequence[str], changes: Mapping[str, Any], *, instead_of: str | None = None) -> str:
    """A command line to paste: what was typed, with what has to change in its place.

    Parameters
    ----------
    changes
        Fields of a scenario, those with parts as mappings, or options (``--rows``), with their values. None takes away
        what was typed for a field, or says null where nothing was.
    instead_of
        A field as it was typed wrongly, ``lora.rnak``; it goes.
    """
    return shlex.join([PROGRAM, *changed(command, changes, instead_of=instead_of)])


def changed(command: Sequence[str], changes: Mapping[str, Any], *, instead_of: str | None = None) -> list[str]:
    """The words of :func:`suggested`."""
    words = list(command)
    for name, value in changes.items():
        words = _changed(words, name, value, instead_of)
    return words


def _changed(words: list[str], name: str, value: Any, instead_of: str | None) -> list[str]:
    if name == "model" and isinstance(value, str):
        at, *others = [*_positions(words)] or [None]
        gone = {place for place in others if not Path(words[place]).exists()}  # the rest of a name: "qwen3 8b"
        rest = [word for place, word in enumerate(words) if place > (-1 if at is None else at) and place not in gone]
        return [*words[:at], value, *rest] if at is not None else [value, *rest]
    if name == "--set":
        return [*words, "--set", str(value)]
    flag = name if name.startswith("--") else FLAGS.get(name)
    olds = {old for old in (instead_of, name) if old}
    if flag:
        new = [] if value is None else [flag, _gpu(value) if name == "gpu" else str(value)]
        return _replaced(words, new, {flag, OPTIONS.get(flag, {}).get("long", flag)}, olds)
    if name == "parallel" and value and not any(one.startswith("parallel") for one in _set_by(words)):
        return _replaced(words, ["--strategy", str(value["strategy"])], {"--strategy"}, olds)
    if not isinstance(value, Mapping):
        parts = {one for one in _set_by(words) if one.startswith(f"{name}.")}
        new = [] if value is None and (olds | parts) & set(_set_by(words)) else ["--set", f"{name}={yaml_text(value)}"]
        return _replaced(words, new, set(), olds | parts)
    for part, item in value.items():
        if item is not None:
            new = ["--set", f"{name}.{part}={yaml_text(item)}"]
            words = _replaced(words, new, set(), {f"{name}.{part}", *([instead_of] if instead_of else [])} - {name})
    return words


def _gpu(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    kind = value.get("name") or f"{value['vram_gib']:g}GiB"
    return f"{value['count']}x{kind}" if (value.get("count") or 1) > 1 else str(kind)


def _set_by(words: Sequence[str]) -> list[str]:
    """The fields, or their parts, that ``--set`` names."""
    texts = [word for before, word in pairwise(words) if before == "--set"]
    texts += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    return [text.partition("=")[0].strip() for text in texts]


def _replaced(words: Sequence[str], new: Sequence[str], flags: Iterable[str], fields: Iterable[str]) -> list[str]:
    """A command line with new words where one of some options, or what set one of some fields, stood first."""
    kept: list[str] = []
    place, at = None, 0
    while at < len(words):
        name, equals, value = words[at].partition("=")
        own = value if equals else next(iter(words[at + 1 : at + 2]), "")
        if name in flags or (name == "--set" and own.partition("=")[0].strip() in fields):
            place = len(kept) if place is None else place
            at += 1 if equals or _is_switch(name) else 2
        else:
            kept.append(words[at])
            at += 1
    place = len(kept) if place is None else place
    return [*kept[:place], *new, *kept[place:]]


def first_place(words: Sequence[str]) -> Iterator[int]:
    """Places of the words that are no command, no option and no option's value."""
    return _positions(words)


def _positions(words: Sequence[str]) -> Iterator[int]:
    """Places of the words that are no command, no option and no option's value."""
    _, rest = split(words)
    start, skip = len(words) - len(rest), False
    for at, word in enumerate(rest, start):
        if skip:
            skip = False
        elif word.startswith("-") and len(word) > 1:
            skip = "=" not in word and not _is_switch(word) and not re.match(r"-[a-z]\d", word)
        else:
            yield at
