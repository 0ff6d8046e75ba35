"""``make site``: the calculator and the documents as static files that any server can carry."""

import argparse
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from dryfit.ask.options import METHODS
from dryfit.cards.gpus import catalogue
from dryfit.common.errors import UserError
from dryfit.common.files import atomic_folder, read_yaml, write_text
from dryfit.common.terminal import command
from dryfit.common.text import yaml_text
from dryfit.common.versions import VERSION
from dryfit.data import data_path
from dryfit.scenario.description import Field
from dryfit.scenario.fields import FIELDS, scenario_defaults
from dryfit.scenario.hub import MODELS
from dryfit.scenario.strategies import STRATEGIES
from dryfit.site.answer import CHOSEN, reply
from dryfit.site.documents import documents, installation, with_address
from dryfit.site.python import ROOT, archive, pyodide

SOURCES = data_path("site")
SWEEP = ROOT / "results" / "tiny-sweep"  # of tests/config/sweep.yaml
PICKS = (
    "t4",
    "rtx-3090",
    "rtx-4090",
    "rtx-5090",
    "l40s",
    "a100-80gb",
    "h100-80gb",
)  # offered beside the list
ROWS = (1, 2, 4, 8, 16, 32)  # micro-batches whose longest rows are shown
# Fields that the form has above, or that need more than one word.
_ABOVE = (
    "model",
    "model_name",
    "method",
    "sequence_length",
    "micro_batch",
    "adapter",
    "parallel",
    "gpu",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dryfit.site.build", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "site", help="the folder to make (site)"
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".venv-site", help="where downloads are kept"
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=default_run(),
        help="the example; left out where it isn't finished",
    )
    parser.add_argument(
        "--sweep",
        type=Path,
        default=ROOT / "results" / "tiny-sweep",
        help="as --run: beside the example",
    )
    parser.add_argument("--without-documents", action="store_true", help="the calculator alone")
    options = parser.parse_args(arguments)
    if address := os.environ.get("SITE_URL"):
        _fill_in(ROOT / "dryfit" / "README.md", address)
    with atomic_folder(options.output) as folder:
        if not options.without_documents:
            run, sweep = (
                where if (where / page).is_file() else None
                for where, page in ((options.run, "report.html"), (options.sweep, "sweep.html"))
            )
            documents(folder, commit(), run, sweep)
        calculator(folder / "calculator", options.cache)
    print(f"{options.output}: python -m http.server -d {options.output} serves it")
    return 0


def _fill_in(readme: Path, address: str) -> None:
    """Write the site's address into the README.

    UserError: if it is no address of the web.
    """
    if not re.fullmatch(r"https?://[^\s<>()\"']+", address):
        raise UserError(
            "SITE_URL is no address.",
            where="the environment",
            found=address,
            allowed="https://...",
            write="SITE_URL=https://owner.github.io/SecureCLI-Tuner make site",
        )
    text = readme.read_text(encoding="utf-8")
    if (filled := with_address(text, address)) != text:
        write_text(readme, filled)


def default_run() -> Path:
    """The folder of the default configuration's run."""
    settings = read_yaml(ROOT / "config" / "config.yaml")
    return ROOT / "results" / f"{settings['run']['name']}-r{settings['lora']['rank']}"


def calculator(folder: Path, cache: Path) -> None:
    """The calculator's files; those that a visit needs are listed for the service worker."""
    files: dict[str, bytes] = {
        f"pyodide/{name}": content for name, content in pyodide(cache).items()
    }
    files["project.zip"] = archive()
    for name in ("calculator.js", "drawing.js", "worker.js"):
        files[name] = (SOURCES / name).read_bytes()
    styles = ("drawing.css", "calculator.css")  # as one file, since the first paint waits
    files["calculator.css"] = b"".join((SOURCES / name).read_bytes() for name in styles)
    files["index.html"] = page().encode()
    build = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()[:16]
    kept = json.dumps(["./", *sorted(set(files) - {"index.html"})])
    files["service-worker.js"] = (
        _template("service-worker.js.j2").render(build=build, files=kept).encode()
    )
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def page() -> str:
    """The calculator's page, with the answer to what its form says at first."""
    defaults, first = scenario_defaults(), first_answer()
    return _template("calculator.html.j2").render(
        chosen=CHOSEN,
        commit=commit(),
        defaults=defaults,
        first=first,
        first_json=_inside_script(first),
        gpus=list(catalogue().values()),
        installation=installation(),
        hub=os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
        methods=METHODS,
        picks=[
            (name, catalogue()[name].title.removeprefix("NVIDIA ").removeprefix("GeForce "))
            for name in PICKS
        ],
        models=sorted(path.stem for path in MODELS.glob("*.json")),
        settings=list(_settings(FIELDS, defaults)),
        strategies=list(STRATEGIES),
        version=VERSION,
    )


@cache
def first_answer() -> dict[str, Any]:
    """What the page shows before Python has come: its own answers to its own first choice."""

    def ask(**request: Any) -> dict[str, Any]:
        return json.loads(reply(json.dumps({**CHOSEN, **request})))

    longest = [ask(ask="longest", rows=rows)["longest"] for rows in ROWS]
    kinds = ("answer", "others", "methods", "gpus")
    answers = {name: value for kind in kinds for name, value in ask(ask=kind).items()}
    return answers | {"longest": longest, "rows": ROWS}


def _settings(
    fields: Sequence[Field], defaults: dict[str, Any], above: str = ""
) -> Iterator[dict[str, Any]]:
    """What the form's second part asks for: the scenario's fields, and the parts of those that are mappings."""
    for field in fields:
        key, default = f"{above}{field.name}", defaults.get(field.name)
        if field.name in _ABOVE and not above:
            continue
        if field.parts:
            yield from _settings(field.parts, default or {}, f"{key}.")
            continue
        words = [
            yaml_text(word)
            for word in (*field.words, *([None] if field.words and field.nullable else []))
        ]
        number = field.least is not None or field.below is not None
        yield {
            "key": key,
            "label": key.replace("_", " ").replace(".", ": "),
            "words": words,
            "default": "not set" if default is None else yaml_text(default),
            "type": "number" if number else "text",
            "least": field.least or 0,
            "step": "any" if field.below is not None else 1,
            "about": re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(field.about, quote=False)),
        }


def commit() -> str:
    """The commit that the site is made from, shortened; empty outside a clone."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(SOURCES), undefined=StrictUndefined, trim_blocks=True
    )
    return made.get_template(name)


def _inside_script(value: Any) -> str:
    """JSON that can stand in an HTML script: nothing in it ends the element."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).replace("<", "\\u003c")


if __name__ == "__main__":
    command(main)
