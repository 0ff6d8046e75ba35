"""The table of PEFT's methods in docs/memory-core.md names every one."""

import re

from dryfit.step.adapters import IMPOSSIBLE
from validation.adapter_methods import EXACT, PAGE, methods


def test_the_page_names_every_method_of_peft():
    page = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| (yes|no) \|", page, re.MULTILINE))
    exact = re.search(rf"^Traced, {EXACT}: (.*?)\.\n\n", page, re.MULTILINE | re.DOTALL).group(1)
    rows |= dict.fromkeys(re.split(r",\s+", exact), "yes")
    assert sorted(rows) == methods(), "renew the table: python -m validation.adapter_methods --write"
    assert {method for method, traced in rows.items() if traced == "no"} >= set(IMPOSSIBLE)
