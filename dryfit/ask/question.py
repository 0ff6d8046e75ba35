"""From what was typed to a scenario: a model, a scenario, a run's settings or another tool's file, and options."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import dryfit.readers as readers  # `from dryfit import` would first ask the package for the name
from dryfit.ask.options import NO_TOOL
from dryfit.ask.words import nearest_field
from dryfit.cards.gpus import Gpu, find
from dryfit.common.errors import UserError
from dryfit.common.files import yaml_value
from dryfit.common.text import yaml_text
from dryfit.hours.run_time import Run
from dryfit.planner.changes import apply
from dryfit.readers.approximations import approximate
from dryfit.readers.reading import EITHER_WAY, TOO_HIGH, Reading
from dryfit.readers.request import DECIDING, DEFAULT_LIKE, ScenarioRequest, left_out, parse_request
from dryfit.scenario.fields import BY_NAME
from dryfit.scenario.model import configuration, size
from dryfit.scenario.nested_fields import gpu_count
from dryfit.scenario.objectives import OBJECTIVES
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import AXES, NONE, STRATEGIES

_FILES = (".yaml", ".yml", ".json", ".py", ".ipynb", ".sh", ".toml", ".jinja", ".j2")
_MODEL_ALONE = (
    "model alone"  # a question whose first word is a model: no field, and taken out of them
)
_LEARNED_POSITIONS = ("gpt2", "gpt_neo", "opt", "gpt_bigcode", "biogpt", "xglm")
_AS_NF4 = "4-bit weights of {} are counted as NF4"
# Formats of weights that are quantized already, and how they are counted.
_QUANTIZED = {
    "mxfp4": (
        EITHER_WAY,
        "mxfp4 weights are made bf16 for training, and counted so (experts.quantized=mxfp4: kept)",
    ),
    "fp8": (TOO_HIGH, "8-bit weights are counted as the bf16 that training makes of them"),
    "gptq": (EITHER_WAY, _AS_NF4.format("GPTQ")),
    "awq": (EITHER_WAY, _AS_NF4.format("AWQ")),
    "aqlm": (TOO_HIGH, "2-bit weights of AQLM are counted as NF4"),
    "bitsandbytes": (EITHER_WAY, ""),
}


@dataclass(frozen=True)
class QuestionOptions:
    """What was asked beside the file or the model; None: as it says, or the defaults."""

    gpu: str | None = None
    method: str | None = None
    sequence_length: int | None = None
    micro_batch: int | None = None
    strategy: str | None = None
    settings: Sequence[str] = ()  # field=value
    tool: str | None = None
    like: str | None = None
    least_rows: int = 1  # that a search for the largest batch begins with: rows of a batch may be padded, one is not

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> QuestionOptions:
        """Those of a mapping that this has; empty ones are left out, and ``settings`` may be fields by their names."""
        named = {one.name: values.get(one.name) for one in fields(cls)}
        if isinstance(own := named["settings"], Mapping):
            named["settings"] = [f"{name}={yaml_text(value)}" for name, value in own.items()]
        return cls(**{name: value for name, value in named.items() if value not in ("", None)})

    @property
    def given(self) -> list[str]:
        """The fields that options set, ``lora.rank`` for a part."""
        named = ("gpu", "method", "sequence_length", "micro_batch", "like")
        set_here = [name for name in named if getattr(self, name) is not None]
        parallel = ["parallel"] if self.strategy is not None else []
        return [*set_here, *parallel, *(name for name, _ in self.set)]

    @property
    def set(self) -> list[tuple[str, str]]:
        """The fields and parts of ``settings`` with their values, as they are typed."""
        return [
            (name.strip(), value.strip())
            for name, _, value in (text.partition("=") for text in self.settings)
        ]

    @property
    def fields(self) -> set[str]:
        """The fields that options set, or a part of."""
        return {name.partition(".")[0] for name in self.given}

    @property
    def words(self) -> list[str]:
        """The options as they are typed."""
        flags = {
            "--gpu": self.gpu,
            "--method": self.method,
            "-s": self.sequence_length,
            "-b": self.micro_batch,
            "--strategy": self.strategy,
            "--from": self.tool,
            "--like": self.like,
        }
        typed = [(flag, str(value)) for flag, value in flags.items() if value is not None]
        return [
            word for pair in (*typed, *(("--set", one) for one in self.settings)) for word in pair
        ]


@dataclass
class Question:
    """A scenario with where it came from; ``asked`` says who decided what of it."""

    asked: ScenarioRequest
    scenario: Scenario
    where: str
    gpu: Gpu | None
    reading: Reading | None = None
    beside: list[Reading] = field(default_factory=list)
    model: str = ""  # as it was asked for
    run: Run | None = None  # the whole run, where its hours are asked for
    read_as: str = ""  # the line that a question in plain words was read as

    @property
    def readings(self) -> list[Reading]:
        return [*([self.reading] if self.reading else []), *self.beside]


def question(what: Sequence[str | Path], options: QuestionOptions) -> Question:
    """Read what was asked."""
    gpu = _gpu(options)
    fields, where, reading = _main(str(what[0]), options.tool, gpu, _objective(options))
    model_alone = reading is None and fields.pop(_MODEL_ALONE, False)
    beside = [_beside(Path(other), gpu) for other in what[1:]]
    for other in beside:
        _join(fields, other)
    _apply_options(fields, options, gpu)
    if reading and "attention_mask" not in options.given:
        reading.pad(fields)
    _refuse_what_is_open(reading, options)
    if not fields.get("model"):
        raise UserError(
            "The file names no model.",
            where="the command line",
            found=where,
            allowed="a model in the file, or --set model=NAME",
            change={"--set": "model=Qwen/Qwen3-8B"},
        )
    by_name = isinstance(fields["model"], str)
    model = fields["model"] if by_name else str(fields.get("model_name") or "")
    base = reading or Reading("", "", Path(where))
    try:
        if by_name:
            _resolve(fields, base, where)
        if reading or beside:
            fields = approximate(fields, base)
        capability = gpu.capability if gpu else None
        request = _request(fields, where, capability, model_alone and options.like is None)
    except UserError as error:
        raise _of_the_file(error, reading, options) from None
    if reading is not None:
        named = {
            one.partition(".")[0]
            for said in reading.understood.values()
            for one in said.split(", ")
        }
        named |= options.fields
        reading.older = {
            name: value for name, value in reading.older.items() if name not in options.given
        }
        mapping = request.scenario.to_mapping()
        assumed = {
            name: mapping[name] for name in DECIDING if name in reading.fields and name not in named
        }
        request = replace(request, mapping={}, assumed=assumed, assumed_by=reading.tool)
    scenario = request.scenario
    if by_name and not request.warnings:
        request = replace(request, warnings=left_out(model, scenario, where))
    own = gpu or (find(scenario.gpu, where) if scenario.gpu is not None else None)
    if model_alone and options.like is None and model.lower().startswith("unsloth/"):
        base.notes.append(
            "the id is of Unsloth's account: --like unsloth asks with Unsloth's defaults"
        )
    if reading is None and (base.remarks or base.notes):
        reading = replace(base, tool="Hub")
    return Question(request, scenario, where, own, reading, beside, model)


def _refuse_what_is_open(reading: Reading | None, options: QuestionOptions) -> None:
    """A field that the file leaves open, that no default can stand for, and that no option names."""
    if reading is None:
        return
    for name, why in reading.needs.items():
        if name not in options.fields:
            allowed = f"--set {name}=..."
            if name == "images":
                allowed = "--set 'images={count: 1, height: 448, width: 448}' where the model's config.json has a"
                allowed += " vision tower; images=null for the text alone"
            usual = {"sequence_length": 2048, "images": None}.get(name, 1)
            where, found = "the command line", reading.file.name
            raise UserError(why, where=where, found=found, allowed=allowed, change={name: usual})


def _request(
    fields: Mapping[str, Any], where: str, capability: tuple[int, int] | None, model_alone: bool
) -> ScenarioRequest:
    """The request of some fields. About a model alone it is the step of a tool that people use, if that has one."""
    if model_alone:
        with suppress(UserError):  # what was named does not go with the tool's settings
            return _without_a_mask(
                parse_request({**fields, "like": DEFAULT_LIKE}, where, capability)
            )
    return parse_request(fields, where, capability)


def with_method(asked: Question, method: str) -> Scenario:
    """The step of a question by another method: of a tool that nobody chose, as that takes it."""
    request = asked.asked
    if request.like_is_default:
        capability = asked.gpu.capability if asked.gpu else None
        return _request(
            {**request.mapping, "method": method}, asked.where, capability, True
        ).scenario
    return apply(asked.scenario, {"method": method})


def _without_a_mask(request: ScenarioRequest) -> ScenarioRequest:
    """The request of a tool that nobody chose: its rows are of one length, until somebody says that they are padded."""
    kept = {name: value for name, value in request.set_by_like.items() if name != "attention_mask"}
    mask = {"attention_mask": "none"} if kept != request.set_by_like else {}
    scenario, assumed = request.scenario.changed(**mask), {**request.assumed, **mask}
    return replace(
        request, scenario=scenario, set_by_like=kept, assumed=assumed, like_is_default=True
    )


def _of_the_file(error: UserError, reading: Reading | None, options: QuestionOptions) -> UserError:
    """An error as one of another tool's file, where a key of that and no option decides the field."""
    is_own = reading is not None and reading.file.suffix not in (".py", ".ipynb")
    return (
        reading.in_own_words(error)
        if is_own and (error.field or "").partition(".")[0] not in options.fields
        else error
    )


def _gpu(options: QuestionOptions) -> Gpu | None:
    if options.gpu is not None:
        return find(options.gpu, "--gpu")
    given: dict[str, Any] = {}
    for text, (name, _) in zip(options.settings, options.set, strict=True):
        if name.partition(".")[0] == "gpu":
            _set(given, text)
    return find(given["gpu"], "--set gpu") if given.get("gpu") is not None else None


def _main(
    what: str, tool: str | None, gpu: Gpu | None, objective: str | None
) -> tuple[dict[str, Any], str, Reading | None]:
    """The fields that the first argument gives, what to call it, and how it was read."""
    path = Path(what).expanduser()
    if path.is_file():
        return _file(path, tool, gpu, objective)
    registry, _, part = what.rpartition(
        ":"
    )  # a function of a program: torchtitan's registries hold several
    if registry.endswith(".py") and Path(registry).expanduser().is_file():
        from dryfit.readers.scripts import read_program

        reading = read_program(
            Path(registry).expanduser(), gpu.count if gpu and gpu.count > 1 else None, part
        )
        return dict(reading.fields), what, reading
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            return _file(path / "adapter_config.json", tool, gpu)
        return {"model": str(path), _MODEL_ALONE: True}, what, None
    if path.suffix in _FILES or what.startswith((".", "/", "~")):
        folder = path.parent if path.parent.is_dir() else Path()
        near = difflib.get_close_matches(path.name, [other.name for other in folder.iterdir()], n=1)
        raise UserError(
            "The file isn't there.",
            where="the command line",
            found=what,
            allowed="a file, or a model's name",
            change={"model": str(folder / near[0]) if near else "qwen2.5-coder-7b"},
        )
    return {"model": what, _MODEL_ALONE: True}, "the command line", None


def _file(
    path: Path, tool: str | None, gpu: Gpu | None, objective: str | None = None
) -> tuple[dict[str, Any], str, Reading | None]:
    count, capability = (
        gpu.count if gpu and gpu.count > 1 else None,
        gpu.capability if gpu else None,
    )
    if path.suffix in (".py", ".ipynb", ".sh"):
        from dryfit.readers.scripts import read_program, read_script

        reading = (read_script if path.suffix == ".sh" else read_program)(
            path, count, capability=capability
        )
        return dict(reading.fields), str(path), reading
    mapping = readers.mapping_of(path)
    kind = tool or readers.kind_of(mapping, path)
    if kind == "model":
        return {"model": str(path), _MODEL_ALONE: True}, str(path), None
    if kind in ("scenario", "run"):
        return (
            dict(mapping) if kind == "scenario" else readers.pipeline(path)(mapping),
            str(path),
            None,
        )
    if objective and kind == "trl" and "command" not in mapping:  # `trl dpo --config FILE`
        mapping = {**mapping, "command": objective}
    reading = _read_tool(path, kind, mapping, gpu)
    return dict(reading.fields), str(path), reading


def _read_tool(path: Path, tool: str, mapping: Mapping[str, Any], gpu: Gpu | None) -> Reading:
    """A tool's file for the GPUs that are asked about; ZeRO of a file without a number is on the one that is named."""
    reading = readers.read_tool(path, tool, mapping, gpu.count if gpu and gpu.count > 1 else None)
    strategy = (reading.fields.get("parallel") or {}).get("strategy", NONE)
    if gpu is not None and reading.guesses_gpus and STRATEGIES[strategy].zero:
        reading = readers.read_tool(path, tool, mapping, 1)
    return reading


def _objective(options: QuestionOptions) -> str | None:
    """The objective that ``--set`` names; whether it is one is for the scenario's checks."""
    given = [value for name, value in options.set if name == "objective"]
    return given[-1] if given and given[-1] in OBJECTIVES else None


def said_by(path: Path) -> dict[str, str]:
    """The fields that a file says something about, ``lora.rank`` for a part, each as the file has it: ``lora_r: 16``.

    Other tools' files by their keys, and scenarios by their fields; a model's configuration says no more than that.
    """
    fields, _, reading = _file(path, None, None)
    if reading is None:
        return {
            name: f"{name}: {yaml_text(value)}"
            for name, value in fields.items()
            if name != "model_name"
        }
    own = reading.own
    return {
        field: f"{key}: {yaml_text(own[key])}" if key in own else key
        for key, said in reversed(reading.understood.items())
        for field in said.partition(" (")[0].split(", ")
    }


def _beside(path: Path, gpu: Gpu | None) -> Reading:
    """A file of accelerate, DeepSpeed or PEFT beside the first."""
    if not path.is_file():
        raise UserError(
            "The file isn't there.",
            where=str(path),
            allowed="a file of accelerate, DeepSpeed or PEFT",
        )
    mapping = readers.mapping_of(path)
    kind = readers.kind_of(mapping, path)
    if kind not in readers.READERS or not readers.READERS[kind].beside:
        raise UserError(
            "Give one model or training file; only accelerate, DeepSpeed or PEFT files may follow it.",
            where=str(path),
            found=kind,
            allowed="one of the two",
            write=f"dryfit {path}",
        )
    return _read_tool(path, kind, mapping, gpu)


def _join(fields: dict[str, Any], other: Reading) -> None:
    """A file beside adds what the first doesn't say; how GPUs are used is its own to say."""
    for name, value in other.fields.items():
        if name == "adapter":
            fields.pop("lora", None)
        if name == "autocast" and str(fields.get("precision", "")).endswith("-mixed"):
            continue
        if (
            name == "parallel"
            or fields.get(name) is None
            or (name == "adapter" and other.tool == "PEFT")
        ):
            fields[name] = value


def _apply_options(fields: dict[str, Any], options: QuestionOptions, gpu: Gpu | None) -> None:
    if options.like not in (None, NO_TOOL):
        fields["like"] = options.like
    if options.method is not None:
        _change_method(fields, options.method)
    for name in ("sequence_length", "micro_batch"):
        if (value := getattr(options, name)) is not None:
            fields[name] = value
    for text in options.settings:
        _set(fields, text)
    if options.least_rows > 1 and (fields.get("micro_batch") or 1) in range(options.least_rows):
        fields["micro_batch"] = options.least_rows
    if gpu is not None:
        fields["gpu"] = gpu.setting
    if options.strategy is not None:
        _change_strategy(fields, options.strategy, gpu)


def _change_strategy(fields: dict[str, Any], strategy: str, gpu: Gpu | None) -> None:
    before = fields.get("parallel") or {}
    count = (
        gpu.count
        if gpu and gpu.count > 1
        else max(before.get("gpus", 1), gpu_count(fields.get("gpu")))
    )
    if strategy == "none" and not any(before.get(axis, 1) != 1 for axis in AXES):
        fields["parallel"] = {"strategy": "none", "gpus": 1}
    elif count < 2:
        raise UserError(
            f"`--strategy {strategy}` is for several GPUs, and one was asked for.",
            where="the command line",
            found=f"--strategy {strategy}",
            allowed="--gpu with a count, or no --strategy",
            change={"gpu": f"2x{_kind(gpu, fields.get('gpu'))}"},
        )
    else:
        mesh = {axis: before[axis] for axis in AXES if axis in before}
        kept = before if before.get("strategy") == strategy else mesh
        fields["parallel"] = {**kept, "strategy": strategy, "gpus": count}


def _kind(gpu: Gpu | None, given: Any) -> str:
    """A GPU's name on the command line, without a count; an example where none is named."""
    if gpu is None and given is None:
        return "rtx-3090"
    kind = (gpu or find(given)).setting
    kind = kind.get("name") or f"{kind['vram_gib']:g}GiB" if isinstance(kind, Mapping) else kind
    return str(kind)


def _change_method(fields: dict[str, Any], method: str) -> None:
    """Another method than the file's: what it has no place for goes."""
    fields["method"] = method
    if method == "full":
        for name in ("lora", "adapter", "kbit_preparation", "adapter_precision"):
            fields.pop(name, None)
    if method != "qlora":
        fields.pop("quantization", None)
        if fields.get("kbit_preparation") == "trl":
            del fields["kbit_preparation"]
    elif str(fields.get("precision", "")).endswith("-mixed"):
        half = fields["precision"].removesuffix("-mixed")
        fields |= {"precision": half, "autocast": half}


def _set(fields: dict[str, Any], text: str) -> None:
    """``field=value`` or ``field.part=value``, the value as a YAML file would have it."""
    name, equals, written = text.partition("=")
    if not equals or not name.strip():
        raise UserError(
            "`--set` takes field=value.",
            where="--set",
            found=text,
            field=name.strip(),
            change={"lora": {"rank": 64}},
        )
    first, _, part = name.strip().partition(".")
    if first not in BY_NAME:
        near = nearest_field(name.strip())
        head, _, tail = (near or "sequence_length").partition(".")
        change = {
            head: {tail: yaml_value(written, "--set")} if tail else yaml_value(written, "--set")
        }
        raise UserError(
            f"`--set` names a field that a scenario doesn't have: {first}.",
            where="--set",
            found=text,
            allowed=", ".join(sorted(BY_NAME)),
            field=name.strip(),
            change=change if near else {head: 2048},
        )
    try:
        value = yaml_value(written, "--set")
    except UserError as error:
        plain = written.strip().lstrip("0") or "0"
        value = int(plain) if plain.isdigit() else BY_NAME[first].example
        raise error.with_values(
            where="--set",
            found=text,
            field=name.strip(),
            write=None,
            change={first: {part: value} if part else value},
        ) from None
    if part:
        before = fields.get(first)
        if before is None and first == "lora":
            fields.pop("adapter", None)
        if first == "gpu" and isinstance(before, str):
            before = {"name": before}
        fields[first] = {**(before if isinstance(before, Mapping) else {}), part: value}
    else:
        fields[first] = value


def _resolve(fields: dict[str, Any], reading: Reading, where: str) -> None:
    """The model's configuration in place of its name; formats that training unpacks are counted as it does."""
    model, name = configuration(fields["model"], where)
    quantized = model.get("quantization_config") or (model.get("text_config") or {}).get(
        "quantization_config"
    )
    method = (
        str((quantized or {}).get("quant_method", "")) if isinstance(quantized, Mapping) else ""
    )
    if method in _QUANTIZED:
        model = {key: value for key, value in model.items() if key != "quantization_config"}
        if isinstance(model.get("text_config"), Mapping):
            model["text_config"] = {
                k: v for k, v in model["text_config"].items() if k != "quantization_config"
            }
        errs, why = _QUANTIZED[method]
        if (
            method in ("gptq", "awq", "aqlm", "bitsandbytes")
            and fields.get("method", "qlora") != "full"
        ):
            fields["method"] = "qlora"
            if quantized.get("load_in_8bit") and "quantization" not in fields:
                fields["quantization"] = {"type": "int8"}
        if why and (fields.get("experts") or {}).get("quantized") != method:
            reading.approximates("quantization_config", method, errs, why)
    fields["model"] = model
    fields.setdefault("model_name", name)
    length = fields.get("sequence_length")
    text = model["text_config"] if isinstance(model.get("text_config"), Mapping) else model
    positions = size(text, "max_position_embeddings")
    is_file = reading.tool and isinstance(length, int) and positions
    if is_file and length > positions and model.get("model_type") not in _LEARNED_POSITIONS:
        longer = {**text, "max_position_embeddings": length}
        fields["model"] = longer if text is model else {**model, "text_config": longer}
        reading.notes.append(
            f"{length} tokens are more than the model's {positions} positions; counted all the same"
        )
