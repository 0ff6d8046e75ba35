"""What programs start and what they leave behind: wrappers, builtins, interpreters' code, outputs that are known.

``sudo``, ``xargs``, ``find -exec``, ``ssh`` and their kin hand their words on; Python, Perl and others hide shell text
in strings and do to files what a command would; ``base64 -d`` and ``printf`` make text that a shell then reads. The
functions here are called by the reader (:mod:`scripts.dataset.shell`), which hands itself to them as :class:`Walk`;
they never import it.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
import re
import zlib
from typing import Any, Protocol

from scripts.dataset.commands import (
    HOME,
    MAX_TEXT,
    OUTPUT,
    UNKNOWN,
    Command,
    Feed,
    Reading,
    ansi,
    listed,
    quote,
    tilde,
)


class Walk(Protocol):
    """What is asked of the reader: its state, and to read on."""

    reading: Reading
    files: dict[str, Feed]
    variables: dict[str, str | list[str]]
    aliases: dict[str, str]
    active: list[str]
    arguments: list[str] | None
    cwd: str | None

    def inside(
        self, command: Command, argv: list[str], assignments: dict[str, str] | None = None, label: str = ""
    ) -> Feed: ...
    def nested(self, text: str, stdin: Feed | None, wrapper: str = "", arguments: list[str] | None = None) -> Feed: ...
    def try_nested(self, text: str, stdin: Feed | None, wrapper: str) -> Feed: ...
    def shell_text(self, command: Command, texts: list[str], stdin: Any = ...) -> Feed: ...
    def known_text(self, word: str) -> str | None: ...
    def absolute(self, path: str) -> str: ...
    def store(self, path: str, feed: Feed, append: bool = False) -> None: ...


# --- wrappers and builtins ---------------------------------------------------------------------------------------

# name: (operands before the inner command, options that take the next word)
PREFIXES: dict[str, tuple[int, frozenset[str]]] = {
    name: (skip, frozenset(valued.split()))
    for name, skip, valued in [
        ("sudo", 0, "-u -g -h -p -C -r -t -T -U -D -R --user --group --host --prompt --chdir --role --type --chroot"),
        ("doas", 0, "-u -C"),
        ("sudoedit", 99, ""),
        ("pkexec", 0, "--user"),
        ("gosu", 1, ""),
        ("env", 0, "-u -C --unset --chdir -S --split-string"),
        ("nohup", 0, ""),
        ("timeout", 1, "-s -k --signal --kill-after"),
        ("gtimeout", 1, "-s -k --signal --kill-after"),
        ("nice", 0, "-n --adjustment"),
        ("ionice", 0, "-c -n -p -P -u --class --classdata"),
        ("time", 0, "-f -o --format --output"),
        ("stdbuf", 0, "-i -o -e --input --output --error"),
        ("unbuffer", 0, ""),
        ("setsid", 0, ""),
        ("chroot", 1, ""),
        ("builtin", 0, ""),
        ("busybox", 0, ""),
        ("toybox", 0, ""),
        ("exec", 0, "-a"),
        ("strace", 0, "-f -e -o -s -p -u -P -E"),
        ("ltrace", 0, "-e -o -s -p -u -n"),
        ("taskset", 1, ""),
        ("chrt", 1, "-T -P -D"),
        ("numactl", 0, "-m -N -C -l --membind --cpunodebind --physcpubind --interleave"),
        ("unshare", 0, "-S -G --setuid --setgid -R --root -w --wd"),
        (
            "systemd-run",
            0,
            "-u -p -M -H -E --unit --property --uid --gid --description --slice --on-calendar --on-active",
        ),
        ("systemd-inhibit", 0, ""),
        ("proxychains", 0, "-f"),
        ("proxychains4", 0, "-f"),
        ("torify", 0, ""),
        ("torsocks", 0, ""),
        ("firejail", 0, ""),
        ("rlwrap", 0, ""),
        ("daemonize", 0, "-p -l -u -o -e -c"),
        ("dbus-run-session", 0, ""),
        ("dbus-launch", 0, ""),
        ("catchsegv", 0, ""),
        ("valgrind", 0, ""),
        ("fakeroot", 0, ""),
        ("setarch", 1, ""),
        ("caffeinate", 0, "-t -w"),
        ("chronic", 0, ""),
        ("ifne", 0, ""),
        ("cgexec", 0, "-g"),
        ("prlimit", 0, ""),
        ("flock", 1, "-w -E --timeout --wait"),
        ("noglob", 0, ""),
        ("nocorrect", 0, ""),
        ("coproc", 0, ""),
        ("then", 0, ""),
        ("sem", 0, "-j --id"),
        ("start-stop-daemon", 0, "-p -n -u -c -d --pidfile --name --user --chuid --chdir"),
        ("xvfb-run", 0, "-s -n -e"),
        ("winpty", 0, ""),
        ("hyperfine", 99, ""),
        ("entr", 0, ""),
        ("nsenter", 0, "-t --target -S -G --setuid --setgid"),
        ("setpriv", 0, ""),
        ("linux64", 0, ""),
        ("linux32", 0, ""),
        ("newgrp", 99, ""),
    ]
}


def after_options(words: list[str], valued: frozenset[str], name: str) -> list[str]:
    """Words from the first operand on."""
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--":
            return words[position + 1 :]
        if word == "-" and name == "env":
            position += 1
            continue
        if not word.startswith("-") or len(word) == 1:
            break
        position += (
            2
            if word in valued
            or (name in ("strace", "ltrace") and word[1] != "-" and word[-1] in "oepsuPE")
            or (name == "sudo" and word[-1] in "ugpCDRrtTU" and word[1] != "-" and f"-{word[-1]}" in valued)
            else 1
        )
    return words[position:]


def _do_eval(walk: Walk, command: Command) -> Feed:
    words = command.argv[1:]
    if words and words[0] == "--":
        words = words[1:]
    text = " ".join(words)
    command.code = text
    inner = walk.nested(text, command.stdin) if text else Feed((), "")
    return Feed((command, *inner.commands), inner.text)


def _do_source(walk: Walk, command: Command) -> Feed:
    for word in command.argv[1:2]:
        if OUTPUT[0] in word:
            command.script = Feed(tuple(walk.reading.origins(word)), walk.known_text(word))
        elif word in ("/dev/stdin", "/proc/self/fd/0", "/dev/fd/0"):
            command.script = command.stdin
        else:
            command.script = walk.files.get(walk.absolute(word))
        if command.script is not None and command.script.text is not None:
            inner = walk.nested(command.script.text, None, arguments=command.argv[2:])
            return Feed((command, *inner.commands), None)
    return Feed((command,), None)


def _do_cd(walk: Walk, command: Command) -> Feed:
    words = [word for word in command.argv[1:] if not word.startswith("-") or word == "-"]
    target = words[0] if words else (HOME if command.name == "cd" else "")
    if target == "-" or not target:
        walk.cwd = None
    elif target.startswith("/") or walk.cwd is None:
        walk.cwd = posixpath.normpath(target)
    else:
        walk.cwd = posixpath.normpath(walk.cwd + "/" + target)
    return Feed((command,), "")


def _do_popd(walk: Walk, command: Command) -> Feed:
    walk.cwd = None
    return Feed((command,), "")


def _do_read(walk: Walk, command: Command) -> Feed:
    names = [word for word in command.operands if re.fullmatch(r"[A-Za-z_]\w*", word)]
    if command.name in ("mapfile", "readarray") and not names:
        names = ["MAPFILE"]
    value = None
    if command.stdin is not None:
        if command.stdin.text is not None:
            lines = command.stdin.text.strip("\n").split("\n")
            value = lines[0] if len(lines) == 1 else None
            if len(lines) > 1:
                value = ";".join(lines)[:4096] if len(lines) <= 16 else None
        if value is None and command.stdin.commands:
            walk.reading.outputs.append(command.stdin)
            value = f"{OUTPUT[0]}{len(walk.reading.outputs) - 1}{OUTPUT[1]}"
    for position, name in enumerate(names):
        if value is None:
            walk.variables[name] = f"{UNKNOWN[0]}{name}{UNKNOWN[1]}"
        elif len(names) == 1:
            walk.variables[name] = value
        else:
            parts = value.split(None, len(names) - 1)
            walk.variables[name] = parts[position] if position < len(parts) else ""
    return Feed((command,), "")


def _do_alias(walk: Walk, command: Command) -> Feed:
    commands = [command]
    for word in command.argv[1:]:
        name, equals, value = word.partition("=")
        if equals and name:
            walk.aliases[name] = value
            walk.active.append(name)
            commands.extend(walk.try_nested(value, None, "alias").commands)
            walk.active.pop()
    return Feed(tuple(commands), "")


def _do_set(walk: Walk, command: Command) -> Feed:
    if "--" in command.argv:
        walk.arguments = command.argv[command.argv.index("--") + 1 :]
    return Feed((command,), "")


def _do_unset(walk: Walk, command: Command) -> Feed:
    for word in command.operands:
        walk.variables.pop(word, None)
    return Feed((command,), "")


def _do_command(walk: Walk, command: Command) -> Feed:
    words = command.argv[1:]
    asks = False
    while words and words[0].startswith("-"):
        asks = asks or "v" in words[0] or "V" in words[0]
        words = words[1:]
    if asks or command.name != "command":
        return Feed((command,), _path_of(words))
    return walk.inside(command, words)


def _path_of(words: list[str]) -> str | None:
    words = [word for word in words if not word.startswith("-")]
    return f"/usr/bin/{words[0]}\n" if words and "/" not in words[0] else None


def _do_trap(walk: Walk, command: Command) -> Feed:
    words = [word for word in command.argv[1:] if word not in ("--", "-l", "-p")]
    if len(words) >= 2 and words[0] not in ("", "-"):
        inner = walk.nested(words[0], None, "trap")
        return Feed((command, *inner.commands), "")
    return Feed((command,), "")


BUILTINS = {
    "eval": _do_eval,
    "source": _do_source,
    ".": _do_source,
    "cd": _do_cd,
    "pushd": _do_cd,
    "popd": _do_popd,
    "read": _do_read,
    "mapfile": _do_read,
    "readarray": _do_read,
    "alias": _do_alias,
    "set": _do_set,
    "unset": _do_unset,
    "command": _do_command,
    "which": _do_command,
    "type": _do_command,
    "trap": _do_trap,
}


def _xargs(walk: Walk, command: Command) -> Feed:
    valued = frozenset(
        listed("-I -n -P -d -a -E -L -s -R -J --max-args --max-procs --delimiter --arg-file --max-lines --replace")
    )
    rest = after_options(command.argv[1:], valued, "xargs")
    replace = command.value("-I", "-J") or (
        ["{}"] if command.has("i") or any(w == "--replace" for w in command.argv) else []
    )
    if not rest:
        return Feed((command,), command.stdin.text if command.stdin else None)
    feed = command.stdin or Feed()
    for path in command.value("-a", "--arg-file"):
        if OUTPUT[0] in path:
            feed = Feed(tuple(walk.reading.origins(path)), walk.known_text(path))
    if any(path in ("/dev/null", "/dev/tty") for path in command.value("-a", "--arg-file")) or feed.path == "/dev/null":
        feed = Feed((), "")
    if feed.text is not None:
        zero = command.has("0", "null")
        items = feed.text.strip("\n").split("\n") if replace or zero else re.sub("['\"\\\\]", "", feed.text).split()
        items = [item for item in items if item][:32]
    else:
        walk.reading.outputs.append(feed)
        items = [f"{OUTPUT[0]}{len(walk.reading.outputs) - 1}{OUTPUT[1]}"]
    inner = Command("xargs", command.argv, command.redirects, None, command.wrappers)
    commands = [command]
    if replace:
        for item in items[:4]:
            argv = [word.replace(replace[0], item) for word in rest]
            commands.extend(walk.inside(inner, argv).commands[1:])
    else:
        commands.extend(walk.inside(inner, rest + items).commands[1:])
    return Feed(tuple(commands), None)


_FILTERS = frozenset(
    "-regex -iregex -mtime -mmin -atime -amin -ctime -cmin -newer -size -empty -user -group -uid -perm -inum -nouser"
    " -nogroup -links -samefile -newermt -lname -xtype".split()
)


def filtered(argv: list[str]) -> bool:
    """Whether ``find`` looks for something in particular, other than a name."""
    return not _FILTERS.isdisjoint(argv)


def found(command: Command) -> list[str]:
    """What ``find`` finds, as patterns: ``root/**`` or, with a filter, ``root/**/name``."""
    argv = command.argv[1:]
    while argv and argv[0] in ("-L", "-H", "-P"):
        argv = argv[1:]
    roots = []
    for word in argv:
        if word.startswith("-") or word in ("(", "!", ")"):
            break
        roots.append(word)
    names = []
    for position, word in enumerate(argv):
        if word in ("-name", "-iname", "-path", "-ipath", "-wholename", "-iwholename") and position + 1 < len(argv):
            if position and argv[position - 1] in ("!", "-not"):
                continue
            names.append(argv[position + 1])
    limits = [argv[p + 1] for p, word in enumerate(argv[:-1]) if word == "-maxdepth"]
    out = []
    for root in roots or ["."]:
        root = root.rstrip("/") or ""
        if limits == ["0"]:
            out.append(root or "/")
        elif names:
            for name in names:
                name = name.lstrip("*").lstrip("/") if "/" in name else name
                out.append(f"{root}/**/{name}" if name.strip("*.") else f"{root}/**")
        else:
            out.append(f"{root}/**" if not filtered(argv) else f"{root}/**/{UNKNOWN[0]}found{UNKNOWN[1]}")
    return out[:16]


def _find(walk: Walk, command: Command) -> Feed:
    argv = command.argv
    commands = [command]
    paths = found(command)
    for position, word in enumerate(argv):
        if word in ("-exec", "-execdir", "-ok", "-okdir") or (
            command.name in ("fd", "fdfind") and word in ("-x", "-X", "--exec", "--exec-batch")
        ):
            inner = []
            for part in argv[position + 1 :]:
                if part in (";", "+"):
                    break
                inner.append(part)
            # {} stands for the first thing found; with nothing else in the word, for all of it.
            words: list[str] = []
            for part in inner:
                if part == "{}":
                    words.extend(paths)
                elif "{}" in part:
                    words.append(part.replace("{}", paths[0]))
                else:
                    words.append(part)
            commands.extend(walk.inside(command, words).commands[1:])
    return Feed(tuple(commands), "\n".join(paths) + "\n")


def _watch(walk: Walk, command: Command) -> Feed:
    rest = after_options(command.argv[1:], frozenset(["-n", "--interval", "-q", "--equexit"]), "watch")
    return walk.shell_text(command, [" ".join(rest)]) if rest else Feed((command,), None)


def _ssh(walk: Walk, command: Command) -> Feed:
    valued = frozenset(listed("-b -c -D -E -e -F -I -i -J -L -l -m -O -o -p -Q -R -S -W -w -B"))
    rest = after_options(command.argv[1:], valued, "ssh")
    commands = [command]
    for option in command.value("-o"):
        if option.lower().startswith(("proxycommand=", "localcommand=")):
            commands.extend(walk.try_nested(option.partition("=")[2].lstrip("; "), None, "ssh").commands)
    tail = after_options(rest[1:], valued, "ssh")
    if tail:
        cwd, walk.cwd = walk.cwd, None
        inner = walk.shell_text(command, [" ".join(tail)])
        walk.cwd = cwd
        return Feed((*commands, *inner.commands), inner.text)
    if rest and command.stdin is not None and command.stdin.text is not None:
        # ssh host <<EOF: the far shell reads it
        command.script = command.stdin
        return walk.shell_text(command, [command.stdin.text], stdin=None)
    return Feed(tuple(commands), None)


def _su(walk: Walk, command: Command) -> Feed:
    texts = command.value("-c", "--command")
    if command.name == "runuser" and not texts:
        rest = after_options(
            command.argv[1:], frozenset(["-u", "-g", "-G", "-s", "--user", "--group", "--shell"]), "runuser"
        )
        if command.value("-u", "--user"):
            return walk.inside(command, rest)
    if texts:
        return walk.shell_text(command, texts)
    if command.stdin is not None and command.stdin.text is not None:
        return walk.shell_text(command, [command.stdin.text], stdin=None)
    return Feed((command,), None)


def _script(walk: Walk, command: Command) -> Feed:
    texts = command.value("-c", "--command")
    for position, word in enumerate(command.argv[:-1]):
        if re.fullmatch(r"-[a-z]*c", word) and word != "-c":
            texts.append(command.argv[position + 1])
    return walk.shell_text(command, texts) if texts else Feed((command,), None)


def _exec_in(walk: Walk, command: Command) -> Feed:
    """docker exec, kubectl exec and their kin: the command runs inside a container."""
    words = command.argv[1:]
    valued = frozenset(
        listed("-u -w -e --user --workdir --env --env-file -n --namespace -c --container -f --file -p --detach-keys")
    )
    words = after_options(words, valued, command.name)
    if words and words[0] == "compose":
        words = after_options(words[1:], valued, command.name)
    if not words or words[0] not in ("exec", "run") or (words[0] == "run" and command.name not in ("kubectl",)):
        return Feed((command,), None)
    rest = after_options(words[1:], valued, command.name)[1:]
    rest = [word for word in rest[:1] if not word.startswith("-")] + rest[1:] if rest else rest
    if "--" in words:
        rest = words[words.index("--") + 1 :]
    rest = after_options(rest, frozenset(), command.name)
    return walk.inside(command, rest, label="container") if rest else Feed((command,), None)


def _remote_shell(option: str) -> Any:
    def follow(walk: Walk, command: Command) -> Feed:
        texts = command.value(*option.split())
        return walk.shell_text(command, [text for text in texts if text]) if texts else Feed((command,), None)

    return follow


def _last_words(skip: int) -> Any:
    """Programs whose remaining operands are joined and handed to a shell."""

    def follow(walk: Walk, command: Command) -> Feed:
        words = [word for word in command.argv[1:]]
        operands = after_options(
            words, frozenset(["-w", "-t", "-s", "-n", "-c", "-p", "-l", "-e", "-L", "-f", "-h", "-H"]), command.name
        )[skip:]
        operands = after_options(operands, frozenset(["-s", "-n", "-c", "-t"]), command.name)
        if not operands:
            return Feed((command,), None)
        text = " ".join(operands)
        command.code = text
        inner = walk.try_nested(text, None, command.name)
        return Feed((command, *inner.commands), None)

    return follow


def _parallel(walk: Walk, command: Command) -> Feed:
    valued = frozenset(
        ["-j", "-P", "-a", "-n", "-N", "-I", "--jobs", "--colsep", "-C", "-L", "-S", "--joblog", "--delay", "--timeout"]
    )
    rest = after_options(command.argv[1:], valued, "parallel")
    template, items = rest, []
    for position, word in enumerate(rest):
        if word in (":::", ":::+", "::::"):
            template, items = rest[:position], rest[position + 1 :]
            break
    if not items and command.stdin is not None:
        if command.stdin.text is not None:
            items = [line for line in command.stdin.text.split("\n") if line][:8]
        elif command.stdin.commands:
            walk.reading.outputs.append(command.stdin)
            items = [f"{OUTPUT[0]}{len(walk.reading.outputs) - 1}{OUTPUT[1]}"]
            if not template:
                command.script = command.stdin
    text = " ".join(template)
    texts = []
    for item in items[:8] or ["{}"]:
        if not text:
            texts.append(item)
        else:
            texts.append(text.replace("{}", item) if "{}" in text else f"{text} {item}")
    commands = [command]
    for source in texts:
        command.code = source
        commands.extend(walk.try_nested(source, None, "parallel").commands)
    return Feed(tuple(commands), None)


def _at(walk: Walk, command: Command) -> Feed:
    if command.stdin is not None and command.stdin.text is not None:
        command.script = command.stdin
        return walk.shell_text(command, [command.stdin.text], stdin=None)
    command.script = command.stdin
    return Feed((command,), None)


def _awk(walk: Walk, command: Command) -> Feed:
    words = after_options(
        command.argv[1:], frozenset(["-F", "-v", "-f", "--field-separator", "--assign", "--file"]), "awk"
    )
    if words:
        command.code = words[0]
    commands = [command]
    for text in shell_strings(command.code or ""):
        commands.extend(walk.try_nested(text, None, command.name).commands)
    if re.search(r"\bsystem\s*\(\s*\$0?", command.code or "") and command.stdin is not None:
        if command.stdin.text is not None:
            commands.extend(walk.try_nested(command.stdin.text, None, command.name).commands)
        command.script = command.stdin
    return Feed(tuple(commands), None)


def _editor(walk: Walk, command: Command) -> Feed:
    commands = [command]
    for text in [*command.value("-c", "--cmd"), *(w[1:] for w in command.argv[1:] if w.startswith("+"))]:
        match = re.search(r"!\s*(.+)", text)
        if match:
            commands.extend(walk.try_nested(match[1], None, command.name).commands)
        elif re.match(r"\s*:?(?:py|py3|pyx|python3?|lua|luado|ruby|perl)\b", text):
            command.code = text
            for source in shell_strings(text):
                commands.extend(walk.try_nested(source, None, command.name).commands)
        elif re.search(r"\b(?:sh(?:ell)?|ter(?:minal)?)\b", text.split("=")[0]):
            commands.extend(walk.inside(command, ["sh"]).commands[1:])
    return Feed(tuple(commands), None)


def _tar(walk: Walk, command: Command) -> Feed:
    commands = [command]
    downloads(walk, command)
    for text in [
        *command.value(
            "--to-command", "--use-compress-program", "-I", "--rsh-command", "--info-script", "--new-volume-script"
        ),
        *(v.partition("exec=")[2] for v in command.value("--checkpoint-action") if "exec=" in v),
    ]:
        commands.extend(walk.try_nested(text, None, command.name).commands)
    return Feed(tuple(commands), None)


def _xterm(walk: Walk, command: Command) -> Feed:
    for position, word in enumerate(command.argv):
        if word in ("-e", "-x", "--", "--command", "--execute") and position + 1 < len(command.argv):
            rest = command.argv[position + 1 :]
            if len(rest) == 1:
                return walk.shell_text(command, rest)
            return walk.inside(command, rest)
    return Feed((command,), None)


def _expect(walk: Walk, command: Command) -> Feed:
    commands = [command]
    for code in command.value("-c"):
        for match in re.finditer(r"(?:spawn|exec|system)\s+(?:-noecho\s+)?([^;\n]+)", code):
            commands.extend(walk.try_nested(match[1], None, "expect").commands)
    return Feed(tuple(commands), None)


def _sed(walk: Walk, command: Command) -> Feed:
    commands = [command]
    for word in command.argv[1:]:
        match = re.search(r"(?:^|[\d;{$])\s*e\s+(\S.*)$", word) if not word.startswith("-") else None
        if match:
            commands.extend(walk.try_nested(match[1], None, "sed").commands)
    feed = Feed(tuple(commands), output(command, walk))
    downloads(walk, command)
    return feed


def _git(walk: Walk, command: Command) -> Feed:
    commands = [command]
    for setting in command.value("-c"):
        key, _, value = setting.partition("=")
        if (
            re.search(r"(pager|editor|sshcommand|askpass|fsmonitor|hookspath|alias\..*)$", key.lower())
            and value.strip()
        ):
            commands.extend(walk.try_nested(value.lstrip("!"), None, "git").commands)
    words = command.operands
    if "config" in words and len(words) > words.index("config") + 2:
        key, value = words[words.index("config") + 1 : words.index("config") + 3]
        if key.startswith("alias.") and value.startswith("!"):
            commands.extend(walk.try_nested(value[1:], None, "git").commands)
    for position, word in enumerate(command.argv):
        if word in ("--exec", "--tree-filter", "--index-filter") or (word == "-x" and "rebase" in command.argv):
            for text in command.argv[position + 1 : position + 2]:
                commands.extend(walk.try_nested(text, None, "git").commands)
        elif word in ("foreach",) or (word == "run" and "bisect" in command.argv):
            text = " ".join(w for w in command.argv[position + 1 :] if w != "--recursive")
            commands.extend(walk.try_nested(text, None, "git").commands)
    return Feed(tuple(commands), None)


WRAPPERS = {
    "xargs": _xargs,
    "find": _find,
    "gfind": _find,
    "fd": _find,
    "fdfind": _find,
    "watch": _watch,
    "ssh": _ssh,
    "autossh": _ssh,
    "sshpass": lambda walk, command: walk.inside(
        command, after_options(command.argv[1:], frozenset(["-p", "-f", "-d", "-P"]), "sshpass")
    ),
    "mosh": _ssh,
    "su": _su,
    "runuser": _su,
    "script": _script,
    "docker": _exec_in,
    "podman": _exec_in,
    "nerdctl": _exec_in,
    "docker-compose": _exec_in,
    "kubectl": _exec_in,
    "oc": _exec_in,
    "crictl": _exec_in,
    "lxc": _exec_in,
    "parallel": _parallel,
    "at": _at,
    "batch": _at,
    "awk": _awk,
    "gawk": _awk,
    "mawk": _awk,
    "nawk": _awk,
    "vim": _editor,
    "vi": _editor,
    "nvim": _editor,
    "view": _editor,
    "ex": _editor,
    "tar": _tar,
    "gtar": _tar,
    "xterm": _xterm,
    "gnome-terminal": _xterm,
    "konsole": _xterm,
    "alacritty": _xterm,
    "wsl": _last_words(0),
    "expect": _expect,
    "ansible": _remote_shell("-a --args"),
    "man": _remote_shell("-P --pager"),
    "vimdiff": _editor,
    "rvim": _editor,
    "rview": _editor,
    "gvim": _editor,
    "pdsh": _last_words(0),
    "clush": _last_words(0),
    "pssh": _last_words(0),
    "adb": lambda walk, command: (
        walk.shell_text(command, [" ".join(command.argv[command.argv.index("shell") + 1 :])])
        if "shell" in command.argv
        else Feed((command,), None)
    ),
    "tmux": lambda walk, command: (
        _last_words(1)(walk, command)
        if command.argv[1:2]
        and command.argv[1]
        in ("new", "new-session", "neww", "new-window", "split-window", "send-keys", "run-shell", "run")
        else Feed((command,), None)
    ),
    "screen": lambda walk, command: walk.inside(
        command, after_options(command.argv[1:], frozenset(["-S", "-c", "-t", "-dmS", "-L", "-X"]), "screen")
    ),
    "git": _git,
    "sed": _sed,
    "gsed": _sed,
}


# --- outputs that are known ------------------------------------------------------------------------------------


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _base64(text: str) -> str | None:
    compact = re.sub(r"[^A-Za-z0-9+/=_-]", "", text).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return _decode(base64.b64decode(compact + "=" * (-len(compact) % 4)))
    except (binascii.Error, ValueError):
        return None


def _hex(text: str) -> str | None:
    digits = re.sub(r"[^0-9a-fA-F]", "", text)
    return _decode(bytes.fromhex(digits[: len(digits) // 2 * 2]))


def _gunzip(text: str) -> str | None:
    try:
        return _decode(zlib.decompressobj(47).decompress(text.encode("latin-1"), MAX_TEXT))
    except (zlib.error, UnicodeEncodeError):
        return None


def _tr_set(text: str) -> str:
    text = ansi(text)
    for name, members in (
        ("[:lower:]", "abcdefghijklmnopqrstuvwxyz"),
        ("[:upper:]", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        ("[:digit:]", "0123456789"),
        ("[:space:]", " \t\n\r\f\v"),
    ):
        text = text.replace(name, members)

    def range_of(match: re.Match) -> str:
        a, b = ord(match[1]), ord(match[2])
        return "".join(map(chr, range(a, b + 1))) if a <= b and b - a < 256 else match[0]

    return re.sub(r"(.)-(.)", range_of, text, flags=re.DOTALL)[:1024]


def _tr(command: Command, text: str) -> str | None:
    short, long, sets = command.options()
    if not sets or "c" in short or "C" in short:
        return None
    first = _tr_set(sets[0])
    if "d" in short or "--delete" in long:
        return text.translate({ord(char): None for char in first})
    if "s" in short and len(sets) < 2:
        return text
    if len(sets) < 2:
        return None
    second = _tr_set(sets[1])
    if not second:
        return None
    second += second[-1] * (len(first) - len(second))
    table: dict[int, str] = {}
    for a, b in zip(first, second, strict=False):
        table[ord(a)] = b
    return text.translate(table)


def _sed_text(command: Command, text: str) -> str | None:
    scripts = command.value("-e", "--expression") or command.operands[:1]
    if command.has("ni") or len(command.operands) > (0 if command.value("-e") else 1):
        return None
    for script in scripts:
        match = re.fullmatch(r"s(.)((?:\\.|(?!\1).)*)\1((?:\\.|(?!\1).)*)\1([gI]*)", script, re.DOTALL)
        if match is None or len(match[2]) > 64 or re.search(r"[*+{].*[*+{]", match[2]) or len(text) > 4096:
            return None
        pattern = re.sub(r"\\([(){}|+?])", r"\1", match[2]) if not command.has("rE") else match[2]
        try:
            replacement = re.sub(r"(?<!\\)&", r"\\g<0>", match[3].replace("\\/", "/"))
            text = re.sub(pattern, replacement, text, count=0 if "g" in match[4] else 1)
        except (re.error, IndexError):
            return None
    return text


def _printf(words: list[str]) -> str | None:
    if words[:1] == ["-v"]:
        return ""
    if words[:1] == ["--"]:
        words = words[1:]
    if not words:
        return ""
    form, values = words[0], words[1:]
    slots = len(re.findall(r"%[-+ 0#]*\d*(?:\.\d+)?[a-zA-Z]", form.replace("%%", "")))
    out = []
    for _ in range(max(1, -(-len(values) // slots)) if slots else 1):

        def one(match: re.Match) -> str:
            if match[0] == "%%":
                return "%"
            value = values.pop(0) if values else ""
            if match[1] == "b":
                return ansi(value)
            if match[1] == "c":
                return value[:1]
            return value

        out.append(re.sub(r"%%|%[-+ 0#]*\d*(?:\.\d+)?([a-zA-Z])", one, ansi(form)))
        if len(out) > 256:
            return None
    return "".join(out)


def output(command: Command, walk: Walk) -> str | None:
    """Standard output of a command whose output follows from its words and its input; None where it does not."""
    name, argv = command.name, command.argv
    given = command.stdin.text if command.stdin is not None else None
    text: str | None = None
    if name == "echo":
        words, escapes, newline = argv[1:], False, "\n"
        while words and re.fullmatch(r"-[neE]+", words[0]):
            escapes = escapes or "e" in words[0]
            newline = "" if "n" in words[0] else newline
            words = words[1:]
        text = " ".join(words)
        text = (ansi(text) if escapes else text) + newline
    elif name == "printf":
        text = _printf(list(argv[1:]))
    elif name in listed("true : false test [ export declare local readonly typeset sleep mkdir"):
        text = ""
    elif name == "cat":
        files = command.operands
        if not files or files == ["-"]:
            text = given
        else:
            parts = []
            for path in files[:16]:
                known = walk.files.get(walk.absolute(path))
                part = known.text if known is not None else walk.known_text(path)
                if path in ("/dev/null",):
                    part = ""
                if part is None:
                    return None
                parts.append(part)
            text = "".join(parts)
    elif (
        name in ("tac", "sort", "uniq", "tee", "column", "fold", "nl", "pv", "sponge", "dd", "head", "tail")
        and len(argv) <= 3
    ):
        text = given
        if name in ("head", "tail") and given and "*" in given:  # some of what there is, not all
            text = None
        if name == "dd" and any(word.startswith("if=") for word in argv):
            text = None
    elif name == "rev" and given is not None:
        text = "\n".join(line[::-1] for line in given.split("\n"))
    elif name == "tr" and given is not None:
        text = _tr(command, given)
    elif name in ("sed", "gsed") and given is not None:
        text = _sed_text(command, given)
    elif name in ("base64", "gbase64"):
        if command.has("dD", "decode"):
            source = given
            files = command.operands
            if files:
                known = walk.files.get(walk.absolute(files[0]))
                source = known.text if known else walk.known_text(files[0])
            text = _base64(source) if source is not None else None
        elif given is not None:
            text = base64.b64encode(given.encode()).decode() + "\n"
    elif name == "openssl":
        if (
            given is not None
            and ("-base64" in argv or "base64" in argv or "-a" in argv)
            and "-d" in argv
            and len(argv) < 7
        ):
            text = _base64(given)
    elif name == "base32" and given is not None and command.has("d", "decode"):
        try:
            text = _decode(base64.b32decode(re.sub(r"\s", "", given)))
        except (binascii.Error, ValueError):
            text = None
    elif name == "xxd" and given is not None and command.has("r", "revert"):
        text = _hex(given)
    elif name in ("gunzip", "zcat", "gzip", "pigz", "unpigz") and given is not None:
        text = _gunzip(given) if name in ("gunzip", "zcat", "unpigz") or command.has("d", "decompress") else None
    elif name == "pwd":
        text = f"{walk.cwd or '.'}\n"
    elif name == "ls":
        folders = command.operands
        if not command.has("l"):
            text = (
                "\n".join(folder.rstrip("/") + "/*" if not folder.endswith("*") else folder for folder in folders)
                + "\n"
            )
            text = text if folders else "*\n"
    elif name == "dirname" and command.operands:
        text = posixpath.dirname(command.operands[0]) + "\n"
    elif name == "basename" and command.operands:
        text = posixpath.basename(command.operands[0]) + "\n"
    elif name.startswith(("python", "perl", "ruby", "php", "node")) and command.code is not None:
        match = re.fullmatch(
            r"""\s*(?:print|puts|echo|console\.log|printf)\s*\(?\s*(?:b?(['"])((?:(?!\1).)*)\1)\s*\)?\s*;?\s*""",
            command.code,
        )
        if match:
            text = ansi(match[2]) + "\n"
    return None if text is None else text[:MAX_TEXT]


# --- code in other languages -----------------------------------------------------------------------------------

_STRING = (
    r"[rbuf]{0,2}(?:'''((?:[^\\]|\\.)*?)'''|\"{3}((?:[^\\]|\\.)*?)\"{3}"
    r"|'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"|`((?:[^`\\]|\\.)*)`)"
)
_CALLS = re.compile(
    r"(?<![\w])(?:os\.system|os\.popen|os\.exec[lv]p?e?|exec[lv]p?e?|os\.spawn\w+|subprocess\.\w+|"
    r"commands\.getoutput|popen2?|system|exec|"
    r"execSync|spawnSync|spawn|execFile(?:Sync)?|shell_exec|passthru|proc_open|popen|"
    r"IO\.popen|Open3\.\w+|os\.execute|io\.popen|"
    r"check_output|check_call|run|call|Popen|getoutput|pty\.spawn|getline|do shell script|eval|qx|sh|\$)\s*"
    r"(?:\(|\s|\{)\s*(\[?)\s*" + _STRING,
    re.DOTALL,
)
_JOINED = re.compile(r"(['\"])\s*(?:\+|\.\.?)\s*\1")  # "rm -rf " + "/"
_ITEM = re.compile(r"\s*,\s*" + _STRING, re.DOTALL)
_BACKQUOTES = re.compile(r"`([^`]{2,400})`|%x[\[({]([^\])}]{2,400})[\])}]|qx[/({]([^/)}]{2,400})[/)}]")
_PIPED = re.compile(r"\"([^\"\n]{2,400})\"\s*\|\s*getline|\|\s*\"([^\"\n]{2,400})\"")


def shell_strings(code: str) -> list[str]:
    """Texts that a piece of Python, Perl, Ruby, PHP, Lua, JavaScript or awk hands to a shell."""
    found_texts = []
    code = _JOINED.sub("", code[:MAX_TEXT])
    for match in _CALLS.finditer(code):
        text = next((group for group in match.groups()[1:] if group is not None), "")
        words = [text]
        at = match.end()
        following = _ITEM.match(code, at)
        while following is not None and len(words) < 64:
            words.append(next((group for group in following.groups() if group is not None), ""))
            following = _ITEM.match(code, following.end())
        if len(words) > 1:
            if re.match(r"\s*(?:os\.)?(?:exec|spawn)[lv]", match[0]):
                words = words[1:]
            found_texts.append(" ".join(quote(_unescape_code(word)) for word in words))
        else:
            found_texts.append(_unescape_code(text))
    for pattern in (_BACKQUOTES, _PIPED):
        for match in pattern.finditer(code):
            found_texts.append(_unescape_code(next(group for group in match.groups() if group)))
    return found_texts[:32]


# A language's function: the words of the command that does the same.
_FILE_CALLS = {
    **dict.fromkeys(listed("rmtree remove_tree rm_rf rm_r rimraf removeSync"), ("rm", "-rf")),
    **dict.fromkeys(listed("rmSync rm rmdirSync"), ("rm", "-rf")),
    **dict.fromkeys(listed("unlink unlinkSync removedirs remove delete"), ("rm",)),
    **dict.fromkeys(listed("chmod chmodSync lchmod fchmod"), ("chmod",)),
    **dict.fromkeys(listed("chown chownSync lchown"), ("chown",)),
    **dict.fromkeys(listed("rename renameSync move mv"), ("mv",)),
    **dict.fromkeys(listed("truncate truncateSync"), ("truncate", "-s", "0")),
    **dict.fromkeys(listed("copy copyfile copy2 copyFileSync cp"), ("cp",)),
    **dict.fromkeys(listed("symlink symlinkSync ln_s ln_sf"), ("ln", "-sf")),
    **dict.fromkeys(listed("writeFileSync writeFile file_put_contents createWriteStream"), (">",)),
    **dict.fromkeys(listed("write_text write_bytes"), (">",)),
    **dict.fromkeys(listed("appendFileSync appendFile"), (">>",)),
    **dict.fromkeys(listed("read_text read_bytes readFileSync readFile file_get_contents"), ("cat",)),
    "chmod_R": ("chmod", "-R"),
    "chown_R": ("chown", "-R"),
    "open": ("open",),
    "fopen": ("open",),
    "write": ("write",),
    "binwrite": (">",),
}
_FILE_CALL = re.compile(
    r"(?:(?:Path|PosixPath)\(\s*(['\"])(?P<path>[^'\"\n]{1,200})\1\s*\)|\b(?P<file>File|IO|fs|Fs|os|io)|[\w)\]}])?\.?"
    r"(?<![\w$@%-])(?P<call>" + "|".join(sorted(_FILE_CALLS, key=len, reverse=True)) + r")\b\s*(?P<open>\(?)"
)
_WALKED = re.compile(
    r"\b(?:walk|rglob|glob|listdir|scandir|readdirSync|readdir|iterdir|find|finddepth|Dir|each_child|children|glob1)"
    r"(?:Sync)?\b\s*[\[(]?[^'\"\n]{0,40}?(['\"])([/~][^'\"\n]*)\1|Path\(\s*(['\"])([/~][^'\"\n]*)\3\s*\)"
    r"\.(?:rglob|glob|iterdir|walk)|<([/~][^>\n]*)>"
)
_OWN_HOME = re.compile(
    r"(?:(?:os\.path\.)?expanduser|File\.expand_path)\(\s*(['\"]~[^'\"]*['\"])\s*\)|Path\.home\(\)|(?:os\.)?homedir\(\)|Dir\.home"
    r"|\$ENV\{['\"]?HOME['\"]?\}|ENV\[['\"]HOME['\"]\]|process\.env\.HOME|(?:os\.)?(?:environ\[|getenv\()['\"]HOME['\"][\])]"
)
_TEXT = re.compile(r"(['\"])([^'\"\n]*)\1")


def file_commands(code: str) -> list[tuple[list[str], tuple[str, str] | None]]:
    """Commands that do to files what the code does with its language's functions, and what they redirect to."""
    if "/" not in code and "~" not in code and "home" not in code and "HOME" not in code:
        return []
    code = _OWN_HOME.sub(lambda match: match[1] or ("Path('~')" if match[0][0] == "P" else "'~'"), code[:8192])
    roots = [next(group for group in (match[2], match[4], match[5]) if group) for match in _WALKED.finditer(code)]
    roots = [root if "*" in root else root.rstrip("/") + "/**" for root in roots]
    out: list[tuple[list[str], tuple[str, str] | None]] = []
    for match in _FILE_CALL.finditer(code):
        words = list(_FILE_CALLS[match["call"]])
        rest = code[match.end() : match.end() + 240]
        rest = _arguments(rest) if match["open"] else re.split(r"[;\n}]", rest)[0]
        texts = [re.sub(r"^\s*\+?>{1,2}\s*(?=/)", "", text[2]) for text in _TEXT.finditer(rest)]
        paths = [text for text in texts if text.startswith(("/", "~"))]
        paths = [path for path in ([match["path"]] if match["path"] else []) + paths if path.startswith(("/", "~"))]
        if not paths:
            joined = re.match(r"\s*(?:os\.path\.join\(|(\w+)\s*,\s*['\"]w)", rest) if words[0] == "open" else None
            walked = joined and (
                not joined[1] or re.search(rf"\b{joined[1]}\s*=\s*os\.path\.join|\bfor\s+{joined[1]}\s+in", code)
            )
            if (words[0] not in ("rm", "chmod", "chown", ">", "truncate") and not walked) or match["path"]:
                continue
            paths = roots
        paths = [tilde(path) for path in paths[:4]]
        if not paths:
            continue
        if words[0] in ("open", "write"):
            if words[0] == "write" and match["file"] not in ("File", "IO"):
                continue
            modes = [text for text in texts if re.fullmatch(r"[rwab+t>xU]{1,4}|\+?[<>]{1,2}", text)]
            # Perl writes the mode before the path, in one text or in two.
            glued = re.search(r"['\"]\s*(>{1,2})\s*([/~][^'\"]*)['\"]", rest)
            if glued:
                modes, paths = [glued[1]], [glued[2].strip()]
            if words[0] == "write" or "O_WRONLY" in rest or "O_RDWR" in rest or "O_TRUNC" in rest:
                modes.append("w")
            if not any(char in mode for mode in modes for char in "wa+x>"):
                out.append((["cat", *paths], None))
                continue
            append = any("a" in mode or ">>" in mode for mode in modes)
            out.append(([":"], (">>" if append else ">", paths[0])))
        elif words[0] in (">", ">>"):
            out.append(([":"], (words[0], paths[0])))
        elif words[0] in ("chmod", "chown"):
            number = re.search(r"\b0?o?([0-7]{3,4})\b", rest)
            names = [text for text in texts if re.fullmatch(r"[a-z_][\w-]*", text)]
            if words[0] == "chmod" and number is None:
                continue
            owner = number[1] if words[0] == "chmod" and number else (names or re.findall(r"\d+", rest) or ["0"])[0]
            out.append(([*words, owner, *paths], None))
        elif words[0] in ("mv", "cp", "ln"):
            if len(paths) > 1:
                out.append(([*words, paths[0], paths[1]], None))
        else:
            out.append(([*words, *paths], None))
    return out[:24]


def _arguments(text: str) -> str:
    """The text up to the bracket that closes a call."""
    level = 1
    for match in re.finditer(r"[()\n]", text):
        level += {"(": 1, ")": -1}.get(match[0], 0)
        if level == 0:
            return text[: match.start()]
    return text


def fetched_files(code: str) -> list[str]:
    """Files into which code writes what it gets from an address."""
    if "://" not in code:
        return []
    return [match[2] for match in re.finditer(r"(?:urlretrieve|getstore)\([^,\n]+,\s*(['\"])([^'\"\n]+)\1", code)] + [
        match[2]
        for match in re.finditer(
            r"(?:open|file_put_contents)\(\s*(['\"])([^'\"\n]+)\1\s*,\s*(?:['\"]wb?['\"]\)\.write|\$)", code
        )
    ]


def _unescape_code(text: str) -> str:
    return ansi(text) if "\\" in text else text


# --- files that are left behind --------------------------------------------------------------------------------

_CARRIERS = frozenset(listed("scp rsync sftp tftp smbclient ftp lftp aws gsutil rclone axel s3cmd mc azcopy svn"))
_PACKERS = frozenset(listed("tar gtar zip 7z 7za gpg gpg2 openssl rar mysqldump pg_dump scrot import arecord grim"))


def _packed(command: Command) -> list[str]:
    """The archive or encrypted file that a command makes."""
    name, words = command.name, command.operands
    if name in ("tar", "gtar"):
        targets = command.value("--file")
        for position, word in enumerate(command.argv[:-1]):
            if re.fullmatch(r"-?[a-zA-Z]*c[a-zA-Z]*f|-[a-zA-Z]*f", word):
                targets.append(command.argv[position + 1])
        return targets
    if name in ("zip", "rar", "7z", "7za"):
        words = [word for word in words if word not in ("a", "u")]
        return words[:1]
    if name in ("scrot", "import", "arecord", "grim"):
        return words[-1:]
    if name == "openssl":
        return command.value("-out")
    targets = command.value("-o", "--output", "-r", "--result-file")
    return targets or ([f"{words[-1]}.gpg"] if name.startswith("gpg") and words else [])


def _carried(walk: Walk, command: Command) -> None:
    """Files that come from another machine through scp, rsync, aws s3 cp and their kin."""
    name, feed = command.name, Feed((command,), None)
    words = command.operands
    text = " ".join(command.argv[1:])
    if name in ("tftp", "smbclient", "ftp", "lftp", "sftp"):
        text += " " + ((command.stdin.text or "") if command.stdin else "")
        for match in re.finditer(r"(?:\b(?:get|pget|mget)|\s-r)\s+(?:-o\s+)?([\w./~*-]+)(?:[ \t]+([\w./-]+))?", text):
            walk.store(posixpath.basename(match[1]), feed)
            if match[2]:
                walk.store(match[2], feed)
    far = re.compile(r"(?:[\w.-]+@)?[\w.-]+:(?!\\)|(?:s3|gs|rsync|az|https?|ftp)://")
    if len(words) > 1 and any(far.match(word) for word in words[:-1]) and not far.match(words[-1]):
        for word in words[:-1]:
            if far.match(word):
                walk.store(words[-1], feed)
                walk.store(posixpath.join(words[-1], re.split(r"[/:]", word)[-1]), feed)
    if name == "axel":
        for target in command.value("-o", "--output"):
            walk.store(target, feed)


def downloads(walk: Walk, command: Command) -> None:
    """Files that a command leaves behind: what they hold is known by where it came from."""
    name, argv = command.name, command.argv
    feed = Feed((command,), None)
    if name in ("curl", "wget", "fetch", "aria2c", "http"):
        targets = command.value("-o", "--output", "-O", "--output-document", "--out", "--remote-name")
        if name == "aria2c":
            folders = command.value("-d", "--dir")
            for target in [*command.value("-o", "--out")] if folders else []:
                targets.append(posixpath.join(folders[0], target))
        for word in argv[1:]:  # combined: -sSLo file, -qO file
            match = re.fullmatch(r"-[A-Za-z#]+[oO]", word)
            if match and len(word) > 2:
                position = argv.index(word)
                targets.extend(argv[position + 1 : position + 2])
        for target in targets:
            if target not in ("-", "/dev/stdout") and "://" not in target:
                walk.store(target, feed)
        urls = [word for word in argv[1:] if not word.startswith("-") and ("://" in word or "/" in word)]
        for url in urls:
            base = posixpath.basename(url.split("?")[0])
            if base and (name != "curl" or command.has("OJ", "remote-name", "remote-name-all")):
                folder = (command.value("-P", "--directory-prefix") or [""])[0]
                walk.store(posixpath.join(folder, base), feed)
    elif name in _CARRIERS:
        _carried(walk, command)
    elif name in _PACKERS:
        for target in _packed(command):
            walk.store(target, Feed((command, *(command.stdin.commands if command.stdin else ())), None))
    elif name in ("cp", "mv", "install", "ln") and len(command.operands) == 2:
        source, target = command.operands
        known = walk.files.get(walk.absolute(source))
        if known is not None:
            walk.store(target, known)
            walk.store(posixpath.join(target, posixpath.basename(source)), known)
    elif name in ("gcc", "cc", "clang", "g++", "rustc"):
        for word in command.operands:
            known = walk.files.get(walk.absolute(word))
            if known is not None:  # what it compiles to comes from where the source came from
                walk.store((command.value("-o") or ["a.out"])[0], Feed(known.commands, None))
    elif name == "tee":
        for target in command.operands:
            walk.store(target, command.stdin or feed, command.has("a", "append"))
    elif name == "dd":
        for word in argv[1:]:
            if word.startswith("of=") and command.stdin is not None:
                walk.store(word[3:], command.stdin)
