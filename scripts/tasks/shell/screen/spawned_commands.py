"""What a program starts, and what it leaves behind: wrappers, shells, interpreters, ways out, known outputs, files.

The facts are data; here is what no table says. The reader calls it and hands itself over as ``walk``.
"""

import posixpath
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from scripts.tasks.shell.screen import paths
from scripts.tasks.shell.screen.code import FETCHED, shell_strings
from scripts.tasks.shell.screen.commands import (
    HOME,
    MAX_TEXT,
    OUTPUT,
    UNKNOWN,
    ShellCommand,
    Stream,
    ansi,
)
from scripts.tasks.shell.screen.programs import Facts

_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")
_STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


def begin(walk: Any, command: ShellCommand) -> Stream:
    """Note whatever a command starts; returns its output."""
    special = _BUILTINS.get(command.name)
    if special is not None:
        return special(walk, command)
    programs = walk.programs
    for variable, value in command.assignments.items():
        if programs.member(variable, "starting-variables"):
            walk.try_nested(value.lstrip("! "), None, command.name)
    if "/" in command.name:
        base = posixpath.basename(command.name)
        if any(programs.member(base, group) for group in ("shells", "interpreters", "copied")):
            command.name = base  # a copy elsewhere, as set-uid programs are
    facts = programs.of(command.name)
    if facts.bundle and len(command.argv) > 1 and re.fullmatch(r"[A-Za-z]+", command.argv[1]):
        command.argv = [command.argv[0], "-" + command.argv[1], *command.argv[2:]]
    if programs.member(command.name, "shells"):
        feed = _shell(walk, command)
    elif command.name in _SPECIAL:
        feed = _SPECIAL[command.name](walk, command)
    else:
        feed = _by_table(walk, command, facts)
    _leave_behind(walk, command, facts)
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
        several = word[:2] != "--" and len(word) > 2 and word[1:].isalpha()
        position += 2 if word in valued or (several and "-" + word[-1] in valued) else 1
    return words[position:]


def _by_table(walk: Any, command: ShellCommand, facts: Facts) -> Stream:
    """What the table of programs says that a command starts."""
    name, argv, commands = command.name, command.argv, [command]
    text: str | None = None

    def add(feed: Stream) -> str | None:
        commands.extend(one for one in feed.commands if one is not command)
        return feed.text

    for source in _read_code(walk, command, facts):
        add(walk.try_nested(source, None, name))
    for source in command.values(*facts.runs):
        if source and not re.match(r"\S*ssh\b", source):  # what rsync and its like use anyway
            add(walk.shell_text(command, [source]))
    for source in command.values(*facts.words):
        add(walk.inside(command, source.split(",")))
    if facts.escape is not None:
        given = [
            feed.text for feed in (command.stdin, command.script) if feed is not None and feed.text
        ]
        given += map("=".join, pairwise(argv[1:])) if facts.pairs else []
        for source in (*argv[1:], *given):
            for match in facts.escape.finditer(source[:4096]):
                matched = next((group for group in match.groups()[::-1] if group), "")
                add(walk.try_nested(matched.lstrip("!; "), None, name))
    rest = argv[1:]
    if facts.after:
        position = next((at for at, word in enumerate(rest) if word in facts.after), len(rest))
        rest = rest[position + 1 :]
        if "--" in rest and facts.label:  # kubectl exec pod -- words
            rest = ["", *rest[rest.index("--") + 1 :]]
    skip = facts.wraps if facts.wraps is not None else facts.joins
    if skip is not None and rest:
        rest = after_options(rest, facts.values)
        rest = after_options(rest[skip:], facts.values) if skip else rest
        while rest and _ASSIGNMENT.match(rest[0]) and facts.wraps is not None:
            key, _, value = rest.pop(0).partition("=")
            command.assignments = {**command.assignments, key: value}
        if rest and facts.wraps is not None:
            text = add(walk.inside(command, rest, command.assignments, facts.label))
        elif rest:
            with walk.within(cwd=None if name in ("ssh", "mosh", "autossh") else walk.cwd):
                text = add(walk.shell_text(command, [" ".join(rest)]))
    if (
        name in ("ssh", "at", "batch", "su", "runuser", "parallel")
        and len(commands) == 1
        and command.stdin is not None
    ):
        command.script = command.stdin  # the far shell, or the later one, reads it
        if command.stdin.text is not None:
            return walk.shell_text(command, [command.stdin.text], stdin=None)
    return Stream(tuple(commands), text if text is not None else output(command, walk))


def _read_code(walk: Any, command: ShellCommand, facts: Facts) -> list[str]:
    """Note the code of ``python -c``, of a script or a makefile that was written before; returns its shell text."""
    name, argv = command.name, command.argv
    interprets = walk.programs.member(name, "interpreters")
    words, code, script = paths.operands(command, facts), [], None
    if facts.code == ("first",):  # awk
        scripts = command.values("-f", "--file")
        code, script = ([], scripts[-1]) if scripts else (words[:1], None)
    elif facts.code:
        letters = "".join(option[1] for option in facts.code if len(option) == 2)
        for at, word in enumerate(argv[1:], 1):
            match = (
                re.fullmatch(rf"-[A-Za-z0-9]*?[{letters}](.*)", word, re.DOTALL)
                if letters
                else None
            )
            if word in facts.code or word.partition("=")[0] in facts.code:
                code += [word.partition("=")[2]] if "=" in word else argv[at + 1 : at + 2]
            elif (
                match is not None
                and word[:2] not in facts.values
                and interprets
                and word[:2] != "--"
            ):
                code += [match[1]] if match[1] else argv[at + 1 : at + 2]
            elif word[:1] != "-" and argv[at - 1] not in facts.values:
                break
    if interprets and not code and script is None:
        script = next(iter(words), "-" if command.stdin is not None and "-m" not in argv else None)
    script = script or (None if interprets else _script_of(facts, command, words))
    if script is not None and "-m" not in argv:
        command.script = _script(walk, command, script) or Stream((), None, script)
    known = command.script.text if command.script is not None else None
    if name in ("make", "gmake"):
        texts = [*command.values("--eval", "-E"), known or ""]
        return [
            line.strip("\t -@+").replace("$$", "$") for text in texts for line in text.split("\n")
        ][:64]
    if known is not None and (interprets or name in ("go", "java", "gcc")):
        code.append(known)
    if not code:
        return []
    command.code = "\n".join(code)
    for path in FETCHED.findall(command.code) if "://" in command.code else ():
        walk.store(path, Stream((command,), None))
    if (
        re.search(r"\bsystem\s*\(\s*\$0?", command.code) and command.stdin is not None
    ):  # awk runs its input
        command.script = command.stdin
        return [*shell_strings(command.code), command.stdin.text or ""]
    return shell_strings(command.code)


def _script_of(facts: Facts, command: ShellCommand, words: list[str]) -> str | None:
    """The file with a program's own commands that its words name."""
    if facts.script == ("first",):
        return next((word for word in words if word != "run"), None)
    values = command.values(*facts.script) if facts.script else []
    return values[0] if values else "Makefile" if command.name in ("make", "gmake") else None


# --- shells and builtins -----------------------------------------------------------------------------------------


def _shell(walk: Any, command: ShellCommand) -> Stream:
    """A shell: the text of -c, the script, or what stands at its standard input."""
    words = ["-" + word[1:] if word[:1] == "+" else word for word in command.argv[1:]]
    rest = after_options(words, ("-o", "-O", "--rcfile", "--init-file"))
    flags = [word for word in words[: len(words) - len(rest)] if word[:2] != "--"]
    letters = "".join(word[1:] for word in flags)
    if "c" in letters:
        command.code = rest[0] if rest else ""
        inner = walk.as_wrapper(command, command.code, rest[2:], named="".join(rest[1:2]))
        return Stream((command, *inner.commands), inner.text)
    if "n" in letters and "-o" not in flags:  # only checks the syntax
        return Stream((command,), "")
    if rest and "s" not in letters and rest[0] not in _STDIN:
        command.script = _script(walk, command, rest[0]) or Stream((), None, rest[0])
        if command.script.text is None:
            return Stream((command,), None)
        inner = walk.run_file(command, rest[0], command.script.text, rest[1:])
        return Stream((command, *inner.commands), inner.text)
    command.script = command.stdin
    if command.stdin is None or command.stdin.text is None:
        return Stream((command,), None)
    command.code = command.stdin.text
    inner = walk.as_wrapper(command, command.code, rest[1:], stdin=None)
    return Stream((command, *inner.commands), inner.text)


def _script(walk: Any, command: ShellCommand, word: str) -> Stream | None:
    if OUTPUT[0] in word:
        return Stream(tuple(walk.reading.origins(word)), walk.known_text(word))
    return command.stdin if word in _STDIN else walk.files.get(walk.absolute(word))


def _eval(walk: Any, command: ShellCommand) -> Stream:
    words = command.argv[2:] if command.argv[1:2] == ["--"] else command.argv[1:]
    command.code = " ".join(words)
    inner = walk.nested(command.code, command.stdin)
    return Stream((command, *inner.commands), inner.text)


def _source(walk: Any, command: ShellCommand) -> Stream:
    command.script = _script(walk, command, command.argv[1]) if command.argv[1:] else None
    if command.script is None or command.script.text is None:
        return Stream((command,), None)
    inner = walk.nested(command.script.text, None, arguments=command.argv[2:])
    return Stream((command, *inner.commands), None)


def _cd(walk: Any, command: ShellCommand) -> Stream:
    words = [word for word in command.argv[1:] if not word.startswith("-") or word == "-"]
    target = words[0] if words else HOME if command.name == "cd" else ""
    if target in ("-", "") or command.name == "popd":
        walk.cwd = None
    else:
        walk.cwd = posixpath.normpath(posixpath.join(walk.cwd or "", target))
    return Stream((command,), "")


def _read(walk: Any, command: ShellCommand) -> Stream:
    names = [word for word in command.operands if re.fullmatch(r"[A-Za-z_]\w*", word)]
    if command.name in ("mapfile", "readarray") and not names:
        names = ["MAPFILE"]
    value = None
    if command.stdin is not None:
        lines = (command.stdin.text or "").strip("\n").split("\n")
        if command.stdin.text is not None and len(lines) <= 16:
            value = ";".join(lines)[:4096]
        elif command.stdin.commands:
            value = walk.mark(command.stdin)
    parts = (
        [value]
        if value is not None and len(names) == 1
        else (value or "").split(None, max(len(names) - 1, 0))
    )
    for name, part in zip(names, parts + [""] * len(names), strict=False):
        walk.variables[name] = part if value is not None else f"{UNKNOWN[0]}{name}{UNKNOWN[1]}"
    return Stream((command,), "")


def _alias(walk: Any, command: ShellCommand) -> Stream:
    commands = [command]
    for word in command.argv[1:]:
        name, equals, value = word.partition("=")
        if equals and name:
            walk.aliases[name] = value
            with walk.within(active=[*walk.active, name]):
                commands.extend(walk.try_nested(value, None, "alias").commands)
    return Stream(tuple(commands), "")


def _set(walk: Any, command: ShellCommand) -> Stream:
    for word in command.operands if command.name == "unset" else ():
        walk.variables.pop(word, None)
    if command.name == "set" and "--" in command.argv:
        walk.arguments = command.argv[command.argv.index("--") + 1 :]
    return Stream((command,), "")


def _command(walk: Any, command: ShellCommand) -> Stream:
    if command.name == "command" and not command.has("-v", "-V"):
        return walk.inside(command, after_options(command.argv[1:], ()))
    words = command.operands
    return Stream((command,), f"/usr/bin/{words[0]}\n" if words and "/" not in words[0] else None)


def _trap(walk: Any, command: ShellCommand) -> Stream:
    words = [word for word in command.argv[1:] if word not in ("--", "-l", "-p")]
    inner = walk.nested(words[0], None, "trap") if len(words) > 1 and words[0] != "-" else Stream()
    return Stream((command, *inner.commands), "")


_BUILTINS = {
    **{
        "eval": _eval,
        "source": _source,
        ".": _source,
        "cd": _cd,
        "pushd": _cd,
        "popd": _cd,
        "alias": _alias,
    },
    **{
        "read": _read,
        "mapfile": _read,
        "readarray": _read,
        "set": _set,
        "unset": _set,
        "trap": _trap,
    },
    **dict.fromkeys(("command", "which", "type"), _command),
}


# --- programs that build their commands from what they find --------------------------------------------------------


def _xargs(walk: Any, command: ShellCommand) -> Stream:
    valued = "-I -n -P -d -a -E -L -s -R -J --max-args --max-procs --delimiter --arg-file --max-lines --replace".split()
    rest = after_options(command.argv[1:], valued)
    replace = command.values("-I", "-J") or (["{}"] if command.has("-i", "--replace") else [])
    feed = command.stdin or Stream()
    if not rest:
        return Stream((command,), feed.text)
    for path in command.values("-a", "--arg-file") or (
        [feed.path] if feed.path and feed.text is None else []
    ):
        listed = Stream((ShellCommand("cat", ["cat", path], reading=walk.reading),))
        feed = (
            Stream((), "")
            if path in ("/dev/null", "/dev/tty")
            else _script(walk, command, path) or listed
        )
    text = "" if feed.path == "/dev/null" else feed.text
    lines = replace or command.has("-0", "--null")
    items = (
        [walk.mark(feed)]
        if text is None
        else text.split("\n")
        if lines
        else re.sub("['\"\\\\]", "", text).split()
    )
    items = [item for item in items if item][:32]
    inner = ShellCommand("xargs", command.argv, command.redirects, None, command.wrappers)
    turns = (
        [[word.replace(replace[0], item) for word in rest] for item in items[:4]]
        if replace
        else [rest + items]
    )
    return Stream(
        (command, *(one for words in turns for one in walk.inside(inner, words).commands[1:])), None
    )


def _find(walk: Any, command: ShellCommand) -> Stream:
    commands, paths_found, fd = [command], paths.found(command), command.name[:2] == "fd"
    for position, word in enumerate(command.argv):
        if word in (paths.FD_RUNS if fd else ("-exec", "-execdir", "-ok", "-okdir")):
            rest = command.argv[position + 1 :]
            end = next((at for at, part in enumerate(rest) if part in (";", "+")), len(rest))
            rest = rest[:end] if "{}" in "".join(rest) or not fd else [*rest[:end], "{}"]
            # {} stands for the first thing found; with nothing else in the word, for all of it.
            words = [
                [*paths_found] if part == "{}" else [part.replace("{}", paths_found[0])]
                for part in rest
            ]
            commands.extend(
                walk.inside(command, [one for part in words for one in part]).commands[1:]
            )
    return Stream(tuple(commands), "\n".join(paths_found) + "\n")


_SPECIAL = {
    **dict.fromkeys(("xargs", "gxargs"), _xargs),
    **dict.fromkeys(("find", "gfind", "fd", "fdfind"), _find),
}


# --- outputs that are known, files that are left behind ------------------------------------------------------------


def output(command: ShellCommand, walk: Any) -> str | None:
    """Standard output of a command whose output follows from its words and its input; None where it does not.

    Text that a program changed is not worked out: the command is marked as hiding it.
    """
    name, argv = command.name, command.argv
    given = command.stdin.text if command.stdin is not None else None
    text: str | None = None
    if name == "echo":
        flags = 1
        while flags < len(argv) and re.fullmatch(r"-[neE]+", argv[flags]):
            flags += 1
        letters, text = "".join(argv[1:flags]), " ".join(argv[flags:])
        text = (ansi(text) if "e" in letters else text) + ("" if "n" in letters else "\n")
    elif (
        name == "printf"
        and argv[1:]
        and argv[1].replace("%%", "").count("%") == argv[1].count("%s") <= 1
    ):
        form, values = ansi(argv[1]).replace("%%", "%"), argv[2:] if "%s" in argv[1] else [""]
        text = "".join(form.replace("%s", value) for value in values or [""])
    elif name in (
        ":",
        "true",
        "false",
        "test",
        "[",
        "export",
        "declare",
        "local",
        "readonly",
        "typeset",
        "sleep",
    ):
        text = ""
    elif name == "cat" and [word for word in command.operands if word != "-"]:
        known = {path: walk.files.get(walk.absolute(path)) for path in command.operands[:16]}
        texts = [
            feed.text if feed is not None else walk.known_text(path) for path, feed in known.items()
        ]
        texts = [
            "" if path == "/dev/null" else text for path, text in zip(known, texts, strict=True)
        ]
        return None if None in texts else "".join(texts)[:MAX_TEXT]
    elif name in (
        "cat",
        "tac",
        "sort",
        "uniq",
        "tee",
        "column",
        "fold",
        "pv",
        "sponge",
        "dd",
        "head",
        "tail",
    ):
        if len(argv) <= 3 and not any(word.startswith("if=") for word in argv):
            # head and tail show some of what there is, not all
            text = None if name in ("head", "tail") and given and "*" in given else given
    elif name == "pwd":
        text = f"{walk.cwd or '.'}\n"
    elif name == "ls" and not command.has("-l"):
        text = "".join(
            f"{folder.rstrip('/')}/*\n" if folder[-1:] != "*" else folder + "\n"
            for folder in command.operands
        )
        text = text or "*\n"
    elif name in ("dirname", "basename") and command.operands:
        text = getattr(posixpath, name)(command.operands[0]) + "\n"
    if text is not None:
        return text[:MAX_TEXT]
    made = (
        walk.programs.member(name, "interpreters")
        and command.code is not None
        and not command.operands[1:]
    )
    made = made and (not name.endswith("awk") or "BEGIN" in command.code)
    # What ls or find would list is known as a pattern only: nothing was hidden in it.
    command.hidden = made or name == "printf" or bool(given and given.strip() and "*" not in given)
    return None


def _leave_behind(walk: Any, command: ShellCommand, facts: Facts) -> None:
    """Files that a command writes: what they hold is known by where it came from."""
    name = command.name
    fetches, packs = walk.programs.member(name, "fetchers"), walk.programs.member(name, "packers")
    if not (fetches or facts.to or facts.writes != "none" or packs):
        return
    feed = Stream((command, *(command.stdin.commands if command.stdin else ())), None)
    words, targets, appends = paths.operands(command, facts), command.values(*facts.to), False
    if fetches:  # under the names of what was asked for, in the folder that was named
        text = " ".join(words) + " " + ((command.stdin.text or "") if command.stdin else "")
        folders = ["", *command.values("-P", "--directory-prefix", "-d", "--dir"), *words[-1:]]
        names = [re.split(r"[/:]", word.split("?")[0])[-1] for word in text.split()[:32]]
        names += command.values("-o", "--out", "--output")
        targets += [posixpath.join(folder, base) for folder in folders for base in names if base]
        targets += [word for word in words[-1:] if "://" not in word]
    elif facts.writes == "last" and len(words) == 2:  # cp, mv, ln
        known = walk.files.get(walk.absolute(words[0]))
        feed, targets = (
            known,
            [words[1], posixpath.join(words[1], posixpath.basename(words[0]))] if known else [],
        )
    elif name in (
        "gcc",
        "cc",
        "clang",
        "g++",
        "rustc",
    ):  # what it compiles to comes from where the source came from
        known = next(
            (walk.files[key] for key in map(walk.absolute, words) if key in walk.files),
            command.stdin,
        )
        feed, targets = Stream(known.commands if known else ()), command.values("-o") or ["a.out"]
    elif packs:
        targets += [word for word in words if word not in ("a", "u")][
            : 1 if name in ("zip", "rar", "7z", "7za") else 3
        ]
    elif name in ("tee", "sponge", "dd"):
        feed, targets = command.stdin or feed, targets or words
        appends = command.has(*facts.appends)
    for target in targets:
        if target not in ("-", "/dev/stdout"):
            walk.store(target, feed, appends)
