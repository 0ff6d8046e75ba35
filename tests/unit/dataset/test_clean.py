"""Cleaning: what is normalized, what each stage removes and says, and that the sums add up."""

import hashlib
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_report
from scripts.dataset import clean
from scripts.tasks.shell import syntax
from scripts.tasks.shell.cleaning import command_key, defect
from scripts.tasks.support.keys import clean_block as clean_command
from scripts.tasks.support.keys import clean_request, request_key
from tests.task_parts import shell

ANY_TEXT = st.text(st.characters(), max_size=60)  # half surrogate pairs and control characters too


def run(
    folder: Path, pairs: list[tuple[str, str]], threshold: float | None = 0.9
) -> tuple[list, list, dict]:
    raw = folder / "raw.jsonl"
    with raw.open("w") as handle:
        for line, (request, command) in enumerate(pairs, 1):
            row = {"request": request, "command": command, "source": "test", "line": line}
            handle.write(json.dumps(row) + "\n")
    inputs = {"pairs": str(raw), "acquire": str(folder / "acquire.json")}
    write_report(inputs["acquire"], {}, raw)
    outputs = {"pairs": "clean.jsonl", "rejected": "rejected.jsonl", "report": "clean.json"}
    outputs = {name: str(folder / file) for name, file in outputs.items()}
    clean.main(shell("cleaning"), inputs, outputs, {"near_duplicates": threshold})
    files = outputs["pairs"], outputs["rejected"]
    kept, rejected = (
        [json.loads(line) for line in Path(path).read_text().splitlines()] for path in files
    )
    return kept, rejected, read_report(outputs["report"], *files)


def test_each_stage_names_what_it_removes_and_the_sums_add_up(tmp_path):
    pairs = [
        ("List  the\u00a0files\tin src ", "  ls src\r\n"),  # 1: normalized
        (
            "list the files in src",
            "ls src",
        ),  # 2: kept apart from 1? no: nearly the same, same command
        ("List the files in src", "ls src"),  # 3: after normalizing exactly 1
        ("", "ls"),  # 4
        ("???", "ls"),  # 5
        ("a nul", "ls \0"),  # 6
        ("bells", "echo \a"),  # 7
        ("hidden direction", "ls \u202egpj.exe"),  # 8
        ("lost \ufffd characters", "ls"),  # 9
        ("x" * 5000, "ls"),  # 10
        ("if without an end", "if true; then"),  # 11
        ("open quote", "echo 'a"),  # 12
        ("only a comment", "# nothing"),  # 13
        ("empty command", " \n "),  # 14
        ("list the files in src", "ls -l src"),  # 15: another answer is no duplicate
    ]
    kept, rejected, report = run(tmp_path, pairs)
    assert [(row["line"], row["request"], row["command"]) for row in kept] == [
        (1, "List the files in src", "ls src"),
        (15, "list the files in src", "ls -l src"),
    ]
    assert {row["line"]: (row["stage"], row["reason"]) for row in rejected} == {
        2: ("near_duplicates", "nearly the same request with the same command came before"),
        3: ("exact_duplicates", "the same request and command came before"),
        4: ("validate", "request is empty"),
        5: ("validate", "request has no words"),
        6: ("validate", "command has a NUL byte"),
        7: ("validate", "command has control characters"),
        8: ("validate", "command has control characters"),
        9: ("validate", "request has characters lost in an earlier conversion (U+FFFD)"),
        10: ("validate", "request is longer than 4000 characters"),
        11: ("syntax", "command is not Bash"),
        12: ("syntax", "command is not Bash"),
        13: ("syntax", "command does nothing"),
        14: ("validate", "command is empty"),
    }
    assert all(row["detail"] for row in rejected if row["reason"] == "command is not Bash")
    assert report["rows"] == len(pairs) == report["kept"] + sum(report["removed"].values())
    for stage, count in report["removed"].items():
        assert (
            count
            == sum(report["reasons"][stage].values())
            == sum(row["stage"] == stage for row in rejected)
        )


def test_rows_keep_their_other_fields_and_their_order(tmp_path):
    kept, _, _ = run(
        tmp_path, [(f"show file number {number}", f"cat f{number}") for number in range(50)]
    )
    assert [row["line"] for row in kept] == list(range(1, 51))
    assert set(kept[0]) == {"command", "line", "request", "source"}


def test_near_duplicates_of_several_commands(tmp_path):
    pairs = [
        (f"{start} the files in src{end}", f"ls {start}")
        for start in ("List", "Show", "Print")
        for end in ("", "!")
    ]
    kept, rejected, _ = run(tmp_path, pairs)
    assert [row["line"] for row in kept] == [1, 3, 5]
    assert [row["line"] for row in rejected] == [2, 4, 6]


def test_near_duplicates_are_left_out_or_kept(tmp_path):
    pairs = [("list the files in src", "ls src"), ("List the files in src!", "ls src")]
    assert len(run(tmp_path, pairs, None)[0]) == 2
    assert len(run(tmp_path, pairs, 1.0)[0]) == 1
    assert clean.shingles("ls a") == {" ls", "ls ", "s a", " a "}
    assert clean.similarity(clean.shingles("ls a"), clean.shingles("ls b")) == 2 / 6


@pytest.mark.parametrize("copies", [3, 90])  # compared with each other; found by MinHash
def test_near_duplicates_are_found_in_small_and_large_groups(copies):
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(copies)]
    distinct = [
        " ".join(digest[start : start + 5] for start in range(0, 60, 5)) for digest in digests
    ]
    texts = [
        text
        for pair in zip(distinct, [f"{text} ok" for text in distinct], strict=True)
        for text in pair
    ]
    found = clean.near_duplicates(texts, 0.85)
    assert found == [bool(number % 2) for number in range(2 * copies)]


def test_everything_rejected_names_stage_and_reason(tmp_path):
    with pytest.raises(UserError) as error:
        run(tmp_path, [(f"request {number}", "if") for number in range(5)] + [("", "ls")])
    assert "syntax: command is not Bash (5 of 6 rows)" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acquire.json", "raw.jsonl"]


def test_a_changed_input_is_noticed(tmp_path):
    run(tmp_path, [("list files", "ls")])
    (tmp_path / "raw.jsonl").write_text(
        '{"request": "clean up", "command": "rm -rf /", "source": "test", "line": 1}\n'
    )
    inputs = {"pairs": str(tmp_path / "raw.jsonl"), "acquire": str(tmp_path / "acquire.json")}
    with pytest.raises(
        UserError, match=r"raw\.jsonl is not what the step that made it has written"
    ):
        clean.main(shell("cleaning"), inputs, {}, {"near_duplicates": None})


def test_a_missing_shfmt_fails_and_never_counts_as_valid(tmp_path, monkeypatch):
    bare = tmp_path / "bin"
    bare.mkdir()
    os.symlink("/bin/true", bare / "python")
    monkeypatch.setattr(syntax.sys, "executable", str(bare / "python"))
    monkeypatch.setenv("PATH", str(bare))
    with pytest.raises(UserError, match="shfmt is not installed"):
        run(tmp_path, [("list files", "ls")])
    assert not (tmp_path / "clean.jsonl").exists()


def test_a_failing_shfmt_fails(tmp_path, monkeypatch):
    broken = tmp_path / "shfmt"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(syntax.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="status 3"):
        syntax.check_syntax(["ls"])


@pytest.mark.parametrize(
    ("command", "canonical"),
    [
        ("ls   -la", "ls -la"),
        ("a=(1 2); echo ${a[@]}", "a=(1 2)\necho ${a[@]}"),
        ("cat <<E\nhi\nE", "cat <<E\nhi\nE"),
        ("diff <(sort a) <(sort b)", "diff <(sort a) <(sort b)"),
        ("[[ $a =~ ^b ]] && echo yes", "[[ $a =~ ^b ]] && echo yes"),
        ("cat <<E\nnever closed", None),
        ("echo $(ls", None),
        ("ls |", None),
        ("ls )", None),
        ("for f in *; do", None),
    ],
)
def test_syntax(command, canonical):
    # Between others, so that one command's error can't touch its neighbours.
    found = syntax.check_syntax(["ls", command, "pwd"])
    assert [found[0].canonical, found[2].canonical] == ["ls", "pwd"]
    assert found[1].canonical == canonical
    assert (found[1].error is None) == (canonical is not None)


@pytest.mark.thorough
def test_commands_that_share_a_file_are_judged_as_if_alone(monkeypatch):
    # Pieces that open, close and go on: put together they make right commands out of wrong ones, if one lets them.
    pieces = "ls|if|then|fi|'|\"|\\|<<E|E|(|)|{|}|$(|`|do|done|"
    pieces += "for i in a|case x in|esac|;;|;|&&|!|[[|]]|a=(|#|x=|((|x)|<|&"
    pieces = [*pieces.split("|"), "|", "\n", "while", "f()", "coproc", "${"]
    choose = random.Random(1)
    commands = [
        choose.choice(["", " "]).join(choose.choices(pieces, k=choose.randint(1, 6)))
        for _ in range(2000)
    ]
    together = syntax.check_syntax(commands)
    monkeypatch.setattr(syntax, "_COMMANDS_A_FILE", 1)
    alone = syntax.check_syntax(commands)
    assert [found.canonical for found in together] == [found.canonical for found in alone]
    assert 100 < sum(found.error is None for found in alone) < 1000


@pytest.mark.thorough
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pairs=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=8))
def test_no_text_crashes_the_cleaning(tmp_path, pairs):
    # Half surrogate pairs never get past reading, where they can't be stored.
    pairs = [tuple(text.encode("utf-8", "replace").decode() for text in pair) for pair in pairs]
    try:
        kept, rejected, report = run(tmp_path, [("list files", "ls"), *pairs])
    except UserError as error:
        pytest.fail(str(error))
    assert report["rows"] == len(pairs) + 1 == len(kept) + len(rejected)
    for row in kept:
        assert defect(row["request"], row["command"]) is None


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_cleaning_twice_changes_nothing(text):
    for function in (clean_request, clean_command):
        once = function(text)
        assert function(once) == once
        assert unicodedata.is_normalized("NFC", once)
    for key in (request_key, command_key):
        assert key(text) == key(f" {text} ")


@settings(max_examples=100, deadline=None)
@given(command=ANY_TEXT)
def test_the_syntax_check_takes_any_text(command):
    (found,) = syntax.check_syntax([command])
    assert (found.canonical is None) != (found.error is None)


@pytest.mark.parametrize(
    ("left", "right", "key"),
    [
        ("List files in 'src'.", "list  FILES in src", request_key),
        ("How big is src?", "how big is src", request_key),
        ("ls -l|wc -l", "ls -l  |  wc -l", command_key),
        ("echo 'a b'", 'echo "a b"', command_key),
        ("a; b;", "a\nb", command_key),
    ],
)
def test_keys_see_the_same_in_different_dress(left, right, key):
    assert key(left) == key(right)


@pytest.mark.parametrize(
    ("left", "right", "key"),
    [
        ("list a.txt", "list atxt", request_key),
        ("ls a", "ls b", command_key),
        ("a | b", "a || b", command_key),
    ],
)
def test_keys_tell_different_things_apart(left, right, key):
    assert key(left) != key(right)
