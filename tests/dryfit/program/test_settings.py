"""Where a program's numbers stand, and `dryfit run --longest`."""

import json

import pytest

from dryfit.common.errors import UserError
from dryfit.program.request import ProgramRequest
from dryfit.program.settings import length, setting
from tests.dryfit.program.test_largest import PROGRAM
from tests.dryfit.program.test_run import asked, refused


@pytest.mark.parametrize(
    "words",
    [
        ("--length=8", "x"),
        ("--length", "8"),
        ("length=8",),
        ("x", "-length=8"),
        ("--data.length=8",),
        ("--data.length", "8"),
    ],
)
def test_an_argument_takes_another_value(words):
    found = setting(ProgramRequest("train.py", words), "length")
    assert found.value == 8
    assert found.changed(16).arguments == tuple(word.replace("8", "16") for word in words)


@pytest.mark.parametrize(
    "words", [(), ("--lengths=8",), ("--length=long",), ("--length",), ("length", "8")]
)
def test_a_number_that_is_not_there_is_named(words):
    with pytest.raises(UserError, match="whole number"):
        setting(ProgramRequest("train.py", words), "length")


FILES = {
    "train.yaml": ("# of a run\ndata:\n  sequence_len: 1_024  # tokens\n  rows: 8\n", 1024, 3),
    "train.json": ('{\n "cutoff_len": 2048,\n "rows": 8\n}\n', 2048, 2),
    "train.toml": ("[training]\nseq_len = 8192\n", 8192, 2),
    "small.py": ("block_size = 256 # of tokens\nbatch_size = 64\n", 256, 1),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["{}", "--config={}"])
def test_a_file_among_the_arguments_takes_another_value(tmp_path, monkeypatch, name, form):
    text, value, line = FILES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    (tmp_path / "train.py").write_text("print()\n")
    found = length(ProgramRequest("train.py", (form.format(name),)))
    assert found.value == value and found.where == f"{name}:{line}"
    written = text.splitlines()[line - 1]
    spelled = "1_024" if name == "train.yaml" else str(value)
    changed = found.changed(64).files
    assert list(changed) == [name]
    assert changed[name].splitlines()[line - 1] == written.replace(spelled, "64")


PROGRAMS = {
    'parser.add_argument("--max-length", "-l", type=int, default=512)': (
        "max_length",
        512,
        "--max-length=64",
    ),
    "class Arguments:\n    seq_length: int | None = field(default=128)": (
        "seq_length",
        128,
        "--seq_length=64",
    ),
    "class Hyperparameters:\n    sequence_length: int = 4096": ("sequence_length", 4096, None),
    "ähnlich = 1; block_size = 1024": ("block_size", 1024, None),
}


@pytest.mark.parametrize("text", PROGRAMS)
def test_the_program_itself_says_its_length(tmp_path, monkeypatch, text):
    name, value, option = PROGRAMS[text]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(f"import x\n{text}\nother = block_sizes = 3\n")
    found = length(ProgramRequest("train.py", ("--rows=3",)))
    assert (found.name, found.value) == (name, value) and found.where.startswith("train.py:")
    changed = found.changed(64)
    if option:
        assert changed.arguments == ("--rows=3", option) and not changed.files
    else:
        assert changed.files["train.py"].splitlines()[1:] == [
            *text.replace(str(value), "64").splitlines(),
            "other = block_sizes = 3",
        ]


def test_arguments_come_before_the_programs_own_text_and_made_up_rows_follow(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("block_size = 1024\n")
    found = length(ProgramRequest("train.py", ("--max_length=512",), batch=(8, 512)))
    assert found.name == "max_length" and found.changed(640).batch == (8, 640)
    assert found.changed(640).arguments == ("--max_length=640",)
    (tmp_path / "train.py").write_text("print()\n")
    assert length(ProgramRequest("train.py", batch=(8, 512))).changed(64).batch == (8, 64)


def test_a_program_in_another_encoding_says_nothing_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\nblock_size = 1024\n")
    assert length(ProgramRequest("train.py", ("--max_length=512",))).name == "max_length"
    with pytest.raises(UserError, match="how long its rows are"):
        length(ProgramRequest("train.py"))


@pytest.mark.thorough
def test_a_length_that_stands_elsewhere_is_not_changed(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("block_size = 1024\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="a copy of this folder alone"):
        length(ProgramRequest(str(tmp_path / "train.py")))


@pytest.mark.thorough
def test_a_programs_longest_rows(tmp_path):
    (tmp_path / "train.py").write_text(
        PROGRAM.replace("LIMIT", "10**6")
        .replace('"--length", type=int', '"--seq_len", type=int, default=256')
        .replace(".length", ".seq_len")
    )
    done = asked(tmp_path, "--yes", "--json", "--longest", "--gpu", "4090", "train.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["argument"] == "seq_len" and found["where"] == "train.py:5, the default of --seq_len"
    )
    assert found["too_large"] == found["largest"] + 64
    told = refused(tmp_path, "--longest", "--vary", "seq_len", "--gpu", "4090", "train.py")
    assert "takes one GPU" in told


@pytest.mark.thorough
def test_a_length_that_decides_nothing(tmp_path):
    (tmp_path / "train.py").write_text(
        "max_length = 512\n" + PROGRAM.replace("LIMIT", "10**6").replace("type=int", "default=8")
    )
    told = refused(tmp_path, "--longest", "--gpu", "4090", "train.py")
    assert "the same memory with max_length at 512 and " in told and "--batch 8x512" in told


@pytest.mark.thorough
def test_a_program_that_names_no_length(tmp_path):
    (tmp_path / "train.py").write_text("rows = 8\n")
    told = refused(tmp_path, "--longest", "--gpu", "4090", "train.py")
    assert "block_size, max_seq_length" in told and "--vary NAME" in told
