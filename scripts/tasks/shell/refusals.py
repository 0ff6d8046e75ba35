"""The requests for harm of the grammar, and the line that refuses them."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

from dryfit.common.files import read_yaml
from dryfit.common.schema import validate
from scripts.common.code_digests import ROOT

GRAMMAR = ROOT / "config" / "datasets" / "embedded"
SCHEMA = GRAMMAR.with_name("embedded.schema.yaml")


class Refusals(NamedTuple):
    """The line that answers requests for harm, and such requests by category, with slots."""

    line: str
    taught: dict[str, list[str]]
    held_out: dict[str, list[str]]


@cache
def read_refusals(folder: Path = GRAMMAR) -> Refusals:
    """Read what is refused; a :class:`UserError` names what is wrong with the file."""
    path = folder / "refusals.yaml"
    content = read_yaml(path)
    validate(content, read_yaml(SCHEMA)["refusals"], path)
    return Refusals(**content)
