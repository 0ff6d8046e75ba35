"""What a document must have before it is written: found out here, without a network, instead of by its readers."""

import os
import re
from pathlib import Path

from dryfit.common.errors import UserError

# What a renderer leaves behind when it had nothing to say.
_LEFTOVERS = re.compile(
    r"\[More Information Needed\]|<built-in|<jinja2|\{\{|\{%|[|:=(] ?(None|nan)\b"
)
_FENCES = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
_SPANS = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_IMAGES = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """The document without code: what is quoted there is data and may read as it likes."""
    return _SPANS.sub("", _FENCES.sub("", text))


def check_document(text: str, path: Path) -> None:
    """Refuse leftovers of the rendering and figures that are not there.

    UserError: naming the line.
    """
    if path.suffix == ".html":
        return  # its figures are inside; its escaping leaves no way to tell data from a leftover
    plain = prose(text)
    if leftover := _LEFTOVERS.search(plain):
        line = plain.splitlines()[plain.count("\n", 0, leftover.start())]
        raise UserError(
            "The document has a place that was not filled in.", where=path, found=line.strip()
        )
    missing = [
        link
        for link in _IMAGES.findall(plain)
        if not Path(os.path.normpath(path.parent / link)).is_file()
    ]
    if missing:
        raise UserError(
            "The document shows a figure that does not exist.", where=path, found=missing[0]
        )
