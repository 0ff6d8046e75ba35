"""The sandbox: what a command can do in it, what it can't do to the host, and that nothing runs without it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tqdm

from dryfit.common.errors import UserError
from scripts.tasks.shell.execution import worker
from scripts.tasks.shell.execution.sandbox import Sandbox, SandboxState
from tests.unit.tasks.shell.execution import attacks

ROOT = Path(__file__).resolve().parents[5]
SECRET = "what no command may read"


def sandbox_or_skip(**options) -> Sandbox:
    try:
        return Sandbox(**options).__enter__()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sandbox():
    made = sandbox_or_skip(
        states={
            "one": SandboxState(
                "mkdir /data; echo a > /data/a; echo b > /data/b; echo $COLOUR > /c",
                {"COLOUR": "red"},
            )
        }
    )
    yield made
    made.__exit__()


def run(sandbox, command):
    (result,) = sandbox.run([("one", command)])
    return result


# --- what a command did -----------------------------------------------------------------------------------------------


def test_output_status_and_changes_are_told(sandbox):
    result = run(
        sandbox,
        "cat /data/a /c; echo oops >&2; echo new > /data/a; rm /data/b; mkdir -m 700 /d; ln -s a /data/l; exit 3",
    )
    assert (result["stdout"], result["stderr"], result["end"], result["status"]) == (
        "a\nred\n",
        "oops\n",
        "exit",
        3,
    )
    assert result["complete"] and result["changes"].keys() == {
        "/data/a",
        "/data/b",
        "/data/l",
        "/d",
    }
    before, after = result["changes"]["/data/a"]
    assert before[:2] == after[:2] == ["file", "0o644"] and before[2] != after[2]
    assert result["changes"]["/data/b"][1] is None
    assert result["changes"]["/data/l"] == [None, ["link", "", "a"]]
    assert result["changes"]["/d"] == [None, ["folder", "0o700", ""]]


@pytest.mark.parametrize(
    ("command", "changed"),
    [
        ("touch /data/a", set()),  # the time alone
        ("chmod +x /data/a", {"/data/a"}),
        ("rm -r /data", {"/data", "/data/a", "/data/b"}),
        ("rm -r /data && mkdir /data && echo a > /data/a", {"/data/b"}),
        ("mv /data /moved", {"/data", "/data/a", "/data/b", "/moved", "/moved/a", "/moved/b"}),
        ("echo a > /tmp-file; rm /tmp-file", set()),
    ],
)
def test_changes_are_those_of_the_content(sandbox, command, changed):
    result = run(sandbox, command)
    assert set(result["changes"]) == changed


def test_half_a_state_is_none():
    made = sandbox_or_skip(
        states={"slow": SandboxState("echo a > /a; sleep 9; echo b > /b")},
        limits={"wall_seconds": 1},
    )
    with pytest.raises(UserError, match="file system slow was not finished") as error:
        made.run([("slow", "ls /a /b")])
    assert "limit on time" in str(error.value)
    with pytest.raises(
        UserError, match="in the middle of its work"
    ) as error:  # it can, and is no matter of rights
        made.outer[0].ask("run", state="nosuch", command="ls")
    assert "KeyError: 'nosuch'" in error.value.found and "administrator" not in str(error.value)
    made.__exit__()


def test_each_command_finds_the_state_as_it_was_prepared(sandbox):
    assert run(sandbox, "rm -r /data; echo x > /c")["status"] == 0
    assert run(sandbox, "cat /c /data/a; ls -la --time-style=full-iso /data")["stdout"].startswith(
        "red\na\n"
    )
    assert all(
        sorted(run(sandbox, "seq 3 | tee >(wc -l)")["stdout"].split()) == ["1", "2", "3", "3"]
        for _ in range(3)
    )
    assert (
        run(sandbox, "find /data -mmin -120 -mmin +5 | sort")["stdout"]
        == "/data\n/data/a\n/data/b\n"
    )


# --- what was tried against it ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host():
    """Things of the host that the attacks are after."""
    folder = Path(tempfile.mkdtemp(prefix="host-"))
    folder.chmod(0o755)
    (folder / "secret").write_text(SECRET)
    listening, local = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    local.bind(str(folder / "socket"))
    local.listen()
    for one in (listening, local):
        one.settimeout(0)
    process = subprocess.Popen(["sleep", "600"])
    facts = {
        "secret": str(folder / "secret"),
        "port": listening.getsockname()[1],
        "socket": str(folder / "socket"),
    }
    yield folder, facts, process, (listening, local)
    process.kill()
    process.wait()
    listening.close()
    local.close()
    shutil.rmtree(folder)


@pytest.fixture(
    scope="module",
    params=["as this user", "as an ordinary user of a host whose root runs the tests"],
)
def attacked(request, host):
    """What became of the attacks, by name."""
    folder, facts, *_ = host
    sandbox_or_skip(states={"one": SandboxState("true")}).__exit__()
    if request.param == "as this user":
        return attacks.run(facts)
    if os.geteuid() != 0 or not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("needs root, and a Python in /usr/bin")
    for name in (
        "scripts/common",
        "scripts/tasks/shell/execution",
        "tests/unit/tasks/shell/execution",
        "dryfit/common",
    ):
        shutil.copytree(
            ROOT / name, folder / "project" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "dryfit" / "__init__.py", folder / "project" / "dryfit")
    shutil.copytree(Path(tqdm.__file__).parent, folder / "project" / "tqdm")
    done = subprocess.run(
        ["/usr/bin/python3", "-m", "tests.unit.tasks.shell.execution.attacks", json.dumps(facts)],
        cwd=folder / "project",
        user=12345,
        group=12345,
        extra_groups=[],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.few(1)
def test_the_host_is_as_it_was(attacked, host):
    folder, _, process, listening = host
    assert (folder / "secret").read_text() == SECRET and process.poll() is None
    for one in listening:
        with pytest.raises(BlockingIOError):
            one.accept()
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in running if b"4711.25" in line]


def test_nothing_of_the_host_is_read_and_nothing_is_granted(attacked):
    assert SECRET not in json.dumps(attacked)
    for name in ("network", "socket of the host", "sysrq", "mounts", "namespaces", "other users"):
        assert "got" not in attacked[name]["stdout"], name
        assert attacked[name]["end"] == "exit" and attacked[name]["status"] != 0, name
    assert attacked["other users"]["stdout"] == "0\n"  # root of the sandbox, as before
    assert not attacked["devices"]["stdout"] and not attacked["devices"]["changes"]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("fork bomb", "time"),
        ("busy", "time"),
        ("closed output", "time"),
        ("endless output", "output"),
        ("fill the inodes", "inodes"),
        ("memory of many", "memory"),
        ("a megabyte", "length"),
    ],
)
def test_limits_end_what_has_no_end(attacked, name, end):
    assert attacked[name]["end"] == end and attacked[name]["status"] is None
    assert attacked[name]["wall_seconds"] < 30 and len(attacked[name]["stdout"]) <= 1 << 20


def test_what_holds_memory_that_nobody_counts_is_refused(attacked):
    """Sockets are there, but nothing can be sent over one; and no call that keeps memory in the kernel."""
    assert (
        attacked["sockets"]["stdout"] == "[]\n" and attacked["kernel's memory"]["stdout"] == "[]\n"
    )
    assert (
        int(attacked["pipes"]["stdout"]) <= 30
    )  # MiB in one process; for one user together 64 (pipe-user-pages-soft)


def test_ordinary_memory_is_bounded(attacked):
    assert attacked["memory"]["end"] == "memory" or "MemoryError" in attacked["memory"]["stderr"]
    assert sum(
        attacks.LIMITS["scratch_bytes"] >= int(entry[1][2].split()[0])
        for entry in attacked["fill the disk"]["changes"].values()
    )


def test_what_an_attack_leaves_is_described_and_not_followed(attacked):
    links = attacked["links"]["changes"]
    assert links["/l2"] == [None, ["link", "", "/proc/1/root"]] and links["/l4"][1][0] == "fifo"
    assert links["/l1"][1][2].endswith("/secret")
    assert r"/\xff\xfe" in attacked["names"]["changes"] and "/a\nb" in attacked["names"]["changes"]
    assert not attacked["sparse files"]["complete"] and not attacked["deep folders"]["complete"]
    json.dumps(attacked, ensure_ascii=False).encode()  # UTF-8 holds all of it
    assert attacked["waits for input"]["stdout"] == "<>\n"
    assert attacked["not text"]["stdout"] == "a b?\ngrößer 大 \u202e\n"
    lines = attacked["what is left"]["stdout"].splitlines()
    assert {"data", "usr", "proc"} <= set(lines[:12]) and "kept" in lines
    assert (
        not {line for line in lines if line.startswith(("s1", "f1", "d1"))} and int(lines[-1]) > 100
    )


# --- without a sandbox ------------------------------------------------------------------------------------------------


def refused(monkeypatch, **environment) -> UserError:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match="Nothing was executed") as error,
        Sandbox({"one": SandboxState("true")}),
    ):
        pass
    return error.value


def test_without_bubblewrap_it_is_said_what_to_install(monkeypatch, tmp_path):
    assert "apt-get install bubblewrap" in refused(monkeypatch, PATH=str(tmp_path)).write


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("bwrap: setting up uid map: Permission denied", "administrator"),
        ("bwrap: No permissions to create new namespace", "AppArmor"),
        ("bwrap: Unknown option --overlay-src", "bubblewrap 0.11"),
        ("bwrap: Can't make overlay mount on /newroot/: Operation not permitted", "Linux 6.6"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere bubblewrap is not even looked for")
def test_a_bubblewrap_that_can_not_is_explained(monkeypatch, tmp_path, said, words):
    tool = tmp_path / "bwrap"
    tool.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    tmp_path.chmod(0o755)
    tool.chmod(0o755)
    if os.geteuid() == 0:
        monkeypatch.setattr(
            "scripts.tasks.shell.execution.sandbox.NOBODY", 0
        )  # whom pytest's folder lets in
    error = refused(monkeypatch, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert words in error.allowed and said in error.found and "execution: none" in error.allowed


@pytest.mark.skipif(
    not shutil.which("unshare") or os.geteuid() != 0, reason="needs root and unshare(1)"
)
def test_where_the_kernel_gives_no_user_namespaces_nothing_is_executed(tmp_path):
    program = "from scripts.tasks.shell.execution.sandbox import *\n"
    program += "with Sandbox({'one': SandboxState('touch /tmp/x')}) as s: print('made')"
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    done = subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "sh",
            "-c",
            shell,
            "sh",
            sys.executable,
            "-c",
            program,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    assert (
        "made" not in done.stdout
        and "Nothing was executed" in done.stderr
        and "UserError" in done.stderr
    )


def test_the_worker_does_nothing_outside_the_sandbox(tmp_path):
    message = json.dumps({"bwrap": "bwrap", "limits": worker.LIMITS})
    task = json.dumps(
        ["prepare", {"name": "x", "script": f"touch {tmp_path}/ran", "environment": {}}]
    )
    done = subprocess.run(
        [sys.executable, "-I", worker.__file__],
        input=f"{message}\n{task}\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "nothing was done" in done.stderr and not done.stdout
    assert list(tmp_path.iterdir()) == []
