"""Times of compiled steps: which rows were drawn, and that the table shows what is kept."""

from validation import compiled_times
from validation.compiled_times import ATTENDED, TORCHTITAN, drawn, kept, table
from validation.modded_nanogpt import OPENED


def test_half_of_the_rows_were_drawn_to_stay_unread():
    assert drawn() == [
        "2025-01-04_SoftCap",
        "2025-01-16_Sub3Min",
        "2025-01-26_BatchSize",
        "torchtitan-8-compiled",
    ]
    rows = {row["id"]: row for row in kept()}
    assert set(rows) == {*OPENED, *TORCHTITAN}
    assert {name for name, row in rows.items() if row["known"] == "unread"} == set(drawn())


def test_the_table_shows_every_kept_row_with_its_error():
    lines = table().splitlines()
    assert len(lines) == 2 + len(kept())
    for row, line in zip(kept(), lines[2:], strict=True):
        assert line.startswith(f"| {row['id']} | {row['known']} |")
        assert line.endswith(" % |") == bool(row["predicted_seconds"] and row["measured_seconds"])


def test_windows_of_attention_are_those_of_the_programs():
    assert set(ATTENDED) == set(OPENED)
    assert compiled_times.WINDOW == (128 + 1792) / 2
