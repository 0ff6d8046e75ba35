"""The words of a command: expanded as a shell would, as far as their values are known. Nothing is run.

:class:`ShellState` is what an interpreter keeps between commands; :class:`Words` reads words by it.
"""

import fnmatch
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from scripts.tasks.shell.screen.commands import (
    HOME,
    MARK,
    MAX_TEXT,
    OUTPUT,
    UNKNOWN,
    Parsed,
    Refused,
    ShellCommand,
    Stream,
    ansi,
    tilde,
)
from scripts.tasks.shell.screen.programs import Programs

MAX_FIELDS = 512  # words that one word may expand to

_OPEN, _COMMA, _CLOSE, _SPLIT = "\ue004", "\ue005", "\ue006", "\ue007"
_BRACES = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")
_LITERAL = frozenset(
    "word number variable_name test_operator regex extglob_pattern special_variable_name".split()
)
_PLAIN = re.compile(r"[^\\~{}\ue000-\ue00f]*")
_NOTHING = f"{UNKNOWN[0]}{UNKNOWN[1]}"
MAX_DEPTH = (
    60  # levels of the syntax tree, all nested texts together; a level costs a few Python frames
)
MAX_STEPS = 20_000  # words and statements visited; a hand-written script has a few hundred

ENVIRONMENT = dict(
    pair.split("=")
    for pair in (
        f"HOME={HOME} USER=user LOGNAME=user SHELL=/bin/bash BASH=/bin/bash OSTYPE=linux-gnu TMPDIR=/tmp"
        f" HISTFILE={HOME}/.bash_history PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    ).split()
)


class ShellState:
    """The state of an interpreter that only notes."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.reading = Parsed()
        self.variables: dict[str, str] = {**ENVIRONMENT, "IFS": " \t\n"}
        self.functions: dict[str, Any] = {}
        self.called: set[str] = set()
        self.active: list[str] = []
        self.aliases: dict[str, str] = {}
        self.files: dict[str, Stream] = self.reading.files
        self.running: list[str] = []  # scripts written on the way that are being read
        self.arguments: list[str] | None = None
        self.cwd: str | None = None
        self.background = self.piped = False
        self.loop = ""
        self.depth = self.nested_depth = self.steps = 0
        self.wrappers: tuple[str, ...] = ()

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Refused("too much to follow")

    @contextmanager
    def level(self) -> Iterator[None]:
        """One level deeper in the syntax tree."""
        self.step()
        if self.depth >= MAX_DEPTH:
            raise Refused("nested too deeply")
        with self.within(depth=self.depth + 1):
            yield

    @contextmanager
    def within(self, **state: Any) -> Iterator[None]:
        """Some of the state changed, for a while."""
        before = {name: getattr(self, name) for name in state}
        self.__dict__.update(state)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def store(self, path: str, feed: Stream, append: bool = False) -> None:
        if not path or (path.startswith("/dev/") and not path.startswith("/dev/shm/")):
            return
        path = self.absolute(path)
        before = self.files.get(path)
        if append and before is not None:
            text = (
                None
                if before.text is None or feed.text is None
                else (before.text + feed.text)[:MAX_TEXT]
            )
            feed = Stream(before.commands + feed.commands, text)
        self.files[path] = feed

    def absolute(self, path: str) -> str:
        """The path as one key: joined to the working directory where that is known, and tidied."""
        if not path.startswith("/") and self.cwd:
            path = self.cwd + "/" + path
        return posixpath.normpath(path) if path else path

    def mark(self, feed: Stream) -> str:
        """A word that stands for an output."""
        self.reading.outputs.append(feed)
        return f"{OUTPUT[0]}{len(self.reading.outputs) - 1}{OUTPUT[1]}"

    def known_text(self, word: str) -> str | None:
        match = re.fullmatch(f"/dev/fd/{OUTPUT[0]}([0-9]+){OUTPUT[1]}", word)
        return self.reading.outputs[int(match[1])].text if match else None


class Words(ShellState):
    """The expansion of words; the interpreter that has this class as its base reads the commands inside them."""

    statement: Callable[[Any, Stream | None], Stream]
    substitute: Callable[[Any], str]
    substitutions: Callable[[Any], None]

    def text(self, node: Any) -> str:
        """Value of a word without splitting, as in an assignment."""
        return "".join(text for _, text in self.pieces(node))

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
        marked = []
        for kind, text in pieces:
            if kind == "L":
                text = text.replace("{", _OPEN).replace(",", _COMMA).replace("}", _CLOSE)
            elif kind == "E" and separators and text:
                text = re.sub(f"[{re.escape(separators)}]+", _SPLIT, text)
            marked.append(text)
        quoted = any(kind == "Q" for kind, _ in pieces)
        words = []
        for word in _expand_braces("".join(marked)):
            parts = word.replace(_OPEN, "{").replace(_COMMA, ",").replace(_CLOSE, "}").split(_SPLIT)
            words.extend(part for part in parts if part or (quoted and len(parts) == 1))
        if len(words) > MAX_FIELDS:
            self.steps += len(words)
        return words

    def array_fields(self, node: Any) -> list[str]:
        """``"${a[@]}"`` and ``"$@"`` keep their words apart."""
        whole = (
            re.fullmatch(rb'"\$(?:\{(\w+)\[@\]\}|\{?@\}?)"', node.text)
            if node.type == "string"
            else None
        )
        if whole is None:
            return self.fields(node)
        return self.variable(whole[1].decode()).split() if whole[1] else list(self.arguments or [])

    def pieces(self, node: Any) -> list[tuple[str, str]]:
        """(kind, text) of each part: L literal, Q quoted, E the value of an unquoted expansion."""
        with self.level():
            return self._pieces(node, node.type)

    def _pieces(self, node: Any, kind: str) -> list[tuple[str, str]]:
        if kind in _LITERAL:
            text = tilde(node.text.decode())
            if "\\" in text:
                parts = re.split(r"(\\(?:\n|.))", text, flags=re.DOTALL)
                return [
                    ("Q", "" if part[1] == "\n" else part[1])
                    if part[0] == "\\" and len(part) > 1
                    else ("L", part)
                    for part in parts
                    if part
                ]
            if kind in ("regex", "extglob_pattern"):
                self.substitutions(node)
            return [("L", text)]
        if kind == "raw_string":
            return [("Q", node.text.decode()[1:-1])]
        if kind == "ansi_c_string":
            return [("Q", ansi(node.text.decode()[2:-1]))]
        if kind == "string":
            return [("Q", self.double_quoted(node, 1))]
        if kind == "translated_string":
            return [("Q", self.double_quoted(next(iter(node.named_children), node), 1))]
        if kind == "simple_expansion":
            return [("E", self.variable(node.text.decode()[1:]))]
        if kind == "expansion":
            return [("E", self.expansion(node))]
        if kind in ("command_substitution", "process_substitution"):
            return [("E" if kind == "command_substitution" else "Q", self.substitute(node))]
        if kind == "arithmetic_expansion":
            before = len(self.reading.outputs)
            self.substitutions(node)
            return [
                (
                    "Q",
                    f"{OUTPUT[0]}{before}{OUTPUT[1]}"
                    if len(self.reading.outputs) > before
                    else _NOTHING,
                )
            ]
        if kind == "brace_expression":
            return [("Q", node.text.decode())]  # {1..9}: a pattern of its own
        if kind == "concatenation":
            pieces: list[tuple[str, str]] = []
            for child in node.children:
                if child.is_named:
                    pieces.extend(self.pieces(child))
                elif child.type != "``":
                    pieces.append(("L", child.text.decode()))
            if pieces and pieces[0] == ("L", "~") and len(pieces) > 1:
                pieces[0] = ("L", HOME)
            return pieces
        if kind == "array":
            return [
                (
                    "L",
                    " ".join(word for child in node.named_children for word in self.fields(child)),
                )
            ]
        if hasattr(self, "do_" + kind):
            self.statement(node, None)
            return [("L", "")]
        self.substitutions(node)
        return [("L", node.text.decode())]

    def double_quoted(self, node: Any, trim: int) -> str:
        """Text between double quotes, or of a here-document: literal stretches and expansions."""
        source, start = node.text, node.start_byte
        at, out = start + trim, []
        for child in node.children:
            if child.type in (
                "simple_expansion",
                "expansion",
                "command_substitution",
                "arithmetic_expansion",
            ):
                out.append(
                    _dequote(
                        source[at - start : child.start_byte - start].decode("utf-8", "replace")
                    )
                )
                out.append(self.text(child))
                at = child.end_byte
        out.append(
            _dequote(source[at - start : node.end_byte - trim - start].decode("utf-8", "replace"))
        )
        return "".join(out)

    def assign(self, node: Any) -> tuple[str, str]:
        """Take over ``name=value``, ``name+=value``, ``name[i]=value``, ``name=(...)``; an array is its words."""
        self.step()
        name_node, value_node = node.child_by_field_name("name"), node.child_by_field_name("value")
        name, _, subscript = (name_node.text.decode() if name_node is not None else "").partition(
            "["
        )
        value = self.text(value_node) if value_node is not None else ""
        if subscript or b"+=" in node.text[: len(name) + 3]:
            between = (
                " " if subscript or (value_node is not None and value_node.type == "array") else ""
            )
            value = self.variables.get(name, "") + between + value
        if len(value) > MAX_TEXT:
            raise Refused("a variable grows too long")
        self.variables[name] = value
        return name, value

    def variable(self, name: str) -> str:
        """Value of a variable or parameter, or the mark that says it is not known."""
        if name in self.variables:
            return self.variables[name]
        if name in ("@", "*"):
            return " ".join(self.arguments) if self.arguments else ""
        if name == "#":
            return str(len(self.arguments or []))
        if name == "0":
            return self.active[-1] if self.active else "bash"
        if name.isdigit() and self.arguments is not None:
            return (
                self.arguments[int(name) - 1]
                if len(name) < 6 and int(name) <= len(self.arguments)
                else ""
            )
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
            return _NOTHING
        prefix, name, subscript = match.groups()
        rest = source[match.end() :]
        value = self.variable(name)
        if subscript and re.fullmatch(r"\[-?\d{1,6}\]", subscript):
            value = next(iter(value.split()[int(subscript[1:-1]) :]), "")
        if prefix == "!":
            value = self.variable(value) if value in self.variables else value
        elif prefix == "#":
            return str(len(value)) if not MARK.search(value) else "1"
        if not rest:
            return value
        unknown = bool(MARK.fullmatch(value)) and name not in self.variables
        operator = re.match(r":?[-=+?]|##?|%%?|//?[#%]?|:|\^\^?|,,?|@", rest)
        sign = operator[0] if operator else ""
        self.substitutions(node)
        argument = re.sub(
            r"\$\{?(\w+)\}?", lambda match: self.variable(match[1]), rest[len(sign) :]
        )
        return self._operated(name, value, unknown, sign, re.sub("[\"']", "", argument))

    def _operated(self, name: str, value: str, unknown: bool, operator: str, argument: str) -> str:
        """``${name<operator>argument}``."""
        if operator in (":-", "-", ":=", "="):
            if not unknown and value:
                return value
            if operator.endswith("="):
                self.variables[name] = argument
            return argument
        if operator in (":+", "+"):
            return value if unknown else argument
        if unknown and operator in (":?", "?"):
            return f"{UNKNOWN[0]}{name}?{UNKNOWN[1]}"  # never empty
        if unknown or len(value) > 4096:
            return value
        if operator in ("#", "##", "%", "%%"):
            return _strip_pattern(value, argument, operator)
        # Cut, replaced or turned into capitals: not worked out, as no changed text is.
        return self.mark(Stream((ShellCommand("${}", ["${}"], hidden=True, reading=self.reading),)))


def _expand_braces(text: str) -> list[str]:
    """Expand marked braces, innermost first; gives up (returns the text) beyond :data:`MAX_FIELDS`."""
    done: list[str] = []
    todo = [text]
    while todo:
        if len(done) + len(todo) > MAX_FIELDS:
            return [text]
        current = todo.pop()
        match = _BRACES.search(current)
        if match is None:
            done.append(current)
            continue
        parts = match[1].split(_COMMA)
        parts = parts if len(parts) > 1 else ["{" + parts[0] + "}"]
        todo.extend(
            current[: match.start()] + part + current[match.end() :] for part in reversed(parts)
        )
    return done


def _dequote(text: str) -> str:
    return (
        re.sub(r'\\([$`"\\\n])', lambda match: "" if match[1] == "\n" else match[1], text)
        if "\\" in text
        else text
    )


def _strip_pattern(value: str, pattern: str, operator: str) -> str:
    """``${value#pattern}`` and its three kin."""
    ends = range(len(value) + 1) if operator in ("#", "%%") else range(len(value), -1, -1)
    if operator[0] == "#":
        return next((value[at:] for at in ends if fnmatch.fnmatchcase(value[:at], pattern)), value)
    return next((value[:at] for at in ends if fnmatch.fnmatchcase(value[at:], pattern)), value)
