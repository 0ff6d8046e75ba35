"""will-it-fit: whether a fine-tuning step fits a GPU, asked in one line.

    will-it-fit Qwen/Qwen2.5-Coder-7B-Instruct --gpu 4090
    will-it-fit qwen2.5-coder-7b --method lora --gpu 2x3090 -s 2048 -b 4 --set lora.rank=64
    will-it-fit my-axolotl.yaml --gpu 24GiB
    will-it-fit qwen2.5-coder-7b --all-gpus --rows 50000 --epochs 3 --price a100-80gb=1.29 --deadline 24h
    will-it-fit run | diff | check | mcp --help; or behind WHAT: --measure -- python train.py, --snapshot FILE

WHAT is a model (a name in config/models/, an id on the Hub, a folder, a config.json), a scenario, a run's settings, or
a file of axolotl, LLaMA-Factory, TRL, torchtitan, ms-swift or verl (a script too); a program or notebook with TRL or
Unsloth; an adapter_config.json. Files of accelerate, DeepSpeed or PEFT may follow. Nothing is executed. Exit status: 0
fits (or no GPU named), 1 does not fit, too close to call or not in time, 2 a wrong question, 3 no answer.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from will_it_fit.common.errors import UserError
from will_it_fit.common.schema import closest
from will_it_fit.common.text import yaml_text
from will_it_fit.readers import TOOLS
from will_it_fit.readers.common import dtype, kernel, optimizer_of
from will_it_fit.readers.request import LIKE
from will_it_fit.scenario.description import Field
from will_it_fit.scenario.fields import BY_NAME, ELSEWHERE
from will_it_fit.scenario.strategies import STRATEGIES

METHODS = BY_NAME["method"].words
RUN_OPTIONS = ("rows", "tokens_per_row", "epochs", "price", "deadline", "grams_per_kwh")  # options about a whole run


class Parser(argparse.ArgumentParser):
    """Errors of the command line in the form of all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"The command line is wrong: {message}.", where="the command line",
            allowed="will-it-fit --help lists all options", write="will-it-fit qwen2.5-coder-7b --gpu 4090",
        )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = Parser(prog="will-it-fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", nargs="+", metavar="WHAT", help="a model or a file; then files beside it")
    step = made.add_argument_group("the step")
    step.add_argument("--gpu", help="4090, 'A100 80GB', 2x3090, 24GiB, ...")
    step.add_argument("--method", choices=METHODS)
    step.add_argument("-s", "--sequence-length", type=whole_number, metavar="TOKENS")
    step.add_argument("-b", "--micro-batch", type=whole_number, metavar="ROWS")
    step.add_argument("--strategy", choices=STRATEGIES, help="how several GPUs are used (fsdp2 if --gpu names several)")
    step.add_argument("--like", choices=LIKE, help="take unset fields from this tool's defaults")
    step.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of a scenario")
    step.add_argument("--from", dest="tool", choices=TOOLS, help="tool that the file belongs to")
    form = made.add_argument_group("the answer")
    form.add_argument("--json", action="store_true", help="for programs: the object of will_it_fit.ask.predict")
    form.add_argument("--suggest", action="store_true", help="with --json: search for what would fit")
    form.add_argument("--yaml", action="store_true", help="print the scenario as YAML and exit")
    form.add_argument("--quick", action="store_true", help="the analytic estimate alone, at once and without torch")
    form.add_argument("--fresh", action="store_true", help="ask anew, though an answer is kept from an earlier time")
    form.add_argument("--explain", action="store_true", help="what is alive at the peak")
    form.add_argument("--count", type=whole_number, metavar="N", help="with --explain or --json: the N largest tensors")
    form.add_argument("--layers", action="store_true", help="the same, one line for tensors alike in all layers")
    kinds = made.add_mutually_exclusive_group()
    kinds.add_argument("--longest", action="store_true", help="the longest sequence that fits")
    kinds.add_argument("--largest-batch", action="store_true", help="the largest micro-batch that fits")
    kinds.add_argument("--all-gpus", action="store_true", help="every GPU of the catalogue")
    kinds.add_argument("--divide", action="store_true", help="how to divide the step among the GPUs: meshes, ranked")
    kinds.add_argument("--fewest", action="store_true", help="the least number of GPUs that hold the step, and how")
    kinds.add_argument("--compare", metavar="nvidia-smi=14.2GiB", help="explain the gap to your own measurement")
    kinds.add_argument("--serve", action="store_true", help="serving the model instead of training it")
    run = made.add_argument_group("the run", "hours, cost and energy, with --gpu or --all-gpus")
    run.add_argument("--rows", type=whole_number, metavar="N", help="rows of the training data")
    run.add_argument("--tokens-per-row", metavar="N", help="mean row length (default: the sequence length)")
    run.add_argument("--epochs", metavar="N", help="number of epochs (default: 1)")
    run.add_argument("--price", action="append", default=[], metavar="PER_HOUR",
                     help="price per GPU-hour, any currency: a number, NAME=1.29, or a YAML file of them")  # fmt: skip
    run.add_argument("--deadline", metavar="24h", help="the run has to end within it: 90min, 24h, 3d")
    run.add_argument("--grams-per-kwh", metavar="GRAMS", help="CO2 of the electricity")
    serve = made.add_argument_group("with --serve")
    serve.add_argument("--requests", type=whole_number, default=1, metavar="N", help="requests at once (1)")
    serve.add_argument("--weights", default=None, help="bf16, fp16, nf4, or a GGUF quantization such as q4_k_m")
    return made


def whole_number(text: str) -> int | None:
    """A count as it is written on a command line, thousands set apart or not; None for anything else."""
    plain = re.sub(r"(?<=\d)[,_](?=\d{3})", "", text.strip())
    return int(plain) if re.fullmatch(r"[1-9]\d*", plain) else None


# --- a command line as it was typed: the same words with something changed in them, and slips put right ----------
# A correction keeps the asker's words: what was meant stands where the slip stood.

FLAGS = {"sequence_length": "-s", "micro_batch": "-b", "method": "--method", "gpu": "--gpu", "like": "--like"}
_LONG = {"-s": "--sequence-length", "-b": "--micro-batch"}
_FIELDS = {"--sequence-length": "sequence_length", "--micro-batch": "micro_batch"}
# What people type for a field or an option, beside what other tools call it (ELSEWHERE).
_ALSO = {
    **dict.fromkeys(("seq_len", "seqlen", "seq_length", "max_len", "context", "context_length", "ctx", "length"),
                    "sequence_length"),
    **dict.fromkeys(("bs", "mbs", "batch", "batchsize", "per_device_batch_size"), "micro_batch"),
    **dict.fromkeys(("grad_accum", "gas", "accumulation", "accumulate"), "gradient_accumulation"),
    **dict.fromkeys(("bits", "quant", "quantize", "quant_type"), "quantization.type"),
    **dict.fromkeys(("data_type", "torch_dtype", "dtype"), "precision"),
    **dict.fromkeys(("algorithm", "trainer", "training", "stage", "rl"), "objective"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "ngpu", "gpu_count", "num_processes", "nproc_per_node"), "--count"),
    **dict.fromkeys(("vram", "memory", "vram_gib", "gpu_memory", "vram_gb"), "--gpu"),
    **dict.fromkeys(("card", "device", "gpu_name"), "--gpu"),
    **dict.fromkeys(("base", "name", "repo", "model_id", "model_name"), "model"),
    **{"r": "lora.rank", "checkpointing": "gradient_checkpointing", "parallel": "parallel.strategy"},
}  # fmt: skip
# Options without a value that other programs have.
_SWITCHES: dict[str, dict[str, Any]] = {
    **{word: {"method": word} for word in ("full", "lora", "qlora")},
    **{word: {"precision": word} for word in ("bf16", "fp16", "fp32")},
    **{word: {"method": "qlora"} for word in ("4bit", "load_in_4bit", "nf4")},
    **{word: {"quantization": {"type": "int8"}} for word in ("8bit", "load_in_8bit", "int8")},
    **{word: {"attention": "flash"} for word in ("flash_attention", "flash_attn", "fa2")},
    **{word: {"gradient_checkpointing": False} for word in ("no_gradient_checkpointing", "no_checkpointing")},
    **{word: {"objective": word} for word in ("dpo", "orpo", "kto", "grpo", "rloo")},
}
_EXAMPLE = "qwen2.5-coder-7b"
_STRATEGIES = {"fsdp": "fsdp2", "deepspeed": "zero3", "zero": "zero3", "dp": "ddp", "single": "none"}
_QUANTIZED = {"4bit": "nf4", "4": "nf4", "int4": "nf4", "4-bit": "nf4", "bnb": "nf4", "8bit": "int8", "8": "int8",
              "8-bit": "int8"}  # fmt: skip
_THOUSANDS = {"": 1, "k": 1024, "m": 1024**2}


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
    words = list(command)
    for name, value in changes.items():
        words = _changed(words, name, value, instead_of)
    return " ".join(["will-it-fit", *(shlex.quote(word) for word in words)])


def _changed(words: list[str], name: str, value: Any, instead_of: str | None) -> list[str]:
    if name == "model" and isinstance(value, str):
        at = next(iter(_positions(words)), None)
        return [value, *words] if at is None else [*words[:at], value, *words[at + 1 :]]
    if name == "--set":
        return [*words, "--set", str(value)]
    flag = name if name.startswith("--") else FLAGS.get(name)
    olds = {old for old in (instead_of, name) if old}
    if flag:
        new = [] if value is None else [flag, _gpu(value) if name == "gpu" else str(value)]
        return _replaced(words, new, {flag, _LONG.get(flag, flag)}, olds)
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
            at += 1 if equals else 2
        else:
            kept.append(words[at])
            at += 1
    place = len(kept) if place is None else place
    return [*kept[:place], *new, *kept[place:]]


def without(words: Sequence[str], parser: argparse.ArgumentParser, *names: str) -> list[str]:
    """A command line without some options, and without their values."""
    table = options(parser)
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word.partition("=")[0] in names:
            skip = "=" not in word and table[word].nargs != 0
        else:
            kept.append(word)
    return kept


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """A parser's options by each of their names."""
    return {name: action for action in parser._actions for name in action.option_strings}


def _positions(words: Sequence[str]) -> Iterator[int]:
    """Places of the words that are no option and no option's value."""
    table, skip = options(parser()), False
    for at, word in enumerate(words):
        if skip:
            skip = False
        elif word.startswith("-") and len(word) > 1:
            action = _option(word.partition("=")[0], table)
            skip = "=" not in word and (action is None or action.nargs != 0) and not re.match(r"-[a-z]\d", word)
        else:
            yield at


def _option(word: str, table: Mapping[str, argparse.Action]) -> argparse.Action | None:
    """The option that a word means: by its name, by the beginning of a long name, or a short one with its value."""
    if word in table:
        return table[word]
    begins = {table[name].dest: table[name] for name in table if word.startswith("--") and name.startswith(word)}
    if len(begins) == 1:
        return next(iter(begins.values()))
    return table.get(word[:2]) if re.match(r"-[a-z]\d", word) else None


class _Slip(NamedTuple):
    """A word that is no option, or an option with a value that it does not take."""

    at: int  # place of the first of its words
    count: int  # of its words
    problem: str
    allowed: str
    changes: Mapping[str, Any] | None  # what was meant; None: nothing near


def check(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Refuse unknown options and values that an option does not take.

    Raises
    ------
    UserError
        For all of them, each with the whole line as it was meant.
    """
    slips = list(_slips(words, parser))
    if not slips and "-h" not in words and "--help" not in words and next(_positions(words), None) is None:
        raise UserError("No model or file is named.", where="the command line", change={"model": _EXAMPLE},
                        allowed="a model's name, its id on the Hub, or a file",
                        write=suggested(words, {"model": _EXAMPLE}))  # fmt: skip
    if not slips:
        return
    kept = list(words)
    for slip in reversed(slips):
        meant = {name: value for name, value in (slip.changes or {}).items() if name not in ("--count", "model")}
        kept[slip.at : slip.at + slip.count] = shlex.split(suggested((), meant))[1:]
    for slip in slips:
        if model := (slip.changes or {}).get("model"):
            kept = _changed(kept, "model", model, None)
    if count := next((slip.changes["--count"] for slip in slips if "--count" in (slip.changes or {})), None):
        own = next((words[at + 1] for at in range(len(words) - 1) if words[at] == "--gpu"), "24GiB")
        kept = _replaced(kept, ["--gpu", f"{count}x{own}" if str(count).isdigit() else str(count)], {"--gpu"}, ())
    write = " ".join(["will-it-fit", *map(shlex.quote, kept)])
    raise UserError.several([
        UserError(slip.problem, where="the command line", found=" ".join(words[slip.at : slip.at + slip.count]),
                  allowed=slip.allowed, write=write, change=slip.changes)
        for slip in slips
    ])  # fmt: skip


def _slips(words: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[_Slip]:
    table, at = options(parser), 0
    while at < len(words):
        word, count = words[at], 1
        if word.startswith("-") and len(word) > 1 and not re.match(r"-\d", word):
            name, equals, value = word.partition("=")
            action = _option(name, table)
            follows = next(iter(words[at + 1 : at + 2]), None)
            follows = None if follows and re.match(r"-[^\d.]", follows) else follows
            if action is None:
                switch = _SWITCHES.get(_key(name))
                numeric = _key(name) == "lora" and follows and follows.isdigit()
                value = value if equals else None if switch and not numeric else follows
                count = 1 if equals or value is None else 2
                yield _unknown(at, count, name, value, None if numeric else switch, table)
            elif action.nargs != 0:
                short = re.match(r"(-[a-z])(\d.*)", word) if word not in table else None
                value = value if equals else short[2] if short else follows
                count = 1 if equals or short else 2
                slip = _missing(at, name, action) if value is None else _wrong(at, count, name, action, value)
                if slip:
                    yield slip
        at += count


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _unknown(
    at: int, count: int, name: str, value: str | None, switch: Mapping[str, Any] | None,
    table: Mapping[str, argparse.Action],
) -> _Slip:  # fmt: skip
    """An option that does not exist: what it may have meant."""
    meant = None if switch else _meaning(name, table)
    changes = switch or (meant and _change(meant, value))
    shown = suggested((), changes).removeprefix("will-it-fit ") if changes and "--count" not in changes else None
    hint = f"; `{shown}` says it" if shown else ""
    return _Slip(at, count, f"will-it-fit has no option `{name}`{hint}.",
                 "any field of a scenario with --set; will-it-fit --help lists all options", changes)  # fmt: skip


def meant(name: str, value: str) -> dict[str, Any] | None:
    """What ``--set name=value`` may have meant, where no field has that name; None: nothing near."""
    near = _meaning(name.replace(".", "_"), {})
    return _change(near, value) if near and not near.startswith("--") else None


def _meaning(name: str, table: Mapping[str, argparse.Action]) -> str | None:
    """A field (with its part), or an option, that a name means; None: nothing near."""
    key = _key(name)
    known = {**{_key(option): option for option in table if option.startswith("--")}, **_parts(), **_ALSO, **ELSEWHERE}
    near = key if key in known else closest(key, known)
    return known[near] if near else None


def _parts() -> dict[str, str]:
    """Fields and their parts by what may be typed for them: ``lora_rank``, and ``rank`` where no other has one."""
    fields = {name: name for name in BY_NAME}
    alone: dict[str, list[str]] = {}
    for field in BY_NAME.values():
        for part in field.parts:
            fields[f"{field.name}_{part.name}"] = f"{field.name}.{part.name}"
            alone.setdefault(part.name, []).append(f"{field.name}.{part.name}")
    return {name: paths[0] for name, paths in alone.items() if len(paths) == 1} | fields


def _change(meant: str, value: str | None) -> dict[str, Any]:
    """What a value set for a field, or for an option, changes."""
    meant = _FIELDS.get(meant, meant)
    if meant.startswith("--"):
        if meant == "--gpu" and value and re.fullmatch(r"\d+(\.\d+)?", value) and float(value) < 1000:
            value = f"{value}GiB"
        name = {"--gpu": "gpu", "--method": "method"}.get(meant, meant)
        return (_of_method(value) if name == "method" and value else None) or {name: value or ""}
    first, _, part = meant.partition(".")
    field = BY_NAME[first]
    if field.parts and not part:
        part = field.parts[0].name
    form = next((one for one in field.parts if one.name == part), field)
    if first == "method" and value:
        return _of_method(value) or {"method": closest(value, form.words) or form.example}
    typed = _value(form, value)
    return {first: {part: typed}} if part else {first: typed}


def _value(form: Field, value: str | None) -> Any:
    """A value as a field takes it: the nearest of its words, a number of thousands as it is meant."""
    if value is None:
        return True if form.is_boolean else form.example
    if form.name == "type" and value.lower() in _QUANTIZED:
        return _QUANTIZED[value.lower()]
    if form.words:
        words = {yaml_text(word): word for word in form.words}
        text = value.lower()
        theirs = {"attention": kernel, "optimizer": optimizer_of}.get(form.name, dtype)(text)
        near = text if text in words else theirs if theirs in words else closest(text, words)
        return words[near] if near else form.example
    if form.least is not None:
        return counted(value) or form.example
    return value


def counted(text: str) -> int | None:
    """A count that may be written with k or m, ``2k`` for 2,048; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([km]?)", text.strip().lower().replace(",", "").replace("_", ""))
    value = round(float(match[1]) * _THOUSANDS[match[2]]) if match else 0
    return value or None


def _of_method(value: str) -> dict[str, Any] | None:
    """What somebody means who gives --method something else than a method."""
    text = value.lower()
    if text in METHODS:
        return {"method": text}
    if text in BY_NAME["objective"].words:
        return {"objective": text}
    if text in _QUANTIZED or text in ("nf4", "fp4", "int8"):
        return {"method": "qlora", "quantization": {"type": _QUANTIZED.get(text, text)}}
    if text in ("dora", "ia3", "vera", "oft"):
        kind = {"peft_type": text.upper()} if text != "dora" else {"peft_type": "LORA", "r": 16, "use_dora": True}
        targets = {} if text == "ia3" else {"target_modules": "all-linear"}
        return {"method": "lora", "adapter": kind | targets}
    near = closest(text, METHODS)
    return {"method": near} if near else None


def _wrong(at: int, count: int, typed: str, action: argparse.Action, value: str) -> _Slip | None:
    """A value that an option does not take."""
    name = action.option_strings[-1]
    if action.choices and value not in action.choices:
        changes = _of_method(value) if name == "--method" else None
        near = _STRATEGIES.get(value.lower()) if name == "--strategy" else None
        near = near or closest(value, action.choices)
        changes = changes or {name: near or next(iter(action.choices))}
        why = f": {_AIM}" if "objective" in changes else "."
        return _Slip(at, count, f"`{typed}` does not take {value}{why}", ", ".join(action.choices), changes)
    if action.type is whole_number and whole_number(value) is None:
        field = _FIELDS.get(name)
        read = counted(value)
        example = read or {"sequence_length": 2048, "micro_batch": 1}.get(field or "", 50000)
        return _Slip(at, count, f"`{typed}` takes a whole number of at least 1, not {value}.",
                     "1, 2, 3, ...; thousands may be set apart, as in 2,048", {field or name: example})  # fmt: skip
    return None


def _missing(at: int, typed: str, action: argparse.Action) -> _Slip:
    """An option that stands there without its value."""
    name = action.option_strings[-1]
    example = _EXAMPLES.get(name) or next(iter(action.choices or ()), None) or action.metavar or "VALUE"
    field = _FIELDS.get(name, name)
    return _Slip(at, 1, f"`{typed}` has no value.", action.help or action.metavar or "a value", {field: example})


_EXAMPLES = {"--gpu": "4090", "--sequence-length": 2048, "--micro-batch": 4, "--set": "lora.rank=64", "--rows": 50000,
             "--tokens-per-row": 350, "--epochs": 3, "--price": 1.29, "--deadline": "24h", "--grams-per-kwh": 380,
             "--compare": "nvidia-smi=14.2GiB", "--requests": 4, "--weights": "q4_k_m"}  # fmt: skip
_AIM = "what a training aims at is the field `objective`, and the method says which weights it trains."
