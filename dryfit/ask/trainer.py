"""A callback that stops a Trainer before its first step when the step won't fit.

    from dryfit import StopIfItWontFit
    trainer = SFTTrainer(..., callbacks=[StopIfItWontFit()])
    trainer.train()          # raises WontFit, whose text is the answer, instead of running out of memory at step 900

:class:`MeasureSteps` measures the first updates instead, and compares.

What the model, its adapters and the arguments say is read from the objects themselves; ``sequence_length`` is that of
the arguments' ``max_length`` unless it is given.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dryfit.ask import Answer, _undisturbed, answered, measure
from dryfit.ask.question import Question
from dryfit.cards.gpus import Gpu, find, from_device
from dryfit.evidence.recorder import UPDATES, RunRecorder
from dryfit.readers import trl
from dryfit.readers.approximations import approximate
from dryfit.readers.reading import keys
from dryfit.readers.request import ScenarioRequest
from dryfit.scenario.scenario import Scenario

_KINDS = {
    "SFTConfig": "sft",
    "DPOConfig": "dpo",
    "RewardConfig": "reward",
    "KTOConfig": "kto",
    "GRPOConfig": "grpo",
    "RLOOConfig": "rloo",
}
_DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


class MeasureSteps(TrainerCallback):
    """Measures the first updates on the GPU, and adds a row to your own table of measured steps.

        trainer = SFTTrainer(..., callbacks=[MeasureSteps()])

    Parameters
    ----------
    stop
        Whether training ends then.
    sequence_length
        Tokens of the longest row of those updates; None: the arguments' ``max_length``.

    Attributes
    ----------
    record, text
        The record, as ``measure --record`` has it, and the comparison in words. ``text`` stays None without a GPU.
    """

    def __init__(self, stop: bool = False, sequence_length: int | None = None) -> None:
        self.stop, self.sequence_length = stop, sequence_length
        self.record: dict[str, Any] | None = None
        self.text: str | None = None
        self._recorder = RunRecorder()

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if self.record is not None:
            return
        self._recorder.after_update()
        if len(self._recorder.updates) < UPDATES:
            return
        self.record = self._recorder.to_mapping()
        control.should_training_stop = control.should_training_stop or self.stop
        if self.record["device"] is not None:
            with _undisturbed():
                asked = question_of(args, model, _device(), self.sequence_length)
                asked, step, answer = measure.compared(asked, self.record)
                measure.keep(step)
                self.text = measure.text(asked, step, answer, self.record)


class WontFit(RuntimeError):
    """The step won't fit; the message is the whole answer."""


class StopIfItWontFit(TrainerCallback):
    """Answers before the first step.

    Parameters
    ----------
    gpu
        Which GPU to answer for, as people write it; None: the one that training is on, with what is free on it.
    sequence_length
        Tokens of the longest row; None: the arguments' ``max_length``.
    """

    def __init__(self, gpu: str | None = None, sequence_length: int | None = None) -> None:
        self.gpu, self.sequence_length = gpu, sequence_length
        self.answer: Answer | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        card = find(self.gpu, "StopIfItWontFit") if self.gpu is not None else _device()
        asked = question_of(args, model, card, self.sequence_length)
        self.answer = answered(asked, [asked.model])
        if self.answer.fits is False:
            raise WontFit(self.answer.text)


def question_of(args: Any, model: Any, card: Gpu | None, sequence_length: int | None) -> Question:
    """The question that a trainer's arguments and model are."""
    table = keys(*trl.TABLE)
    given = {
        key: value
        for key, value in vars(args).items()
        if table.kind(key) == "understood" and value is not None
    }
    given.pop("deepspeed", None)
    optimizer = given.get("optim")
    given |= {
        "optim": getattr(optimizer, "value", optimizer),
        "fsdp": None,
        "model_init_kwargs": None,
    }
    peft = getattr(model, "peft_config", None)
    base = model.get_base_model() if peft else model
    packed = {name: bool(getattr(base, f"is_loaded_in_{name}", False)) for name in ("4bit", "8bit")}
    quantized = any(packed.values())
    given |= {f"load_in_{name}": loaded for name, loaded in packed.items()}
    given |= {"model_name_or_path": base.config.model_type, "use_peft": bool(peft)}
    if sequence_length is not None:
        given["max_length"] = sequence_length
    kind = _KINDS.get(type(args).__name__, "transformers")
    reading = trl.read(given, Path(f"the {type(args).__name__}"), None, kind)
    weights = (
        next(p for p in base.parameters() if p.is_floating_point() and not p.requires_grad)
        if peft
        else next(base.parameters())
    )
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    dtype = _DTYPES.get(str(weights.dtype), "bf16")
    model_fields = {
        key: value for key, value in base.config.to_dict().items() if key != "quantization_config"
    }
    fields = reading.fields | {"model": model_fields, "precision": dtype, "autocast": mixed}
    if dtype == "fp32" and mixed and not quantized:
        fields |= {"precision": f"{mixed}-mixed", "autocast": None}
    if peft:
        fields.pop("lora", None)
        adapter = next(iter(peft.values())).to_dict()
        plain = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in adapter.items()
        }
        fields["adapter"] = plain | {"peft_type": adapter["peft_type"].value}
    fields["model_name"] = base.config.name_or_path or base.config.model_type
    if card is not None:
        fields["gpu"] = card.setting
    fields = approximate(fields, reading)
    scenario = Scenario.from_mapping(fields, where="the trainer")
    return Question(
        ScenarioRequest(scenario, {}),
        scenario,
        "the trainer",
        card,
        reading,
        model=fields["model_name"],
    )


def _device() -> Gpu | None:
    """The GPU that training is on; what is taken of it already is the model's own, so its whole memory counts."""
    import torch

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return from_device(device.name, device.total_memory, (device.major, device.minor))
