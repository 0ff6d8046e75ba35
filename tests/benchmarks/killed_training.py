"""Kill a training in several processes at random, one of them or all, and give the command again: the same bits?

    python -m tests.benchmarks.killed_training --folder FOLDER --kills 10

Prints a line of JSON for each kill: what was killed and after which saved step, what the run said, where it resumed,
and whether adapter and curve are byte for byte those of a run that nobody disturbed. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.kills import say

STEPS = 60
STEP = {"gradient_checkpointing": False, "micro_batch": 2, "precision": "fp32", "sequence_length": 128}
ADAPTER = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"}
COMPARED = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "training.jsonl")


def train(folder: Path, run: Path, strategy: str, gpus: int, method: str) -> None:
    """What the rule does, on the small model of the unit tests."""
    from dryfit.common.errors import UserError
    from scripts.training import train
    from tests.unit.training.prepared import LOOP

    step = {**STEP, "method": method, "lora": ADAPTER, "parallel": {"strategy": strategy, "gpus": gpus}}
    loop = {**LOOP, "epochs": STEPS, "max_steps": STEPS, "save_every_steps": 4}
    names = ("encoded/train.parquet", "encoded/validation.parquet", "encoded/encode.json", "base/weights.json")
    inputs = dict(
        zip(("train", "validation", "encoded", "weights"), (str(folder / name) for name in names), strict=True)
    )
    outputs = {"adapter": run / COMPARED[0], "curve": run / "training.jsonl", "report": run / "training.json"}
    for path in outputs.values():  # as Snakemake does
        path.unlink(missing_ok=True)
    try:
        train.main(folder / "base", train.Settings(step, loop, 0, "code"), inputs, outputs, 1)
    except UserError as error:
        sys.exit(error.problem)


def start(arguments: argparse.Namespace, run: Path) -> subprocess.Popen:
    run.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.benchmarks.killed_training", "--folder", str(arguments.folder)]
    command += ["--strategy", arguments.strategy, "--method", arguments.method, "--gpus", str(arguments.gpus)]
    command += ["--run", str(run)]
    said = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=said, stderr=subprocess.PIPE, text=True, start_new_session=True)


def saved_steps(run: Path) -> int:
    curves = list(run.glob("checkpoints/*[0-9a-f]/curve.jsonl"))
    try:
        return sum(1 for _ in open(curves[0], "rb")) if curves else 0
    except OSError:  # just being replaced
        return 0


def ranks_of(job: int) -> dict[int, int]:
    """The processes that a job has started for its ranks, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes()) if parent == str(job) else None
        except OSError:  # it has ended
            continue
        if rank:
            found[int(rank[1])] = int(folder.name)
    return found


def killed(arguments: argparse.Namespace, number: int, draw: random.Random, expected: dict[str, bytes]) -> dict:
    run, victim = arguments.folder / f"killed-{number}", draw.choice([*range(arguments.gpus), None])
    after, wait = draw.randrange(STEPS - 4), draw.uniform(0, 0.5)
    process = start(arguments, run)
    while saved_steps(run) < after and process.poll() is None:
        time.sleep(0.01)
    while len(ranks := ranks_of(process.pid)) < arguments.gpus and process.poll() is None:
        time.sleep(0.05)
    time.sleep(wait)
    for pid in [process.pid, *ranks.values()] if victim is None else [ranks[victim]]:
        os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=600)
    ended = time.monotonic() - begun
    told = re.findall(r"^The process of rank.*$", errors, re.MULTILINE)
    again = start(arguments, run)
    _, errors = again.communicate(timeout=1200)
    if again.returncode:
        return {"kill": number, "failed": errors[-2000:]}
    same = all((run / name).read_bytes() == content for name, content in expected.items())
    return {
        "ended_seconds": round(ended, 1),
        "kill": number,
        "killed": "all" if victim is None else f"rank {victim}",
        "resumed_from_step": json.loads((run / "training.json").read_text())["resumed_from_step"],
        "same": same,
        "said": told,
        "status": process.returncode,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.killed_training", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the model and the runs go (some MB)")
    parser.add_argument("--kills", type=int, default=10, help="how many runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="decides what is killed, and when")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="fsdp2")
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--gpus", type=int, default=2, help="how many processes")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    if arguments.run is not None:
        train(arguments.folder, arguments.run, arguments.strategy, arguments.gpus, arguments.method)
        return 0
    from tests.unit.training.prepared import describe, encode, save_model

    if not (arguments.folder / "base").is_dir():
        describe(save_model(arguments.folder / "source"), arguments.folder / "base")
        encode(arguments.folder / "encoded")
    draw, whole = random.Random(arguments.seed), arguments.folder / "undisturbed"
    undisturbed = start(arguments, whole)
    if undisturbed.communicate() and undisturbed.returncode:
        sys.exit("the undisturbed run failed")
    expected = {name: (whole / name).read_bytes() for name in COMPARED}
    outcomes = []
    for number in range(arguments.kills):
        outcomes.append(killed(arguments, number, draw, expected))
        say(**outcomes[-1])
    same = sum(outcome.get("same", False) for outcome in outcomes)
    say(
        kills=len(outcomes), same=same, slowest_end_seconds=max(outcome.get("ended_seconds", 0) for outcome in outcomes)
    )
    return 0 if same == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
