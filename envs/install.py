"""Makes a Python environment with the packages of a dependency group or an extra, at the versions of uv.lock.

    python3 envs/install.py .venv --group run
    python3 envs/install.py .venv-deepspeed --extra deepspeed --beside .venv
    python3 envs/install.py .venv --lock        # renews uv.lock

uv installs: the one on the PATH, else one that pip fetches into the environment. Without it pip installs, which takes
some minutes. PyTorch alone is not locked, since its build is the machine's affair (CPU, CUDA version). So what pip's
configuration says (an index, `find-links`, constraints) holds for uv too, which does not read it.

Needs the standard library alone: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# PyTorch, and what its wheels for CUDA bring. Where Triton is installed PyTorch takes other ways, so it is installed
# only where PyTorch's own build brings it, or where an extra names it.
MACHINE = ("torch==", "nvidia-", "cuda-", "triton")
# Options of pip's configuration, and what uv calls them.
PIP_OPTIONS = {
    "constraint": "--constraints",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "index-url": "--default-index",
}


class NotInstalled(Exception):
    """An installation that can't go on, with what to do."""


def create(place: Path, beside: Path | None) -> Path:
    """Make the environment where it is missing, and return its Python.

    With ``beside`` it also imports the packages of that environment, which it does not change.
    """
    if importlib.util.find_spec("venv") is None or (
        beside is None and importlib.util.find_spec("ensurepip") is None
    ):
        raise NotInstalled(
            f"{sys.executable} has no venv module. On Debian and Ubuntu: apt-get install python3-venv."
            " Or name another Python: make PYTHON=python3.12"
        )
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run(
            [sys.executable, "-m", "venv", *(["--without-pip"] if beside else []), place],
            check=True,
        )
    if beside:
        (_packages(python) / "project.pth").write_text(
            f"{_packages(beside / 'bin' / 'python')}\n", encoding="utf-8"
        )
    return python


def _packages(python: Path) -> Path:
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def find_uv(python: Path) -> str | None:
    """The path of uv, or None where it is neither there nor to be had."""
    beside = python.parent / "uv"
    found = shutil.which("uv") or (str(beside) if beside.exists() else None)
    if found:
        return found
    fetch = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"]
    done = subprocess.run(fetch, capture_output=True, text=True)
    return str(beside) if done.returncode == 0 and beside.exists() else None


def locked_lines(uv: str, *chosen: str) -> list[str]:
    """Requirement lines of a group or an extra by uv.lock: ``name==version ; marker``."""
    export = [
        uv,
        "export",
        "--locked",
        "--no-emit-project",
        "--no-hashes",
        "--no-header",
        "--no-annotate",
        "--quiet",
    ]
    done = subprocess.run([*export, *chosen], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise NotInstalled(
            f"uv.lock differs from what pyproject.toml asks for. Renew it: make lock\n{done.stderr.strip()}"
        )
    return done.stdout.splitlines()


def direct_lines(name: str, *, is_extra: bool) -> list[str]:
    """The lines that pyproject.toml itself has for a group or an extra, with those of the others that it includes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = []
    for line in (
        project["project"]["optional-dependencies"] if is_extra else project["dependency-groups"]
    )[name]:
        if isinstance(line, dict):
            found += direct_lines(line["include-group"], is_extra=False)
        elif line.startswith(f"{project['project']['name']}["):
            found += direct_lines(line.partition("[")[2].rstrip("]"), is_extra=True)
        else:
            found.append(line)
    return found


def constraints() -> list[str]:
    """What uv.lock has in one version for every machine: for pip, which reads no lock."""
    versions: dict[str, set[str]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]:
        if "registry" in package["source"] and not f"{package['name']}==".startswith(MACHINE):
            versions.setdefault(package["name"], set()).add(package["version"])
    return [
        f"{name}=={next(iter(found))}"
        for name, found in sorted(versions.items())
        if len(found) == 1
    ]


def pip_options(python: Path) -> list[str]:
    """uv's options for what pip's configuration of this machine says."""
    done = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True)
    said = {}
    for line in (
        done.stdout.splitlines()
    ):  # global.find-links='/a /b'; the environment's lines win, and come first
        key, _, value = line.partition("=")
        said.setdefault(key.rpartition(".")[2], value.strip("'"))
    options = [
        (option, value)
        for key, option in PIP_OPTIONS.items()
        for value in said.get(key, "").split()
    ]
    # pip takes the best version of all indexes, uv by default that of the first index which has the package.
    best = ["--index-strategy", "unsafe-best-match"] if said.get("extra-index-url") else []
    return [*best, *(part for pair in options for part in pair)]


def install(place: Path, name: str, *, is_extra: bool, beside: Path | None) -> None:
    """Install a group or an extra; with ``beside`` only what that environment lacks."""
    python = create(place, beside)
    whose = beside / "bin" / "python" if beside else python  # the one that has pip
    uv = find_uv(whose)
    chosen = ["--no-default-groups", "--extra", name] if is_extra else ["--only-group", name]
    direct = direct_lines(name, is_extra=is_extra)
    torch = [line for line in direct if line.startswith("torch>")]
    if uv:
        named = tuple(re.match(r"[\w.-]+", line)[0] for line in direct if line not in torch)
        lines = locked_lines(uv, *chosen)
        lines = [line for line in lines if not line.startswith(MACHINE) or line.startswith(named)]
        if beside:
            there = set(locked_lines(uv, "--only-group", "dev"))
            lines = [line for line in lines if line not in there]
        options = [*pip_options(whose), *(["--no-deps"] if beside else [])]
        command = [uv, "pip", "install", "--python", python, *options, "--requirements", "-"]
        text = "\n".join([*lines, *torch])
    else:
        print("uv is not to be had here: pip installs, which takes some minutes", file=sys.stderr)
        limits = python.parent.parent / "constraints.txt"
        limits.write_text("\n".join(constraints()), encoding="utf-8")
        command = [
            whose,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--disable-pip-version-check",
            "--quiet",
        ]
        command += ["--constraint", limits, "--requirement", "/dev/stdin"]
        text = "\n".join(direct)
    if subprocess.run(command, input=text, text=True, cwd=ROOT).returncode:
        raise NotInstalled(
            f"{place} is not complete. Mend what the lines above say, and run the same command again."
        )


def lock(place: Path) -> int:
    """Write uv.lock for pyproject.toml, with the versions that it has where they still serve."""
    uv = find_uv(create(place, None))
    if uv is None:
        raise NotInstalled("uv writes the lock, and is not to be had here: pip install uv")
    return subprocess.run([uv, "lock"], cwd=ROOT).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "place", type=Path, help="the environment's folder, made where it is missing"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--group", help="a group of pyproject.toml's dependency-groups")
    what.add_argument("--extra", help="an extra of the package")
    what.add_argument(
        "--lock", action="store_true", help="install nothing: write uv.lock anew for pyproject.toml"
    )
    parser.add_argument(
        "--beside", type=Path, help="an environment whose packages this one uses too"
    )
    options = parser.parse_args(arguments)
    try:
        if options.lock:
            return lock(options.place)
        install(
            options.place,
            options.group or options.extra,
            is_extra=bool(options.extra),
            beside=options.beside,
        )
    except NotInstalled as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
