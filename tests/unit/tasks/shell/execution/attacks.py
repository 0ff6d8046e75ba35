"""What a hostile answer might try, and the sandbox it is tried in: `python -m` this module, with FACTS.

Runs by itself, so that a test can start it as another user of the host. FACTS are what the attacks are told of the
host, as JSON: a file with a secret, a port that somebody listens on, a socket's path.
"""

import json
import sys

from scripts.tasks.shell.execution.sandbox import Sandbox, SandboxState

# Small, so that the tests are fast.
LIMITS = {
    "cpu_seconds": 2,
    "wall_seconds": 2,
    "file_bytes": 16 << 20,
    "memory_bytes": 200 << 20,
    "address_space_bytes": 400 << 20,
    "scratch_bytes": 64 << 20,
    "inodes": 4000,
    "read_bytes": 32 << 20,
}
# Each system call by its number on x86-64; -1 as its result is what is hoped for.
CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
calls = {"msgget": (68, 0, 0o1666), "semget": (64, 0, 200, 0o1666), "shmget": (29, 0, 1 << 20, 0o1666),
         "memfd_create": (319, b"x", 0), "io_uring_setup": (425, 8, ctypes.create_string_buffer(120)),
         "bpf": (321, 0, ctypes.create_string_buffer(120), 72), "userfaultfd": (323, 0), "fanotify_init": (300, 0, 0),
         "perf_event_open": (298, ctypes.create_string_buffer(120), 0, -1, -1, 0), "keyctl": (250, 0, -3, 1),
         "add_key": (248, b"user", b"x", b"y", 1, -3), "ptrace": (101, 16, os.getppid(), 0, 0),
         "syslog": (103, 3, ctypes.create_string_buffer(4096), 4096), "mq_open": (240, b"x", 0o102, 0o600, None)}
if os.uname().machine == "x86_64":
    print([name for name, call in calls.items() if libc.syscall(*call) != -1])
else:
    print([])
"""
SOCKETS = """
import itertools, socket
got = []
unix, packet, crypto, vsock = (1, 1, 0), (17, 3, 0), (38, 5, 0), (40, 1, 0)
for numbers in [unix, (1, 2, 0), (16, 3, 4), (16, 3, 2), packet, crypto, vsock, (15, 3, 2)]:
    try:
        socket.socket(*numbers)
        got.append(numbers)
    except OSError:
        pass
try:
    socket.socketpair()
    got.append("socketpair")
except OSError:
    pass
targets = ["127.0.0.1", "0.0.0.0", "127.1.2.3", "172.17.0.2", "224.0.0.1", "255.255.255.255", "::1", "::", "ff02::1%lo"]
for address, kind in itertools.product(targets, (socket.SOCK_DGRAM, socket.SOCK_STREAM)):
    try:
        one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        one.settimeout(0.2)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        one.bind(("::" if ":" in address else "0.0.0.0", 4000))
        one.connect((address, 4000))
        one.send(b"x" * 1000)
        got.append((address, kind, one.recv(2000)))
    except OSError:
        pass
print(got)
"""
PIPES = """
import fcntl, os
held = 0
try:
    while True:
        _, end = os.pipe()
        fcntl.fcntl(end, 1031, 1 << 20)
        held += fcntl.fcntl(end, 1032)
except OSError:
    print(held >> 20)
"""
DEEP = """
import os
for _ in range(3000):
    os.mkdir("d" * 50)
    os.chdir("d" * 50)
open("file", "w").write("x")
"""


def python(program: str) -> str:
    """A command that runs a Python program."""
    return f"python3 - <<'PROGRAM'\n{program}\nPROGRAM"


ATTACKS = {
    "fork bomb": ":(){{ :|:& }}; :; sleep 9",
    "remove everything": "rm -rf --no-preserve-root / 2>/dev/null; echo $?",
    "fill the disk": "for i in {{1..40}}; do head -c 15M /dev/zero > /f$i || break; done 2>/dev/null; echo done",
    "fill the inodes": python("import os\nfor i in range(10**6): os.mkdir(f'/d{{i}}')"),
    "files of the host": "cat {secret} /etc/shadow /root/.ssh/* ~nobody/*; ls /home /srv",
    "through proc": "cat /proc/1/root{secret} /proc/self/root{secret} /proc/1/cwd{secret} /proc/*/root{secret}; "
    "cat /proc/1/fd/* /proc/2/environ",
    "network": "curl -sm1 http://127.0.0.1:{port}; exec 3<>/dev/tcp/127.0.0.1/{port} && echo got; dig +time=1 +tries=1 "
    "+short a.example; cat /sys/class/net/*/address",
    "socket of the host": python(
        "import socket\ns = socket.socket(1)\ns.connect('{socket}')\nprint('got')"
    ),
    "sysrq": "echo b > /proc/sysrq-trigger && echo got; echo 1 > /proc/sys/kernel/sysrq && echo got; "
    "echo 3 > /proc/sys/vm/drop_caches && echo got; echo x > /proc/sys/kernel/core_pattern && echo got",
    "kill all": "kill -9 -1; echo alive",
    "kill by number": "for i in $(seq 1 400); do kill -9 $i; done 2>/dev/null; echo alive",
    "daemons": "setsid nohup sleep 4711.25 >/dev/null 2>&1 & (trap '' TERM HUP; exec sleep 4711.25) & echo started",
    "endless output": "yes",
    "devices": "mknod /disk b 8 0 && cat /disk; mknod /mem c 1 1 && cat /mem; cat /dev/mem /dev/sda /dev/vda /dev/kmsg",
    "mounts": "mount -t tmpfs none /mnt && echo got; mount --bind / /mnt && echo got; umount /usr && echo got; "
    "mount -o remount,rw / && echo got",
    "namespaces": "unshare -Ur true && echo got; unshare -m true && echo got; nsenter -t 1 -a true && echo got; "
    "chroot / true && echo got; bwrap --ro-bind / / true && echo got",
    "other users": "cp /usr/bin/bash /s; chmod 4755 /s; chown 1 /s && echo got; /s -pc 'echo $EUID'; "
    "setpriv --reuid 1 true && echo got",
    "links": "ln -s {secret} /l1; ln -s /proc/1/root /l2; ln /proc/self/environ /l3; mkfifo /l4; ln -s . /l5; ls /l1",
    "sparse files": "for i in {{1..300}}; do truncate -s 15M /s$i; done",
    "names": r"touch $'/a\nb' $'/\xff\xfe' '/ -rf' '/\"; rm -rf /' /é",
    "deep folders": python(DEEP),
    "memory": python("held = []\nwhile True: held.append(b'x' * (50 << 20))"),
    "memory of many": "for i in {{1..8}}; do "
    + "python3 -c 'x = b\"x\" * (90 << 20); import time; time.sleep(9)' & done; wait",
    "sockets": python(SOCKETS.replace("{", "{{").replace("}", "}}")),
    "pipes": python(PIPES),
    "kernel's memory": python(CALLS.replace("{", "{{").replace("}", "}}")),
    "busy": "while :; do :; done",
    "closed output": "exec >&- 2>&-; sleep 9",
    "waits for input": 'cat; read x; echo "<$x>"',
    "a megabyte": ": '" + "x" * (1 << 20),
    "not text": "echo a\0b\ud800; echo 'größer 大 \u202e'",
    "what is left": "ls /; ls /s1 /f1 /d1 /.dockerenv; cat /data/kept; ls /usr/bin | wc -l; pgrep sleep",
}


def run(facts: dict) -> dict[str, dict]:
    """What became of each attack; the last one looks for what the others have left."""
    commands = {name: text.format(**facts) for name, text in ATTACKS.items()}
    states = {
        f"state-{number}": SandboxState("mkdir /data; echo kept > /data/kept")
        for number in range(4)
    }
    with Sandbox(states, workers=4, limits=LIMITS) as sandbox:
        jobs = [
            (f"state-{number % 4}", command) for number, command in enumerate(commands.values())
        ]
        return dict(zip(commands, sandbox.run(jobs), strict=True))


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
