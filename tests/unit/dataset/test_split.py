"""Splits: no leak, exact sizes, no dependence on the order of rows; and the check that trusts nothing."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.common.errors import UserError
from scripts.dataset import check_splits, split
from scripts.dataset.embedded import generate
from scripts.dataset.text import command_key, request_key

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
Pair = tuple[str, str]


def run(folder: Path, pairs: list[Pair], external: list[Pair] = (), seed: int = 42, **shares: float) -> dict:
    folder.mkdir(exist_ok=True)
    for name, rows in (("safe", pairs), ("external", external)):
        lines = [json.dumps({"request": request, "command": command}) + "\n" for request, command in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    outputs = {name: str(folder / f"{name}.jsonl") for name in (*split.SPLITS, "rejected")}
    outputs["report"] = str(folder / "split.json")
    settings = {**SHARES, **shares, "seed": seed}
    split.main(str(folder / "safe.jsonl"), str(folder / "external.jsonl"), outputs, settings)
    return json.loads(Path(outputs["report"]).read_text())


def read(folder: Path, name: str) -> list[Pair]:
    rows = (json.loads(line) for line in (folder / f"{name}.jsonl").read_text().split("\n") if line)
    return [(row["request"], row["command"]) for row in rows]


def check(folder: Path) -> dict:
    splits = {name: str(folder / f"{name}.jsonl") for name in split.SPLITS}
    rows = sum(len(read(folder, name)) for name in split.SPLITS)
    reports = {
        "acquire": {"rows": rows + 3, "rejected": 1},
        "clean": {
            "stages": ["syntax", "near_duplicates"],
            "removed": {"syntax": 2, "near_duplicates": 0},
            "kept": rows + 1,
        },
        "screen": {"removed": 1, "kept": rows},
        "split": {"decontaminated": 0, "sizes": {"all": rows}},
    }
    for name, report in reports.items():
        (folder / f"{name}.report").write_text(json.dumps(report))
    paths = {name: str(folder / f"{name}.report") for name in reports}
    check_splits.main(splits, paths, str(folder / "check.json"))
    return json.loads((folder / "check.json").read_text())


@pytest.mark.parametrize("pairs", [4800, 20_000])
def test_the_embedded_data_splits_exactly_and_without_a_leak(tmp_path, pairs):
    rows = [(row["request"], row["command"]) for row in generate(42, pairs)]
    report = run(tmp_path, rows)
    assert report["sizes"] == {"train": pairs * 8 // 10, "validation": pairs // 10, "test": pairs // 10}
    assert sorted(row for name in split.SPLITS for row in read(tmp_path, name)) == sorted(rows)
    found = check(tmp_path)
    assert found["total"] == 0
    assert found["rows"] == report["sizes"]
    assert [(row["stage"], row["rows"], row["removed"], row["kept"]) for row in found["stages"]] == [
        ("acquire", pairs + 4, 1, pairs + 3),
        ("syntax", pairs + 3, 2, pairs + 1),
        ("near_duplicates", pairs + 1, 0, pairs + 1),
        ("screen", pairs + 1, 1, pairs),
        ("decontaminate", pairs, 0, pairs),
    ]
    # Every intent is there to be learned, and the test asks for most of them.
    for key in (request_key, command_key):
        index = 0 if key is request_key else 1
        seen = [{key(row[index]) for row in read(tmp_path, name)} for name in split.SPLITS]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_rows_that_share_a_request_or_a_command_stay_together(tmp_path):
    # A chain: each row shares its request with the one before or its command with the one after.
    chain = [(f"Request {number // 2}?", f"echo  {(number + 1) // 2}") for number in range(30)]
    others = [(f"other {number}", f"cat f{number}") for number in range(270)]
    report = run(tmp_path, [*others, *chain])
    assert report["largest_group"] == 30
    assert report["groups"] == 271
    homes = {name for name in split.SPLITS for row in read(tmp_path, name) if row in set(chain)}
    assert len(homes) == 1
    assert report["sizes"] == {"train": 240, "validation": 30, "test": 30}
    assert check(tmp_path)["total"] == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from("abcdefghijklmnop"), st.sampled_from("abcdefghijklmnopqrstuvwxyz")),
        min_size=40,
        max_size=80,
        unique=True,
    ),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_rows_plays_no_part(tmp_path, pairs, order):
    # Pairs of letters make groups of every size, up to nearly everything.
    rows = [(f"request {left}{right if order.random() < 0.7 else ''}", f"echo {right}{left}") for left, right in pairs]
    rows = list(dict.fromkeys(rows))
    shuffled = rows[:]
    order.shuffle(shuffled)
    results = []
    for folder, some in ((tmp_path / "a", rows), (tmp_path / "b", shuffled)):
        try:
            run(folder, some)
            results.append([(folder / f"{name}.jsonl").read_bytes() for name in split.SPLITS])
            assert check(folder)["total"] == 0
        except UserError as error:  # too few groups
            assert "too few groups" in str(error)
            results.append([])
    assert results[0] == results[1]


def test_the_seed_decides(tmp_path):
    rows = [(f"request {number}", f"echo {number}") for number in range(200)]
    run(tmp_path / "a", rows)
    run(tmp_path / "b", rows, seed=43)
    assert read(tmp_path / "a", "test") != read(tmp_path / "b", "test")
    # The rows of a split come shuffled, so the first of them are a fair sample.
    numbers = [int(command.split()[1]) for _, command in read(tmp_path / "a", "train")]
    assert numbers != sorted(numbers)


def test_more_rows_leave_most_rows_where_they_were(tmp_path):
    rows = [(f"request {number}", f"echo {number}") for number in range(2000)]
    run(tmp_path / "a", rows[:1800])
    run(tmp_path / "b", rows)
    before, after = (set(read(tmp_path / folder, "train")) for folder in "ab")
    assert len(before - after) < 0.05 * len(before)


@pytest.mark.parametrize("rows", [10, 11, 37, 101, 999])
def test_sizes_add_up_for_any_number(tmp_path, rows):
    report = run(tmp_path, [(f"request {number}", f"echo {number}") for number in range(rows)])
    assert sum(report["sizes"].values()) == rows
    for name, share in SHARES.items():
        assert abs(report["sizes"][name] - rows * share) < 1


def test_rows_of_an_external_test_set_are_taken_out(tmp_path):
    rows = [(f"request {number}", f"echo {number}") for number in range(100)]
    external = [("Request 3!", "something"), ("something", "echo   '7'"), ("request 9", "echo 9"), ("new", "ls")]
    report = run(tmp_path, rows, external)
    assert report["decontaminated"] == 3
    assert report["rows"] == 100 == report["kept"] + report["decontaminated"]
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {(row["command"], row["stage"], row["reason"]) for row in rejected} == {
        ("echo 3", "decontaminate", "request in the external test set"),
        ("echo 7", "decontaminate", "command in the external test set"),
        ("echo 9", "decontaminate", "request and command in the external test set"),
    }
    with pytest.raises(UserError, match="rejected the last row"):
        run(tmp_path, rows[3:4], external)


def test_too_few_groups(tmp_path):
    with pytest.raises(UserError, match="too few groups"):
        run(tmp_path, [(f"request {number}", "ls") for number in range(50)])


def test_shares_that_do_not_add_up(tmp_path):
    with pytest.raises(UserError, match="do not add up to 1"):
        run(tmp_path, [("a", "ls")], test=0.3)


@pytest.mark.parametrize(
    ("left", "right", "form"),
    [
        (("list files", "ls"), ("list files", "ls -l"), "request"),
        (("list files", "ls"), ("show files", "ls"), "command"),
        (("list files", "ls"), ("List  files.", "ls -l"), "normalized request"),
        (("list files", "ls 'a'"), ("show files", 'ls  "a"'), "normalized command"),
    ],
)
@pytest.mark.parametrize("names", [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_a_leak_stops_the_run(tmp_path, left, right, form, names):
    rows = {name: [{"request": f"{name} only", "command": f"echo {name}"}] for name in split.SPLITS}
    for name, (request, command) in zip(names, (left, right), strict=True):
        rows[name].append({"request": request, "command": command})
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    with pytest.raises(UserError, match="leak") as error:
        check(tmp_path)
    assert f"{form} in {names[0]} and {names[1]}" in str(error.value)
    assert not (tmp_path / "check.json").exists()


@pytest.mark.parametrize(
    ("report", "key"), [("acquire", "rows"), ("clean", "kept"), ("screen", "kept"), ("screen", "removed")]
)
def test_counts_that_do_not_add_up_stop_the_run(report, key):
    reports = {
        "acquire": {"rows": 9, "rejected": 1},
        "clean": {"stages": ["syntax", "near_duplicates"], "removed": {"syntax": 2, "near_duplicates": 1}, "kept": 6},
        "screen": {"removed": 1, "kept": 5},
        "split": {"decontaminated": 1, "sizes": {"train": 3, "test": 1}},
    }
    assert check_splits.stages(**reports)[-1]["kept"] == 4
    reports[report][key] += 1
    with pytest.raises(UserError, match="do not add up"):
        check_splits.stages(**reports)


def test_groups_are_those_of_a_naive_search():
    choose = random.Random(5)
    rows = [(choose.randrange(60), choose.randrange(60)) for _ in range(80)]
    import array

    found = split.group(array.array("Q", [left for left, _ in rows]), array.array("Q", [right for _, right in rows]))
    naive = list(range(len(rows)))
    while True:
        before = naive[:]
        for first, (left, right) in enumerate(rows):
            for second, (other_left, other_right) in enumerate(rows):
                if left == other_left or right == other_right:
                    naive[first] = naive[second] = min(naive[first], naive[second])
        if naive == before:
            break
    assert found.tolist() == naive
    assert max(Counter(naive).values()) > 5
