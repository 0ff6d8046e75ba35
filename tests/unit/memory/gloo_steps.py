"""Steps on several CPUs, measured: run by test_several_gpus.py as a program of its own, one process for each.

python -m tests.unit.memory.gloo_steps RANK FOLDER
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

STEPS = [("lora", "fsdp2"), ("full", "fsdp2"), ("lora", "ddp"), ("full", "ddp")]


def main(folder: Path) -> int:
    import torch
    from torch import distributed as dist

    from scripts.memory.core.trace import measure_step
    from scripts.memory.trace import labels
    from scripts.training import step as taken
    from scripts.training.model import build_model, build_optimizer
    from scripts.training.parallel import parallelize
    from scripts.training.step import random_step
    from tests.unit.memory.several_gpus import scenario

    clip = taken.clip_gradients

    def clip_later(*arguments: object) -> object:
        time.sleep(0.1)  # until gloo's thread has let go of its last buffer
        return clip(*arguments)

    taken.clip_gradients = clip_later
    torch.set_num_threads(1)
    child = os.fork()  # the libraries are loaded once; no thread has been started yet
    rank = 0 if child else 1
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    measured = []
    for method, strategy in STEPS:
        step = scenario(method, strategy)
        model = build_model(step, "cpu")
        label, begin, one_step = labels(model), None, None
        if strategy == "ddp":
            optimizer = build_optimizer(model, step, learning_rate=1e-4)

            def begin(model=model, optimizer=optimizer, step=step):
                wrapped = parallelize(model, step, "cpu")
                time.sleep(0.1)
                return random_step(wrapped, optimizer, step, "cpu", max_grad_norm=1.0)

        else:
            model = parallelize(model, step, "cpu")
            optimizer = build_optimizer(model, step, learning_rate=1e-4)
            one_step = random_step(model, optimizer, step, "cpu", max_grad_norm=1.0)
        report = measure_step(model, optimizer, one_step, label=label, begin=begin)
        measured.append({"phases": report.phases, "resident_bytes": report.resident_bytes})
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
