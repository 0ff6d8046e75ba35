"""The chain as most users run it: ``snakemake --use-conda`` from a Snakemake that has nothing else beside it.

Each Python process of a job is asked on its way out which interpreter it was and where its modules came
from. Asking from outside is needed: Snakemake puts its own packages at the end of a script's path, so that
one missing from an environment file may be found there in silence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.common.code_digests import imported_packages
from tests.conda.offline_conda import CondaSetup, Unavailable, conda_setup
from tests.end_to_end import chain
from tests.unit.test_environments import requirements, rules

CACHE = chain.ROOT / ".conda-test"
# Written into each environment as a .pth file, which Python runs when it starts.
WITNESS = """\
import atexit, json, os, sys
def tell(folder=os.environ.get("WITNESS_FOLDER")):
    if folder:
        files = {name: getattr(module, "__file__", None) for name, module in sorted(sys.modules.items())}
        told = {"arguments": sys.argv, "prefix": sys.prefix, "executable": sys.executable, "modules": files}
        with open(os.path.join(folder, f"{os.getpid()}.json"), "w") as file:
            json.dump(told, file)
atexit.register(tell)
"""


@dataclass(frozen=True)
class Finished:
    """A run of the chain under conda.

    Attributes
    ----------
    folder
        Where it ran.
    output
        What Snakemake said.
    python
        The interpreter of the bare Snakemake.
    setup
        The conda used.
    witnesses
        What each Python process of the environments told at its end.
    """

    folder: Path
    output: str
    python: Path
    setup: CondaSetup
    witnesses: list[dict]


def bare_snakemake(folder: Path) -> Path:
    """A virtual environment with the pinned Snakemake and what it brings; returns its interpreter."""
    python, built = folder / "bin" / "python", folder / "built-from"
    identity = f"{sys.version} {requirements()['snakemake']}"
    if not built.is_file() or built.read_text(encoding="utf-8") != identity:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, requirements()["snakemake"]], check=True)
        built.write_text(identity, encoding="utf-8")
    return python


def plant_witnesses(environments: Path) -> None:
    """Make each conda environment's Python tell what it was."""
    for environment in environments.iterdir():
        for site_packages in environment.glob("lib/python3.*/site-packages"):
            (site_packages / "witness.py").write_text(WITNESS, encoding="utf-8")
            (site_packages / "witness.pth").write_text("import witness\n", encoding="utf-8")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:  # this module's own, not the session's
    """The environments created, if they are not there from an earlier session, and the chain run in them."""
    try:
        setup = conda_setup(CACHE)
    except Unavailable as reason:
        pytest.skip(str(reason))
    python = bare_snakemake(setup.environments.parent / "snakemake")
    folder, told = (
        chain.checkout(tmp_path_factory.mktemp("conda")),
        tmp_path_factory.mktemp("witnesses"),
    )
    use_conda = ["--use-conda", "--conda-prefix", setup.environments]
    run = {"python": python, "environ": {**setup.environ, "WITNESS_FOLDER": str(told)}}
    created = chain.snakemake(folder, *use_conda, "--conda-create-envs-only", **run)
    plant_witnesses(setup.environments)
    output = chain.finished(folder, *use_conda, **run)
    witnesses = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(told.iterdir())]
    return Finished(folder, created + output, python, setup, witnesses)


def environment_made_from(file: Path, environments: Path) -> Path:
    """Snakemake keeps a copy of each environment's file beside the environment."""
    (copy,) = [
        path for path in environments.glob("*.yaml") if path.read_bytes() == file.read_bytes()
    ]
    return copy.with_suffix("")


def test_snakemake_has_nothing_beside_it(finished: Finished) -> None:
    listed = subprocess.run(
        [finished.python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True
    )
    there = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert there.isdisjoint(
        {"torch", "transformers", "peft", "datasets", "pandas", "matplotlib", "tree-sitter"}
    )


def test_each_job_ran_in_its_environment(finished: Finished) -> None:
    """The interpreter is the environment's, and so is every package that the rule's code imports."""
    ran = chain.finished_rules(finished.output)
    for rule, (file, script) in rules().items():
        if rule not in ran:  # of another configuration
            continue
        environment = environment_made_from(file, finished.setup.environments)
        told = [
            one for one in finished.witnesses if one["arguments"][0].endswith(f".{script.name}")
        ]
        told = [one for one in told if Path(one["prefix"]).samefile(environment)]
        assert told, f"{rule} did not run in {environment}"
        for one in told:
            assert Path(one["executable"]).is_relative_to(one["prefix"])
            for package in imported_packages(script) & one["modules"].keys():
                place = one["modules"][package]
                assert place is None or Path(place).is_relative_to(one["prefix"]), (
                    f"{rule}: {package} is {place}"
                )


def test_the_heavy_packages_were_used_and_came_from_the_environment(finished: Finished) -> None:
    seen: dict[str, set[str]] = {}
    for one in finished.witnesses:
        for package in (
            "torch",
            "transformers",
            "peft",
            "bitsandbytes",
            "safetensors",
            "pandas",
            "jinja2",
        ):
            if place := one["modules"].get(package):
                seen.setdefault(package, set()).add(place)
    assert {"torch", "transformers", "peft", "bitsandbytes", "safetensors", "jinja2"} <= seen.keys()
    home = finished.setup.environments.resolve()
    assert all(
        Path(place).resolve().is_relative_to(home) for places in seen.values() for place in places
    )


def test_no_process_ran_outside(finished: Finished) -> None:
    home = finished.setup.environments.resolve()
    assert finished.witnesses
    assert all(Path(one["prefix"]).resolve().is_relative_to(home) for one in finished.witnesses)
    for path in (finished.folder / "logs").rglob("*.log"):
        line = next(
            line for line in path.read_text(encoding="utf-8").splitlines() if ": python " in line
        )
        assert Path(line.split("(")[-1].rstrip(")")).resolve().is_relative_to(home), (
            f"{path}: {line}"
        )


@pytest.mark.parametrize("conda", [True, False], ids=["on", "off"])
def test_switching_conda_reruns_nothing(finished: Finished, conda: bool) -> None:
    arguments = ["--use-conda", "--conda-prefix", finished.setup.environments] if conda else []
    said = chain.snakemake(
        finished.folder,
        "--dry-run",
        *arguments,
        python=finished.python,
        environ=finished.setup.environ,
    )
    assert chain.NOTHING in said


def test_a_conda_on_path_that_reaches_its_channel_is_used(
    finished: Finished, tmp_path, monkeypatch
) -> None:
    for name, value in finished.setup.environ.items():
        monkeypatch.setenv(name, value)
    found = conda_setup(tmp_path)
    assert found.origin == "found" and found.environ == dict(os.environ)
