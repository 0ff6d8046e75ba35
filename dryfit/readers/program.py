"""Python programs and notebooks that train with TRL, transformers or Unsloth: what their calls come to.

The program is gone through as a syntax tree and never run (:mod:`dryfit.readers.flow`). What counts is what the
objects say when ``train()`` is called: cells that don't run, and models that are loaded later, decide nothing. What is
no constant is named, and has the default in its place. ``dryfit/data/program_calls.yaml`` lists the calls.
"""

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.data import data_path
from dryfit.readers import common, torchtitan, trl, unsloth
from dryfit.readers.cells import source, tree_of
from dryfit.readers.flow import UNKNOWN, Call, Flow, Made, called_classes
from dryfit.readers.reading import EITHER_WAY, TOO_LOW, Reading, keys
from dryfit.scenario.objectives import OBJECTIVES

CALLS = data_path("program_calls.yaml")
_SOUND = re.compile(r"""["']type["']\s*:\s*["']audio["']""")
_IMAGE = re.compile(r"""["']type["']\s*:\s*["']image["']""")


@cache
def _calls() -> Mapping[str, Any]:
    return read_yaml(CALLS)


def read(
    path: Path,
    gpus: int | None = None,
    part: str | None = None,
    capability: tuple[int, int] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Reading:
    """The scenario's fields of a program.

    Parameters
    ----------
    part
        A function of a torchtitan registry.
    capability
        The card's, which decides whether bf16 is supported; None: it is.
    given
        Arguments of the command that starts it, by their names, for argparse's parsers.
    """
    tree, broken = tree_of(path)
    if torchtitan.is_registry(tree):
        return torchtitan.read_registry(tree, path, part, gpus)
    program = _Program(tree, source(path), capability, given or {})
    if given and not program.takes_arguments:
        raise UserError(
            "The program is started with arguments that can't be followed.",
            where=path,
            found=", ".join(f"--{name}" for name in given),
            allowed="arguments of an argparse.ArgumentParser; for others: a question without the script",
        )
    if broken and not program.trainings:
        raise broken
    training = program.training()
    _refuse(training, path)
    if "model_name_or_path" not in training.values:
        raise UserError(
            "The program names no model that can be read.",
            where=path,
            found=training.unread.get("model_name_or_path"),
            allowed="a constant in from_pretrained(...), or --set model=NAME",
            write="--set model=Qwen/Qwen3-8B",
        )
    return _reading(program, training, path, gpus)


def _refuse(training: Made | None, path: Path) -> None:
    """A program without a training, or with one of another kind."""
    if training is None:
        calls = _calls()
        raise UserError(
            "No trainer that dryfit knows was found in this program.",
            where=path,
            allowed=f"calls of {', '.join([*calls['arguments']][:7])}, LoraConfig, BitsAndBytesConfig,"
            " AutoModelForCausalLM.from_pretrained, FastLanguageModel.from_pretrained; for a loop of its own:"
            " dryfit run",
            write="dryfit MODEL --method qlora -s 2048",
        )
    if training.values.get("sound"):
        raise UserError(
            "Its rows hold sound, which is not described.",
            where=path,
            allowed="rows of text or images",
        )
    for name in training.values["classes"]:
        if why := _calls()["refused"].get(name):
            raise UserError(
                why, where=path, found=name, allowed="the training of a decoder of text"
            )
    if training.values.get("qat_scheme"):
        raise UserError(
            "Weights and inputs are rounded to integers in each forward pass (qat_scheme), which is not described.",
            where=path,
            found=training.values["qat_scheme"],
            allowed="a training without qat_scheme",
        )
    name = training.values.get("model_name_or_path", "")
    if isinstance(name, str) and name.removeprefix("./").split("/")[0] in training.values.get(
        "folders", ()
    ):
        raise UserError(
            "The model lies in a folder that the program itself makes.",
            where=path,
            found=name,
            allowed="the name of the model that it is made from, by --set model=NAME",
            change={"model": "Qwen/Qwen3-8B"},
        )


class _Program:
    """A program's trainings: what model, settings and trainer say, in TRL's words."""

    def __init__(
        self,
        tree: ast.Module,
        text: str,
        capability: tuple[int, int] | None,
        given: Mapping[str, Any],
    ) -> None:
        self.given, self.takes_arguments = given, False
        self.arguments: dict[str, Any] = {}  # of argparse's parsers, with their defaults
        self.halves = capability is None or capability >= (
            8,
            0,
        )  # whether the card computes in bf16
        self.has_unsloth = "unsloth" in text
        self.has_images = _IMAGE.search(text) is not None
        self.has_sound = _SOUND.search(text) is not None
        self.folders: set[str] = set()  # that the program makes
        self.trainings: list[Made] = []
        self.trainers: list[Made] = []
        self.parts: list[Made] = []  # models and settings, where no trainer is made
        self.beside: list[str] = []  # other models on the GPU
        self.cut_to: int | None = None  # rows' tokens, where a call of a tokenizer truncates
        constants = {
            "is_bfloat16_supported": self.halves,
            "is_torch_bf16_gpu_available": self.halves,
            "is_available": True,
            # Unsloth's own takes no emulation; PyTorch's does, and so says yes on any card.
            "is_bf16_supported": self.halves if self.has_unsloth else True,
            "get_device_capability": list(capability) if capability else None,
        }
        self.flow = Flow(
            self._made, constants, ("model", "arguments", "adapter", "bits", "trainer")
        )
        self.flow.run(tree.body)
        if not self.trainings and not self.trainers:
            self.flow.enter_the_rest()

    def training(self) -> Made | None:
        """The training that the answer is about: one that generates before others, then the one of most tokens."""

        def size(one: Made) -> tuple[bool, int]:
            rows, length = (
                one.values.get(key) for key in ("per_device_train_batch_size", "max_length")
            )
            known = [value for value in (rows, length) if isinstance(value, int)]
            objective = OBJECTIVES.get(one.values["trainer"])
            return objective is not None and objective.generates, len(known) == 2 and known[
                0
            ] * known[1]

        if self.trainings:
            return max(self.trainings, key=size)
        if self.trainers:
            return self.trainers[-1]
        whole = self._joined(self.parts, "transformers")
        return whole if any(part.kind == "arguments" for part in self.parts) else None

    def _joined(self, parts: list[Made], kind: str) -> Made:
        whole = Made("trainer", {"trainer": kind, "classes": []})
        for part in parts:
            classes = [*whole.values["classes"], *part.values.get("classes", [])]
            trainer = part.values.get("trainer", "transformers")
            named = whole.values["trainer"]
            whole.take(part)
            whole.values["classes"] = classes
            whole.values["trainer"] = trainer if named == "transformers" else named
        return whole

    # --- what calls make -----------------------------------------------------------------------------------------

    def _made(self, call: Call) -> Any:
        calls = _calls()
        names = list(called_classes(self.flow.classes, call.name))
        if trainer := next((name for name in names if name in calls["trainers"]), None):
            return self._trainer(call, trainer)
        if arguments := next((name for name in names if name in calls["arguments"]), None):
            made = self._taken(call, "arguments", None)
            made.values["trainer"] = calls["arguments"][arguments]
            return self._part(made)
        if call.name == "LoraConfig":
            return self._part(_with(self._taken(call, "adapter", "lora"), use_peft=True))
        if call.name == "is_bf16_supported" and call.argument(0, "including_emulation") is False:
            return self.halves
        if call.name == "BitsAndBytesConfig":
            return self._taken(call, "bits", "bits")
        if call.name == "from_pretrained":
            return self._loaded(call)
        if call.name == "from_config":
            return self._from_configuration(call)
        if call.name == "get_peft_model":
            return self._adapted(call)
        if call.name in ("prepare_model_for_kbit_training", "gradient_checkpointing_enable"):
            return self._prepared(call)
        if (
            call.name in ("cuda", "to")
            and isinstance(call.receiver, Made)
            and call.receiver.kind == "other"
        ):
            self.beside.append(call.receiver.values["class"])
        if call.name in ("train", "unsloth_train"):
            for one in call.things:
                if one.kind == "trainer":
                    self.trainings.append(one.copy())
                    return UNKNOWN
        if call.name == "add_argument":
            self._argument(call)
        if call.name in ("parse_args", "parse_known_args"):
            self.takes_arguments = True
            made = Made("arguments of the program", {**self.arguments, **self.given})
            return made if call.name == "parse_args" else [made, UNKNOWN]
        if call.name == "UnslothVisionDataCollator":
            return Made("images")
        for folder in (
            call.words.get("local_dir"),
            call.argument(0, "") if call.name == "save_pretrained" else None,
        ):
            if isinstance(folder, str):
                self.folders.add(folder.removeprefix("./").split("/")[0])
        if call.words.get("truncation") and isinstance(call.words.get("max_length"), int):
            self.cut_to = call.words["max_length"]
        return None

    def _argument(self, call: Call) -> None:
        names = [one for one in call.args if isinstance(one, str)]
        if names:
            name = (
                next((one for one in names if one.startswith("--")), names[0])
                .lstrip("-")
                .replace("-", "_")
            )
            usual = False if call.words.get("action") == "store_true" else None
            self.arguments[str(call.words.get("dest") or name)] = call.words.get("default", usual)

    def _part(self, made: Made) -> Made:
        self.parts.append(made)
        return made

    def _taken(
        self, call: Call, kind: str, renamed: str | None, *, keep: tuple[str, ...] = ()
    ) -> Made:
        """A call's arguments: all, or those that are renamed, and those to keep under their own names."""
        names = (
            None
            if renamed is None
            else {**_calls()["renamed"][renamed], **{name: name for name in keep}}
        )
        made = Made(kind)
        for word, value in call.words.items():
            key = word if names is None else names.get(word)
            if key is None or isinstance(value, Made):
                continue
            if value is UNKNOWN:
                made.unread[key] = call.written.get(word, word)
            else:
                made.values[key] = value
        if not call.all_known:
            made.unread["**"] = f"further arguments of {call.name}"
        return made

    def _trainer(self, call: Call, name: str) -> Made:
        parts = [one for one in call.things if one.kind in ("model", "arguments", "adapter")]
        models = [one for one in parts if one.kind == "model"]
        order = {"model": 0, "arguments": 1, "adapter": 2}
        model, named = call.argument(0, "model"), Made("model")
        if isinstance(model, str):
            named.values["model_name_or_path"] = model
        elif not models:
            loaded = [one for one in self.parts if one.kind == "model"]
            parts += loaded[-1:]
            if not loaded and model is not None:
                named.unread["model_name_or_path"] = call.written.get("model", "the first argument")
        own = self._taken(call, "trainer", "trainer")
        parts = [named, *sorted(parts, key=lambda one: order[one.kind]), own]
        made = self._joined(parts, _calls()["trainers"][name])
        made.values["classes"] = [*made.values["classes"], name]
        collators = [one for one in call.things if one.kind == "images"]
        made.values["images"] = bool(collators) or (
            self.has_images and "FastVisionModel" in made.values["classes"]
        )
        made.values["sound"] = made.values["images"] and self.has_sound
        made.values["folders"] = frozenset(self.folders)
        self.trainers.append(made)
        return made

    def _loaded(self, call: Call) -> Any:
        calls = _calls()
        if call.owner.endswith("Config"):
            name = call.argument(0, "pretrained_model_name_or_path")
            return (
                Made("configuration", {"model_name_or_path": name})
                if isinstance(name, str)
                else UNKNOWN
            )
        if any(call.owner.endswith(kind) for kind in calls["no_weights"]) or not call.owner:
            return UNKNOWN
        loaders = calls["models"] + unsloth.rules()["loaders"]
        if call.owner not in loaders and not call.owner.endswith(tuple(calls["models_end"])):
            if call.words.get("device_map") is not None:
                self.beside.append(call.owner)
            return Made("other", {"class": call.owner})
        table, own = unsloth.rules(), call.owner in unsloth.rules()["loaders"]
        made = Made("model", dict(table["defaults"]["loaded"]) if own else {})
        keep = (*table["not_described"], *unsloth.KEPT) if own else ()
        made.take(self._taken(call, "model", "loaded", keep=keep))
        if own and isinstance(length := call.argument(1, "max_seq_length"), int):
            made.values["model_length"] = length
        elif own and "max_seq_length" in call.words:
            made.values.pop("model_length")
            made.unread["max_length"] = call.written["max_seq_length"]
        for part in call.things:
            if part.kind == "bits":
                made.take(part)
        made.values["dtype_is_open"] = "dtype" not in made.values and "dtype" not in made.unread
        made.values.setdefault("dtype", "auto")  # transformers 5: as the model's files say
        auto = call.written.get("auto_model", "").rpartition(".")[2]
        made.values["classes"] = [call.owner, *([auto] if auto else [])]
        name = call.argument(0, "model_name")
        name = call.words.get("pretrained_model_name_or_path") if name is None else name
        if isinstance(name, str):
            made.values["model_name_or_path"] = name
        elif name is not None:
            written = call.written.get("model_name") or call.written.get(
                "pretrained_model_name_or_path"
            )
            made.unread["model_name_or_path"] = written or "the first argument"
        if own:
            unsloth.decide_what_a_load_leaves_open(made.values, self.halves)
        return self._part(made)

    def _from_configuration(self, call: Call) -> Any:
        """A model with new weights, which are in fp32 unless a dtype is named (transformers 4, ``_from_config``)."""
        configuration = next((one for one in call.things if one.kind == "configuration"), None)
        if configuration is None:
            return UNKNOWN
        made = Made("model", {**configuration.values, "dtype": "float32", "classes": [call.owner]})
        made.take(self._taken(call, "model", "loaded"))
        return self._part(made)

    def _adapted(self, call: Call) -> Any:
        """``get_peft_model`` of PEFT, with a configuration, or Unsloth's, with its arguments."""
        model = next((one for one in call.things if one.kind == "model"), None)
        table = unsloth.rules()
        if call.owner not in table["loaders"]:
            whole = (model or Made("model")).copy()
            for part in call.things:
                if part.kind == "adapter":
                    whole.take(part)
            return self._part(whole)
        whole = (
            model
            or next((one for one in reversed(self.parts) if one.kind == "model"), Made("model"))
        ).copy()
        if whole.values.get("full_finetuning"):  # models/vision.py: it then has no effect
            return self._part(whole)
        defaults = Made("adapter", dict(table["defaults"]["lora"]) | {"use_peft": True})
        given = self._taken(call, "adapter", "lora", keep=("qat_scheme", *table["not_described"]))
        if isinstance(checkpointing := call.words.get("use_gradient_checkpointing"), (bool, str)):
            given.values["gradient_checkpointing"] = checkpointing
        defaults.take(given)
        if (
            defaults.values.get("lora_target_modules") is None
            and "lora_target_modules" not in defaults.unread
        ):
            defaults.values["lora_target_modules"] = unsloth.targets(call)
        unsloth.save_instead(defaults.values)
        whole.take(defaults)
        return self._part(whole)

    def _prepared(self, call: Call) -> Any:
        model = next((one for one in call.things if one.kind == "model"), None)
        if model is None:
            return None
        if call.name == "prepare_model_for_kbit_training":
            model.values["prepared"] = True
        if call.words.get("use_gradient_checkpointing", True):  # peft: utils/other.py, its default
            model.values["enabled_checkpointing"] = True
        return model


def _with(made: Made, **values: Any) -> Made:
    made.values |= values
    return made


# --- from a training to a scenario ---

# What a training says beside TRL's keys.
_OWN = (
    "trainer",
    "classes",
    "dtype_is_open",
    "images",
    "sound",
    "folders",
    "prepared",
    "enabled_checkpointing",
    "model_length",
    "**",
    *unsloth.KEPT,
)
# What no default stands for where the program computes it: our field.
_DECISIVE = {
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "per_device_train_batch_size": "micro_batch",
}
_A_QUARTER = (
    "the program computes it; a quarter of the model's max_seq_length is taken as the prompt"
)


def _reading(program: _Program, training: Made, path: Path, gpus: int | None) -> Reading:
    table, said, unread = unsloth.rules(), dict(training.values), dict(training.unread)
    trainer, is_unsloths = said["trainer"], bool(set(said["classes"]) & set(table["loaders"]))
    own = {name: said.pop(name) for name in (*_OWN, *table["not_described"]) if name in said}
    stated = {*said, *unread} - ({"dtype"} if own.get("dtype_is_open", True) else set())
    stated |= {"gradient_checkpointing"} if own.get("enabled_checkpointing") else set()
    generates = trainer in OBJECTIVES and OBJECTIVES[trainer].generates
    offloads, divided = said.get("gradient_checkpointing") == "unsloth", None
    if is_unsloths:
        said = unsloth.with_defaults(said, trainer, own, program.halves)
        divided = unsloth.divide_a_row(said, unread, own.get("model_length")) if generates else None
        said |= {"use_peft": False} if own.get("full_finetuning") else {}
    elif trainer == "transformers":
        said = {"gradient_checkpointing": False, "bf16": False, **said}
        said |= {"max_length": program.cut_to} if program.cut_to else {}
    if own.get("enabled_checkpointing") and not is_unsloths:
        said["gradient_checkpointing"] = said.get("gradient_checkpointing") or True
    said["gradient_checkpointing"] = bool(said.get("gradient_checkpointing", True))
    if generates:  # prompt and answer have limits of their own
        unread.pop("max_length", None)
        for key in {"max_prompt_length", "max_completion_length"} & set(unread):
            unread["max_length"] = unread.pop(key)
    reading = trl.read(said, path, gpus, trainer, stated)
    if divided:
        reading.approximates("max_completion_length", divided, EITHER_WAY, _A_QUARTER)
    _say_what_is_unread(program, unread, reading)
    for name in dict.fromkeys(program.beside):
        reading.approximates(
            name, "loaded", TOO_LOW, "another model is loaded beside the one that is trained"
        )
    if is_unsloths:
        unsloth.say(
            reading, {**program.flow.environ, **own}, offloads=offloads, halves=program.halves
        )
    else:
        if trainer == "transformers" and "max_length" not in said:
            reading.needs["sequence_length"] = (
                "The program cuts rows off at no length that can be read."
            )
        if own.get("prepared") and reading.fields.get("method") == "qlora":
            reading.set(kbit_preparation="peft")
    common.allocator(reading, program.flow.environ)
    if own.get("images"):
        reading.needs["images"] = (
            "Its rows hold images, and the program doesn't say how large they are."
        )
    if len(kinds := list(dict.fromkeys(_name(one) for one in program.trainings))) > 1:
        several = f"the program trains several times ({'; '.join(kinds)})"
        reading.notes.append(f"{several}; the answer is about {_name(training)}")
    return reading


def _name(training: Made) -> str:
    rows, length = (
        training.values.get(key, "?") for key in ("per_device_train_batch_size", "max_length")
    )
    return f"{training.values['classes'][-1]} with {rows} x {length} tokens"


def _say_what_is_unread(program: _Program, unread: Mapping[str, str], reading: Reading) -> None:
    table = keys(*trl.TABLE)
    for key, text in unread.items():
        if key in _DECISIVE:
            reading.needs[_DECISIVE[key]] = f"The program computes `{key}` when it runs ({text})."
        elif table.kind(key) in ("understood", "not described") or key == "**":
            reading.approximates(
                key, text, EITHER_WAY, "not a constant in the program, so its default is taken"
            )
    for condition in dict.fromkeys(program.flow.undecided):
        reading.approximates(
            condition[:60], "?", EITHER_WAY, "a run decides this condition; it is taken to hold"
        )
