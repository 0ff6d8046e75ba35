"""What runs inside the outer sandbox: prepares file systems, runs each command in an inner one, tells what it did.

``sandbox.py`` gives the text of this file to a Python of the host, which finds neither the project nor its packages
in there: the standard library alone. Messages are lines of JSON: first the settings, then the name of a
task (prepare, run) with its arguments, each answered by a line.

An inner sandbox sees two overlays, on the prepared root and on the host's /usr. What a command wrote lies in their
upper layers afterwards: that is the difference, whatever else the command did.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import time

KIB, MIB = 1 << 10, 1 << 20
# What one command may use; more ends it. Of the watched ones (memory, inodes) a fiftieth of a second's worth more.
LIMITS = {
    "command_bytes": 100_000,  # of its text; the kernel takes 128 KiB in one argument. A longer one is not run
    "cpu_seconds": 10,  # of each process
    "wall_seconds": 10,
    "file_bytes": 64 * MIB,
    "address_space_bytes": 1024 * MIB,  # of each process
    "memory_bytes": 1024 * MIB,  # resident, of all processes together
    "output_bytes": MIB,  # stdout and stderr together
    "scratch_bytes": 256 * MIB,  # what all states and one command's changes may hold: it is memory
    "inodes": 50_000,  # the same for files and folders, each of which takes a kilobyte of the kernel's memory
    "processes": 32,
    "descriptors": 60,  # of each process
    "read_bytes": 256 * MIB,  # that are read to describe what a command has changed
}
# System calls that are refused, by their numbers on x86-64 and on ARM64. They hold memory that is nobody's, reach
# what is not divided into namespaces (keys, the kernel's log), or lead deep into the kernel.
REFUSED_CALLS = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "fanotify_init": (300, 262),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "msgget": (68, 186),
    "perf_event_open": (298, 241),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "shmget": (29, 194),
    "socketpair": (53, 199),
    "syslog": (103, 116),
    "userfaultfd": (323, 282),
}
MACHINES = {
    "x86_64": (0, 0xC000003E, 41),
    "aarch64": (1, 0xC00000B7, 198),
}  # column above, AUDIT_ARCH, socket(2)
LINKS = [
    name
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
    if os.path.islink("/" + name)
]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The host's, read-only: without them many programs in /usr don't start.
ETC = [
    word
    for path in ("/etc/alternatives", "/etc/ld.so.cache")
    for word in ("--ro-bind-try", path, path)
]
SEALED = (
    "--unshare-user --unshare-ipc --unshare-pid --unshare-uts --unshare-cgroup-try --die-with-parent --new-session"
    " --uid 0 --gid 0 --clearenv --cap-drop ALL --cap-add CAP_DAC_OVERRIDE"
).split()
# Files are this old when commands run: "in the last two hours" finds them, and so does "more than five minutes ago".
AGE_SECONDS = 1800
# Limits are set in here, since RLIMIT_NPROC counts the processes of the user namespace in which it is set. What the
# command leaves running, as `tee >(wc -l)` does, has half a second to end by itself.
SHELL = (
    "ulimit -c 0 -q 0 -i 256 -t {cpu_seconds} -f {file_kib} -v {address_space_kib} -n {descriptors} -u {processes}"
    '; /bin/bash -c "$1"; status=$?'
    "; for _ in {{1..50}}; do set -- /proc/[0-9]*; [ $# -le 2 ] && break; sleep 0.01; done; exit $status"
)


def seccomp_filter(machine):
    """A program for the kernel's filter of system calls (struct sock_filter, seccomp(2)).

    Calls by another convention (32 bits, x32) do not exist here; REFUSED_CALLS are not permitted; sockets are of the
    internet's families or ask for routes: others (AF_UNIX, AF_VSOCK, AF_ALG) hold memory or reach the host.
    """
    column, architecture, socket_number = MACHINES[machine]
    allow, fail = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO + errno
    load, equal, at_least, give = (
        0x20,
        0x15,
        0x35,
        0x06,
    )  # BPF_LD+W+ABS, BPF_JMP+JEQ+K, BPF_JMP+JGE+K, BPF_RET+K
    steps = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, fail + 38),
        (load, 0, 0, 0),
    ]  # ENOSYS
    steps += [(at_least, 0, 1, 0x40000000), (give, 0, 0, fail + 38)]
    for numbers in REFUSED_CALLS.values():
        steps += [(equal, 0, 1, numbers[column]), (give, 0, 0, fail + 1)]  # EPERM
    steps += [(equal, 1, 0, socket_number), (give, 0, 0, allow), (load, 0, 0, 16)]  # the family
    for family in (2, 10):  # AF_INET, AF_INET6
        steps += [(equal, 0, 1, family), (give, 0, 0, allow)]
    steps += [
        (equal, 0, 3, 16),
        (load, 0, 0, 32),
        (equal, 0, 1, 0),
        (give, 0, 0, allow),
    ]  # AF_NETLINK, NETLINK_ROUTE
    steps += [(give, 0, 0, fail + 97)]  # EAFNOSUPPORT
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def take_the_network_down():
    """Switch off the loopback interface, all there is, and take its address: nothing can be sent, no buffer filled."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        flags = struct.unpack(
            "16sh14x", fcntl.ioctl(handle, 0x8913, struct.pack("16sh14x", b"lo", 0))
        )[1]
        fcntl.ioctl(
            handle, 0x8914, struct.pack("16sh14x", b"lo", flags & ~1)
        )  # SIOCGIFFLAGS above; SIOCSIFFLAGS
        fcntl.ioctl(
            handle, 0x8916, struct.pack("16sh14x", b"lo", socket.AF_INET)
        )  # SIOCSIFADDR: none


def text(data):
    """Bytes, or a name that the system gave, as text that UTF-8 can hold."""
    return (
        os.fsencode(data).decode("utf-8", "backslashreplace")
        if isinstance(data, str)
        else data.decode("utf-8", "backslashreplace")
    )


class FolderWalk:
    """What lies under a folder: no link is followed, nothing but regular files is opened."""

    def __init__(self, top, limits):
        self.found, self.opaque, self.complete = {}, set(), True
        self.left_bytes, self.limits, todo = limits["read_bytes"], limits, [""]
        while todo:
            folder = todo.pop()
            try:
                for name in sorted(os.listdir(top + folder)):
                    if len(self.found) >= limits["inodes"]:
                        self.complete = False
                        return
                    path = folder + "/" + name
                    self.found[path] = entry = self.describe(top + path)
                    if entry and entry[0] == "folder":
                        todo.append(path)
                        if "user.overlay.opaque" in os.listxattr(top + path, follow_symlinks=False):
                            self.opaque.add(path)
            except OSError:  # a path longer than the kernel takes
                self.complete = False

    def describe(self, path):
        """Type, permissions and content; None for the mark of an overlay that something was removed."""
        info = os.lstat(path)
        mode, kind = oct(stat.S_IMODE(info.st_mode)), stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFCHR and info.st_rdev == 0:
            return None
        if kind == stat.S_IFLNK:
            return ["link", "", text(os.readlink(path))]
        if kind != stat.S_IFREG:
            return [
                {stat.S_IFDIR: "folder", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}.get(
                    kind, "device"
                ),
                mode,
                "",
            ]
        digest = hashlib.sha256()
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            while self.left_bytes > 0:
                block = file.read(MIB)
                if not block:
                    return ["file", mode, f"{info.st_size} bytes, sha256 {digest.hexdigest()}"]
                digest.update(block)
                self.left_bytes -= len(block)
        self.complete = False
        return ["file", mode, f"{info.st_size} bytes"]


def difference(before, above):
    """``{path: [before, after]}`` of what changed, None where there is nothing. A changed time alone is no change."""
    after = dict(above.found)
    hidden = tuple(
        p + "/"
        for p, entry in above.found.items()
        if not entry or entry[0] != "folder" or p in above.opaque
    )
    after.update({path: None for path in before if path not in after and path.startswith(hidden)})
    return {
        path: [before.get(path), after[path]]
        for path in sorted(after)
        if before.get(path) != after[path]
    }


class Worker:
    """Prepared states by name, and commands run on copies of them that only hold what differs."""

    def __init__(self, bwrap, limits):
        self.bwrap, self.limits = bwrap, limits
        self.born = int(time.time()) - AGE_SECONDS
        self.filter = seccomp_filter(os.uname().machine)
        self.environments, self.before = {}, {}

    def prepare(self, name, script, environment):
        """Make a state: run its script on an empty root."""
        top = "/scratch/" + name
        os.makedirs(top + "/etc")
        for link in LINKS:
            os.symlink("usr/" + link, top + "/" + link)
        self.environments[name] = environment
        result = self.execute(
            ["--bind", top, "/", "--ro-bind", "/usr", "/usr", *ETC], environment, script
        )
        for folder, folders, files in os.walk(top, topdown=False):
            for path in [folder + "/" + entry for entry in files + folders] + [folder]:
                if (
                    os.lstat(path).st_mtime >= self.born + AGE_SECONDS - 1
                ):  # else the script dated it itself
                    os.utime(path, (self.born, self.born), follow_symlinks=False)
        self.before[name] = FolderWalk(top, self.limits).found
        return result

    def run(self, state, command):
        """Run a command on a state: what it printed, how it ended, what it changed."""
        for folder in ("above/root", "above/usr", "spare/root", "spare/usr"):
            os.makedirs("/scratch/" + folder)
            os.utime(
                "/scratch/" + folder, (self.born, self.born)
            )  # else "ls -l /" shows when the command ran
        mounts = [
            "--overlay-src",
            "/scratch/" + state,
            "--overlay",
            "/scratch/above/root",
            "/scratch/spare/root",
            "/",
        ]
        mounts += [
            "--overlay-src",
            "/usr",
            "--overlay",
            "/scratch/above/usr",
            "/scratch/spare/usr",
            "/usr",
        ]
        try:
            result = self.execute(mounts + ETC, self.environments[state], command)
            root, usr = (
                FolderWalk("/scratch/above/root", self.limits),
                FolderWalk("/scratch/above/usr", self.limits),
            )
            changes = difference(self.before[state], root)
            changes.update({"/usr" + path: [None, entry] for path, entry in usr.found.items()})
            changes = {text(path): change for path, change in changes.items()}
            return dict(result, changes=changes, complete=root.complete and usr.complete)
        finally:
            subprocess.run(
                ["rm", "-rf", "/scratch/above", "/scratch/spare"],
                stderr=subprocess.DEVNULL,
                check=True,
            )

    def execute(self, mounts, environment, command):
        """Run a command in an inner sandbox: its end (exit, or the limit that it broke), exit status and output."""
        limits = self.limits
        shell = SHELL.format(
            file_kib=limits["file_bytes"] // KIB,
            address_space_kib=limits["address_space_bytes"] // KIB,
            **limits,
        )
        variables = dict(
            {"HOME": "/root", "HOSTNAME": "sandbox", "PATH": PATH, "TERM": "dumb", "TZ": "UTC"},
            **environment,
        )
        read_end, write_end = os.pipe()
        os.write(write_end, self.filter)
        os.close(write_end)
        words = [self.bwrap, *SEALED, *"--disable-userns --hostname sandbox".split(), *mounts]
        words += "--proc /proc --dev /dev".split()
        words += [
            "--size",
            str(16 * MIB),
            "--tmpfs",
            "/dev/shm",
            "--remount-ro",
            "/dev",
            "--chdir",
            "/",
        ]
        words += ["--seccomp", str(read_end)]
        words += [word for name, value in variables.items() for word in ("--setenv", name, value)]
        line = command.encode("utf-8", "replace").replace(
            b"\0", b" "
        )  # the kernel takes no NUL in an argument
        if len(line) > limits["command_bytes"]:
            os.close(read_end)
            return {
                "stdout": "",
                "stderr": "",
                "end": "length",
                "status": None,
                "wall_seconds": 0.0,
            }
        started, end = time.monotonic(), "exit"
        process = subprocess.Popen(
            [*words, "/bin/bash", "-c", shell, "bash", line],
            pass_fds=[read_end],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.close(read_end)
        output = {"stdout": bytearray(), "stderr": bytearray()}
        with selectors.DefaultSelector() as selector:
            for name in output:
                selector.register(getattr(process, name), selectors.EVENT_READ, name)
            while end == "exit" and (
                selector.get_map() or process.poll() is None
            ):  # it may close its output and go on
                for key, _ in selector.select(0.02):
                    block = os.read(key.fd, 65536)
                    output[key.data] += block
                    if not block:
                        selector.unregister(key.fileobj)
                end = (
                    self.broken_limit(time.monotonic() - started, sum(map(len, output.values())))
                    or end
                )
        process.kill()
        status = process.wait()
        left = others()
        while left:  # nothing may write while the changes are collected
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
            left = others()
        process.stdout.close()
        process.stderr.close()
        said = {name: text(bytes(data[: limits["output_bytes"]])) for name, data in output.items()}
        return dict(
            said,
            end=end,
            status=status if end == "exit" else None,
            wall_seconds=time.monotonic() - started,
        )

    def broken_limit(self, seconds, output_bytes):
        """The name of a limit that the command is beyond, if any."""
        limits = self.limits
        if seconds > limits["wall_seconds"]:
            return "time"
        if output_bytes > limits["output_bytes"]:
            return "output"
        scratch = os.statvfs("/scratch")
        if scratch.f_files - scratch.f_ffree > limits["inodes"]:
            return "inodes"
        return "memory" if resident_bytes() > limits["memory_bytes"] else None


def others():
    """Processes here beside this one and its init: those of the command, since one runs at a time."""
    return [
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and int(name) not in (1, os.getpid())
    ]


def resident_bytes():
    """Memory that the command's processes hold."""
    pages = 0
    for pid in others():
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/statm") as file,
        ):  # it may end meanwhile
            pages += int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def must_be_sealed():
    """End here unless this is the outer sandbox: what this file does elsewhere, it would do to the host."""
    with open("/proc/self/uid_map") as file:
        mapped = file.read().split()
    if len(mapped) != 3 or mapped[2] != "1" or not os.path.ismount("/scratch"):
        sys.exit(
            "This runs in scripts/tasks/shell/execution/sandbox.py's sandbox alone; nothing was done."
        )


def main():
    must_be_sealed()
    ctypes.CDLL(None).prctl(
        4, 0
    )  # PR_SET_DUMPABLE: no process of the same user looks into this one
    take_the_network_down()
    worker = Worker(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        task, arguments = json.loads(line)
        print(json.dumps(getattr(worker, task)(**arguments)), flush=True)


if __name__ == "__main__":
    main()
