"""Loops of other libraries: accelerate's and TRL's own code, traced on meta and measured on the CPU."""

import logging
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from dryfit.engine.trace import Options, measure_step, trace_step
from tests.dryfit.decoders import DECODERS
from tests.dryfit.engine.test_core import batch, perceptron
from tests.repository import ROOT


def _forget() -> None:
    """Forget accelerate's settings, which a process can make once."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerated(device: str):
    """A loop of accelerate: mixed precision, accumulation, clipping, its own optimizer."""
    from accelerate import Accelerator

    _forget()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=2)
    with torch.device(device):
        model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model, optimizer = accelerator.prepare(
        model, optimizer, device_placement=[False, False]
    )  # it stays on meta

    def step(batch):
        for _ in range(2):
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(batch[0]), batch[1])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return model, optimizer, step


def test_accelerate_is_traced_to_the_byte():
    model, optimizer, step = accelerated("meta")
    predicted = trace_step(model, optimizer, step, batch(), Options(target="cpu"))
    model, optimizer, step = accelerated("cpu")
    measured = measure_step(model, optimizer, step, batch())
    assert predicted.phases == measured.phases
    assert predicted.components["optimizer_states"] == measured.components["optimizer_states"]


def supervised(device: str, folder):
    """TRL's trainer and one of its own batches. It moves model and batch to its device: not those on meta."""
    trl = pytest.importorskip("trl")
    _forget()
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    class OnMeta(trl.SFTTrainer):
        def _move_model_to_device(self, model, device):
            return model

        def _prepare_input(self, data):
            return data

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    with torch.device(device):
        config = AutoConfig.for_model(**DECODERS["qwen2"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    trainer = (OnMeta if device == "meta" else trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            optim="adamw_torch",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[1, 2, 3, 4] * 16, [1, 2, 3] * 12]}),
        processing_class=tokenizer,
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # its train() would say so

    def step(batch):
        trainer.training_step(trainer.model, batch)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return trainer, step


def test_trl_is_traced_to_the_byte(tmp_path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    trainer, step = supervised("meta", tmp_path)
    inputs = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" in inputs
    predicted = trace_step(
        trainer.model, trainer.optimizer, step, inputs, Options(target="cpu", scalars=1.0)
    )
    trainer, step = supervised("cpu", tmp_path)
    measured = measure_step(trainer.model, trainer.optimizer, step, inputs)
    assert predicted.phases == pytest.approx(measured.phases, abs=4)
    assert predicted.peak_allocated_bytes == measured.peak_allocated_bytes


def test_a_module_outside_the_model_belongs_to_the_forward_phase():
    with torch.device("meta"):
        model, criterion = perceptron(), nn.CrossEntropyLoss()

    def step(batch):
        criterion(model(batch[0]), batch[1]).backward()

    assert set(trace_step(model, None, step, batch()).phases) == {"load", "forward", "backward"}


PAGE = ROOT / "docs" / "memory-core.md"
BLOCK = re.compile(r"(?<!-->\n)^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_page_shows_what_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    (block,) = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    exec(compile(block, str(PAGE), "exec"), names)
    report = names["report"]
    assert sum(report.components.values()) == report.peak_allocated_bytes
    assert set(report.phases) == {"load", "forward", "backward", "optimizer"}
