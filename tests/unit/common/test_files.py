"""Files appear whole or not at all."""

import pytest

from scripts.common.errors import UserError
from scripts.common.files import atomic_folder, atomic_open, read_json, read_jsonl, sha256_file, write_json, write_jsonl


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
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["a", "a/old"]


def test_a_folder_is_replaced_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "new").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]


def test_equal_values_are_equal_bytes(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None, "ä"]})
    write_json(tmp_path / "b.json", {"a": [1.5, None, "ä"], "b": 1})
    assert sha256_file(tmp_path / "a.json") == sha256_file(tmp_path / "b.json")
    assert read_json(tmp_path / "a.json") == {"a": [1.5, None, "ä"], "b": 1}


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
    (tmp_path / "broken.json").write_text('{\n"a": }')
    with pytest.raises(UserError, match="line 2"):
        read_json(tmp_path / "broken.json")
