"""Refusals as rows: what is wrong, a word of the message, what to write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.files import read_yaml


def refusals(name: str, **models: Mapping[str, Any]) -> dict[str, list]:
    """A table beside this file, by its first cell; a model is one of ``models``, or a change of it: ``like: NAME``."""
    rows = read_yaml(Path(__file__).with_name(f"{name}.yaml"))
    for fields in (cell for row in rows for cell in row if isinstance(cell, dict)):
        model = fields.get("model")
        if isinstance(model, str) and model in models:
            fields["model"] = dict(models[model])
        elif isinstance(model, dict) and "like" in model:
            fields["model"] = {
                **models[model["like"]],
                **{key: model[key] for key in model if key != "like"},
            }
    return {name: row for name, *row in rows}
