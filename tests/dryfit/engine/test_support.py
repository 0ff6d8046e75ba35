"""The page's table of what the engine follows is what it does."""

import pytest

pytest.importorskip("trl")
from tests.dryfit.engine.support import PAGE, page_with, table


@pytest.mark.thorough
def test_the_page_says_what_is_followed():
    assert PAGE.read_text(encoding="utf-8") == page_with(table()), (
        "python -m tests.dryfit.engine.support --write"
    )
