"""The same step asked in another way takes the same bytes: `trace_step`, `trace_trainer`, and a scenario."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dryfit.ask.answer import predict
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.loaders import WeightLoader
from tests.dryfit.program.test_run import answered, program
from tests.repository import ROOT
from tests.warm import launchers


def printed(folder: Path, code: str) -> dict:
    """What a program prints last."""
    (folder / "traces.py").write_text(code, encoding="utf-8")
    command = [f"{launchers()}/python", "-m", "traces"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_step_as_a_trace_takes_the_same_bytes(tmp_path):
    """The engine traces the step that the program's loop takes."""
    text = """
        import torch
        from torch import nn
        with PLACE:
            model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
            batch = torch.empty(64, 256)
        optimizer = torch.optim.AdamW(model.parameters())
        def step(batch):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = (model(batch) - batch).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    """
    lines = "\n".join(line[8:] for line in text.splitlines())
    loop = "for _ in range(9):\n    step(torch.empty(64, 256, device='cuda'))\n"
    alone = lines.replace("    batch = torch.empty(64, 256)\n", "")
    answer = answered(
        tmp_path, program(tmp_path, alone.replace("PLACE", "torch.device('cuda')") + loop)
    )
    traced = """
        import json
        from dryfit.engine.trace import Options, trace_step
        report = trace_step(model, optimizer, step, batch, Options(capability=(8, 0)))
        print(json.dumps(report.phases))
    """
    head = "from dryfit.engine.patching import on_meta\n" + lines.replace("PLACE", "on_meta()")
    phases = printed(tmp_path, head + "\n".join(line[8:] for line in traced.splitlines()))
    for phase in ("forward", "backward", "optimizer"):
        assert answer["trace"]["phases"][phase] == phases[phase]


TRAINER = """
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments

class Rows(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        ids = torch.arange(128)
        return {"input_ids": ids, "labels": ids}

def make(workers, use_cpu=False):
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=256, n_head=4, vocab_size=5000))
    arguments = TrainingArguments(
        "out", per_device_train_batch_size=8, bf16=True, max_steps=2, report_to=[], save_strategy="no", logging_steps=1,
        dataloader_num_workers=workers, dataloader_pin_memory=False, use_cpu=use_cpu,
        gradient_checkpointing=CHECKPOINTING,
    )
    return Trainer(model, arguments, train_dataset=Rows())
"""


@pytest.mark.thorough
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_trainer_script_equals_the_trace_of_its_trainer(tmp_path, checkpointing):
    made = TRAINER.replace("CHECKPOINTING", str(checkpointing))
    answer = answered(
        tmp_path, program(tmp_path, made + "make(2).train()\n"), fresh=not checkpointing
    )
    code = "import json\nfrom dryfit.engine.trainer import trace_trainer\n"
    code += "from dryfit.engine.trace import Options\n" + made
    code += "def on_meta():\n    with torch.device('meta'):\n        return make(0, use_cpu=True)\n"
    code += "print(json.dumps(trace_trainer(on_meta, Options(capability=(8, 0))).phases))\n"
    phases = printed(tmp_path, code)
    for phase in ("forward", "backward", "optimizer"):
        assert answer["trace"]["phases"][phase] == phases[phase]


SIZES = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
OF_SCENARIO = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SIZES), dtype=torch.bfloat16).cuda()
MODEL
optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])


def forward_backward():
    ids = torch.randint(0, 4000, (4, 128)).cuda()
    batch = {"input_ids": ids, "labels": ids.clone()}
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach()


def update():
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


for _ in range(3):
    forward_backward()
    update()
"""
METHODS = {
    "full": ({"method": "full"}, ""),
    "lora": (
        {"method": "lora", "lora": {"rank": 8, "target_modules": "all-linear"}},
        "model = get_peft_model(model, LoraConfig(r=8, target_modules='all-linear', task_type='CAUSAL_LM'))",
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_a_scenario_of_the_same_step_takes_the_same_bytes(tmp_path, monkeypatch, method):
    """The program makes its model on the host and moves it. So does the scenario here, or blocks lie elsewhere."""
    monkeypatch.setattr(WeightLoader, "installed", lambda: WeightLoader(loaded_on_cpu_first=True))
    fields, adapters = METHODS[method]
    scenario = {
        "model": {"model_type": "qwen2", **SIZES},
        "precision": "bf16",
        "gradient_checkpointing": False,
        "sequence_length": 128,
        "micro_batch": 4,
        "gpu": "a100-80gb",
        **fields,
    }
    text = OF_SCENARIO.replace("**SIZES", f"**{SIZES}").replace("MODEL", adapters)
    run = answered(tmp_path, "--gpu", "a100-80gb", program(tmp_path, text))["trace"]
    asked = predict(Scenario.from_mapping(scenario))["trace"]
    for phase in ("forward", "backward", "optimizer"):
        assert run["phases"][phase] == asked["phases"][phase], phase
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "required_bytes"):
        assert run[name] == asked[name], name
