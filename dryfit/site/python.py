"""What the calculator runs on: Pyodide as npm has it, and the project's own modules with what they import."""

import base64
import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from modulefinder import ModuleFinder
from pathlib import Path

from dryfit.common.errors import UserError
from dryfit.common.files import atomic_open
from dryfit.data import data_path

VERSION = "314.0.7"
INTEGRITY = "sha512-0YvXxEhfEdpLfb/XkM2BFAeMROq0iMUX2bzzH9pOttyMcWkwq+HbE5uyuGD82LN7y2q+SNvi/6V5JEsOlD2R1A=="
PYODIDE = (
    "pyodide.mjs",
    "pyodide.asm.mjs",
    "pyodide.asm.wasm",
    "python_stdlib.zip",
    "pyodide-lock.json",
)
# Pure Python, as it is installed here; dryfit/data/site/rpds.py stands in for the one that is compiled.
PACKAGES = ("attr", "attrs", "jsonschema", "jsonschema_specifications", "referencing", "yaml")
ROOT = (
    Path(__file__).resolve().parents[2]
)  # of the repository: the site is built there, with its documents
DATA = ("*.csv", "*.yaml", "models/*", "readers/*")
NOT_ASKED = (
    "program_calls.yaml",
    "writers.yaml",
)  # programs are not read there, and no tool's file is written
_TIME = (
    1980,
    1,
    1,
    0,
    0,
    0,
)  # of every member of an archive, so that equal files are equal archives


def pyodide(cache: Path) -> dict[str, bytes]:
    """Pyodide's files by name, from npm's registry or the archive kept from the last time.

    The registry is npm's own setting, ``NPM_CONFIG_REGISTRY`` in the environment, or else the public one.

    UserError: if the archive can't be fetched, or is another than the pinned one.
    """
    archive = cache / f"pyodide-{VERSION}.tgz"
    if not archive.is_file() or _integrity(archive.read_bytes()) != INTEGRITY:
        content = _fetched()
        with atomic_open(archive, "wb") as handle:
            handle.write(content)
    with tarfile.open(archive) as packed:
        return {name: packed.extractfile(f"package/{name}").read() for name in PYODIDE}


def _fetched() -> bytes:
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or "https://registry.npmjs.org/"
    address = f"{registry.rstrip('/')}/pyodide/-/pyodide-{VERSION}.tgz"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            content = answer.read()
    except (OSError, urllib.error.URLError) as error:
        raise UserError(
            f"Pyodide can't be fetched: {error}.",
            where=address,
            allowed="a network that reaches npm's registry",
            write="NPM_CONFIG_REGISTRY=https://registry.npmjs.org make site",
        ) from None
    if _integrity(content) != INTEGRITY:
        raise UserError(
            "Pyodide's archive is not the pinned one.",
            where=address,
            found=_integrity(content),
            allowed=INTEGRITY,
            write="NPM_CONFIG_REGISTRY=https://registry.npmjs.org make site",
        )
    return content


def _integrity(content: bytes) -> str:
    """As npm writes it."""
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


def archive() -> bytes:
    """The modules that answer, their data, and the packages below them, as one archive."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, path in sorted(_members()):
            packed.writestr(
                zipfile.ZipInfo(name, _TIME), path.read_bytes(), zipfile.ZIP_DEFLATED, 9
            )
    return made.getvalue()


def project_modules(script: Path) -> set[Path]:
    """The files of a module of the project and of every project module that it imports, anywhere in it."""
    finder = ModuleFinder(path=[str(ROOT)])
    finder.load_file(str(script))
    return {script} | {
        Path(module.__file__) for module in finder.modules.values() if module.__file__
    }


def _members() -> Iterator[tuple[str, Path]]:
    by_name = (ROOT / "dryfit" / "readers").glob(
        "*.py"
    )  # which `dryfit.readers` imports by their tools' names
    files = set().union(*map(project_modules, (Path(__file__).with_name("answer.py"), *by_name)))
    files |= {
        path for pattern in DATA for path in data_path().glob(pattern) if path.name not in NOT_ASKED
    }
    yield from ((path.relative_to(ROOT).as_posix(), path) for path in files)
    yield "rpds.py", data_path("site", "rpds.py")
    for package in PACKAGES:
        folder = Path(find_spec(package).submodule_search_locations[0])
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            if (
                path.is_file()
                and path.suffix in (".py", ".json", "")
                and not {"tests", "__pycache__"} & {*parts}
            ):
                yield "/".join((package, *parts)), path
