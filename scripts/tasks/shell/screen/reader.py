"""Reading a shell command without running it: from text to the simple commands that it would start.

:func:`read` parses text with tree-sitter-bash and walks the syntax tree as an interpreter would, except that
it does nothing: it only notes. What comes out is a list of ``ShellCommand``, each with its
words resolved, its redirections, what feeds its input, and the wrappers around it. A wrapper and the command inside it
are both noted; text handed to a shell (``sh -c``, ``eval``, a here-document, a pipe) is parsed in turn.
Work is bounded: longer, deeper or busier text is :class:`Refused`.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from scripts.tasks.shell.screen.commands import (
    HOME,
    MARK,
    MAX_TEXT,
    UNKNOWN,
    Parsed,
    Redirect,
    Refused,
    ShellCommand,
    Stream,
)
from scripts.tasks.shell.screen.loops import endless_condition, endless_for, grows, many_turns
from scripts.tasks.shell.screen.parsing import PRIVATE, parse
from scripts.tasks.shell.screen.programs import Programs, program_name
from scripts.tasks.shell.screen.spawned_commands import begin
from scripts.tasks.shell.screen.words import MAX_FIELDS, Words

MAX_CHARACTERS = 65_536
MAX_NESTED = 10  # texts inside texts: sh -c "sh -c '...'"
MAX_COMMANDS = 200  # commands noted; judging them takes time that grows with the square


def read(text: str, programs: Programs) -> Parsed:
    """Read a text of shell commands, with the facts about programs that say what starts what.

    :class:`Refused` where it can't be parsed, or is longer, deeper or busier than the limits above allow.
    """
    if "\0" in text:
        raise Refused("NUL character")
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"longer than {MAX_CHARACTERS} characters")
    walk = SyntaxWalk(programs)
    walk.body(parse(PRIVATE.sub("\ufffd", text).encode("utf-8", "replace").decode()).children, None)
    for name in [
        name for name in walk.functions if name not in walk.called
    ]:  # there to be called later
        walk.call(name, [], None)
    return walk.reading


_STATEMENTS = {
    *(
        "program",
        "command",
        "redirected_statement",
        "list",
        "pipeline",
        "compound_statement",
        "subshell",
        "do_group",
    ),
    *(
        "function_definition",
        "if_statement",
        "elif_clause",
        "else_clause",
        "while_statement",
        "for_statement",
    ),
    *("c_style_for_statement", "case_statement", "case_item", "negated_command", "test_command"),
    *("declaration_command", "unset_command", "variable_assignment", "variable_assignments"),
}
_PATH = (
    "/usr/local/bin/",
    "/usr/bin/",
    "/bin/",
    "/usr/local/sbin/",
    f"{HOME}/bin/",
    f"{HOME}/.local/bin/",
)


def _is_descriptor(node: Any) -> bool:
    following = node.next_sibling or (node.parent.next_sibling if node.parent is not None else None)
    return (
        following is not None
        and following.start_byte == node.end_byte
        and following.type.endswith("_redirect")
    )


_OUTPUTS = (">", ">>", ">|", "&>", "&>>")


@dataclass
class Line:
    """What is gathered around a command: its redirections, words after them, what stands below a here-document."""

    redirects: list[Redirect] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    pipelines: list[Any] = field(
        default_factory=list
    )  # cat <<EOF | sh: the grammar hangs it below the document


class SyntaxWalk(Words):
    """An interpreter that does nothing: it notes what would be started."""

    # -- statements

    def body(self, children: Iterable[Any], stdin: Stream | None) -> Stream:
        """Statements one after another; the outputs join."""
        commands: list[ShellCommand] = []
        texts: list[str] | None = []
        children = list(children)
        for child, after in zip(children, [*children[1:], None], strict=False):
            if child.type not in _STATEMENTS:
                continue
            with self.within(
                background=self.background or (after is not None and after.type == "&")
            ):
                feed = self.statement(child, stdin)
            commands.extend(feed.commands)
            texts = None if texts is None or feed.text is None else [*texts, feed.text]
        return Stream(tuple(commands), None if texts is None else "".join(texts)[:MAX_TEXT])

    def statement(self, node: Any, stdin: Stream | None) -> Stream:
        with self.level():
            return getattr(self, "do_" + node.type)(node, stdin)

    def do_program(self, node: Any, stdin: Stream | None) -> Stream:
        return self.body(node.children, stdin)

    do_compound_statement = do_do_group = do_elif_clause = do_else_clause = do_if_statement = (
        do_program
    )
    do_variable_assignments = do_negated_command = do_case_item = do_list = do_program

    def do_subshell(self, node: Any, stdin: Stream | None) -> Stream:
        with self.within(cwd=self.cwd):
            return self.body(node.children, stdin)

    def do_pipeline(self, node: Any, stdin: Stream | None) -> Stream:
        with self.within(piped=True, cwd=self.cwd):
            return self.through(node.children, stdin)

    def through(
        self, children: Iterable[Any], feed: Stream | None, commands: Iterable[ShellCommand] = ()
    ) -> Stream:
        """Commands in a pipe: each is fed by all before it."""
        fed = list(commands)
        for child in children:
            if child.type in _STATEMENTS:
                feed = self.statement(child, feed)
                fed.extend(feed.commands)
                feed = Stream(tuple(fed), feed.text)
        return Stream(tuple(fed), feed.text if feed else None)

    def do_function_definition(self, node: Any, stdin: Stream | None) -> Stream:
        name, body = node.child_by_field_name("name"), node.child_by_field_name("body")
        if name is not None and body is not None:
            self.functions[name.text.decode()] = body
            self.called.discard(name.text.decode())
        return Stream((), "")

    def call(self, name: str, arguments: list[str], stdin: Stream | None) -> Stream:
        self.called.add(name)
        with self.within(arguments=arguments, active=[*self.active, name]):
            return self.statement(self.functions[name], stdin)

    def looped(self, endless: bool, children: Iterable[Any], stdin: Stream | None) -> Stream:
        with self.within(loop="endless" if endless or self.loop == "endless" else "loop"):
            return Stream(self.body(children, stdin).commands, None)

    def do_while_statement(self, node: Any, stdin: Stream | None) -> Stream:
        parts = [
            child
            for child in node.children
            if child.type in _STATEMENTS and child.type != "do_group"
        ]
        condition = " ".join(child.text.decode() for child in parts)
        until = node.children[0].type == "until"
        endless = endless_condition(condition.strip(), until)
        text = stdin.text if stdin is not None else None
        if (
            text
            and not until
            and re.match(r"(?:IFS=\S*\s+)?read\b", condition)
            and 1 < text.count("\n") <= 8
        ):
            commands: list[ShellCommand] = []  # line by line
            for line in text.strip("\n").split("\n"):
                commands.extend(
                    self.looped(
                        endless, node.children, Stream(stdin.commands, line + "\n")
                    ).commands
                )
            return Stream(tuple(commands), None)
        return self.looped(endless, node.children, stdin)

    def do_c_style_for_statement(self, node: Any, stdin: Stream | None) -> Stream:
        self.substitutions(node)
        return self.looped(
            endless_for(node.text[:200].decode("utf-8", "replace")), node.children, stdin
        )

    def do_for_statement(self, node: Any, stdin: Stream | None) -> Stream:
        name, items = node.child_by_field_name("variable"), node.children_by_field_name("value")
        variable = name.text.decode() if name is not None else ""
        source = b" ".join(item.text[:200] for item in items)
        values = [value for item in items for value in self.fields(item)]
        if node.children[0].type == "select" or not items:
            values = [f"{UNKNOWN[0]}{variable}{UNKNOWN[1]}"]
        commands: list[ShellCommand] = []
        for value in values[:6] or [""]:
            self.variables[variable] = value
            commands.extend(self.looped(many_turns(source), node.children, stdin).commands)
        return Stream(tuple(commands), None)

    def do_case_statement(self, node: Any, stdin: Stream | None) -> Stream:
        self.substitutions(node)
        return Stream(self.body(node.children, stdin).commands, None)

    def do_test_command(self, node: Any, stdin: Stream | None) -> Stream:
        self.substitutions(node)
        return Stream((), "")

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

    def do_variable_assignment(self, node: Any, stdin: Stream | None) -> Stream:
        return self.declared([":"], [node], stdin)

    def do_declaration_command(self, node: Any, stdin: Stream | None) -> Stream:
        return self.declared([node.children[0].text.decode()], node.children[1:], stdin)

    do_unset_command = do_declaration_command

    def declared(self, words: list[str], children: Iterable[Any], stdin: Stream | None) -> Stream:
        """``x=1``, ``export x=1 y``, ``unset x``."""
        assignments, longer, silent = {}, "", words == [":"]
        for child in children:
            if child.type == "variable_assignment":
                name, value = self.assign(child)
                assignments[name] = value
                words += [] if silent else [f"{name}={value}"]
                if self.loop == "endless" and grows(name, child.text.decode()):
                    longer = name
            elif child.is_named:
                words.extend(self.fields(child))
        feed = self.record(words, Line(), stdin, assignments)
        if feed.commands:
            feed.commands[0].grows = longer
        return feed

    # -- redirections

    def do_redirected_statement(self, node: Any, stdin: Stream | None) -> Stream:
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
                feed = self.record(line.words, line, stdin)
            elif body.type == "command":
                feed = self.do_command(body, stdin, line)
            else:
                feed = self.statement(body, stdin)
                # The group's redirections concern each command in it; they are noted once, with its output.
                if line.redirects:
                    self.record([":", *line.words], line, Stream(feed.commands, feed.text))
                self.remember(line, feed)
        feed = Stream((*before, *feed.commands), feed.text)
        for pipeline in line.pipelines:
            if pipeline.type == "pipeline":
                with self.within(piped=True):
                    feed = self.through(pipeline.children, feed, feed.commands)
            else:
                feed = self.body([pipeline], None)
        return feed

    def redirect(self, node: Any, line: Line, stdin: Stream | None) -> Stream | None:
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
            return Stream(tuple(self.reading.origins(text)), text + "\n")
        if not named:
            return stdin
        operator = next((child.type for child in node.children if not child.is_named), ">")
        descriptor = next(
            (c.text.decode() for c in node.children if c.type == "file_descriptor"), ""
        )
        varies = self.loop == "endless" and b"$" in node.text
        line.redirects.append(Redirect(operator, descriptor, target, varies))
        if "/dev/tcp/" in target or "/dev/udp/" in target:
            self.reading.sockets = True
        if not operator.startswith("<") or descriptor not in ("", "0"):
            return stdin
        if operator == "<&":
            return Stream((), None, f"&{target}")
        feeds = tuple(self.reading.origins(target))
        known = self.files.get(self.absolute(target)) or Stream((), self.known_text(target))
        return Stream(known.commands + feeds, known.text, target)

    def here_document(self, node: Any, line: Line, stdin: Stream | None) -> Stream:
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
            return Stream((), "")
        return Stream(
            (), body.text.decode() if start and start[0] in "'\"\\" else self.double_quoted(body, 0)
        )

    def remember(self, line: Line, feed: Stream) -> bool:
        """What a file holds after ``> file``; whether there is one."""
        targets = [
            r
            for r in line.redirects
            if r.operator in (*_OUTPUTS, ">&") and r.descriptor in ("", "1")
        ]
        for redirect in targets:
            self.store(redirect.target, feed, redirect.operator.endswith(">>"))
        return bool(targets)

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
                    noted = self.record(["cat"], line, source)
                    feed = Stream(noted.commands, source.text if source else None)
        if node.type == "command_substitution" and feed.text is not None:
            return feed.text.rstrip("\n")
        return ("/dev/fd/" if node.type == "process_substitution" else "") + self.mark(feed)

    # -- commands

    def do_command(self, node: Any, stdin: Stream | None, line: Line | None = None) -> Stream:
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
        return self.record(words + line.words, line, stdin, assignments)

    def record(
        self, words: list[str], line: Line, stdin: Stream | None, assignments: dict | None = None
    ) -> Stream:
        """Note a command with its words, then whatever it starts; returns its output."""
        feed = self.run(
            ShellCommand(
                "", words, line.redirects, stdin, self.wrappers, assignments=assignments or {}
            )
        )
        return Stream(feed.commands, "") if self.remember(line, feed) else feed

    def run(self, command: ShellCommand) -> Stream:
        """Start a command of which words, redirections, input, wrappers and assignments are known."""
        while command.argv and command.argv[0] == "":
            command.argv = command.argv[1:]
        command.argv = command.argv or [":"]
        command.name, command.reading = program_name(command.argv[0]), self.reading
        for state in ("cwd", "background", "piped", "loop"):
            setattr(command, state, getattr(self, state))
        self.reading.commands.append(command)
        if len(self.reading.commands) > MAX_COMMANDS or len(command.wrappers) > 24:
            raise Refused("too many commands")
        with self.level(), self.within(wrappers=command.wrappers):
            return self.started_by(command)

    def started_by(self, command: ShellCommand) -> Stream:
        """What starting a command leads to: other commands, a changed state, an output."""
        name, argv = command.name, command.argv
        if name in self.functions:
            if name in self.active:
                command.recursive = True
                return Stream((command,), None)
            if len(self.active) < 8:
                inner = self.call(name, argv[1:], command.stdin)
                return Stream((command, *inner.commands), inner.text)
        if name in self.aliases and name not in self.active:
            with self.within(active=[*self.active, name]):
                inner = self.nested(
                    " ".join([self.aliases[name], *map(shlex.quote, argv[1:])]), command.stdin
                )
            return Stream((command, *inner.commands), inner.text)
        if self.files:
            folders = ("",) if "/" in argv[0] else _PATH
            known = next(
                (
                    self.files[folder + argv[0]]
                    for folder in folders
                    if folder + argv[0] in self.files
                ),
                None,
            )
            known = known or (self.files.get(self.absolute(argv[0])) if "/" in argv[0] else None)
            if known is not None:
                command.script = known
                if known.text is not None:
                    return Stream(
                        (command, *self.run_file(command, argv[0], known.text, argv[1:]).commands),
                        None,
                    )
                return Stream((command,), None)
        return begin(self, command)

    def run_file(self, command: ShellCommand, path: str, text: str, arguments: list[str]) -> Stream:
        """A script that was written before: its text, unless it is being read already."""
        key = self.absolute(path)
        if key in self.running:
            command.recursive = True
            return Stream((), None)
        with self.within(running=[*self.running, key], active=[*self.active, path]):
            if text.startswith("#!") and not re.match(r"#!\s*\S*\b(?:env\s+)?\w*sh\b", text):
                command.code = text  # another language
                return self.inside(
                    command, [re.split(r"[/\s]", text.split("\n")[0].strip())[-1], path]
                )
            return self.as_wrapper(command, text, arguments, named=path)

    def inside(
        self,
        command: ShellCommand,
        argv: list[str],
        assignments: dict | None = None,
        label: str = "",
    ) -> Stream:
        if not argv:
            return Stream((command,), None)
        wrappers = (*command.wrappers, label or command.name)
        inner = ShellCommand(
            "", argv, command.redirects, command.stdin, wrappers, assignments=assignments or {}
        )
        feed = self.run(inner)
        return Stream((command, *feed.commands), feed.text)

    def nested(
        self, text: str, stdin: Stream | None, wrapper: str = "", arguments: list[str] | None = None
    ) -> Stream:
        """Read text that a shell would read."""
        if not text.strip():
            return Stream((), "")
        if self.nested_depth >= MAX_NESTED:
            raise Refused("texts nested too deeply")
        if MARK.fullmatch(text.strip()):
            return Stream((), None)
        wrappers = (*self.wrappers, wrapper) if wrapper else self.wrappers
        arguments = self.arguments if arguments is None else arguments
        with self.within(
            nested_depth=self.nested_depth + 1, wrappers=wrappers, arguments=arguments
        ):
            return self.body(parse(text).children, stdin)

    def try_nested(self, text: str, stdin: Stream | None, wrapper: str) -> Stream:
        """Like :meth:`nested` for text that may not be shell at all: then nothing is noted."""
        try:
            return self.nested(text, stdin, wrapper)
        except Refused as refused:
            if "parsable" in str(refused):
                return Stream((), None)
            raise

    def as_wrapper(
        self, command: ShellCommand, text: str, arguments: list[str], stdin: Any = ..., named=""
    ) -> Stream:
        # $0 inside sh -c is the shell itself, inside a script the script.
        active = (
            self.active if command.name in self.functions else [*self.active, named or command.name]
        )
        with self.within(wrappers=(*command.wrappers, command.name), active=active):
            feed = self.nested(text, command.stdin if stdin is ... else stdin, arguments=arguments)
        for inner in feed.commands if command.redirects else ():
            if inner.stdin is None and not inner.redirects:
                inner.redirects = command.redirects
        return feed

    def shell_text(self, command: ShellCommand, texts: list[str], stdin: Any = ...) -> Stream:
        """Texts that a program hands to a shell."""
        commands, text = [command], None
        for source in texts:
            command.code = source
            inner = self.as_wrapper(
                command, source, [], stdin=command.stdin if stdin is ... else stdin
            )
            commands.extend(inner.commands)
            text = inner.text
        return Stream(tuple(commands), text)
