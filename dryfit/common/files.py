"""Reading and writing files so that nothing is ever half-written: write beside, sync, rename.

Every JSON file between two rules goes through here: sorted keys, two spaces, a final newline,
so that equal content is equal bytes.
"""

import glob
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dryfit.common.errors import UserError

MOST_YAML_VALUES = 1_000_000
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_UNLISTED = {"checkpoints", "kept"}  # folders of a run with copies, which their readers check


def _beside(path: Path) -> Path:
    """The name to write ``path`` under until it is whole. What killed processes left under such names is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(
                missing_ok=True
            )
        except OSError:
            pass  # a living process of somebody else
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def atomic_open(path: str | os.PathLike, mode: str = "w", **kwargs: Any) -> Iterator[IO]:
    """Open a file for writing that appears under its name only when the block ends without an error."""
    path = Path(path)
    partial = _beside(path)
    if "b" not in mode:
        kwargs.setdefault("encoding", "utf-8")
        kwargs.setdefault("newline", "\n")
    try:
        with open(partial, mode, **kwargs) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that goes when the block ends; those of killed processes go as well."""
    partial = _beside(Path(path))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its name when the block ends without an error.

    An existing ``path`` is replaced as a whole; on an error it is left as it was.
    """
    path = Path(path)
    with scratch_folder(path) as partial:
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _sync(file)
        if not path.exists():
            os.replace(partial, path)
            return
        # Two renames, since no folder can be renamed onto a full one; removing the old one first would take longer,
        # and a process that is killed meanwhile would leave neither.
        with scratch_folder(path.with_name(f"{path.name}.old")) as aside:
            os.replace(path, aside)
            try:
                os.replace(partial, path)
            except BaseException:  # an interrupt between the two renames must not cost both folders
                if not path.exists():
                    os.replace(aside, path)
                raise


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_open(path) as handle:
        handle.write(text)


def write_json(path: str | os.PathLike, value: Any, *, indent: int | None = 2) -> None:
    """Write JSON atomically, keys sorted, so that equal values are equal bytes. NaN and infinity are refused.

    ``indent``: None for a file of megabytes that nobody reads.
    """
    separators = None if indent else (",", ":")
    form = {
        "indent": indent,
        "separators": separators,
        "sort_keys": True,
        "ensure_ascii": False,
        "allow_nan": False,
    }
    write_text(path, json.dumps(value, **form) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; a :class:`UserError` names the file and line when it is broken or missing."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("The file does not exist.", where=path) from None
    except OSError as error:
        raise UserError(f"The file can't be read: {error.strerror}.", where=path) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"This is not JSON: {error.msg}.", where=f"{path}, line {error.lineno}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"This is not JSON in UTF-8: {error.reason}.", where=path) from None


def read_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file; a :class:`UserError` names the file and the line where it is broken or says a key twice."""
    import yaml

    try:
        with open(path, encoding="utf-8") as handle:
            return _yaml(handle, path)
    except FileNotFoundError:
        raise UserError("The file does not exist.", where=path) from None
    except OSError as error:
        raise UserError(f"The file can't be read: {error.strerror}.", where=path) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        place = f"{path}, line {mark.line + 1}" if mark else path
        raise UserError(f"This is not YAML: {problem}.", where=place) from None


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """Read a TOML file; a :class:`UserError` names the file and the place where it is broken."""
    import tomllib

    try:
        with open(path, "rb") as handle:
            return tomllib.load(handle)
    except OSError as error:
        raise UserError(f"The file can't be read: {error.strerror}.", where=path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"This is not TOML: {error}.", where=path) from None


def yaml_value(text: str, where: object) -> Any:
    """A value that came as text, such as an option's, as a YAML file would have it; what is no YAML stays text.

    UserError: for a number that does not say what it means, such as 010.
    """
    import yaml

    try:
        return _yaml(text, where)
    except (yaml.YAMLError, RecursionError):
        return text


def _yaml(source: IO[str] | str, where: object) -> Any:
    """The value of YAML text; a :class:`UserError` says where a key stands twice, or a number is not what it seems."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """The safe loader, which else takes the last of two equal keys without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            found: dict[Any, int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (
                    key.tag == "tag:yaml.org,2002:merge"
                ):  # `<<: *name`, which stands for keys and is not a key
                    continue
                line = key.start_mark.line + 1
                name = self.construct_object(key)
                if name in found:
                    raise UserError(
                        f"The key {name!r} stands here twice.",
                        where=f"{where}, lines {found[name]} and {line}",
                        allowed="each key once",
                    )
                found[name] = line
            return super().construct_mapping(node, deep)

        def construct_number(self, node: Any) -> int | float:
            """A number that says what it means; YAML 1.1 reads 010 as 8, and 1:30 as 90."""
            value = {"int": self.construct_yaml_int, "float": self.construct_yaml_float}[
                node.tag.rpartition(":")[2]
            ](node)
            plain = node.value.lstrip("+-").replace("_", "")
            if ":" in plain or re.fullmatch(r"0\d+", plain):
                raise UserError(
                    f"YAML reads {node.value} as {value}: {'sixties' if ':' in plain else 'a number to the base 8'}.",
                    where=f"{where}, line {node.start_mark.line + 1}",
                    found=node.value,
                    allowed="a number without leading zeros and colons; text in quotes",
                    write=f"{value}    # or, as text, '{node.value}'"
                    if ":" in plain
                    else f"{plain.lstrip('0') or 0}",
                )
            return value

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_number)
    value = yaml.load(source, Loader)
    _refuse_endless(value, where)
    return value


def _refuse_endless(value: Any, path: object) -> None:
    """Raise where a YAML value holds itself, or so many references that it would never end."""
    above: list[int] = []
    count = 0

    def walk(value: Any) -> None:
        nonlocal count
        count += 1
        if id(value) in above or count > MOST_YAML_VALUES:
            problem = "A value of this file refers to itself."
            raise UserError(
                problem if id(value) in above else "This YAML file's anchors refer to themselves.",
                where=path,
                allowed=f"references (*name) to what stands before them; at most {MOST_YAML_VALUES:,} values in all",
                write="# the value itself in place of the *name",
            )
        if isinstance(value, dict | list):
            above.append(id(value))
            for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
                walk(item)
            above.pop()

    walk(value)


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict]) -> int:
    """Write one JSON object a line, atomically; returns the number of rows."""
    count = 0
    with atomic_open(path) as handle:
        for row in rows:
            handle.write(
                json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
            )
            count += 1
    return count


def read_jsonl(path: str | os.PathLike) -> Iterator[dict]:
    """Yield the objects of a JSON-lines file that a rule wrote; errors name file and line."""
    with open(path, encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"This line is not JSON: {error.msg}.", where=f"{path}, line {number}"
                ) from None


def own_file(path: Path) -> Path:
    """The path of a file in a model's folder, as it is; a link that leads out of the model is refused.

    It would carry into the results whatever it points to. A snapshot in the Hub's cache consists of links into the
    blobs of its repository: these are the model's own.
    """
    home, target = path.parent.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise UserError(
            "A file of the model is a link to somewhere outside its folder; what it points to is not taken.",
            where=path,
            found=str(target),
            allowed="files, links within the model's folder, and those of a snapshot in the Hub's cache",
            write=f"{shlex.join(['cp', '--remove-destination', str(target), str(path)])}    # if it is the model's",
        )
    return path


def copy_own(path: Path, folder: Path) -> None:
    """Copy a file of a model's folder into ``folder``, if it is :func:`own_file`."""
    shutil.copyfile(own_file(path), folder / path.name)


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: object) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a JSON-like value, independent of the order of keys."""
    return hashlib.sha256(
        json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    ).hexdigest()[:16]


def write_report(
    path: str | os.PathLike,
    value: Mapping[str, Any],
    *files: str | os.PathLike,
    indent: int | None = 2,
) -> None:
    """Write a stage's report with the SHA-256 of what the stage wrote; :func:`read_report` checks them.

    The report gets a field ``sha256: {"<file name>": "<hex>"}`` with each of ``files`` and with the report itself:
    the digest of its canonical JSON without that one entry.

    Parameters
    ----------
    path
        The report, a JSON file.
    value
        Its content. What stands in ``value["sha256"]`` already (files digested while they were written) is kept.
    files
        Files that the stage has written, under names that differ.
    indent
        Of the JSON, as :func:`write_json` has it.
    """
    digests = {**value.get("sha256", {}), **{Path(file).name: sha256_file(file) for file in files}}
    digests.pop(Path(path).name, None)
    sealed = {**value, "sha256": digests}
    write_json(
        path, {**sealed, "sha256": {**digests, Path(path).name: _seal(sealed)}}, indent=indent
    )


def read_report(
    path: str | os.PathLike, *files: str | os.PathLike, remove: Iterable[str | os.PathLike] = ()
) -> dict:
    """Read a report that :func:`write_report` wrote; it, and each of ``files``, must be what was written.

    Parameters
    ----------
    path
        The report of the stage that wrote the files.
    files
        The files that are about to be read.
    remove
        What else to delete so that the step runs again: its outputs, where a file is not one of them.

    Raises
    ------
    UserError
        Naming the file to delete, when a byte of the report or of a file has changed since it was written.
    """
    try:
        report = read_json(path)
        digests = dict(report["sha256"])
        checks = [(path, digests.pop(Path(path).name), _seal({**report, "sha256": digests}))]
    except (KeyError, TypeError, ValueError, UserError) as error:
        checks = [(path, None, str(error))]
    else:
        checks += [(file, digests.get(Path(file).name), _digest(file)) for file in files]
    for file, written, found in checks:
        if written != found:
            culprit = file if written else path
            raise UserError(
                f"{Path(culprit).name} is not what the step that made it has written: changed since, or damaged.",
                where=culprit,
                found=found,
                allowed=f"the sha256 that {path} records: {written}"
                if written
                else f"a report that knows {file}",
                write=f"rm {shlex.join(dict.fromkeys(map(str, (culprit, *remove))))}"
                "    # then the same command again: the step writes it again",
            )
    return report


def read_reports(paths: Iterable[str | os.PathLike]) -> dict[str, dict]:
    """Read the reports among the files of several stages, by path; each JSON file must be what was written.

    A report lists the other JSON and JSON-lines files of its folder and below; a file that no report lists is refused.
    Files of other kinds, which may be gigabytes, are left to who reads them.

    UserError: as :func:`read_report` does; also for a file that none of the reports knows.
    """
    paths = [Path(path) for path in paths]
    reports = {
        path: read_report(path) for path in paths if path.suffix == ".json" and _seals_itself(path)
    }
    for path in paths:
        if path.suffix in (".json", ".jsonl") and path not in reports:
            knows = [report for report, value in reports.items() if path.name in value["sha256"]]
            above = [report for report in knows if report.parent in path.parents]
            if not above:
                raise UserError(
                    "No report lists this file, so it can't be verified.",
                    where=path,
                    allowed="a report, or a file that one of them records",
                    write=f"rm {shlex.quote(str(path))}    # then the same command again: the step writes it again",
                )
            read_report(max(above, key=lambda report: len(report.parts)), path)
    return {str(path): report for path, report in reports.items()}


def sealed_files(path: str | os.PathLike) -> dict[Path, str]:
    """The files that a report lists with their digests, by path; empty where a JSON file is no report.

    A file lies beside the report, or below; the report ``name.json`` of a folder ``name`` lists what lies in it.
    One that is missing is left out, but not of such a folder, nor of a base model's small files: no rule declares these
    by their names.

    UserError: if the file is no JSON, or a report that has changed since it was written.
    """
    path = Path(path)
    if not _seals_itself(path):
        return {}
    folder, listed = listed_folder(path), {}
    whole = folder != path.parent or path.name == "description.json"
    for name, digest in read_report(path)["sha256"].items():
        places = [place for place in (folder / name, path.parent / name) if place.exists()]
        places = places or [
            place for place in path.parent.rglob(name) if not _UNLISTED & set(place.parts)
        ]
        if name != path.name and (places or whole):
            listed[(places or [folder / name])[0]] = digest
    return listed


def listed_folder(report: Path) -> Path:
    """Where the files of a report lie: in the folder that has its name, else beside it."""
    folder = report.with_suffix("")
    return folder if folder.is_dir() else report.parent


def standing_for(report: Path) -> Path:
    """What to delete so that a folder is made again: the report beside the folder that lists it, else its own."""
    beside = report.parent.with_name(f"{report.parent.name}.json")
    return beside if beside.is_file() else report


def _seals_itself(path: Path) -> bool:
    """Whether a JSON file is a report, though perhaps a damaged one."""
    value = read_json(path)
    digests = value.get("sha256") if isinstance(value, Mapping) else None
    return isinstance(digests, Mapping) and path.name in digests


def read_folder(path: str | os.PathLike) -> dict:
    """Read the report of a folder; each file in the folder that it lists must be what was written.

    For a model's folder, whose report (``weights.json``, ``description.json``, ``manifest.json``) is the rule's output
    and stands for files whose names are not known before: a damaged file means that both are to be deleted. Beside
    weights that it lists no others may lie, which a library might load instead.
    """
    path = Path(path)
    names = [name for name in read_report(path)["sha256"] if name != path.name]
    report = read_report(path, *(path.parent / name for name in names), remove=[standing_for(path)])
    if any(name.endswith(".safetensors") for name in names):
        beside = {file.name for pattern in WEIGHTS for file in path.parent.glob(pattern)}
        if strange := sorted(beside - set(names)):
            raise UserError(
                "Weights lie in the model's folder that are not the model's; a library might load them instead.",
                where=path.parent,
                found=", ".join(strange),
                allowed=f"the weights that {path} records",
                write=f"rm {shlex.join(str(path.parent / name) for name in strange)}    # then the same command again",
            )
    return report


def _digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, or the reason why it has no digest."""
    try:
        return sha256_file(path)
    except OSError as error:
        return str(error)


def _seal(value: Mapping[str, Any]) -> str:
    """SHA-256 of a value's canonical JSON, as it is when it has been written and read again."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    return hashlib.sha256(
        json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()
