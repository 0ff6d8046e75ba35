"""A real Trainer is stopped before its first step when the step won't fit, and left alone when it will."""

import gc
import random
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, logging

from dryfit.ask.trainer import StopIfItWontFit, WontFit, question_of
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model
from tests.dryfit.ask.conftest import TINY


class Rows(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.ones(8, dtype=torch.long),
            "labels": torch.ones(8, dtype=torch.long),
        }


def trainer(folder: Path, gpu: str) -> tuple[Trainer, StopIfItWontFit]:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    args = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    stop = StopIfItWontFit(gpu=gpu, sequence_length=512)
    return Trainer(model, args, train_dataset=Rows(), callbacks=[stop]), stop


def test_a_base_of_eight_bits_is_one_in_the_question(tmp_path: Path) -> None:
    fields = {
        "model": TINY,
        "method": "qlora",
        "quantization": {"type": "int8"},
        "sequence_length": 32,
    }
    model = build_model(Scenario.from_mapping(fields), "cpu")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    scenario = question_of(args, model, None, 32).scenario
    assert scenario.method == "qlora" and scenario.quantization.type == "int8"


@pytest.mark.thorough
def test_a_step_that_fits_is_taken(tmp_path: Path) -> None:
    made, stop = trainer(tmp_path, "24GiB")
    made.train()
    assert stop.answer.fits and stop.answer.details["scenario"]["adapter"]["r"] == 4
    assert made.state.global_step == 1


def test_a_training_goes_on_as_if_it_had_not_asked(tmp_path: Path) -> None:
    """Models are built and seeded for the answer: no number that the training draws may be another for it."""
    made, stop = trainer(tmp_path, "24GiB")
    logging.set_verbosity_info()

    def state() -> tuple:
        drawn = [
            *random.getstate()[1],
            *numpy.random.get_state()[1].tolist(),
            *torch.get_rng_state().tolist(),
        ]
        return drawn, gc.get_threshold(), list(warnings.filters), logging.get_verbosity()

    torch.rand(3)
    before = state()
    stop.on_train_begin(made.args, made.state, made.control, made.model)
    assert stop.answer.fits and state() == before
    logging.set_verbosity_warning()


@pytest.mark.thorough
def test_a_step_that_does_not_fit_is_not_taken(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path, "0.51GiB")
    with pytest.raises(WontFit, match="DOES NOT FIT: the step needs"):
        made.train()
    assert made.state.global_step == 0
