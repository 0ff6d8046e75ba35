"""Programs that start others: the option, the command of their own or the script through which each does it.

One table for what is otherwise scattered over manual pages: ``zip -TT``, ``tcpdump -z``, ``gdb -ex '!sh'``,
``mysql -e '\\! sh'``, ``make --eval``... :func:`started` says what a call would start; nothing is looked up or run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Options whose value is a command line.
_OPTIONS = {
    "zip": "-TT --unzip-command",
    "rsync": "-e --rsh",
    "scp": "-S",
    "sftp": "-S",
    "split": "--filter",
    "tcpdump": "-z",
    "dmsetup": "--exec",
    "openvpn": "--up --down --route-up --ipchange --tls-verify",
    "nano": "-s --speller",
    "pico": "-s",
    "gem": "-e",
    "rpm": "--pipe",
    "wget": "--use-askpass",
    "aria2c": "--on-download-start --on-download-complete --on-download-error --on-bt-download-complete",
    "sort": "--compress-program",
    "rg": "--pre",
    "install": "--strip-program",
    "restic": "--password-command",
    "borg": "--rsh",
    "julia": "-e --eval",
}
# Options whose value is a command in words parted by commas.
_LISTS = {name: "-wrapper" for name in ("gcc", "g++", "cc", "c++", "clang")}
# Operands before the words of the inner command, and the options that take a value.
_COMMANDS = {
    "cpulimit": (0, "-l -p -e --limit --pid --exe"),
    "logsave": (1, ""),
    "bundle": (1, ""),
    "npm": (1, ""),
    "perf": (1, "-e -o -F"),
    "distcc": (0, ""),
    "aa-exec": (0, "-p --profile -n --namespace"),
    "softlimit": (0, "-m -d -s -l -a -o -p -f -c -r -t"),
    "setlock": (1, ""),
    "multitime": (0, "-n"),
    "uv": (1, ""),
}
_BANG = re.compile(r"^\s*:?!\s*(.+)$", re.MULTILINE)
# What follows in a program's own commands (its options or what stands at its standard input) is for the shell.
_ESCAPES = {
    "gdb": re.compile(r"^\s*(?:!|shell\b)\s*(.+)$", re.MULTILINE),
    "lldb": re.compile(r"^\s*(?:platform shell|!)\s*(.+)$", re.MULTILINE),
    "mysql": re.compile(r"(?:\\!|^\s*system\s|sys_(?:exec|eval)\s*\(\s*['\"])\s*([^;'\"\n]+)", re.MULTILINE),
    "psql": re.compile(r"\\!\s*(.+)|(?i:\bprogram)\s+'((?:[^']|'')+)'"),
    "sqlite3": re.compile(r"^\s*\.(?:shell|system)\s+(.+)$", re.MULTILINE),
    "redis-cli": re.compile(r"os\.execute\(\s*['\"]([^'\"]+)"),
    "less": _BANG,
    "more": _BANG,
    "most": _BANG,
    "man": _BANG,
    "ed": _BANG,
    "red": _BANG,
    "ftp": _BANG,
    "lftp": _BANG,
    "mail": re.compile(r"^\s*~?!\s*(.+)$", re.MULTILINE),
    "telnet": _BANG,
    "journalctl": _BANG,
    "nmap": _BANG,
    "dc": _BANG,
    "gnuplot": re.compile(r"(?:^\s*!|\bsystem\s*\(?\s*['\"])([^'\"\n]+)", re.MULTILINE),
    "tclsh": re.compile(r"\bexec\s+([^\n;\]}]+)"),
    "wish": re.compile(r"\bexec\s+([^\n;\]}]+)"),
    "emacs": re.compile(r"\((?:term|ansi-term|shell-command|async-shell-command|call-process)\s+\"([^\"]+)\""),
    "rpm": re.compile(r"(?:os\.execute|io\.popen|posix\.exec)\(\s*['\"]([^'\"]+)|%\(([^)]+)\)"),
    "puppet": re.compile(r"\bexec\s*\{\s*(?:'((?:[^'\\]|\\.)+)'|\"((?:[^\"\\]|\\.)+)\")\s*:"),
    "rake": re.compile(r"\bsh\s+['\"]([^'\"]+)|`([^`]+)`"),
    "latex": re.compile(r"\\write18\s*\{([^}]+)\}"),
    "vi": _BANG,
}
_ESCAPES.update({name: _ESCAPES["latex"] for name in ("pdflatex", "xelatex", "lualatex", "tex", "pdftex")})
_ESCAPES.update({name: _ESCAPES["mysql"] for name in ("mariadb", "mycli")})
# Programs whose options or input are code of another language; the options that hold it.
_CODE = {
    "gdb": r"^\s*(?:python|py|pi)\s+(.+)",
    "groovy": "",
    "jshell": "",
    "jjs": "",
    "jrunscript": "",
    "scala": "",
    "julia": "",
    "knife": "",
    "gimp": "",
    "irb": "",
    "pry": "",
    "nmap": "",
}
_CODE_OPTIONS = {
    "groovy": "-e",
    "jrunscript": "-e",
    "scala": "-e",
    "julia": "-e --eval",
    "knife": "-E",
    "gimp": "-b --batch",
    "gdb": "-ex -iex --eval-command --init-eval-command",
}
_OWN = {
    "gdb": "-ex -iex --eval-command --init-eval-command",
    "lldb": "-o --one-line",
    "mysql": "-e --execute",
    "mariadb": "-e --execute",
    "psql": "-c --command",
    "gnuplot": "-e",
    "emacs": "--eval --execute",
    "rpm": "--eval -E",
    "puppet": "-e --execute",
    "rake": "-e --execute",
    "lftp": "-e -c",
    "dc": "-e --expression",
}
_INVOKE = re.compile(r"(?i)-Invoke(?:-Success)?(?:::)?\s*=?\s*\"?([^\"]+)")

# Variables that name a program which others start.
STARTING_VARIABLES = frozenset(
    "PAGER MANPAGER GIT_PAGER SYSTEMD_PAGER EDITOR VISUAL SUDO_EDITOR GIT_EDITOR GIT_SSH_COMMAND GIT_EXTERNAL_DIFF"
    " GIT_ASKPASS SSH_ASKPASS SUDO_ASKPASS BROWSER LESSOPEN PROMPT_COMMAND BASH_ENV RSYNC_RSH CVS_RSH".split()
)
STARTERS = frozenset([*_OPTIONS, *_LISTS, *_COMMANDS, *_ESCAPES, *_CODE, "make", "gmake", "apt", "apt-get", "ip", "go"])
STARTERS |= {"capsh", "service", "run-parts", "java"}


def _values(argv: list[str], options: str) -> list[str]:
    found, names = [], options.split()
    for position, word in enumerate(argv[1:], 1):
        for name in names:
            if word == name:
                found.extend(argv[position + 1 : position + 2])
            elif word.startswith(name + "=") or (len(name) == 2 and word.startswith(name) and word[:2] != "--"):
                found.append(word[len(name) :].removeprefix("="))
    return found


def recipes(text: str) -> list[str]:
    """Command lines of a makefile: what stands after a tab or a rule's semicolon, and ``$(shell ...)``."""
    out = []
    for line in text.split("\n"):
        match = re.match(r"\t\s*[-@+]*(.+)|[^\t#=:]*::?(?!=)[^;=]*;\s*[-@+]*(.+)", line)
        if match:
            out.append((match[1] or match[2]).replace("$$", "$"))
        out.extend(re.findall(r"\$\(shell\s+(.+)\)", line))
    return out[:16]


def started(name: str, argv: list[str], given: str | None, file_text: str | None) -> Iterator[tuple[str, list[str]]]:
    """Yield ``("shell", [text])``, ``("words", [word, ...])`` or ``("code", [text])`` for all that a call starts.

    Parameters
    ----------
    name, argv
        The program and its words.
    given
        Text at its standard input, where known.
    file_text
        Text of the script that its words name, where known.
    """
    for value in _values(argv, _OPTIONS.get(name, "")):
        if value and not (name in ("rsync", "scp", "sftp", "borg") and re.match(r"\S*ssh\b", value)):
            yield "shell", [value]
    for value in _values(argv, _LISTS.get(name, "")):
        yield "words", value.split(",")
    if name in _COMMANDS:
        skip, valued = _COMMANDS[name]
        rest = _operands(argv[1:], valued.split())
        if rest[skip:] and (name not in ("bundle", "npm", "uv") or rest[0] in ("exec", "x", "run")):
            yield "words", _operands(rest[skip:], [])
    if name in _ESCAPES:
        texts = _values(argv, _OWN.get(name, "")) if name in _OWN else []
        if name in ("sqlite3", "redis-cli", "latex", "pdflatex", "xelatex", "lualatex", "tex", "pdftex"):
            texts += argv[1:]
        if name in ("less", "more", "most"):
            texts += [word[1:] for word in argv[1:] if word.startswith("+")]
        for text in [*texts, *([given] if given else []), *([file_text] if file_text and name in _OWN else [])]:
            for match in _ESCAPES[name].finditer(text[:4096]):
                yield "shell", [next(group for group in match.groups() if group)]
    if name in _CODE:
        for text in [*_values(argv, _CODE_OPTIONS.get(name, "")), given or "", file_text or ""]:
            for code in re.findall(_CODE[name], text) if _CODE[name] else [text] if text else []:
                yield "code", [code]
    if name in ("make", "gmake"):
        for text in [*_values(argv, "--eval -E"), file_text or ""]:
            for line in recipes(text):
                yield "shell", [line]
    elif name in ("apt", "apt-get"):
        for value in _values(argv, "-o --option"):
            match = _INVOKE.search(value)
            if match:
                yield "shell", [match[1]]
    elif name == "ip" and argv[1:3] in (["netns", "exec"], ["vrf", "exec"]):
        yield "words", argv[4:]
    elif name == "capsh" and "--" in argv:
        yield "words", ["bash", *argv[argv.index("--") + 1 :]]
    elif name == "service" and argv[1:] and "../" in argv[1]:
        yield "words", ["/" + argv[1].rsplit("../", 1)[1], *argv[2:]]
    elif name == "run-parts" and argv[-1].rstrip("/") in ("/bin", "/usr/bin", "/sbin"):
        for value in _values(argv, "--regex"):
            yield "words", [value.strip("^$")]
    elif name in ("go", "java") and file_text:
        yield "code", [file_text]


def script_of(name: str, argv: list[str]) -> str | None:
    """The file with a program's own commands that its words name."""
    if name in ("make", "gmake"):
        values = _values(argv, "-f --file --makefile") or ["Makefile"]
    elif name == "nmap":
        values = _values(argv, "--script")
    elif name == "go" and argv[1:2] == ["run"]:
        values = _operands(argv[2:], ["-C", "-exec", "-ldflags", "-tags"])
    elif name == "java":
        values = _values(argv, "-jar") or [word for word in argv[1:2] if word.endswith(".java")]
    elif name in ("gdb", "psql", "ansible-playbook", "insmod"):
        options = {"gdb": "-x --command", "psql": "-f --file"}.get(name)
        values = _values(argv, options) if options else _operands(argv[1:], ["-i", "-e", "-u"])
    elif name in ("gcc", "cc", "clang", "g++"):
        values = ["-"] if "-" in argv[1:] else []
    else:
        values = []
    return values[0] if values else None


def _operands(words: list[str], valued: list[str]) -> list[str]:
    position = 0
    while position < len(words) and words[position].startswith("-") and words[position] != "-":
        if words[position] == "--":
            return words[position + 1 :]
        position += 2 if words[position] in valued else 1
    return words[position:]
