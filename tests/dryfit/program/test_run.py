"""`dryfit run`: whole programs in processes of their own, over a card that is simulated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dryfit.program import forked
from tests.warm import launchers

ROOT = Path(__file__).parents[3]
PROGRAMS = Path(__file__).parent / "programs"


def asked(folder: Path, *words: str, fresh: bool = False) -> subprocess.CompletedProcess:
    """The command; with ``fresh`` in new processes as a user's, else forked where PyTorch is imported already."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "DRYFIT_CACHE": str(folder / "kept" / "answers"),
    }
    start = [
        f"{launchers(packages=forked.IMPORTED)}/python",
        "-P",
        "-m",
        "tests.dryfit.program.forked",
    ]
    start = [sys.executable, "-P", "-m", "dryfit.ask.command"] if fresh else start
    command = [*start, "run", *words]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def answered(folder: Path, *words: str, fresh: bool = False) -> dict:
    done = asked(folder, "--yes", "--json", *words, fresh=fresh)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def refused(folder: Path, *words: str, fresh: bool = False) -> str:
    done = asked(folder, "--yes", *words, fresh=fresh)
    assert done.returncode == 2, done.stderr
    return done.stderr


def program(folder: Path, text: str) -> str:
    (folder / "program.py").write_text(text)
    return "program.py"


@pytest.mark.thorough
def test_a_loop_stops_after_its_second_update(tmp_path):
    answer = answered(tmp_path, "--gpu", "4090", str(PROGRAMS / "loop.py"), fresh=True)
    parameters = 256 * 1024 + 1024 + 1024 * 256 + 256
    assert (
        answer["fits"]
        and answer["program"]["updates"] == 2
        and answer["program"]["outcome"] == "stopped"
    )
    assert answer["trace"]["components"]["weights_fp32"] == 4 * parameters
    assert answer["trace"]["components"]["optimizer_states"] == 8 * parameters
    assert 0 < answer["time"]["seconds_per_step"] < 0.1 and answer["time"]["limited_by"]
    assert answer["evaluation"]["peak_allocated_bytes"] > answer["training"]["peak_allocated_bytes"]
    assert answer["trace"]["peak_phase"] == "evaluation"
    lines = (PROGRAMS / "loop.py").read_text().splitlines()
    evaluates, compares = (
        1 + next(at for at, line in enumerate(lines) if word in line) for word in ("8192", "< best")
    )
    assert f"loop.py:{evaluates} in <module>" in answer["program"]["peak_line"]
    decided = [
        read["line"].rpartition("/")[2] for read in answer["program"]["reads"] if read["decided"]
    ]
    assert decided == [f"loop.py:{compares} in <module>"]


ONE_RESTS = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).cuda()
optimizers = [torch.optim.SGD(part.parameters(), lr=1e-3) for part in model]
for step in range(9):
    model(torch.randn(8, 64, device="cuda")).sum().backward()
    for optimizer in optimizers[: 2 - step % 2]:
        optimizer.step()
"""


@pytest.mark.thorough
def test_an_update_by_one_of_two_optimizers_is_the_second_one(tmp_path):
    """It ends where the next forward pass begins: until then the other optimizer may follow."""
    answer = answered(tmp_path, program(tmp_path, ONE_RESTS))
    assert answer["program"]["updates"] == 2 and answer["program"]["outcome"] == "stopped"


CAPTURED = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batch = torch.randn(256, 1024, device="cuda")
def step():
    optimizer.zero_grad(set_to_none=True)
    model(batch).square().mean().backward()
    optimizer.step()
beside = torch.cuda.Stream()
with torch.cuda.stream(beside):
    for _ in range(3):
        step()
graph = torch.cuda.CUDAGraph()
optimizer.zero_grad(set_to_none=True)
with torch.cuda.graph(graph):
    step()
for _ in range(10**9):
    batch.copy_(torch.randn(256, 1024, device="cuda"))
    graph.replay()
"""


def test_a_step_that_is_captured_after_its_warm_up_is_in_the_answer(tmp_path):
    """As PyTorch's notes write it. Its warm-up lies beside the graph's pool, so the two do not share memory."""
    answer = answered(tmp_path, program(tmp_path, CAPTURED))
    assert (answer["program"]["outcome"], answer["program"]["updates"]) == ("stopped", 4)
    weights = 2 * 1024 * 4096 * 4
    assert (
        answer["trace"]["peak_reserved_bytes"] > 4 * weights
    )  # weights, and gradients in two pools with what is kept


@pytest.mark.thorough
def test_what_programs_ask_a_card_is_answered(tmp_path):
    answer = answered(tmp_path, str(PROGRAMS / "asks.py"))
    assert answer["program"]["updates"] == 2 and answer["evaluation"] is None
    assert answer["trace"]["components_by_phase"]["optimizer"]["optimizer_states"] == 4 * (
        512 * 513
    )


@pytest.mark.thorough
def test_one_of_several_processes(tmp_path):
    answer = answered(tmp_path, "--gpus", "4", str(PROGRAMS / "ranks.py"), fresh=True)
    weights = 4 * (1024 * 1024 + 1024)
    assert answer["gpus"] == 4 and answer["trace"]["components"]["collective_buffers"] >= weights
    assert answer["trace"]["components"]["weights_fp32"] == weights


@pytest.mark.thorough
def test_a_module_is_started_by_its_name_and_hears_its_words(tmp_path):
    package = tmp_path / "training"
    package.mkdir()
    (package / "__init__.py").write_text("")
    text = (PROGRAMS / "loop.py").read_text()
    (package / "main.py").write_text("import sys\nassert sys.argv[1:] == ['--depth', '4']\n" + text)
    answer = answered(tmp_path, "-m", "training.main", "--depth", "4")
    assert answer["program"]["arguments"] == ["--depth", "4"] and answer["program"]["updates"] == 2


def test_what_it_writes_is_listed_and_does_not_stay(tmp_path):
    (tmp_path / "settings.txt").write_text("3")
    text = "assert open('settings.txt').read() == '3'\nopen('log.txt', 'w').write('hello')\n"
    name = program(tmp_path, text + (PROGRAMS / "loop.py").read_text())
    assert (
        answered(tmp_path, name)["program"]["written"] == ["log.txt"]
        and not (tmp_path / "log.txt").exists()
    )
    assert answered(tmp_path, "--in-place", name)["program"]["written"] == ["log.txt"]
    assert (tmp_path / "log.txt").read_text() == "hello"


@pytest.mark.thorough
def test_every_card_is_judged(tmp_path):
    answer = answered(tmp_path, "--all-gpus", str(PROGRAMS / "loop.py"))
    assert (
        all(row["fits"] for row in answer["all_gpus"])
        and answer["gpu"] is None
        and answer["fits"] is None
    )


def test_the_answer_in_words(tmp_path):
    done = asked(tmp_path, "--yes", "--gpu", "24GiB", str(PROGRAMS / "loop.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FITS: the program needs")
    for words in (
        "stopped after 2 updates",
        "by phase",
        "the peak is made at",
        "--answer",
        "evaluation",
    ):
        assert words in done.stdout
    assert "0 1.000 1.000" in done.stderr  # what the program prints goes to standard error


# --- libraries -----------------------------------------------------------------------------------------------------

LORA = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("NAME", dtype=torch.bfloat16)
print("on the host:", model.device)
model = get_peft_model(model.to("cuda"), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
for _ in range(5):
    ids = torch.randint(0, 1000, (1, 64)).cuda()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.nightly
def test_a_model_larger_than_the_memory_it_may_use_here(tmp_path):
    """Qwen2.5-Coder-7B has 15.2 GB of weights in bf16; its configuration is in the catalogue."""
    name = program(tmp_path, LORA.replace("NAME", "Qwen/Qwen2.5-Coder-7B-Instruct"))
    answer = answered(tmp_path, "--memory", "4GiB", name, fresh=True)
    assert answer["trace"]["components"]["weights_bf16"] == 2 * 7_615_616_512
    assert answer["host"]["peak_bytes"] < 4 * 2**30 and answer["program"]["made_up"]["weights"]
    assert any("not at hand" in warning for warning in answer["warnings"])


@pytest.mark.thorough
def test_a_model_that_is_neither_here_nor_known(tmp_path):
    told = refused(tmp_path, program(tmp_path, LORA.replace("NAME", "nobody/an-unknown-model")))
    assert "network" in told and "program.py:5" in told and "--network" in told


SHARDED = """
import os, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cuda", (int(os.environ["WORLD_SIZE"]),))
model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(4)])
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(5):
    model(torch.randn(16, 1024, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.thorough
def test_a_sharded_model_comes_from_the_host(tmp_path):
    answer = answered(tmp_path, "--gpus", "4", program(tmp_path, SHARDED))
    own = answer["trace"]["components_by_phase"]["optimizer"]
    assert own["optimizer_states"] == 2 * 4 * (4 * 1024 * 1024) // 4


QLORA = """
import torch
from torch import nn
import bitsandbytes as bnb
layer = bnb.nn.Linear4bit(1024, 1024, compute_dtype=torch.bfloat16, quant_type="nf4")
model = nn.Sequential(layer, nn.Linear(1024, 1024)).cuda()
optimizer = bnb.optim.AdamW8bit(model.parameters())
for _ in range(5):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(torch.randn(8, 1024, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.thorough
def test_bitsandbytes_quantizes_on_the_card(tmp_path):
    answer = answered(tmp_path, program(tmp_path, QLORA), fresh=True)
    components = answer["trace"]["components"]
    assert components["weights_4bit"] == 1024 * 1024 // 2
    assert components["optimizer_states"] < 2.2 * (1024 * 1024 + 1024)


TOKENS = """
import numpy as np, torch
from torch import nn
model = nn.Sequential(nn.Embedding(5000, 64), nn.Linear(64, 5000)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(5):
    data = np.memmap("data/train.bin", dtype=np.uint16, mode="r")
    at = torch.randint(len(data) - 64, (4,))
    ids = torch.stack([torch.from_numpy(data[i : i + 64].astype(np.int64)) for i in at]).cuda()
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.thorough
def test_data_that_is_not_at_hand_is_made_up_where_somebody_asks_for_it(tmp_path):
    name = program(tmp_path, TOKENS)
    assert "--batch 8x1024" in refused(tmp_path, name)
    answer = answered(tmp_path, "--batch", "4x64", name)
    assert answer["program"]["made_up"]["data"][0] == "data/train.bin"
    assert (
        answer["trace"]["components_by_phase"]["backward"]["logits_and_loss"] >= 4 * 4 * 64 * 5000
    )


STREAMED = """
import datasets, torch
rows = datasets.load_dataset("nobody/an-unknown-text", split="train", streaming=True)
assert isinstance(rows, datasets.IterableDataset) and len(next(iter(rows))["text"]) > 64
weight = torch.nn.Parameter(torch.zeros(8, device="cuda"))
optimizer = torch.optim.SGD([weight])
for _ in range(3):
    weight.sum().backward()
    optimizer.step()
"""


@pytest.mark.thorough
def test_a_data_set_that_is_streamed_is_made_up_too(tmp_path):
    answer = answered(tmp_path, "--batch", "4x64", program(tmp_path, STREAMED))
    assert answer["program"]["made_up"]["data"] == ["nobody/an-unknown-text (text)"]
    missing = STREAMED.replace("import datasets", "open('tokenizer.json')\nimport datasets")
    told = refused(tmp_path, "--batch", "4x64", program(tmp_path, missing))
    assert "the missing file at that path" in told and "--batch" not in told


@pytest.mark.thorough
def test_what_follows_the_updates_that_were_asked_for_does_not_matter(tmp_path):
    name = program(
        tmp_path,
        (PROGRAMS / "loop.py").read_text().replace("    model.eval()", "    raise ValueError"),
    )
    assert answered(tmp_path, "--steps", "1", name)["program"]["updates"] == 1
    assert "ValueError" in refused(tmp_path, name)


# --- what is refused, and in which words ---------------------------------------------------------------------------

REFUSED = {
    "import jax": ("written for JAX", "program.py:1"),
    "import a_package_that_is_not_there": ("a_package_that_is_not_there", "dryfit installed in it"),
    "raise ImportError('\\n  install torchao')": (
        "not installed here: install torchao.",
        "program.py:1",
    ),
    "import os\nos._exit(7)": ("ended with status 7 before its answer", "stands above"),
    "print('nothing to train')": ("no optimizer of PyTorch's took a step", "torch.optim.Optimizer"),
    "import numpy as np\nnp.memmap('data/train.bin', mode='r')": (
        "data is not at hand",
        "--batch 8x1024",
    ),
    "import socket\nsocket.create_connection(('192.0.2.1', 80), 3)": ("network", "program.py:2"),
    "held = bytearray(2**36)": ("this machine's memory", "--memory"),
    "import torch\ntorch.zeros(2**34)": ("this machine's memory", "--memory"),
    "with open('x', 'wb') as file:\n    file.truncate(2**36)": ("larger file", "--file-size"),
    "import torch\nx = torch.randn(9, device='cuda')\nprint(x[x > 0].shape)": (
        "chooses by values",
        "program.py:3",
    ),
    "import torch.multiprocessing as m\nm.spawn(print, nprocs=8)": ("8 processes", "--gpus 8"),
    "import os\nprint(os.environ['HF_TOKEN'])": ("needs a token", "program.py:2", "--network"),
    "print 'hello'": ("not Python",),
    "import datasets\ndatasets.load_dataset('nobody/a-data-set')": (
        "not at hand",
        "dryfit run --batch 8x512 --yes program.py",
    ),
    # Localhost stays, and a kernel that is not known runs.
    "import socket\nserver = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(server.getsockname())": (
        "no optimizer of PyTorch's took a step",
    ),
    "import torch\n@torch.library.custom_op('mine::kernel', mutates_args=(), device_types='cuda')\n"
    "def kernel(x: torch.Tensor) -> torch.Tensor:\n    raise RuntimeError('there is no GPU')\n"
    "kernel(torch.ones(3, device='cuda'))": ("there is no GPU",),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("text", REFUSED)
def test_programs_without_an_answer(tmp_path, text):
    told = refused(tmp_path, program(tmp_path, text))
    for words in REFUSED[text]:
        assert words in told, told


@pytest.mark.thorough
def test_a_program_that_never_steps(tmp_path):
    told = refused(
        tmp_path,
        "--seconds",
        "12",
        program(tmp_path, "import time\nwhile True:\n    time.sleep(0.1)\n"),
    )
    assert (
        "no update of an optimizer within 12 seconds" in told
        and "program.py:3" in told
        and "--seconds 48" in told
    )


@pytest.mark.thorough
def test_a_value_that_decides_can_be_answered(tmp_path):
    text = (
        (PROGRAMS / "loop.py")
        .read_text()
        .replace(
            "if loss.item() < best:", "if loss.item() > best:\n        raise ValueError\n    else:"
        )
    )
    name = program(tmp_path, text)
    assert answered(tmp_path, name)["program"]["updates"] == 2
    line = text.splitlines().index("    if loss.item() > best:") + 1
    assert "ValueError" in refused(tmp_path, "--answer", f"program.py:{line}=11", name)


# --- before it runs ------------------------------------------------------------------------------------------------


def test_it_asks_once_before_a_program_runs(tmp_path):
    name = str(PROGRAMS / "loop.py")
    done = asked(tmp_path, name)
    assert (
        done.returncode == 2
        and "did not run before" in done.stderr
        and f"--yes {name}" in done.stderr
    )
    assert "took all its steps" not in done.stderr
    answered(tmp_path, name)
    assert asked(tmp_path, "--json", name).returncode == 0


WRONG = {
    ("nothing.py",): "There is no such program.",
    ("--gpus", "0", "program.py"): "--gpus is a whole number from 1 on.",
    ("--batch", "eight", "program.py"): "--batch 8x1024",
    ("--answer", "57", "program.py"): "--answer train.py:57=0.5",
    ("--memory", "much", "program.py"): "--memory 16GiB",
    ("--gpu", "rtx-9999", "program.py"): "rtx-9999",
}


@pytest.mark.few(3)
@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_line(tmp_path, words):
    program(tmp_path, "print()")
    assert WRONG[words] in refused(tmp_path, *words)


@pytest.mark.thorough
def test_a_program_that_makes_a_model_of_transformers_itself(tmp_path):
    """Transformers imports Dynamo when it makes the model, so after the card is there."""
    text = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = AutoConfig.for_model("qwen2", vocab_size=1000, **sizes)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
optimizer = torch.optim.AdamW(model.parameters())
while True:
    ids = torch.randint(0, 1000, (2, 64), device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
    done = asked(tmp_path, "--yes", program(tmp_path, text), fresh=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    phases = next(line for line in lines if "by phase" in line)
    places = [phases.index(word) for word in ("loading", "forward", "backward", "optimizer")]
    assert places == sorted(places)
    sizes = [
        float(line.split()[-2])
        for line in lines[lines.index("the same by module:") + 1 :]
        if line.endswith("B")
    ]
    assert sizes == sorted(sizes, reverse=True)


ELSEWHERE = """import os, sys
import torch

for path in sys.argv[1:]:
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.write(b"changed")
with open("/dev/null", "w") as file:
    file.write("nothing")
weight = torch.nn.Parameter(torch.zeros(8, device="cuda"))
optimizer = torch.optim.SGD([weight])
for _ in range(3):
    weight.sum().backward()
    optimizer.step()
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")
def test_a_program_writes_in_its_own_folder_alone(tmp_path):
    """Neither by a path that leads elsewhere nor through the link that stands for a large file."""
    from dryfit.program.confinement import is_possible, write_only_below

    if not is_possible(lambda: write_only_below([tmp_path])):
        pytest.skip("this kernel has no Landlock")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    large = inside / "large.bin"
    large.write_bytes(bytes(2**21))
    name = program(inside, ELSEWHERE)
    for path in (outside / "file", "large.bin"):
        told = refused(inside, name, str(path), fresh=path == "large.bin")
        assert (
            "writes in its own folder alone" in told
            and "program.py:5" in told
            and "--write" in told
        )
    assert large.read_bytes() == bytes(2**21) and not list(outside.iterdir())
    answer = answered(inside, "--write", str(outside), name, str(outside / "file"), "small.bin")
    assert (outside / "file").read_bytes() == b"changed"
    assert answer["program"]["written"] == ["small.bin"] and not answer["warnings"]
    assert "no such folder" in refused(inside, "--write", "missing", name).lower()


@pytest.mark.thorough
def test_a_model_of_vision_in_data_parallel(tmp_path):
    """``DataParallel`` asks tensors on which card they lie, and ``trunc_normal_`` draws until no value lies outside."""
    text = """
import torch
model = torch.nn.Linear(1024, 1024)  # on the host, where it stands for itself with one element
torch.nn.init.trunc_normal_(model.weight, std=0.02, a=-0.04, b=0.04)
model = torch.nn.DataParallel(model).cuda()
torch.nn.init.trunc_normal_(model.module.weight, std=1.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
while True:
    model(torch.randn(8, 1024, device="cuda")).sum().backward()
    optimizer.step()
"""
    weights = 4 * 1025 * 1024
    answer = answered(tmp_path, "--gpu", "t4", program(tmp_path, text))
    assert answer["trace"]["components"]["weights_fp32"] == weights
    assert answer["trace"]["phases"]["load"] > 3 * weights  # what it draws again lies beside
    said = refused(tmp_path, "--gpus", "2", program(tmp_path, text))
    assert "`DataParallel` copies the model to each GPU" in said and "dryfit run --gpus 1" in said


def test_an_update_by_hand_ends_where_the_gradients_are_forgotten(tmp_path):
    text = """
import torch
model = torch.nn.Linear(256, 256).cuda()
while True:
    for _ in range(3):
        model(torch.randn(8, 256, device="cuda")).sum().backward()
    for parameter in model.parameters():
        parameter.data.add_(parameter.grad, alpha=-0.1)
    model.zero_grad()
"""
    answer = answered(tmp_path, program(tmp_path, text))
    assert answer["program"]["updates"] == 2 and answer["program"]["outcome"] == "stopped"
    assert answer["trace"]["components_by_phase"]["backward"]["gradients"] == 4 * 257 * 256


@pytest.mark.thorough
def test_what_lies_beside_the_folder_is_found_and_not_written(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows").write_text("16")
    (tmp_path / "train").mkdir()
    loop = (PROGRAMS / "loop.py").read_text()
    text = f'open("../data/rows").read()\n{loop}'
    assert (
        answered(tmp_path / "train", program(tmp_path / "train", text))["program"]["updates"] == 2
    )
    said = refused(tmp_path / "train", program(tmp_path / "train", 'open("../data/rows", "w")'))
    assert "--write FOLDER" in said and (tmp_path / "data" / "rows").read_text() == "16"


@pytest.mark.thorough
def test_a_program_that_chooses_by_values_runs_with_the_share_that_is_chosen(tmp_path):
    text = """
import torch
router, expert = torch.nn.Linear(64, 4).cuda(), torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD([*router.parameters(), *expert.parameters()], lr=0.1)
while True:
    rows = torch.randn(4096, 64, device="cuda")
    mine = router(rows).argmax(-1) == 0
    chosen = mine.nonzero().flatten()
    assert chosen.shape == (1024,) and rows[mine].shape == (512, 64)
    assert rows.masked_select(mine[:, None]).shape == (2**16,)
    expert(rows[chosen]).sum().backward()
    optimizer.step()
"""
    said = refused(tmp_path, program(tmp_path, text))
    assert "chooses by values (aten::nonzero)" in said and "--answer program.py:8=0.25" in said
    shares = [
        f"--answer=program.py:{line}={share}" for line, share in ((8, 0.25), (9, 0.125), (10, 0.25))
    ]
    answer = answered(tmp_path, *shares, program(tmp_path, text))
    assert [read["value"] for read in answer["program"]["reads"] if read["decided"]] == [
        0.25,
        0.125,
        0.25,
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit(3)", "The program ended itself before its first update, with status 3."),
        (
            "import sys; sys.exit('no data')",
            "The program ended itself before its first update, with the words: no data.",
        ),
        ("count = 0\nassert count > 1", "The program failed: AssertionError: assert count > 1"),
        ("open('../nothing/here')", "No such file or directory: '../nothing/here'"),
    ],
)
def test_a_program_that_ends_early_says_why_in_its_own_words(tmp_path, text, said):
    told = refused(tmp_path, program(tmp_path, text))
    assert said in told and "runpy" not in told and "program/child.py" not in told
