"""Run the whole default chain with the tiny configuration in a checkout of its own, and read what it left."""

import csv
import json
import os
import re
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dryfit.common.files import write_report
from scripts.common import code_digests
from tests.warm import launchers

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = ROOT / "config" / "test.yaml"
SETTINGS = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
RUN = f"results/{SETTINGS['run']['name']}-r{SETTINGS['lora']['rank']}"
NOTHING = "Nothing to be done"
# What traces and plans cost grows with the layers; one is enough of the models whose memory is profiled.
PROFILED, LAYERS = ("qwen2.5-coder-0.5b", "qwen2.5-coder-7b"), 1
GGUF = "results/models/smollm2-135m-instruct/source/model.gguf"
TRAINED_LAYERS = 1  # of the 30 of the model that is trained


@cache
def parsed_modules() -> str:
    """What a Snakemake that has run here before knows of the modules: to parse them takes longer than a plan."""
    houses = (ROOT / "scripts", ROOT / "dryfit")
    sources = {str(path): path.read_bytes() for house in houses for path in house.rglob("*.py")}
    return json.dumps(
        {
            code_digests.content_key(text): code_digests.parse(text.decode("utf-8"), path)
            for path, text in sources.items()
        }
    )


def checkout(folder: Path) -> Path:
    """Copy the project's files, without results, into an empty folder; a test may edit them there.

    The models of the memory profile have :data:`LAYERS` layers there, however many they have in truth.
    """
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "Snakefile", folder)
    for name in (
        "rules",
        "scripts",
        "dryfit",
        "validation",
        "config",
        "envs",
        "profiles",
        "tests/config",
    ):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in PROFILED:
        path = folder / "config" / "models" / f"{name}.json"
        shallow = json.loads(path.read_text(encoding="utf-8")) | {"num_hidden_layers": LAYERS}
        path.write_text(json.dumps(shallow), encoding="utf-8")
    (folder / code_digests.STORE).parent.mkdir()
    (folder / code_digests.STORE).write_text(parsed_modules(), encoding="utf-8")
    return folder


def linked(project: Path, folder: Path) -> Path:
    """A copy of a checkout at the price of its names: its files may be replaced there, never written into."""
    return shutil.copytree(project, folder, symlinks=True, copy_function=os.link)


def snakemake(
    project: Path,
    *arguments: str | Path,
    python: Path | str | None = None,
    environ: dict[str, str] | None = None,
) -> str:
    """Run the tiny configuration in a checkout; returns all that Snakemake said. Fails with it when it fails.

    With the Python that is named; else Snakemake and its jobs are forked from a server that has imported the packages.
    """
    command = [
        python or Path(launchers(environ), "python"),
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--configfile",
        CONFIGURATION.relative_to(ROOT),
    ]
    done = subprocess.run(
        [str(part) for part in (*command, *arguments)],
        cwd=project,
        env=environ or os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"snakemake failed in {project}:\n{done.stdout[-20000:]}"
    return done.stdout


def finished(project: Path, *arguments: str | Path, **run: Any) -> str:
    """Run the whole chain on the first :data:`TRAINED_LAYERS` layers of its model; returns what Snakemake said.

    The arguments and ``run`` are those of :func:`snakemake`.
    """
    said = snakemake(project, *arguments, "--", GGUF, **run)
    cut(project / GGUF)
    snakemake(project, *arguments, "--touch", "--forceall", "--", GGUF, **run)
    return said + snakemake(project, *arguments, **run)


def cut(gguf: Path) -> None:
    """Let a GGUF file say that it has fewer layers; whoever reads it passes over the others."""
    key = b"llama.block_count" + struct.pack("<I", 4)  # an unsigned integer of four bytes follows
    before, after = gguf.read_bytes().split(key)
    gguf.write_bytes(before + key + struct.pack("<I", TRAINED_LAYERS) + after[4:])
    write_report(gguf.with_name("source.json"), {}, gguf, gguf.with_name("LICENSE"))


def finished_rules(output: str) -> set[str]:
    """The rules whose jobs Snakemake says it finished."""
    return set(re.findall(r"^Finished jobid: \d+ \(Rule: (\w+)\)$", output, re.MULTILINE)) - {"all"}


def summary(folder: Path) -> list[dict[str, str]]:
    """Every output file of the chain: its path (``output_file``), its ``rule``, its job's ``log-file(s)``."""
    table = re.search(
        r"^output_file\t.*\Z", snakemake(folder, "--summary"), re.MULTILINE | re.DOTALL
    )
    return list(csv.DictReader(table[0].splitlines(), delimiter="\t"))


def read(folder: Path, path: str) -> Any:
    """A JSON file below the run's folder."""
    return json.loads((folder / RUN / path).read_text(encoding="utf-8"))
