"""A notebook's cells as one program: those of Python, without lines for the shell, up to one that is broken."""

import ast
import json
import re
from pathlib import Path

from dryfit.common.errors import UserError

_PYTHON_MAGICS = (
    "capture",
    "time",
    "timeit",
    "prun",
    "python",
    "python3",
)  # cells that are Python all the same
_SHELL = re.compile(r"^(\s*)(?:[!%]|\w+\s*=\s*[!%]|(?:pip|pip3|conda|apt|apt-get)\s+install\b)")
_HELP = re.compile(r"^\s*[\w.]+\?{1,2}\s*$")


def source(path: Path) -> str:
    """The program's text; of a notebook its Python cells, without lines and cells for the shell."""
    return "\n".join(_sources(path))


def _sources(path: Path) -> list[str]:
    """A program's text, or that of each of a notebook's cells of Python."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return [text]
    try:
        cells = json.loads(text)["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(
            "The notebook can't be read.", where=path, allowed="a notebook of format 4"
        ) from None
    return [_python(cell) for cell in code]


def _python(cell: str) -> str:
    """A cell's Python: a line for the shell is ``pass``, over all lines that a backslash joins."""
    lines = cell.splitlines()
    magic = next(
        (line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")), ""
    )
    if magic.startswith("%%") and magic[2:].split(" ")[0] not in _PYTHON_MAGICS:
        return ""
    found, joined = [], False
    for line in lines:
        shell = _SHELL.match(line)
        if joined:
            found.append("")
        elif shell:
            found.append(f"{shell[1]}pass")
        else:
            found.append("" if _HELP.match(line) else line)
        joined = (joined or shell is not None) and line.rstrip().endswith("\\")
    return "\n".join(found)


def tree_of(path: Path) -> tuple[ast.Module, UserError | None]:
    """The statements up to a cell that isn't Python, where a notebook would stop, and the error of that cell."""
    cells = _sources(path)
    body: list[ast.stmt] = []
    for number, text in enumerate(cells, start=1):
        try:
            tree = compile(
                text, str(path), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            )
        except (SyntaxError, ValueError) as error:
            cell = f", cell {number} of code" if path.suffix == ".ipynb" else ""
            return ast.Module(body, []), UserError(
                "The program is not Python.",
                where=f"{path}{cell}, line {getattr(error, 'lineno', None)}",
                found=(getattr(error, "text", "") or "").strip()[:80],
                allowed="a Python file or a notebook",
            )
        body += tree.body
    return ast.Module(body, []), None
