"""Rows a second in training, form by form, on a run's own base model and rows; TRL's SFTTrainer beside them.

    python -m tests.benchmarks.training --results results --trl /path/to/a/venv/with/trl/bin/python

Each form trains on the same rows in a process of its own, with one thread, in turn; what is counted is that process's
CPU time in the training loop, so that another process on the machine does not decide. Steps are the default run's, of 8
rows: packed up to 384 tokens, or padded in two batches of 4. ``fixed`` pads every row to 512 tokens, as recipes with
``padding="max_length"`` do, and is given a quarter of the rows. TRL packs rows up to 512 tokens, each with its own
prefix, one pack a step. TRL wants an environment of its own: trl==1.16.0 with the versions of uv.lock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

FORMS = ("shared_prefix", "rows", "padded", "trl", "fixed")
ROWS_PER_STEP, FIXED_TOKENS, PACK_TOKENS = 8, 512, 384  # PACK_TOKENS hold the rows of a step


def find(results: Path, model: str, dataset: str) -> tuple[Path, Path]:
    """Folder of the base model, and the encoded training rows."""
    encoded = sorted((results / "dataset" / dataset / "encoded").glob(f"{model}-*/train.parquet"))
    return results / "models" / model / "weights", encoded[0]


def ours(form: str, base: Path, encoded: Path, count: int) -> dict:
    """Train on the first rows with the project's own loop."""
    import torch

    from dryfit.scenario.scenario import Scenario
    from dryfit.step.batches import IGNORED, Row, read_rows
    from dryfit.step.model import build_model
    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.packing import common_prefix
    from scripts.common.job import keep_host_memory
    from scripts.training.loop import Fit
    from scripts.training.loop_state import LoopState

    torch.set_num_threads(1)
    keep_host_memory()
    rows = read_rows(str(encoded))[:count]
    step = {
        "packing": "none",
        "micro_batch": 4,
        "gradient_accumulation": ROWS_PER_STEP // 4,
        "sequence_length": 512,
    }
    if form == "fixed":
        rows = [
            Row(
                row.input_ids + [0] * (gap := FIXED_TOKENS - len(row.input_ids)),
                row.labels + [IGNORED] * gap,
            )
            for row in rows
        ]
    elif form != "padded":
        step = {
            "packing": form,
            "micro_batch": 1,
            "gradient_accumulation": 2,
            "sequence_length": PACK_TOKENS,
        }
    scenario = Scenario.from_mapping(
        {
            "model": str(base / "config.json"),
            "method": "qlora",
            "precision": "fp32",
            "gradient_checkpointing": False,
            "loss": "chunked",
            **step,
        }
    )
    loop = {
        "epochs": 1,
        "max_steps": None,
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.05,
        "decay_ratio": 0.2,
        "max_grad_norm": 1.0,
        "validate_every_steps": None,
        "keep": "last",
        "average_ratio": 0.33,
        "early_stopping_patience": None,
    }
    loop |= {
        "rows_per_step": ROWS_PER_STEP if scenario.packing != "none" else None,
        "save_every_steps": 10**9,
    }
    model = build_model(scenario, "cpu", weights=base)
    optimizer = build_optimizer(model, scenario, learning_rate=2e-3)

    class Nowhere(LoopState):
        def save(self, *state: object) -> None:
            pass

    prefix = common_prefix(rows) if form == "shared_prefix" else 0
    started = time.process_time()
    fitted = Fit(
        model, optimizer, rows, scenario, loop, 0, 0, Nowhere(Path("nowhere")), prefix
    ).run()
    seconds = time.process_time() - started
    return {
        "computed_tokens": sum(row["computed_tokens"] for row in fitted.curve),
        "cpu_seconds": seconds,
        "rows": count,
    }


def trl(base: Path, encoded: Path, count: int) -> dict:
    """Train on the same rows with TRL's SFTTrainer and its packing; in an environment that has it."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    columns = pq.read_table(encoded).slice(0, count).to_pydict()
    masks = [[int(label != -100) for label in labels] for labels in columns["labels"]]
    rows = Dataset.from_dict({"input_ids": columns["input_ids"], "completion_mask": masks})
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=quantization,
        dtype=torch.float32,
        device_map="cpu",
        trust_remote_code=False,
    )
    times = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            times["begin"] = time.process_time()

        def on_train_end(self, *args: object, **kwargs: object) -> None:
            times["end"] = time.process_time()

    settings = SFTConfig(
        output_dir="/tmp/trl-benchmark",
        packing=True,
        packing_strategy="bfd",
        max_length=FIXED_TOKENS,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=2e-3,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        completion_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": False},
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        args=settings,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base, trust_remote_code=False),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    return {"computed_tokens": tokens, "cpu_seconds": times["end"] - times["begin"], "rows": count}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--trl", help="a Python with TRL")
    parser.add_argument("--one", choices=FORMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    base, encoded = find(given.results, given.model, given.dataset)
    if given.one:
        measured = (
            trl(base, encoded, given.rows)
            if given.one == "trl"
            else ours(given.one, base, encoded, given.rows)
        )
        print(json.dumps(measured))
        return
    found: dict[str, list[dict]] = {form: [] for form in given.forms if form != "trl" or given.trl}
    for _ in range(given.repetitions):
        for form, runs in found.items():
            rows = (
                max(ROWS_PER_STEP, given.rows // 4) if form == "fixed" else given.rows
            )  # it is slow
            command = [
                given.trl if form == "trl" else sys.executable,
                "-m",
                "tests.benchmarks.training",
                "--one",
                form,
            ]
            command += [
                "--results",
                given.results,
                "--model",
                given.model,
                "--dataset",
                given.dataset,
            ]
            done = subprocess.run(
                [*map(str, command), "--rows", str(rows)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(form, runs[-1], file=sys.stderr, flush=True)
    print(
        "| form | computed tokens a row | CPU seconds a row (lowest to highest) | rows a CPU second | faster by |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    seconds = {
        form: [run["cpu_seconds"] / run["rows"] for run in runs] for form, runs in found.items()
    }
    means = {form: statistics.mean(values) for form, values in seconds.items()}
    for form, values in seconds.items():
        tokens = found[form][0]["computed_tokens"] / found[form][0]["rows"]
        faster = f"{means[form] / means['shared_prefix']:.2f}" if "shared_prefix" in means else ""
        between = f"{means[form]:.3f} ({min(values):.3f} to {max(values):.3f})"
        print(f"| {form} | {tokens:.1f} | {between} | {1 / means[form]:.2f} | {faster} |")


if __name__ == "__main__":
    main()
