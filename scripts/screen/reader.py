"""Reading a shell command without running it: from text to the simple commands that it would start.

:func:`read` parses text with tree-sitter-bash and walks the syntax tree as an interpreter would, except that
it does nothing: it only notes. What comes out is a list of :class:`~scripts.screen.commands.Command`, each with its
words resolved, its redirections, what feeds its input, and the wrappers around it. A wrapper and the command inside it
are both noted; text handed to a shell (``sh -c``, ``eval``, a here-document, a pipe) is parsed in turn.
Work is bounded: longer, deeper or busier text is :class:`Refused`.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from scripts.common.syntax import find_shfmt
from scripts.screen.commands import (
    HOME,
    MARK,
    MAX_TEXT,
    OUTPUT,
    UNKNOWN,
    Command,
    Feed,
    Reading,
    Redirect,
    Refused,
    ansi,
    tilde,
)  # fmt: skip
from scripts.screen.programs import Programs
from scripts.screen.spawned_commands import begin

MAX_FIELDS = 512  # words that one word may expand to
PRIVATE = re.compile("[\ue000-\ue00f]")

_OPEN, _COMMA, _CLOSE, _SPLIT = "\ue004", "\ue005", "\ue006", "\ue007"
_BRACES = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")
_LITERAL = frozenset("word number variable_name test_operator regex extglob_pattern special_variable_name".split())
_PLAIN = re.compile(r"[^\\~{}\ue000-\ue00f]*")
_NOTHING = f"{UNKNOWN[0]}{UNKNOWN[1]}"
MAX_CHARACTERS = 65_536
MAX_DEPTH = 60  # levels of the syntax tree, all nested texts together; a level costs a few Python frames
MAX_NESTED = 10  # texts inside texts: sh -c "sh -c '...'"
MAX_STEPS = 20_000  # words and statements visited; a hand-written script has a few hundred
MAX_COMMANDS = 200  # commands noted; judging them takes time that grows with the square

ENVIRONMENT = dict(
    pair.split("=")
    for pair in (
        f"HOME={HOME} USER=user LOGNAME=user SHELL=/bin/bash BASH=/bin/bash OSTYPE=linux-gnu TMPDIR=/tmp"
        f" HISTFILE={HOME}/.bash_history PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    ).split()
)

# --- parsing ---------------------------------------------------------------------------------------------------

_LONG = 2048  # characters
# The grammar's scanner (tree-sitter-bash 0.25) looks characters up in C's table of 256 and reads beyond its end for
# others, up to a crash of the process. What they are does not matter to the screen: a letter stands for each.
_BEYOND = re.compile("[^\x00-\xff\ue000-\ue00f]")
_WITHIN = re.compile(r"(?<=[\w}/.-])\$([A-Za-z_]\w*)")  # the grammar cuts rm$IFS-rf$IFS/ into words, and ${IFS} not
# Valid Bash that the grammar takes for an error, and a spelling with the same meaning for the screen that it reads.
# Tried only when parsing fails; shfmt then decides whether the original was valid.
_SPELLINGS: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"(\d*)<>"), r"\1>"),
    (
        re.compile(r"(^|[;&|(]\s*|\b(?:sudo|do|then|else|exec|env)\s+)\{([^\s{};]*,[^\s{};]*)\}"),
        lambda match: match[1] + match[2].replace(",", " "),
    ),
    (re.compile(r"[@!?*+]\([^()]*\)"), "*"),
    (re.compile(r";;?&"), ";;"),
    (re.compile(r"(?<![\w$])coproc\s+"), " "),
    (re.compile(r"(?<=\s)/(?=\s+\])"), "'/'"),
    (re.compile(r"""(>>?\s*[^\s<>|;&]+)\s+(<<<\s*(?:'[^']*'|"[^"]*"|\S+))"""), r"\2 \1"),
)


@cache
def _parser() -> Any:
    import tree_sitter_bash
    from tree_sitter import Language, Parser

    return Parser(Language(tree_sitter_bash.language()))


def _tree(text: str) -> Any:
    """Root of the syntax tree, or None where there is an error in it."""
    root = _parser().parse(_BEYOND.sub("\xff", _WITHIN.sub(r"${\1}", text)).encode()).root_node
    return None if root.has_error else root


def _valid_bash(text: str) -> bool:
    original = PRIVATE.sub("_", text).encode()
    return subprocess.run([find_shfmt(), "-ln", "bash"], input=original, capture_output=True).returncode == 0


def parse(text: str) -> Any:
    """Syntax tree of a text; :class:`Refused` where it is not Bash."""
    # The grammar looks for a way out of errors in a time that grows with the square; shfmt does not.
    root = _tree(text) if len(text) < _LONG or _valid_bash(text) else None
    changed = text
    for pattern, spelling in _SPELLINGS if root is None else ():
        again = pattern.sub(spelling, changed)
        if again != changed and len(text) < _LONG:
            changed, root = again, _tree(again)
            if root is not None:
                root = root if _valid_bash(text) else None
                break
    if root is None:
        raise Refused("not parsable as Bash")
    return root


def read(text: str, programs: Programs) -> Reading:
    """Read a text of shell commands, with the facts about programs that say what starts what.

    :class:`Refused` where it can't be parsed, or is longer, deeper or busier than the limits above allow.
    """
    if "\0" in text:
        raise Refused("NUL character")
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"longer than {MAX_CHARACTERS} characters")
    walk = Walk(programs)
    walk.body(parse(PRIVATE.sub("\ufffd", text).encode("utf-8", "replace").decode()).children, None)
    for name in [name for name in walk.functions if name not in walk.called]:  # there to be called later
        walk.call(name, [], None)
    return walk.reading


# --- walking ---------------------------------------------------------------------------------------------------

_STATEMENTS = frozenset(
    (
        "program command redirected_statement list pipeline compound_statement subshell function_definition"
        " if_statement elif_clause else_clause while_statement for_statement c_style_for_statement"
        " case_statement case_item negated_command test_command declaration_command unset_command"
        " variable_assignment variable_assignments do_group"
    ).split()
)
# Conditions of while and until that stay as they are: nothing ends the loop but the disk, the memory or the user.
_ALWAYS = re.compile(
    r":|(?:/usr)?(?:/bin/)?true|1|\(\(\s*1\s*\)\)|\[\[?\s+(?:1|true|x|.{1,9}\s-eq\s.{1,9}|(\S{1,9})\s*==?\s*\1)\s+\]\]?"
    r"|test 1|! ?false|sleep 0|(?:mkdir|echo|printf|dd|touch|cp|head|cat)\b(?!.*\|\s*(?:grep|read|nc)).*"
)
_NEVER = re.compile(r"false|\[\[?\s+(?:0\s+-(?:eq|ne)\s+\d|1\s+-eq\s+[02])?\s*\]\]?|\(\(\s*0\s*\)\)|! ?true|! ?:")
_MANY = 5000  # turns of a loop that count as endless
_PATH = ("/usr/local/bin/", "/usr/bin/", "/bin/", "/usr/local/sbin/", f"{HOME}/bin/", f"{HOME}/.local/bin/")


def _is_descriptor(node: Any) -> bool:
    following = node.next_sibling or (node.parent.next_sibling if node.parent is not None else None)
    return following is not None and following.start_byte == node.end_byte and following.type.endswith("_redirect")


_OUTPUTS = (">", ">>", ">|", "&>", "&>>")


@dataclass
class Line:
    """What is gathered around a command: its redirections, words after them, what stands below a here-document."""

    redirects: list[Redirect] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    pipelines: list[Any] = field(default_factory=list)  # cat <<EOF | sh: the grammar hangs it below the document


class Walk:
    """The state of an interpreter that only notes."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.reading = Reading()
        self.variables: dict[str, str] = {**ENVIRONMENT, "IFS": " \t\n"}
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

    # -- statements

    def body(self, children: Iterable[Any], stdin: Feed | None) -> Feed:
        """Statements one after another; the outputs join."""
        commands: list[Command] = []
        texts: list[str] | None = []
        children = list(children)
        for child, after in zip(children, [*children[1:], None], strict=False):
            if child.type not in _STATEMENTS:
                continue
            with self.within(background=self.background or (after is not None and after.type == "&")):
                feed = self.statement(child, stdin)
            commands.extend(feed.commands)
            texts = None if texts is None or feed.text is None else [*texts, feed.text]
        return Feed(tuple(commands), None if texts is None else "".join(texts)[:MAX_TEXT])

    def statement(self, node: Any, stdin: Feed | None) -> Feed:
        with self.level():
            return getattr(self, "do_" + node.type)(node, stdin)

    def do_program(self, node: Any, stdin: Feed | None) -> Feed:
        return self.body(node.children, stdin)

    do_compound_statement = do_do_group = do_elif_clause = do_else_clause = do_if_statement = do_program
    do_variable_assignments = do_negated_command = do_case_item = do_list = do_program

    def do_subshell(self, node: Any, stdin: Feed | None) -> Feed:
        with self.within(cwd=self.cwd):
            return self.body(node.children, stdin)

    def do_pipeline(self, node: Any, stdin: Feed | None) -> Feed:
        with self.within(piped=True, cwd=self.cwd):
            return self.through(node.children, stdin)

    def through(self, children: Iterable[Any], feed: Feed | None, commands: Iterable[Command] = ()) -> Feed:
        """Commands in a pipe: each is fed by all before it."""
        fed = list(commands)
        for child in children:
            if child.type in _STATEMENTS:
                feed = self.statement(child, feed)
                fed.extend(feed.commands)
                feed = Feed(tuple(fed), feed.text)
        return Feed(tuple(fed), feed.text if feed else None)

    def do_function_definition(self, node: Any, stdin: Feed | None) -> Feed:
        name, body = node.child_by_field_name("name"), node.child_by_field_name("body")
        if name is not None and body is not None:
            self.functions[name.text.decode()] = body
            self.called.discard(name.text.decode())
        return Feed((), "")

    def call(self, name: str, arguments: list[str], stdin: Feed | None) -> Feed:
        self.called.add(name)
        with self.within(arguments=arguments, active=[*self.active, name]):
            return self.statement(self.functions[name], stdin)

    def looped(self, endless: bool, children: Iterable[Any], stdin: Feed | None) -> Feed:
        with self.within(loop="endless" if endless or self.loop == "endless" else "loop"):
            return Feed(self.body(children, stdin).commands, None)

    def do_while_statement(self, node: Any, stdin: Feed | None) -> Feed:
        parts = [child for child in node.children if child.type in _STATEMENTS and child.type != "do_group"]
        condition = " ".join(child.text.decode() for child in parts)
        until = node.children[0].type == "until"
        endless = bool((_NEVER if until else _ALWAYS).fullmatch(condition.strip()))
        text = stdin.text if stdin is not None else None
        if text and not until and re.match(r"(?:IFS=\S*\s+)?read\b", condition) and 1 < text.count("\n") <= 8:
            commands: list[Command] = []  # line by line
            for line in text.strip("\n").split("\n"):
                commands.extend(self.looped(endless, node.children, Feed(stdin.commands, line + "\n")).commands)
            return Feed(tuple(commands), None)
        return self.looped(endless, node.children, stdin)

    def do_c_style_for_statement(self, node: Any, stdin: Feed | None) -> Feed:
        head = node.text[:200].decode("utf-8", "replace")
        self.substitutions(node)
        many = any(int(number) > _MANY for number in re.findall(r"<=?\s*(\d{1,9})\b", head))
        return self.looped(
            many or bool(re.match(r"for\s*\(\(\s*[^;]*;\s*(1\s*|true\s*)?;", head)), node.children, stdin
        )

    def do_for_statement(self, node: Any, stdin: Feed | None) -> Feed:
        name, items = node.child_by_field_name("variable"), node.children_by_field_name("value")
        variable = name.text.decode() if name is not None else ""
        source = b" ".join(item.text[:200] for item in items)
        numbers = re.findall(rb"(?:\.\.|seq\s+(?:\d+\s+)*)\s*(\d{1,12})", source)
        values = [value for item in items for value in self.fields(item)]
        if node.children[0].type == "select" or not items:
            values = [f"{UNKNOWN[0]}{variable}{UNKNOWN[1]}"]
        commands: list[Command] = []
        for value in values[:6] or [""]:
            self.variables[variable] = value
            commands.extend(self.looped(any(int(n) > _MANY for n in numbers), node.children, stdin).commands)
        return Feed(tuple(commands), None)

    def do_case_statement(self, node: Any, stdin: Feed | None) -> Feed:
        self.substitutions(node)
        return Feed(self.body(node.children, stdin).commands, None)

    def do_test_command(self, node: Any, stdin: Feed | None) -> Feed:
        self.substitutions(node)
        return Feed((), "")

    def substitutions(self, node: Any) -> None:
        """Note the substitutions anywhere below an expression."""
        todo = [node]
        while todo:
            self.step()
            for child in todo.pop().children:
                if child.type in ("command_substitution", "process_substitution"):
                    self.substitute(child)
                elif child.type not in _STATEMENTS or child.type == "test_command":
                    todo.append(child)

    def do_variable_assignment(self, node: Any, stdin: Feed | None) -> Feed:
        return self.declared([":"], [node], stdin)

    def do_declaration_command(self, node: Any, stdin: Feed | None) -> Feed:
        return self.declared([node.children[0].text.decode()], node.children[1:], stdin)

    do_unset_command = do_declaration_command

    def declared(self, words: list[str], children: Iterable[Any], stdin: Feed | None) -> Feed:
        """``x=1``, ``export x=1 y``, ``unset x``."""
        assignments, longer, silent = {}, "", words == [":"]
        for child in children:
            if child.type == "variable_assignment":
                name, value = self.assign(child)
                assignments[name] = value
                words += [] if silent else [f"{name}={value}"]
                if self.loop == "endless" and _grows(name, child.text.decode()):
                    longer = name
            elif child.is_named:
                words.extend(self.fields(child))
        feed = self.note(words, Line(), stdin, assignments)
        if feed.commands:
            feed.commands[0].grows = longer
        return feed

    # -- redirections

    def do_redirected_statement(self, node: Any, stdin: Feed | None) -> Feed:
        line, before = Line(), []
        with self.within(piped=self.piped):
            body = next((child for child in node.children if child.type in _STATEMENTS), None)
            # The grammar hangs a redirection on the whole of "a && b > f" and "a | b > f": it is the last command's.
            while body is not None and body.type in ("list", "pipeline", "negated_command"):
                *parts, last = [child for child in body.children if child.type in _STATEMENTS]
                if body.type == "pipeline":
                    self.piped = True
                    stdin = self.through(parts, stdin)
                    before.extend(stdin.commands)
                else:
                    before.extend(self.body(parts, stdin).commands)
                body = last
            for child in node.children:
                if child.is_named and child.type not in _STATEMENTS:
                    stdin = self.redirect(child, line, stdin)
            if body is None:
                feed = self.note(line.words, line, stdin)
            elif body.type == "command":
                feed = self.do_command(body, stdin, line)
            else:
                feed = self.statement(body, stdin)
                # The group's redirections concern each command in it; they are noted once, with its output.
                if line.redirects:
                    self.note([":", *line.words], line, Feed(feed.commands, feed.text))
                self.remember(line, feed)
        feed = Feed((*before, *feed.commands), feed.text)
        for pipeline in line.pipelines:
            if pipeline.type == "pipeline":
                with self.within(piped=True):
                    feed = self.through(pipeline.children, feed, feed.commands)
            else:
                feed = self.body([pipeline], None)
        return feed

    def redirect(self, node: Any, line: Line, stdin: Feed | None) -> Feed | None:
        """Note one redirection; returns what stands at the standard input afterwards."""
        if node.type == "heredoc_redirect":
            return self.here_document(node, line, stdin)
        named = [child for child in node.named_children if child.type != "file_descriptor"]
        target = next(iter(self.fields(named[0])), "") if named else ""
        # Words after the target are the command's; a number glued to the next redirection is its descriptor.
        for child in named[1:]:
            if not (child.type == "number" and _is_descriptor(child)):
                line.words.extend(self.fields(child))
        if node.type == "herestring_redirect":
            text = self.text(named[0]) if named else ""
            return Feed(tuple(self.reading.origins(text)), text + "\n")
        if not named:
            return stdin
        operator = next((child.type for child in node.children if not child.is_named), ">")
        descriptor = next((c.text.decode() for c in node.children if c.type == "file_descriptor"), "")
        varies = self.loop == "endless" and b"$" in node.text
        line.redirects.append(Redirect(operator, descriptor, target, varies))
        if "/dev/tcp/" in target or "/dev/udp/" in target:
            self.reading.sockets = True
        if not operator.startswith("<") or descriptor not in ("", "0"):
            return stdin
        if operator == "<&":
            return Feed((), None, f"&{target}")
        feeds = tuple(self.reading.origins(target))
        known = self.files.get(self.absolute(target)) or Feed((), self.known_text(target))
        return Feed(known.commands + feeds, known.text, target)

    def here_document(self, node: Any, line: Line, stdin: Feed | None) -> Feed:
        start = body = None
        for child in node.children:
            if child.type == "heredoc_start":
                start = child.text.decode()
            elif child.type == "heredoc_body":
                body = child
            elif child.type in _STATEMENTS:
                line.pipelines.append(child)
            elif child.type in ("file_redirect", "herestring_redirect"):
                stdin = self.redirect(child, line, stdin)
            elif child.is_named and child.type not in ("heredoc_end", "file_descriptor"):
                line.words.extend(self.fields(child))
        if body is None:
            return Feed((), "")
        return Feed((), body.text.decode() if start and start[0] in "'\"\\" else self.double_quoted(body, 0))

    def remember(self, line: Line, feed: Feed) -> bool:
        """What a file holds after ``> file``; whether there is one."""
        targets = [r for r in line.redirects if r.operator in (*_OUTPUTS, ">&") and r.descriptor in ("", "1")]
        for redirect in targets:
            self.store(redirect.target, feed, redirect.operator.endswith(">>"))
        return bool(targets)

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

    def substitute(self, node: Any) -> str:
        """``$(...)``, backquotes, ``<(...)``: the text where it is known, else a mark."""
        inside = node.children
        with self.within(cwd=self.cwd, loop=self.loop, piped=False, background=False):
            if inside and inside[0].type == "`" and b"\\" in node.text:
                # Inside backquotes a backslash before a backquote, dollar or backslash belongs to the quoting.
                feed = self.nested(re.sub(r"\\([`$\\])", r"\1", node.text.decode()[1:-1]), None)
            else:
                line, source = Line(), None
                for child in inside:
                    if child.type == "file_redirect":  # $(< file)
                        source = self.redirect(child, line, source)
                feed = self.body(inside, None)
                if line.redirects and not feed.commands:
                    noted = self.note(["cat"], line, source)
                    feed = Feed(noted.commands, source.text if source else None)
        if node.type == "command_substitution" and feed.text is not None:
            return feed.text.rstrip("\n")
        return ("/dev/fd/" if node.type == "process_substitution" else "") + self.mark(feed)

    def mark(self, feed: Feed) -> str:
        """A word that stands for an output."""
        self.reading.outputs.append(feed)
        return f"{OUTPUT[0]}{len(self.reading.outputs) - 1}{OUTPUT[1]}"

    def known_text(self, word: str) -> str | None:
        match = re.fullmatch(f"/dev/fd/{OUTPUT[0]}([0-9]+){OUTPUT[1]}", word)
        return self.reading.outputs[int(match[1])].text if match else None

    # -- words

    @contextmanager
    def within(self, **state: Any) -> Iterator[None]:
        """Some of the state changed, for a while."""
        before = {name: getattr(self, name) for name in state}
        self.__dict__.update(state)
        try:
            yield
        finally:
            self.__dict__.update(before)

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
        whole = re.fullmatch(rb'"\$(?:\{(\w+)\[@\]\}|\{?@\}?)"', node.text) if node.type == "string" else None
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
                    ("Q", "" if part[1] == "\n" else part[1]) if part[0] == "\\" and len(part) > 1 else ("L", part)
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
            return [("Q", f"{OUTPUT[0]}{before}{OUTPUT[1]}" if len(self.reading.outputs) > before else _NOTHING)]
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
            return [("L", " ".join(word for child in node.named_children for word in self.fields(child)))]
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
            if child.type in ("simple_expansion", "expansion", "command_substitution", "arithmetic_expansion"):
                out.append(_dequote(source[at - start : child.start_byte - start].decode("utf-8", "replace")))
                out.append(self.text(child))
                at = child.end_byte
        out.append(_dequote(source[at - start : node.end_byte - trim - start].decode("utf-8", "replace")))
        return "".join(out)

    def assign(self, node: Any) -> tuple[str, str]:
        """Take over ``name=value``, ``name+=value``, ``name[i]=value``, ``name=(...)``; an array is its words."""
        self.step()
        name_node, value_node = node.child_by_field_name("name"), node.child_by_field_name("value")
        name, _, subscript = (name_node.text.decode() if name_node is not None else "").partition("[")
        value = self.text(value_node) if value_node is not None else ""
        if subscript or b"+=" in node.text[: len(name) + 3]:
            between = " " if subscript or (value_node is not None and value_node.type == "array") else ""
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
            return self.arguments[int(name) - 1] if len(name) < 6 and int(name) <= len(self.arguments) else ""
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
        argument = re.sub(r"\$\{?(\w+)\}?", lambda match: self.variable(match[1]), rest[len(sign) :])
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
        return self.mark(Feed((Command("${}", ["${}"], hidden=True, reading=self.reading),)))

    # -- commands

    def do_command(self, node: Any, stdin: Feed | None, line: Line | None = None) -> Feed:
        line, words, assignments = line or Line(), [], {}
        for child in node.children:
            kind = child.type
            if kind == "command_name":
                for inner in child.children:
                    words.extend(self.array_fields(inner))
            elif kind == "variable_assignment":
                name, value = self.assign(child)
                assignments[name] = value
            elif kind.endswith("_redirect"):
                stdin = self.redirect(child, line, stdin)
            elif child.is_named:
                if not (child.text.isdigit() and _is_descriptor(child)):
                    words.extend(self.array_fields(child))
            elif kind != "$":
                words.append(child.text.decode())
        if len(words) > MAX_FIELDS * 4:
            raise Refused("too many words")
        return self.note(words + line.words, line, stdin, assignments)

    def note(self, words: list[str], line: Line, stdin: Feed | None, assignments: dict[str, str] | None = None) -> Feed:
        """Note a command with its words, then whatever it starts; returns its output."""
        feed = self.start(Command("", words, line.redirects, stdin, self.wrappers, assignments=assignments or {}))
        return Feed(feed.commands, "") if self.remember(line, feed) else feed

    def start(self, command: Command) -> Feed:
        """Start a command of which words, redirections, input, wrappers and assignments are known."""
        while command.argv and command.argv[0] == "":
            command.argv = command.argv[1:]
        command.argv = command.argv or [":"]
        command.name, command.reading = _program_name(command.argv[0]), self.reading
        for state in ("cwd", "background", "piped", "loop"):
            setattr(command, state, getattr(self, state))
        self.reading.commands.append(command)
        if len(self.reading.commands) > MAX_COMMANDS or len(command.wrappers) > 24:
            raise Refused("too many commands")
        with self.level(), self.within(wrappers=command.wrappers):
            return self.follow(command)

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
            with self.within(active=[*self.active, name]):
                inner = self.nested(" ".join([self.aliases[name], *map(shlex.quote, argv[1:])]), command.stdin)
            return Feed((command, *inner.commands), inner.text)
        if self.files:
            folders = ("",) if "/" in argv[0] else _PATH
            known = next((self.files[folder + argv[0]] for folder in folders if folder + argv[0] in self.files), None)
            known = known or (self.files.get(self.absolute(argv[0])) if "/" in argv[0] else None)
            if known is not None:
                command.script = known
                if known.text is not None:
                    return Feed((command, *self.run_file(command, argv[0], known.text, argv[1:]).commands), None)
                return Feed((command,), None)
        return begin(self, command)

    def run_file(self, command: Command, path: str, text: str, arguments: list[str]) -> Feed:
        """A script that was written before: its text, unless it is being read already."""
        key = self.absolute(path)
        if key in self.running:
            command.recursive = True
            return Feed((), None)
        with self.within(running=[*self.running, key], active=[*self.active, path]):
            if text.startswith("#!") and not re.match(r"#!\s*\S*\b(?:env\s+)?\w*sh\b", text):
                command.code = text  # another language
                return self.inside(command, [re.split(r"[/\s]", text.split("\n")[0].strip())[-1], path])
            return self.as_wrapper(command, text, arguments, named=path)

    def inside(self, command: Command, argv: list[str], assignments: dict | None = None, label: str = "") -> Feed:
        """Start the command inside a wrapper."""
        if not argv:
            return Feed((command,), None)
        wrappers = (*command.wrappers, label or command.name)
        inner = Command("", argv, command.redirects, command.stdin, wrappers, assignments=assignments or {})
        feed = self.start(inner)
        return Feed((command, *feed.commands), feed.text)

    def nested(self, text: str, stdin: Feed | None, wrapper: str = "", arguments: list[str] | None = None) -> Feed:
        """Read text that a shell would read."""
        if not text.strip():
            return Feed((), "")
        if self.nested_depth >= MAX_NESTED:
            raise Refused("texts nested too deeply")
        if MARK.fullmatch(text.strip()):
            return Feed((), None)
        wrappers = (*self.wrappers, wrapper) if wrapper else self.wrappers
        arguments = self.arguments if arguments is None else arguments
        with self.within(nested_depth=self.nested_depth + 1, wrappers=wrappers, arguments=arguments):
            return self.body(parse(text).children, stdin)

    def try_nested(self, text: str, stdin: Feed | None, wrapper: str) -> Feed:
        """Like :meth:`nested` for text that may not be shell at all: then nothing is noted."""
        try:
            return self.nested(text, stdin, wrapper)
        except Refused as refused:
            if "parsable" in str(refused):
                return Feed((), None)
            raise

    def as_wrapper(self, command: Command, text: str, arguments: list[str], stdin: Any = ..., named: str = "") -> Feed:
        # $0 inside sh -c is the shell itself, inside a script the script.
        active = self.active if command.name in self.functions else [*self.active, named or command.name]
        with self.within(wrappers=(*command.wrappers, command.name), active=active):
            feed = self.nested(text, command.stdin if stdin is ... else stdin, arguments=arguments)
        for inner in feed.commands if command.redirects else ():
            if inner.stdin is None and not inner.redirects:
                inner.redirects = command.redirects
        return feed

    def shell_text(self, command: Command, texts: list[str], stdin: Any = ...) -> Feed:
        """Texts that a program hands to a shell."""
        commands, text = [command], None
        for source in texts:
            command.code = source
            inner = self.as_wrapper(command, source, [], stdin=command.stdin if stdin is ... else stdin)
            commands.extend(inner.commands)
            text = inner.text
        return Feed(tuple(commands), text)


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
        todo.extend(current[: match.start()] + part + current[match.end() :] for part in reversed(parts))
    return done


def _dequote(text: str) -> str:
    return re.sub(r'\\([$`"\\\n])', lambda match: "" if match[1] == "\n" else match[1], text) if "\\" in text else text


def _strip_pattern(value: str, pattern: str, operator: str) -> str:
    """``${value#pattern}`` and its three kin."""
    ends = range(len(value) + 1) if operator in ("#", "%%") else range(len(value), -1, -1)
    if operator[0] == "#":
        return next((value[at:] for at in ends if fnmatch.fnmatchcase(value[:at], pattern)), value)
    return next((value[:at] for at in ends if fnmatch.fnmatchcase(value[at:], pattern)), value)


def _grows(name: str, source: str) -> bool:
    """Whether an assignment makes its variable longer each time, other than by counting."""
    head, _, value = source.partition("=")
    if re.search(r"\[[^]]*(?:\+\+|\$|\+)[^]]*\]\+?$", head):
        return True
    if "$((" in source or "$[" in source:
        return False
    own = re.compile(rf"\$\{{?{re.escape(name)}(?:\[[@*]\])?\}}?(?![\w#%/:])")
    times = len(own.findall(value))
    return head.endswith("+") or times > 1 or (times == 1 and own.sub("", value).strip("\"'() ") != "")


def _program_name(word: str) -> str:
    """The program that the first word of a command names: without the system's folders."""
    bare = MARK.sub("", word)
    if "/" not in bare.strip("/") and bare[:1] != "/":
        return bare or word
    base = bare.rsplit("/", 1)[-1]
    computed = bare != word and OUTPUT[0] in word
    return base if base and (computed or re.search(r"(^|/)s?bin/[^/]+$", posixpath.normpath(bare))) else bare
