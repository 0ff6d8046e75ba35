"""What a program's process gives up before it starts, for good: the network, files to write, other processes.

All of it is Linux's own, and each part is taken where the kernel gives it; :class:`Held` says which were.

* Namespaces (user, mount, process, network): no way out but the machine itself, all files read-only with their
  permissions, owners and times, no process outside to be seen, and none left when the program's own has ended.
* Landlock (``linux/landlock.h``): a process writes below some folders alone, also through links that lead elsewhere.
  Since Linux 6.12 (version 6) it signals no process outside and meets no abstract socket of one, since 7.1 (version 9)
  no socket in a folder either. Before that, sockets that are there when the program starts are covered.
* Capabilities: whoever runs a program as root keeps those over files alone.

It reads what its user can read.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# CLONE_NEW... of sched.h: user, mount, process, IPC and network namespaces.
_USER, _MOUNTS, _PROCESSES, _IPC, _NETWORK = (
    0x10000000,
    0x00020000,
    0x20000000,
    0x08000000,
    0x40000000,
)
# System calls, of the same numbers on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _MOUNT_SETATTR = 444, 445, 446, 442
_NO_NEW_PRIVILEGES, _SUBREAPER, _DROP_BOUND = 38, 36, 24  # of prctl
_BIND, _RECURSIVE, _PRIVATE, _NO_SUID_DEV_EXEC = 0x1000, 0x4000, 0x40000, 0xE  # of mount
_AT_RECURSIVE, _READ_ONLY = 0x8000, 1  # of mount_setattr
_TRUNCATES, _DEVICES, _SCOPES, _SOCKETS = 3, 5, 6, 9  # Landlock's versions that brought these
_WRITE_FILE, _TRUNCATE, _IOCTL_DEVICE, _RESOLVE_UNIX = 1 << 1, 1 << 14, 1 << 15, 1 << 16
_WRITES = sum(
    1 << bit for bit in (1, *range(4, 15))
)  # write, remove, make of each kind, move to elsewhere, truncate
_SIGNALS_AND_ABSTRACT_SOCKETS = 3
_NODES = ("null", "zero", "full", "random", "urandom", "tty")  # devices that programs write to
_OVER_FILES = range(
    8
)  # capabilities: chown, reading and writing whatever is there, ids; kill is among them
_LAST_CAPABILITY = 63
MOST_SOCKETS = 2_000
LEFT_TRIES = 100  # rounds in which what a program has left is ended


@dataclass(frozen=True)
class Held:
    """What a program's process has given up."""

    network: bool = False  # it has none but the machine's own
    files: bool = False  # it writes in its folders alone
    metadata: bool = False  # it changes permissions, owners and times there alone
    processes: bool = False  # it signals no process outside
    # It reaches no server of the machine by a name, and by a file; `sockets` is true as well where those alone are
    # covered that were there when it started.
    abstract_sockets: bool = False
    sockets: bool = False


def enter(folders: Sequence[Path], *, network: bool) -> Held:
    """Give up what the platform allows. It returns in a child; this process waits for that, and ends as it ends.

    ``folders``: in which the program writes. ``network``: whether it keeps the network.
    """
    if sys.platform != "linux":
        return Held()
    folders, here = [folder for folder in folders if folder.is_dir()], os.getcwd()
    kinds = next(
        (kinds for kinds in _levels(network) if is_possible(lambda k=kinds: _rehearse(k, folders))),
        0,
    )
    if kinds:
        _isolate(kinds, folders)
    _guard(bool(kinds & _PROCESSES))
    os.chdir(here)  # the folder as it is mounted now
    if is_possible(_drop_capabilities):
        _drop_capabilities()
    version = _landlock_version()
    files = is_possible(lambda: write_only_below(folders))
    if files:
        write_only_below(folders)
    scoped = files and version >= _SCOPES
    return Held(
        network=bool(kinds & _NETWORK),
        files=files,
        metadata=bool(kinds & _MOUNTS),
        processes=bool(kinds & _PROCESSES) or scoped,
        abstract_sockets=bool(kinds & _NETWORK) or scoped,
        sockets=bool(kinds & _MOUNTS) or (files and version >= _SOCKETS),
    )


def _levels(network: bool) -> Iterator[int]:
    """Namespaces to try, the most first."""
    own = 0 if network else _NETWORK
    yield _USER | _MOUNTS | _PROCESSES | _IPC | own
    yield _USER | _MOUNTS | _IPC | own  # where no other /proc can be mounted, as in some containers
    if own:
        yield _USER | own
        yield own  # root without user namespaces


def is_possible(act: Callable[[], None]) -> bool:
    """Whether this platform lets a process do something: a process of its own tries."""
    if sys.platform != "linux":
        return False
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _call(name: str, *arguments: object) -> int:
    """A function of the C library, or a system call by its number."""
    library = ctypes.CDLL(None, use_errno=True)
    answer = (
        library.syscall(*arguments) if name == "syscall" else getattr(library, name)(*arguments)
    )
    if answer < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return answer


# --- namespaces ---------------------------------------------------------------------------------------------------


def _rehearse(kinds: int, folders: Sequence[Path]) -> None:
    _isolate(kinds, folders)
    if kinds & _PROCESSES and not is_possible(_mount_processes):
        raise OSError("no /proc of its own")


def _isolate(kinds: int, folders: Sequence[Path]) -> None:
    """Enter new namespaces, and arrange them."""
    sockets = _sockets()  # a network namespace shows its own alone
    _unshare(kinds)
    if kinds & _NETWORK:
        with socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM
        ) as control:  # 0x8914: SIOCSIFFLAGS; 0x41: up and running
            fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
    if kinds & _MOUNTS:
        _write_protect(folders, sockets)


def _unshare(kinds: int) -> None:
    """Leave namespaces. A process that stays outside says which user is whom: root keeps all users' files."""
    process, (reads, writes) = os.getpid(), os.pipe()
    helper = os.fork()
    if not helper:
        try:
            os.close(writes)
            os.read(reads, 1)
            if kinds & _USER:
                _write_maps(process)
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(reads)
    try:
        _call("unshare", kinds)
    finally:
        os.close(writes)
        ended = os.waitpid(helper, 0)[1]
    if ended:
        raise OSError("the ids of a user namespace can't be written")


def _write_maps(process: int) -> None:
    """Each id means itself within the namespace: all of them for root, else the user's own."""
    for kind, own in (("uid", os.getuid()), ("gid", os.getgid())):
        ranges = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
        place = Path(f"/proc/{process}/{kind}_map")
        try:
            if os.getuid():
                raise PermissionError
            place.write_text("".join(f"{first} {first} {count}\n" for first, _, count in ranges))
        except OSError:
            Path(f"/proc/{process}/setgroups").write_text("deny")
            place.write_text(f"{own} {own} 1")


def _write_protect(folders: Sequence[Path], sockets: Sequence[str]) -> None:
    """Mount everything read-only but some folders, with a ``/dev/shm`` of its own and no sockets of servers.

    A mount that is read-only keeps what Landlock does not: permissions, owners, times and attributes.
    """
    _call("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)
    own = sorted(
        (folder.resolve() for folder in folders if folder != Path("/dev/shm")),
        key=lambda path: path.parts,
    )
    for folder in own:
        _call("mount", os.fsencode(folder), os.fsencode(folder), None, _BIND | _RECURSIVE, None)
    _set_read_only(Path("/"), True, _AT_RECURSIVE)
    for folder in own:
        _set_read_only(folder, False)
    hidden = {
        Path(f"/run/user/{os.getuid()}"),
        Path(os.environ.get("XDG_RUNTIME_DIR") or "/dev/shm"),
        Path("/dev/shm"),
    }
    for folder in hidden:
        if folder.is_dir():
            _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, None)
    for path in sockets:
        with suppress(OSError):
            _call("mount", b"/dev/null", os.fsencode(path), None, _BIND, None)


def _set_read_only(folder: Path, on: bool, flags: int = 0) -> None:
    attributes = struct.pack("QQQQ", _READ_ONLY * on, _READ_ONLY * (not on), 0, 0)
    _call("syscall", _MOUNT_SETATTR, -100, os.fsencode(folder), flags, attributes, len(attributes))


def _sockets() -> list[str]:
    """Sockets in folders that servers of this machine listen at."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
            path = line.split(maxsplit=7)[-1]
            with suppress(OSError):
                if path.startswith("/") and stat.S_ISSOCK(os.lstat(path).st_mode):
                    found.append(path)
    return list(dict.fromkeys(found))[:MOST_SOCKETS]


# --- processes ----------------------------------------------------------------------------------------------------


def _mount_processes() -> None:
    """In the first process of a namespace: what ``/proc`` shows are those within it."""
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    _call("mount", b"proc", b"/proc", b"proc", _NO_SUID_DEV_EXEC, None)


def _guard(new_processes: bool) -> None:
    """Go on in a child. This process waits for it, ends what it leaves behind, and ends as it did.

    In a namespace of processes the child's parent is the first one there, and the kernel ends all others with it.
    """
    _call("prctl", _SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child:
        _wait_and_end(child)
    if not new_processes:
        return
    _call("mount", b"proc", b"/proc", b"proc", _NO_SUID_DEV_EXEC, None)
    child = os.fork()
    if child:
        _wait_and_end(child)


def _wait_and_end(child: int) -> NoReturn:
    os.closerange(3, 1024)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    ended, status = 0, 0
    while ended != child:
        ended, status = os.waitpid(-1, 0)
    for _ in range(LEFT_TRIES):
        left = _children()
        if not left:
            break
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _children() -> list[int]:
    """Processes whose parent this one is, or became when theirs had ended."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            fields = (
                Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            )
            if int(fields[1]) == os.getpid():
                found.append(int(name))
    return found


def _drop_capabilities() -> None:
    """Root keeps its rights over files: nothing that is mounted, traced, loaded or configured; others keep nothing.

    No program that it starts gets more.
    """
    kept = _OVER_FILES if os.geteuid() == 0 else ()
    for number in range(_LAST_CAPABILITY + 1):
        if number not in kept:
            with suppress(OSError):  # an unknown number, or none to be given up
                _call("prctl", _DROP_BOUND, number, 0, 0, 0)
    mask = sum(1 << number for number in kept)
    library = ctypes.CDLL(None, use_errno=True)
    data = (ctypes.c_uint32 * 6)()
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version with 64 bits; this process
    if library.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    for word in range(2):
        own = mask >> (32 * word) & 0xFFFFFFFF
        for column in range(3):  # effective, permitted, inheritable
            data[3 * word + column] &= own if column < 2 else 0
    if library.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)


# --- Landlock -----------------------------------------------------------------------------------------------------


def _landlock_version() -> int:
    try:
        return _call("syscall", _CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def write_only_below(folders: Sequence[Path]) -> None:
    """Let this process, and those that it starts, write below these folders alone; ``/dev/null`` and its kind stay.

    Raises :class:`OSError` where the platform doesn't allow it.
    """
    version = _landlock_version()
    if version < _TRUNCATES:
        raise OSError("this version of Landlock lets a process empty every file")
    handled = (
        _WRITES | _IOCTL_DEVICE * (version >= _DEVICES) | _RESOLVE_UNIX * (version >= _SOCKETS)
    )
    attributes = struct.pack("QQ", handled, 0)
    if version >= _SCOPES:
        attributes += struct.pack("Q", _SIGNALS_AND_ABSTRACT_SOCKETS)
    rules = _call("syscall", _CREATE_RULESET, attributes, len(attributes), 0)
    nodes = [Path("/dev", name) for name in _NODES] + [
        Path(os.ttyname(file)) for file in (1, 2) if os.isatty(file)
    ]
    places = [(folder, _WRITES) for folder in folders] + [
        (node, _WRITE_FILE | _TRUNCATE) for node in nodes
    ]
    for path, rights in places:
        with suppress(FileNotFoundError):
            place = os.open(path, os.O_PATH)
            _call("syscall", _ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0)
            os.close(place)
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("syscall", _RESTRICT_SELF, rules, 0)
    os.close(rules)


def caches(scratch: Path) -> tuple[list[Path], dict[str, str]]:
    """Where libraries keep what they download, as far as it is there; and variables of the environment.

    The variables lead those libraries to a scratch folder whose cache isn't there, or whose cache must not hold what is
    made for a simulated card. Our own cache isn't among the folders: code is loaded from it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    usual = {"HF_HOME": cache / "huggingface", "TORCH_HOME": cache / "torch"}
    named = {name: Path(os.environ.get(name) or path) for name, path in usual.items()}
    missing = [name for name, path in named.items() if not path.is_dir()]
    missing += [
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "WANDB_CACHE_DIR",
        "WANDB_CONFIG_DIR",
        "WANDB_DATA_DIR",
    ]
    more = [
        Path(os.environ[name])
        for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE")
        if os.environ.get(name)
    ]
    return [*named.values(), *more, Path("/dev/shm")], {
        name: str(scratch / name.lower()) for name in missing
    }
