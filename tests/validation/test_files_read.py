"""What the document says of torchtune's recipes and Unsloth's notebooks is what the tables count."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "other-tools.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("table", "column"), [("torchtune_recipes", 1), ("unsloth_notebooks", 2)])
def test_the_document_counts_the_tables(table: str, column: int) -> None:
    with (ROOT / "validation" / "data" / f"{table}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = Counter(row["outcome"].partition(":")[0] if row["model"] else "refused" for row in rows)
    section = DOCUMENT.partition("\n## torchtune's recipes")[2].partition("\n## ")[0]
    said = {
        match[1]: int(match.groups()[column])
        for match in re.finditer(r"\| (.+?) \| (\d+) \| (\d+) \|\n", section)
    }
    assert said["files"] == len(rows)
    assert (said["read"], said["read once a size is named"]) == (kinds["read"], kinds["open"])
    assert said["refused with the reason"] == kinds["refused"]
