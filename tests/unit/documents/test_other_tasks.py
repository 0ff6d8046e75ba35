"""Documents of a task without a screen and without requests for harm: nothing in them is of another task."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.documents import inputs

OF_COMMANDS = (
    "danger",
    "deletes_unasked",
    "changes_unasked",
    "refused_",
    "harmful",
    "program",
    "exact_canonical",
)
WORDS = re.compile(
    r"\b(bash|shell|shfmt|command that|dangerous|sandbox|were not run|snakemake execute)\b",
    re.IGNORECASE,
)


def without(value: Any) -> Any:
    """Content without the figures of commands."""
    if isinstance(value, dict):
        return {
            key: without(item)
            for key, item in value.items()
            if not key.startswith(OF_COMMANDS)
            and key not in ("screen", "effect", "expected_effect")
        }
    return [without(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("task", ["sql", "text"])
@pytest.mark.parametrize(
    "name", ["MODEL_CARD.md", "docs/details.md", "docs/publication.md", "report.html"]
)
def test_no_word_of_commands_is_left(write: Callable[..., str], task: str, name: str) -> None:
    content = inputs.files()
    for key in (
        "comparison",
        "base_answers",
        "tuned_answers",
        "base_metrics",
        "tuned_metrics",
        "merging",
    ):
        content[key] = without(content[key])
    content["execution"] = []
    for rows in (content["base_answers"], content["tuned_answers"]):
        for row in rows:
            row |= {"request": "How many?", "command": "SELECT 1", "answer": "SELECT 2"}
    content["encode"]["system_prompt"] = content["comparison"]["tuned"]["prompt"]["system"] = (
        "Answer."
    )
    settings = copy.deepcopy(inputs.CARD_SETTINGS)
    settings["configuration"] = {
        "model": settings["configuration"]["model"],
        "task": {"name": task, "words": {"fine_tuned_for": "my [questions]"}},
    }
    text = write(name, content, settings)
    assert not [line for line in text.splitlines() if WORDS.search(line)]
    if name == "MODEL_CARD.md":
        assert r"fine-tuned for my \[questions\]" in text
