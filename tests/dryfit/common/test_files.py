"""Files appear whole or not at all."""

import math
import os
import subprocess

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import (
    atomic_folder,
    atomic_open,
    read_folder,
    read_json,
    read_jsonl,
    read_report,
    read_yaml,
    scratch_folder,
    sha256_file,
    write_json,
    write_jsonl,
    write_report,
)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_open(path) as handle:
        handle.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_interrupted_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as partial:
        (partial / "new").touch()
        raise RuntimeError
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "a",
        "a/old",
    ]


def test_a_folder_is_replaced_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "new").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / f".a.{gone.pid}.partial").mkdir()
    (tmp_path / f".a.{gone.pid}.partial" / "shard").touch()
    (tmp_path / f".a.{os.getppid()}.partial").touch()
    (tmp_path / f".ab.{gone.pid}.partial").touch()  # beside another file
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "new").touch()
    assert {p.name for p in tmp_path.iterdir()} == {
        "a",
        f".a.{os.getppid()}.partial",
        f".ab.{gone.pid}.partial",
    }
    with atomic_open(tmp_path / "ab") as handle:
        handle.write("new")
    assert not (tmp_path / f".ab.{gone.pid}.partial").exists()


@pytest.mark.parametrize(
    "error", [OSError("no"), KeyboardInterrupt()], ids=["a failed rename", "Ctrl-C"]
)
def test_a_folder_that_can_not_take_its_place_leaves_the_old_one(error, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(f".a.{os.getpid()}.partial"):
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)), atomic_folder(tmp_path / "a") as partial:
        (partial / "new").touch()
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "a",
        "a/old",
    ]


def test_scratch_goes_and_so_does_what_killed_processes_left(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / f".a.gguf.{gone.pid}.partial").mkdir()
    with scratch_folder(tmp_path / "a.gguf") as folder:
        (folder / "large").touch()
        assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert not list(tmp_path.iterdir())


def test_equal_values_are_equal_bytes_and_what_nobody_reads_has_no_blanks(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None, "ä"]})
    write_json(tmp_path / "b.json", {"a": [1.5, None, "ä"], "b": 1})
    assert sha256_file(tmp_path / "a.json") == sha256_file(tmp_path / "b.json")
    assert read_json(tmp_path / "a.json") == {"a": [1.5, None, "ä"], "b": 1}
    write_report(tmp_path / "report.json", {"b": [1, 2], "a": "x"}, indent=None)
    assert (tmp_path / "report.json").read_text().startswith('{"a":"x","b":[1,2],"sha256":{')
    assert read_report(tmp_path / "report.json")["b"] == [1, 2]


def test_not_a_number_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_rows_come_back_and_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert write_jsonl(path, ({"n": n} for n in range(3))) == 3
    assert [row["n"] for row in read_jsonl(path)] == [0, 1, 2]
    path.write_text('{"n": 0}\n{"n": \n')
    with pytest.raises(UserError, match="line 2"):
        list(read_jsonl(path))


def test_a_missing_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(UserError, match="can't be read"):
        read_json(tmp_path)
    (tmp_path / "broken.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="UTF-8"):
        read_json(tmp_path / "broken.json")
    (tmp_path / "broken.json").write_text('{\n"a": }')
    with pytest.raises(UserError, match="line 2"):
        read_json(tmp_path / "broken.json")


def test_a_yaml_file_may_take_over_the_keys_of_another_mapping_but_not_say_one_twice(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nown:\n  <<: *base\n  b: 3\n")
    assert read_yaml(path)["own"] == {"a": 1, "b": 3}
    path.write_text("base: &base {a: 1}\nown:\n  <<: *base\n  b: 3\n  b: 4\n")
    with pytest.raises(UserError, match="'b' stands here twice"):
        read_yaml(path)


def report_of(folder):
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "weights").write_bytes(bytes(range(256)))
    write_report(
        folder / "report.json", {"loss": 1.5, "by_rank": {2: "a", 10: "b"}}, folder / "rows.jsonl"
    )
    return folder / "report.json"


def test_a_report_vouches_for_its_files_and_for_itself(tmp_path):
    report = report_of(tmp_path)
    read = read_report(report, tmp_path / "rows.jsonl")
    assert read["loss"] == 1.5
    assert read["sha256"]["rows.jsonl"] == sha256_file(tmp_path / "rows.jsonl")
    write_report(report, read, tmp_path / "rows.jsonl")
    assert read_report(report, tmp_path / "rows.jsonl") == read


def test_digests_taken_while_writing_count_as_well(tmp_path):
    (tmp_path / "shard").write_bytes(b"weights")
    write_report(tmp_path / "report.json", {"sha256": {"shard": sha256_file(tmp_path / "shard")}})
    assert read_report(tmp_path / "report.json", tmp_path / "shard")


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (lambda folder: (folder / "rows.jsonl").write_text("{ }\n"), "rows.jsonl"),
        (lambda folder: (folder / "rows.jsonl").write_bytes(b"\0\0\0"), "rows.jsonl"),
        (lambda folder: (folder / "rows.jsonl").unlink(), "rows.jsonl"),
        (lambda folder: (folder / "report.json").unlink(), "report.json"),
        (lambda folder: (folder / "report.json").write_bytes(b"\0" * 40), "report.json"),
        (lambda folder: (folder / "report.json").write_bytes(b"\xff"), "report.json"),
        (lambda folder: (folder / "report.json").write_text("[]"), "report.json"),
        (lambda folder: (folder / "report.json").write_text('{"sha256": {}}'), "report.json"),
        (lambda folder: edit(folder / "report.json", "1.5", "1.6"), "report.json"),
        (lambda folder: edit(folder / "report.json", "rows.jsonl", "other.jsonl"), "report.json"),
        (
            lambda folder: write_report(folder / "report.json", {}),
            "report.json",
        ),  # knows no rows.jsonl
    ],
)
def test_every_change_is_noticed_and_the_file_to_delete_is_named(tmp_path, spoil, culprit):
    report = report_of(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match="not what the step that made it has written") as error:
        read_report(report, tmp_path / "rows.jsonl")
    assert f"rm {tmp_path / culprit} " in str(error.value)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_folders_report_vouches_for_all_its_files_and_goes_with_a_damaged_one(tmp_path):
    report = report_of(tmp_path)
    assert read_folder(report)["loss"] == 1.5
    (tmp_path / "rows.jsonl").write_text("{ }\n")
    with pytest.raises(UserError) as error:
        read_folder(report)
    assert error.value.write.startswith(f"rm {tmp_path / 'rows.jsonl'} {report} ")


@pytest.mark.parametrize("text", ["010", "-010", "00", "1:30", "1:30:00", "2:05.5", "0_10"])
def test_numbers_that_yaml_reads_as_others_are_refused(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(f"a: 1\nb: {{c: [{text}]}}\n")
    with pytest.raises(UserError, match="YAML reads") as error:
        read_yaml(path)
    assert "line 2" in str(error.value) and "write:" in str(error.value)
    path.write_text(f"a: '{text}'\nb: [0, 0.5, 1_000, 10, -1, 2.0e-4, 0x10, .inf]\n")
    assert read_yaml(path) == {"a": text, "b": [0, 0.5, 1000, 10, -1, 2e-4, 16, math.inf]}


@pytest.mark.parametrize("text", ["a: &x [*x]", "a: &x {b: {c: *x}}", "&x [1, [*x]]"])
def test_yaml_that_holds_itself_is_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="refers to itself"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: &x [1, 2]\nb: [*x, *x]\n")
    assert read_yaml(tmp_path / "a.yaml")["b"] == [[1, 2], [1, 2]]


def test_yaml_without_an_end_of_references_is_refused(tmp_path):
    lines = [
        "a0: &a0 [1]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)),
    ]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="refer to themselves"):
        read_yaml(tmp_path / "a.yaml")
