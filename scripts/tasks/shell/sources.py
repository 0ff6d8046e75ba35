"""Rows of the shell task's own: from the grammar, from a package's examples; and requests for harm."""

from collections.abc import Iterator, Mapping
from typing import Any

from dryfit.common.files import read_jsonl, read_report
from scripts.tasks.shell.embedded import generate, held_out_harm
from scripts.tasks.shell.task import Shell
from scripts.tasks.shell.usage import most_used
from scripts.tasks.text import Found

EMBEDDED = (
    "programs",
    "intents",
    "known",
)  # what a source of the grammar may say beside its pairs and its seed


class Task(Shell):
    def harmful(self) -> list[dict]:
        """Requests for harm of kinds that no row has, with the line that refuses them."""
        return list(held_out_harm()) if self.options["harm"] else []

    def read(self, source: Mapping[str, Any], about: dict) -> Iterator[Found]:
        """Rows of a source of type ``embedded`` or ``examples``."""
        if source["type"] == "embedded":
            about |= {key: source[key] for key in ("seed", *EMBEDDED) if key in source}
            made = generate(
                source["seed"],
                source["pairs"],
                **{key: source[key] for key in EMBEDDED if key in source},
            )
            for number, fields in enumerate(made, 1):
                yield "embedded", number, fields
            return
        report = read_report(source["report"], source["found"])
        about |= {key: report[key] for key in ("requirement", "archive_sha256", "missing")}
        about |= {key: source[key] for key in ("programs",) if key in source}
        wanted = (
            {f"eg.{name}" for name in most_used(source["programs"])}
            if "programs" in source
            else None
        )
        for row in read_jsonl(source["found"]):
            origin, line = row.pop("source"), row.pop("line")
            if wanted is None or row["family"] in wanted:
                yield origin, line, row
