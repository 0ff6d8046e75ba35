"""Sizes for people: GiB, and GB nowhere but where the rule of thumb is quoted."""

import re

from dryfit.common.text import gib, size_text
from tests.repository import ROOT

# What quotes the rule of thumb, reads a size that a person typed, or says what stands on a GPU's box.
MAY_SAY_GB = {
    "scripts/documents/render.py",
    "scripts/documents/draw.py",
    "scripts/documents/traced_values.py",
    "dryfit/ask/text.py",  # traffic, beside links that are sold in GB a second
}


def test_sizes():
    assert (gib(3 * 2**29), gib(2**30, 0), size_text(2**30 // 10 + 1), size_text(2**20)) == (
        "1.50 GiB",
        "1 GiB",
        "0.10 GiB",
        "1.0 MiB",
    )


def test_no_command_prints_gigabytes_of_ten_to_the_ninth():
    found = {
        path.relative_to(ROOT).as_posix()
        for house in ("scripts", "dryfit", "validation")
        for path in (ROOT / house).rglob("*.py")
        if re.search(r"1e9[^\n]*\} GB|%\.\df GB", path.read_text(encoding="utf-8"))
    }
    assert found <= MAY_SAY_GB
