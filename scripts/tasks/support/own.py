"""Functions of a user's own, named ``module:function``, found in the working directory."""

import importlib
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError

NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Whether a name in the configuration is a function of the user's own."""
    return bool(NAMED.fullmatch(name))


def file_of(name: str) -> Path:
    """The file of a ``module:function``, relative to the working directory.

    UserError: if it isn't there.
    """
    path = Path(name.partition(":")[0].replace(".", "/") + ".py")
    if not path.is_file():
        raise UserError(
            f"There is no file for the function {name}.",
            where="task in the configuration",
            found=f"no {path} in {os.getcwd()}",
            allowed="module:function, with module.py in the working directory",
            write=f"def {name.partition(':')[2]}(...):    # in {path}",
        )
    return path


def load(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    UserError: if the file, or the function in it, isn't there, or the file can't be imported.
    """
    path = file_of(name)
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever a user's file raises
        raise UserError(
            f"The file of the function {name} can't be imported: {type(error).__name__}: {error}",
            where=str(path),
            allowed="a Python file that can be imported in the pipeline's environment",
        ) from None
    if not callable(found):
        raise UserError(
            f"There is no function {function}.",
            where=str(path),
            allowed="module:function, a function of that file",
            write=f"def {function}(...):",
        )
    return found


def measure(name: str, function: Callable[..., Any], answer: str, expected: str) -> float:
    """What an own metric says of an answer: a finite number, or True or False.

    UserError: if it raises, or returns anything else.
    """
    try:
        value = function(answer, expected)
    except Exception as error:  # whatever a user's function raises
        raise UserError(
            f"The metric {name} raised {type(error).__name__}: {error}",
            where=str(file_of(name)),
            found=f"answer {answer[:80]!r}, expected {expected[:80]!r}",
            allowed="a function of any two texts: an answer may be empty or anything else that a model says",
        ) from None
    number = isinstance(value, bool | int | float)
    if number and math.isfinite(value):
        return value if isinstance(value, bool) else float(value)
    raise UserError(
        f"The metric {name} returned {value!r}.",
        where=str(file_of(name)),
        found=f"answer {answer[:80]!r}, expected {expected[:80]!r}",
        allowed="a finite number, or True or False",
        write="return float(...)"
        if not number
        else "return 0.0    # where there is nothing to compare",
    )


def judge(name: str, function: Callable[..., Any], request: str, answer: str) -> str | None:
    """Why an own check rejects a row, or None where it passes.

    UserError: if it raises.
    """
    try:
        said = function(request, answer)
    except Exception as error:  # whatever a user's function raises
        raise UserError(
            f"The check {name} raised {type(error).__name__}: {error}",
            where=str(file_of(name)),
            found=f"request {request[:80]!r}, answer {answer[:80]!r}",
            allowed="a function of request and answer: None or True where the row may stay, else the reason",
        ) from None
    if said is None or said is True:
        return None
    return said if isinstance(said, str) and said else f"the check {name} says no"
