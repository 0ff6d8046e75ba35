"""What a job's code is, as one number: it changes when, and only when, the code means something else.

Snakemake looks at a script's modification time and never at the modules it imports. Here the digest covers the script
and every project module that it imports, however deep, together with the pins of the environment it runs in. Comments,
docstrings, layout and the texts that only people read are left out; C sources that a module compiles count whole. As
one param of a rule it sees to it that a ``touch``, a fresh checkout and a reworded message rerun nothing, and that an
edited module reruns exactly the rules that use it.

Standard library and PyYAML only: the Snakefile imports this beside a bare Snakemake.
"""

import ast
import atexit
import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path

import yaml

from dryfit.common.files import digest, write_json

OURS = frozenset({"scripts", "validation", "dryfit"})  # the project's own packages
ROOT = Path(__file__).resolve().parents[2]
STORE = Path(".snakemake", "modules.json")
# Packages that only the torch environment has, by the names they are imported under.
TORCH_STACK = frozenset(
    {"accelerate", "bitsandbytes", "gguf", "peft", "safetensors", "torch", "transformers"}
)


# Calls whose texts people read and no result holds: messages, and descriptions in tables. By the name that is called,
# the arguments that are texts, by position or keyword; ALL where the call is a message and nothing else.
ALL = ("*",)
TEXTS: dict[str, tuple[int | str, ...]] = {
    "UserError": ALL,
    **dict.fromkeys(("debug", "info", "warning", "error"), ALL),  # of a logger
    **dict.fromkeys(("described", "switch"), (0, "about")),
    "Excluded": (0, 1),
    "Only": (1,),
    "Optimizer": (0, "about"),
    "Contradiction": (2, 3, 4),
    "add_argument": ("help",),
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def _module_files(name: str) -> set[Path]:
    """The files that run when ``scripts.a.b`` is imported: the module's, if it is one, and those of its packages."""
    path = ROOT.joinpath(*name.split("."))
    folders = [path, *path.parents[: name.count(".")]]
    return {
        file
        for file in (path.with_suffix(".py"), *(at / "__init__.py" for at in folders))
        if file.is_file()
    }


@cache
def _read(path: Path) -> tuple[str, frozenset[Path], frozenset[str]]:
    """Digest of a module's meaning, the project modules and the third-party packages it imports (anywhere in it)."""
    source = path.read_bytes()
    key = content_key(source)
    known, used = _remembered()
    meaning, names, packages = used[key] = known.get(key) or parse(
        source.decode("utf-8"), str(path)
    )
    return meaning, frozenset().union(*map(_module_files, names)), frozenset(packages)


def content_key(source: bytes) -> str:
    """What :data:`STORE` knows a module by: its bytes, and the Python and the code that parsed it."""
    return hashlib.sha256(sys.version.encode() + Path(__file__).read_bytes() + source).hexdigest()


def parse(source: str, filename: str) -> list:
    """Digest of the meaning, names of imported project modules, names of imported packages."""
    tree = ast.parse(source, filename=filename)
    ours: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [
                ast.Pass()
            ]  # a reworded docstring must not retrain a model
        if isinstance(node, ast.Call):
            _drop_texts(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute_name(node, Path(filename))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            top = name.partition(".")[0]
            if top in OURS:
                ours.add(name)
            elif top not in sys.stdlib_module_names:
                others.add(top)
    meaning = ast.unparse(tree)
    return [hashlib.sha256(meaning.encode()).hexdigest(), sorted(ours), sorted(others)]


def _drop_texts(call: ast.Call) -> None:
    """Take the texts that only people read out of a call."""
    name = (
        call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    )
    texts = TEXTS.get(name, ())
    if texts == ALL:
        call.args, call.keywords = [], []
        return
    call.args = [
        ast.Constant("") if place in texts else argument for place, argument in enumerate(call.args)
    ]
    call.keywords = [one for one in call.keywords if one.arg not in texts]


def absolute_name(node: ast.ImportFrom, path: Path) -> str:
    """The dotted name that ``from ... import`` in the file ``path`` imports from; a relative one is resolved."""
    if not node.level:
        return node.module or ""
    package = path.resolve().relative_to(ROOT).parts[: -node.level]
    return ".".join((*package, *([node.module] if node.module else [])))


@cache
def _remembered() -> tuple[dict, dict]:
    """What :func:`parse` found in files of the same bytes before, and what is used now: a second less at each start.

    Written to :data:`STORE` when the process ends, where Snakemake has made the folder.
    """
    store = STORE.absolute()
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut off
        known = {}
    used: dict[str, list] = {}

    def save() -> None:
        if (
            not used.keys() <= known.keys()
            and store.parent.is_dir()
            and os.access(store.parent, os.W_OK)
        ):
            write_json(store, used, indent=None)

    atexit.register(save)
    return known, used


@cache
def imported_modules(script: Path) -> tuple[Path, ...]:
    """The script and every project module that it imports, directly or not, sorted by path."""
    seen: set[Path] = set()
    todo = [script.resolve()]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += _read(path)[1]
    return tuple(sorted(seen))


def c_sources(script: Path) -> tuple[Path, ...]:
    """The C sources that the modules below a script compile: each such module is a ``native_library.py``."""
    compiling = (path for path in imported_modules(script) if path.name == "native_library.py")
    return tuple(
        sorted(source for path in compiling for source in path.with_name("native").glob("*.[ch]*"))
    )


def imported_packages(script: Path) -> frozenset[str]:
    """Top-level names of the third-party packages that the script or any project module below it imports."""
    return frozenset().union(*(_read(path)[2] for path in imported_modules(script)))


def environment_of(script: Path) -> str:
    """The smaller of the environments ``light`` and ``torch`` that has what the script imports."""
    return "torch" if imported_packages(script) & TORCH_STACK else "light"


@cache
def module_digests(script: Path) -> dict[str, str]:
    """Digests of the script, the project modules and C sources below it, by path, and of its environment's pins."""
    modules = {
        path.relative_to(ROOT).as_posix(): _read(path)[0] for path in imported_modules(script)
    }
    for path in c_sources(script):
        modules[path.relative_to(ROOT).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    environment = environment_of(script)
    return {**modules, f"envs/{environment}.yaml": digest(_pins(environment))}


def code_digest(script: Path) -> str:
    """One digest of all that :func:`module_digests` has."""
    return digest(module_digests(script))


@cache
def _pins(environment: str) -> object:
    return yaml.safe_load((ROOT / "envs" / f"{environment}.yaml").read_text(encoding="utf-8"))
