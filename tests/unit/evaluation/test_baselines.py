"""What training has to beat: the nearest row with the request's values, and the rows that the base is shown."""

import pytest

from scripts.common.requests import nearest_rows, requests_of, shots_of
from scripts.common.statistics import by_unit, sign_flip_p
from scripts.evaluation.baselines import plain_words, with_values_of

ROWS = [
    {"request": "list the files in docs", "command": "ls docs"},
    {"request": "list the files in /var/log by time", "command": "ls -t /var/log"},
    {"request": "count the lines of notes.txt", "command": "wc -l notes.txt"},
    {
        "request": "Search notes.txt for ERROR, with line numbers",
        "command": "grep -n 'ERROR' notes.txt",
    },
    {"request": "show the first 5 lines of notes.txt", "command": "head -n 5 notes.txt"},
]


@pytest.mark.parametrize(
    ("request_", "nearest"),
    [
        ("List the files of src", 0),
        ("list files in /opt by time", 1),
        ("counting lines of a.csv", 2),
        ("search b.log for WARN", 3),
        ("xyz", 0),  # like none: the first
    ],
)
def test_the_nearest_row(request_, nearest):
    (found,) = nearest_rows([request_], [row["request"] for row in ROWS], 3)
    assert found[0] == nearest and len(set(found)) == 3


def test_shots_end_with_the_nearest_row_and_a_program_is_no_value():
    assert [shot[1] for shot in shots_of([[2, 0]], ROWS)[0]] == ["ls docs", "wc -l notes.txt"]
    row = {"request": "sort names.txt", "command": "sort names.txt"}
    assert with_values_of("order list.txt", row, plain_words([row])) == "sort list.txt"


@pytest.mark.parametrize(
    ("request_", "row", "command"),
    [
        ("list the files in src", 0, "ls src"),
        ("list the files in /opt by time", 1, "ls -t /opt"),
        ("list the files in this folder by time", 1, "ls -t /var/log"),  # no word of the same shape
        ("how many lines has orders.csv?", 2, "wc -l orders.csv"),
        ("search a.log for WARN, with line numbers", 3, "grep -n 'WARN' a.log"),
        ("show the first 20 lines of a.log", 4, "head -n 20 a.log"),
        ("show the first 5 lines of notes.txt", 4, "head -n 5 notes.txt"),
    ],
)
def test_the_values_of_the_request_take_the_places_of_the_rows(request_, row, command):
    assert with_values_of(request_, ROWS[row], plain_words(ROWS)) == command


@pytest.mark.parametrize(
    ("requests", "benchmark", "found"),
    [(None, None, "a1 a2 b1 c1 t1 t2"), (1, 1, "a1 b1 c1 t1"), (2, 0, "a1 a2 b1 c1")],
)
def test_so_many_requests_of_each_test_are_asked(requests, benchmark, found):
    split = [
        {"request": name, "kinds": kinds}
        for name, kinds in (("a1", "known"), ("b1", "new"), ("c1", None), ("a2", "known"))
    ]
    asked = requests_of(
        split,
        [{"request": "t1"}, {"request": "t2"}],
        {"requests": requests, "benchmark": benchmark},
    )
    assert sorted(row["request"] for row in asked) == found.split()
    assert {row["request"]: row["test"] for row in asked}["c1"] == "held_out"


def test_rows_of_one_unit_count_once_and_a_row_without_a_unit_alone():
    means, weights = by_unit([1.0, 0.0, 1.0, 1.0], ["a", "a", None, None])
    assert (means, weights) == ([0.5, 1.0, 1.0], [2.0, 1.0, 1.0])
    assert by_unit([2.0, 5.0], ["a", "a"], [3.0, 1.0]) == ([2.75], [4.0])


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([], 1.0),
        ([0.0, 0.0], 1.0),
        ([1.0], 1.0),
        ([1.0] * 8, 2 / 2**8),
        ([1.0, -1.0], 1.0),
        ([-1.0] * 8, 2 / 2**8),
    ],
)
def test_the_p_value_is_that_of_flipped_signs(differences, p):
    assert sign_flip_p(differences, [1.0] * len(differences)) == pytest.approx(p)
