"""Reading a shell command without running it: from text to the simple commands that it would start.

:func:`read` parses text with tree-sitter-bash and walks the syntax tree as an interpreter would, except that
it does nothing: it only notes. What comes out is a list of :class:`~scripts.screen.commands.Command`, each with its
words resolved (quotes, escapes, braces, tildes, variables and functions set on the same line, output of ``echo`` and
``printf``), its redirections, what feeds its standard input, and the wrappers around it. A wrapper and the command
inside it are both noted; text handed to a shell (``sh -c``, ``eval``, a here-document, a pipe) is parsed in turn.
What programs start is told by :mod:`scripts.screen.starting`.

Text that some program turned into other text (``rev``, ``tr``, ``base64 -d``...) is not decoded: it stays unknown, and
the policy refuses to run it. Work is bounded: longer, deeper or busier text is :class:`Refused`.
"""

from __future__ import annotations

import fnmatch
import itertools
import posixpath
import re
import subprocess
from collections.abc import Iterable
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
    quote,
    tilde,
    unescape,
    unmark,
)
from scripts.screen.programs import Programs
from scripts.screen.starting import begin

MAX_CHARACTERS = 65_536
MAX_DEPTH = 60  # levels of the syntax tree, all nested texts together; a level costs a few Python frames
MAX_NESTED = 10  # texts inside texts: sh -c "sh -c '...'"
MAX_STEPS = 20_000  # words and statements visited; a hand-written script has a few hundred
MAX_COMMANDS = 200  # commands noted; judging them takes time that grows with the square
MAX_FIELDS = 512  # words that one word may expand to

_OPEN, _COMMA, _CLOSE, _SPLIT = "\ue004", "\ue005", "\ue006", "\ue007"
_PRIVATE = re.compile("[\ue000-\ue00f]")

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


def _valid_bash(text: str) -> bool:
    done = subprocess.run(
        [find_shfmt(), "-ln", "bash"], input=text.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
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


def read(text: str, programs: Programs) -> Reading:
    """Read a text of shell commands, with the facts about programs that say what starts what.

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
    walk = _Walk(programs)
    walk.program(parse(text), None)
    walk.finish()
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
_LITERAL = frozenset("word number variable_name test_operator regex extglob_pattern special_variable_name".split())
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

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
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
            self.functions[unescape(name.text.decode())] = body
            self.called.discard(unescape(name.text.decode()))
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
            return Feed(feeds, self.known_text(target) if feeds else None, target)
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
            if kind in _LITERAL:
                text = node.text.decode()
                if text.startswith("~"):
                    text = tilde(text)
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
            return str(len(value)) if not MARK.search(value) else "1"
        if not rest:
            return value
        unknown = bool(MARK.fullmatch(value)) and name not in self.variables
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
        return unescape(text.replace('"', "").replace("'", ""))

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
            return feed.text.rstrip("\n")
        return ("/dev/fd/" if node.type == "process_substitution" else "") + self.mark(feed)

    def mark(self, feed: Feed) -> str:
        """A word that stands for an output."""
        self.reading.outputs.append(feed)
        return f"{OUTPUT[0]}{len(self.reading.outputs) - 1}{OUTPUT[1]}"

    def room(self) -> bool:
        """Whether more may be noted that is only derived from code."""
        return len(self.reading.commands) < MAX_COMMANDS - 8

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
        self.running.append(key)
        self.active.append(path)
        try:
            if text.startswith("#!") and not re.match(r"#!\s*\S*\b(?:env\s+)?\w*sh\b", text):
                command.code = text  # another language
                return self.inside(command, [re.split(r"[/\s]", text.split("\n")[0].strip())[-1], path])
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
        if MARK.fullmatch(text.strip()):
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

    def try_nested(self, text: str, stdin: Feed | None, wrapper: str) -> Feed:
        """Like :meth:`nested` for text that may not be shell at all: then nothing is noted."""
        try:
            return self.nested(text, stdin, wrapper)
        except Refused as refused:
            if "parsable" in str(refused):
                return Feed((), None)
            raise

    def shell_text(self, command: Command, texts: list[str], stdin: Any = ...) -> Feed:
        commands = [command]
        text = None
        for source in texts:
            command.code = source
            inner = self.as_wrapper(command, source, [], stdin=command.stdin if stdin is ... else stdin)
            commands.extend(inner.commands)
            text = inner.text
        return Feed(tuple(commands), text)


# --- words and their parts ----------------------------------------------------------------------------------------


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
_GLOBBED = (
    "rm dd sh bash cat nc sudo curl wget chmod chown mkfs.ext4 shred mv cp tar python3 perl find tee kill"
    " ncat base64 head tail"
).split()


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
