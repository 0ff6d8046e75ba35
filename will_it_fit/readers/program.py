"""Python programs and notebooks that train with TRL, transformers or Unsloth: the arguments of their calls.

The program is read as a syntax tree and never run. Arguments that are no constants are named: the answer then has the
default in their place.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from will_it_fit.common.errors import UserError
from will_it_fit.readers import grpo, torchtitan, trl
from will_it_fit.readers.reading import EITHER_WAY, TOO_HIGH, Reading, keys
from will_it_fit.scenario.objectives import OBJECTIVES, SUPERVISED

_UNKNOWN = object()
# What a call configures: names of classes and methods, and which trainer's defaults they bring.
_ARGUMENTS = {
    "SFTConfig": "sft", "DPOConfig": "dpo", "RewardConfig": "reward", "KTOConfig": "kto", "GRPOConfig": "grpo",
    "RLOOConfig": "rloo", "DistillationConfig": "distillation",
    "OnlineDPOConfig": "online_dpo", "TrainingArguments": "transformers", "Seq2SeqTrainingArguments": "transformers",
    "ORPOConfig": "dpo", "CPOConfig": "dpo", "UnslothTrainingArguments": "transformers",
}  # fmt: skip
_TRAINERS = {"SFTTrainer": "sft", "DPOTrainer": "dpo", "RewardTrainer": "reward", "KTOTrainer": "kto",
             "GRPOTrainer": "grpo", "RLOOTrainer": "rloo", "DistillationTrainer": "distillation",
             "OnlineDPOTrainer": "online_dpo", "ORPOTrainer": "dpo", "UnslothTrainer": "sft"}  # fmt: skip
_MODELS = {"AutoModelForCausalLM", "AutoModelForImageTextToText", "FastLanguageModel", "FastModel", "FastVisionModel",
           "LlamaForCausalLM", "AutoPeftModelForCausalLM"}  # fmt: skip
_UNSLOTH = {"FastLanguageModel", "FastModel", "FastVisionModel"}
_PEFT = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_dora": "use_dora",
         "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save",
         "target_parameters": "lora_target_parameters"}  # fmt: skip
_BNB = {"load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit", "bnb_4bit_quant_type": "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
        "bnb_4bit_quant_storage": "bnb_4bit_quant_storage"}  # fmt: skip
_LOADED = {"torch_dtype": "dtype", "dtype": "dtype", "attn_implementation": "attn_implementation",
           "revision": "model_revision", "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit",
           "max_seq_length": "max_length", "use_cache": None, "device_map": None}  # fmt: skip


def source(path: Path) -> str:
    """The program's text; of a notebook its code cells, without lines for the shell."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    try:
        cells = json.loads(text)["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError("The notebook can't be read.", where=path, allowed="a notebook of format 4") from None
    lines = "\n".join(code).splitlines()
    return "\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in lines)


def read(path: Path, gpus: int | None = None, part: str | None = None) -> Reading:
    """The scenario's fields of a program; ``part``: a function of a torchtitan registry."""
    try:
        tree = ast.parse(source(path))
    except SyntaxError as error:
        raise UserError(
            "The program is not Python.", where=f"{path}, line {error.lineno}", found=(error.text or "").strip()[:80],
            allowed="a Python file or a notebook",
        ) from None  # fmt: skip
    if torchtitan.is_registry(tree):
        return torchtitan.read_registry(tree, path, part, gpus)
    calls = _Calls(tree)
    if not calls.settings and not calls.trainer:
        raise UserError(
            "No trainer that will-it-fit knows was found in this program.",
            where=path,
            allowed=f"calls of {', '.join([*_ARGUMENTS][:7])}, LoraConfig, BitsAndBytesConfig,"
            " AutoModelForCausalLM.from_pretrained, FastLanguageModel.from_pretrained",
            write="will-it-fit MODEL --method qlora -s 2048",
        )
    if "model_name_or_path" not in calls.settings:
        raise UserError(
            "The program names no model that can be read.",
            where=path,
            found=calls.unread.get("model_name_or_path"),
            allowed="a constant in from_pretrained(...), or --set model=NAME",
            write="--set model=Qwen/Qwen3-8B",
        )
    return calls.reading(path, gpus)


class _Calls(ast.NodeVisitor):
    """What a program's calls say, in TRL's words."""

    def __init__(self, tree: ast.Module) -> None:
        self.names: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self.unread: dict[str, str] = {}  # setting to the expression that is no constant
        self.trainer: str | None = None
        self.unsloth: set[str] = set()
        self.prepared = False
        self.shared: float | None = None  # what vLLM takes of a card where Unsloth brings it along
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                value = self.value(node.value)
                if value is not _UNKNOWN:
                    self.names.setdefault(node.targets[0].id, value)
        self.visit(tree)

    def value(self, node: ast.AST | None) -> Any:
        """What an expression is worth, if that can be read: constants, names of constants, dtypes."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, _UNKNOWN)
        if isinstance(node, ast.Attribute) and node.attr in ("bfloat16", "float16", "float32"):
            return node.attr
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [self.value(item) for item in node.elts]
            return _UNKNOWN if _UNKNOWN in items else items
        if isinstance(node, ast.Dict) and all(node.keys):
            items = {self.value(key): self.value(item) for key, item in zip(node.keys, node.values, strict=True)}
            return _UNKNOWN if _UNKNOWN in [*items, *items.values()] else items
        if isinstance(node, ast.Call) and _last(node.func) in ("is_bfloat16_supported", "is_bf16_supported"):
            return True
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.value(node.operand)
            return inner if inner is _UNKNOWN else not inner
        try:
            return ast.literal_eval(node) if node is not None else _UNKNOWN
        except (ValueError, TypeError, SyntaxError):
            return _UNKNOWN

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name, owner = _last(node.func), _last(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name in _ARGUMENTS:
            self.trainer = self.trainer if self.trainer not in (None, "transformers") else _ARGUMENTS[name]
            self.take(node, None)
            if _ARGUMENTS[name] == "transformers":
                self.settings = {"gradient_checkpointing": False, "bf16": False, **self.settings}
        elif name in _TRAINERS:
            kind = _TRAINERS[name]
            self.trainer = kind if self.trainer is None or self.trainer == "transformers" else self.trainer
            self.take(node, {"max_seq_length": "max_length", "packing": "packing", "max_length": "max_length"})
            self.model(next((word.value for word in node.keywords if word.arg == "model"), None), only_text=True)
            if any(word.arg == "peft_config" for word in node.keywords):
                self.settings.setdefault("use_peft", True)
        elif name == "LoraConfig":
            self.settings["use_peft"] = True
            self.take(node, _PEFT)
        elif name == "BitsAndBytesConfig":
            self.take(node, _BNB)
        elif name == "prepare_model_for_kbit_training":
            self.prepared = True
        elif name == "from_pretrained" and owner in _MODELS:
            if owner in _UNSLOTH:
                self.unsloth.add(owner)
                self.settings.setdefault("load_in_4bit", True)  # unsloth: loader.py, its default
            self.take(node, _LOADED)
            self.take_engine(node)
            self.settings.setdefault("dtype", "auto")  # transformers 5: as the model's files say
            words = {word.arg: word.value for word in node.keywords}
            named = words.get("model_name") or words.get("pretrained_model_name_or_path")
            self.model(node.args[0] if node.args else named)
        elif name == "get_peft_model" and owner in _UNSLOTH:
            self.settings["use_peft"] = True
            self.settings.setdefault("lora_r", 16)
            self.settings.setdefault("lora_dropout", 0.0)
            self.take(node, {**_PEFT, "use_gradient_checkpointing": "gradient_checkpointing"})

    def model(self, node: ast.AST | None, only_text: bool = False) -> None:
        value = self.value(node)
        if isinstance(value, str):
            self.settings.setdefault("model_name_or_path", value)
        elif node is not None and not only_text:
            self.unread.setdefault("model_name_or_path", ast.unparse(node))

    def take(self, node: ast.Call, renamed: Mapping[str, str | None] | None) -> None:
        """Keep a call's arguments: all, or those that are renamed."""
        for word in node.keywords:
            key = word.arg if renamed is None else (renamed or {}).get(word.arg or "")
            if key is None:
                continue
            value = self.value(word.value)
            if value is _UNKNOWN:
                self.unread[key] = ast.unparse(word.value)[:60]
            else:
                self.settings[key] = value
                self.lines[key] = word.value.lineno

    def take_engine(self, node: ast.Call) -> None:
        """Unsloth's ``fast_inference``: a server over the model's own weights."""
        values = {word.arg: self.value(word.value) for word in node.keywords}
        if values.get("fast_inference") is True:
            share = values.get("gpu_memory_utilization", 0.5)  # unsloth: loader.py, its default
            self.shared = share if isinstance(share, float) else 0.5

    def reading(self, path: Path, gpus: int | None) -> Reading:
        settings = dict(self.settings)
        unsloth = settings.get("gradient_checkpointing") == "unsloth"
        if unsloth:
            settings["gradient_checkpointing"] = True
        trainer = self.trainer or "transformers"
        if self.unsloth:
            settings.setdefault("dtype", "bfloat16")
            settings["dtype"] = settings["dtype"] or "bfloat16"
        reading = trl.read(settings, path, gpus, trainer)
        table = keys(*trl.TABLE)
        for key, text in self.unread.items():
            if table.kind(key) in ("understood", "not described"):
                reading.approximates(key, text, EITHER_WAY, "not a constant in the program, so its default is taken")
        if self.prepared and not self.unsloth and reading.fields.get("method") == "qlora":
            reading.set(kbit_preparation="peft")
        if self.unsloth:
            _unsloth(reading, unsloth, self.shared)
        return reading


def _unsloth(reading: Reading, offloads: bool, utilization: float | None) -> None:
    """Unsloth's kernels are its own: what PyTorch's need is the upper end."""
    reading.tool = f"Unsloth and {reading.tool}"
    why = "its kernels are its own and keep less: this is the upper end of a range"
    reading.approximates("unsloth", True, TOO_HIGH, why, "step")
    if OBJECTIVES[reading.fields.get("objective", SUPERVISED)].generates:
        reading.remarks.pop()
        grpo.of_unsloth(reading, utilization)
        return
    if offloads:
        reading.approximates(
            "use_gradient_checkpointing", "unsloth", TOO_HIGH, "layers' inputs wait on the host", "activations"
        )
    reading.set(kernels="unsloth", loss="chunked")  # unsloth_zoo: the loss is computed in chunks


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
