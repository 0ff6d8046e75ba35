"""The files of a rule by the names of its inputs, and reports that carry the reports that they were made from.

A later report carries an earlier one whole, under ``carried``: so a rule that needs what all stages said, such as the
documents, reads the last report of each line and no other.
"""

import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from dryfit.common.files import read_json, read_jsonl, read_report, read_reports, sha256_file

CARRIED = "carried"
PROJECT_OWN = (
    "validation",
)  # comes with the project; no rule wrote it, so that no report lists it


def carry(**inputs: Any) -> dict[str, Any]:
    """Inputs as a report carries them, by name, and what they carry themselves.

    Each is a mapping with ``path``, ``content``, ``bytes`` and ``sha256``, or a list of them, as the input is.
    """
    found: dict[str, Any] = {}
    for name, contents in gather(inputs).items():
        several, paths = (
            isinstance(contents, list) and not isinstance(inputs[name], str),
            inputs[name],
        )
        entries = []
        for path, content in zip(paths, contents, strict=True) if several else [(paths, contents)]:
            if isinstance(content, dict):
                found |= content.pop(CARRIED, {})
            size = Path(path).stat().st_size
            entries.append(
                {"bytes": size, "content": content, "path": str(path), "sha256": sha256_file(path)}
            )
        found[name] = entries if several else entries[0]
    return found


def carried_by(report: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The paths and the contents of what a report carries, by name."""
    entries = read_report(report)[CARRIED]
    return tuple(
        {
            name: [one[key] for one in some] if isinstance(some, list) else some[key]
            for name, some in entries.items()
        }
        for key in ("path", "content")
    )


def gather(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Read inputs: reports, and the rows of the JSON lines that they vouch for; other files stay paths.

    UserError: naming the file to delete, where one is not what its step has written.
    """
    paths = {
        name: [value] if isinstance(value, str | os.PathLike) else list(value)
        for name, value in inputs.items()
    }
    reports = read_reports(
        chain.from_iterable(listed for name, listed in paths.items() if name not in PROJECT_OWN)
    )

    def read(path: str) -> Any:
        if path.endswith(".jsonl"):
            return list(read_jsonl(path))
        return (
            reports[path]
            if path in reports
            else read_json(path)
            if path.endswith(".json")
            else path
        )

    contents = {name: [read(str(path)) for path in listed] for name, listed in paths.items()}
    return {
        name: contents[name][0] if isinstance(given, str | os.PathLike) else contents[name]
        for name, given in inputs.items()
    }
