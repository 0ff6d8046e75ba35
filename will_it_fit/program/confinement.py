"""What a program's process gives up before it starts, for good: the network, and files to write.

Both are Linux's own. A network namespace of its own has no way out; Landlock (``linux/landlock.h``, since Linux 5.13)
lets a process write below some folders alone, also through links that lead elsewhere. It reads what its user can read.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET of sched.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, of the same numbers on all architectures
_NO_NEW_PRIVILEGES = 38  # of prctl
_TRUNCATES = 3  # the first version of Landlock that keeps a file from being emptied
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_WRITES = sum(1 << bit for bit in (1, *range(4, 15)))  # write, remove, make of each kind, move to elsewhere, truncate


def leave_network() -> None:
    """Take the network away from this process, but for the machine itself (``localhost``).

    Raises
    ------
    OSError
        Where the platform doesn't allow it.
    """
    user, group = os.getuid(), os.getgid()
    kinds = _NEW_NETWORK if user == 0 else _NEW_NETWORK | _NEW_USER
    if ctypes.CDLL(None, use_errno=True).unshare(kinds):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:  # 0x8914: SIOCSIFFLAGS; 0x41: up and running
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x41))


def write_only_below(folders: Sequence[Path]) -> None:
    """Let this process, and those that it starts, write below these folders alone; ``/dev/null`` and its kind stay.

    Raises
    ------
    OSError
        Where the platform doesn't allow it.
    """
    library = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        answer = library.syscall(number, *arguments)
        if answer < 0:
            raise OSError(ctypes.get_errno(), "landlock")
        return answer

    if call(_CREATE_RULESET, None, 0, 1) < _TRUNCATES:
        raise OSError("this version of Landlock lets a process empty every file")
    handled = struct.pack("QQ", _WRITES, 0)
    rules = call(_CREATE_RULESET, handled, len(handled), 0)
    for folder, rights in [*((each, _WRITES) for each in folders), (Path("/dev"), _WRITE_FILE | _TRUNCATE)]:
        if not folder.is_dir():
            continue
        place = os.open(folder, os.O_PATH)
        call(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    if library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    call(_RESTRICT_SELF, rules, 0)
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
    missing += ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"]
    more = [Path(os.environ[name]) for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE") if os.environ.get(name)]
    return [*named.values(), *more, Path("/dev/shm")], {name: str(scratch / name.lower()) for name in missing}


def is_possible(act: Callable[[], None]) -> bool:
    """Whether this platform lets a process give something up: a process of its own tries."""
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
