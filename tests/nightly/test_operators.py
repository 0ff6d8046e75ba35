"""All of PyTorch's operators that take fp32: the traced CPU step against the real one, to the byte (a minute)."""

import pytest

from validation.operators import known, run

pytest.importorskip(
    "expecttest", reason="PyTorch's list of operators imports it: `pip install expecttest`"
)


def test_no_operator_is_unequal_but_those_that_are_known():
    compared = run()
    for outcome, names in known().items():
        found = {each.name for each in compared if each.outcome == outcome}
        assert found <= names.keys(), found - names.keys()
    assert sum(each.outcome == "equal" for each in compared) >= 600
