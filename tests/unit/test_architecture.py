"""The rooms of the house: docs/architecture.md says which may import which, and the imports keep to it."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from scripts.common.code_digests import absolute_name

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
HOUSES = ("dryfit", "scripts", "validation")
ROW = re.compile(
    r"^\| `((?:dryfit/|scripts/|validation)[\w/]*)` \|[^|]*\|([^|]*)\|(?:([^|]*)\|)?$", re.MULTILINE
)


def rooms(text: str) -> dict[str, set[str]]:
    """Each room of the page's tables, with the rooms that it may use."""
    found = {}
    for room, first, second in ROW.findall(text):
        own, library = ("", first) if room.startswith("dryfit/") else (first, second)
        names = [("scripts", name) for name in re.findall(r"`([^`]+)`", own)]
        names += [("dryfit", name) for name in re.findall(r"`([^`]+)`", library)]
        found[room] = {f"{house}/{name}" for house, name in names}
    return found


ROOMS = rooms(PAGE.read_text(encoding="utf-8"))
MODULES = sorted(
    path
    for house in HOUSES
    for path in (ROOT / house).rglob("*.py")
    if not re.search("data/(site|reports|recipes)/", path.as_posix())
)
# Without these the light environment, and whoever only wants an estimate, would load gigabytes.
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors"}
WITHOUT_TORCH = (
    "scripts/common",
    "scripts/runs",
    "dryfit/common",
    "dryfit/data",
    "dryfit/scenario",
    "dryfit/cards",
    "dryfit/evidence",
    "dryfit/derived",
    "dryfit/analytic",
    "scripts/tasks",
    "scripts/tasks/support",
    "scripts/tasks/shell",
    "scripts/tasks/shell/screen",
    "scripts/tasks/shell/execution",
    "scripts/dataset",
    "scripts/documents",
    "scripts/provenance",
    "dryfit/ask",
    "dryfit/readers",
    "dryfit/site",
    "dryfit/recipes",
)

# The disk's sizes are compared with the files that a real step leaves, the training's own step with its trace.
# A page's rules of thumb are compared with a traced step.
BESIDE_THE_ROOM = {
    "test_disk.py": {"dryfit/step"},
    "test_several_processes.py": {"dryfit/tracing"},
    "test_memory_profile.py": {"dryfit/tracing"},
}
OF_A_LIBRARY = {"trainer.py"}  # its class is one of transformers'


def room_of(path: Path) -> str | None:
    """The room that a module lies in; None for one that the page doesn't know."""
    place = path.relative_to(ROOT).as_posix()
    return max(
        (room for room in ROOMS if f"{place}/".startswith(f"{room}/")), key=len, default=None
    )


def module_file(name: str) -> Path | None:
    """The file of a module of the project by its dotted name; None where the last part is a name in it."""
    path = ROOT.joinpath(*name.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, *, top: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it or at its top alone."""
    for node in tree_of(path).body if top else ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{absolute_name(node, path)}.{name.name}" for name in node.names)


def project_files(path: Path) -> set[Path]:
    """Files of the project that a module imports."""
    found = set()
    for name in imported(path):
        if name.partition(".")[0] in HOUSES:
            file = module_file(name) or module_file(name.rpartition(".")[0])
            assert file, f"{path}: no module for {name}"
            found.add(file)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[Path, set[Path]]:
    """Each module, and the files of the project that it imports."""
    return {path: project_files(path) for path in MODULES}


def test_every_folder_has_a_row() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in MODULES} - {
        "dryfit"
    }  # its public face
    assert folders == set(ROOMS), "docs/architecture.md lists a room that isn't there, or lacks one"


def test_imports_keep_to_the_page(graph) -> None:
    beyond = [
        f"{path.relative_to(ROOT)} imports {file.relative_to(ROOT)}; docs/architecture.md doesn't let {room} do so"
        for path, files in graph.items()
        for file in files
        if (room := room_of(path)) and room_of(file) not in {room, *ROOMS[room]}
    ]
    assert not beyond, "\n".join(beyond)


def test_the_library_knows_nothing_of_the_pipeline(graph) -> None:
    for path, files in graph.items():
        below = {file.relative_to(ROOT).parts[0] for file in files}
        house = path.relative_to(ROOT).parts[0]
        assert house == "validation" or "validation" not in below, path
        assert house != "dryfit" or below <= {"dryfit"}, path


def test_tests_of_a_pipelines_room_use_of_the_library_what_the_room_may_use() -> None:
    """So a test of the pipeline does not look into the engine behind the library's back."""
    for room in (room for room in ROOMS if room.startswith("scripts/")):
        for path in (ROOT / "tests" / "unit" / room.removeprefix("scripts/")).glob("*.py"):
            files = (
                module_file(name) or module_file(name.rpartition(".")[0]) for name in imported(path)
            )
            used = {
                room_of(file) for file in files if file and file.is_relative_to(ROOT / "dryfit")
            }
            beyond = used - ROOMS[room] - BESIDE_THE_ROOM.get(path.name, set())
            assert not beyond, (
                f"{path.relative_to(ROOT)} imports {beyond}; the page doesn't let {room} do so"
            )


def test_no_circle(graph) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(str(path.relative_to(ROOT)) for path in error.args[1]))


def test_light_rooms_import_nothing_heavy_at_their_top() -> None:
    for path in MODULES:
        if room_of(path) in WITHOUT_TORCH and path.name not in OF_A_LIBRARY:
            heavy = {name.partition(".")[0] for name in imported(path, top=True)} & HEAVY
            assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} when it is loaded"


def test_no_class_has_the_name_of_another_but_the_parts_of_a_task() -> None:
    names = Counter(
        name
        for house in ("dryfit", "scripts", "validation")
        for path in (ROOT / house).rglob("*.py")
        if "data" not in path.relative_to(ROOT).parts[1:]
        for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if not (
            name == "Task" and "tasks" in path.parts
        )  # the registry asks each module for its `Task`
    )
    assert not {name for name, count in names.items() if count > 1}
