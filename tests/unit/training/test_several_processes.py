"""Two processes on the CPU, connected by gloo, against one: the same curve, the same files; killed, they resume."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from multiprocessing import connection

import pytest
import safetensors.torch
import torch

from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_json
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace
from scripts.training import processes, train
from scripts.training import train_process as worker
from scripts.training.loop import Fit
from scripts.training.loop_state import LoopState
from tests.unit.training.prepared import LOOP, STEP, describe, encode, save_model

TWENTY = {**LOOP, "epochs": 7, "max_steps": 20, "save_every_steps": 7}
LORA = {**STEP, "method": "lora"}
LOADED = [
    *(
        "accelerate.utils.fsdp_utils",
        "peft",
        "torch._inductor",
        "transformers.models.llama.modeling_llama",
    ),
    *(
        "scripts.training.train_process",
        "dryfit.step.packing_self_test",
        "tests.unit.training.test_several_processes",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the rule reads: nine rows make steps of 4, 4 and 1, the last with a row for one of two processes alone."""
    folder = tmp_path_factory.mktemp("place")
    base = describe(save_model(folder / "source"), folder / "base")
    return {
        "base": base,
        "weights": str(base / "weights.json"),
        **encode(folder / "encoded", train=9),
    }


def run(place, folder, step, loop=TWENTY):
    """The rule; returns its report and its curve."""
    folder.mkdir(exist_ok=True)
    outputs = {
        "adapter": folder / "adapter" / "adapter_model.safetensors",
        "report": folder / "training.json",
        "curve": folder / "training.jsonl",
    }
    inputs = {name: place[name] for name in ("encoded", "train", "validation", "weights")}
    train.main(place["base"], train.Settings(step, loop, 0, "code"), inputs, outputs, 1)
    report = read_report(outputs["report"], outputs["adapter"], outputs["curve"])
    return report, [json.loads(line) for line in outputs["curve"].read_text().splitlines()]


def join(rank, size, port):
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
    }
    os.environ["WORLD_SIZE"] = str(size)


def work_as(rank, size, port, path):
    join(rank, size, port)
    with processes.started(path) as (work, group):
        worker.train(worker.TrainingJob(**work), group)


@pytest.fixture
def forked(monkeypatch, tmp_path):
    """Processes that begin with the modules loaded: ``accelerate launch`` takes ten seconds to get so far.

    Gives what they do, ``work``, and ``kill behind``: rank 1 is killed, once, when this folder has a checkpoint.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    orders = {"work": work_as}

    def launch(module, work, gpus, resumed):
        assert module == "scripts.training.train_process"
        write_json(tmp_path / "work.json", {**work, "folder": str(tmp_path)})
        (tmp_path / "messages").unlink(missing_ok=True)
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        arguments = [(rank, gpus, port, tmp_path / "work.json") for rank in range(gpus)]
        ranks = [context.Process(target=orders["work"], args=given) for given in arguments]
        for process in ranks:
            process.start()
        if folder := orders.pop("kill behind", None):
            wait_for_checkpoint(folder)
            ranks[1].kill()
        while any(process.exitcode is None for process in ranks):
            connection.wait([process.sentinel for process in ranks if process.exitcode is None])
            if any(process.exitcode for process in ranks):  # the others wait for it
                for process in ranks:
                    process.terminate()
                    process.join()
        ends = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode}
        if ends:
            raise processes._failure(tmp_path, ends, resumed)

    monkeypatch.setattr(train, "launch", launch)
    return orders


def wait_for_checkpoint(folder):
    while not [path for path in folder.glob("*/state.pt") if not path.parent.name.startswith(".")]:
        time.sleep(0.01)  # a hidden folder is a checkpoint that is still being written


def several(step, strategy="fsdp2", gpus=2, **mesh):
    return {**step, "parallel": {"strategy": strategy, "gpus": gpus, **mesh}}


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """One process with the whole step in one micro-batch, by method: report, curve, tensors of the adapter."""
    made = {}

    def of(method):
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            report, curve = run(place, folder, {**STEP, "method": method})
            made[method] = (
                report,
                curve,
                safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors"),
            )
        return made[method]

    return of


def assert_as_one(folder, ran, single):
    """Curve, validation loss and adapter of several processes are those of one."""
    (report, curve), (one, expected, adapter) = ran, single
    assert len(curve) == len(expected) == 20
    for row, other in zip(curve, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
        for key in ("rows", "answer_tokens", "tokens"):
            assert row[key] == other[key]
        assert row["computed_tokens"] == row["tokens"] + row["padding_tokens"]
    assert report["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
    assert report["effective_batch"] == one["effective_batch"] == 4
    written = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    assert written.keys() == adapter.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, adapter[name], rtol=1e-3, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("strategy", "method", "storage"),
    [
        ("ddp", "lora", None),
        ("fsdp2", "lora", None),
        ("fsdp2", "qlora", "uint8"),
        ("fsdp2", "qlora", "fp32"),
    ],
)
def test_two_processes_take_the_steps_of_one(
    place, tmp_path, forked, alone, strategy, method, storage
):
    """Two micro-batches a step in each; every third step leaves one process without a row.

    FSDP divides 4-bit weights that are stored in the dtype of the others, and leaves those of uint8 whole.
    """
    step = several(
        {**STEP, "method": method, "micro_batch": 1, "gradient_accumulation": 2}, strategy
    )
    if storage is not None:
        step["quantization"] = {"storage": storage}
    report, curve = run(place, tmp_path / "run", step)
    single, *_ = alone(method)
    assert curve[-1]["loss"] < 0.95 * curve[0]["loss"] and {row["rows"] for row in curve} == {4, 1}
    assert_as_one(tmp_path / "run", (report, curve), alone(method))
    assert set(report) == set(single) and set(report["sha256"]) == set(single["sha256"])
    assert report["sha256"]["adapter_config.json"] == single["sha256"]["adapter_config.json"]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


MESHES = {
    "tensor": ("none", 2, {"tensor": 2}, (2, 2)),
    "context": ("fsdp2", 2, {"context": 2}, (2, 2)),
    "fsdp2 x tensor": ("fsdp2", 4, {"tensor": 2}, (1, 2)),
    "replicate": ("fsdp2", 4, {"replicate": 2}, (1, 1)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_takes_the_steps_of_one_process(place, tmp_path, forked, alone, name):
    """GPUs of a tensor or context group take the same rows; every third step leaves a share of the rows empty.

    One process is killed behind the first checkpoint, and the run resumed from it.
    """
    strategy, gpus, mesh, (rows, batches) = MESHES[name]
    step = several(
        {**LORA, "micro_batch": rows, "gradient_accumulation": batches}, strategy, gpus, **mesh
    )
    forked["kill behind"] = tmp_path / "run" / "checkpoints"
    with pytest.raises(UserError, match=r"rank 1 died \(SIGKILL\)"):
        run(place, tmp_path / "run", step)
    report, curve = run(place, tmp_path / "run", step)
    assert report["resumed_from_step"] in (7, 14)
    assert_as_one(tmp_path / "run", (report, curve), alone("lora"))


def measure_as(rank, size, port, path):
    """The training's own step of full micro-batches, with the tracker beside it."""
    from dryfit.engine.trace import Options, measure_step
    from dryfit.step import step as taken
    from dryfit.step.batches import padded_length
    from dryfit.step.optimizers import build_optimizer
    from tests.dryfit.engine.pairs import gloo_as_nccl

    join(rank, size, port)
    clip = taken.clip_gradients

    def clip_later(*arguments):
        time.sleep(0.1)  # until gloo's thread has let go of its last buffer
        return clip(*arguments)

    with processes.started(path) as (work, group), gloo_as_nccl():
        job = worker.TrainingJob(**work)
        scenario = worker.Scenario.from_mapping(job.scenario)
        data = worker.TrainingRows.read(job, scenario)
        model, _ = worker._model(job, scenario, "small")
        optimizer = build_optimizer(model, scenario, largest_steps=False)
        fit = Fit(
            model,
            optimizer,
            data.rows,
            scenario,
            job.loop,
            job.seed,
            data.pad_token_id,
            LoopState(path, group),
        )
        longest = max(data.rows, key=lambda row: len(row.input_ids))
        share = [[[longest]] * scenario.micro_batch] * scenario.gradient_accumulation

        def step():
            fit._gradients(0, [share] * scenario.parallel.rows_at_once)
            fit._update(0)

        taken.clip_gradients = clip_later
        found = {"phases": measure_step(model, optimizer, step, options=Options()).phases}
        tokens = padded_length([len(longest.input_ids)], scenario.parallel.parts_of_a_row)
        write_json(path.with_name(f"measured-{rank}.json"), found | {"tokens": tokens})


@pytest.mark.few(0, 2)
@pytest.mark.parametrize("name", MESHES)
def test_the_trainings_own_step_takes_the_bytes_of_the_trace(place, tmp_path, forked, name):
    """Each rank, in every phase: the trace that the gate judges says what the loop's step takes.

    On a busy machine a process may hold a finished buffer for a moment, so the least of several runs counts.
    """
    strategy, gpus, mesh, _ = MESHES[name]
    step = several({**LORA, "gradient_accumulation": 2}, strategy, gpus, **mesh)
    forked["work"] = measure_as
    least, rows = {}, []
    for _ in range(4):
        with pytest.raises((UserError, FileNotFoundError)):  # no adapter is written
            run(place, tmp_path / "run", step)
        measured = [
            json.loads((tmp_path / f"measured-{rank}.json").read_text()) for rank in range(gpus)
        ]
        if not rows:
            scenario = {**step, "model": json.loads((place["base"] / "config.json").read_text())}
            scenario["sequence_length"] = measured[0]["tokens"]
            rows = trace(Scenario.from_mapping(scenario), "cpu", timeline=False)["ranks"]
        for number, row in enumerate(rows):
            held = [measured[rank]["phases"] for rank in row["ranks"]] + least.get(number, [])
            least[number] = [{phase: min(one[phase] for one in held) for phase in row["phases"]}]
        if [found for (found,) in least.values()] == [row["phases"] for row in rows]:
            return
    assert [found for (found,) in least.values()] == [row["phases"] for row in rows]


@pytest.mark.thorough
def test_each_process_packs_its_own_rows_behind_the_prefix(place, tmp_path, forked):
    packed = {
        **LORA,
        "packing": "shared_prefix",
        "micro_batch": 1,
        "sequence_length": 256,
        "loss": "chunked",
    }
    loop = {**TWENTY, "max_steps": 6, "rows_per_step": 4}
    report, curve = run(place, tmp_path / "two", several(packed, "ddp"), loop)
    _, single = run(place, tmp_path / "one", packed, loop)
    for row, other in zip(curve, single, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["shared_tokens"] == report["packing"]["prefix_tokens"] * (
            2 if row["rows"] == 4 else 0
        )
        assert other["shared_tokens"] == report["packing"]["prefix_tokens"] * (
            3 if row["rows"] == 4 else 0
        )
    assert report["packing"]["exactness"]["loss_difference"] < 1e-5


@pytest.mark.thorough
def test_a_killed_process_is_named_and_the_run_resumes_to_the_same_bits(
    place, tmp_path, forked, monkeypatch
):
    """By ``accelerate launch``, while another program holds the port that it would take by itself.

    Dropout's noise comes from random states, one a process, which the checkpoint holds.
    """
    noisy = several({**LORA, "lora": {**STEP["lora"], "dropout": 0.2}, "micro_batch": 2})
    run(place, tmp_path / "whole", noisy)
    quick = train.launch
    monkeypatch.setattr(train, "launch", processes.launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def kill():
        wait_for_checkpoint(tmp_path / "killed" / "checkpoints")
        for path in map(str, filter(str.isdigit, os.listdir("/proc"))):
            environment = read(f"/proc/{path}/environ")
            if b"\0RANK=1\0" in environment and str(tmp_path.name).encode() in read(
                f"/proc/{path}/cmdline"
            ):
                os.kill(int(path), signal.SIGKILL)

    def read(path):
        try:
            with open(path, "rb") as file:
                return b"\0" + file.read()
        except OSError:
            return b""

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(UserError, match=r"rank 1 died \(SIGKILL\)") as error:
            taken.bind(("localhost", 29500))
            taken.listen()
            run(place, tmp_path / "killed", noisy)
    assert "resumes from the last checkpoint" in str(error.value)
    monkeypatch.setattr(train, "launch", quick)
    report, _ = run(place, tmp_path / "killed", noisy)
    assert report["resumed_from_step"] in (7, 14)
    whole, resumed = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "killed")
    )
    assert whole == resumed
    assert (tmp_path / "whole" / "training.jsonl").read_bytes() == (
        tmp_path / "killed" / "training.jsonl"
    ).read_bytes()


@pytest.mark.thorough
def test_what_all_processes_refuse_is_said_once(place, tmp_path, forked):
    with pytest.raises(UserError) as error:
        run(
            place,
            tmp_path / "run",
            several({**LORA, "packing": "rows", "micro_batch": 1}, "ddp"),
            {**LOOP, "rows_per_step": 8},
        )
    assert error.value.problem.startswith("A step's rows need 2 micro-batches")
    assert error.value.write == "gradient_accumulation: 2"
