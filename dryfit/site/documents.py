"""The documents as a site: docs/ as it stands, a start page, and the reference, made into pages by Zensical."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, read_yaml
from dryfit.common.text import gib
from dryfit.data import data_path
from dryfit.site import reference
from dryfit.site.answer import CHOSEN, reply
from dryfit.site.python import ROOT

SOURCES = data_path("site")
LIBRARY_README = ROOT / "dryfit" / "README.md"
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_PLACE = re.compile(r"<!-- site: begin -->.*?<!-- site: end -->", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
MORE = "More"  # where a document goes that dryfit/data/site/pages.yaml doesn't name


def documents(
    folder: Path, commit: str, run: Path | None = None, sweep: Path | None = None
) -> None:
    """Write the documents' pages into a folder; a finished run's are an example, with a sweep's page beside it.

    UserError: if Zensical is not installed, or refuses: a link that leads nowhere, for example.
    """
    with TemporaryDirectory() as scratch:
        project = Path(scratch)
        pages = staged(project / "docs", commit, run, sweep)
        (project / "zensical.toml").write_text(_settings(pages), encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr + done.stdout).strip()
            missing = "No module named zensical" in said
            raise UserError(
                "Zensical is not installed." if missing else f"Zensical made no site:\n{said}",
                where="the extra `site`",
                allowed="the environment that make sets up",
                write="make site",
            )
        shutil.copytree(project / "site", folder, dirs_exist_ok=True)


def staged(
    docs: Path, commit: str, run: Path | None = None, sweep: Path | None = None
) -> dict[str, dict[str, str]]:
    """Write all pages as Markdown; by section the titles of the pages and their files."""
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("run.json"))
    shutil.copy(SOURCES / "documents.css", docs)
    made = {
        "index.md": start_page(),
        "reference/command-line.md": reference.command_line(),
        "reference/configuration.md": (ROOT / "config" / "README.md").read_text(encoding="utf-8"),
        "reference/engine.md": reference.engine(),
        "reference/scenario.md": reference.scenario(),
    }
    (docs / "reference").mkdir()
    card = docs / "example" / "MODEL_CARD.md"
    if run is None:  # the run whose documents are in the repository
        made["example/MODEL_CARD.md"] = _FRONT_MATTER.sub("", card.read_text(encoding="utf-8"))
    else:
        shutil.rmtree(docs / "example")
        made |= _example(docs / "example", run, sweep)
    for name, text in made.items():
        (docs / name).write_text(text, encoding="utf-8")
    titles = {}
    for path in sorted(docs.rglob("*.md")):
        name, text = path.relative_to(docs).as_posix(), path.read_text(encoding="utf-8")
        came_from = (
            ROOT / "config" / "README.md"
            if name == "reference/configuration.md"
            else ROOT / "docs" / name
        )
        path.write_text(_linked(_pipes(text), came_from, name, commit), encoding="utf-8")
        titles[name] = re.search(r"^# (.+)$", text, re.MULTILINE)[1].replace("`", "")
    return sections(titles)


def _example(folder: Path, run: Path, sweep: Path | None) -> dict[str, str]:
    """A run's card, documents, figures, report and planner, as they lie there; and a page that says what made them."""
    shutil.copytree(run / "docs", folder / "docs")
    shutil.copytree(run / "figures", folder / "figures")
    for name in ("report.html", "planner.html"):
        shutil.copy(run / name, folder)
    if sweep is not None:
        shutil.copy(sweep / "sweep.html", folder)
    card = (run / "MODEL_CARD.md").read_text(encoding="utf-8")
    origin = read_json(run / "provenance.json")
    commit = origin["source"]["commit"] or "unknown: it was not made in a clone"
    text = (SOURCES / "example.md").read_text(encoding="utf-8")
    for word, value in (("RUN", run.name), ("COMMAND", origin["command"]), ("COMMIT", commit)):
        text = text.replace(word, str(value))
    if sweep is not None:
        text += (SOURCES / "example-sweep.md").read_text(encoding="utf-8")
    return {"example/index.md": text, "example/MODEL_CARD.md": _FRONT_MATTER.sub("", card)}


def sections(titles: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The pages by section, as dryfit/data/site/pages.yaml orders them; those that it doesn't name come last."""
    order = read_yaml(SOURCES / "pages.yaml")
    named = {name for names in order.values() for name in names}
    order = {**order, MORE: sorted(set(titles) - named)}
    in_order = {
        section: {name: titles[name] for name in names if name in titles}
        for section, names in order.items()
    }
    return {section: pages for section, pages in in_order.items() if pages}


def with_address(readme: str, address: str) -> str:
    """The README with the site's address in the place that it has for it."""
    there = f"[the calculator]({address.rstrip('/')}/calculator/)"
    line = f"Without installing anything: {there} answers in a browser, and sends nothing."
    return _PLACE.sub(lambda _: f"<!-- site: begin -->\n{line}\n<!-- site: end -->", readme)


def installation() -> str:
    """The lines that install the command, as the README has them."""
    readme = LIBRARY_README.read_text(encoding="utf-8")
    lines = re.search(r"```bash\n(.*?)\n```", readme, re.DOTALL)[1]
    server, repository = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return (
        lines.replace("REPOSITORY_URL", f"{server}/{repository}")
        if server and repository
        else lines
    )


def start_page() -> str:
    """The start page: the README's first question and its answer, as a terminal shows them, and how to get there."""
    readme = LIBRARY_README.read_text(encoding="utf-8")
    command, answer = re.search(
        r"```bash\n(dryfit [^\n]+)\n```\n+```\w*\n(.*?)```", readme, re.DOTALL
    ).groups()
    page = (
        (SOURCES / "index.md").read_text(encoding="utf-8").replace("INSTALLATION", installation())
    )
    estimated = json.loads(reply(json.dumps({**CHOSEN, "ask": "answer"})))["answer"]
    peak_bytes = estimated["analytic"]["peak_allocated_bytes"]
    return page.replace("PEAK", gib(peak_bytes)).replace(
        "TERMINAL", f"$ {command}\n{answer.rstrip()}"
    )


def _pipes(text: str) -> str:
    """The text with pipes in a table's code as Python-Markdown has them: without the backslash that others need."""

    def bare(row: re.Match[str]) -> str:
        return CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0])

    return re.sub(r"^\|.*$", bare, text, flags=re.MULTILINE)


def _linked(text: str, came_from: Path, name: str, commit: str) -> str:
    """The text with links that hold on the site: what lies outside docs/ is linked where the code lies, if known."""
    server, repository = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")

    def link(match: re.Match[str]) -> str:
        words, (target, hash_sign, place) = match[1], match[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (came_from.parent / target).resolve()
        if not path.exists() or path.is_relative_to(
            ROOT / "docs"
        ):  # a page of the site, perhaps a generated one
            return match[0]
        inside = path.relative_to(ROOT).as_posix()
        if inside == "config/README.md":
            return f"{words}({'../' * name.count('/')}reference/configuration.md{hash_sign}{place})"
        if server and repository:
            return (
                f"{words}({server}/{repository}/blob/{commit or 'main'}/{inside}{hash_sign}{place})"
            )
        return words[1:-1]

    return LINK.sub(link, text)


def _settings(pages: Mapping[str, Mapping[str, str]]) -> str:
    order = [
        f"  {{ {json.dumps(section)} = ["
        + ", ".join(
            f"{{ {json.dumps(title)} = {json.dumps(name)} }}" for name, title in names.items()
        )
        + "] },"
        for section, names in pages.items()
    ]
    form = (SOURCES / "zensical.toml").read_text(encoding="utf-8")
    if address := os.environ.get("SITE_URL"):
        form = form.replace("[project]\n", f"[project]\nsite_url = {json.dumps(address)}\n", 1)
    return form.replace("nav = []", "nav = [\n" + "\n".join(order) + "\n]")
