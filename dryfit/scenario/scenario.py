"""A scenario: one training step, described completely enough to know its memory before it runs.

It is a value that the memory stage predicts and measures and that the training stage runs::

    model: qwen2.5-coder-7b   # a name in config/models/, a path to a config.json, or the configuration itself
    method: qlora
    precision: bf16
    sequence_length: 512

What each field means and allows, and its default, stands in :mod:`dryfit.scenario.fields`. Every wrong field is a
:class:`UserError` that shows the corrected line. Nothing heavier than PyYAML is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib.util import find_spec
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.schema import problems
from dryfit.scenario.contradictions import contradictions
from dryfit.scenario.fields import ELSEWHERE, FIELDS, Fields, file_schema, scenario_defaults
from dryfit.scenario.images import Images
from dryfit.scenario.meshes import mesh_contradictions
from dryfit.scenario.model import read_model, size
from dryfit.scenario.nested_fields import PARTS, checked_adapter, checked_gpu, checked_lora
from dryfit.scenario.objectives import OBJECTIVES, Objective
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.strategies import NONE
from dryfit.scenario.value_fields import ZeroFile


class Scenario(Fields):
    """One training step, checked."""

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        where: object = "scenario",
    ) -> Scenario:
        """Check a mapping and make the scenario it describes.

        Parameters
        ----------
        mapping
            The fields of a scenario file.
        defaults
            Values for the fields that are left out, before those of :mod:`dryfit.scenario.fields`.
        where
            What to call the place in messages, usually the file. A relative path in it is looked for beside that file
            first, then in the working directory.

        Raises
        ------
        UserError
            For all fields that are wrong, each with the corrected line.
        """
        if not isinstance(mapping, Mapping):
            raise UserError(
                "A scenario is a mapping of fields.",
                where=where,
                found=mapping,
                change={"model": "qwen2.5-coder-7b"},
            )
        defaults = {**scenario_defaults(), **(defaults or {})}
        given = {key: value for key, value in mapping.items() if value is not None}
        values: dict[str, Any] = {**defaults, **mapping}
        for field in FIELDS:
            if field.parts:
                own, fallback = given.get(field.name), defaults.get(field.name) or {}
                values[field.name] = (
                    {**fallback, **own} if isinstance(own, Mapping) else own or fallback
                )
        wrong = problems(values, file_schema(), where)
        method, with_images = values["method"], _asks_for_images(values["images"])
        wrong += _excluded(method, given, where)
        readers = {
            "adapter": lambda: checked_adapter(
                given.get("adapter", defaults.get("adapter")), given, where
            ),
            "lora": lambda: (
                checked_lora(values["lora"], where) if isinstance(values["lora"], Mapping) else None
            ),
            "gpu": lambda: checked_gpu(values.get("gpu"), where),
            "images": lambda: Images.read(values["images"], where) if with_images else None,
            "model": lambda: read_model(values.get("model"), where, whole=with_images),
        }
        if "model" not in mapping and any(ELSEWHERE.get(str(key)) == "model" for key in mapping):
            del readers["model"]  # it is there under another tool's name, which `wrong` says
        for name, read in readers.items():
            try:
                values[name] = read()
            except UserError as error:
                wrong.append(error)
        if wrong:
            raise UserError.several(wrong)
        whole = _with_values(values)
        if whole["images"]:
            whole["images"].check(whole["model"], whole["sequence_length"], where)
        scenario = cls(**{f.name: whole[f.name] for f in fields(cls)})
        wrong = list(contradictions(scenario, where))
        parallel = scenario.parallel
        if parallel.meshed or parallel.pipelined or parallel.by_titan:
            wrong += mesh_contradictions(scenario, where)
        if wrong:
            raise UserError.several(wrong)
        for part in ("reward_model", "teacher"):
            if name := getattr(scenario.preference, part):
                read_model(name, f"{where}: preference.{part}")
        return scenario

    def to_mapping(self) -> dict[str, Any]:
        """Plain, sorted values; ``Scenario.from_mapping`` gives the same scenario back."""
        return _plain(asdict(self))

    def changed(self, **changes: Any) -> Scenario:
        """The same scenario but for some fields, checked again; a field with parts as a value or as a mapping."""
        changes = {
            key: _plain(asdict(value)) if is_dataclass(value) else value
            for key, value in changes.items()
        }
        return Scenario.from_mapping({**self.to_mapping(), **changes}, where="changed scenario")

    @property
    def aim(self) -> Objective:
        """What the objective takes."""
        return OBJECTIVES[self.objective]

    @property
    def pairs_by_rules(self) -> bool:
        """Whether a step of pairs is spread over GPUs, where no trainer of TRL's is followed."""
        return self.aim.in_pairs and self.parallel.strategy != NONE

    @property
    def tokens(self) -> int:
        """Tokens in one micro-batch."""
        return self.micro_batch * self.sequence_length

    @property
    def holds_outputs(self) -> bool:
        """Whether outputs live until the next ones are there."""
        return self.keeps_outputs or self.previous_sequence_length is not None

    @property
    def completion_length(self) -> int:
        """Tokens of a row that an objective judges; half of the row by default."""
        return self.preference.completion_length or max(self.sequence_length // 2, 1)

    @property
    def zero_settings(self) -> ZeroFile:
        """What DeepSpeed is told, with its sizes as numbers."""
        return self.zero.for_a(self.size("hidden_size"))

    @property
    def zero_by_rules(self) -> bool:
        """Whether ZeRO is followed by its rules; else by DeepSpeed's own package, which gives the same bytes.

        So an answer does not depend on what is installed. Ulysses, and settings without a rule, are the package's.
        """
        return self.parallel.zero_stage > 0 and self.parallel.ulysses == 1 and not self.zero.other

    @property
    def steps_per_generation(self) -> int:
        """Micro-batches that one generation serves."""
        return (
            1
            if self.aim.anew
            else self.generation.steps_per_generation or self.gradient_accumulation
        )

    @property
    def answers_at_once(self) -> int:
        """Answers of one generation."""
        return self.micro_batch * self.steps_per_generation * self.aim.texts_in_a_row

    @property
    def answers_to_a_prompt(self) -> int:
        """Answers of a generation that share their prompt."""
        return self.preference.generations if self.aim.grouped else self.aim.texts_in_a_row

    @property
    def lowers_products(self) -> bool:
        """Whether products run in fewer bits than their weights have."""
        return self.float8 != "none" or self.qat != "none"

    @property
    def mixed(self) -> bool:
        """Whether fp32 weights are used under autocast."""
        return self.precision.endswith("-mixed")

    @property
    def weight_precision(self) -> str:
        """Dtype of the weights that are not quantized: ``fp32``, ``fp16`` or ``bf16``."""
        return "fp32" if self.mixed else self.precision

    @property
    def autocast_precision(self) -> str | None:
        """Dtype that autocast computes in; None without autocast."""
        return self.precision.removesuffix("-mixed") if self.mixed else self.autocast

    @property
    def compute_precision(self) -> str:
        """Dtype that matrix products run in."""
        return self.autocast_precision or self.weight_precision

    @property
    def adapter_dtype(self) -> str:
        """Dtype of the adapters' weights: ``fp32``, ``fp16`` or ``bf16``."""
        if self.adapter_precision != "base":
            return self.adapter_precision
        # PEFT makes adapters in fp32, and casts them to the base's dtype where that is not of integers.
        return (
            "fp32"
            if self.quantization and self.quantization.type == "int8"
            else self.weight_precision
        )

    @property
    def trained_dtype(self) -> str:
        """Dtype of what is trained: of all weights, or of the adapters."""
        return self.weight_precision if self.method == "full" else self.adapter_dtype

    @property
    def has_wider_states(self) -> bool:
        """Whether the optimizer's states have more bits than what is trained."""
        return self.optimizer_state_precision == "fp32" and self.trained_dtype != "fp32"

    def size(self, name: str, default: Any = None) -> Any:
        """A size of the model under its usual name, whatever its configuration calls it (None counts as missing)."""
        own = size(self.model, name)
        return size(self.model.get("text_config") or {}, name, default) if own is None else own


def rows_in_a_step(step: Scenario, loop: Mapping[str, Any]) -> int:
    """Rows whose answers make one optimizer step.

    Without packing it is micro-batch times accumulation times GPUs. Those of a tensor or context group take the same
    rows and count once. A pack holds as many rows as fit, so there it is a setting: steps of as many rows, not of as
    many packs, are alike. Each GPU takes its share of them.
    """
    gpus, packed = step.parallel.rows_at_once, step.packing != "none"
    product = step.micro_batch * step.gradient_accumulation * gpus
    rows = loop.get("rows_per_step")
    if not packed and rows not in (None, product):
        raise UserError(
            "`rows_per_step` is not micro_batch x gradient_accumulation x GPUs"
            f"{', those that take the same rows counted once' if step.parallel.meshed else ''}.",
            where="training.rows_per_step",
            found=rows,
            allowed=f"null, or {product}; another number only with packing, where a pack holds several rows",
            write="rows_per_step: null",
        )
    if packed and rows is None:
        raise UserError(
            "With packing a step's number of rows has to be given, for a pack holds as many as fit.",
            where="training.rows_per_step",
            allowed="1, 2, 3, ...",
            write="rows_per_step: 16",
        )
    if packed and gpus > rows:
        raise UserError(
            f"A step has {rows} rows, fewer than the {gpus} GPUs that are to share them.",
            where="training.rows_per_step, training.parallel.gpus",
            found=rows,
            allowed=f"at least {gpus} rows, or fewer GPUs",
            write=f"rows_per_step: {gpus}",
        )
    return product if rows is None else rows


def _asks_for_images(value: Any) -> bool:
    return isinstance(value, Mapping) and value != scenario_defaults()["images"]


def _plain(value: Any) -> Any:
    """As JSON has it: sorted mappings, and lists."""
    if isinstance(value, dict):
        return {key: _plain(value[key]) for key in sorted(value)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _with_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked fields with what the method has no place for taken out, and a value for each field with parts."""
    values, method = dict(values), values["method"]
    values["model"], name = values["model"]
    values["model_name"] = values.get("model_name") or name
    if method != "qlora":
        values["quantization"] = None
    if method == "full":
        values |= {"adapter": None, "adapter_precision": "fp32"}
    if method == "full" or values["adapter"]:
        values["lora"] = None
    if (values["quantization"] or {}).get("type") == "int8":  # which has no scales of scales
        values["quantization"] = {**values["quantization"], "double": False}
    if values["packages"] is not None:
        values["packages"] = tuple(values["packages"])
    for part, kind in PARTS.items():
        values[part] = values[part] and kind(**values[part])
    return values


def _excluded(method: str, given: Mapping[str, Any], where: object) -> Iterator[UserError]:
    """Fields that were written down although the method has no place for them."""
    for field in FIELDS:
        if field.name in given and given[field.name] != "none" and method in (field.excluded or {}):
            reason, write = field.excluded[method]
            yield UserError(
                f"`{field.name}` and `method: {method}` don't go together: {reason}.",
                where=where,
                found=given[field.name],
                allowed=f"leave `{field.name}` out, or another method",
                write=write,
                field=field.name,
                change={field.name: None},
            )


def check_packages(scenario: Scenario, where: object = "scenario") -> None:
    """Refuse a scenario whose optional package is not installed here, with the command that installs it."""
    optimizer, objective, parallel = scenario.optimizer, scenario.objective, scenario.parallel
    needed = (  # field, its value, the package that it needs, what does without, which extra brings the package
        (
            "optimizer",
            optimizer,
            OPTIMIZERS[optimizer].package,
            "an optimizer that needs none",
            "optimizers",
        ),
        (
            "parallel.ulysses",
            parallel.ulysses,
            parallel.ulysses > 1 and "deepspeed",
            "context, a ring of the same GPUs with fsdp2",
            "deepspeed",
        ),
        (
            "zero.other",
            scenario.zero.other,
            parallel.zero_stage and scenario.zero.other and "deepspeed",
            "a configuration without these keys, which have no rule here",
            "deepspeed",
        ),
        (
            "objective",
            objective,
            scenario.aim.trainer and not scenario.pairs_by_rules and "trl",
            "objective sft",
            "trl",
        ),
        (
            "float8",
            scenario.float8,
            None if scenario.float8 == "none" else "torchao",
            "float8 none",
            "optimizers",
        ),
        (
            "qat",
            scenario.qat,
            None if scenario.qat == "none" else "torchao",
            "qat none",
            "optimizers",
        ),
        (
            "compile",
            scenario.compile,
            None if scenario.compile == "none" else "triton",
            "compile none",
            "run",
        ),
    )
    for field, value, package, instead, extra in needed:
        if package and find_spec(package) is None:
            raise UserError(
                f"`{field}: {value}` needs the package {package}, which is not installed.",
                where=f"{where}: {field}",
                found=value,
                allowed=f"the package; or {instead}",
                write=f'pip install "dryfit[{extra}]"',
            )
