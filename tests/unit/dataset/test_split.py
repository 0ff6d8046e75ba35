"""Splits: no leak, exact sizes, no dependence on the order of rows; and the check that trusts nothing."""

import hashlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dryfit.common.errors import UserError
from dryfit.common.files import read_report, sha256_file, write_report
from scripts.common.reports import CARRIED, carry
from scripts.dataset import check_splits, split
from scripts.dataset.rows import SPLITS, read_rows, write_rows
from scripts.tasks.shell.cleaning import command_key
from scripts.tasks.shell.embedded import generate, read_refusals
from scripts.tasks.support.keys import request_key
from tests.task_parts import shell

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
Pair = tuple[str, str]


def write(path: Path, pairs: list[Pair]) -> None:
    rows = [
        {"request": request, "command": command, "source": "test", "line": 1}
        for request, command in pairs
    ]
    write_rows(path, pd.DataFrame(rows))


READ = {"pairs": "safe", "external": "external", "benchmark": "tasks"}
WRITTEN = (*SPLITS, "rejected", "harmful", "benchmark")


def run(
    folder: Path, pairs: list[Pair], external: list[Pair] = (), seed: int = 42, **shares: float
) -> dict:
    folder.mkdir(exist_ok=True)
    inputs = {name: str(folder / f"{name}.report") for name in ("screen", "acquire")}
    inputs |= {name: str(folder / f"{file}.jsonl") for name, file in READ.items()}
    write(folder / "safe.jsonl", pairs)
    write(folder / "external.jsonl", external)
    write(folder / "tasks.jsonl", [])
    write_report(inputs["screen"], {}, inputs["pairs"])
    write_report(inputs["acquire"], {}, inputs["external"], inputs["benchmark"])
    outputs = {name: str(folder / f"{name}.jsonl") for name in WRITTEN}
    outputs["report"] = str(folder / "split.json")
    split.main(shell("splitting"), inputs, outputs, {**SHARES, **shares, "seed": seed})
    return read_report(outputs["report"], *(outputs[name] for name in SPLITS))


def named(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().split("\n") if line]


def read(folder: Path, name: str) -> list[Pair]:
    return [(row["request"], row["command"]) for row in named(folder, name)]


def check(folder: Path) -> dict:
    """Check the splits as they lie there, with reports that fit them."""
    rows = sum(len(read(folder, name)) for name in SPLITS)
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
    files = {name: str(folder / f"{name}.jsonl") for name in (*SPLITS, "rejected", "safe")}
    for name, report in reports.items():
        vouched = {"screen": ["safe"], "split": [*SPLITS, "rejected"]}.get(name, [])
        if name == "screen":
            report[CARRIED] = carry(clean=str(folder / "clean-report.json"))
        write_report(folder / f"{name}-report.json", report, *(files[file] for file in vouched))
    check_splits.main(
        shell("splitting"),
        files | {name: str(folder / f"{name}-report.json") for name in reports},
        str(folder / "check.json"),
    )
    return json.loads((folder / "check.json").read_text())


@pytest.mark.thorough
@pytest.mark.parametrize("pairs", [1800, 20_000])
def test_the_embedded_data_splits_exactly_and_without_a_leak(tmp_path, pairs):
    rows = [(row["request"], row["command"]) for row in generate(42, pairs)]
    report = run(tmp_path, rows)
    assert report["sizes"] == {
        "train": pairs * 8 // 10,
        "validation": pairs // 10,
        "test": pairs // 10,
    }
    assert sorted(row for name in SPLITS for row in read(tmp_path, name)) == sorted(rows)
    found = check(tmp_path)
    assert found["total"] == 0
    assert found["rows"] == report["sizes"]
    assert [
        (row["stage"], row["rows"], row["removed"], row["kept"]) for row in found["stages"]
    ] == [
        ("acquire", pairs + 4, 1, pairs + 3),
        ("syntax", pairs + 3, 2, pairs + 1),
        ("near_duplicates", pairs + 1, 0, pairs + 1),
        ("screen", pairs + 1, 1, pairs),
        ("decontaminate", pairs, 0, pairs),
    ]
    # Every intent is there to be learned, and the test asks for most of them.
    for key in (request_key, command_key):
        index = 0 if key is request_key else 1
        line = read_refusals().line
        seen = [
            {key(row[index]) for row in read(tmp_path, name) if row[index] != line}
            for name in SPLITS
        ]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_rows_that_share_a_request_or_a_command_stay_together(tmp_path):
    # A chain: each row shares its request with the one before or its command with the one after.
    chain = [(f"Request {number // 2}?", f"echo  {(number + 1) // 2}") for number in range(30)]
    others = [(f"other {number}", f"cat f{number}") for number in range(270)]
    report = run(tmp_path, [*others, *chain])
    assert report["largest_group"] == 30
    assert report["groups"] == 271
    homes = {name for name in SPLITS for row in read(tmp_path, name) if row in set(chain)}
    assert len(homes) == 1
    assert report["sizes"] == {"train": 240, "validation": 30, "test": 30}
    assert check(tmp_path)["total"] == 0


def write_named(folder: Path, rows: list[dict]) -> dict:
    """Split rows that name more than request and command, with as large a test split as training split."""
    run(
        folder,
        [("request", "ls")] * 10 + [(f"r{number}", f"echo {number}") for number in range(10)],
    )
    write_rows(
        folder / "safe.jsonl", pd.DataFrame([{"source": "test", "line": 1, **row} for row in rows])
    )
    inputs = {name: str(folder / f"{name}.report") for name in ("screen", "acquire")}
    inputs |= {name: str(folder / f"{file}.jsonl") for name, file in READ.items()}
    write_report(inputs["screen"], {}, inputs["pairs"])
    outputs = {name: str(folder / f"{name}.jsonl") for name in WRITTEN} | {
        "report": str(folder / "split.json")
    }
    split.main(
        shell("splitting"),
        inputs,
        outputs,
        {"train": 0.4, "validation": 0.2, "test": 0.4, "seed": 42},
    )
    return {request: name for name in SPLITS for request, _ in read(folder, name)}


def test_an_intent_and_a_family_are_in_one_split_and_a_refusal_holds_nothing_together(tmp_path):
    rows = [
        {"request": f"{intent} {way}", "command": f"ls {intent}{way}", "intent": f"i{intent}"}
        for intent in range(30)
        for way in range(4)
    ]
    rows += [
        {
            "request": f"option {n}",
            "command": f"sort -n {n}",
            "intent": f"j{n}",
            "family": "sort -n",
        }
        for n in range(9)
    ]
    line = read_refusals().line
    rows += [
        {
            "request": f"harm {kind} {n}",
            "command": line,
            "intent": f"h{kind}{n}",
            "family": f"refuse.{kind}",
        }
        for kind in range(12)
        for n in range(3)
    ]
    homes = write_named(tmp_path, rows)
    for name in [
        *(f"{intent} " for intent in range(30)),
        "option ",
        *(f"harm {kind} " for kind in range(12)),
    ]:
        assert len({home for request, home in homes.items() if request.startswith(name)}) == 1, name
    assert len({home for request, home in homes.items() if request.startswith("harm")}) == 3
    assert check(tmp_path)["total"] == 0


def known_rows_beside_others() -> list[dict]:
    rows = [
        {
            "request": f"list {n} {way}",
            "command": f"ls {n}{way}",
            "intent": f"i{n}",
            "split": "train",
        }
        for n in range(20)
        for way in range(3)
    ]
    rows += [
        {"request": f"sort {n}", "command": f"sort {n}", "intent": f"j{n}"} for n in range(120)
    ]
    rows += [
        {
            "request": f"show what is in {n} {way}",
            "command": f"ls known{n}{way}",
            "intent": f"i{n}",
            "split": "known",
        }
        for n in range(20)
        for way in range(2)
    ]
    return rows


def test_rows_of_known_kinds_are_halved_and_told_from_new_ones(tmp_path):
    rows = known_rows_beside_others()
    rows.append(
        {"request": "twin", "command": "ls 00", "intent": "i1", "split": "known"}
    )  # a training row's command
    rows.append(
        {"request": "of none", "command": "pwd", "intent": "k", "split": "known"}
    )  # nothing trains it
    homes = write_named(tmp_path, rows)
    known = [row for row in rows[:-2] if row.get("split") == "known"]
    assert Counter(homes[row["request"]] for row in known) == {"validation": 20, "test": 20}
    assert homes["twin"] == "train"
    kinds = {row["request"]: row.get("kinds") for name in SPLITS for row in named(tmp_path, name)}
    assert {kinds[row["request"]] for row in known} == {"known"}
    assert {kinds[f"sort {n}"] for n in range(120)} == {"new", None}
    assert all((kinds[f"sort {n}"] is None) == (homes[f"sort {n}"] == "train") for n in range(120))
    assert kinds["of none"] in ("new", None)
    assert check(tmp_path)["total"] == 0


def test_the_check_notices_a_known_kind_that_nothing_trains(tmp_path):
    write_named(tmp_path, known_rows_beside_others())
    splits = {name: read_rows(tmp_path / f"{name}.jsonl") for name in SPLITS}
    row = splits["test"].index[splits["test"]["kinds"] == "known"][0]
    splits["test"].loc[row, "intent"] = "never trained"
    write_rows(tmp_path / "test.jsonl", splits["test"])
    write_rows(tmp_path / "safe.jsonl", pd.concat(splits.values()).drop(columns="kinds"))
    with pytest.raises(UserError, match="no training row asks for it") as error:
        check(tmp_path)
    assert error.value.found == "never trained"


def test_refused_rows_stand_among_the_others(tmp_path):
    rows = [(f"harm {number}", read_refusals().line) for number in range(100)]
    run(tmp_path, rows + [(f"request {number}", f"echo {number}") for number in range(300)])
    refused = [command == read_refusals().line for _, command in read(tmp_path, "train")]
    # An evaluation asks the first rows of a split, so these hold as many refusals as the whole.
    assert all(10 < sum(refused[place : place + 80]) < 35 for place in range(0, 320, 80))
    # Side by side as often as chance has it, so of a kind, which the numbers stand for, too.
    assert 40 < sum(left != right for left, right in itertools.pairwise(refused)) < 170
    numbers = [
        int(request.split()[1]) for request, command in read(tmp_path, "train") if command[0] == "f"
    ]
    assert 25 < sum(right > left for left, right in itertools.pairwise(numbers)) < 55


def test_the_check_notices_an_intent_in_two_splits(tmp_path):
    write_named(
        tmp_path,
        [{"request": f"r{n}", "command": f"echo {n}", "intent": f"i{n}"} for n in range(40)],
    )
    splits = {name: read_rows(tmp_path / f"{name}.jsonl") for name in SPLITS}
    splits["train"].loc[0, "intent"] = splits["test"].loc[0, "intent"]
    write_rows(tmp_path / "train.jsonl", splits["train"])
    write_rows(tmp_path / "safe.jsonl", pd.concat(splits.values()).drop(columns="kinds"))
    with pytest.raises(UserError, match="The splits leak: 1 overlap") as error:
        check(tmp_path)
    assert "family or intent in train and test" in str(error.value)


@pytest.mark.thorough
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from("abcdefghijklmnop"), st.sampled_from("abcdefghijklmnopqrstuvwxyz")
        ),
        min_size=40,
        max_size=80,
        unique=True,
    ),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_rows_plays_no_part(tmp_path, pairs, order):
    # Pairs of letters make groups of every size, up to nearly everything.
    rows = [
        (f"request {left}{right if order.random() < 0.7 else ''}", f"echo {right}{left}")
        for left, right in pairs
    ]
    rows = list(dict.fromkeys(rows))
    shuffled = rows[:]
    order.shuffle(shuffled)
    results = []
    for folder, some in ((tmp_path / "a", rows), (tmp_path / "b", shuffled)):
        try:
            run(folder, some)
            results.append([(folder / f"{name}.jsonl").read_bytes() for name in SPLITS])
            assert check(folder)["total"] == 0
        except UserError as error:  # too few groups
            assert "too few groups" in str(error)
            results.append([])
    assert results[0] == results[1]


def test_rows_with_equal_keys_stand_in_one_order(tmp_path):
    rows = [(f"request {number}", f"echo {number}") for number in range(30)]
    same = [
        ("Request 3!", "echo  3"),
        ("request 3.", 'echo "3"'),
        ("REQUEST 3", "echo 3;"),
        ("request  3", "echo '3'"),
    ]
    run(tmp_path / "a", rows + same)
    run(tmp_path / "b", same[::-1] + rows)
    for name in SPLITS:
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (
            tmp_path / "b" / f"{name}.jsonl"
        ).read_bytes()


def test_the_default_splits_stay_the_same_byte_for_byte(tmp_path):
    # Every figure of the default run hangs on which requests are held out, and in which order.
    run(tmp_path, [(row["request"], row["command"]) for row in generate(42, 600)])
    digests = {name: sha256_file(tmp_path / f"{name}.jsonl")[:16] for name in SPLITS}
    assert digests == {
        "train": "c751fb0ff1f118e6",
        "validation": "3d8548ff3f65c465",
        "test": "c775434311ea9797",
    }


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
    def unlike(number: int) -> str:
        return hashlib.sha256(str(number).encode()).hexdigest()

    rows = [(unlike(number), f"echo {number}") for number in range(100)]
    external = [
        (f"{unlike(3).upper()}!", "something"),
        ("something", "echo   '7'"),
        (unlike(9), "echo 9"),
    ]
    external += [("new", "ls"), (f"{unlike(5)} too", "another")]
    report = run(tmp_path, rows, external)
    assert report["decontaminated"] == 4
    assert report["rows"] == 100 == report["kept"] + report["decontaminated"]
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {(row["command"], row["stage"], row["reason"]) for row in rejected} == {
        ("echo 3", "decontaminate", "request in the external test set"),
        ("echo 5", "decontaminate", "nearly its request in the external test set"),
        ("echo 7", "decontaminate", "command in the external test set"),
        ("echo 9", "decontaminate", "request and command in the external test set"),
    }
    with pytest.raises(UserError, match="rejected the last row"):
        run(tmp_path, rows[3:4], external)


@pytest.mark.parametrize(
    ("request_", "near"),
    [
        ("Find all text files in /srv/data!", True),
        ("find all text files in /srv/date", True),
        ("please find all the text files that are in /srv/data", False),
        ("count the lines of notes.txt", False),
        ("ls", False),
        ("abcdefghi", True),  # seven of ten trigrams are shared with abcdefgh
        ("abcdefghj k", False),
    ],
)
def test_which_request_is_nearly_that_of_a_test_set(request_, near):
    others = pd.Series(["find all text files in /srv/data", "list the files here", "abcdefgh"])
    assert split.resembling(shell("splitting"), pd.Series([request_]), others).tolist() == [near]


def test_a_row_of_the_training_split_is_not_held_out_and_its_group_with_it(tmp_path):
    rows = [{"request": f"r{n}", "command": f"ls {n}", "intent": f"i{n // 2}"} for n in range(60)]
    rows = [
        {**row, "split": "train"} if number % 8 == 0 else row for number, row in enumerate(rows)
    ]
    home = write_named(tmp_path, rows)
    for number in range(0, 60, 8):
        assert home[f"r{number}"] == home[f"r{number + 1}"] == "train"
    assert len([name for name in home.values() if name != "train"]) == 36


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ([("a", "ls"), ("b", "pwd"), ("c", "date")], "3 rows in 3 groups, the largest of 1"),
        (
            [(f"request {number}", "ls") for number in range(50)],
            "50 rows in 1 groups, the largest of 50",
        ),
        ([(f"request {number}", f"echo {number}") for number in range(5)], "5 rows in 5 groups"),
    ],
)
def test_too_few_groups_are_an_error_that_says_what_to_change(tmp_path, pairs, found):
    with pytest.raises(UserError, match="too few groups") as error:
        run(tmp_path, pairs)
    for text in (found, "at least 10 rows"):
        assert text in str(error.value)
    assert ("split: {train: 0.5" in str(error.value)) == (
        "1 groups" not in found
    )  # no share divides a single group
    assert not (tmp_path / "train.jsonl").exists() and not (tmp_path / "split.json").exists()


def test_what_the_error_proposes_works(tmp_path):
    sizes = run(
        tmp_path,
        [(f"request {number}", f"echo {number}") for number in range(5)],
        train=0.5,
        test=0.25,
    )
    assert min(sizes["sizes"].values()) >= 1


def test_a_group_that_fills_a_split_to_the_last_row_goes_there():
    # Ten rows with one request among a hundred: the largest group chooses first, and each split has room for it.
    keys = pd.DataFrame(
        {"request": [1] * 10 + list(range(2, 92)), "command": range(101, 201)}, dtype="uint64"
    )
    groups = split.group(keys)
    wishes = set()
    for seed in range(40):
        wish = int(
            np.searchsorted([0.8, 0.9, 1.0], split.shuffled([1], seed)[0] / 2.0**64, side="right")
        )
        chosen = split.assign(keys, groups, SHARES, seed)
        assert set(chosen[:10].tolist()) == {wish}
        assert np.bincount(chosen).tolist() == [80, 10, 10]
        wishes.add(wish)
    assert wishes == {0, 1, 2}


def test_where_large_groups_and_rows_bound_to_training_go():
    # Eleven of a hundred rows: one more than validation and test have room for.
    keys = pd.DataFrame(
        {"request": [1] * 11 + list(range(2, 91)), "command": range(101, 201)}, dtype="uint64"
    )
    for seed in range(40):
        chosen = split.assign(keys, split.group(keys), SHARES, seed)
        assert set(chosen[:11].tolist()) == {0}
        assert np.bincount(chosen).tolist() == [80, 10, 10]
    requests = [number // 10 for number in range(100)]
    keys = pd.DataFrame({"request": requests, "command": range(101, 201)}, dtype="uint64")
    bound = np.arange(100) < 90
    chosen = split.assign(keys, split.group(keys), SHARES, 1, bound)
    assert set(chosen[:90].tolist()) == {0} and chosen[90] > 0


@pytest.mark.parametrize(
    ("left", "right", "form"),
    [
        (("list files", "ls"), ("list files", "ls -l"), "request"),
        (("list files", "ls"), ("show files", "ls"), "command"),
        (("list files", "ls"), ("List  files.", "ls -l"), "normalized request"),
        (("list files", "ls 'a'"), ("show files", 'ls  "a"'), "normalized command"),
    ],
)
@pytest.mark.parametrize(
    "names", [("train", "test"), ("train", "validation"), ("validation", "test")]
)
def test_a_leak_stops_the_run(tmp_path, left, right, form, names):
    rows = {name: [(f"{name} only", f"echo {name}")] for name in SPLITS}
    for name, pair in zip(names, (left, right), strict=True):
        rows[name].append(pair)
    rows["safe"], rows["rejected"] = [*rows["train"], *rows["validation"], *rows["test"]], []
    for name, some in rows.items():
        write(tmp_path / f"{name}.jsonl", some)
    with pytest.raises(UserError, match="leak") as error:
        check(tmp_path)
    assert f"{form} in {names[0]} and {names[1]}" in str(error.value)
    assert not (tmp_path / "check.json").exists()


@pytest.mark.parametrize(
    ("report", "key"),
    [("acquire", "rows"), ("clean", "kept"), ("screen", "kept"), ("screen", "removed")],
)
def test_counts_that_do_not_add_up_stop_the_run(report, key):
    reports = {
        "acquire": {"rows": 9, "rejected": 1},
        "clean": {
            "stages": ["syntax", "near_duplicates"],
            "removed": {"syntax": 2, "near_duplicates": 1},
            "kept": 6,
        },
        "screen": {"removed": 1, "kept": 5},
        "split": {"decontaminated": 1, "sizes": {"train": 3, "test": 1}},
    }
    assert check_splits.stages(**reports)[-1]["kept"] == 4
    reports[report][key] += 1
    with pytest.raises(UserError, match="do not add up"):
        check_splits.stages(**reports)


ATTACK = '{"command": "rm -rf / --no-preserve-root", "line": 1, "request": "Clean up", "source": "test"}\n'


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda lines: [ATTACK, *lines[1:]],
            "did not pass the screen",
        ),  # exchanged: the count is as before
        (lambda lines: [*lines, ATTACK], "did not pass the screen"),
        (lambda lines: [*lines, lines[0]], "did not pass the screen"),
        (lambda lines: lines[1:], "in no split"),
    ],
)
@pytest.mark.parametrize("name", SPLITS)
def test_only_what_the_screen_let_pass_is_in_a_split(tmp_path, name, change, expected):
    run(tmp_path, [(f"request {number}", f"echo {number}") for number in range(40)])
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(change(file.read_text().splitlines(keepends=True))))
    # Even if somebody were to vouch for it.
    with pytest.raises(UserError, match=expected):
        check(tmp_path)


@pytest.mark.parametrize("name", [*SPLITS, "rejected", "safe"])
def test_a_change_after_the_split_is_noticed_by_its_digest(tmp_path, name):
    run(tmp_path, [(f"request {number}", f"echo {number}") for number in range(40)])
    check(tmp_path)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in (*SPLITS, "rejected", "safe")}
    files |= {
        name: str(tmp_path / f"{name}-report.json") for name in ("acquire", "screen", "split")
    }
    with open(files[name], "a") as file:
        file.write(ATTACK)
    with pytest.raises(UserError, match="not what the step that made it has written") as error:
        check_splits.main(shell("splitting"), files, str(tmp_path / "check.json"))
    assert f"rm {files[name]} " in str(error.value)


@pytest.mark.parametrize("name", ["safe.jsonl", "external.jsonl"])
def test_splitting_checks_what_it_reads(tmp_path, name, monkeypatch):
    reader = split.read_report

    def tamper(report: str, *files: str) -> dict:
        with open(tmp_path / name, "a") as file:
            file.write(ATTACK)
        return reader(report, *files)

    monkeypatch.setattr(split, "read_report", tamper)
    with pytest.raises(UserError, match=f"{name} is not what the step that made it has written"):
        run(tmp_path, [(f"request {number}", f"echo {number}") for number in range(40)])


def test_groups_are_those_of_a_naive_search():
    choose = random.Random(5)
    rows = [(choose.randrange(60), choose.randrange(60)) for _ in range(80)]
    found = split.group(pd.DataFrame(rows, columns=["request", "command"], dtype="uint64"))
    naive = list(range(len(rows)))
    while True:
        before = naive[:]
        for first, (left, right) in enumerate(rows):
            for second, (other_left, other_right) in enumerate(rows):
                if left == other_left or right == other_right:
                    naive[first] = naive[second] = min(naive[first], naive[second])
        if naive == before:
            break
    assert pd.factorize(found)[0].tolist() == pd.factorize(pd.Series(naive))[0].tolist()
    assert max(Counter(naive).values()) > 5


def test_groups_too_large_to_divide_are_said_with_what_came_of_it(tmp_path, caplog):
    """One command in most rows: it is one group, and more than any split was to have."""
    pairs = [(f"request {number}", f"echo {number}") for number in range(40)]
    report = run(
        tmp_path,
        pairs + [(f"another {number}", "ls") for number in range(60)],
        train=0.4,
        validation=0.3,
        test=0.3,
    )
    said = [record.getMessage() for record in caplog.records]
    off = {
        name: size
        for name, size in report["sizes"].items()
        if abs(size - report["wanted"][name]) > 1
    }
    assert off and report["largest_group"] == 60 and sum(report["sizes"].values()) == 100
    assert {line.split()[0] for line in said if "too large to divide" in line} == set(off)


@pytest.mark.parametrize("rows", range(1, 40))
def test_the_sizes_that_are_asked_for_add_up_to_the_rows(rows):
    wanted = split.targets(rows, {"train": 0.7, "validation": 0.2, "test": 0.1})
    assert sum(wanted.values()) == rows
    assert all(
        abs(wanted[name] - share * rows) < 1
        for name, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1))
    )
