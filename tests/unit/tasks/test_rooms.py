"""What is particular to a task stands in the task's own room, and in no other place of the pipeline."""

import re

import pytest

from scripts.tasks.support import registry
from tests.repository import ROOT
from tests.task_parts import shell

WORDS = re.compile(r"\b(bash|bashlex|shfmt|tree_sitter|shell|bwrap)\b", re.IGNORECASE)
PLACES = ("scripts/**/*.py", "rules/*.smk", "Snakefile", "config/templates/*.j2")
OWN = ("scripts/tasks/shell/", "scripts/screen/__main__.py")
# Of the machine: the command line's completion and quoting, containers' and clusters' commands.
NOT_OF_THE_TASK = re.compile(r"tasks[./]shell|subprocess|shlex", re.IGNORECASE)


def test_nothing_outside_the_shell_task_knows_its_language() -> None:
    found = []
    for pattern in PLACES:
        for path in ROOT.glob(pattern):
            place = path.relative_to(ROOT).as_posix()
            if place.startswith(OWN):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if WORDS.search(NOT_OF_THE_TASK.sub("", line)):
                    found.append(f"{place}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_only_the_short_name_of_the_screen_imports_the_task() -> None:
    importing = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("scripts/**/*.py")
        if "scripts.tasks.shell" in path.read_text(encoding="utf-8")
        and "tasks/shell" not in path.as_posix()
    }
    assert importing == {"scripts/screen/__main__.py"}


def test_every_task_is_found_and_has_every_part() -> None:
    assert registry.names() == ["shell", "sql", "text"]
    for part in registry.PARTS:
        assert shell(part).name == "shell"


@pytest.mark.parametrize("name", ["text", "sql", "shell"])
def test_a_task_names_everything_that_documents_ask_for(name: str) -> None:
    task, plain = registry.task({"name": name}), registry.task({"name": "text"})
    assert task.words().keys() == plain.words().keys()
    assert {"loss", "exact"} <= task.labels().keys()
