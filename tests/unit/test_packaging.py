"""What the project is handed on with: container file, locked versions, profiles, workflow catalog."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dryfit.common.versions import VERSION
from envs import install
from envs.install import direct_lines

ROOT = Path(__file__).resolve().parents[2]


def pins(group: str) -> dict[str, str]:
    found = map(Requirement, direct_lines(group, is_extra=False))
    return {canonicalize_name(item.name): str(item.specifier) for item in found}


def test_the_lock_is_that_of_pyproject() -> None:
    """What uv writes down of the project itself, compared without uv. `make lock` renews it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    (own,) = (package for package in packages if package["name"] == project["project"]["name"])
    locked = {canonicalize_name(package["name"]): package.get("version") for package in packages}
    for group in project["dependency-groups"]:
        direct = {Requirement(line).name for line in direct_lines(group, is_extra=False)}
        written = own["metadata"]["requires-dev"][group]
        assert {canonicalize_name(name) for name in direct} == {
            entry["name"] for entry in written
        }, group
    extras = [
        line
        for name in project["project"]["optional-dependencies"]
        for line in direct_lines(name, is_extra=True)
    ]
    for line in [*extras, *direct_lines("dev", is_extra=False)]:
        assert locked[canonicalize_name(Requirement(line).name)] in Requirement(line).specifier, (
            line
        )


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("", []),
        ("global.find-links='/a /b'", ["--find-links", "/a", "--find-links", "/b"]),
        (
            ":env:.index-url='https://x/simple'\nglobal.index-url='https://y'",
            ["--default-index", "https://x/simple"],
        ),
        (
            "global.extra-index-url='https://x/cpu'\nglobal.constraint='/c.txt'",
            [
                "--index-strategy",
                "unsafe-best-match",
                "--constraints",
                "/c.txt",
                "--index",
                "https://x/cpu",
            ],
        ),
    ],
)
def test_uv_is_told_what_pip_is_configured_with(
    tmp_path: Path, config: str, options: list[str]
) -> None:
    python = tmp_path / "python"  # `python -m pip config list`
    python.write_text(f"#!/bin/sh\ncat <<'END'\n{config}\nEND\n")
    python.chmod(0o755)
    assert install.pip_options(python) == options


def test_without_uv_pip_is_held_to_the_locked_versions() -> None:
    limits = install.constraints()
    assert "tokenizers==" in " ".join(limits) and len(limits) > 100
    assert not [line for line in limits if line.startswith(("torch==", "triton", "nvidia"))]


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_python_without_venv_is_named_at_once(
    tmp_path: Path,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else there(name)
    )
    assert install.main([str(tmp_path / "new"), "--group", "run"]) == 1
    assert (
        "apt-get install python3-venv" in capsys.readouterr().err
        and not (tmp_path / "new").exists()
    )


def test_the_image_copies_what_is_there_and_installs_what_is_locked() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()
    ]
    assert "uv.lock" in copied
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name in copied:
        assert (ROOT / name).is_file() and f"!{name}" in ignored
    assert "python envs/install.py /opt/venv --group run" in text
    python = re.search(r"^FROM python:3\.(\d+)", text, re.MULTILINE)[1]
    assert int(python) >= 11


def test_profiles_rerun_by_the_same_rules() -> None:
    def read(name: str) -> dict:
        return yaml.safe_load(
            (ROOT / "profiles" / name / "config.yaml").read_text(encoding="utf-8")
        )

    default, other = read("default"), read("slurm")
    for key in ("rerun-triggers", "rerun-incomplete", "show-failed-logs"):
        assert other[key] == default[key]
    assert other["executor"] == "slurm"


def test_the_catalog_entry_says_how_it_is_used() -> None:
    """What the catalog's generator asks (snakemake/snakemake-workflow-catalog, scripts/generate-catalog.py)."""
    assert not (ROOT / "workflow").exists()  # else it looks for workflow/Snakefile
    assert (ROOT / "Snakefile").is_file() and (ROOT / "config" / "README.md").is_file()
    assert all(path.suffix == ".smk" for path in (ROOT / "rules").iterdir() if path.is_file())
    readme = (ROOT / "README.md").read_text(encoding="utf-8").lower()
    assert "snakemake" in readme and "workflow" in readme  # by these words it finds repositories
    entry = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text(encoding="utf-8"))
    assert entry["usage"]["software-stack-deployment"]["conda"] is True
    assert entry["usage"]["report"] is True


@pytest.mark.thorough
def test_the_wheel_answers_beside_a_project_with_folders_of_the_same_names(tmp_path: Path) -> None:
    """Built as `pip wheel .` builds it, and asked in a project that has its own `scripts/` and `config/`."""
    source, wheels, place, project = (
        tmp_path / name for name in ("source", "wheels", "installed", "project")
    )
    names = ["dryfit", "pyproject.toml", "LICENSE"]
    files = subprocess.run(
        ["git", "ls-files", *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        wheels,
        source,
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("dryfit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        entry = next(name for name in held if name.endswith("entry_points.txt"))
        assert "dryfit = dryfit.ask.command:run" in archive.read(entry).decode()
        archive.extractall(place)
    assert {name.partition("/")[0] for name in held if ".dist-info" not in name} == {"dryfit"}
    wanted = {name for name in files.stdout.split() if name.startswith("dryfit/")}
    wanted.remove("dryfit/engine/pyproject.toml")  # of the engine's own wheel
    assert wanted <= held, sorted(wanted - held)[:5]
    for folder in ("scripts", "config"):
        (project / folder).mkdir(parents=True)
        (project / folder / "__init__.py").write_text("raise ImportError('of another project')")
    program = (
        "import sys, dryfit\n"
        "answer = dryfit.fit('Qwen/Qwen3-8B', gpu='4090', quick=True)\n"
        "assert answer.fits and 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(project), str(place)])}
    for arguments in (
        ["-c", program],
        ["-m", "dryfit.ask", "Qwen/Qwen3-8B", "--gpu", "4090", "--quick"],
    ):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_the_public_names_are_there_and_typed() -> None:
    import dryfit

    stub = (ROOT / "dryfit" / "__init__.pyi").read_text(encoding="utf-8")
    where = {name: module for module, name in re.findall(r"from ([\w.]+) import (\w+) as \2", stub)}
    assert where == {name: f"dryfit.{module}" for name, module in dryfit._WHERE.items()}
    for name in set(dryfit.__all__) - {
        "MeasureSteps",
        "StopIfItWontFit",
        "WontFit",
    }:  # these load transformers
        assert getattr(dryfit, name) is not None


def test_what_the_package_needs_allows_what_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins("run")
    for line in [*project["dependencies"], *direct_lines("trace", is_extra=True)]:
        needed = Requirement(line)
        pin = pinned[canonicalize_name(needed.name)]
        assert needed.name == "torch" or pin.removeprefix("==") in needed.specifier, line


def test_the_recipe_of_conda_forge_needs_what_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    recipe = yaml.safe_load((ROOT / "conda-recipe" / "recipe.yaml").read_text(encoding="utf-8"))
    names = {"pytorch": "torch"}
    needs = recipe["requirements"]
    lines = [line.partition(" ") for line in [*needs["run"], *needs["run_constraints"]]]
    needed = {canonicalize_name(names.get(name, name)): limits.strip() for name, _, limits in lines}
    assert needed.pop("python") == project["requires-python"]
    required = [*project["dependencies"], *project["optional-dependencies"]["trace"]]
    wanted = {canonicalize_name(one.name): one.specifier for one in map(Requirement, required)}
    assert {name: Requirement(f"x{limits}").specifier for name, limits in needed.items()} == wanted
    assert recipe["context"]["version"] == VERSION and recipe["package"]["name"] == project["name"]
    entry = [f"{name} = {target}" for name, target in project["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == entry


def test_pixi_has_the_versions_of_the_group() -> None:
    made = tomllib.loads((ROOT / "pixi.toml").read_text(encoding="utf-8"))
    found = {
        canonicalize_name(name): Requirement(f"x{limits}").specifier
        for name, limits in made["pypi-dependencies"].items()
    }
    assert found == {
        name: Requirement(f"x{limits}").specifier for name, limits in pins("run").items()
    }


def test_a_release_is_published_without_a_token_and_by_its_own_tag() -> None:
    release = yaml.safe_load(
        (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    )
    jobs = release["jobs"]
    assert (
        jobs["publish"]["permissions"] == {"id-token": "write"}
        and jobs["publish"]["environment"] == "pypi"
    )
    assert jobs["publish"]["if"] == "github.ref_type == 'tag'" and jobs["publish"]["needs"] == "try"
    assert "password" not in str(jobs["publish"]) and release["permissions"] == {"contents": "read"}
    for job in jobs.values():  # what a tag is called is never part of a script
        assert not any("${{" in step.get("run", "") for step in job["steps"])
    assert re.search(
        rf"^version: {re.escape(VERSION)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE
    )
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_image_of_the_library_copies_what_the_wheel_needs() -> None:
    text = (ROOT / "Dockerfile.dryfit").read_text(encoding="utf-8")
    kept = (ROOT / "Dockerfile.dryfit.dockerignore").read_text(encoding="utf-8").split()
    copied = [
        name
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
        for name in line.split()
    ]
    assert set(copied) == {"pyproject.toml", "LICENSE", "dryfit"}
    assert {f"!{name}" for name in copied} <= set(kept)
    assert re.search(r'^ENTRYPOINT \["dryfit"\]$', text, re.MULTILINE) and re.search(
        r"^USER ", text, re.MULTILINE
    )


def test_what_is_named_for_others_is_there() -> None:
    text = (ROOT / "llms.txt").read_text(encoding="utf-8")
    assert text.startswith("# ") and "\n> " in text
    assert all((ROOT / link).is_file() for link in re.findall(r"\]\(([^)]+)\)", text))
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert (
        re.search(r'-P -m scripts\.ask "\$\$@"\\n', recipe) and "chmod +x $(BIN)/dryfit" in recipe
    )
