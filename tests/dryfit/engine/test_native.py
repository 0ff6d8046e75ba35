"""The compiled replay against Python's, in every output; and what happens without a compiler."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dryfit.engine import native_library
from dryfit.engine.allocator import EMPTY_CACHE, MIB, Allocator, OutOfMemory
from dryfit.engine.capacities import capacities, served_at
from dryfit.engine.expandable import ExpandableAllocator
from dryfit.engine.replay import (
    Events,
    NativeAllocator,
    allocator_for,
    compiled,
    peak_blocks,
    replay,
    run_through,
)
from tests.repository import ROOT

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C compiler")
SIZES = (0, 1, 512, MIB, MIB - 511, MIB + 1, 10 * MIB, 10 * MIB - 1, 4 * MIB, 30 * MIB)


def random_events(draw: random.Random, count: int) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """Allocations, frees of what is alive, was freed or never came, and now and then an emptied cache."""
    events, alive, streams, identity = [], [], {}, 0
    most = draw.choice((5, 40, 300))
    for _ in range(count):
        if draw.random() < 0.01:
            events.append(EMPTY_CACHE)
        elif alive and (draw.random() < 0.47 or len(alive) > most):
            events.append((-alive.pop(draw.randrange(len(alive))), 0))
        else:
            identity += draw.choice((1, 1, 1, 3))
            limit = draw.choice((2000, MIB + 600, 4 * MIB, 32 * MIB))
            events.append((identity, draw.choice((draw.choice(SIZES), draw.randrange(limit)))))
            alive.append(identity)
            if draw.random() < 0.1:
                streams[identity] = draw.choice(
                    (7, 9, -1, -2)
                )  # below 0: private pools of CUDA graphs
    events += [
        (-identity - 5, 0),
        *((-one, 0) for one in alive[::2]),
        *((-one, 0) for one in alive[:3]),
    ]
    return events, streams if draw.random() < 0.5 else {}


def outcome(state, events, marks, capacity, *, grow):
    """Everything that a replay says."""
    trail: list[int] = []
    try:
        found = run_through(state, events, marks, capacity, grow=grow, trail=trail)
    except OutOfMemory as error:
        return error.event_index, error.needed_bytes, error.capacity_bytes, state.risen
    return found, trail, state.risen, state.capacity


@pytest.mark.few(12)
@needs_compiler
@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_equal_in_every_output(seed, expandable, monkeypatch):
    draw = random.Random(seed)
    events, streams = random_events(draw, draw.choice((30, 300, 1200)))
    marks = [("a", len(events) // 3), ("b", len(events) // 2)]
    plenty = replay(events, streams=streams, expandable_segments=expandable)
    least = plenty.peak_allocated_bytes
    model = ExpandableAllocator if expandable else Allocator
    failed = 0
    for capacity in (None, plenty.peak_reserved_bytes, least, int(least * 1.04), least // 2):
        for grow in (False, True):
            state, packed = allocator_for(events, streams, expandable_segments=expandable)
            assert isinstance(state, NativeAllocator)
            native = outcome(state, packed, marks, capacity, grow=grow)
            assert native == outcome(model(streams), events, marks, capacity, grow=grow)
            failed += isinstance(native[0], int)
    assert failed
    sizes = [*range(least, plenty.peak_reserved_bytes + 1, max(least // 40, 1)), least // 3]
    how = {"expandable_segments": expandable}
    intervals = lambda: [  # noqa: E731
        peak_blocks(events),
        capacities(events, streams, sizes=sizes, **how),
        capacities(events, streams, **how),
        *(served_at(size, events, streams, **how) for size in sizes[::7]),
    ]
    native = intervals()
    monkeypatch.setattr("dryfit.engine.replay.compiled", lambda: None)
    assert native == intervals()


@needs_compiler
@pytest.mark.parametrize("expandable", [False, True])
def test_states_that_are_alike_have_one_signature(expandable):
    """Alike in Python's model, alike in the compiled one; and a copy goes its own way."""
    draw = random.Random(3)
    events, _ = random_events(draw, 600)
    packed, middle = Events.of(events), 400
    first, _ = allocator_for(packed, expandable_segments=expandable)
    first.run(packed, 0, middle)
    twin, before = first.copy(), first.signature()
    assert twin.signature() == before
    twin.run(packed, middle, len(packed))
    assert first.signature() == before != twin.signature()
    first.run(packed, middle, len(packed))
    assert (
        first.signature() == twin.signature()
        and first.risen == twin.risen
        and first.peaks == twin.peaks
    )


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([(1, 2**70), (-1, 0)], "beyond 64 bits"),
        ([(2**60, 512), (-(2**60), 0)], "an id that no array has a place for"),
        ([(1, -512)], "fewer than no bytes"),
    ],
)
def test_what_compiled_code_cannot_take_is_replayed_in_python(events, why):
    state, _ = allocator_for(events)
    assert isinstance(state, Allocator), why


def test_a_trail_and_what_is_beyond_all_addresses(each_replay):
    trail: list[int] = []
    assert replay([], [("load", 0)], trail=trail).spans[0].peak_allocated_bytes == 0 and trail == []
    with pytest.raises(OverflowError, match="beyond the addresses of any GPU"):
        replay([(1, 2**45), (2, 2**46)])


def test_events_are_a_sequence_of_pairs():
    events = Events.of([(1, 512), (2, 7), (-1, 0)])
    assert (
        list(events) == [(1, 512), (2, 7), (-1, 0)]
        and events[-1] == (-1, 0)
        and events[1:] == [(2, 7), (-1, 0)]
    )
    assert (
        len(events) == 3 and events == [(1, 512), (2, 7), (-1, 0)] and Events.of(events) is events
    )
    with pytest.raises(IndexError):
        events[3]


# --- where there is no library ------------------------------------------------------------------------------------

PROGRAM = """
from dryfit.engine.replay import allocator_for, replay
events = [(1, 6 << 20), (2, 30 << 20), (-1, 0), (3, 30 << 20)]
print(type(allocator_for(events)[0]).__name__, replay(events).peak_reserved_bytes)
"""


def answer(folder: Path, **environment: str) -> tuple[str, str]:
    """What a program says on its output, and on its error stream."""
    setting = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=setting | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip(), run.stderr.strip()


CACHE = Path("home", ".cache", "dryfit", "native")
COMPILED, IN_PYTHON = f"NativeAllocator {80 * MIB}", f"Allocator {80 * MIB}"


def test_without_a_compiler_python_replays_and_says_so_once(tmp_path):
    assert answer(tmp_path, PATH=str(tmp_path)) == (
        IN_PYTHON,
        "The allocator is replayed in Python: there is no compiler (cc, gcc, clang). Answers are the same and take"
        " longer.",
    )
    assert answer(tmp_path, PATH=str(tmp_path)) == (IN_PYTHON, "")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'replay.c:1: no such thing' >&2; exit 1", "fails: replay.c:1: no such thing"),
        ("exit 0", "fails: exit status 0, and no file"),
        ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "can't be loaded"),
    ],
    ids=["an error", "nothing made", "another machine's"],
)
def test_a_compiler_that_fails(tmp_path, script, why):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    said = answer(tmp_path, CC=str(compiler))
    assert said[0] == IN_PYTHON and why in said[1] and len(said[1].splitlines()) == 1
    assert answer(tmp_path, CC=str(compiler)) == (IN_PYTHON, "")
    assert answer(tmp_path, CC="/nowhere/cc")[1].startswith(
        "The allocator is replayed in Python: the compiler can't"
    )


def test_the_setting_asks_for_python_and_nothing_is_said(tmp_path):
    assert answer(tmp_path, DRYFIT_REPLAY="python", PATH=str(tmp_path)) == (IN_PYTHON, "")
    assert not (tmp_path / "home").exists()


@pytest.mark.thorough
@needs_compiler
def test_what_was_compiled_is_kept_and_a_damaged_file_is_compiled_anew(tmp_path):
    assert answer(tmp_path) == (COMPILED, "")
    (made,) = (tmp_path / CACHE).iterdir()
    without = {"PATH": str(tmp_path)}
    assert answer(tmp_path, **without) == (COMPILED, "")  # no compiler is needed any more
    whole = made.read_bytes()
    made.write_bytes(whole[: len(whole) // 2])  # which a loader might crash on
    assert answer(tmp_path, **without)[0] == IN_PYTHON
    assert answer(tmp_path) == (COMPILED, "")
    assert made.read_bytes() == whole


@pytest.mark.thorough
@needs_compiler
def test_a_file_of_another_machine_or_version_is_left_alone(tmp_path):
    folder = tmp_path / CACHE
    folder.mkdir(mode=0o700, parents=True)
    stem = native_library.REPLAY.stem
    other = b"the library of another C library"
    name = f"{stem}-{native_library._digest(other)}.so"  # intact by its digest, and can't be loaded
    (folder / name).write_bytes(other)
    (folder / name.replace(stem, "replay-0123456789abcdef-linux-aarch64")).write_bytes(other)
    assert answer(tmp_path) == (COMPILED, "")


@pytest.mark.thorough
@needs_compiler
def test_a_folder_that_cannot_be_written_is_no_reason_against_compiling(tmp_path):
    (tmp_path / "home").write_text("a file where a folder should be")
    assert answer(tmp_path) == (COMPILED, "")


@pytest.mark.thorough
@needs_compiler
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX's permissions")
@pytest.mark.parametrize("mode", [0o770, 0o707], ids=["a group", "everybody"])
def test_nothing_is_loaded_from_a_folder_that_others_can_write(tmp_path, mode):
    """A file with the right name and digest, which says that it was loaded; in a folder of the user's it would be."""
    folder = tmp_path / CACHE
    folder.mkdir(mode=0o700, parents=True)
    source, made = tmp_path / "planted.c", tmp_path / "planted.so"
    source.write_text(
        "#include <stdlib.h>\n__attribute__((constructor)) static void begin(void) { exit(42); }\n"
    )
    compiler = next(filter(None, map(shutil.which, native_library.REPLAY.compilers)))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    content = made.read_bytes()
    (folder / f"{native_library.REPLAY.stem}-{native_library._digest(content)}.so").write_bytes(
        content
    )
    with pytest.raises(subprocess.CalledProcessError, match="42"):
        answer(tmp_path)
    folder.chmod(mode)
    before = list(folder.iterdir())
    assert answer(tmp_path) == (COMPILED, "")
    assert list(folder.iterdir()) == before


@pytest.mark.thorough
@needs_compiler
def test_the_folder_is_made_for_the_user_alone(tmp_path):
    """Whatever the user's umask says: many systems let a user's group write."""
    before = os.umask(0o002)
    try:
        assert answer(tmp_path) == (COMPILED, "")
    finally:
        os.umask(before)
    assert (tmp_path / CACHE).stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_the_sources_compile_without_a_warning(tmp_path):
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC"]
    source = native_library.SOURCES / "replay.c"
    subprocess.run(["gcc", *strict, "-o", str(tmp_path / "replay.so"), str(source)], check=True)
