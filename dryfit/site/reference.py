"""The reference: pages that are made from the command line's options, the scenario's fields and docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from dryfit import engine as engine_package
from dryfit.ask.options import COMMANDS, own_parser, parser
from dryfit.common.text import yaml_text
from dryfit.engine import _WHERE as ENGINE
from dryfit.scenario.description import Field
from dryfit.scenario.fields import FIELDS, scenario_defaults

MOST_ON_A_LINE = 60  # characters of parameters
Defined = ast.FunctionDef | ast.ClassDef


def command_line() -> str:
    """``dryfit --help``, and the help of each command."""
    texts = [parser().format_help(), *(own_parser(name).format_help() for name in COMMANDS)]
    return "# Command line\n\n" + "\n".join(f"```text\n{text.rstrip()}\n```\n" for text in texts)


def scenario() -> str:
    """The fields of a scenario."""
    rows = "\n".join(_rows(FIELDS, scenario_defaults()))
    return (
        "# Scenario\n\nA scenario is one training step: a YAML file with these fields, for"
        " `dryfit scenario.yaml`; or one field on the command line, `--set lora.rank=64`.\n\n"
        f"| field | allowed | default | what it does |\n| --- | --- | --- | --- |\n{rows}\n"
    )


def _rows(fields: tuple[Field, ...], defaults: dict, above: str = "") -> Iterator[str]:
    for field in fields:
        default = (defaults or {}).get(field.name)
        shown = "" if default is None or field.parts else f"`{yaml_text(default)}`"
        yield f"| `{above}{field.name}` | {_allowed(field)} | {shown} | {field.about} |"
        yield from _rows(field.parts, default or {}, f"{above}{field.name}.")


def _allowed(field: Field) -> str:
    null = ", `null`" if field.nullable else ""
    if field.words:
        return ", ".join(f"`{yaml_text(word)}`" for word in field.words) + null
    if field.least is not None:
        return f"a whole number from {field.least}{null}"
    if field.below is not None:
        return f"a number from 0 to below {field.below:g}"
    kinds = {
        "string": "text",
        "object": "a mapping",
        "array": "a list",
        "boolean": "`true`, `false`",
        "integer": "a whole number from 0",
    }
    return ", ".join(kinds[kind] for kind in field.types or ("object",)) + null


def engine() -> str:
    """What :mod:`dryfit.engine` offers, from its docstrings; the modules are read and not imported."""
    parts = [
        "# Engine\n\n`from dryfit.engine import trace_step`: the memory of any PyTorch training step.\n"
    ]
    for name, module in ENGINE.items():
        tree = ast.parse(
            Path(engine_package.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        )
        node = next(node for node in tree.body if isinstance(node, Defined) and node.name == name)
        parts.append(
            f"## `{name}`\n\n```python\n{_signature(node)}\n```\n\n{_text(ast.get_docstring(node) or '')}\n"
        )
        methods = (one for one in getattr(node, "body", ()) if isinstance(one, ast.FunctionDef))
        for method in methods if isinstance(node, ast.ClassDef) else ():
            if not method.name.startswith("_") and (text := ast.get_docstring(method)):
                parts.append(
                    f"### `{name}.{method.name}`\n\n```python\n{_signature(method)}\n```\n\n{_text(text)}\n"
                )
    return "\n".join(parts)


def _signature(node: Defined) -> str:
    """The definition without its body; of a dataclass with its fields."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        words = ast.unparse(node.args)
        if (
            len(words) > MOST_ON_A_LINE
        ):  # one a line: commas between parameters are those outside brackets
            words = "\n    " + re.sub(r", (?![^\[(]*[\])])", ",\n    ", words) + ",\n"
        return f"def {node.name}({words}){returns}"
    fields = [f"    {ast.unparse(line)}" for line in node.body if isinstance(line, ast.AnnAssign)]
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    return "\n".join([f"class {node.name}{bases}", *fields])


def _text(docstring: str) -> str:
    """A docstring as Markdown: sections as bold words, their entries as a list."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring).replace("``", "`")
    lines: list[str] = []
    inside = False
    for line, below in zip(split := text.splitlines(), [*split[1:], ""], strict=True):
        if below and set(below) == {"-"}:
            inside = True
            lines += [f"**{line}**", ""]
        elif line and set(line) == {"-"}:
            continue
        elif inside and line and not line.startswith(" "):
            lines.append(f"- `{line}`" if re.fullmatch(r"[\w*, .\[\]]+", line) else f"- {line}")
        else:
            lines.append(line)
    return "\n".join(lines)
