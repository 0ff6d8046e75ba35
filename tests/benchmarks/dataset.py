"""Time and memory of the dataset's steps on generated pairs, each step in a process of its own.

    python -m tests.benchmarks.dataset --pairs 20000 100000 [--model results/models/smollm2-135m-instruct]

Prints a table: wall seconds, processor seconds (of all threads and child processes), the peak resident memory, and
how much of it is above that of the same step on 100 pairs (what the interpreter and the libraries take is no matter
of the input's size). Without ``--model`` encoding is left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dryfit.common.terminal import command
from tests.task_parts import shell

STEPS = ("acquire", "clean", "screen", "split", "check", "encode")


def run_step(step: str, folder: Path, pairs: int, model: str | None) -> None:
    """Do one step as its rule does, in this process."""
    import types

    def paths(*names: str, **files: str) -> dict[str, str]:
        files |= {name: f"{name}.json" for name in names}
        return {name: str(folder / file) for name, file in files.items()}

    splits = paths(**{name: f"{name}.jsonl" for name in ("train", "validation", "test")})
    if step == "acquire":
        from scripts.dataset import acquire

        outputs = paths(
            pairs="raw.jsonl", external="external.jsonl", rejected="raw.rejected.jsonl", report="acquire.json"
        )
        source = {"type": "embedded", "license": "Apache-2.0", "seed": 42, "pairs": pairs}
        acquire.main(shell("sources"), [source], [], types.SimpleNamespace(**outputs))
    elif step == "clean":
        from scripts.dataset import clean

        outputs = paths(pairs="clean.jsonl", rejected="clean.rejected.jsonl", report="clean.json")
        clean.main(shell("cleaning"), paths("acquire", pairs="raw.jsonl"), outputs, {"near_duplicates": 0.9})
    elif step == "screen":
        from scripts.dataset import screen_dataset

        outputs = paths(pairs="safe.jsonl", rejected="safe.rejected.jsonl", report="screen.json")
        screen_dataset.main(shell("screening"), paths("clean", pairs="clean.jsonl"), outputs)
    elif step == "split":
        from scripts.dataset import split

        inputs = paths("screen", "acquire", pairs="safe.jsonl", external="external.jsonl")
        outputs = splits | paths(rejected="split.rejected.jsonl", report="split.json")
        split.main(shell("splitting"), inputs, outputs, {"train": 0.8, "validation": 0.1, "test": 0.1, "seed": 42})
    elif step == "check":
        from scripts.dataset import check_splits

        inputs = paths("acquire", "clean", "screen", "split", safe="safe.jsonl", rejected="split.rejected.jsonl")
        check_splits.main(shell("splitting"), splits | inputs, str(folder / "check.json"))
    else:
        from scripts.dataset import encode

        outputs = paths(**{name: f"{name}.parquet" for name in splits})
        outputs |= paths(rejected="encode.rejected.jsonl", report="encode.json")
        inputs = (
            splits | paths("split", "check") | {name: f"{model}/{name}.json" for name in ("description", "tokenizer")}
        )
        encode.main(inputs, outputs, "Answer with one safe Bash command and nothing else.", "drop", 128)


def measure(step: str, folder: Path, pairs: int, model: str | None) -> tuple[float, float, int]:
    """Wall seconds, processor seconds and peak resident bytes of a step in a process of its own."""
    script = (
        "import json, resource, sys, time\n"
        "started = time.monotonic()\n"
        "from pathlib import Path\n"
        "from tests.benchmarks.dataset import run_step\n"
        "step, folder, pairs, model = json.loads(sys.argv[1])\n"
        "run_step(step, Path(folder), pairs, model)\n"
        "own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "used = own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime\n"
        "print(json.dumps([time.monotonic() - started, used, 1024 * own.ru_maxrss]))\n"
    )
    arguments = json.dumps([step, str(folder), pairs, model])
    done = subprocess.run([sys.executable, "-c", script, arguments], check=True, stdout=subprocess.PIPE, text=True)
    seconds, processor_seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, processor_seconds, peak


def main() -> None:
    """Print one table for each number of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--model", help="a folder with a tokenizer")
    options = parser.parse_args()
    steps = STEPS if options.model else STEPS[:-1]
    idle: dict[str, int] = {}
    for pairs in (100, *options.pairs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = []
            for step in steps:
                seconds, processor_seconds, peak = measure(step, folder, pairs, options.model)
                idle.setdefault(step, peak)
                rows.append((step, seconds, processor_seconds, peak / 2**20, (peak - idle[step]) / 2**20))
            size = (folder / "raw.jsonl").stat().st_size / 2**20
        if pairs == 100:
            continue
        print(f"\n{pairs} pairs, {size:.1f} MiB:\n\n| step | seconds | processor seconds | peak MiB | MiB above idle |")
        print("| --- | --- | --- | --- | --- |")
        rows.append(
            ("all", *(sum(row[at] for row in rows) for at in (1, 2)), *(max(row[at] for row in rows) for at in (3, 4)))
        )
        for step, seconds, processor_seconds, peak, grown in rows:
            print(f"| {step} | {seconds:.2f} | {processor_seconds:.2f} | {peak:.0f} | {grown:.1f} |", flush=True)


if __name__ == "__main__":
    command(main)
