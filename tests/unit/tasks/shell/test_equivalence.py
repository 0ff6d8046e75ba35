"""Commands that do the same although they are written in another way, and commands that nearly do."""

import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.tasks.shell.effects import READS, effect
from scripts.tasks.shell.equivalence import canonical, options_table, same
from tests.repository import ROOT

PAIRS = ROOT / "tests" / "data" / "equal_commands.tsv"
# These read what lies outside the trees that are made here, or never end.
OUTSIDE = ("/var", "/etc", "/tmp", "~", "ps aux", "df -", "-f app.log", "-f -n20", "-user root")


def labelled() -> list[tuple[str, str, str]]:
    lines = PAIRS.read_text(encoding="utf-8").splitlines()[1:]
    return [tuple(line.split("\t")[:3]) for line in lines]


ROWS = labelled()


def test_two_hundred_pairs_were_labelled_half_of_them_nearly_equal():
    labels = [label for label, _, _ in ROWS]
    assert labels.count("same") == labels.count("differs") == 100
    assert len(set(ROWS)) == 200


@pytest.mark.parametrize(
    "first, second", [row[1:] for row in ROWS if row[0] == "differs"], ids=" | ".join
)
def test_nearly_equal_commands_are_never_called_equal(first, second):
    assert not same(first, second)


def test_at_most_ten_of_a_hundred_equal_pairs_are_missed():
    missed = [row for row in ROWS if row[0] == "same" and not same(*row[1:])]
    assert len(missed) <= 10, missed


@pytest.mark.parametrize("text", ["", "  ", "echo 'open", "if true"])
def test_what_is_no_command_equals_nothing(text):
    assert not same(text, "ls")
    assert canonical(text) is None


@pytest.mark.parametrize(
    "first, second, equal",
    [
        ("ls -la && rm ./a", "ls -al && rm a", True),
        ("ls -la; rm a", "ls -al && rm a", False),
        ("sudo find . -type f -name x", "sudo find . -name x -type f", True),
        ("sudo -u bob ls -la", "sudo -u bob ls -al", False),  # sudo's options have no row
        ("find . -name x > out", "find . -name x >> out", False),
        ("find . -name x -type f > out", "find . -type f -name x > 'out'", True),
        ('rm -rf "$dir"', "rm -fr $dir", False),
        ('rm -rf "$dir"/a', 'rm -fr "$dir/a"', True),
        ("rm $flags -rf a", "rm -fr $flags a", False),
        ("echo {a,b}", "echo '{a,b}'", False),
        ("find . -exec echo {} +", "find . -exec echo '{}' +", True),
        ("rm ./-x", "rm -x", False),
        ("cat -- -n", "cat -n", False),
        ("touch -- a", "touch a", True),
        ("for f in *; do ls -la /srv; done", "for f in *; do ls -al /srv; done", True),
        ("ls -la $f", "ls -al $f", False),
        ("echo $(ls -la)", "echo $(ls -al)", True),
        ("LC_ALL=C sort -rn a", "sort -nr a", False),
        ("ls --al", "ls -a", False),  # an abbreviation: no rule
    ],
)
def test_rules_hold_inside_lists_pipes_and_loops(first, second, equal):
    assert same(first, second) == equal
    assert same(second, first) == equal


def test_each_letter_of_the_table_is_a_flag_or_takes_a_value_and_long_names_lead_to_them():
    for program, options in options_table().items():
        assert not set(options.flags) & set(options.values), program
        for name, letter in dict(options.long).items():
            known = letter in options.flags or options.takes_value(letter)
            assert known, f"{program} --{name}"
        for group in options.overrides:
            assert set(group) <= set(options.flags + options.values), f"{program}: {group}"


# --- what the rules call equal prints the same ------------------------------------------------------------------------


def tree(folder: Path, seed: int) -> None:
    """A small tree of files that the labelled commands name, with contents, sizes and times that vary."""
    draw = random.Random(seed)
    names = ["a.txt", "b.txt", "a", "notes.txt", "app.log", "logs/x.log", "src/main.c", "src/t.py"]
    names += ["docs/readme.md", "data.csv", "a.csv", "a.tsv", "names.txt", "scores.txt", "main.c"]
    names += ["words.txt", "conf.ini", "table.csv", "ref.txt", "x.jpg", "y.png", "a.bin"]
    words = [
        "foo",
        "error",
        "todo",
        "TODO",
        "x",
        "import",
        "id,1",
        "fail",
        "# c",
        "3",
        "20",
        "root",
    ]
    for name in names:
        if draw.random() < 0.2:
            continue
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        lines = [draw.choice(words) + draw.choice(["", "\tb", ",2", " y"]) for _ in range(30)]
        path.write_text("\n".join(lines) + "\n" if draw.random() < 0.9 else "")
    (folder / "empty").mkdir()


def printed(command: str, folder: Path) -> tuple[int, bytes]:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=20,
        check=False,
    )
    return done.returncode, done.stdout


READING = [
    row[1:]
    for row in ROWS
    if row[0] == "same"
    and effect(row[1]) == READS
    and not any(place in one for place in OUTSIDE for one in row[1:])
]


@pytest.mark.thorough
@pytest.mark.parametrize("first, second", READING, ids=" | ".join)
def test_pairs_that_only_read_print_the_same_on_ten_trees(first, second, tmp_path):
    for seed in range(10):
        folder = tmp_path / str(seed)
        folder.mkdir()
        tree(folder, seed)
        assert printed(first, folder) == printed(second, folder)


TESTS = ["-type f", "-type d", "-empty", "-name '*.txt'", "! -name 'a*'", "-size +0", "-iname 'A*'"]
TESTS += ["\\( -name '*.c' -o -name '*.py' \\)", "-not -empty", "-maxdepth 1", "-links 1"]


@pytest.mark.thorough
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(TESTS), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_a_find_in_another_order_prints_the_same_files(tmp_path_factory, tests, draw):
    folder = tmp_path_factory.mktemp("tree")
    tree(folder, len(" ".join(tests)))
    other = list(tests)
    draw.shuffle(other)
    first, second = "find . " + " ".join(tests), "find . " + " ".join(other)
    if canonical(first) == canonical(second):
        assert printed(first, folder) == printed(second, folder)
    else:  # a global option that is given twice has no rule
        assert tests.count("-maxdepth 1") > 1


LISTING = ["-a", "-l", "-h", "-r", "-t", "-S", "-1", "-R", "-A", "-s", "--all", "--reverse"]


@pytest.mark.thorough
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(LISTING), min_size=2, max_size=5), st.randoms(use_true_random=False)
)
def test_a_listing_with_options_in_another_order_prints_the_same(tmp_path_factory, options, draw):
    folder = tmp_path_factory.mktemp("tree")
    tree(folder, len(options))
    other = list(options)
    draw.shuffle(other)
    first, second = "ls " + " ".join(options), "ls " + " ".join(other)
    if same(first, second):
        assert printed(first, folder) == printed(second, folder)
