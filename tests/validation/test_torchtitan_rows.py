"""torchtitan's rows: which were drawn to stay unread, how they are traced, and what the kept table says."""

import statistics

import pytest

from validation.torchtitan_rows import OPEN, ROWS, drawn, highest, places, read, table

TRACES = read()


def test_the_draw_is_that_of_the_first_commit():
    unread = drawn()
    assert sorted(unread) == sorted(
        "table3-float8 table2-cp4 table2-cp8 table4-async table5-1f1b table6-cp4 table6-cp8 h200-64 b200-bf16"
        " b200-mxfp8 llama-nvfp4 llama-bf16 qwen-nvfp4 qwen-mxfp8".split()
    )
    assert not set(unread) & set(OPEN) and len(ROWS) == 30


def test_each_row_is_traced_or_says_why_not():
    assert all((row.settings is None) == bool(row.why_not) for row in ROWS.values())
    traced = {one.id for one in TRACES}
    assert traced <= {name for name, row in ROWS.items() if row.settings}
    for one in TRACES:
        assert (one.half == "unread") == (one.id in drawn())
        assert int(one.place) in places(one.id)


def test_rows_without_tensor_parallel_come_out_within_a_percent_on_h100_and_h200():
    errors = {
        one.id: one.error_percent
        for one in highest(TRACES)
        if "tensor" not in (ROWS[one.id].settings or {})
    }
    plain = [
        abs(error)
        for name, error in errors.items()
        if error is not None and not name.startswith("b200")
    ]
    assert len(plain) >= 9 and max(plain) <= 1.0 and statistics.median(plain) <= 0.5


@pytest.mark.parametrize("half", ["read", "unread"])
def test_the_table_has_each_half(half):
    lines = table(TRACES).splitlines()
    assert sum(line.startswith(f"{half}: ") for line in lines) <= 1
    names = [one for one in highest(TRACES) if one.half == half]
    assert all(any(f"| {one.id}" in line for line in lines) for one in names)
