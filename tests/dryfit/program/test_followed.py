"""What a run follows beside its two updates, what it raises, and what it says of the rest."""

import shlex
from argparse import Namespace

import pytest

from dryfit.ask.options import own_parser
from dryfit.ask.run_program import whole_line
from dryfit.scenario.hub import HubId, published_dtype
from tests.dryfit.program.test_run import answered, asked, program, refused

# A model of one layer; the body is a step's.
LOOP = """
import math, torch
from torch import nn
model = nn.Linear(1024, 1024).cuda()
optimizer = torch.optim.AdamW(model.parameters())
kept, rows = [], 64
for step in range(STEPS):
    x = torch.randn(rows, 1024, device="cuda")
    loss = model(x).square().mean()
BODY
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def loop(body: str, steps: int = 100) -> str:
    return LOOP.replace("BODY", "\n".join(f"    {line}" for line in body.splitlines())).replace(
        "STEPS", str(steps)
    )


# --- numbers -------------------------------------------------------------------------------------------------------

FINITE = """
big = torch.empty(2048, 2048, device="cuda")
one = loss.detach()
for is_bad in (
    torch.isnan(one), one.isnan().any(), torch.isinf(one), one != one, torch.isnan(one.cpu()), torch.isnan(big).any(),
    torch.isnan(one).item(), torch.isnan(big).sum() > 0, math.isnan(one.item()), math.isinf(one.item()),
    ~torch.isfinite(one), not torch.isfinite(big).all(), not math.isfinite(one.item()), torch.isneginf(one).any(),
    torch.isnan(one) | torch.isinf(one), torch.logical_not(torch.isfinite(x)).any(),
):
    assert not is_bad
assert not torch.isnan(torch.tensor(1.0)) and torch.isnan(torch.tensor(float("nan"))).item()
"""


def test_what_nobody_knows_is_finite(tmp_path):
    program_ = answered(tmp_path, program(tmp_path, loop(FINITE)))["program"]
    assert program_["updates"] == 2 and not any(read["decided"] for read in program_["reads"])


def test_the_line_that_ended_a_program_without_an_update_is_named(tmp_path):
    text = loop("if loss.item() > 0.5:\n    break")
    line = text.splitlines().index("    if loss.item() > 0.5:") + 1
    said = refused(tmp_path, "--gpu", "4090", program(tmp_path, text), "--lr", "1")
    assert f"program.py:{line} in <module>" in said and "1 was taken" in said
    assert f"dryfit run --answer program.py:{line}=0 --yes --gpu 4090 program.py --lr 1" in said


DTYPES = {
    "Qwen/Qwen2.5-7B": "bfloat16",
    "meta-llama/Llama-2-7b-hf": "float16",
    "NousResearch/Llama-2-7b-hf": "float16",
    "google/gemma-2-9b": "float32",
    "google/gemma-2-9b-it": "bfloat16",
}


@pytest.mark.parametrize("name", DTYPES)
def test_each_model_of_the_catalogue_has_its_published_dtype(name):
    assert published_dtype(HubId.read(name)) == DTYPES[name]


@pytest.mark.thorough
def test_a_script_without_a_dtype_loads_the_published_one(tmp_path):
    text = """
import torch
from transformers import AutoModelForCausalLM
for name, options in (("meta-llama/Llama-3.2-1B", {}), ("meta-llama/Llama-3.2-1B", {"dtype": torch.float32})):
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    print("DTYPE", model.dtype, model.lm_head.weight.dtype)
"""
    said = refused(tmp_path, program(tmp_path, text))
    assert (
        "DTYPE torch.bfloat16 torch.bfloat16" in said
        and "DTYPE torch.float32 torch.float32" in said
    )


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_memory_that_grows_does_not_fit_for_ever(tmp_path):
    done = asked(
        tmp_path,
        "--yes",
        "--gpu",
        "4090",
        program(tmp_path, loop("kept.append(x.new_empty(2**24))")),
    )
    assert done.returncode == 1 and done.stdout.startswith("TOO CLOSE TO CALL")
    assert "more updates that keep 64.0 MiB each" in done.stdout
    assert "memory grows by 64.0 MiB with each update" in done.stdout


CONSTANT = {
    "the last batch": "last = x",
    "batches of different lengths": "rows = 64 + 512 * (step % 3)\nlast = x",
    "an average that begins later": "if step == 1:\n    kept.append(torch.empty(2**24, device='cuda'))",
    "losses without a graph": "kept.append(loss.detach())",
}


def test_memory_that_stays_does_not_grow(tmp_path):
    body = "\n".join(CONSTANT.values())
    answer = answered(tmp_path, "--gpu", "4090", program(tmp_path, loop(body)))
    assert answer["program"]["growth_bytes"] == 0 and answer["program"]["updates"] == 4


@pytest.mark.thorough
def test_a_program_that_came_to_its_end_has_all_its_growth_in_the_peak(tmp_path):
    name = program(tmp_path, loop("kept.append(x.new_empty(2**24))", steps=6))
    answer = answered(tmp_path, "--gpu", "4090", "--steps", "99", name)
    assert (
        answer["fits"]
        and answer["program"]["outcome"] == "ended"
        and not answer["program"]["not_followed"]
    )
    assert answer["trace"]["peak_allocated_bytes"] > 6 * 2**26


HALVES = """
import torch
from torch import nn
model = nn.Linear(1024, 1024).cuda()
optimizer = torch.optim.AdamW(model.parameters())
rows = 2**23
while True:
    try:
        for step in range(4):
            x = torch.randn(rows, 1024, device="cuda")
            model(x).relu().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        break
    except KIND as error:
        assert "CUDA out of memory" in str(error)
        x, rows = None, rows // 2
        torch.cuda.empty_cache()
"""


@pytest.mark.thorough
def test_a_program_that_halves_its_batch_goes_on(tmp_path):
    answer = answered(
        tmp_path,
        "--gpu",
        "4090",
        program(tmp_path, HALVES.replace("KIND", "torch.OutOfMemoryError")),
    )
    ran_out = answer["program"]["ran_out"]
    assert len(ran_out) == 3 and answer["fits"]
    assert 12 * 2**30 < answer["trace"]["required_bytes"] < 17 * 2**30  # of 2^20 rows
    assert any("ran out" in warning for warning in answer["warnings"])


@pytest.mark.thorough
def test_a_program_that_does_not_runs_again_to_see_what_it_needs(tmp_path):
    done = asked(
        tmp_path, "--yes", "--gpu", "4090", program(tmp_path, HALVES.replace("KIND", "ValueError"))
    )
    assert done.returncode == 1 and done.stdout.startswith("DOES NOT FIT: the program needs 128.0")
    assert "ran out at program.py:10" in done.stderr


@pytest.mark.thorough
def test_a_share_of_the_card_is_a_border(tmp_path):
    share = "torch.cuda.set_per_process_memory_fraction(0.5)\n"
    share += "assert torch.cuda.get_per_process_memory_fraction() == 0.5"
    text = loop("kept.clear()\nkept.append(x.new_empty(2**31))").replace(
        "kept, rows", f"{share}\nkept, rows"
    )
    answer = answered(tmp_path, "--gpu", "4090", program(tmp_path, text))  # 8 GiB of 11.8
    assert answer["fits"] and answer["program"]["share_bytes"] == answer["gpu"]["total_bytes"] // 2
    answer = answered(
        tmp_path, "--gpu", "4090", program(tmp_path, text.replace("2**31", "2**31 + 2**30"))
    )
    assert answer["fits"] is False and answer["headroom_bytes"] < 0


# --- beyond the updates --------------------------------------------------------------------------------------------

EPOCHS = """
import torch
from torch import nn
from torch.utils.data import DataLoader
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 200
    def __getitem__(self, at):
        return torch.zeros(LENGTH, dtype=torch.long)
def collate(rows):
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
model = nn.Sequential(nn.Embedding(1000, 256), nn.Linear(256, 1000)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
train = DataLoader(Rows(), 4, shuffle=SHUFFLE, collate_fn=collate)
for epoch in range(10):
    for ids in train:
        print("trains on", tuple(ids.shape))
        model(ids.cuda()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for ids in DataLoader(Rows(), 16, collate_fn=collate):
            print("validates on", tuple(ids.shape))
            model(ids.cuda())
    torch.save(model.state_dict(), "model.pt")
    print("saved")
    model.train()
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("shuffle", ["True", "False"])
def test_the_largest_batch_a_validation_and_a_save_are_followed(tmp_path, shuffle):
    text = EPOCHS.replace("SHUFFLE", shuffle).replace("LENGTH", "10 + (at * 37) % 200")
    done = asked(tmp_path, "--yes", "--gpu", "4090", program(tmp_path, text))
    assert done.returncode == 0 and "not covered" not in done.stdout, done.stdout
    assert done.stderr.count("validates on") == 2 and done.stderr.count("\nsaved") == 1
    lengths = [10 + at * 37 % 200 for at in range(200)]
    assert (
        f"trains on (4, {max(lengths)})" in done.stderr
        and f"validates on (16, {max(lengths)})" in done.stderr
    )
    assert "evaluation" in done.stdout and "stopped after 3 updates" in done.stdout


TRAINER = """
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", vocab_size=1000, **sizes))
texts = [[1] * (10 + at % 300) for at in range(600)]
rows = Dataset.from_dict({"input_ids": texts, "labels": texts})
def collate(items):
    longest = max(len(item["input_ids"]) for item in items)
    print("batch", len(items), longest)
    return {key: torch.tensor([item[key] + [0] * (longest - len(item[key])) for item in items]) for key in items[0]}
settings = TrainingArguments("out", per_device_train_batch_size=4, bf16=True, max_steps=1000, eval_strategy="steps",
                             eval_steps=500, save_steps=500, gradient_accumulation_steps=2, report_to=[])
trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows.select(range(50)), data_collator=collate)
trainer.train()
trainer.save_model("final")
"""


@pytest.mark.thorough
def test_a_trainer_evaluates_and_saves_after_its_updates(tmp_path):
    done = asked(tmp_path, "--yes", "--gpu", "4090", program(tmp_path, TRAINER))
    assert done.returncode == 0 and "not covered" not in done.stdout, done.stderr
    assert "stopped after 3 updates" in done.stdout and "evaluation" in done.stdout
    assert "batch 4 309" in done.stderr and "batch 8 57" in done.stderr  # of 50 rows in their order
    assert "checkpoint-3" in done.stdout
    assert "Traceback" not in done.stderr


def test_what_is_not_followed_is_in_the_verdicts_line(tmp_path):
    text = loop("""if step == 50:
    model.eval()
    torch.save(model.state_dict(), "x")
    model.weight.requires_grad_(True)""")
    done = asked(tmp_path, "--yes", "--gpu", "4090", program(tmp_path, text))
    first = done.stdout.splitlines()[0]
    assert done.returncode == 0 and first.startswith("FITS")
    line = text.splitlines().index("        model.weight.requires_grad_(True)") + 1
    assert first.endswith(
        f"; later batches, validation, saving and unfreezing (program.py:{line}) are not covered"
    )


@pytest.mark.thorough
def test_what_tidies_up_after_the_end_prints_no_traceback(tmp_path):
    """As Lightning does: it handles whatever ends its loop, and moves the model to the host with its gradients."""
    text = """
import torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
try:
    while True:
        model(torch.randn(8, 64, device="cuda")).sum().backward()
        optimizer.step()
except BaseException:
    model.cpu()
    assert model.weight.grad.device.type == model.weight.device.type == "cpu"
    raise ValueError
"""
    done = asked(tmp_path, "--yes", program(tmp_path, text))
    assert done.returncode == 0 and "Traceback" not in done.stderr


# --- lines ---------------------------------------------------------------------------------------------------------

LINES = {
    (
        "--gpu 4090 train.py --lr 1",
        "dryfit run --network ...",
    ): "--network --gpu 4090 train.py --lr 1",
    ("--seconds 9 --yes train.py", "dryfit run --seconds 36 ..."): "--seconds 36 --yes train.py",
    ("--seconds=9 -m train a", "dryfit run --seconds 36 ..."): "--seconds 36 -m train a",
    (
        "--answer a.py:1=1 a.py",
        "dryfit run --answer a.py:2=0 ...",
    ): "--answer a.py:2=0 --answer a.py:1=1 a.py",
    ("--gpu 'A100 80GB' 'my train.py' 'a b'", "dryfit run --yes ..."): (
        "--yes --gpu 'A100 80GB' 'my train.py' 'a b'"
    ),
    ("train.py", "mkdir -p x"): None,
}


@pytest.mark.parametrize(("words", "write"), LINES)
def test_a_line_to_write_keeps_what_the_asker_wrote(words, write):
    split = shlex.split(words)
    line = LINES[words, write]
    options = own_parser("run").parse_args(split, Namespace(words=split))
    assert whole_line(write, options) == (f"dryfit run {line}" if line else write)


@pytest.mark.thorough
def test_a_slow_program_is_said_to_run(tmp_path):
    done = asked(
        tmp_path, "--yes", program(tmp_path, "import time\ntime.sleep(3)\n" + loop("time.sleep(1)"))
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("dryfit: program.py: ")]
    assert done.returncode == 0 and lines and all(line.endswith(" s)") for line in lines)
