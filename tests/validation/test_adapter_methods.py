"""The table of PEFT's methods in docs/memory-core.md names every one."""

import re

from dryfit.step.adapters import IMPOSSIBLE
from validation.adapter_methods import PAGE, methods


def test_the_page_names_every_method_of_peft():
    found = re.findall(
        r"^\| ([\w, ]+) \| (yes|no) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    rows = {method: traced for names, traced in found for method in names.split(", ")}
    assert sorted(rows) == methods(), (
        "renew the table: python -m validation.adapter_methods --write"
    )
    assert {method for method, traced in rows.items() if traced == "no"} >= set(IMPOSSIBLE)
