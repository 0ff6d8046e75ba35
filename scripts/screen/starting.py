"""What a program starts, and what it leaves behind: wrappers, shells, interpreters, ways out, known outputs, files.

The facts are data (:mod:`scripts.screen.programs`); here is what no table says. The functions are called by the reader,
which hands itself to them as ``walk``; they never import it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from typing import Any

from scripts.screen import paths
from scripts.screen.code import fetched_files, file_commands, shell_strings
from scripts.screen.commands import HOME, MAX_TEXT, OUTPUT, UNKNOWN, Command, Feed, Redirect, ansi
from scripts.screen.programs import Facts

# Variables that name a program which others start.
STARTING_VARIABLES = frozenset(
    "PAGER MANPAGER GIT_PAGER SYSTEMD_PAGER EDITOR VISUAL SUDO_EDITOR GIT_EDITOR GIT_SSH_COMMAND GIT_EXTERNAL_DIFF"
    " GIT_ASKPASS SSH_ASKPASS SUDO_ASKPASS BROWSER LESSOPEN PROMPT_COMMAND BASH_ENV RSYNC_RSH CVS_RSH".split()
)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")
_COPIED = frozenset(["busybox", "nc", "ncat", "socat", "find", "awk", "vim"])


def begin(walk: Any, command: Command) -> Feed:
    """Note whatever a command starts; returns its output."""
    special = _BUILTINS.get(command.name)
    if special is not None:
        return special(walk, command)
    programs = walk.programs
    for variable in STARTING_VARIABLES.intersection(command.assignments):
        walk.try_nested(command.assignments[variable], None, command.name)
    if "/" in command.name:
        base = posixpath.basename(command.name)
        if base in _COPIED or programs.member(base, "shells") or programs.member(base, "interpreters"):
            command.name = base  # a copy elsewhere, as set-uid programs are
    name = command.name
    facts = programs.of(name)
    if facts.bundle and len(command.argv) > 1 and re.fullmatch(r"[A-Za-z]+", command.argv[1]):
        command.argv = [command.argv[0], "-" + command.argv[1], *command.argv[2:]]
    if programs.member(name, "shells"):
        feed = _shell(walk, command)
    elif name in _SPECIAL:
        feed = _SPECIAL[name](walk, command)
    else:
        feed = _by_table(walk, command, facts)
    _leave_behind(walk, command)
    return feed


def after_options(words: list[str], valued: Iterable[str]) -> list[str]:
    """Words from the first operand on."""
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--":
            return words[position + 1 :]
        if not word.startswith("-"):
            break
        # -u user, and -nu user: the last of several letters may take a value too
        takes = word in valued or (
            word[:2] != "--" and len(word) > 2 and word[1:].isalpha() and "-" + word[-1] in valued
        )
        position += 2 if takes else 1
    return words[position:]


def _by_table(walk: Any, command: Command, facts: Facts) -> Feed:
    """What the table of programs says that a command starts."""
    name, argv = command.name, command.argv
    commands = [command]
    text: str | None = None

    def read(source: str, stdin: Feed | None = None) -> None:
        commands.extend(walk.try_nested(source.lstrip("!; "), stdin, name).commands)

    _read_code(walk, command, facts, commands)
    for source in command.values(*facts.runs):
        if source and not (name in ("rsync", "scp", "sftp", "borg") and re.match(r"\S*ssh\b", source)):
            command.code = command.code or source
            commands.extend(walk.shell_text(command, [source]).commands[1:])
    for source in command.values(*facts.words):
        commands.extend(walk.inside(command, source.split(",")).commands[1:])
    if facts.escape is not None:
        given = command.stdin.text if command.stdin is not None else None
        known = command.script.text if command.script is not None else None
        for source in (*argv[1:], given or "", known or ""):
            for match in facts.escape.finditer(source[:4096]):
                read(next((group for group in match.groups()[::-1] if group), ""))
    if facts.shell is not None and any(facts.shell.search(word) for word in argv[1:]):
        commands.extend(walk.inside(command, ["sh"]).commands[1:])
    rest = argv[1:]
    if facts.after:
        position = next((at for at, word in enumerate(rest) if word in facts.after), None)
        rest = rest[position + 1 :] if position is not None else []
        if "--" in rest and facts.label:  # kubectl exec pod -- words
            rest = ["", *rest[rest.index("--") + 1 :]]
    skip = facts.wraps if facts.wraps is not None else facts.joins
    if skip is not None and rest:
        rest, assignments = after_options(rest, facts.values), {}
        rest = after_options(rest[skip:], facts.values) if skip else rest
        while rest and _ASSIGNMENT.match(rest[0]) and facts.wraps is not None:
            key, _, value = rest[0].partition("=")
            assignments[key] = value
            rest = rest[1:]
        command.assignments = {**command.assignments, **assignments}
        if facts.wraps is not None or (name in ("xterm", "gnome-terminal") and len(rest) > 1):
            if rest and not (name == "exec" and not rest):
                inner = walk.inside(command, rest, assignments, facts.label)
                commands.extend(inner.commands[1:])
                text = inner.text
        elif rest:
            cwd, walk.cwd = walk.cwd, None if name in ("ssh", "mosh", "autossh") else walk.cwd
            inner = walk.shell_text(command, [" ".join(rest)])
            walk.cwd = cwd
            commands.extend(inner.commands[1:])
            text = inner.text
    if name in ("ssh", "at", "batch", "su", "runuser", "crontab") and len(commands) == 1 and command.stdin is not None:
        if name != "crontab":
            command.script = command.stdin  # the far shell, or the later one, reads it
        if command.stdin.text is not None:
            return walk.shell_text(command, [command.stdin.text], stdin=None)
    if name == "ssh":
        for option in command.values("-o"):
            if option.lower().startswith(("proxycommand=", "localcommand=")):
                read(option.partition("=")[2])
    return Feed(tuple(commands), text if text is not None else output(command, walk))


def _read_code(walk: Any, command: Command, facts: Facts, commands: list[Command]) -> None:
    """``python -c``, ``perl -e``, a script that was written before: the code, and the shell text in it."""
    name, argv = command.name, command.argv
    interprets = walk.programs.member(name, "interpreters")
    code: list[str] = []
    script = None
    if facts.code == ("first",):
        operands = paths.operands(command, facts)
        if not command.has("-f", "--file"):
            code = operands[:1]
        else:
            script = command.values("-f", "--file")[-1:]
            script = script[0] if script else None
    elif facts.code:
        position, letters = 1, "".join(option[1] for option in facts.code if len(option) == 2)
        while position < len(argv):
            word = argv[position]
            match = re.match(rf"-[A-Za-z0-9]*?[{letters}](.*)", word, re.DOTALL) if letters else None
            if word in facts.code or (match and not match[1] and word[:2] != "--"):
                code.extend(argv[position + 1 : position + 2])
                position += 1
            elif match and word[:2] != "--" and word[:2] not in facts.values and interprets:
                code.append(match[1])
            elif word[:2] == "--" and word.partition("=")[0] in facts.code:
                code.append(word.partition("=")[2])
            elif word in ("eval", "run") and name in ("deno", "bun"):
                code.extend(argv[position + 1 : position + 2] if word == "eval" else [])
                position += 1
            elif word in facts.values or word == "-m":
                position += 1
                script = "-m" if word == "-m" else script
            elif word == "-" or word[:1] != "-":
                script = word if script is None and not code and word != "-" else script
                break
            position += 1
    if not facts.code and not interprets:
        script = _script_of(command)
    if script is not None and script != "-m":
        if OUTPUT[0] in script or script in ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"):
            feed = command.stdin if OUTPUT[0] not in script else None
            command.script = feed or Feed(tuple(walk.reading.origins(script)), walk.known_text(script))
        else:
            command.script = walk.files.get(walk.absolute(script)) or Feed((), None, script)
    elif interprets and script is None and not code and command.stdin is not None:
        command.script = command.stdin
    known = command.script.text if command.script is not None else None
    if known is not None and (interprets or name in ("go", "java", "gcc")):
        code.append(known)
    elif known is not None and name in ("make", "gmake"):
        for line in _recipes(known):
            commands.extend(walk.try_nested(line, None, name).commands)
    if name in ("make", "gmake"):
        for text in command.values("--eval", "-E"):
            for line in _recipes(text):
                commands.extend(walk.try_nested(line, None, name).commands)
    if code:
        command.code = "\n".join(code)
        for path in fetched_files(command.code):
            walk.store(path, Feed((command,), None))
        for text in shell_strings(command.code):
            commands.extend(walk.try_nested(text, None, name).commands)
        if re.search(r"\bsystem\s*\(\s*\$0?", command.code) and command.stdin is not None:  # awk runs its input
            command.script = command.stdin
            if command.stdin.text is not None:
                commands.extend(walk.try_nested(command.stdin.text, None, name).commands)
        for words, target in file_commands(command.code):
            if walk.room():
                redirects = [Redirect(target[0], "", target[1])] if target else []
                walk.start(words, redirects, None, (*command.wrappers, name), {})


def _script_of(command: Command) -> str | None:
    """The file with a program's own commands that its words name."""
    name, argv = command.name, command.argv
    options = {"make": "-f --file --makefile", "gmake": "-f --file --makefile", "nmap": "--script", "java": "-jar",
               "gdb": "-x --command", "psql": "-f --file"}.get(name)  # fmt: skip
    values = command.values(*options.split()) if options else []
    if name in ("make", "gmake"):
        values = values or ["Makefile"]
    elif name == "go" and argv[1:2] == ["run"]:
        values = after_options(argv[2:], ["-C", "-exec", "-ldflags", "-tags"])
    elif name in ("ansible-playbook", "insmod"):
        values = after_options(argv[1:], ["-i", "-e", "-u"])
    elif name in ("gcc", "cc", "clang", "g++"):
        values = ["-"] if "-" in argv[1:] else []
    elif name == "java" and not values:
        values = [word for word in argv[1:2] if word.endswith(".java")]
    return values[0] if values else None


def _recipes(text: str) -> list[str]:
    """Command lines of a makefile: what stands after a tab or a rule's semicolon, and ``$(shell ...)``."""
    out = []
    for line in text.split("\n"):
        match = re.match(r"\t\s*[-@+]*(.+)|[^\t#=:]*::?(?!=)[^;=]*;\s*[-@+]*(.+)", line)
        if match:
            out.append((match[1] or match[2]).replace("$$", "$"))
        out.extend(re.findall(r"\$\(shell\s+(.+)\)", line))
    return out[:16]


# --- shells and builtins -----------------------------------------------------------------------------------------


def _shell(walk: Any, command: Command) -> Feed:
    """A shell: the text of -c, the script, or what stands at its standard input."""
    argv, position, reads_stdin = command.argv, 1, False
    while position < len(argv):
        word = argv[position]
        if word in ("-o", "+o", "-O", "+O", "--rcfile", "--init-file"):
            position += 2
            continue
        if word in ("-", "--"):
            position += 1
            break
        if not (word.startswith("--") or (word[:1] in ("-", "+") and len(word) > 1)):
            break
        if word[0] == "-" and word[1] != "-":
            if "c" in word:
                rest = argv[position + 1 :]
                while rest and rest[0] in ("-e", "-x", "-u", "-l", "-i", "--"):
                    rest = rest[1:]
                command.code = rest[0] if rest else ""
                inner = walk.as_wrapper(command, command.code, rest[2:], named=rest[1] if len(rest) > 1 else "")
                return Feed((command, *inner.commands), inner.text)
            if "n" in word:  # only checks the syntax
                return Feed((command,), "")
            reads_stdin = reads_stdin or "s" in word
        position += 1
    rest = argv[position:]
    if rest and not reads_stdin:
        if OUTPUT[0] in rest[0]:
            command.script = Feed(tuple(walk.reading.origins(rest[0])), walk.known_text(rest[0]))
        elif rest[0] in ("/dev/stdin", "/proc/self/fd/0", "/dev/fd/0"):
            reads_stdin = True
        else:
            command.script = walk.files.get(walk.absolute(rest[0])) or Feed((), None, rest[0])
        if not reads_stdin:
            if command.script.text is not None:
                inner = walk.run_file(command, rest[0], command.script.text, rest[1:])
                return Feed((command, *inner.commands), inner.text)
            return Feed((command,), None)
    if command.stdin is not None:
        command.script = command.stdin
        if command.stdin.text is not None:
            command.code = command.stdin.text
            inner = walk.as_wrapper(command, command.stdin.text, rest[1:], stdin=None)
            return Feed((command, *inner.commands), inner.text)
    return Feed((command,), None)


def _eval(walk: Any, command: Command) -> Feed:
    words = command.argv[2:] if command.argv[1:2] == ["--"] else command.argv[1:]
    command.code = " ".join(words)
    inner = walk.nested(command.code, command.stdin) if command.code else Feed((), "")
    return Feed((command, *inner.commands), inner.text)


def _source(walk: Any, command: Command) -> Feed:
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


def _cd(walk: Any, command: Command) -> Feed:
    words = [word for word in command.argv[1:] if not word.startswith("-") or word == "-"]
    target = words[0] if words else (HOME if command.name == "cd" else "")
    if target == "-" or not target:
        walk.cwd = None
    elif target.startswith("/") or walk.cwd is None:
        walk.cwd = posixpath.normpath(target)
    else:
        walk.cwd = posixpath.normpath(walk.cwd + "/" + target)
    return Feed((command,), "")


def _read(walk: Any, command: Command) -> Feed:
    names = [word for word in command.operands if re.fullmatch(r"[A-Za-z_]\w*", word)]
    if command.name in ("mapfile", "readarray") and not names:
        names = ["MAPFILE"]
    value = None
    if command.stdin is not None:
        if command.stdin.text is not None:
            lines = command.stdin.text.strip("\n").split("\n")
            value = ";".join(lines)[:4096] if len(lines) <= 16 else None
        if value is None and command.stdin.commands:
            value = walk.mark(command.stdin)
    for position, name in enumerate(names):
        if value is None:
            walk.variables[name] = f"{UNKNOWN[0]}{name}{UNKNOWN[1]}"
        elif len(names) == 1:
            walk.variables[name] = value
        else:
            parts = value.split(None, len(names) - 1)
            walk.variables[name] = parts[position] if position < len(parts) else ""
    return Feed((command,), "")


def _alias(walk: Any, command: Command) -> Feed:
    commands = [command]
    for word in command.argv[1:]:
        name, equals, value = word.partition("=")
        if equals and name:
            walk.aliases[name] = value
            walk.active.append(name)
            commands.extend(walk.try_nested(value, None, "alias").commands)
            walk.active.pop()
    return Feed(tuple(commands), "")


def _set(walk: Any, command: Command) -> Feed:
    if command.name == "unset":
        for word in command.operands:
            walk.variables.pop(word, None)
    elif command.name == "popd":
        walk.cwd = None
    elif "--" in command.argv:
        walk.arguments = command.argv[command.argv.index("--") + 1 :]
    return Feed((command,), "")


def _command(walk: Any, command: Command) -> Feed:
    words = command.argv[1:]
    asks = command.name != "command"
    while words and words[0].startswith("-"):
        asks = asks or "v" in words[0] or "V" in words[0]
        words = words[1:]
    if not asks:
        return walk.inside(command, words)
    words = [word for word in words if not word.startswith("-")]
    return Feed((command,), f"/usr/bin/{words[0]}\n" if words and "/" not in words[0] else None)


def _trap(walk: Any, command: Command) -> Feed:
    words = [word for word in command.argv[1:] if word not in ("--", "-l", "-p")]
    if len(words) < 2 or words[0] in ("", "-"):
        return Feed((command,), "")
    return Feed((command, *walk.nested(words[0], None, "trap").commands), "")


_BUILTINS = {
    "eval": _eval,
    **dict.fromkeys(("source", "."), _source),
    **dict.fromkeys(("cd", "pushd"), _cd),
    **dict.fromkeys(("read", "mapfile", "readarray"), _read),
    "alias": _alias,
    **dict.fromkeys(("set", "unset", "popd"), _set),
    **dict.fromkeys(("command", "which", "type"), _command),
    "trap": _trap,
}


# --- programs that build their commands from what they find --------------------------------------------------------


def _xargs(walk: Any, command: Command) -> Feed:
    valued = "-I -n -P -d -a -E -L -s -R -J --max-args --max-procs --delimiter --arg-file --max-lines --replace".split()
    rest = after_options(command.argv[1:], valued)
    replace = command.values("-I", "-J") or (["{}"] if command.has("-i", "--replace") else [])
    if not rest:
        return Feed((command,), command.stdin.text if command.stdin else None)
    feed = command.stdin or Feed()
    for path in command.values("-a", "--arg-file"):
        if OUTPUT[0] in path:
            feed = Feed(tuple(walk.reading.origins(path)), walk.known_text(path))
        elif path in ("/dev/null", "/dev/tty"):
            feed = Feed((), "")
    if feed.path == "/dev/null":
        feed = Feed((), "")
    if feed.text is not None:
        lines = replace or command.has("-0", "--null")
        items = feed.text.strip("\n").split("\n") if lines else re.sub("['\"\\\\]", "", feed.text).split()
        items = [item for item in items if item][:32]
    else:
        items = [walk.mark(feed)]
    inner = Command("xargs", command.argv, command.redirects, None, command.wrappers)
    commands = [command]
    turns = [[word.replace(replace[0], item) for word in rest] for item in items[:4]] if replace else [rest + items]
    for words in turns:
        commands.extend(walk.inside(inner, words).commands[1:])
    return Feed(tuple(commands), None)


def _find(walk: Any, command: Command) -> Feed:
    commands, found = [command], paths.found(command)
    for position, word in enumerate(command.argv):
        if word in ("-exec", "-execdir", "-ok", "-okdir") or (
            command.name in ("fd", "fdfind") and word in ("-x", "-X", "--exec", "--exec-batch")
        ):
            inner: list[str] = []
            for part in command.argv[position + 1 :]:
                if part in (";", "+"):
                    break
                # {} stands for the first thing found; with nothing else in the word, for all of it.
                inner.extend(found if part == "{}" else [part.replace("{}", found[0])])
            commands.extend(walk.inside(command, inner).commands[1:])
    return Feed(tuple(commands), "\n".join(found) + "\n")


def _parallel(walk: Any, command: Command) -> Feed:
    valued = "-j -P -a -n -N -I --jobs --colsep -C -L -S --joblog --delay --timeout".split()
    template, items = after_options(command.argv[1:], valued), []
    for position, word in enumerate(template):
        if word in (":::", ":::+", "::::"):
            template, items = template[:position], template[position + 1 :]
            break
    if not items and command.stdin is not None:
        if command.stdin.text is not None:
            items = [line for line in command.stdin.text.split("\n") if line]
        elif command.stdin.commands:
            items = [walk.mark(command.stdin)]
            command.script = command.stdin if not template else None
    text, commands = " ".join(template), [command]
    for item in items[:8] or ["{}"]:
        source = text.replace("{}", item) if "{}" in text else f"{text} {item}".strip()
        command.code = source
        commands.extend(walk.try_nested(source, None, "parallel").commands)
    return Feed(tuple(commands), None)


def _service(walk: Any, command: Command) -> Feed:
    """``service ../../bin/sh``, ``run-parts --regex '^sh$' /bin``: a program by a path that is none."""
    argv = command.argv
    if command.name == "service" and argv[1:] and "../" in argv[1]:
        return walk.inside(command, ["/" + argv[1].rsplit("../", 1)[1], *argv[2:]])
    if command.name == "run-parts" and argv[-1].rstrip("/") in ("/bin", "/usr/bin", "/sbin"):
        for value in command.values("--regex"):
            return walk.inside(command, [value.strip("^$")])
    return Feed((command,), None)


_SPECIAL = {
    **dict.fromkeys(("xargs", "gxargs"), _xargs),
    **dict.fromkeys(("find", "gfind", "fd", "fdfind"), _find),
    "parallel": _parallel,
    **dict.fromkeys(("service", "run-parts"), _service),
}


# --- outputs that are known, files that are left behind ------------------------------------------------------------


def _printf(words: list[str]) -> str | None:
    if words[:1] == ["-v"]:
        return ""
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        return ""
    form, values = words[0], words[1:]
    slots = len(re.findall(r"%[-+ 0#]*\d*(?:\.\d+)?[a-zA-Z]", form.replace("%%", "")))
    turns = max(1, -(-len(values) // slots)) if slots else 1
    if turns > 256:
        return None

    def one(match: re.Match) -> str:
        if match[0] == "%%":
            return "%"
        value = values.pop(0) if values else ""
        return ansi(value) if match[1] == "b" else value[:1] if match[1] == "c" else value

    return "".join(re.sub(r"%%|%[-+ 0#]*\d*(?:\.\d+)?([a-zA-Z])", one, ansi(form)) for _ in range(turns))


def output(command: Command, walk: Any) -> str | None:
    """Standard output of a command whose output follows from its words and its input; None where it does not.

    Text that a program changed is not worked out: the command is marked as hiding it.
    """
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
    elif name in (":", "true", "false", "test", "[", "export", "declare", "local", "readonly", "typeset", "sleep"):
        text = ""
    elif name == "cat" and [word for word in command.operands if word != "-"]:
        parts = []
        for path in command.operands[:16]:
            known = walk.files.get(walk.absolute(path))
            part = "" if path == "/dev/null" else known.text if known is not None else walk.known_text(path)
            if part is None:
                return None
            parts.append(part)
        text = "".join(parts)
    elif name in ("cat", "tac", "sort", "uniq", "tee", "column", "fold", "pv", "sponge", "dd", "head", "tail"):
        if len(argv) <= 3 and not any(word.startswith("if=") for word in argv):
            # head and tail show some of what there is, not all
            text = None if name in ("head", "tail") and given and "*" in given else given
    elif name == "pwd":
        text = f"{walk.cwd or '.'}\n"
    elif name == "ls" and not command.has("-l"):
        folders = command.operands
        text = "".join(f"{folder.rstrip('/')}/*\n" if folder[-1:] != "*" else folder + "\n" for folder in folders)
        text = text or "*\n"
    elif name in ("dirname", "basename") and command.operands:
        text = getattr(posixpath, name)(command.operands[0]) + "\n"
    if text is None:
        makes = walk.programs.member(name, "interpreters") and command.code is not None
        begins = makes and (name not in ("awk", "gawk", "mawk", "nawk") or "BEGIN" in command.code)
        # what ls or find would list is known as a pattern only: nothing was hidden in it
        literal = given and given.strip() and not re.search(r"[*]", given)
        command.hidden = bool(literal) or (begins and not command.operands[1:])
        return None
    return text[:MAX_TEXT]


def _leave_behind(walk: Any, command: Command) -> None:
    """Files that a command writes: what they hold is known by where it came from."""
    name = command.name
    if name in ("echo", "printf", ":", "test", "["):
        return
    feed = Feed((command, *(command.stdin.commands if command.stdin else ())), None)
    facts = walk.programs.of(name)
    words = paths.operands(command, facts)
    if name in ("cp", "mv", "install", "ln", "gcp") and len(words) == 2:
        known = walk.files.get(walk.absolute(words[0]))
        if known is not None:
            for target in (words[1], posixpath.join(words[1], posixpath.basename(words[0]))):
                walk.store(target, known)
        return
    for target in command.values(*facts.to):
        walk.store(target, feed)
    if name in ("tee", "sponge", "dd"):
        targets = words if name != "dd" else command.values("of=")
        for target in targets:
            walk.store(target, command.stdin or feed, command.has(*facts.appends) if facts.appends else False)
    elif name in ("zip", "rar", "7z", "7za"):
        for target in [word for word in words if word not in ("a", "u")][:1]:
            walk.store(target, feed)
    elif name in ("gcc", "cc", "clang", "g++", "rustc"):
        for word in words:
            known = walk.files.get(walk.absolute(word))
            if known is not None:  # what it compiles to comes from where the source came from
                walk.store((command.values("-o") or ["a.out"])[0], Feed(known.commands, None))
    elif name in ("mysqldump", "pg_dump", "scrot", "import", "arecord", "grim", "gpg", "gpg2"):
        for target in command.values("-o", "-r", "--result-file", "-f", "--output") or words[-1:]:
            walk.store(target if name[:3] != "gpg" or command.has("-o", "--output") else target + ".gpg", feed)
    if walk.programs.member(name, "fetchers"):
        far = re.compile(r"(?:[\w.-]+@)?[\w.-]+:(?!\\)|(?:s3|gs|rsync|az|https?|ftp)://")
        folder = (command.values("-P", "--directory-prefix", "-d", "--dir") or [""])[0]
        if name in ("aria2c", "axel"):
            for target in command.values("-o", "--out", "--output"):
                walk.store(posixpath.join(folder, target), feed)
        for word in words:
            base = re.split(r"[/:]", word.split("?")[0])[-1]
            if base and (far.match(word) or "/" in word):
                if name != "curl" or command.has("-O", "-J", "--remote-name", "--remote-name-all"):
                    walk.store(posixpath.join(folder, base), feed)
                if len(words) > 1 and far.match(word) and not far.match(words[-1]):
                    walk.store(words[-1], feed)
                    walk.store(posixpath.join(words[-1], base), feed)
        text = " ".join(command.argv[1:]) + " " + ((command.stdin.text or "") if command.stdin else "")
        if name in ("tftp", "smbclient", "ftp", "lftp", "sftp"):
            for match in re.finditer(
                r"(?:\b(?:get|pget|mget)|\s-r)\s+(?:-o\s+)?([\w./~*-]+)(?:[ \t]+([\w./-]+))?", text
            ):
                walk.store(posixpath.basename(match[1]), feed)
                walk.store(match[2] or "", feed)
