"""What a document must have before it is written: found out here, without a network, instead of by its readers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from dryfit.common.errors import UserError

# Keys that the Hub, or a reader who filters by them, can't do without.
REQUIRED_METADATA = ("license", "language", "library_name", "pipeline_tag", "tags", "metrics", "model-index")
# Sections of the Hub's model card template, and those that this project adds.
REQUIRED_SECTIONS = (
    "Model Details",
    "Uses",
    "Bias, Risks, and Limitations",
    "How to Get Started with the Model",
    "Training Details",
    "Evaluation",
    "Memory",
    "Environmental Impact",
    "Technical Specifications",
    "Merge Verification",
    "Reproduction",
    "Citation",
    "Model Card Authors",
    "Model Card Contact",
    "Where Every Number Comes From",
)
# What a renderer leaves behind when it had nothing to say.
_LEFTOVERS = re.compile(r"\[More Information Needed\]|<built-in|<jinja2|\{\{|\{%|[|:=(] ?(None|nan)\b")
_FENCES = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
_SPANS = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_IMAGES = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """The document without code: what is quoted there is data and may read as it likes."""
    return _SPANS.sub("", _FENCES.sub("", text))


def check_document(text: str, path: Path) -> None:
    """Refuse leftovers of the rendering and figures that are not there.

    Raises
    ------
    UserError
        Naming the line.
    """
    if path.suffix == ".html":
        return  # its figures are inside; its escaping leaves no way to tell data from a leftover
    plain = prose(text)
    if leftover := _LEFTOVERS.search(plain):
        line = plain.splitlines()[plain.count("\n", 0, leftover.start())]
        raise UserError("The document has a place that was not filled in.", where=path, found=line.strip())
    missing = [link for link in _IMAGES.findall(plain) if not Path(os.path.normpath(path.parent / link)).is_file()]
    if missing:
        raise UserError("The document shows a figure that does not exist.", where=path, found=missing[0])


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its body."""
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if match is None:
        raise UserError("The card does not begin with a block of YAML between two lines of dashes.", where="the card")
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise UserError(f"The card's metadata is not YAML: {error}", where="the card") from None
    return metadata, text[match.end() :]


def check_card(text: str) -> None:
    """Metadata that parses, with every required key and a complete model-index; every section, each once.

    Raises
    ------
    UserError
        Naming what is missing.
    """
    metadata, body = split_card(text)
    absent = [key for key in REQUIRED_METADATA if not metadata.get(key)]
    if absent:
        raise UserError("The card's metadata lacks a key.", where="the card", found=absent)
    for entry in metadata["model-index"]:
        for result in entry["results"]:
            complete = (
                entry.get("name")
                and result.get("task", {}).get("type")
                and result.get("dataset", {}).get("type")
                and result.get("dataset", {}).get("name")
                and result.get("metrics")
                and all("type" in metric and "value" in metric for metric in result["metrics"])
            )
            if not complete:
                raise UserError("A result of the model-index is not complete.", where="the card", found=result)
    headings = re.findall(r"^## (.+)$", prose(body), re.MULTILINE)
    wrong = [section for section in REQUIRED_SECTIONS if headings.count(section) != 1]
    if wrong:
        raise UserError("The card lacks a section, or has it twice.", where="the card", found=wrong)
