"""Parts of tasks for tests of the stages that ask them."""

from typing import Any

from scripts.tasks.support import registry
from scripts.tasks.text import Task


def shell(part: str) -> Task:
    """A part of the shell task, as it is by default."""
    return registry.task({"name": "shell", "harm": True}, part)


def text(part: str = "words", name: str = "text", **options: Any) -> Task:
    """The task ``text``, or another one in a single file."""
    return registry.task({"name": name, **options}, part)
