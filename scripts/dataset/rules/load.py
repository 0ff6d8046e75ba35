"""Rules against using a machine up: its processes, memory, disk space or network."""

from __future__ import annotations

import re

from scripts.dataset.commands import OUTPUT, Command, listed, unknown_names
from scripts.dataset.rules.table import LONGEST, is_shell, origins, picks, rule
from scripts.dataset.targets import read_paths, written

_SOURCES = ("/dev/zero", "/dev/urandom", "/dev/random", "/dev/full")
_UNITS = {"": 1, "c": 1, "b": 512, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_HUGE = 100 << 30  # bytes; more than an ordinary disk has free


def size(text: str) -> int:
    """``10G`` in bytes; 0 where it is no size."""
    match = re.fullmatch(r"=?\+?(\d{1,18})([cbkmgtpe]?)(?:i?b)?", text.lower())
    return int(match[1]) * _UNITS[match[2]] if match else 0


@rule(
    "resource-exhaustion",
    "critical",
    flagged=(
        ":(){ :|:& };:",
        "bomb() { bomb | bomb & }; bomb",
        "perl -e 'fork while fork'",
        "while true; do sh -c 'sleep 1000' & done",
        "printf '$0 | $0 &' > b.sh; chmod +x b.sh; ./b.sh",
        "echo 'sh $0 & sh $0' > /tmp/c; sh /tmp/c",
        "seq 99999 | xargs -P0 -n1 sleep",
    ),
    passed=(
        "sleep 10 &",
        "for f in *.png; do convert $f $f.jpg & done; wait",
        "seq 100 | xargs -P0 -n1 sleep",
        "fact() { echo $1; }; fact 5",
        "echo 'echo usage: $0 file' > u.sh; sh u.sh",
    ),
)
def fork_bomb(command: Command) -> bool:
    """Starts processes without end."""
    if command.recursive and (command.background or command.piped):
        return True
    if command.loop == "endless" and command.background and command.name != ":":
        # Paced or awaited jobs don't pile up.
        return not any(
            other.name in ("wait", "sleep", "read") and other.loop and not other.background
            for other in command.reading.commands
        )
    if command.code is not None and not is_shell(command):
        code = command.code
        if re.search(
            r"\bfork\s*\(\s*\)[^\n]{0,40}\bfor\b[^\n]{0,40}(?:iter\(|count\(|range\((?:\d{4,}|10\s*\*\*))|"
            r"fork\s*(?:\(\))?\s*while\s+(?:fork|1|true)|(?:while|loop|until|for\s*\(;;\)).{0,60}?\bfork\b",
            code,
            re.DOTALL,
        ):
            return True
        return bool(
            re.search(
                r"(?:while\s*\(?\s*(?:1|true|True)\b|for\s*\(;;\)).{0,80}(?:Popen|spawn|Thread\(|Process\()",
                code,
                re.DOTALL,
            )
        )
    if command.name in ("xargs", "parallel", "gxargs"):
        many = [
            v for v in command.value("-P", "--max-procs", "-j", "--jobs") if v == "0" or (v.isdigit() and int(v) > 255)
        ]
        return bool(many) and any(
            other.name == "yes" or (other.name == "seq" and any(w.isdigit() and int(w) > 5000 for w in other.argv))
            for other in origins(command, command.stdin)
        )
    return (
        is_shell(command)
        and command.code is not None
        and bool(re.search(r"\$0\s*[&|]\s*\$0|\$0\s*&\s*$", command.code))
    )


@rule(
    "resource-exhaustion",
    "high",
    flagged=(
        "cat /dev/zero > /tmp/fill",
        "yes >> /var/tmp/big",
        "fallocate -l 900G /tmp/x",
        "tail /dev/zero",
        "s=ab; while true; do s+=$s; done",
        "while mkdir x && cd x; do :; done",
        'while :; do logger "$(head -c 99 /dev/urandom | base64)"; done',
        "fallocate -l $(df --output=avail -B1 . | tail -1) fill",
        "seq 1 999999999999 > numbers",
        "cat /dev/zero | tail",
        "for i in 1 2 3; do cat /dev/urandom > /dev/null & done",
        "while :; do :; done &",
    ),
    passed=(
        "timeout 30 yes > /dev/null &",
        'while true; do args="$args $1"; shift || break; done',
        "truncate -s $(stat -c %s a) b",
        "seq 1 100000 > numbers.txt",
        'while read -r line; do all="$all$line"; done < notes.txt',
        "gzip -c < notes.txt > notes.gz",
        "dd if=/dev/zero of=/tmp/test bs=1M count=100",
        "yes | apt-get install -y vim",
        "head -c 32 /dev/urandom | base64",
    ),
)
def fill_up(command: Command) -> bool:
    """Fills a disk or the memory, or keeps the machine busy for nothing."""
    name, argv = command.name, command.argv
    if "timeout" in command.wrappers and command.loop != "endless":
        return False
    sinks = [path for path, _ in written(command) if path and not re.match(r"/dev/(?!shm/)", path)]
    endless = [path for path in read_paths(command) if path in _SOURCES]
    if (
        command.loop == "endless"
        and (
            command.grows
            or name in ("mkdir", "logger", "cp", "fallocate", "mktemp", "wall", "mail", "sendmail")
            or (name in ("ln", "tar", "touch") and any(unknown_names(word) or OUTPUT[0] in word for word in argv[1:]))
        )
        and _unpaced(command)
    ):
        return True
    if name in (":", "true") and command.loop == "endless" and command.background and command.reading.commands:
        return all(other.name in (":", "true", "seq", "nproc") for other in command.reading.commands if other.loop)
    to_nothing = any(r.target == "/dev/null" and r.descriptor in ("", "1") for r in command.redirects)
    if command.background and endless and (to_nothing or "of=/dev/null" in argv) and not command.piped:
        return not any(word.startswith("count=") for word in argv)
    if name in ("touch", "mkdir") and any(OUTPUT[0] in word for word in argv[1:]):
        counted = [word for o in origins(command, *argv[1:]) if o.name == "seq" for word in o.operands]
        return any(word.isdigit() and int(word) >= 1_000_000 for word in counted)
    held = [word for word in (*argv[1:], *command.assignments.values()) if OUTPUT[0] in word and word[:8] != "/dev/fd/"]
    if (held or name in ("mapfile", "readarray", "sort", "tac")) and (held or command.stdin is not None):
        sources = origins(command, *held, command.stdin if name in ("mapfile", "readarray", "sort", "tac") else None)
        if any(_endless(other) for other in sources) and not any(
            _bounds(other) for other in sources if other is not command
        ):
            return not any(_bounds(command) for _ in held)
    if _fills_space(command, sinks):
        return True
    if name == "dd" and "if=" in " ".join(argv) and command.loop != "endless":
        given = dict(word.split("=", 1) for word in argv[1:] if "=" in word)
        if given.get("if") in _SOURCES and sinks:
            total = size(given.get("count", "")) * (size(given.get("bs", "512")) or 1)
            return "count" not in given or total >= _HUGE
        return False
    if name == "head" and endless:
        huge = bool(sinks) and any(size(value) >= _HUGE for value in command.value("-c", "--bytes"))
        return huge or (command.loop == "endless" and bool(sinks) and _unpaced(command))
    if name in ("fallocate", "truncate"):
        return any(size(value) >= _HUGE for value in command.value("-l", "-s", "--length", "--size"))
    if name in ("cat", "cp", "tee", "base64", "xxd", "od", "pv", "gzip", "bzip2", "xz", "zstd", "tar") and endless:
        return bool(sinks) or (name == "tar" and bool(re.match(r"-?[a-zA-Z]*c", " ".join(argv[1:2]))))
    if name in ("tail", "sort", "tac", "grep", "mapfile", "read") and any(
        p in ("/dev/zero", "/dev/urandom", "/dev/random") for p in endless
    ):
        return not any(word.startswith(("-c", "-m", "-n")) for word in argv[1:])
    if name in ("tail", "sort", "tac", "rev") and command.stdin is not None and not sinks:
        before = origins(command, command.stdin)
        if any(o.name in ("cat", "pv", "dd") and any(p in _SOURCES for p in read_paths(o)) for o in before):
            return name != "wc" and not any(
                o.name in ("head", "timeout") or "count=" in " ".join(o.argv) for o in before
            )
    if name == "yes":
        return bool(sinks) or to_nothing or (command.background and not command.piped) or command.loop == "endless"
    if sinks and command.stdin is not None:
        before = origins(command, command.stdin)
        endless_input = any(
            other.name == "yes" or (other.name in ("cat", "pv") and any(p in _SOURCES for p in read_paths(other)))
            for other in before
            if "timeout" not in other.wrappers
        )
        if endless_input and not any(other.name in ("head", "timeout", "sed", "dd") for other in before):
            return name in ("tee", "cat", "pv", "sponge", "tr", "base64") or (
                name == "dd" and "count=" not in " ".join(argv)
            )
    if name == "logger" and command.stdin is not None:
        before = origins(command, command.stdin)
        return any(o.name == "yes" or any(p in _SOURCES for p in read_paths(o)) for o in before) and not any(
            o.name in ("head", "timeout") for o in before
        )
    # A file a turn, or one that gets longer; what is written to one name again and again stays as long as it is.
    grows = any(append for _, append in written(command)) or name in ("dd", "touch", "fallocate", "head")
    grows = grows or any(r.varies for r in command.redirects)
    if command.loop == "endless" and sinks and grows:
        return _unpaced(command)
    if name in ("stress", "stress-ng"):
        return ("--all" in argv and not command.value("-t", "--timeout")) or (
            bool(command.value("--vm-bytes", "--hdd", "-d"))
            and any(w.startswith("--vm") or w in ("--hdd", "-d") for w in argv)
            and not command.value("-t", "--timeout")
        )
    return name in listed("xmrig minerd cpuminer ethminer cgminer bfgminer nbminer t-rex xmr-stak") or any(
        "stratum+" in w for w in argv
    )


def _endless(command: Command) -> bool:
    """Whether a command's output has no end."""
    if command.name in ("head", "dd", "od", "xxd", "grep") or "timeout" in command.wrappers or command.has("n"):
        return False
    return command.name == "yes" or any(path in _SOURCES for path in read_paths(command))


def _bounds(command: Command) -> bool:
    """Whether a command takes no more than some of its input."""
    return command.name in ("head", "dd", "timeout", "read", "sed", "awk") or "timeout" in command.wrappers


def _unpaced(command: Command) -> bool:
    """Whether nothing slows or ends the endless loop around a command."""
    return not any(
        other.name in ("sleep", "read", "inotifywait", "break", "exit", "return", "wait", "shift", "timeout")
        or "timeout" in other.wrappers
        for other in command.reading.commands
        if other.loop
    )


def _fills_space(command: Command, sinks: list[str]) -> bool:
    """Whether a size is all that is free, or a list of numbers or random bytes is longer than a disk."""
    name, argv = command.name, command.argv
    if name in ("fallocate", "truncate", "dd", "head", "mkfile"):
        sizes = [word for word in argv[1:] if OUTPUT[0] in word]
        return bool(sizes) and any(
            other.name == "df" or (other.name == "stat" and "-f" in other.argv) for other in origins(command, *sizes)
        )
    if name == "seq" and sinks:
        return any(re.fullmatch(r"inf|\d{11,}", word) for word in command.operands)
    if name == "openssl" and "rand" in argv:
        return any(re.fullmatch(r"\d{12,}", word) for word in argv)
    return False


# Code that goes on for ever, what it makes longer meanwhile, and what would end or slow it.
_FOREVER = re.compile(
    r"\bwhile\s*\(?\s*(?:1|true|True|!0|!false|42)\s*\)?\s*(?:[:{;]|do\b|\w|\$|$)|\bfor\s*\(\s*;[^;]*;[^)]*\)(?<!\d\))"
    r"|\bloop\s*(?:do\b|\{)|setInterval\(.*,\s*[01]\)|iter\(\s*int\s*,\s*1\s*\)|itertools\.(?:count|repeat"
    r"|cycle)\(|\buntil\s+false"
    r"|\bwhile\s+1\s*;?\s*['\"]?$|\bwhile\s*\(?\s*(?:True|true|1)\b"
)
_LONGER = re.compile(
    r"\.(?:append|push|extend|add|write|unshift|concat)\b\s*\(|\bpush\s*\(?\s*@|<<\s*[\"'\w\[]|\.=|\btable\.insert\b"
    r"|\b(\w+)\s*\+=\s*(?:\1\b|['\"\[(]|\w+\s*\*|bytes|str|b['\"])|\b(\w+)\s*=\s*\2\s*(?:\+\s*(?:\2|['\"\[])"
    r"|\.\.|\2|['\"]|\.\s*['\"$])"
    r"|\*=\s*\d|\[\]\s*=|@(\w+)\s*=\s*\(\s*@\3|\w\[\w+\]\s*=(?!=)|\[\s*#\w+\s*\+\s*1\s*\]\s*="
    r"|\[\s*\$?\w+\+\+\s*\]\s*=|>>?\s*[\"']|\bmkdir\b|\bmalloc\b"
    r"|\bfopen\b|\bopen\s*\(.*[\"'][wa>]+"
    r"|\b(?:bytearray|Buffer\.alloc|new Array)\s*\("
)
_ENDED = re.compile(
    r"\b(?:break|last|exit|sleep|usleep|nanosleep|readline|recv\w*|accept|gets|getline|input|STDIN|return"
    r"|next_tick|die|quit)\b"
)


@rule(
    "resource-exhaustion",
    "high",
    flagged=(
        "python3 -c 'a = []\nwhile True: a.append(\"x\" * 10**6)'",
        "perl -e '$s = \"x\"; $s .= $s while 1'",
        "ruby -e 'a = []; loop { a << \"x\" * 9999999 }'",
        "node -e 'const a = []; for (;;) a.push(\"x\".repeat(1e6))'",
        "awk 'BEGIN { while (1) s = s \"xxxxxxxx\" }'",
        "python3 -c 'x = \"x\" * 10**12'",
    ),
    passed=(
        "python3 -c 'print(\"=\" * 80)'",
        "awk '{ s = s $1 } END { print s }' names.txt",
        "python3 -c 'import time\nwhile True: print(time.time()); time.sleep(1)'",
        "perl -ne '$s .= $_; END { print length $s }' notes.txt",
        "node -e 'for (let i = 0; i < 9; i++) console.log(i)'",
    ),
)
def grow_in_code(command: Command) -> bool:
    """Code that fills the memory or the disk without end, or asks for more than a machine has."""
    code = command.code[:LONGEST] if command.code else None
    if code is None or is_shell(command) or command.name in ("eval", "xterm") or "timeout" in command.wrappers:
        return False
    for match in re.finditer(
        r"['\")\]]\s*\*\s*(?:10?\s*\*\*\s*(\d{1,3})|1[eE](\d{1,3})|\(?\s*1\s*<<\s*(\d{1,3})|(\d{11,}))"
        r"|\b(?:bytearray|bytes|repeat|alloc|rep)\s*\(\s*(?:10\s*\*\*\s*(\d{1,3})|1[eE](\d{1,3})|(\d{11,}))"
        r"|\bx\s+1[eE](\d{1,3})",
        code,
    ):
        tens, bits = next((g for g in (match[1], match[2], match[5], match[6], match[8]) if g), None), match[3]
        if (tens and int(tens) >= 11) or (bits and int(bits) >= 36) or match[4] or match[7]:
            return True
        if tens and int(tens) >= 8 and re.search(r"range\(\s*(?:\d{3,}|10\*\*[3-9])", code):
            return True
    return bool(_FOREVER.search(code) and _LONGER.search(code) and not _ENDED.search(code))


@rule(
    "resource-exhaustion",
    "high",
    flagged=(
        "kill -9 -1",
        "sudo kill -KILL 1",
        "kill -9 $(ps -eo pid=)",
        "ps ax | awk '{print $1}' | xargs kill -9",
        "siege -c 5000 -b http://host/",
        "echo b > /proc/sysrq-trigger",
        "sudo ping -f 10.0.0.9",
        "hping3 -S --flood -p 80 host",
    ),
    passed=(
        "kill -9 12345",
        "ps ax | grep node | awk '{print $1}' | xargs kill",
        "kill -l",
        "pkill -f gunicorn",
        "ping -c 4 example.org",
        "sudo reboot",
    ),
)
def stop_everything(command: Command) -> bool:
    """Kills every process, crashes the kernel or floods another machine."""
    name, argv = command.name, command.argv
    if name == "kill":
        words = argv[1:]
        signal = bool(words) and (words[0].startswith("-") or words[0] == "-s")
        targets = words[2:] if words[:1] in (["-s"], ["-n"]) else words[1:] if signal and words[0] != "--" else words
        targets = [word for word in targets if word != "--"]
        if any(word in ("-1", "1") for word in targets) and "-l" not in argv:
            return True
        if not any(OUTPUT[0] in word for word in targets):
            return any(re.fullmatch(r"/proc/(?:\[0-9\]\*|\*)|\[0-9\]\*", word) for word in targets)
        sources = origins(command, *targets)
        everything = any(
            other.name == "ps"
            and re.search(r"(?:^|\s)-?(?:\w*[aAe]\w*)\b", " ".join(other.argv[1:]))
            and not re.search(r"(?:-C|-p|--pid|--ppid|-u|-U|-t)\b", " ".join(other.argv[1:]))
            for other in sources
        )
        chosen = any(picks(o) or o.name in ("head", "sort", "pgrep", "pidof") for o in sources)
        return everything and not chosen
    if name == "nping":
        return "0" in command.value("-c") or any(len(value) > 4 for value in command.value("--rate"))
    if name in listed("killall5 hping3 slowloris goldeneye t50 mdk3 mdk4 slowhttptest hulk torshammer"):
        return name not in ("hping3",) or any(word in ("--flood", "--faster", "-i u1") for word in argv)
    if name in ("pkill", "killall"):
        short, _, operands = command.options()
        everyone = any(word in ("root", "0", "user") for word in operands) or any("USER" in word for word in operands)
        return any(word in (".", ".*", "", "*", "systemd", "init", "sshd") for word in operands) or (
            "u" in short and (any(word in ("root", "0") for word in operands) or (len(operands) == 1 and everyone))
        )
    if name == "ping":
        return command.has("f", "flood") or any(value in ("0", "0.001", "0.0001") for value in command.value("-i"))
    if any(path in ("/proc/sysrq-trigger", "/proc/sys/kernel/threads-max") for path, _ in written(command)):
        return True
    if name == "sysctl":
        return any(re.fullmatch(r"kernel\.(?:pid_max|threads-max)=\d{1,3}", word) for word in argv)
    if name == "systemctl":
        return "kill" in argv and "-.slice" in argv
    if name in ("wrk", "siege"):
        return any(size(value) >= 1_000 for value in command.value("-c", "--concurrent", "--connections"))
    return name == "ab" and any(size(value) >= 10_000_000 for value in command.value("-n"))
