"""Other aims than supervised fine-tuning: TRL's own trainers, over a scenario's model and rows of its lengths.

TRL adds the adapters, makes the optimizer and takes the steps: its ``train()`` is what is predicted and measured.
"""

from __future__ import annotations

import json
import logging
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dryfit.common.errors import UserError
from dryfit.engine.patching import patched
from dryfit.scenario.fields import MICRO_BATCHES
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import peft_config
from dryfit.step.model import build_model
from dryfit.step.reinforcement import (
    CycleSteps,
    RewardRows,
    answers_from_elsewhere,
    beside_vllm,
    first_and_last_token,
    model_beside,
    reward,
    rollout,
    whole_answers,
    without_an_end,
)

UPDATES = 2  # the first makes the optimizer's states
_KNOWN_BEFORE = {
    "dpo": ("ref_chosen_logps", "ref_rejected_logps"),
    "kto": ("ref_logps", "ref_KL_logps"),
}
_WORD, _PAD, _EOS = "w", "<pad>", "<eos>"


def build_trainer(
    scenario: Scenario, device: str, folder: Path, *, attention_implementation: str | None = None
) -> Any:
    """Make TRL's trainer for a scenario's objective, ready for ``train()``.

    To be called where trainers take ``device`` for theirs (:func:`dryfit.engine.trainer.trace_trainer`).
    ``folder``: where it may write. Its ``beside`` are the models that it holds beside the one it trains.
    """
    for library in ("transformers", "trl", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)
    model = build_model(
        scenario, device, attention_implementation=attention_implementation, for_trainer=True
    )
    kind, configuration = _trainer(scenario)
    own, beside = (
        _generated(scenario, device, attention_implementation)
        if scenario.aim.generates
        else ({}, [])
    )
    if scenario.method == "full":
        model.requires_grad_(True)
    else:
        own["peft_config"] = _adapters(scenario)
    reference = _reference(scenario, device, attention_implementation)
    if reference is not None and not scenario.aim.grouped:
        own["ref_model"] = reference
    try:
        # A trainer whose answers are judged in groups loads its reference by the model's id, and there is none.
        loading = [
            (import_module(kind.__module__), "create_model_from_path", lambda *_, **__: reference)
        ]
        with patched(loading if scenario.aim.grouped else []), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "You are using 'rollout_func'"
            )  # nobody who asks has written it
            trainer = kind(
                model=model,
                args=configuration(**_arguments(scenario, device, folder)),
                train_dataset=_rows(scenario, device),
                processing_class=_tokenizer(folder),
                **own,
            )
    except (
        ValueError,
        NotImplementedError,
        TypeError,
        AttributeError,
    ) as error:  # what it has to say of a model
        raise UserError(
            f"TRL's {kind.__name__} refuses this model or its adapters: {' '.join(str(error).split())}",
            where="objective",
            found=f"{scenario.objective}, model_type {scenario.model['model_type']}, method {scenario.method}",
            allowed="what this trainer takes; or objective sft",
            change={"objective": "sft"},
        ) from error
    if scenario.preference.reference == "precomputed":
        trainer.ref_model = reference = None
        trainer.precompute_ref_logps = True
        data = trainer.train_dataset
        for column in _KNOWN_BEFORE[scenario.objective]:
            data = data.add_column(column, [0.0] * len(data))
        trainer.train_dataset = data
    base = trainer.model
    if scenario.method != "full":
        base.adapter_names = frozenset(
            name for name, p in base.named_parameters() if p.requires_grad
        )
    if scenario.aim.generates and scenario.generation.engine == "transformers":
        without_an_end(trainer, trainer.model.config.get_text_config().vocab_size)
        if device == "meta":
            first_and_last_token(trainer.model)
            if scenario.aim.anew:
                whole_answers(trainer)
    elif scenario.aim.generates and scenario.objective != "grpo":
        answers_from_elsewhere(trainer, scenario)
    if scenario.generation.engine == "vllm" and scenario.objective == "grpo":
        beside_vllm(trainer)
    trainer.beside = beside + ([] if reference is None else [reference])
    _silence(trainer)
    return trainer


def _trainer(scenario: Scenario) -> tuple[type, type]:
    module, name = import_module(scenario.aim.module), scenario.aim.trainer
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


def _generated(
    scenario: Scenario, device: str, attention: str | None
) -> tuple[dict[str, Any], list[torch.nn.Module]]:
    """What a trainer that generates takes besides, and the model among it that judges the answers, or teaches."""
    if scenario.aim.taught:
        model = model_beside(scenario, "teacher", device, attention)
        return {"teacher_model": model}, [model]
    judge = model_beside(scenario, "reward_model", device, attention, objective="reward")
    own: dict[str, Any] = {"reward_funcs": judge or reward}
    if judge is not None:
        own["reward_processing_classes"] = RewardRows(scenario)
    if scenario.generation.engine != "transformers" and scenario.objective == "grpo":
        own["rollout_func"] = rollout(scenario)
    return own, [] if judge is None else [judge]


def _arguments(scenario: Scenario, device: str, folder: Path) -> dict[str, Any]:
    preference, accumulated, own = scenario.preference, scenario.gradient_accumulation, {}
    updates = UPDATES
    if not scenario.aim.generates:
        own["max_length"] = scenario.sequence_length
        accumulated = min(accumulated, MICRO_BATCHES) if device == "meta" else accumulated
    else:
        cycle = CycleSteps.of(scenario, whole=device != "meta")
        accumulated, updates = cycle.accumulation, cycle.updates
        own |= _lengths(scenario)
        if scenario.aim.grouped:
            own |= {"num_generations": preference.generations, "steps_per_generation": cycle.steps}
            own |= {
                "num_iterations": cycle.iterations,
                "beta": 0.0 if preference.reference is None else 0.04,
            }
    return own | {
        "output_dir": str(folder),
        "max_steps": updates,
        "per_device_train_batch_size": scenario.micro_batch,
        "gradient_accumulation_steps": accumulated,
        "gradient_checkpointing": bool(scenario.gradient_checkpointing),
        "gradient_checkpointing_kwargs": {
            "use_reentrant": scenario.gradient_checkpointing == "reentrant"
        },
        "optim": OPTIMIZERS[scenario.optimizer].in_trl,
        "bf16": scenario.autocast_precision == "bf16",
        "fp16": scenario.autocast_precision == "fp16",
        "max_grad_norm": 1.0,
        "use_cpu": True,  # who exchanges the devices says which it is
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def _lengths(scenario: Scenario) -> dict[str, int]:
    """How long answers may be, by the names that the trainer has for it."""
    if scenario.aim.anew:
        return {
            "max_new_tokens": scenario.completion_length,
            "max_length": scenario.sequence_length,
        }
    return {"max_completion_length": scenario.completion_length}


def _adapters(scenario: Scenario) -> Any:
    config = peft_config(scenario)
    if scenario.aim.scores:
        config.task_type = "SEQ_CLS"
        if getattr(config, "modules_to_save", ()) is None:
            config.modules_to_save = ["score"]  # as TRL recommends: the head of rewards is new
    return config


def _reference(scenario: Scenario, device: str, attention: str | None) -> torch.nn.Module | None:
    """A second model, where the objective keeps one; without adapters TRL needs one to begin with, come what may."""
    wanted, dense = scenario.preference.reference, scenario.method == "full"
    if "model" not in scenario.aim.references or not (wanted == "model" or dense):
        return None
    if scenario.aim.grouped and wanted is None:  # `beta` is 0
        return None
    model = build_model(scenario, device, attention_implementation=attention, for_trainer=True)
    return model.requires_grad_(False).eval()


def _rows(scenario: Scenario, device: str) -> Any:
    """Texts whose tokens fill the scenario's rows; with ``attention_mask: padding`` one in each batch is shorter."""
    datasets = import_module("datasets")  # TRL brings it
    datasets.disable_progress_bars()
    # Two more than are taken: the loader is then always a batch ahead, as in a long training.
    count = (UPDATES * scenario.gradient_accumulation + 2) * scenario.micro_batch
    if scenario.aim.generates:
        cycle = CycleSteps.of(scenario, whole=device != "meta")
        count = (cycle.updates * cycle.accumulation + 2 * cycle.steps) * scenario.micro_batch
    length, answer = scenario.sequence_length, scenario.completion_length
    prompt = _text(length - answer)
    lengths = [
        (length if scenario.aim.scores else answer)
        - 1  # TRL adds the end of the text
        - (scenario.attention_mask == "padding" and number % scenario.micro_batch == 0)
        for number in range(count)
    ]
    columns: dict[str, list] = {"prompt": [prompt] * count}
    if scenario.aim.judged:
        columns |= {
            "completion": list(map(_text, lengths)),
            "label": [number % 2 == 0 for number in range(count)],
        }
    elif not scenario.aim.generates:
        columns |= {"chosen": list(map(_text, lengths)), "rejected": list(map(_text, lengths))}
    if scenario.aim.scores:
        del columns["prompt"]
    return datasets.Dataset.from_dict(columns)


def _text(tokens: int) -> str:
    return " ".join([_WORD] * tokens)


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    form = {
        "version": "1.0",
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {_PAD: 0, _EOS: 1, _WORD: 2}, "unk_token": _PAD},
    }
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(form), encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token=_PAD, eos_token=_EOS)


def _silence(trainer: Any) -> None:
    """Let a trainer's log go nowhere: an answer is printed where it would print."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
