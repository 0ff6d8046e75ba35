"""Attacks from within a program's confinement, on what the test itself has made: files, processes and sockets."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dryfit.program import confinement
from dryfit.program.confinement import enter, is_possible, write_only_below
from tests.dryfit.program.test_run import answered, program

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="what a process gives up is Linux's"
)

UPDATES = """
import torch
weight = torch.nn.Parameter(torch.zeros(8, device="cuda"))
optimizer = torch.optim.SGD([weight])
for _ in range(3):
    weight.sum().backward()
    optimizer.step()
"""


def held(name: str) -> bool:
    """Whether this kernel holds a promise, as a process of its own finds that gives all of it up."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.set_inheritable(writes, True)
        os.dup2(writes, 2)  # the guard closes all but the first three
        got = enter([], network=False)
        os.write(2, b"1" if getattr(got, name) else b"0")
        os._exit(0)
    os.close(writes)
    os.waitpid(child, 0)
    said = os.read(reads, 1)
    os.close(reads)
    return said == b"1"


def needs(name: str) -> None:
    if not held(name):
        pytest.skip(f"this kernel does not hold it: {name}")


# What a program tries, each in a line that raises where it is kept from it. `target` is the test's own.
METADATA = {
    "permissions": "os.chmod(target, 0o777)",
    "owner": "os.chown(target, os.getuid(), os.getgid())",
    "times": "os.utime(target, (1, 1))",
    "attributes": "os.setxattr(target, 'user.mine', b'1')",
    "by a link": "os.symlink(target, 'link'); os.chmod('link', 0o777)",
    "by its folder": "os.chmod(os.path.dirname(target), 0o777)",
    "by a descriptor": "os.fchmod(os.open(target, os.O_RDONLY), 0o777)",
    "in a namespace of its own": "os.unshare(0x10020000) if hasattr(os, 'unshare') else libc.unshare(0x10020000);"
    " libc.mount(None, b'/', None, 0x1020, None); os.chmod(target, 0o777)",
}
FILES = {
    "writing": "open(target, 'w')",
    "emptying": "os.truncate(target, 0)",
    "deleting": "os.remove(target)",
    "renaming": "os.rename(target, target + '2')",
    "a hard link": "os.link(target, 'own')",
    "making": "open(target + '3', 'w')",
    "the kernel's log": "open('/dev/kmsg', 'w')",
    "a device": "os.mknod('node', 0o060666, os.makedev(7, 0)); os.open('node', os.O_WRONLY)",
    "a loop device": "os.open(next(iter(__import__('glob').glob('/dev/loop*')), '/dev/loop-control'), os.O_RDWR)",
}


@pytest.mark.thorough
def test_files_outside_stay_as_they_are(tmp_path):
    """Each attack is tried in a process of its own; the program prints those that went through."""
    needs("metadata")
    needs("files")
    inside, target = tmp_path / "inside", tmp_path / "outside" / "file"
    inside.mkdir()
    target.parent.mkdir()
    target.write_text("kept")
    os.utime(target, (1_000_000, 1_000_000))
    before = os.lstat(target)
    text = f"""
import ctypes, os, sys
libc, target = ctypes.CDLL(None), sys.argv[1]
for kind, line in {METADATA | FILES!r}.items():
    child = os.fork()
    if not child:
        try:
            exec(line)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, kind
{UPDATES}"""
    assert answered(inside, program(inside, text), str(target))["program"]["updates"] == 2
    after = os.lstat(target)
    assert (after.st_mode, after.st_uid, after.st_mtime, after.st_nlink) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime,
        before.st_nlink,
    )
    assert target.read_text() == "kept" and [each.name for each in target.parent.iterdir()] == [
        "file"
    ]
    assert "user.mine" not in os.listxattr(target)


@pytest.mark.thorough
def test_no_process_outside_is_signalled(tmp_path):
    needs("processes")
    with subprocess.Popen(["sleep", "600"]) as victim:
        text = f"""
import os, signal
for number in ({victim.pid}, os.getppid()):
    try:
        os.kill(number, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        continue
    print("sent to", number)
for name in filter(str.isdecimal, os.listdir("/proc")):
    command = open(f"/proc/{{name}}/cmdline").read()
    assert "sleep" not in command or int(name) == os.getpid(), command
{UPDATES}"""
        try:
            assert answered(tmp_path, program(tmp_path, text))["program"]["updates"] == 2
            assert victim.poll() is None
        finally:
            victim.kill()


@pytest.mark.thorough
def test_no_child_outlives_the_program(tmp_path):
    beats = tmp_path / "beats"
    beats.mkdir()
    loop = "import time\nwhile True:\n    open('beat', 'a').write('x')\n    time.sleep(0.1)"
    text = f"""
import os, subprocess, sys, time
for again in range(2):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir({str(beats)!r})
        os.execv(sys.executable, [sys.executable, "-c", {loop!r}])
while not os.path.exists({str(beats / "beat")!r}):
    time.sleep(0.1)
{UPDATES}"""
    answered(tmp_path, "--write", str(beats), program(tmp_path, text))
    size = (beats / "beat").stat().st_size
    time.sleep(1)
    assert size and (beats / "beat").stat().st_size == size


@pytest.mark.thorough
def test_servers_of_the_same_user_are_not_reached(tmp_path):
    needs("sockets")
    needs("abstract_sockets")
    inside = tmp_path / "inside"
    inside.mkdir()
    name = f"\0dryfit-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as by_path, socket.socket(socket.AF_UNIX) as by_name:
        by_path.bind(str(tmp_path / "server"))
        by_name.bind(name)
        for server in (by_path, by_name):
            server.listen()
            server.settimeout(0.1)
        text = f"""
import socket
for address in ({str(tmp_path / "server")!r}, {name!r}):
    try:
        socket.socket(socket.AF_UNIX).connect(address)
    except OSError as error:
        print(error)
    else:
        raise SystemExit(f"reached {{address!r}}")
own = socket.socket(socket.AF_UNIX)
own.bind("own")
own.listen()
socket.socket(socket.AF_UNIX).connect("own")
{UPDATES}"""
        assert answered(inside, program(inside, text))["program"]["updates"] == 2
        for server in (by_path, by_name):
            with pytest.raises(TimeoutError):
                server.accept()
        if held("processes"):  # abstract names are kept with a network, too
            answered(inside, "--network", program(inside, text), fresh=True)


def test_namespaces_are_those_that_unshare_makes():
    """The second level: the first one is another process's."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "--ipc", "--net", "true"]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets nobody leave namespaces")
    kinds = [*confinement._levels(network=False)][1]
    assert is_possible(lambda: confinement._unshare(kinds)) and not is_possible(
        lambda: confinement._unshare(1)
    )


def test_where_no_namespace_is_to_be_had(tmp_path, monkeypatch):
    """Landlock alone: it keeps files, signals and abstract names, and what is left behind is ended all the same."""
    if not is_possible(lambda: write_only_below([tmp_path])):
        pytest.skip("this kernel has no Landlock")
    monkeypatch.setattr(confinement, "_levels", lambda network: iter(()))
    (tmp_path / "outside").mkdir()
    inside = tmp_path / "inside"
    inside.mkdir()
    with subprocess.Popen(["sleep", "600"]) as victim:
        child = os.fork()
        if not child:
            got = enter([inside], network=False)
            told = [str(vars(got))]
            if os.fork() == 0:
                os.setsid()
                if os.fork():
                    os._exit(0)
                while True:
                    with open(inside / "beat", "a") as file:
                        file.write("x")
                    time.sleep(0.05)
            for act in (
                lambda: os.kill(victim.pid, 9),
                lambda: (tmp_path / "outside" / "file").write_text("x"),
            ):
                try:
                    act()
                except PermissionError:
                    told.append("kept")
            while not (inside / "beat").exists():
                time.sleep(0.05)
            (inside / "said").write_text("\n".join(told))
            os._exit(3)
        try:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
            held_, *kept = (inside / "said").read_text().splitlines()
            assert (
                "'metadata': False" in held_
                and "'network': False" in held_
                and "'files': True" in held_
            )
            signals = "'processes': True" in held_
            assert kept.count("kept") == 1 + signals and (not signals or victim.poll() is None)
            size = (inside / "beat").stat().st_size
            time.sleep(0.5)
            assert (inside / "beat").stat().st_size == size
        finally:
            victim.kill()


@pytest.mark.thorough
@pytest.mark.parametrize("end", ["raise SystemExit(7)", "os.kill(os.getpid(), signal.SIGSEGV)"])
def test_the_process_that_waits_ends_as_the_program_did(end):
    child = os.fork()
    if not child:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        enter([Path("/dev/shm")], network=False)
        exec(end.replace("raise SystemExit(7)", "os._exit(7)"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (
        7 if "7" in end else 128 + signal.SIGSEGV
    )


@pytest.mark.thorough
def test_what_it_needs_stays(tmp_path):
    """Temporary files, shared memory, several processes, its own folder's permissions, and what it writes there."""
    if not is_possible(lambda: write_only_below([tmp_path])):
        pytest.skip("this kernel has no Landlock")
    text = f"""
import multiprocessing, multiprocessing.shared_memory, os, tempfile
def work(queue):
    queue.put(os.getpid())
if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0o600)
    block = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
    block.close()
    block.unlink()
    with multiprocessing.Manager() as manager:
        queue = manager.Queue()
        process = multiprocessing.Process(target=work, args=(queue,))
        process.start()
        assert queue.get(timeout=600) == process.pid
        process.join()
    open("log", "w").write("x")
    os.chmod("log", 0o640)
    assert os.getpid() > 1 and os.path.exists(f"/proc/{{os.getpid()}}/stat") and os.access("/etc/passwd", os.R_OK)
{UPDATES.replace(chr(10), chr(10) + "    ")}
"""
    assert answered(tmp_path, program(tmp_path, text), fresh=True)["program"]["written"] == ["log"]
