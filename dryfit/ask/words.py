"""What somebody typed: a line as options and plain words, the same with something changed, and what was meant.

:func:`meant` is the one place that turns words which no command takes into a model, a card, a method and options. It
knows a line's own options, a scenario's fields, the keys of other tools' files (by their readers) and plain English.
"""

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import dryfit.readers as readers
from dryfit.ask.options import (
    BITS,
    COMMANDS,
    EXAMPLES,
    LIKE,
    METHODS,
    OPTIONS,
    PROGRAM,
    STRATEGIES,
    TOOLS,
    dest,
    parsed,
    split,
)
from dryfit.cards.gpu_names import is_apple
from dryfit.cards.gpus import find, known
from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml, yaml_value
from dryfit.common.text import closest, yaml_text
from dryfit.data import data_path
from dryfit.readers.reading import keys
from dryfit.recipes.models import known_name
from dryfit.scenario.fields import BY_NAME, ELSEWHERE
from dryfit.scenario.hub import MODELS, HubId, called, index, nearest, packed
from dryfit.scenario.nested_fields import gpu_count

PASTED = "the line with all of it put right"  # stands for it until it is known
_EXAMPLE = "qwen2.5-coder-7b"
FLAGS = {
    "sequence_length": "-s",
    "micro_batch": "-b",
    "method": "--method",
    "gpu": "--gpu",
    "like": "--like",
}
_SERVED = COMMANDS["serve"].takes
_LONG = {one["long"]: name for name, one in OPTIONS.items() if "long" in one}

# --- a line, as options and plain words -------------------------------------------------------------------------------


_OF_MODELS = (
    "config.json",
    "adapter_config.json",
    "model_index.json",
)  # one of them lies in a model's folder


class Item(NamedTuple):
    """A plain word of a line, whose ``name`` is "", or an option by its short name, with its value."""

    name: str
    value: str | None
    words: tuple[str, ...]

    @property
    def field(self) -> str:
        """The field, or its part, that ``--set`` sets here; "" for anything else."""
        return (self.value or "").partition("=")[0].strip() if self.name == "--set" else ""

    @property
    def is_beside(self) -> bool:
        """Whether this is a plain word that names no file."""
        path = Path(self.value or "")
        return (
            not self.name
            and not path.is_file()
            and not any((path / name).is_file() for name in _OF_MODELS)
        )


def items(words: Sequence[str]) -> list[Item]:
    """The items of a line without its command. An option that is not known takes the word behind it as its value."""
    found, at = [], 0
    while at < len(words):
        start, word = at, words[at]
        at += 1
        if not _is_option(word):
            parts = (
                [word]
                if _is_one(word)
                else [part for said in word.split() if (part := said.rstrip(",;?!"))]
            )
            found += [Item("", part, (part,)) for part in (_URL.sub(r"\1", part) for part in parts)]
            continue
        name, equals, value = word.partition("=")
        if short := re.fullmatch(r"(-[a-z])(\d.*)", word):
            name, equals, value = short[1], "=", short[2]
        option = _LONG.get(name, name)
        follows = (
            words[at] if at < len(words) and not equals and not _is_option(words[at]) else None
        )
        if (
            follows is not None
            and _takes_next(option, follows)
            and not (option not in OPTIONS and _only_model(words, at))
        ):
            value, at = follows, at + 1
        found.append(
            Item(option, value if equals or at > start + 1 else None, tuple(words[start:at]))
        )
    return found


_URL = re.compile(
    r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:[/?#].*)?$"
)


def _is_one(word: str) -> bool:
    """Whether a word is one: a question in quotes is several, and the name of a file may hold spaces."""
    return (
        word[:1] in "./~"
        or Path(word).suffix[1:].isalpha()
        or (len(word) < 200 and Path(word).exists())
    )


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not re.match(r"-[\d.]", word)


def _takes_next(name: str, follows: str) -> bool:
    """Whether the word behind an option is its value; ``--full``, ``--no-...`` and ``--4bit`` take on and off alone."""
    if name in OPTIONS:
        return OPTIONS[name].get("action") != "store_true"
    if not _says(_key(name)) and not _key(name).startswith("no_"):
        return True
    return (
        follows.lower() in (*_ON, *_OFF)
        or bool(_says(_key(follows)))
        or _key(follows) in STRATEGIES
    )


def _only_model(words: Sequence[str], at: int) -> bool:
    """Whether a word behind an unknown option is the line's model: ``--verbose qwen3-8b``."""
    others = any(
        not _is_option(word) for place, word in enumerate(words) if place not in (at, at - 1)
    )
    return not others and _key(words[at - 1]) not in _names() and bool(_exact_model(words[at]))


def suggested(
    command: Sequence[str], changes: Mapping[str, Any], *, instead_of: str | None = None
) -> str:
    """A command line to paste: what was typed, with what has to change in its place.

    ``changes``: fields of a scenario, those with parts as mappings, or options (``--rows``), with their values. None
    takes away what was typed for a field, or says null where nothing was. ``instead_of``: a field as it was typed
    wrongly, ``lora.rnak``; it goes.
    """
    return shlex.join([PROGRAM, *changed(command, changes, instead_of=instead_of)])


def changed(
    command: Sequence[str], changes: Mapping[str, Any], *, instead_of: str | None = None
) -> list[str]:
    """The words of :func:`suggested`."""
    _, rest = split(command)
    own = items(rest)
    for name, value in changes.items():
        own = _changed(own, name, value, instead_of)
    return [*command[: len(command) - len(rest)], *chain.from_iterable(item.words for item in own)]


def read_as(words: Sequence[str], gpu: str | None) -> str:
    """The line that a question was read as: the model in front, and the card by the catalogue's name ``gpu``."""
    typed = next((item.value for item in items(words) if item.name == "--gpu"), None)
    if typed and gpu in known():
        words = changed(words, {"gpu": {"name": gpu, "count": gpu_count(typed)}})
    _, rest = split(words)
    own = sorted(items(rest), key=lambda item: bool(item.name))
    return shlex.join(
        [
            PROGRAM,
            *words[: len(words) - len(rest)],
            *chain.from_iterable(item.words for item in own),
        ]
    )


def _changed(own: list[Item], name: str, value: Any, instead_of: str | None) -> list[Item]:
    olds = {old for old in (instead_of, name) if old}
    fields = [item.field for item in own if item.field]
    if name == "model" and isinstance(value, str):
        first = next((item for item in own if not item.name), None)
        gone = [item for item in own if item is first or (item.is_beside and item is not first)]
        return _replaced(own, [value], lambda item: item in gone, 0)
    if name == "--set":
        return [*own, *items(["--set", str(value)])]
    if flag := name if name.startswith("--") else FLAGS.get(name):
        flag = _LONG.get(flag, flag)
        new = [] if value is None else [flag, gpu_text(value) if name == "gpu" else str(value)]
        return _replaced(own, new, lambda item: item.name == flag or item.field in olds)
    if (
        name == "parallel"
        and value
        and "strategy" in value
        and not any(one.startswith("parallel") for one in fields)
    ):
        return _replaced(
            own, ["--strategy", str(value["strategy"])], lambda item: item.name == "--strategy"
        )
    if not isinstance(value, Mapping):
        olds |= {one for one in fields if one.startswith(f"{name}.")}
        new = (
            [] if value is None and olds & set(fields) else ["--set", f"{name}={yaml_text(value)}"]
        )
        return _replaced(own, new, lambda item: item.field in olds)
    for part, one in value.items():
        if one is not None:
            whole = f"{name}.{part}"
            parts = {whole, *([instead_of] if instead_of else [])} - {name}
            own = _replaced(
                own,
                ["--set", f"{whole}={yaml_text(one)}"],
                lambda item, parts=parts: item.field in parts,
            )
    return own


def _replaced(
    own: list[Item], new: Sequence[str], goes: Callable[[Item], bool], place: int | None = None
) -> list[Item]:
    """Items with new words where the first of those stood that go."""
    at = next(
        (at for at, item in enumerate(own) if goes(item)), len(own) if place is None else place
    )
    kept = [item for item in own if not goes(item)]
    return [*kept[:at], *items(new), *kept[at:]]


def gpu_text(value: Any) -> str:
    """A GPU of a scenario as ``--gpu`` has it."""
    if not isinstance(value, Mapping):
        return str(value)
    kind = value.get("name") or f"{value['vram_gib']:g}GiB"
    return f"{value['count']}x{kind}" if (value.get("count") or 1) > 1 else str(kind)


# --- names: options, fields and what else is typed for them -----------------------------------------------------------

_ON, _OFF = ("none", "true", "yes", "on", "1"), ("false", "no", "off", "0")
_NUMBER = re.compile(r"\d[\d.,_]*(?:k|m|b)?", re.I)


@cache
def _table(name: str) -> Any:
    """A part of ``data/words.yaml``: its words, or what each word of it means."""
    part = read_yaml(data_path("words.yaml"))[name]
    if isinstance(part, str):
        return frozenset(part.split())
    return {word: str(said) for said, words in part.items() for word in words.split()}


@cache
def _quiet() -> frozenset[str]:
    """Words that are no part of a model's or a card's name, whether they ask for something or not."""
    return _table("fillers") | _table("trains") | _table("unclear")


@cache
def _commanding() -> frozenset[str]:
    """Words of which one stands in each phrase that is a command."""
    tables = ("asked", "most", "which", "commands", "scripts", "measures")
    return frozenset(chain(COMMANDS, ["fewest"], *(_table(name) for name in tables)))


def _says(key: str) -> list[str]:
    """The options that a word says with their values; none where it is no such word."""
    return _table("says").get(key, "").split()


def _key(name: str) -> str:
    return re.sub(r"[-\s]+", "_", name.lstrip("-").lower())


def _names() -> dict[str, str]:
    """Options, fields and their parts, by all that may be typed for them."""
    parts = {
        f"{field.name}_{part.name}": f"{field.name}.{part.name}"
        for field in BY_NAME.values()
        for part in field.parts
    }
    own = {
        dest(spelling): name
        for name, one in OPTIONS.items()
        for spelling in (name, one.get("long", name))
    }
    return {**_table("names"), **ELSEWHERE, **parts, **{name: name for name in BY_NAME}, **own}


def _known(command: str) -> dict[str, str]:
    """The same of a command: an option that it does not take has no name."""
    takes = set(COMMANDS[command].takes or ())
    known = {key: FLAGS.get(name, name) for key, name in _names().items()}
    known = {key: _LONG.get(name, name) for key, name in known.items()}
    if "--requests" in takes:
        known = {key: "--requests" if name == "-b" else name for key, name in known.items()}
    return {
        key: name
        for key, name in known.items()
        if name in takes or ("--set" in takes and name[0] != "-")
    }


def nearest_field(name: str) -> str | None:
    """The field, with its part, whose name is nearest to one that no field has; None: nothing is near."""
    known = {key: field for key, field in _names().items() if not field.startswith("-")}
    near = closest(name.replace(".", "_"), known)
    return known[near] if near else None


def _typed(name: str, value: str | None) -> list[str]:
    """An option or a field with a value, as it is typed."""
    if name == "model":
        return [value] if value else []
    if not name.startswith("-"):
        return ["--set", f"{name}={value if value is not None else 'true'}"]
    if OPTIONS[name].get("action") == "store_true":
        return [name]
    return [
        name,
        value if value is not None else str(EXAMPLES.get(name) or OPTIONS[name]["choices"][0]),
    ]


def _in_other_files(key: str, value: str | None) -> list[str] | str | None:
    """What a key of another tool's file says, as words of this line; why it says nothing here; None: no tool has it."""
    for tool, least in _LEAST.items():
        kind = keys(tool, "transformers").kind(key)
        if kind == "harmless":
            return "which does not change memory"
        if kind != "understood":
            continue
        try:
            one = {key: yaml_value(value, f"--{key}") if value is not None else True}
            before, after = (
                readers.read_tool(Path(tool), tool, least | more, None).fields for more in ({}, one)
            )
        except UserError:
            continue
        changes = {name: item for name, item in after.items() if before.get(name) != item}
        return changed([], changes) if changes else "which changes nothing here"
    return None


_LEAST = {
    "trl": {"model_name_or_path": "m", "use_peft": True},
    "axolotl": {"base_model": "m", "adapter": "lora"},
    "llama-factory": {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora"},
}


# --- what was meant ---------------------------------------------------------------------------------------------------


class _Fix(NamedTuple):
    """What an item is in a right line, and its error; ``words`` []: it goes."""

    problem: str
    found: str
    allowed: str
    words: Sequence[str]

    def error(self) -> UserError:
        return UserError(
            self.problem,
            where="the command line",
            found=self.found or None,
            allowed=self.allowed,
            write=PASTED,
        )


def meant(words: Sequence[str]) -> tuple[list[str], list[UserError]]:
    """The line that was meant, and what is wrong in the one that was typed. No model is looked up on the Hub for it."""
    command, rest = split(words)
    if COMMANDS[command].takes is None or {"-h", "--help"} & set(rest):
        return list(words), []
    own = items(rest)
    fixes: dict[int, _Fix] = {
        at: fix for at, item in enumerate(own) if item.name and (fix := _option(command, item))
    }
    first, plain, errors = _plain(command, own)
    errors = [*(fix.error() for fix in fixes.values()), *errors]
    kept = []
    for at, item in enumerate(own):
        kept += fixes[at].words if at in fixes else plain.get(at, item.words)
    kept = _said_once(kept)
    command, start = first or (command, words[: len(words) - len(rest)])
    if not any(not item.name for item in items(kept)):
        errors.append(
            _Fix(
                "No model or file is named.", "", "a model's name, its id on the Hub, or a file", []
            ).error()
        )
        kept = [_EXAMPLE, *kept]
    typed = {item.name for item in items(kept)} | {word for word in start if word.startswith("--")}
    if command != "config" and any(
        not item.name and Path(str(item.value)).is_file() for item in items(kept)
    ):
        typed.add(
            "--gpu"
        )  # a file may name its GPU; whether it does is known when it has been read
    for name in COMMANDS[command].needs:
        if name not in typed:
            kept += [name, "24GiB" if name == "--gpu" else str(EXAMPLES[name])]
            problem = f"`{PROGRAM} {command}` needs {name}."
            errors.append(_Fix(problem, "", OPTIONS[name]["help"], []).error())
    return [*start, *kept], errors


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a line whose words are checked, and whose model is not looked up.

    UserError: for all words that are wrong, with the line in which they are put right.
    """
    line, errors = meant(words)
    if errors:
        raise UserError.several(
            [error.with_values(write=shlex.join([PROGRAM, *line])) for error in errors]
        )
    return parsed(words)


def _option(command: str, item: Item) -> _Fix | None:
    """What is wrong in an option, with the nearest that is right; None: nothing is."""
    name, value, typed = item.name, item.value, shlex.join(item.words)
    as_typed = item.words[0].partition("=")[0]
    if name not in (COMMANDS[command].takes or ()):
        return _unknown(command, item)
    form = OPTIONS[name]
    if form.get("action") == "store_true":
        return None
    if value is None:
        return _Fix(f"`{as_typed}` has no value.", typed, form["help"], _typed(name, None))
    if form.get("choices") and value not in form["choices"]:
        near = closest(value, form["choices"])
        words = [name, near] if near else _says(_key(value))
        left = "" if words else ", and the line below leaves it out"
        return _Fix(
            f"`{as_typed}` does not take {value}{left}.", typed, ", ".join(form["choices"]), words
        )
    if form.get("type") and form["type"](value) is None:
        return _Fix(
            f"`{as_typed}` takes a whole number of at least 1, not {value}.",
            typed,
            "1, 2, 3, ...; thousands may be set apart, as in 2,048",
            [name, str(EXAMPLES[name])],
        )
    return None


def _unknown(command: str, item: Item) -> _Fix:
    """An option that the command does not take: another command's, or what it may mean here."""
    takes, value = COMMANDS[command].takes or (), item.value
    name = item.words[0].partition("=")[0]
    found = name if value is None else f"{name} {value}"
    if elsewhere := [other for other, one in COMMANDS.items() if item.name in (one.takes or ())]:
        do = "do" if elsewhere[1:] else "does"
        problem = f"`{PROGRAM} {command}` does not use {name}; {', '.join(elsewhere)} {do}."
        return _Fix(problem, found, ", ".join(takes), [])
    allowed = f"{PROGRAM} {command} --help lists all; --set takes any field of a scenario"
    words = _means(command, _key(name), value)
    if words and not isinstance(words, str):
        return _Fix(f"{PROGRAM} has no option `{name}`.", found, allowed, words)
    why = f", {words}" if words else ""
    return _Fix(
        f"{PROGRAM} has no option `{name}`{why}, and the line below leaves it out.",
        found,
        allowed,
        [],
    )


def _means(command: str, key: str, value: str | None) -> Sequence[str] | str | None:
    """What an unknown option means, as words of the line; why it means nothing here; None: nothing is near."""
    known, takes = _known(command), COMMANDS[command].takes or ()
    typed, key = key, re.sub("^(use|enable|with|do)_", "", key) if key not in known else key
    if (said := _says(typed) or _says(key)) and _takes(said, takes) and str(value).lower() in _ON:
        return said
    if "--strategy" in takes and _key(value or "") in STRATEGIES[1:]:
        return ["--strategy", _key(value or "")]
    if (said := _says(_key(value or ""))) and _takes(said, takes):
        return said
    if key in known and not (is_bare := str(value).lower() in _ON and not _is_switch(known[key])):
        if (
            known[key] == "--gpu"
            and key in _table("memory")
            and re.fullmatch(r"[\d.]+", value or "")
        ):
            value = f"{value}GiB"
        return _typed(known[key], value)
    if "--set" in takes and (
        read := _in_other_files(typed, value)
        or (key in known and is_bare and _typed(known[key], value))
    ):
        return read
    if key.startswith("no_") and key[3:] in known and not known[key[3:]].startswith("-"):
        return _typed(known[key[3:]], "false")
    if _says(key) and str(value).lower() in _OFF:
        return None
    begins = [
        dest(name) for name in takes if name.startswith("--") and dest(name).startswith(key)
    ]  # -g
    near = next(iter(begins), None) or closest(
        key.removeprefix("no_"), known, 0.65
    )  # --tokenz is not --set kernels
    return _typed(known[near], "false" if key.startswith("no_") else value) if near else None


def _is_switch(name: str) -> bool:
    """Whether an option or a field may be on: one that takes other values can't be meant by its name alone."""
    return name.startswith("-") or "." in name or name not in BY_NAME or True in BY_NAME[name].words


def _takes(words: Sequence[str], takes: Sequence[str]) -> bool:
    return all(word in takes for word in words if word.startswith("-"))


def _said_once(words: Sequence[str]) -> list[str]:
    """``--gpu 4 --gpu a100`` as one option, which says both; LoRA on a base of 4 bits is QLoRA."""
    own, cards, counts = items(words), [], []
    if any((item.name, item.value) == ("--method", "qlora") for item in own):
        own = [item for item in own if item.words != ("--method", "lora")]
    for value in (str(item.value) for item in own if item.name == "--gpu"):
        (counts if re.fullmatch(r"\d{1,3}", value) else cards).append(value)
    if counts and cards:
        own = _replaced(
            own, ["--gpu", f"{counts[0]}x{cards[0]}"], lambda item: item.name == "--gpu"
        )
    return [*chain.from_iterable(item.words for item in own)]


# --- plain words ------------------------------------------------------------------------------------------------------

_LONGEST_PHRASE = 6


class Understood(UserError):
    """That a line is a question in plain words, of which each was understood: it is answered, and its reading shown."""


class _Part(NamedTuple):
    """Some plain words and what they are; ``kind``: ``command``, ``model``, ``option``, ``filler`` or ``unknown``.

    ``is_sure`` False: a guess, such as a slip that is put right.
    """

    count: int
    kind: str
    words: Sequence[str]
    is_sure: bool = True


def _plain(
    command: str, own: Sequence[Item]
) -> tuple[tuple[str, list[str]] | None, dict[int, Sequence[str]], list[UserError]]:
    """The command that plain words name, what stands in their place, and one error for them; a right line has none."""
    places = [at for at, item in enumerate(own) if not item.name]
    beside = [at for at in places if own[at].is_beside]
    is_start = bool(places) and str(own[places[0]].value) in _quiet()  # python train.py
    if len(places) < 2 or not beside or (beside == places[:1] and not is_start):
        return None, {}, []
    texts = [str(own[at].value) for at in beside]
    has_what = beside != places and (beside[0] != places[0] or is_start)
    named = {item.field or item.name: item.value for item in own}
    parts = list(_parts(texts, command, has_what, dict(named)))
    if asked := next(
        (part.words[0] for part in parts if part.kind == "command"), ""
    ):  # other words depend on it
        parts = list(_parts(texts, asked, has_what, dict(named)))
    if not has_what and not any(part.kind == "model" for part in parts):
        parts = _with_a_model(parts, texts)
    known = {*named, *(word for part in parts for word in part.words)}
    known |= {"--method"} if any(text.lower() in _table("trains") for text in texts) else set()
    new: dict[int, Sequence[str]] = {}
    asked, left, guessed, at, lost = None, [], [], 0, ""
    runs = [text for text in texts if _table("asks").get(_bare(text)) == "--method"]
    is_alone = {1} == {
        1,
        *(gpu_count(word) for part in parts for word in part.words if part.words[0] == "--gpu"),
    }
    if (
        runs
        and command == "fit"
        and is_alone
        and "--method" not in known
        and _takes([*known], _SERVED)
    ):
        asked, guessed = (
            ("serve", ["serve"]),
            runs[:1],
        )  # `can i run llama on a 4090`: nothing is trained
        known |= {"--method"}
    for part in parts:
        here, said = beside[at : at + part.count], texts[at : at + part.count]
        at += part.count
        new |= dict.fromkeys(here, ())
        if part.kind == "command":
            asked = part.words[0], list(part.words)
        else:
            new[here[0]] = part.words
        if part.kind == "unknown":
            left += said
        elif part.kind in ("filler", "command"):
            left += [
                text
                for text in said
                if _table("asks").get(plain := _bare(text), plain) not in {plain, *known}
            ]
        if part.kind == "model":
            name = "-".join(said).lower()
            stands = (
                f" The line below takes {part.words[0]} for a model of {name}."
                if name in _table("sizes")
                else ""
            )
            lost = stands or lost_format(name, part.words[0])
        guessed += [] if part.is_sure or (part.kind == "model" and lost) else [" ".join(said)]
    kinds = [part.kind for part in parts]
    problem = (
        "A model's name is one word."
        if {*kinds} == {"model"}
        else "A question is a model and options."
    )
    if (
        kinds[0] == "command"
        and _command([texts[0].lower()], False) is None
        and parts[0].count == 1
    ):
        problem = f"{PROGRAM} has no command `{texts[0]}`."
    gone = f" The line below leaves out: {', '.join(left)}." if left else ""
    gone += f" The line below guesses what is meant by: {', '.join(guessed)}." if guessed else ""
    is_understood = not (left or guessed or lost)
    allowed = "a command, a model's name or a file, then options; a file of accelerate, DeepSpeed or PEFT beside it"
    one = (Understood if is_understood else UserError)(
        problem + gone + lost,
        where="the command line",
        found=" ".join(texts),
        allowed=allowed,
        write=PASTED,
    )
    return asked, new, [one]


def _bare(word: str) -> str:
    """A word of a sentence without its stops, in small letters."""
    return word.lower().strip("?,.!:()")


def _with_a_model(parts: list[_Part], texts: Sequence[str]) -> list[_Part]:
    """Unknown words side by side, with a digit if any have one, are the model: its own error says more of it."""
    runs, at, place = [], 0, 0
    for is_unknown, run in groupby(parts, lambda part: part.kind == "unknown"):
        count = len(own := list(run))
        words = texts[at : (at := at + sum(part.count for part in own))]
        letters, mixed = (
            any(re.search(kind, word, re.I) for word in words)
            for kind in ("[a-z]", r"\d[a-z]|[a-z]\d")
        )
        if is_unknown:
            runs.append((not mixed, not letters, place, count, words))
        place += count
    if runs:
        *_, place, count, words = min(runs)
        name = "-".join(words)
        parts[place : place + count] = [
            _Part(len(words), "model", [_table("sizes").get(name.lower(), name)], False)
        ]
    return parts


def _parts(
    texts: Sequence[str], command: str, has_what: bool, named: dict[str, str | None]
) -> Iterator[_Part]:
    """Plain words as parts of a question, the longest phrase that means something first.

    ``named``: the options and fields that the line has, with their values.
    """
    at, asked = 0, command if command != "fit" else ""
    while at < len(texts):
        part = next(
            (
                part
                for count in range(min(_LONGEST_PHRASE, len(texts) - at), 0, -1)
                if not any(text.endswith(",") for text in texts[at : at + count - 1])
                and (part := _phrase(texts[at : at + count], asked, has_what, named, at == 0))
            ),
            None,
        ) or _slip(texts[at], asked, has_what, named)
        asked = part.words[0] if part.kind == "command" else asked
        has_what = has_what or part.kind == "model"
        given = {item.field or item.name: item.value for item in items(part.words)}
        named |= (
            {} if re.fullmatch(r"\d{1,3}", str(given.get("--gpu"))) else given
        )  # `4 gpus` may stand beside `a100`
        at += part.count
        yield part


def _slip(text: str, *asked: Any) -> _Part:
    """A word that means nothing as it stands: one that asks for nothing, a slip in a known one, or unknown."""
    word = _bare(text)
    sought = {"longest": "-s", "batch": "-b"}.get(
        asked[0]
    )  # `longest context` and `batch size` say it once more
    if sought and (_names().get(word) == sought or (word == "size" and sought == "-b")):
        return _Part(1, "filler", ())
    if word in _quiet():
        return _Part(1, "unknown" if word in _table("unclear") else "filler", ())
    known = {*_quiet(), *_table("says")} if word.isalpha() and len(word) > 3 else ()
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    if near and near[0] in _quiet():
        return _Part(1, "filler", (), False)
    meant = near and _phrase(near, *asked, False)
    return meant._replace(is_sure=False) if meant else _Part(1, "unknown", ())


def _phrase(
    words: Sequence[str],
    command: str,
    has_what: bool,
    named: Mapping[str, str | None],
    is_first: bool,
) -> _Part | None:
    """What some words mean together; None: nothing."""
    typed, words = words, [_bare(word) for word in words]
    count = len(words)
    new = _with_options(words) or _command(words, is_first and count == 1)
    if new and (not command or new[0] == command):
        return _Part(count, "command", new, any(word in _commanding() for word in words))
    takes = COMMANDS[command or "fit"].takes or ()
    card = _card(words) if "--gpu" not in named else None
    if card and count == 1 and card[0].isalpha():  # a B200 is no batch of 200
        return _Part(count, "option", ["--gpu", card])
    if (
        option := _sized(words, command or "fit")
        or _counted(words, takes)
        or _said(words, command, takes)
    ):
        own = {item: named.get(item.field or item.name, "") for item in items(option)}
        # A kind of LoRA may come beside another: `lora in 4 bit`.
        is_out = any(
            old not in ("", item.value) and not {old, item.value} <= {"lora", "qlora"}
            for item, old in own.items()
        )
        is_out |= (
            option[-1].startswith("generation.") and "objective" not in named
        )  # nothing else generates
        new = [
            word
            for item, old in own.items()
            if old != item.value and not is_out
            for word in item.words
        ]
        return _Part(count, "unknown" if is_out else "option", new)
    if count == 2 and words[0].isdigit() and words[1].rstrip("s") in ("gpu", "card"):
        return _Part(count, "option", ["--gpu", words[0]])
    if card:
        return _Part(count, "option", ["--gpu", card])
    if not has_what and (model := _model(typed if count == 1 else words)):
        # `qwen3 8b lora` is a model and what it is trained with, unless a model has this very name.
        ends = count > 1 and _said(words[-1:], command or "fit", takes)
        if ends and model[0] != _exact_model("-".join(words)):
            return None
        return _Part(count, "model", model[:1], model[1])
    return None


def _command(words: Sequence[str], alone: bool) -> list[str] | None:
    """``max batch size``, ``longest``, ``which gpu``, ``how many gpus``, ``serving``; or a slip in the first word."""
    of = "_".join(
        word for word in words[1:] if word not in ("a", "the", "of", "big", "large", "long")
    )
    names = {key: FLAGS.get(name, name) for key, name in _names().items()}
    if words[:2] == ["how", "many"]:
        of = "_".join(words[2:])
        if not of or of.rstrip("s") in ("gpu", "card"):
            return ["divide", "--fewest"]
    elif words[-1].rstrip("s") in ("gpu", "card"):
        asked = " ".join(words[:-1])
        return (
            ["gpus"]
            if closest(asked, _table("which"), 0.8)
            else ["divide", "--fewest"]
            if asked == "fewest"
            else None
        )
    if len(words) > 1 and (words[0] in _table("most") | _table("asked")):
        option = names.get(of, names.get(of.removesuffix("_size")))
        return ["batch"] if option == "-b" else ["longest"] if option == "-s" else None
    if len(words) == 1 and words[0] in _table("commands"):
        return [_table("commands")[words[0]]]
    word = words[0].removeprefix("max-")
    near = alone and not {*"./"} & {*word} and word not in _quiet() and closest(word, COMMANDS, 0.8)
    return [near] if near and COMMANDS[near].takes and not _model(words) else None


def _with_options(words: Sequence[str]) -> list[str] | None:
    """Words that are a command with an option: ``trl script``, ``nvidia-smi says 21GB``."""
    if len(words) == 2 and words[1] == "script" and words[0] in _table("scripts"):
        return ["config", "--for", _table("scripts")[words[0]]]
    if (
        len(words) > 1
        and words[-2] in _table("measures")
        and re.fullmatch(r"\d+(\.\d+)?[gm]i?b", words[-1])
    ):
        source = f"{words[0]}=" if words[0] == "nvidia-smi" else ""
        return ["compare", "--measured", source + words[-1]] if source or len(words) == 2 else None
    return None


def _counted(words: Sequence[str], takes: Sequence[str]) -> list[str] | None:
    """``at 4096``, ``32k``, ``2048``: tokens, if they are so many; ``0.35 per hour``; for serving ``4 bit``."""
    said = re.fullmatch(r"(?:at|with) (\d+k|\d{3,})|(\d{1,3}k|\d{3,6})", " ".join(words))
    if said and "-s" in takes and (said[1] or said[2].endswith("k") or int(said[2]) % 256 == 0):
        return _typed("-s", said[1] or said[2])
    price = re.fullmatch(r"[$€]?(\d+(?:\.\d+)?)[$€]? (?:per|an|a) hour", " ".join(words))
    if price and "--price" in takes:
        return ["--price", price[1]]
    bits = re.fullmatch(r"(4|8)[ -]?bits?", " ".join(words))
    return ["--weights", _table("bits")[bits[1]]] if bits and "--weights" in takes else None


def _sized(words: Sequence[str], command: str) -> list[str] | None:
    """``seq len 4096``, ``4k context``, ``batch size 4``, ``r=16``, ``50k rows``."""
    known = _known(command)
    if len(words) == 1:
        pair = re.fullmatch(r"([a-z_-]+)[=:](.+)", words[0]) or re.fullmatch(
            r"([a-z_-]+?)(\d+k?)", words[0]
        )
        sides = [(pair[1], pair[2])] if pair else []
    else:
        first, *rest = [
            word for word in words if word not in ("of", "=", "size", "at", "with")
        ] or [""]
        sides = [("_".join([first, *rest[:-1]]), rest[-1])] if rest else []
        if not _card([first]) and (
            first.isdigit() or known.get("_".join(rest)) != "-b"
        ):  # not `4090 batch 2`
            sides.append(("_".join(rest), first))
    for name, value in sides:
        key = _key(name)
        if _NUMBER.fullmatch(value) and known.get(key) in _table("numeric"):
            method = next((["--method", word] for word in words if word in METHODS), [])
            return [*method, *_typed(known[key], value)]
        if (
            len(words) == 1
            and "=" in words[0]
            and (meant := _means(command, key, value))
            and not isinstance(meant, str)
        ):
            return list(meant)
    return None


def _said(words: Sequence[str], command: str, takes: Sequence[str]) -> list[str] | None:
    """``qlora``, ``full finetune``, ``zero3``, ``4-bit``, ``axolotl``: words of which there is one meaning."""
    key = _key(" ".join(words))
    said = _says(key) or (["--strategy", key] if key in STRATEGIES and key != "none" else None)
    if not said and command == "config" and key.replace("_", "-") in (*TOOLS, "unsloth"):
        said = ["--for", key.replace("_", "-")]
    if not said and key in BITS and "--weights" in takes:
        said = ["--weights", key]
    if not said and key in LIKE:
        said = ["--like", key]
    if not said:
        known = len(key) > 2 and key != "none" and key not in _quiet()
        fields = [name for name, field in BY_NAME.items() if known and key in field.words]
        said = (
            ["--set", f"{fields[0]}={key}"]
            if fields and (len(fields) == 1 or fields[0] == "precision")
            else None
        )
    return said if said and _takes(said, takes) else None


def _card(words: Sequence[str]) -> str | None:
    """``rtx 4090``, ``2x a100 80gb``, ``two 3090s``; a name of several sizes too, whose error then lists them."""
    text = " ".join(_table("numbers").get(word, word) for word in words)
    is_name = re.search(r"\d|....", text) and not re.match(
        r"\d{3,} \d{4}", text
    )  # `1024 4090`: a length and a card
    if not is_name or {*words} & _quiet() - {"gpu", "card"}:
        return None
    for name in dict.fromkeys(
        (text, re.sub(r"(?<=[\dix])s$", "", re.sub(r"^(\d{1,3})\s*x?\s+", r"\1x", text)))
    ):
        try:
            find(name)
        except UserError as error:
            near = gpu_text((error.change or {}).get("gpu", ""))
            typed, listed = ({*re.findall(r"\w+", _COUNT.sub("", one))} for one in (name, near))
            if (re.search(r"\d", text) and typed <= listed) or _CARD.fullmatch(name):
                return name
        else:
            return name if name in known() or not is_apple(name) or _MAC.fullmatch(name) else None
    return None


_COUNT = re.compile(r"^\d+\s*x\s*")
_CARD = re.compile(  # a host, or a card by its maker or series, known or not: its own error says what to write
    r"colab|kaggle|(?:\d+x)?(?:(?:(?:amd|radeon|rx|nvidia|geforce|rtx|gtx|intel|arc|tesla|quadro|instinct) ?)+"
    r"[a-z]?\d{2,4}[a-z]*|\d0[3-9]0)(?: (?:xtx?|ti|super|gre|ada|pro|laptop|mobile|\d+ ?gb))*"
)
_MAC = re.compile(
    r"(?:(?:i?mac|macbook|mini|studio|apple|silicon|air|pro|max|ultra|m\d|laptop|1[3-6]|\d+ ?gi?b?) ?)+"
)


def _exact_model(name: str) -> str | None:
    """A model that the catalogue or the Hub may have by this very name."""
    plain = name.lower()
    if (MODELS / f"{plain}.json").is_file() or plain in index()["fetched"]:
        return plain
    if "/" in name:
        return name if HubId.read(name) else None
    short = (hub for entry in index()["models"].values() for hub in entry["hub"])
    return next(
        (hub for hub in short if hub.partition("/")[2].lower() == plain), None
    ) or known_name(name)


def lost_format(typed: object, model: object) -> str:
    """A sentence on the format of packed weights that another model's name does not say any more; "" for none."""
    lost = packed(str(typed)) if isinstance(model, str) and not packed(model) else ""
    return f" The line below leaves out {lost}: QLoRA counts packed weights as NF4." if lost else ""


def _model(words: Sequence[str]) -> tuple[str, bool] | None:
    """A model's name in one word or several, ``llama 3.1 8b``, and whether it is sure: else one that is near.

    A name that is near has to end as names of models do.
    """
    name = "-".join(words)
    if "/" in name and len(words) > 1:
        return None
    if exact := _exact_model(name) or called(name):
        return exact, True
    ends = re.fullmatch(r"a?\d+(\.\d+)?[bm]|instruct|chat|base|it|mini|flash|\D+\d.*", words[-1])
    near = nearest(name) if ends and re.search(r"[a-z]{3}.*\d", name) else []
    first = near and re.match("[a-z]*", near[0].rpartition("/")[2].lower())[0]
    is_near = near and (len(words) == 1 or closest(re.match("[a-z]*", name)[0], [first], 0.75))
    return (near[0], False) if is_near else None
