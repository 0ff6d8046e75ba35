"""Time and memory of this project's merge and of PEFT's, in alternation, on the same folders.

    python -m tests.benchmarks.synthetic_checkpoint --config config/models/qwen2.5-coder-7b.json --output DIR
    python -m tests.benchmarks.compare_merges --folder DIR --rounds 2

Each merge is a process of its own. Its memory is the largest RssAnon seen in /proc: pages that belong to it alone.
The page cache, which the kernel gives back whenever someone needs it, is not counted. This project's merge also
computes digests of what it read and wrote and waits until all of it is on the disk; PEFT's does neither.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import write_json
from dryfit.common.terminal import command, log

# What PEFT's documentation shows, with the base read and written in its own dtype.
PEFT_MERGE = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(output)
"""


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process now; 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run a process to its end; its seconds, and its peak of anonymous memory, looked at every 20 ms."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if status:
        raise UserError("A merge failed.", found=" ".join(arguments)[:200])
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_anonymous_bytes": peak,
        "wall_seconds": time.monotonic() - started,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compare_merges", description=__doc__)
    parser.add_argument("--folder", required=True, type=Path, metavar="DIR", help="with base/ and adapter/")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("ours", "peft"))
    parser.add_argument("--keep", action="store_true", help="keep this project's last merged folder")
    parser.add_argument("--report", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    base, adapter, output = (str(arguments.folder / name) for name in ("base", "adapter", "merged"))
    commands = {
        "ours": [
            sys.executable,
            "-m",
            "scripts.merging.merge",
            "--base",
            base,
            "--adapter",
            adapter,
            "--output",
            output,
        ],
        "peft": [sys.executable, "-W", "ignore", "-c", PEFT_MERGE, base, adapter, output],
    }
    runs: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        # The order turns round each time, so that neither always finds the other's page cache.
        names = [name for name in ("peft", "ours") if arguments.only in (None, name)]
        for name in names if number % 2 == 0 else reversed(names):
            shutil.rmtree(output, ignore_errors=True)
            runs.append({"merge": name, **measure(commands[name])})
            log.info("%s", json.dumps(runs[-1]))
    if not arguments.keep:
        shutil.rmtree(output, ignore_errors=True)
    size = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    print(f"checkpoint {size / 1e9:.2f} GB\n\n{'merge':6} {'seconds':>8} {'of CPU':>8} {'MB/s':>6} {'peak, GB':>9}")
    for run in runs:
        seconds = run["wall_seconds"]
        print(
            f"{run['merge']:6} {seconds:8.1f} {run['cpu_seconds']:8.1f} {size / seconds / 1e6:6.0f} "
            f"{run['peak_anonymous_bytes'] / 1e9:9.2f}"
        )
    if arguments.report:
        write_json(arguments.report, {"checkpoint_bytes": size, "runs": runs})
    return 0


if __name__ == "__main__":
    command(main)
