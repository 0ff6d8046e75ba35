"""The tasks by name: each module of ``scripts/tasks`` is one, or each package with a module for each part.

A part is what one stage needs of a task. So an edit of the scores judges again, and trains nothing again.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dryfit.common.errors import UserError
from dryfit.common.files import digest, sha256_file
from dryfit.common.schema import closest
from scripts.common.code_digests import ROOT, code_digest
from scripts.tasks.support import own

if TYPE_CHECKING:
    from scripts.tasks.text import Task

FOLDER = ROOT / "scripts" / "tasks"
PARTS = (
    "sources",
    "cleaning",
    "screening",
    "splitting",
    "scores",
    "words",
    "benchmark",
    "advice",
)


def names() -> list[str]:
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    return sorted(modules | {path.parent.name for path in FOLDER.glob("*/words.py")})


def task(options: Mapping[str, Any], part: str = "words") -> Task:
    """A part of a task, with its options."""
    return importlib.import_module(_module(options["name"], part)).Task(options)


def _module(name: str, part: str) -> str:
    return f"scripts.tasks.{name}.{part}" if (FOLDER / name).is_dir() else f"scripts.tasks.{name}"


def _file(name: str, part: str) -> Path:
    path = FOLDER / name / f"{part}.py"
    if path.is_file():
        return path
    return FOLDER / name / "task.py" if (FOLDER / name).is_dir() else FOLDER / f"{name}.py"


def for_job(options: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A param: the task's options, the part, and digests of its code and of the user's own functions and files."""
    made = task(options)
    used = made.options_of(part)
    functions = [name for name in _texts(used) if own.is_own(name)]
    files = sorted(
        {str(own.file_of(name)) for name in functions} | {str(path) for path in made.files_of(part)}
    )
    return {
        "code": code_digest(_file(options["name"], part)),
        "files": digest([(path, sha256_file(path)) for path in files]) if files else None,
        "options": {"name": options["name"], **used},
        "part": part,
    }


def of_job(param: Mapping[str, Any]) -> Task:
    """The task of a job, by its param."""
    return task(param["options"], param["part"])


def checked(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """The ``task`` of a configuration with the defaults of its options.

    UserError: for a task or an option that isn't there.
    """
    given = {"name": given} if isinstance(given, str) else dict(given)
    name = given.get("name")
    if name not in names():
        near = closest(str(name), names())
        raise UserError(
            f"There is no task {name!r}." if name else "The task has no name.",
            where="task in the configuration",
            found=name,
            allowed=", ".join(names()),
            write=f"task: {near or 'text'}",
        )
    kind = type(task({"name": name}))
    if unknown := [key for key in given if key not in ("name", *kind.defaults)]:
        near = closest(unknown[0], list(kind.defaults))
        raise UserError(
            f"The task {name} has no {unknown[0]}.",
            where="task in the configuration",
            found={unknown[0]: given[unknown[0]]},
            allowed=", ".join(kind.defaults),
            write=f"task:\n  {near or 'name'}: ...",
        )
    options = {"name": name, **kind.defaults, **given}
    kind(options).check_options()
    return options


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []
