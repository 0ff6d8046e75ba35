"""Every size of every module of Liger-Kernel's benchmark: `make test-night`. `make test` has a size of each."""

import pytest

from tests.validation.test_modules import check_peaks
from validation import modules


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(modules.results())


def test_every_module_takes_what_was_measured(rows):
    assert len(rows) == 97 and len({row["module"] for row in modules.read()}) == 19
    check_peaks(rows)
