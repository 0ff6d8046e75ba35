"""Reading a shell command without running it: from text to the simple commands it would start.

:func:`read` parses text with tree-sitter-bash and walks the syntax tree as an interpreter would, except that
it does nothing: it only notes. What comes out is a list of :class:`Command`, each with its words resolved
(quotes, escapes, braces, tildes, variables and functions set on the same line, output of ``echo``, ``printf``,
``base64 -d`` and the like), its redirections, what feeds its standard input, and the wrappers around it
(``sudo``, ``env``, ``xargs``, ``find -exec``, ``ssh``...). A wrapper and the command inside it are both noted;
text handed to a shell (``sh -c``, ``eval``, a here-document, a pipe) is parsed in turn.

What is not known stays visible in the words, as marks from Unicode's private use area: :data:`UNKNOWN`
encloses the name of a variable, :data:`OUTPUT` the number of a command substitution in ``Reading.outputs``.

Nothing is executed and no file is read. Work is bounded: longer, deeper or busier text is :class:`Refused`.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import itertools
import posixpath
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.dataset.starters import STARTERS, STARTING_VARIABLES, script_of, started

MAX_CHARACTERS = 65_536
MAX_DEPTH = 60  # levels of the syntax tree, all nested texts together; a level costs a few Python frames
MAX_NESTED = 10  # texts inside texts: sh -c "sh -c '...'"
MAX_STEPS = 20_000  # words and statements visited; a hand-written script has a few hundred
MAX_COMMANDS = 200  # commands noted; judging them takes time that grows with the square
MAX_FIELDS = 512  # words that one word may expand to
MAX_TEXT = 65_536  # characters of an output that is followed


@cache
def listed(text: str) -> tuple[str, ...]:
    """Words written as one text."""
    return tuple(text.split())


UNKNOWN = ("\ue000", "\ue001")
OUTPUT = ("\ue002", "\ue003")
_OPEN, _COMMA, _CLOSE, _SPLIT = "\ue004", "\ue005", "\ue006", "\ue007"
_PRIVATE = re.compile("[\ue000-\ue00f]")
_MARK = re.compile("\ue000([^\ue000-\ue003]*)\ue001|\ue002([0-9]+)\ue003")

HOME = "/home/user"
ENVIRONMENT = {
    "HOME": HOME,
    "USER": "user",
    "LOGNAME": "user",
    "SHELL": "/bin/bash",
    "BASH": "/bin/bash",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "IFS": " \t\n",
    "OSTYPE": "linux-gnu",
    "TMPDIR": "/tmp",
    "HISTFILE": f"{HOME}/.bash_history",
}

SHELLS = frozenset(["sh", "bash", "dash", "zsh", "ksh", "mksh", "ash", "fish", "rbash", "tcsh", "csh", "pdksh", "yash"])
INTERPRETERS = frozenset(listed("python perl ruby node nodejs php lua luajit tclsh pypy deno bun Rscript osascript"))


_COPIED = frozenset(["busybox", "nc", "ncat", "socat", "find", "awk", "vim"])
_INTERPRETER = re.compile(r"(?:python|pypy|perl|ruby|php|lua|node)[\d.]*")


class Refused(Exception):
    """The text can't be read: not shell, or beyond a limit. The message says which."""


@dataclass(slots=True)
class Feed:
    """What stands at a standard input or came out of a substitution: who wrote it, and its text where known."""

    commands: tuple[Command, ...] = ()
    text: str | None = None
    path: str | None = None


@dataclass(slots=True)
class Redirect:
    """``2>file``: operator ``>``, descriptor ``2``, target ``file``."""

    operator: str
    descriptor: str
    target: str
    varies: bool = False  # another file each time that the endless loop around it comes by


@dataclass(slots=True)
class Command:
    """One simple command with its words resolved.

    ``name`` is the program without quotes and without its folder where that is one of the system's
    (``/usr/bin/rm`` is ``rm``, ``./rm`` stays); ``wrappers`` are the programs that start it, outermost first.
    ``cwd`` is None where unknown. ``code`` is the text handed to an interpreter, ``script`` what is known
    about the file that it executes.
    """

    name: str
    argv: list[str]
    redirects: list[Redirect] = field(default_factory=list)
    stdin: Feed | None = None
    wrappers: tuple[str, ...] = ()
    cwd: str | None = None
    background: bool = False
    piped: bool = False
    loop: str = ""  # "", "loop", "endless": what surrounds it
    recursive: bool = False
    grows: str = ""  # the variable that it makes longer, as x=$x$x does
    code: str | None = None
    script: Feed | None = None
    assignments: dict[str, str] = field(default_factory=dict)
    reading: Reading | None = None
    memo: dict[str, Any] = field(default_factory=dict)  # what was worked out about it once
    _options: tuple[str, list[str], list[str]] | None = None

    def options(self) -> tuple[str, list[str], list[str]]:
        """Letters of the short options, the long options as written, and the operands, in the manner of getopt."""
        if self._options is None:
            short, long, operands = [], [], []
            words = iter(self.argv[1:])
            for word in words:
                if word == "--":
                    operands.extend(words)
                elif word.startswith("--"):
                    long.append(word)
                elif len(word) > 1 and word[0] == "-":
                    short.append(word[1:])
                else:
                    operands.append(word)
            self._options = ("".join(short), long, operands)
        return self._options

    def has(self, letters: str = "", *names: str) -> bool:
        """Whether one of the short letters or long names (or an abbreviation of one) is given."""
        short, long, _ = self.options()
        if any(letter in short for letter in letters):
            return True
        return any(
            name.startswith(option[2:].partition("=")[0]) and len(option) > 3 for option in long for name in names
        )

    def value(self, *options: str) -> list[str]:
        """All values of the options given as ``-o``, ``-ovalue``, ``--opt value`` or ``--opt=value``."""
        found = []
        for position, word in enumerate(self.argv[1:], 1):
            for option in options:
                if word == option:
                    if position + 1 < len(self.argv):
                        found.append(self.argv[position + 1])
                elif option.startswith("--") or len(option) > 2:
                    if word.startswith(option + "="):
                        found.append(word[len(option) + 1 :])
                elif word.startswith(option) and not word.startswith("--"):
                    found.append(word[2:])
        return found

    @property
    def operands(self) -> list[str]:
        return self.options()[2]


@dataclass(slots=True)
class Reading:
    """All that was noted about a text."""

    commands: list[Command] = field(default_factory=list)
    outputs: list[Feed] = field(default_factory=list)
    substituted: list[Feed] = field(default_factory=list)  # command substitutions whose text is known
    sockets: bool = False  # a descriptor was opened on /dev/tcp or /dev/udp
    files: dict[str, Feed] = field(default_factory=dict)  # what was written where, by the tidied path

    def origins(self, *items: Any, seen: set[int] | None = None) -> Iterator[Command]:
        """Yield every command that contributed to the words, feeds or commands given."""
        seen = set() if seen is None else seen
        for item in items:
            if item is None:
                continue
            if isinstance(item, str):
                if OUTPUT[0] in item:
                    for match in _MARK.finditer(item):
                        if match[2] is not None and int(match[2]) < len(self.outputs):
                            yield from self.origins(self.outputs[int(match[2])], seen=seen)
            elif isinstance(item, Feed):
                yield from self.origins(*item.commands, item.path, seen=seen)
            elif id(item) not in seen:
                seen.add(id(item))
                yield item
                yield from self.origins(*item.argv, item.stdin, seen=seen)


def unmark(word: str) -> str:
    """The word without the marks of what is not known."""
    return _MARK.sub("", word) if "\ue000" in word or "\ue002" in word else word


def unknown_names(word: str) -> list[str]:
    """Names of the variables in a word whose values are not known."""
    return [match[1] for match in _MARK.finditer(word) if match[1] is not None]


# --- parsing ---------------------------------------------------------------------------------------------------

_parser: Any = None
# The grammar's scanner (tree-sitter-bash 0.25) looks characters up in C's table of 256 and reads beyond its end for
# others, up to a crash of the process. What they are does not matter to the screen: a letter stands for each.
_BEYOND = re.compile("[^\x00-\xff\ue000-\ue00f]")


def _tree(text: str) -> Any:
    """Root of the syntax tree, or None where there is an error in it."""
    global _parser
    if _parser is None:
        import tree_sitter_bash
        from tree_sitter import Language, Parser

        _parser = Parser(Language(tree_sitter_bash.language()))
    root = _parser.parse(_BEYOND.sub("\xff", text).encode()).root_node
    return None if root.has_error else root


# Valid Bash that the grammar (tree-sitter-bash 0.25) takes for an error, and a spelling with the same meaning for
# the screen that it reads. Tried only when parsing fails; shfmt then decides whether the original was valid.
_SPELLINGS = (
    (re.compile(r"(\d*)<>"), r"\1>"),
    (re.compile(r"(^|[;&|(]\s*|\b(?:sudo|do|then|else|exec|env)\s+)\{([^\s{};]*,[^\s{};]*)\}"), None),
    (re.compile(r"[@!?*+]\([^()]*\)"), "*"),
    (re.compile(r";;?&"), ";;"),
    (re.compile(r"(?<![\w$])coproc\s+"), " "),
    (re.compile(r"(?<=\s)/(?=\s+\])"), "'/'"),
    (re.compile(r"""(>>?\s*[^\s<>|;&]+)\s+(<<<\s*(?:'[^']*'|"[^"]*"|\S+))"""), r"\2 \1"),
)


def shfmt_path() -> str:
    """Where shfmt is; without it the screen would refuse valid text, so its absence is an error."""
    beside = Path(sys.executable).with_name("shfmt")
    found = str(beside) if beside.exists() else shutil.which("shfmt")
    if found is None:
        raise UserError("The program shfmt is missing.", allowed="shfmt-py of requirements.txt, installed")
    return found


def _valid_bash(text: str) -> bool:
    done = subprocess.run(
        [shfmt_path(), "-ln", "bash"], input=text.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return done.returncode == 0


def parse(text: str) -> Any:
    """Syntax tree of a text.

    Raises
    ------
    Refused
        The text is not Bash.
    """
    root = _tree(text)
    if root is not None:
        return root
    changed = text
    for pattern, spelling in _SPELLINGS:
        if spelling is None:
            again = pattern.sub(lambda match: match[1] + match[2].replace(",", " "), changed)
        else:
            again = pattern.sub(spelling, changed)
        if again != changed:
            changed = again
            root = _tree(changed)
            if root is not None and _valid_bash(_PRIVATE.sub("_", text)):
                return root
    raise Refused("not parsable as Bash")


def read(text: str) -> Reading:
    """Read a text of shell commands.

    Raises
    ------
    Refused
        It can't be parsed, or is longer, deeper or busier than the limits above allow.
    """
    if "\0" in text:
        raise Refused("NUL character")
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"longer than {MAX_CHARACTERS} characters")
    text = _PRIVATE.sub("\ufffd", text).encode("utf-8", "replace").decode()
    walk = _Walk()
    walk.program(parse(text), None)
    walk.finish()
    return walk.reading


# --- walking ---------------------------------------------------------------------------------------------------

_STATEMENTS = frozenset(
    listed(
        "program command redirected_statement list pipeline compound_statement subshell function_definition"
        " if_statement elif_clause else_clause while_statement for_statement c_style_for_statement"
        " case_statement case_item negated_command test_command declaration_command unset_command"
        " variable_assignment variable_assignments do_group"
    )
)
# Conditions of while and until that stay as they are: nothing ends the loop but the disk, the memory or the user.
_ALWAYS = re.compile(
    r":|(?:/usr)?(?:/bin/)?true|1|\(\(\s*1\s*\)\)|\[\[?\s+(?:1|true|x|.{1,9}\s-eq\s.{1,9}|(\S{1,9})\s*==?\s*\1)\s+\]\]?"
    r"|test 1|! ?false|sleep 0|(?:mkdir|echo|printf|dd|touch|cp|head|cat)\b(?!.*\|\s*(?:grep|read|nc)).*"
)
_NEVER = re.compile(r"false|\[\[?\s+(?:0\s+-(?:eq|ne)\s+\d|1\s+-eq\s+[02])?\s*\]\]?|\(\(\s*0\s*\)\)|! ?true|! ?:")
_PLAIN = re.compile(r"[^\\~{}\ue000-\ue00f]*")
_SYSTEM_FOLDER = re.compile(r"(?:/(?:usr/|usr/local/|opt/homebrew/|snap/)?s?bin/|/(?:[^/]+/)*\.\.?/(?:[^/]+/)*s?bin/)")
_PATH = ("/usr/local/bin/", "/usr/bin/", "/bin/", "/usr/local/sbin/", f"{HOME}/bin/", f"{HOME}/.local/bin/")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")


def _is_descriptor(node: Any) -> bool:
    """Whether a number is glued to the redirection after it: the grammar takes it for a word before ``<&``."""
    following = node.next_sibling or (node.parent.next_sibling if node.parent is not None else None)
    return following is not None and following.start_byte == node.end_byte and following.type.endswith("_redirect")


def _glued_descriptor(node: Any) -> str:
    before = node.prev_sibling
    while before is not None and before.child_count:
        before = before.children[-1]
    if before is None or before.end_byte != node.start_byte or not before.text.isdigit():
        return ""
    return before.text.decode()


def _unescape(text: str) -> str:
    return re.sub(r"\\(\n|.)", lambda match: "" if match[1] == "\n" else match[1], text, flags=re.DOTALL)


_ANSI = re.compile(
    r"\\(?:([abeEfnrtv\\'\"?])|x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{1,4})|U([0-9a-fA-F]{1,8})|0?([0-7]{1,3})|c(.))",
    re.DOTALL,
)
_CONTROL = dict(zip("abeEfnrtv\\'\"?", "\a\b\033\033\f\n\r\t\v\\'\"?", strict=True))


def ansi(text: str) -> str:
    """Backslash sequences of ``$'...'``, ``printf`` and ``echo -e``."""

    def one(match: re.Match) -> str:
        if match[1]:
            return _CONTROL[match[1]]
        if match[6]:
            return chr(ord(match[6]) & 0x1F)
        digits, base = (match[5], 8) if match[5] else (match[2] or match[3] or match[4], 16)
        code = int(digits, base)
        return chr(code) if 0 < code < 0xD800 else ""

    return _ANSI.sub(one, text)


def _expand_braces(text: str) -> list[str]:
    """Expand marked braces, outermost first; gives up (returns the text) beyond :data:`MAX_FIELDS`."""
    done: list[str] = []
    todo = [text]
    while todo:
        if len(done) + len(todo) > MAX_FIELDS:
            return [text]
        current = todo.pop()
        start, level, commas, close = -1, 0, [], -1
        for match in re.finditer(f"[{_OPEN}{_COMMA}{_CLOSE}]", current):
            mark, position = match[0], match.start()
            if mark == _OPEN:
                if level == 0:
                    start, commas = position, []
                level += 1
            elif level and mark == _COMMA and level == 1:
                commas.append(position)
            elif level and mark == _CLOSE:
                level -= 1
                if level == 0:
                    if commas:
                        close = position
                        break
                    start = -1
        if close < 0:
            done.append(current)
            continue
        edges = [start, *commas, close]
        parts = [current[a + 1 : b] for a, b in itertools.pairwise(edges)]
        todo.extend(current[:start] + part + current[close + 1 :] for part in reversed(parts))
    return done


class _Walk:
    """The state of an interpreter that only notes."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.variables: dict[str, str | list[str]] = dict(ENVIRONMENT)
        self.functions: dict[str, Any] = {}
        self.called: set[str] = set()
        self.active: list[str] = []
        self.aliases: dict[str, str] = {}
        self.files: dict[str, Feed] = self.reading.files
        self.running: list[str] = []  # scripts written on the way that are being read
        self.arguments: list[str] | None = None
        self.cwd: str | None = None
        self.background = self.piped = False
        self.loop = ""
        self.depth = self.nested_depth = self.steps = 0
        self.wrappers: tuple[str, ...] = ()

    # -- limits

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Refused("too much to follow")

    def finish(self) -> None:
        """Functions that were defined and never called are read as well: they are there to be called later."""
        for name in [name for name in self.functions if name not in self.called]:
            self.call(name, [], None)

    # -- statements

    def program(self, root: Any, stdin: Feed | None) -> Feed:
        return self.body(root.children, stdin)

    def body(self, children: Iterable[Any], stdin: Feed | None) -> Feed:
        """Statements one after another; the outputs join."""
        commands: list[Command] = []
        texts: list[str] | None = []
        children = list(children)
        for position, child in enumerate(children):
            if child.type not in _STATEMENTS:
                continue
            outer = self.background
            if position + 1 < len(children) and children[position + 1].type == "&":
                self.background = True
            feed = self.statement(child, stdin)
            self.background = outer
            commands.extend(feed.commands)
            if texts is not None:
                if feed.text is None:
                    texts = None
                else:
                    texts.append(feed.text)
        return Feed(tuple(commands), None if texts is None else "".join(texts)[:MAX_TEXT])

    def statement(self, node: Any, stdin: Feed | None) -> Feed:
        self.step()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused("nested too deeply")
        try:
            return getattr(self, "do_" + node.type)(node, stdin)
        finally:
            self.depth -= 1

    def do_program(self, node: Any, stdin: Feed | None) -> Feed:
        return self.body(node.children, stdin)

    do_compound_statement = do_program
    do_do_group = do_program
    do_elif_clause = do_program
    do_else_clause = do_program
    do_if_statement = do_program
    do_variable_assignments = do_program

    def do_negated_command(self, node: Any, stdin: Feed | None) -> Feed:
        return self.body(node.children, stdin)

    def do_list(self, node: Any, stdin: Feed | None) -> Feed:
        return self.body(self.unrolled(node), stdin)

    def unrolled(self, node: Any) -> list[Any]:
        """Children of a statement; a && b && c, which leans to the left as deep as it is long, in a row."""
        parts = []
        while node.type == "list":
            parts.extend(reversed(node.children))
            if parts and parts[-1].type == "list":
                node = parts.pop()
            else:
                return parts[::-1]
        return list(node.children)

    def do_subshell(self, node: Any, stdin: Feed | None) -> Feed:
        cwd = self.cwd
        feed = self.body(node.children, stdin)
        self.cwd = cwd
        return feed

    def do_pipeline(self, node: Any, stdin: Feed | None) -> Feed:
        outer, cwd = self.piped, self.cwd
        self.piped = True
        feed, commands = stdin, []
        for child in node.children:
            if child.type in _STATEMENTS:
                feed = self.statement(child, feed)
                commands.extend(feed.commands)
                feed = Feed(tuple(commands), feed.text)
        self.piped, self.cwd = outer, cwd
        return Feed(tuple(commands), feed.text if feed else None)

    def do_function_definition(self, node: Any, stdin: Feed | None) -> Feed:
        name = node.child_by_field_name("name")
        body = node.child_by_field_name("body")
        if name is not None and body is not None:
            self.functions[_unescape(name.text.decode())] = body
            self.called.discard(_unescape(name.text.decode()))
        return Feed((), "")

    def call(self, name: str, arguments: list[str], stdin: Feed | None) -> Feed:
        self.called.add(name)
        outer, self.arguments = self.arguments, arguments
        self.active.append(name)
        try:
            return self.statement(self.functions[name], stdin)
        finally:
            self.active.pop()
            self.arguments = outer

    def looped(self, kind: str, children: Iterable[Any], stdin: Feed | None) -> Feed:
        outer = self.loop
        self.loop = "endless" if "endless" in (kind, outer) else kind
        feed = self.body(children, stdin)
        self.loop = outer
        return Feed(feed.commands, None)

    def do_while_statement(self, node: Any, stdin: Feed | None) -> Feed:
        condition = " ".join(
            child.text.decode() for child in node.children if child.type in _STATEMENTS and child.type != "do_group"
        )
        until = node.children[0].type == "until"
        endless = bool((_NEVER if until else _ALWAYS).fullmatch(condition.strip()))
        kind = "endless" if endless else "loop"
        text = stdin.text if stdin is not None else None
        if text and not until and re.match(r"(?:IFS=\S*\s+)?read\b", condition) and 1 < text.count("\n") <= 8:
            commands: list[Command] = []
            for line in text.strip("\n").split("\n"):
                commands.extend(self.looped(kind, node.children, Feed(stdin.commands, line + "\n")).commands)
            return Feed(tuple(commands), None)
        return self.looped(kind, node.children, stdin)

    def do_c_style_for_statement(self, node: Any, stdin: Feed | None) -> Feed:
        head = node.text[:200].decode("utf-8", "replace")
        self.substitutions(node)
        numbers = [int(number) for number in re.findall(r"<=?\s*(\d{1,9})\b", head)]
        endless = bool(re.match(r"for\s*\(\(\s*[^;]*;\s*(1\s*|true\s*)?;", head)) or any(n > 5000 for n in numbers)
        return self.looped("endless" if endless else "loop", node.children, stdin)

    def do_for_statement(self, node: Any, stdin: Feed | None) -> Feed:
        name = node.child_by_field_name("variable")
        values: list[str] = []
        seen_in = many = False
        for child in node.children:
            if child.type == "in":
                seen_in = True
            elif child.type == "do_group":
                break
            elif seen_in and child.is_named:
                values.extend(self.fields(child))
                many = many or _many(child.text[:200].decode("utf-8", "replace"))
        body = [child for child in node.children if child.type in _STATEMENTS]
        if node.children[0].type == "select" or not seen_in:
            values = [f"{UNKNOWN[0]}{name.text.decode() if name else ''}{UNKNOWN[1]}"]
        commands: list[Command] = []
        for value in values[:6] or [""]:
            if name is not None:
                self.variables[name.text.decode()] = value
            commands.extend(self.looped("endless" if many else "loop", body, stdin).commands)
        return Feed(tuple(commands), None)

    def do_case_statement(self, node: Any, stdin: Feed | None) -> Feed:
        for child in node.children:
            if child.is_named and child.type != "case_item":
                self.fields(child)
        return Feed(self.body(node.children, stdin).commands, None)

    def do_case_item(self, node: Any, stdin: Feed | None) -> Feed:
        return self.body(node.children, stdin)

    def do_test_command(self, node: Any, stdin: Feed | None) -> Feed:
        self.substitutions(node)
        return Feed((), "")

    def substitutions(self, node: Any) -> None:
        """Note the substitutions anywhere below an expression."""
        todo = [node]
        while todo:
            current = todo.pop()
            self.step()
            for child in current.children:
                if child.type in ("command_substitution", "process_substitution"):
                    self.substitute(child)
                elif child.type not in _STATEMENTS or child.type == "test_command":
                    todo.append(child)

    def do_variable_assignment(self, node: Any, stdin: Feed | None) -> Feed:
        name, value = self.assign(node)
        feed = self.note([":"], [], stdin, {name: value})
        if self.loop == "endless" and feed.commands and _grows(name, node.text.decode()):
            feed.commands[0].grows = name
        return feed

    def assign(self, node: Any) -> tuple[str, str]:
        self.step()
        name_node, value_node = node.child_by_field_name("name"), node.child_by_field_name("value")
        name = name_node.text.decode() if name_node is not None else ""
        name, _, subscript = name.partition("[")
        if value_node is None:
            value: str | list[str] = ""
        elif value_node.type == "array":
            value = [word for child in value_node.named_children for word in self.fields(child)]
        else:
            value = self.text(value_node)
        if subscript:
            before = self.variables.get(name)
            value = (before if isinstance(before, list) else []) + ([value] if isinstance(value, str) else value)
        elif b"+=" in node.text[: len(name) + 3]:
            before = self.variables.get(name, "" if isinstance(value, str) else [])
            if isinstance(before, str) and isinstance(value, str):
                value = before + value
            else:
                value = ([before] if isinstance(before, str) else before) + (
                    [value] if isinstance(value, str) else value
                )
        if isinstance(value, list):
            value = value[:MAX_FIELDS]
        elif len(value) > MAX_TEXT:
            raise Refused("a variable grows too long")
        self.variables[name] = value
        return name, value if isinstance(value, str) else " ".join(value)

    def do_declaration_command(self, node: Any, stdin: Feed | None) -> Feed:
        words = [node.children[0].text.decode()]
        assignments = {}
        longer = ""
        for child in node.children[1:]:
            if child.type == "variable_assignment":
                name, value = self.assign(child)
                assignments[name] = value
                words.append(f"{name}={value}")
                if self.loop == "endless" and _grows(name, child.text.decode()):
                    longer = name
            elif child.is_named:
                words.extend(self.fields(child))
        feed = self.note(words, [], stdin, assignments)
        if feed.commands:
            feed.commands[0].grows = longer
        return feed

    def do_unset_command(self, node: Any, stdin: Feed | None) -> Feed:
        words = [node.children[0].text.decode()]
        for child in node.children[1:]:
            if child.is_named:
                words.extend(self.fields(child))
        return self.note(words, [], stdin, {})

    def do_redirected_statement(self, node: Any, stdin: Feed | None) -> Feed:
        redirects: list[Redirect] = []
        extra: list[str] = []
        pipelines: list[Any] = []
        piped, before = self.piped, []
        body = next((child for child in node.children if child.type in _STATEMENTS), None)
        # The grammar hangs a redirection on the whole of "a && b > f" and "a | b > f": it is the last command's.
        while body is not None and body.type in ("list", "pipeline", "negated_command"):
            *parts, last = [child for child in self.unrolled(body) if child.type in _STATEMENTS]
            if body.type == "pipeline":
                self.piped = True
                fed: list[Command] = []
                for part in parts:
                    stdin = self.statement(part, stdin)
                    fed.extend(stdin.commands)
                    stdin = Feed(tuple(fed), stdin.text)
                before.extend(fed)
            else:
                for part in parts:
                    before.extend(self.statement(part, stdin).commands)
            body = last
        for child in node.children:
            if child.is_named and child.type not in _STATEMENTS:
                stdin = self.redirect(child, redirects, extra, stdin, pipelines)
        if body is None:
            feed = self.note(extra or [":"], redirects, stdin, {}) if redirects or extra else Feed((), "")
        elif body.type == "command":
            feed = self.command(body, stdin, redirects, extra)
        else:
            for redirect in redirects:
                if "/dev/tcp/" in redirect.target or "/dev/udp/" in redirect.target:
                    self.reading.sockets = True
            feed = self.statement(body, stdin)
            if redirects:
                # The group's redirections concern each command in it; they are noted once, with the group's output.
                self.note([":", *extra], redirects, Feed(feed.commands, feed.text), {})
                self.remember(redirects, feed)
        self.piped = piped
        if before:
            feed = Feed((*before, *feed.commands), feed.text)
        for pipeline in pipelines:
            feed = self.continued(pipeline, feed)
        return feed

    def continued(self, node: Any, feed: Feed) -> Feed:
        """``cat <<EOF | sh``: the grammar hangs what follows below the here-document."""
        if node.type == "pipeline":
            outer, self.piped = self.piped, True
            commands = list(feed.commands)
            for child in node.children:
                if child.type in _STATEMENTS:
                    feed = self.statement(child, Feed(tuple(commands), feed.text))
                    commands.extend(feed.commands)
            self.piped = outer
            return Feed(tuple(commands), feed.text)
        return self.body([node], None)

    def redirect(
        self, node: Any, redirects: list[Redirect], extra: list[str], stdin: Feed | None, pipelines: list[Any]
    ) -> Feed | None:
        """Note one redirection; returns what stands at the standard input afterwards."""
        if node.type == "heredoc_redirect":
            start = body = None
            for child in node.children:
                if child.type == "heredoc_start":
                    start = child.text.decode()
                elif child.type == "heredoc_body":
                    body = child
                elif child.type in _STATEMENTS:
                    pipelines.append(child)
                elif child.is_named and child.type in ("file_redirect", "herestring_redirect"):
                    stdin = self.redirect(child, redirects, extra, stdin, pipelines)
                elif child.is_named and child.type not in ("heredoc_end", "file_descriptor"):
                    extra.extend(self.fields(child))
            if body is None:
                return Feed((), "")
            if start and start[0] in "'\"\\":
                return Feed((), body.text.decode())
            return Feed((), self.double_quoted(body, 0))
        if node.type == "herestring_redirect":
            words = [child for child in node.named_children if child.type != "file_descriptor"]
            text = "".join(self.text(child) for child in words[:1])
            for child in words[1:]:
                extra.extend(self.fields(child))
            return Feed(tuple(self.reading.origins(text)), text + "\n")
        operator, descriptor, targets = ">", "", []
        for child in node.children:
            if child.type == "file_descriptor":
                descriptor = child.text.decode()
            elif not child.is_named:
                operator = child.type
            else:
                targets.append(child)
        if not targets:
            return stdin
        words = self.fields(targets[0])
        target = words[0] if words else ""
        # Words after the target are the command's; a number glued to the next redirection is its descriptor.
        for child in targets[1:]:
            following = node.next_sibling
            if child.type == "number" and following is not None and following.start_byte == child.end_byte:
                continue
            extra.extend(self.fields(child))
        varies = self.loop == "endless" and b"$" in node.text
        redirects.append(Redirect(operator, descriptor or _glued_descriptor(node), target, varies))
        if "/dev/tcp/" in target or "/dev/udp/" in target:
            self.reading.sockets = True
        if operator.startswith("<") and descriptor in ("", "0"):
            if operator == "<&":
                return Feed((), None, f"&{target}")
            known = self.files.get(self.absolute(target))
            feeds = tuple(self.reading.origins(target))
            if known is not None:
                return Feed(known.commands + feeds, known.text, target)
            return Feed(feeds, None, target)
        return stdin

    def remember(self, redirects: list[Redirect], feed: Feed) -> None:
        """What a file holds after ``> file``."""
        for redirect in redirects:
            if redirect.operator in (">", ">>", ">|", "&>", "&>>", ">&") and redirect.descriptor in ("", "1"):
                self.store(redirect.target, feed, redirect.operator.endswith(">>"))

    def store(self, path: str, feed: Feed, append: bool = False) -> None:
        if not path or (path.startswith("/dev/") and not path.startswith("/dev/shm/")):
            return
        path = self.absolute(path)
        before = self.files.get(path)
        if append and before is not None:
            text = None if before.text is None or feed.text is None else (before.text + feed.text)[:MAX_TEXT]
            feed = Feed(before.commands + feed.commands, text)
        self.files[path] = feed

    def absolute(self, path: str) -> str:
        """The path as one key: joined to the working directory where that is known, and tidied."""
        if not path.startswith("/") and self.cwd:
            path = self.cwd + "/" + path
        return posixpath.normpath(path) if path else path

    # -- words

    def text(self, node: Any) -> str:
        """Value of a word without splitting, as in an assignment."""
        pieces = self.pieces(node)
        return "".join(text for _, text in pieces)

    def fields(self, node: Any) -> list[str]:
        """The words that one word of the source becomes."""
        if node.type == "word" or node.type == "number":
            text = node.text.decode()
            if _PLAIN.fullmatch(text):
                self.step()
                return [text]
        pieces = self.pieces(node)
        if not any(kind == "E" or (kind == "L" and "{" in text) for kind, text in pieces):
            return ["".join(text for _, text in pieces)]
        separators = self.variables.get("IFS", " \t\n")
        separators = separators if isinstance(separators, str) else " \t\n"
        marked, braces = [], False
        for kind, text in pieces:
            if kind == "L" and ("{" in text or "," in text or "}" in text):
                braces = True
                text = text.replace("{", _OPEN).replace(",", _COMMA).replace("}", _CLOSE)
            elif kind == "E" and separators and text:
                text = re.sub(f"[{re.escape(separators)}]+", _SPLIT, text)
            marked.append(text)
        joined = "".join(marked)
        expanded = _expand_braces(joined) if braces and _OPEN in joined else [joined]
        quoted = any(kind == "Q" for kind, _ in pieces)
        words = []
        for word in expanded:
            word = word.replace(_OPEN, "{").replace(_COMMA, ",").replace(_CLOSE, "}")
            parts = word.split(_SPLIT)
            words.extend(part for part in parts if part or (quoted and len(parts) == 1))
        if len(words) > MAX_FIELDS:
            self.steps += len(words)
        return words

    def pieces(self, node: Any) -> list[tuple[str, str]]:
        """(kind, text) of each part: L literal, Q quoted, E the value of an unquoted expansion."""
        self.step()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused("nested too deeply")
        try:
            kind = node.type
            if kind in listed("word number variable_name test_operator regex extglob_pattern special_variable_name"):
                text = node.text.decode()
                if text.startswith("~"):
                    text = _tilde(text)
                if "\\" in text:
                    parts = re.split(r"(\\(?:\n|.))", text, flags=re.DOTALL)
                    return [
                        ("Q", "" if part[1] == "\n" else part[1]) if part[0] == "\\" and len(part) > 1 else ("L", part)
                        for part in parts
                        if part
                    ]
                # extglob and regex nodes may contain expansions
                if kind in ("regex", "extglob_pattern") and node.child_count:
                    self.substitutions(node)
                return [("L", text)]
            if kind == "raw_string":
                return [("Q", node.text.decode()[1:-1])]
            if kind == "ansi_c_string":
                return [("Q", ansi(node.text.decode()[2:-1]))]
            if kind in ("string", "translated_string"):
                if kind == "translated_string":
                    node = node.named_children[0] if node.named_children else node
                return [("Q", self.double_quoted(node, 1))]
            if kind == "simple_expansion":
                return [("E", self.variable(node.text.decode()[1:]))]
            if kind == "expansion":
                return [("E", self.expansion(node))]
            if kind in ("command_substitution", "process_substitution"):
                return [("E" if kind == "command_substitution" else "Q", self.substitute(node))]
            if kind == "arithmetic_expansion":
                before = len(self.reading.outputs)
                self.substitutions(node)
                value = self.arithmetic(node.text.decode())
                if len(self.reading.outputs) > before and UNKNOWN[0] in value:
                    value = f"{OUTPUT[0]}{before}{OUTPUT[1]}"
                return [("Q", value)]
            if kind == "brace_expression":
                numbers = [child.text.decode() for child in node.named_children]
                return [("L", "{" + ",".join(_sequence(numbers)) + "}")]
            if kind == "concatenation":
                pieces = []
                for child in node.children:
                    if child.is_named or child.type not in ("``",):
                        pieces.extend(self.pieces(child) if child.is_named else [("L", child.text.decode())])
                if pieces and pieces[0][0] == "L" and pieces[0][1] == "~" and len(pieces) > 1:
                    pieces[0] = ("L", HOME)
                return pieces
            if kind == "array":
                return [("L", " ".join(word for child in node.named_children for word in self.fields(child)))]
            if kind in _STATEMENTS:
                self.statement(node, None)
                return [("L", "")]
            if node.child_count:
                self.substitutions(node)
            return [("L", node.text.decode())]
        finally:
            self.depth -= 1

    def double_quoted(self, node: Any, trim: int) -> str:
        """Text between double quotes, or of a here-document: literal stretches and expansions."""
        source = node.text
        start, end = node.start_byte, node.end_byte - trim
        at, out = start + trim, []
        for child in node.children:
            if child.type in ("simple_expansion", "expansion", "command_substitution", "arithmetic_expansion"):
                out.append(_dequote(source[at - start : child.start_byte - start].decode("utf-8", "replace")))
                out.extend(text for _, text in self.pieces(child))
                at = child.end_byte
        out.append(_dequote(source[at - start : end - start].decode("utf-8", "replace")))
        return "".join(out)

    def variable(self, name: str) -> str:
        """Value of a variable or parameter, or the mark that says it is not known."""
        if name in self.variables:
            value = self.variables[name]
            if isinstance(value, list):
                return value[0] if value else ""
            return value
        if name in ("@", "*"):
            return " ".join(self.arguments) if self.arguments else ""
        if name == "#":
            return str(len(self.arguments or []))
        if name.isdigit():
            if name == "0":
                return "bash" if not self.active else self.active[-1]
            if self.arguments is not None:
                position = int(name) - 1
                return self.arguments[position] if position < len(self.arguments) and len(name) < 6 else ""
        if name == "?":
            return "0"
        if name == "PWD":
            return self.cwd or "."
        return f"{UNKNOWN[0]}{name}{UNKNOWN[1]}"

    def expansion(self, node: Any) -> str:
        """``${...}``."""
        source = node.text.decode()[2:-1]
        match = re.match(r"([!#]?)([A-Za-z_]\w*|[0-9]+|[@*#?$!-])(\[[^\]]*\])?", source)
        if match is None:
            self.substitutions(node)
            return f"{UNKNOWN[0]}{UNKNOWN[1]}"
        prefix, name, subscript = match[1], match[2], match[3]
        rest = source[match.end() :]
        raw = self.variables.get(name)
        if isinstance(raw, list):
            if subscript in ("[@]", "[*]") or (subscript is None and name in ("@", "*")):
                if rest.startswith(":"):
                    bounds = re.match(r":\s*(\d+)(?::(\d+))?", rest)
                    if bounds:
                        first = int(bounds[1])
                        raw = raw[first : first + int(bounds[2])] if bounds[2] else raw[first:]
                        rest = ""
                value = " ".join(raw)
            elif subscript and subscript[1:-1].lstrip("-").isdigit() and len(subscript) < 9:
                position = int(subscript[1:-1])
                value = raw[position] if -len(raw) <= position < len(raw) else ""
            else:
                value = raw[0] if raw else ""
        else:
            value = self.variable(name)
        if prefix == "!":
            value = self.variable(value) if value in self.variables else value
        elif prefix == "#":
            return str(len(value)) if not _MARK.search(value) else "1"
        if not rest:
            return value
        unknown = bool(_MARK.fullmatch(value)) and name not in self.variables
        operator = re.match(r":?[-=+?]|##?|%%?|//?[#%]?|:|\^\^?|,,?|@", rest)
        operator = operator[0] if operator else ""
        argument = self.argument(node, operator)
        if operator in (":-", "-", ":=", "="):
            if not (unknown or value == ""):
                return value
            if operator.endswith("="):
                self.variables[name] = argument
            return argument
        if operator in (":+", "+"):
            return argument if not unknown else f"{UNKNOWN[0]}{name}{UNKNOWN[1]}"
        if unknown and operator in (":?", "?"):
            return f"{UNKNOWN[0]}{name}?{UNKNOWN[1]}"  # never empty
        if unknown or len(value) > 4096:
            return value
        if operator in ("#", "##", "%", "%%"):
            return _strip_pattern(value, argument, operator)
        if operator and operator[0] == "/":
            pattern, _, replacement = rest[len(operator) :].partition("/")
            pattern = self.loose(pattern)
            try:
                compiled = re.compile(_glob_regex(pattern))
                if not pattern:
                    return value
                return compiled.sub(
                    lambda _: self.loose(replacement), value, count=0 if operator.startswith("//") else 1
                )
            except re.error:
                return value
        if operator == ":":
            bounds = re.match(r":\s*\(?(-?\d{1,6})\)?(?::\s*(-?\d{1,6}))?", self.loose(rest))
            if bounds:
                first = int(bounds[1])
                cut = value[first:] if bounds[2] is None else value[first:][: int(bounds[2])]
                return cut
            return value
        if operator.startswith("^"):
            return value.upper() if operator == "^^" else value[:1].upper() + value[1:]
        if operator.startswith(","):
            return value.lower() if operator == ",," else value[:1].lower() + value[1:]
        if operator == "@":
            return ansi(value) if rest.startswith("@E") else value
        return value

    def loose(self, text: str) -> str:
        """A pattern or offset inside ``${...}``: quotes dropped, plain variables replaced."""
        text = re.sub(r"\$\{?(\w+)\}?", lambda match: self.variable(match[1]), text)
        return _unescape(text.replace('"', "").replace("'", ""))

    def argument(self, node: Any, operator: str) -> str:
        """What stands after the operator of ``${name<operator>argument}``."""
        out, after = [], False
        for child in node.children:
            if after and child.type != "}":
                out.extend(text for _, text in self.pieces(child)) if child.is_named else out.append(
                    child.text.decode()
                )
            elif child.type == operator or (not child.is_named and operator and child.text.decode() == operator):
                after = True
            elif child.is_named and child.type not in ("variable_name", "subscript", "special_variable_name"):
                self.substitutions(child) if child.child_count else None
        return "".join(out)

    def arithmetic(self, source: str) -> str:
        source = re.sub(r"^\$(\(\(|\[)|(\)\)|\])$", "", source).strip()
        if re.fullmatch(r"[0-9]{1,9}", source):
            return source
        small = re.fullmatch(r"([0-9]{1,9})\s*([-+*])\s*([0-9]{1,9})", source)
        if small:
            a, b = int(small[1]), int(small[3])
            return str(a + b if small[2] == "+" else a - b if small[2] == "-" else a * b)
        return f"{UNKNOWN[0]}{UNKNOWN[1]}"

    def substitute(self, node: Any) -> str:
        """``$(...)``, backquotes, ``<(...)``: the text where it is known, else a mark."""
        cwd, loop, piped, background = self.cwd, self.loop, self.piped, self.background
        self.piped = self.background = False
        inside = node.children
        if inside and inside[0].type == "`" and b"\\" in node.text:
            # Inside backquotes a backslash before a backquote, dollar or backslash belongs to the quoting.
            inner = re.sub(r"\\([`$\\])", r"\1", node.text.decode()[1:-1])
            feed = self.nested(inner, None)
        else:
            redirects: list[Redirect] = []
            source = None
            for child in inside:
                if child.type == "file_redirect":  # $(< file)
                    source = self.redirect(child, redirects, [], source, [])
            feed = self.body(inside, None)
            if redirects and not feed.commands:
                noted = self.note(["cat"], redirects, source, {})
                feed = Feed(noted.commands, source.text if source else None)
        self.cwd, self.loop, self.piped, self.background = cwd, loop, piped, background
        if node.type == "command_substitution" and feed.text is not None:
            self.reading.substituted.append(feed)
            return feed.text.rstrip("\n")
        self.reading.outputs.append(feed)
        prefix = "/dev/fd/" if node.type == "process_substitution" else ""
        return f"{prefix}{OUTPUT[0]}{len(self.reading.outputs) - 1}{OUTPUT[1]}"

    # -- commands

    def do_command(self, node: Any, stdin: Feed | None) -> Feed:
        return self.command(node, stdin, [], [])

    def command(self, node: Any, stdin: Feed | None, redirects: list[Redirect], extra: list[str]) -> Feed:
        words: list[str] = []
        assignments: dict[str, str] = {}
        for child in node.children:
            kind = child.type
            if kind == "command_name":
                for inner in child.children:
                    words.extend(self.array_fields(inner))
            elif kind == "variable_assignment":
                name, value = self.assign(child)
                assignments[name] = value
            elif kind.endswith("_redirect"):
                stdin = self.redirect(child, redirects, extra, stdin, [])
            elif child.is_named:
                if child.text.isdigit() and _is_descriptor(child):
                    continue
                words.extend(self.array_fields(child))
            elif child.type not in ("$",):
                words.append(child.text.decode())
        if len(words) > MAX_FIELDS * 4:
            raise Refused("too many words")
        return self.note(words + extra, redirects, stdin, assignments)

    def array_fields(self, node: Any) -> list[str]:
        """``"${a[@]}"`` and ``"$@"`` keep their words apart."""
        if node.type == "string":
            source = node.text.decode()
            whole = re.fullmatch(r'"\$\{(\w+)\[@\]\}"', source)
            if whole and isinstance(self.variables.get(whole[1]), list):
                return list(self.variables[whole[1]])
            if source in ('"$@"', '"${@}"') and self.arguments is not None:
                return list(self.arguments)
        return self.fields(node)

    def note(
        self, words: list[str], redirects: list[Redirect], stdin: Feed | None, assignments: dict[str, str]
    ) -> Feed:
        """Note a command with its words, then whatever it starts; returns its output."""
        feed = self.start(words or [":"], redirects, stdin, self.wrappers, assignments)
        if redirects:
            self.remember(redirects, feed)
            if any(r.operator in (">", ">>", ">|", "&>", "&>>") and r.descriptor in ("", "1") for r in redirects):
                feed = Feed(feed.commands, "")
        return feed

    def start(
        self,
        argv: list[str],
        redirects: list[Redirect],
        stdin: Feed | None,
        wrappers: tuple[str, ...],
        assignments: dict[str, str],
    ) -> Feed:
        self.step()
        while argv and argv[0] == "":
            argv = argv[1:]
        if not argv:
            argv = [":"]
        names = program_names(argv[0])
        first = None
        for name in names:
            command = Command(name, argv, redirects, stdin, wrappers, self.cwd, self.background, self.piped, self.loop)
            command.assignments = assignments
            command.reading = self.reading
            self.reading.commands.append(command)
            if len(self.reading.commands) > MAX_COMMANDS:
                raise Refused("too many commands")
            first = first or command
        assert first is not None
        if len(wrappers) > 24:
            raise Refused("too many wrappers")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused("nested too deeply")
        outer, self.wrappers = self.wrappers, wrappers
        try:
            feeds = [self.follow(command) for command in self.reading.commands[-len(names) :]]
        finally:
            self.wrappers = outer
            self.depth -= 1
        commands = tuple(command for feed in feeds for command in feed.commands)
        return Feed(commands, feeds[0].text)

    def follow(self, command: Command) -> Feed:
        """What starting a command leads to: other commands, a changed state, an output."""
        name, argv = command.name, command.argv
        if name in self.functions:
            if name in self.active:
                command.recursive = True
                return Feed((command,), None)
            if len(self.active) < 8:
                inner = self.call(name, argv[1:], command.stdin)
                return Feed((command, *inner.commands), inner.text)
        if name in self.aliases and name not in self.active:
            self.active.append(name)
            inner = self.nested(" ".join([self.aliases[name], *map(quote, argv[1:])]), command.stdin)
            self.active.pop()
            return Feed((command, *inner.commands), inner.text)
        if name not in _BUILTINS and command.assignments and not STARTING_VARIABLES.isdisjoint(command.assignments):
            for variable in STARTING_VARIABLES.intersection(command.assignments):
                self.try_nested(command.assignments[variable], None, name)
        known = None
        if self.files:
            folders = ("",) if "/" in argv[0] else _PATH
            known = next((self.files[folder + argv[0]] for folder in folders if folder + argv[0] in self.files), None)
            known = known or (self.files.get(self.absolute(argv[0])) if "/" in argv[0] else None)
        if known is not None:
            command.script = known
            if known.text is not None:
                return Feed((command, *self.run_file(command, argv[0], known.text, argv[1:]).commands), None)
            return Feed((command,), None)
        special = _BUILTINS.get(name)
        if special is not None:
            return special(self, command)
        if "/" in name:
            base = posixpath.basename(name)
            if base in SHELLS or base in _COPIED or _INTERPRETER.fullmatch(base):
                command.name = name = base  # a copy elsewhere, as set-uid programs are
        if name in SHELLS:
            return self.shell(command)
        if name in INTERPRETERS or name.startswith(("python", "perl", "pypy", "ruby", "php", "lua", "node")):
            return self.interpreter(command)
        inner = self.unwrap(command)
        if inner is not None:
            return inner
        self.downloads(command)
        return Feed((command,), output(command, self))

    def run_file(self, command: Command, path: str, text: str, arguments: list[str]) -> Feed:
        """A script that was written before: its text, unless it is being read already."""
        key = self.absolute(path)
        if key in self.running:
            command.recursive = True
            return Feed((), None)
        self.running.append(key)
        self.active.append(path)
        try:
            if text.startswith("#!") and not re.match(r"#!\s*\S*\b(?:env\s+)?\w*sh\b", text):
                command.code = text
                commands: list[Command] = []
                for inner in [*shell_strings(text)]:
                    commands.extend(self.try_nested(inner, None, command.name).commands)
                return Feed(tuple(commands), None)
            return self.as_wrapper(command, text, arguments, named=path)
        finally:
            self.running.pop()
            self.active.pop()

    def inside(
        self, command: Command, argv: list[str], assignments: dict[str, str] | None = None, label: str = ""
    ) -> Feed:
        """Start the command inside a wrapper."""
        if not argv:
            return Feed((command,), None)
        wrappers = (*command.wrappers, label or command.name)
        feed = self.start(argv, command.redirects, command.stdin, wrappers, assignments or {})
        return Feed((command, *feed.commands), feed.text)

    def nested(self, text: str, stdin: Feed | None, wrapper: str = "", arguments: list[str] | None = None) -> Feed:
        """Read text that a shell would read."""
        if not text.strip():
            return Feed((), "")
        if self.nested_depth >= MAX_NESTED:
            raise Refused("texts nested too deeply")
        if _MARK.fullmatch(text.strip()):
            return Feed((), None)
        self.nested_depth += 1
        before, self.wrappers = self.wrappers, (*self.wrappers, wrapper) if wrapper else self.wrappers
        outer = self.arguments
        if arguments is not None:
            self.arguments = arguments
        try:
            return self.program(parse(text), stdin)
        finally:
            self.nested_depth -= 1
            self.wrappers, self.arguments = before, outer

    def carried(self, command: Command) -> None:
        """Files that come from another machine through scp, rsync, aws s3 cp and their kin."""
        name, feed = command.name, Feed((command,), None)
        words = command.operands
        text = " ".join(command.argv[1:])
        if name in ("tftp", "smbclient", "ftp", "lftp", "sftp"):
            text += " " + ((command.stdin.text or "") if command.stdin else "")
            for match in re.finditer(
                r"(?:\b(?:get|pget|mget)|\s-r)\s+(?:-o\s+)?([\w./~*-]+)(?:[ \t]+([\w./-]+))?", text
            ):
                self.store(posixpath.basename(match[1]), feed)
                if match[2]:
                    self.store(match[2], feed)
        far = re.compile(r"(?:[\w.-]+@)?[\w.-]+:(?!\\)|(?:s3|gs|rsync|az|https?|ftp)://")
        if len(words) > 1 and any(far.match(word) for word in words[:-1]) and not far.match(words[-1]):
            for word in words[:-1]:
                if far.match(word):
                    self.store(words[-1], feed)
                    self.store(posixpath.join(words[-1], re.split(r"[/:]", word)[-1]), feed)
        if name == "axel":
            for target in command.value("-o", "--output"):
                self.store(target, feed)

    def shell(self, command: Command) -> Feed:
        """A shell: the text of -c, the script, or what stands at its standard input."""
        argv = command.argv
        position = 1
        text: str | None = None
        reads_stdin = False
        while position < len(argv):
            word = argv[position]
            if word in ("-o", "+o", "-O", "+O", "--rcfile", "--init-file"):
                position += 2
                continue
            if word in ("-", "--"):
                position += 1
                break
            if word.startswith("--") or (word[:1] in "-+" and len(word) > 1):
                if not word.startswith("--") and "c" in word[1:] and word[0] == "-":
                    rest = [w for w in argv[position + 1 :]]
                    while rest and rest[0] in ("-e", "-x", "-u", "-l", "-i", "--"):
                        rest.pop(0)
                    text = rest[0] if rest else ""
                    command.code = text
                    inner = self.as_wrapper(command, text, rest[2:], named=rest[1] if len(rest) > 1 else "")
                    return Feed((command, *inner.commands), inner.text)
                if word[0] == "-" and word[1] != "-" and "n" in word:  # only checks the syntax
                    return Feed((command,), "")
                if not word.startswith("--") and "s" in word[1:]:
                    reads_stdin = True
                position += 1
                continue
            break
        rest = argv[position:]
        if rest and not reads_stdin:
            if OUTPUT[0] in rest[0]:
                command.script = Feed(tuple(self.reading.origins(rest[0])), self.known_text(rest[0]))
            elif rest[0] in ("/dev/stdin", "/proc/self/fd/0", "/dev/fd/0"):
                reads_stdin = True
            else:
                command.script = self.files.get(self.absolute(rest[0])) or Feed((), None, rest[0])
            if not reads_stdin:
                text = command.script.text if command.script else None
                if text is not None:
                    inner = self.run_file(command, rest[0], text, rest[1:])
                    return Feed((command, *inner.commands), inner.text)
                return Feed((command,), None)
        if command.stdin is not None:
            command.script = command.stdin
            if command.stdin.text is not None:
                command.code = command.stdin.text
                inner = self.as_wrapper(command, command.stdin.text, rest[1:], stdin=None)
                return Feed((command, *inner.commands), inner.text)
        return Feed((command,), None)

    def as_wrapper(self, command: Command, text: str, arguments: list[str], stdin: Any = ..., named: str = "") -> Feed:
        before, self.wrappers = self.wrappers, (*command.wrappers, command.name)
        outer = self.active
        # $0 inside sh -c is the shell itself, inside a script the script.
        self.active = [*outer, named or command.name] if command.name not in self.functions else outer
        try:
            feed = self.nested(text, command.stdin if stdin is ... else stdin, arguments=arguments)
        finally:
            self.wrappers, self.active = before, outer
        if command.redirects:
            for inner in feed.commands:
                if inner.stdin is None and not inner.redirects:
                    inner.redirects = command.redirects
        return feed

    def known_text(self, word: str) -> str | None:
        match = re.fullmatch(f"/dev/fd/{OUTPUT[0]}([0-9]+){OUTPUT[1]}", word)
        return self.reading.outputs[int(match[1])].text if match else None

    def interpreter(self, command: Command) -> Feed:
        """python -c, perl -e and so on: the code, and the shell text that it hands to a shell."""
        code: list[str] = []
        argv = command.argv
        position, script = 1, None
        bare = re.sub(r"[0-9.]+$", "", command.name)
        letters = {"python": "c", "pypy": "c", "php": "rB", "perl": "eE", "osascript": "e"}.get(bare, "epc")
        while position < len(argv):
            word = argv[position]
            if word in ("--eval", "--execute", "--print", "eval", "--run") and position + 1 < len(argv):
                code.append(argv[position + 1])
                position += 2
            elif word.startswith("-") and len(word) > 1 and not word.startswith("--"):
                cut = min((word.find(letter, 1) for letter in letters if letter in word[1:]), default=-1)
                if bare in ("python", "pypy") and word.startswith("-m"):
                    script = "-m"
                    break
                if cut > 0 and (bare not in ("perl", "ruby") or not word.startswith(("-M", "-I", "-r"))):
                    if word[cut + 1 :]:
                        code.append(word[cut + 1 :])
                        position += 1
                    else:
                        code.extend(argv[position + 1 : position + 2])
                        position += 2
                    if bare in ("python", "pypy", "php"):
                        break
                else:
                    position += 1
            elif word == "-":
                position += 1
                break
            elif word.startswith("--"):
                position += 1
            else:
                if not code:
                    script = word
                break
        if script is None and not code and command.stdin is not None:
            command.script = command.stdin
            if command.stdin.text is not None:
                code.append(command.stdin.text)
        elif script is not None and script != "-m" and not code:
            if OUTPUT[0] in script:
                command.script = Feed(tuple(self.reading.origins(script)), self.known_text(script))
            else:
                command.script = self.files.get(self.absolute(script)) or Feed((), None, script)
            if command.script.text is not None:
                code.append(command.script.text)
        commands = [command]
        if code:
            command.code = "\n".join(code)
            for path in fetched_files(command.code):
                self.store(path, Feed((command,), None))
            texts = shell_strings(command.code)
            if bare == "tclsh":
                texts = [text for _, what in started(bare, argv, command.code, None) for text in what]
            for text in texts:
                commands.extend(self.try_nested(text, None, command.name).commands)
            self.file_calls(command)
        return Feed(tuple(commands), output(command, self))

    def file_calls(self, command: Command) -> None:
        """What a piece of code does to files through its language's own functions, as the commands that do the same."""
        for words, target in file_commands(command.code or ""):
            if len(self.reading.commands) < MAX_COMMANDS - 8:
                redirects = [Redirect(target[0], "", target[1])] if target else []
                self.start(words, redirects, None, (*command.wrappers, command.name), {})

    def try_nested(self, text: str, stdin: Feed | None, wrapper: str) -> Feed:
        """Like :meth:`nested` for text that may not be shell at all: then nothing is noted."""
        try:
            return self.nested(text, stdin, wrapper)
        except Refused as refused:
            if "parsable" in str(refused):
                return Feed((), None)
            raise

    def unwrap(self, command: Command) -> Feed | None:
        """Start what a wrapper starts; None for programs that start nothing."""
        name, argv = command.name, command.argv
        if name in _PREFIXES:
            skip, valued = _PREFIXES[name]
            rest, assignments = _after_options(argv[1:], valued, name), {}
            rest = rest[skip:]
            if name in ("sudo", "doas", "env", "pkexec", "time"):
                while rest and _ASSIGNMENT.match(rest[0]):
                    key, _, value = rest[0].partition("=")
                    assignments[key] = value
                    rest = rest[1:]
                if assignments:
                    command.assignments = {**command.assignments, **assignments}
            if name == "env":
                for text in command.value("-S", "--split-string"):
                    inner = self.nested(text, command.stdin, name)
                    return Feed((command, *inner.commands), inner.text)
            if name == "flock" and argv[1:] and "-c" in argv:
                return self.shell_text(command, command.value("-c", "--command"))
            return self.inside(command, rest, assignments)
        special = _WRAPPERS.get(name)
        if special is not None:
            return special(self, command)
        return self.starter(command) if name in STARTERS else None

    def starter(self, command: Command) -> Feed:
        """What a program of the table in :mod:`scripts.dataset.starters` starts."""
        name, argv = command.name, command.argv
        path = script_of(name, argv)
        known = command.stdin if path == "-" else None
        if path is not None and path != "-":
            if OUTPUT[0] in path and path.startswith("/dev/fd/"):
                known = Feed(tuple(self.reading.origins(path)), self.known_text(path))
            else:
                known = self.files.get(self.absolute(path))
        command.script = known
        commands = [command]
        given = command.stdin.text if command.stdin is not None else None
        for kind, what in started(name, argv, given, known.text if known is not None else None):
            if kind == "words":
                commands.extend(self.inside(command, what).commands[1:])
                continue
            if kind == "code":
                command.code = what[0]
                self.file_calls(command)
            for text in shell_strings(what[0]) if kind == "code" else what:
                commands.extend(self.try_nested(text.lstrip("; "), None, name).commands)
        self.downloads(command)
        return Feed(tuple(commands), output(command, self))

    def shell_text(self, command: Command, texts: list[str], stdin: Any = ...) -> Feed:
        commands = [command]
        text = None
        for source in texts:
            command.code = source
            inner = self.as_wrapper(command, source, [], stdin=command.stdin if stdin is ... else stdin)
            commands.extend(inner.commands)
            text = inner.text
        return Feed(tuple(commands), text)

    def downloads(self, command: Command) -> None:
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
                    self.store(target, feed)
            urls = [word for word in argv[1:] if not word.startswith("-") and ("://" in word or "/" in word)]
            for url in urls:
                base = posixpath.basename(url.split("?")[0])
                if base and (name != "curl" or command.has("OJ", "remote-name", "remote-name-all")):
                    folder = (command.value("-P", "--directory-prefix") or [""])[0]
                    self.store(posixpath.join(folder, base), feed)
        elif name in _CARRIERS:
            self.carried(command)
        elif name in _PACKERS:
            for target in _packed(command):
                self.store(target, Feed((command, *(command.stdin.commands if command.stdin else ())), None))
        elif name in ("cp", "mv", "install", "ln") and len(command.operands) == 2:
            source, target = command.operands
            known = self.files.get(self.absolute(source))
            if known is not None:
                self.store(target, known)
                self.store(posixpath.join(target, posixpath.basename(source)), known)
        elif name in ("gcc", "cc", "clang", "g++", "rustc"):
            for word in command.operands:
                known = self.files.get(self.absolute(word))
                if known is not None:  # what it compiles to comes from where the source came from
                    self.store((command.value("-o") or ["a.out"])[0], Feed(known.commands, None))
        elif name == "tee":
            for target in command.operands:
                self.store(target, command.stdin or feed, command.has("a", "append"))
        elif name == "dd":
            for word in argv[1:]:
                if word.startswith("of=") and command.stdin is not None:
                    self.store(word[3:], command.stdin)


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


# --- what wrappers and builtins do ---------------------------------------------------------------------------------

# name: (operands before the inner command, options that take the next word)
_PREFIXES: dict[str, tuple[int, frozenset[str]]] = {
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


def _after_options(words: list[str], valued: frozenset[str], name: str) -> list[str]:
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
            or (name == "sudo" and word[-1] in "ugpCDRrtTU" and word[1] != "-" and f"-{word[-1]}" in valued)
            else 1
        )
    return words[position:]


def quote(word: str) -> str:
    """The word in single quotes, for being read again."""
    return "'" + word.replace("'", "'\\''") + "'"


def _grows(name: str, source: str) -> bool:
    """Whether an assignment makes its variable longer each time, other than by counting."""
    head, _, value = source.partition("=")
    if re.search(r"\[[^]]*(?:\+\+|\$|\+)[^]]*\]\+?$", head):
        return True
    if "$((" in source or "$[" in source:
        return False
    if head.endswith("+"):
        return True
    own = re.compile(rf"\$\{{?{re.escape(name)}(?:\[[@*]\])?\}}?(?![\w#%/:])")
    times = len(own.findall(value))
    return times > 1 or (times == 1 and own.sub("", value).strip("\"'() ") != "")


def _tilde(text: str) -> str:
    match = re.match(r"~([A-Za-z_][\w-]*)?(?=/|$)", text)
    if not match:
        return text
    if match[1]:
        return ("/root" if match[1] == "root" else f"/home/{match[1]}") + text[match.end() :]
    return HOME + text[1:]


def _dequote(text: str) -> str:
    return re.sub(r'\\([$`"\\\n])', lambda match: "" if match[1] == "\n" else match[1], text) if "\\" in text else text


def _sequence(numbers: list[str]) -> list[str]:
    try:
        first, last = int(numbers[0]), int(numbers[1])
        step = abs(int(numbers[2])) if len(numbers) > 2 else 1
    except (ValueError, IndexError):
        if len(numbers) >= 2 and len(numbers[0]) == len(numbers[1]) == 1:
            a, b = ord(numbers[0]), ord(numbers[1])
            return [chr(code) for code in range(a, b + 1)][:64] or [numbers[0], numbers[1]]
        return numbers
    step = step or 1
    values = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [str(value) for value in values[:64]]


def _many(source: str) -> bool:
    """Whether a loop's list is a long sequence: {1..100000}, $(seq 100000)."""
    numbers = [int(number) for number in re.findall(r"(?:\.\.|seq\s+(?:\d+\s+)*)\s*(\d{1,12})", source)]
    return any(number > 5000 for number in numbers)


def _glob_regex(pattern: str, lazy: bool = False) -> str:
    return "".join(
        (".*?" if lazy else ".*") if char == "*" else "." if char == "?" else re.escape(char) for char in pattern
    )


def _strip_pattern(value: str, pattern: str, operator: str) -> str:
    try:
        if operator[0] == "#":
            match = re.match(_glob_regex(pattern, lazy=operator == "#"), value, re.DOTALL)
            return value[match.end() :] if match else value
        positions = range(len(value), -1, -1) if operator == "%" else range(len(value) + 1)
        compiled = re.compile(_glob_regex(pattern), re.DOTALL)
        for position in positions:
            if compiled.fullmatch(value, position):
                return value[:position]
    except re.error:
        pass
    return value


# Programs that a pattern such as /bin/r? is tried against.
_GLOBBED = listed(
    "rm dd sh bash cat nc sudo curl wget chmod chown mkfs.ext4 shred mv cp tar python3 perl find tee kill"
    " ncat base64 head tail"
)


def program_names(word: str) -> list[str]:
    """The program or programs that the first word of a command names."""
    bare = unmark(word)
    if not bare:
        return [word]
    if any(char in bare for char in "*?["):
        base = bare.rsplit("/", 1)[-1]
        try:
            names = [name for name in _GLOBBED if fnmatch.fnmatchcase(name, base)] if base != "*" else []
        except re.error:
            names = []
        return names[:4] or [bare]
    if bare != word and OUTPUT[0] in word:
        return [bare] if bare[:1] != "/" else [bare.rsplit("/", 1)[-1] or bare]
    match = _SYSTEM_FOLDER.match(bare) if bare[0] == "/" else None
    if match is not None and match.end() < len(bare):
        bare = bare.rsplit("/", 1)[-1]
    elif bare[0] == "/" or bare.startswith(".."):
        tidy = posixpath.normpath(bare)
        if re.search(r"(^|/)s?bin/[^/]+$", tidy) or "/proc/self/root/" in tidy:
            bare = tidy.rsplit("/", 1)[-1]
    return [bare]


def _do_eval(walk: _Walk, command: Command) -> Feed:
    words = command.argv[1:]
    if words and words[0] == "--":
        words = words[1:]
    text = " ".join(words)
    command.code = text
    inner = walk.nested(text, command.stdin) if text else Feed((), "")
    return Feed((command, *inner.commands), inner.text)


def _do_source(walk: _Walk, command: Command) -> Feed:
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


def _do_cd(walk: _Walk, command: Command) -> Feed:
    words = [word for word in command.argv[1:] if not word.startswith("-") or word == "-"]
    target = words[0] if words else (HOME if command.name == "cd" else "")
    if target == "-" or not target:
        walk.cwd = None
    elif target.startswith("/") or walk.cwd is None:
        walk.cwd = posixpath.normpath(target)
    else:
        walk.cwd = posixpath.normpath(walk.cwd + "/" + target)
    return Feed((command,), "")


def _do_popd(walk: _Walk, command: Command) -> Feed:
    walk.cwd = None
    return Feed((command,), "")


def _do_read(walk: _Walk, command: Command) -> Feed:
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


def _do_alias(walk: _Walk, command: Command) -> Feed:
    commands = [command]
    for word in command.argv[1:]:
        name, equals, value = word.partition("=")
        if equals and name:
            walk.aliases[name] = value
            walk.active.append(name)
            commands.extend(walk.try_nested(value, None, "alias").commands)
            walk.active.pop()
    return Feed(tuple(commands), "")


def _do_set(walk: _Walk, command: Command) -> Feed:
    if "--" in command.argv:
        walk.arguments = command.argv[command.argv.index("--") + 1 :]
    return Feed((command,), "")


def _do_unset(walk: _Walk, command: Command) -> Feed:
    for word in command.operands:
        walk.variables.pop(word, None)
    return Feed((command,), "")


def _do_command(walk: _Walk, command: Command) -> Feed:
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


def _do_trap(walk: _Walk, command: Command) -> Feed:
    words = [word for word in command.argv[1:] if word not in ("--", "-l", "-p")]
    if len(words) >= 2 and words[0] not in ("", "-"):
        inner = walk.nested(words[0], None, "trap")
        return Feed((command, *inner.commands), "")
    return Feed((command,), "")


_BUILTINS = {
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


def _xargs(walk: _Walk, command: Command) -> Feed:
    valued = frozenset(
        listed("-I -n -P -d -a -E -L -s -R -J --max-args --max-procs --delimiter --arg-file --max-lines --replace")
    )
    rest = _after_options(command.argv[1:], valued, "xargs")
    replace = command.value("-I", "-J") or (
        ["{}"] if command.has("i") or any(w == "--replace" for w in command.argv) else []
    )
    if not rest:
        return Feed((command,), command.stdin.text if command.stdin else None)
    feed = command.stdin or Feed()
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


def _find(walk: _Walk, command: Command) -> Feed:
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


def _watch(walk: _Walk, command: Command) -> Feed:
    rest = _after_options(command.argv[1:], frozenset(["-n", "--interval", "-q", "--equexit"]), "watch")
    return walk.shell_text(command, [" ".join(rest)]) if rest else Feed((command,), None)


def _ssh(walk: _Walk, command: Command) -> Feed:
    valued = frozenset(listed("-b -c -D -E -e -F -I -i -J -L -l -m -O -o -p -Q -R -S -W -w -B"))
    rest = _after_options(command.argv[1:], valued, "ssh")
    commands = [command]
    for option in command.value("-o"):
        if option.lower().startswith(("proxycommand=", "localcommand=")):
            commands.extend(walk.try_nested(option.partition("=")[2].lstrip("; "), None, "ssh").commands)
    tail = _after_options(rest[1:], valued, "ssh")
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


def _su(walk: _Walk, command: Command) -> Feed:
    texts = command.value("-c", "--command")
    if command.name == "runuser" and not texts:
        rest = _after_options(
            command.argv[1:], frozenset(["-u", "-g", "-G", "-s", "--user", "--group", "--shell"]), "runuser"
        )
        if command.value("-u", "--user"):
            return walk.inside(command, rest)
    if texts:
        return walk.shell_text(command, texts)
    if command.stdin is not None and command.stdin.text is not None:
        return walk.shell_text(command, [command.stdin.text], stdin=None)
    return Feed((command,), None)


def _script(walk: _Walk, command: Command) -> Feed:
    texts = command.value("-c", "--command")
    for position, word in enumerate(command.argv[:-1]):
        if re.fullmatch(r"-[a-z]*c", word) and word != "-c":
            texts.append(command.argv[position + 1])
    return walk.shell_text(command, texts) if texts else Feed((command,), None)


def _exec_in(walk: _Walk, command: Command) -> Feed:
    """docker exec, kubectl exec and their kin: the command runs inside a container."""
    words = command.argv[1:]
    valued = frozenset(
        listed("-u -w -e --user --workdir --env --env-file -n --namespace -c --container -f --file -p --detach-keys")
    )
    words = _after_options(words, valued, command.name)
    if words and words[0] == "compose":
        words = _after_options(words[1:], valued, command.name)
    if not words or words[0] not in ("exec", "run") or (words[0] == "run" and command.name not in ("kubectl",)):
        return Feed((command,), None)
    rest = _after_options(words[1:], valued, command.name)[1:]
    rest = [word for word in rest[:1] if not word.startswith("-")] + rest[1:] if rest else rest
    if "--" in words:
        rest = words[words.index("--") + 1 :]
    rest = _after_options(rest, frozenset(), command.name)
    return walk.inside(command, rest, label="container") if rest else Feed((command,), None)


def _remote_shell(option: str) -> Any:
    def follow(walk: _Walk, command: Command) -> Feed:
        texts = command.value(*option.split())
        return walk.shell_text(command, [text for text in texts if text]) if texts else Feed((command,), None)

    return follow


def _last_words(skip: int) -> Any:
    """Programs whose remaining operands are joined and handed to a shell."""

    def follow(walk: _Walk, command: Command) -> Feed:
        words = [word for word in command.argv[1:]]
        operands = _after_options(
            words, frozenset(["-w", "-t", "-s", "-n", "-c", "-p", "-l", "-e", "-L", "-f"]), command.name
        )[skip:]
        operands = _after_options(operands, frozenset(["-s", "-n", "-c", "-t"]), command.name)
        if not operands:
            return Feed((command,), None)
        text = " ".join(operands)
        command.code = text
        inner = walk.try_nested(text, None, command.name)
        return Feed((command, *inner.commands), None)

    return follow


def _parallel(walk: _Walk, command: Command) -> Feed:
    valued = frozenset(
        ["-j", "-P", "-a", "-n", "-N", "-I", "--jobs", "--colsep", "-C", "-L", "-S", "--joblog", "--delay", "--timeout"]
    )
    rest = _after_options(command.argv[1:], valued, "parallel")
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


def _at(walk: _Walk, command: Command) -> Feed:
    if command.stdin is not None and command.stdin.text is not None:
        command.script = command.stdin
        return walk.shell_text(command, [command.stdin.text], stdin=None)
    command.script = command.stdin
    return Feed((command,), None)


def _awk(walk: _Walk, command: Command) -> Feed:
    words = _after_options(
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


def _editor(walk: _Walk, command: Command) -> Feed:
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


def _tar(walk: _Walk, command: Command) -> Feed:
    commands = [command]
    walk.downloads(command)
    for text in [
        *command.value(
            "--to-command", "--use-compress-program", "-I", "--rsh-command", "--info-script", "--new-volume-script"
        ),
        *(v.partition("exec=")[2] for v in command.value("--checkpoint-action") if "exec=" in v),
    ]:
        commands.extend(walk.try_nested(text, None, command.name).commands)
    return Feed(tuple(commands), None)


def _xterm(walk: _Walk, command: Command) -> Feed:
    for position, word in enumerate(command.argv):
        if word in ("-e", "-x", "--", "--command", "--execute") and position + 1 < len(command.argv):
            rest = command.argv[position + 1 :]
            if len(rest) == 1:
                return walk.shell_text(command, rest)
            return walk.inside(command, rest)
    return Feed((command,), None)


def _expect(walk: _Walk, command: Command) -> Feed:
    commands = [command]
    for code in command.value("-c"):
        for match in re.finditer(r"(?:spawn|exec|system)\s+(?:-noecho\s+)?([^;\n]+)", code):
            commands.extend(walk.try_nested(match[1], None, "expect").commands)
    return Feed(tuple(commands), None)


def _sed(walk: _Walk, command: Command) -> Feed:
    commands = [command]
    for word in command.argv[1:]:
        match = re.search(r"(?:^|[\d;{$])\s*e\s+(\S.*)$", word) if not word.startswith("-") else None
        if match:
            commands.extend(walk.try_nested(match[1], None, "sed").commands)
    feed = Feed(tuple(commands), output(command, walk))
    walk.downloads(command)
    return feed


def _git(walk: _Walk, command: Command) -> Feed:
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


_WRAPPERS = {
    "xargs": _xargs,
    "find": _find,
    "gfind": _find,
    "fd": _find,
    "fdfind": _find,
    "watch": _watch,
    "ssh": _ssh,
    "autossh": _ssh,
    "sshpass": lambda walk, command: walk.inside(
        command, _after_options(command.argv[1:], frozenset(["-p", "-f", "-d", "-P"]), "sshpass")
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
        command, _after_options(command.argv[1:], frozenset(["-S", "-c", "-t", "-dmS", "-L", "-X"]), "screen")
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


def output(command: Command, walk: _Walk) -> str | None:
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
_ITEM = re.compile(r"\s*,\s*" + _STRING, re.DOTALL)
_BACKQUOTES = re.compile(r"`([^`]{2,400})`|%x[\[({]([^\])}]{2,400})[\])}]|qx[/({]([^/)}]{2,400})[/)}]")
_PIPED = re.compile(r"\"([^\"\n]{2,400})\"\s*\|\s*getline|\|\s*\"([^\"\n]{2,400})\"")


def shell_strings(code: str) -> list[str]:
    """Texts that a piece of Python, Perl, Ruby, PHP, Lua, JavaScript or awk hands to a shell."""
    found_texts = []
    code = code[:MAX_TEXT]
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
    r"(?:os\.path\.)?expanduser\(\s*(['\"]~[^'\"]*['\"])\s*\)|Path\.home\(\)|(?:os\.)?homedir\(\)|Dir\.home"
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
        paths = [_tilde(path) for path in paths[:4]]
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
