"""What documents and figures are made from: the files of a rule, by the names of its inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain
from typing import Any

from dryfit.common.files import read_json, read_jsonl, read_report, read_reports, write_report

PROJECT_OWN = ("validation",)  # comes with the project; no rule wrote it, so that no report lists it


def write_record(inputs: Mapping[str, Any], record: str | os.PathLike) -> None:
    """Write the contents of inputs into one report, by their names, beside the paths that they came from."""
    paths = {name: value if isinstance(value, str) else list(map(str, value)) for name, value in inputs.items()}
    write_report(record, {"contents": gather(paths), "paths": paths}, indent=None)


def read_record(record: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The paths and the contents that :func:`write_record` wrote, by name."""
    written = read_report(record)
    return written["paths"], written["contents"]


def gather(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Read inputs: reports, and the rows of the JSON lines that they vouch for; other files stay paths.

    Raises
    ------
    UserError
        Naming the file to delete, where one is not what its step has written.
    """
    paths = {name: [value] if isinstance(value, str | os.PathLike) else list(value) for name, value in inputs.items()}
    reports = read_reports(chain.from_iterable(listed for name, listed in paths.items() if name not in PROJECT_OWN))

    def read(path: str) -> Any:
        if path.endswith(".jsonl"):
            return list(read_jsonl(path))
        return reports[path] if path in reports else read_json(path) if path.endswith(".json") else path

    contents = {name: [read(str(path)) for path in listed] for name, listed in paths.items()}
    return {name: listed if isinstance(inputs[name], list | tuple) else listed[0] for name, listed in contents.items()}
