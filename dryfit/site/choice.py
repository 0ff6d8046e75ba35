"""The page's choice: beside a pasted file, as words of the command line, and back."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dryfit.ask.options import parsed
from dryfit.ask.question import Question, QuestionOptions, said_by
from dryfit.common.errors import UserError
from dryfit.common.text import yaml_text


def beside_the_file(
    request: Mapping[str, Any], folder: Path
) -> tuple[Mapping[str, Any], list[str]]:
    """A choice with a file: what the file says wins over the form, but for changes that the page itself offered.

    Returns the choice without what the file says, and a sentence for each field of the form: added to the file, in
    place of its value, or left aside.
    """
    if not request.get("file"):
        return request, []
    path = folder / file_name(request["file"])
    path.write_text(request["file"]["text"], encoding="utf-8")
    said = said_by(path)
    settings = dict(request.get("settings") or {})
    form = {
        name: request.get(name)
        for name in ("gpu", "method", "strategy", "sequence_length", "micro_batch")
    }
    form |= settings
    kept, added = dict(request), []
    for name, value in form.items():
        field = {"strategy": "parallel"}.get(name, name)
        if value in (None, ""):
            continue
        text, own = (
            f"{name}: {yaml_text(value)}",
            said.get(field, said.get(field.partition(".")[0])),
        )
        if own is None:
            added.append(f"the form adds {text}")
        elif name in (request.get("over") or ()):
            added.append(f"in place of what the file says, {text}")
        else:
            added.append(f"the file says {own}, and the form's {text} is left aside")
            if name in settings:
                del settings[name]
            else:
                kept[name] = None
            if name == "gpu":
                kept["gpus"] = 1
    return kept | {"settings": settings}, added


def options_of(request: Mapping[str, Any]) -> QuestionOptions:
    gpu, count = request.get("gpu") or None, request.get("gpus") or 1
    return QuestionOptions.of({**request, "gpu": f"{count}x{gpu}" if gpu and count > 1 else gpu})


def words_of(request: Mapping[str, Any], folder: Path) -> list[str]:
    """The command line that asks the same; a pasted file is written first."""
    file = request.get("file")
    what = (request.get("model") or "").strip()
    if file:
        what = file_name(file)
        (folder / what).write_text(file["text"], encoding="utf-8")
    elif not what:
        raise UserError(
            "No model is named.",
            allowed="a name, an id on the Hub, or a file",
            write="Qwen/Qwen3-8B",
        )
    return [what, *options_of(request).words]


def file_name(file: Mapping[str, str]) -> str:
    """What to call a file: its own name, or for pasted text what it looks like."""
    if name := re.sub(r"[^\w.-]+", "-", file.get("name") or "").strip(".-"):
        return name
    if file["text"].lstrip().startswith("{"):
        return "config.json"
    return (
        "train.py"
        if re.search(r"^(?:from|import) \w", file["text"], re.MULTILINE)
        else "config.yaml"
    )


def run_words(request: Mapping[str, Any], asked: Question) -> list[str]:
    """What the command line says about the whole run; the price is that of the chosen GPU."""
    given = dict(request.get("run") or {})
    if price := given.get("price"):
        if asked.gpu is None:
            raise UserError(
                "A price needs a GPU: choose one.", allowed="a GPU of the list", write="rtx-4090"
            )
        given["price"] = f"{asked.gpu.name}={price}"
    return [
        word
        for name, value in sorted(given.items())
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def named_fields(changes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields of a change as the form names them, with their parts."""
    for name, value in changes.items():
        if name == "parallel":
            yield "strategy", ""
        elif isinstance(value, Mapping) and name != "gpu":
            yield from ((name, part) for part in value)
        else:
            yield name, ""


def choice_of(command: str) -> dict[str, Any]:
    """A command line as the form's choice."""
    options = parsed(shlex.split(command)[1:])
    settings = dict(setting.split("=", 1) for setting in options.set)
    return {
        "model": options.what[0],
        "gpu": options.gpu,
        "gpus": 1,
        "method": options.method or "",
        "strategy": options.strategy or "",
        "sequence_length": options.sequence_length,
        "micro_batch": options.micro_batch,
        "settings": settings,
    }
