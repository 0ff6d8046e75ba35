"""Records of modded-nanogpt run as they stand on a simulated H100, against the peak memory that their logs end with.

A record's log begins with the program that wrote it. This runs that program whole: eight GPUs, data loading, compiled
model, optimizers, validation. Only the number of updates is lowered, and the tokens of the data are made up. A package
with a C extension, such as FlashAttention-3, is stood in by what the engine knows of it.

    git clone https://github.com/KellerJordan/modded-nanogpt
    python -m validation.modded_nanogpt modded-nanogpt 2025-01-04_SoftCap      # traces
    python -m validation.modded_nanogpt --published modded-nanogpt 2025-01-04_SoftCap   # reads what its logs end with

    python -m validation.modded_nanogpt --draw modded-nanogpt                  # which ten were drawn unread
    python -m validation.modded_nanogpt --table                                # the rows that are kept

Nothing is fetched. The programs are other people's: each runs in a process and a folder of its own, without a GPU.
Needs the extra `run` (Linux). ``validation/data/compiled.csv`` keeps the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from validation.tables import markdown, rows_of

COMMIT = "f411b3d346aa52d3504324ca93c230fd84c6c07f"
GPUS = 8
# Records whose logs were read while this was developed; ten others were drawn from the folders' names alone.
OPENED = (
    "2024-12-10_MFUTweaks",
    "2024-12-17_SparsifyEmbeds",
    "2025-01-04_SoftCap",
    "2025-01-13_Fp8LmHead",
    "2025-01-16_Sub3Min",
    "2025-01-26_BatchSize",
)
TO_ITS_END = 10**9  # updates: the last validation is part of a record's peak
SEED, DRAWN = 33, 10
ROWS = Path(__file__).parent / "data" / "compiled.csv"
UPDATES = 3  # the second is like all that follow; then comes the last validation
_HEADING = re.compile(r"^-{40}\n# (\w+\.py)\n-{40}\n", re.MULTILINE)
# A later program has a schedule of stages (batches, windows), and goes on after it: each stage gets an even and an odd
# update, which some of its optimizers leave out.
_UPDATES = {
    re.compile(rf"\b{name}(?:\s*:\s*int)?\s*=\s*\d+"): count
    for name, count in {
        "num_iterations": UPDATES,
        "num_scheduled_iterations": 6,
        "num_extension_iterations": 2,
    }.items()
}
_DATA = re.compile(r"\bdata/(fineweb\w*)/fineweb_train_")
_PEAK = re.compile(r"peak memory (?:consumption|allocated): (\d+) MiB(?: reserved: (\d+) MiB)?")

# The format of its data files: `_load_data_shard` of the programs.
_MAGIC, _VERSION, _HEADER = 20240520, 1, 256
_END_OF_TEXT, _TOKENS, _SHARDS = 50256, 40_000_000, 2


class Checkout:
    """A checkout of the repository, read at :data:`COMMIT` whatever is checked out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self._folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def records(self) -> list[str]:
        """The folders of both tracks with GPT-2's sizes, by name."""
        tracks = "records/track_1_short/", "records/track_2_medium/"
        return sorted(self._git("ls-tree", "--name-only", COMMIT, *tracks).split())

    def find(self, name: str) -> str:
        """A record's folder by its last part."""
        return next(folder for folder in self.records() if folder.endswith(f"/{name}"))

    def drawn(self) -> list[str]:
        """Ten records that nobody had opened, in the order in which they were drawn."""
        closed = [folder for folder in self.records() if not folder.endswith(OPENED)]
        return random.Random(SEED).sample(closed, DRAWN)

    def _logs(self, record: str) -> list[str]:
        names = self._git("ls-tree", "-r", "--name-only", COMMIT, f"{record}/").splitlines()
        return sorted(name for name in names if name.endswith((".txt", ".log")))

    def source(self, record: str) -> str | None:
        """The program at the head of the first log that has one, or None; nothing below it is read."""
        for name in self._logs(record):
            head, end, _ = self._git("show", f"{COMMIT}:{name}").partition("\n" + "=" * 100)
            if end and "import" in head:
                return head
        return None

    def published(self, record: str) -> list[tuple[int, int | None]]:
        """MiB allocated and reserved as each log says them in its last line."""
        found = [
            _PEAK.findall(self._git("show", f"{COMMIT}:{name}")) for name in self._logs(record)
        ]
        return [
            (int(each[-1][0]), int(each[-1][1]) if each[-1][1] else None) for each in found if each
        ]


def write_tokens(folder: Path) -> None:
    """Files of tokens as the programs read them: texts of 200 to 2,000 tokens, each behind its mark."""
    folder.mkdir(parents=True)
    chosen = np.random.default_rng(0)
    for name in [f"train_{number:06d}" for number in range(1, _SHARDS + 1)] + ["val_000000"]:
        tokens = chosen.integers(0, _END_OF_TEXT, _TOKENS, dtype=np.uint16)
        tokens[np.cumsum(chosen.integers(200, 2000, _TOKENS // 2000))] = _END_OF_TEXT
        tokens[0] = _END_OF_TEXT
        header = np.zeros(_HEADER, dtype=np.int32)
        header[:3] = _MAGIC, _VERSION, _TOKENS
        with open(folder / f"fineweb_{name}.bin", "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.tobytes())


def files_of(source: str) -> dict[str, str]:
    """A log's program by files: later logs have the kernels' file behind the program, under a heading."""
    program, *more = _HEADING.split(source)
    return {"train_gpt.py": program, **dict(zip(more[::2], more[1::2], strict=True))}


def shortened(source: str) -> str:
    """A program with few updates; all the rest as it stands."""
    for line, count in _UPDATES.items():
        source = line.sub(lambda found, count=count: re.sub(r"\d+$", str(count), found[0]), source)
    return source


def run_program(path: Path) -> dict[str, Any]:
    """Run a program to its end on the simulated GPUs; what it takes of the first, in MiB."""
    from dryfit.program.child import run
    from dryfit.program.request import ProgramRequest

    trace = run(
        ProgramRequest(str(path), gpus=GPUS, torchrun=True, gpu="h100-80gb", steps=TO_ITS_END)
    )["trace"]
    return {
        "allocated_mib": trace["peak_allocated_bytes"] / 2**20,
        "allocated_range_mib": [
            each and each / 2**20 for each in trace.get("peak_allocated_range_bytes", ())
        ],
        "reserved_mib": trace["peak_reserved_bytes"] / 2**20,
        "phases_mib": {name: count / 2**20 for name, count in trace["phases"].items()},
        "compiled": trace.get("compiled"),
        "triton_kernels": trace.get("triton_kernels"),
        "warnings": trace.get("warnings", []),
    }


def run_beside_its_files(source: str, module: str, *words: str) -> subprocess.CompletedProcess:
    """Run ``module --program PROGRAM WORDS`` in a folder that has a log's program, its other files and its data."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train_gpt.py")
        for name, text in files_of(source).items():
            Path(folder, name).write_text(shortened(text), encoding="utf-8")
        write_tokens(Path(folder, "data", *_DATA.findall(source)[:1]))
        Path(folder, "logs").mkdir()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-m", module, "--program", str(path), *words]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )


def trace_record(checkout: Checkout, record: str) -> dict[str, Any]:
    """Trace a record in a process of its own; ``refused`` says why there are no figures."""
    source = checkout.source(record)
    if source is None:
        return {"refused": "its folder has no log with a Python program"}
    done = run_beside_its_files(source, "validation.modded_nanogpt")
    if done.returncode:
        told = [
            line
            for line in done.stderr.splitlines()
            if "can't be traced:" in line or "Error:" in line
        ]
        reason = (
            told[-1].partition("can't be traced: ")[2] or told[-1]
            if told
            else "no error was printed"
        )
        return {"refused": reason[:300], "error": done.stderr[-6000:]}
    return json.loads(done.stdout.splitlines()[-1])


def table() -> str:
    """The kept rows as Markdown: what was traced beside what was published."""
    rows = []
    for row in rows_of(ROWS):
        cells = [row["id"], row["known"]]
        if row["refused"]:
            cells += [row["refused"], "not read", "", "", ""]
        else:
            traced, published = row["traced_allocated_mib"], row["published_allocated_mib"]
            cells += [_number(traced), _number(published)]
            reserved = row["traced_reserved_mib"], row["published_reserved_mib"]
            compared = (traced, published) if published else reserved
            cells.append(f"{100 * (float(compared[0]) / float(compared[1]) - 1):+.3f} %")
            cells += map(_number, reserved)
        rows.append(cells)
    columns = (
        "step",
        "rows",
        "traced, allocated, MiB:",
        "published:",
        ":",
        "traced, reserved, MiB:",
        "published:",
    )
    return markdown(columns, rows)


def _number(text: str) -> str:
    return f"{float(text):,.1f}".removesuffix(".0") if text else ""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", type=Path, help="of KellerJordan/modded-nanogpt")
    parser.add_argument(
        "records", nargs="*", help="the last part of a folder's name, such as 2025-01-04_SoftCap"
    )
    parser.add_argument(
        "--published", action="store_true", help="read the peaks of the logs; trace nothing"
    )
    parser.add_argument("--program", type=Path, help="run one program here")
    parser.add_argument("--draw", action="store_true", help="name the ten records that were drawn")
    parser.add_argument("--table", action="store_true", help="print the rows that are kept")
    asked = parser.parse_args()
    if asked.table:
        print(table())
        return
    if asked.program:
        print(json.dumps(run_program(asked.program)))
        return
    if asked.checkout is None:
        parser.error("name a checkout: git clone https://github.com/KellerJordan/modded-nanogpt")
    checkout = Checkout(asked.checkout)
    if asked.draw:
        print("\n".join(checkout.drawn()))
    for name in asked.records:
        record = checkout.find(name)
        print(
            name,
            json.dumps(
                checkout.published(record) if asked.published else trace_record(checkout, record)
            ),
        )


if __name__ == "__main__":
    main()
