"""Host memory of two processes that build a model and divide it: run by test_check_resources.py as a program.

python -m tests.unit.gate.gloo_hosts FOLDER
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

from dryfit.scenario.scenario import Scenario

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 8192}
CASES = [
    ("fp32", "lora", "fsdp2"),  # the files' dtype: their pages, which all share
    ("bf16", "lora", "fsdp2"),
    ("fp32", "qlora", "fsdp2"),
    ("fp32", "lora", "ddp"),
    ("bf16", "lora", "tensor"),
]


def scenario(model: dict, precision: str, method: str, strategy: str, gpus: int = 2) -> Scenario:
    """A short step, so that weights are most of it."""
    fields = {"model": model, "precision": precision, "method": method, "sequence_length": 8}
    way = {"strategy": "none", "tensor": gpus} if strategy == "tensor" else {"strategy": strategy}
    return Scenario.from_mapping({**fields, "parallel": {**way, "gpus": gpus}})


def llama(**sizes: int) -> dict:
    """The configuration of a Llama."""
    fixed = {
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    return {**fixed, "tie_word_embeddings": False, **sizes}


def own_bytes() -> int:
    """Memory of this process that no file could bring back."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous"))


def peak_resident_bytes() -> int:
    """Most that lay in memory of this process so far, pages of files included."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def take_step(
    rank: int, folder: Path, name: str, case: tuple[str, str, str], models: dict[str, dict]
) -> None:
    """Builds each model, divides it between two ranks and takes a step; writes this rank's bytes beside the models."""
    from torch import distributed as dist

    from dryfit.step.model import build_model
    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.parallel import parallelize
    from dryfit.step.step import random_step

    store = dist.FileStore(str(folder / f"store-{name}"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    found = {}
    for size, model in models.items():  # the small one touches what Python needs
        step = scenario(model, *case)
        before = own_bytes()
        whole = build_model(step, "cpu", weights=folder / size)
        found["built"] = own_bytes() - before
        whole = parallelize(whole, step, "cpu")
        found["divided"] = own_bytes() - before
        random_step(
            whole, build_optimizer(whole, step, learning_rate=1e-4), step, "cpu", max_grad_norm=1.0
        )()
        found["process"] = own_bytes()
        found[f"peak of the {size}"] = peak_resident_bytes()
    (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def start(work: Callable[[], None]) -> int:
    """The number of a fresh process, a copy of this one, that does this work and prints what stops it."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path) -> int:
    import peft  # noqa: F401  # before the processes are forked: each would take two seconds for it
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dryfit.step import model, optimizers, parallel, step  # noqa: F401  # as peft

    torch.set_num_threads(1)
    models = {
        "small": llama(
            **SIZES | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        )
    }
    models["large"] = llama(**SIZES)
    for size, configuration in models.items():
        config = AutoConfig.for_model(**configuration)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / size)
    measured = []
    for number, case in enumerate(CASES):
        for attempt in range(
            2
        ):  # a pair ended with status 1 once, in CI, and never in 51 runs that looked for it
            name = f"{number}-{attempt}"
            ranks = [
                start(partial(take_step, rank, folder, name, case, models)) for rank in range(2)
            ]
            ended = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
            if not any(ended):
                measured.append(
                    [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]
                )
                break
            print(f"{case}: the two processes ended with {ended}", file=sys.stderr, flush=True)
        else:
            return 1
    (folder / "measured.json").write_text(json.dumps(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
