"""The expression of ``find`` in one form, however its tests are ordered.

``find`` (GNU findutils 4.9, find(1)) evaluates an expression from left to right. Tests have no effect, so their order
among each other changes nothing that is printed or done. Actions have one: what stands before an action decides whether
it happens, and it stays before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

Word = str | tuple

_LONE_TESTS = frozenset(
    "-empty -true -false -nouser -nogroup -readable -writable -executable".split()
)
_TESTS = frozenset(
    "-name -iname -path -ipath -wholename -iwholename -type -xtype -size -mtime -atime -ctime -mmin -amin -cmin -newer"
    " -anewer -cnewer -newermt -perm -user -group -uid -gid -links -inum -samefile -fstype -lname -ilname".split()
)
_GLOBAL = frozenset(("-maxdepth", "-mindepth"))  # these hold for all, wherever they stand
_LONE_GLOBAL = frozenset(("-xdev", "-mount", "-depth"))
_LONE_ACTIONS = frozenset(("-print", "-print0", "-ls", "-delete", "-prune", "-quit"))
_ACTIONS = frozenset(("-printf", "-fprint", "-fprint0", "-fls"))
_COMMANDS = frozenset(("-exec", "-execdir", "-ok", "-okdir"))
_SAME_NAME = {"-mount": "-xdev", "-wholename": "-path", "-iwholename": "-ipath"}
_STARTS = ("-", "(", ")", "!", ",")

# A node is ("test", words), ("action", words), ("not", node), ("and", nodes) or ("or", nodes).
Node = tuple[str, Any]


class NoRule(Exception):
    """A command is written in a way that no rule covers."""


def canonical(words: Sequence[Word]) -> tuple:
    """The starting points, the global options and the expression of a ``find``, without its name.

    NoRule: for an option or a test that is not known, or for one whose place matters.
    """
    start = 0
    while start < len(words) and not _starts_expression(words[start]):
        start += 1
    if start < len(words) and words[start] in ("-L", "-H", "-P", "-D"):
        raise NoRule(words[start])
    points = tuple(words[:start]) or (".",)
    parser = _Parser(list(words[start:]))
    node = parser.expression() if parser.words else ("and", ())
    if parser.words:
        raise NoRule(parser.words[0])
    node = _ordered(node)
    options = tuple(sorted(parser.globals))
    if len({name for name, _ in options}) < len(options):
        raise NoRule("a global option twice")
    return (points, options, _without_default_print(node))


def _starts_expression(word: Word) -> bool:
    return isinstance(word, str) and word.startswith(_STARTS) and word != "-"


class _Parser:
    """Reads an expression by the precedence of find(1): parentheses, not, and, or."""

    def __init__(self, words: list[Word]) -> None:
        self.words = words
        self.globals: list[tuple[str, Word]] = []
        self._depth = 0

    def _next(self) -> Word:
        if not self.words:
            raise NoRule("an incomplete expression")
        return self.words.pop(0)

    def _word(self) -> str:
        word = self._next()
        if not isinstance(word, str):
            raise NoRule("a computed word")
        return word

    def expression(self) -> Node:
        """Alternatives parted by ``-o``."""
        nodes = [self._all()]
        while self.words and self.words[0] in ("-o", "-or"):
            self.words.pop(0)
            nodes.append(self._all())
        if len(nodes) > 1 and self.globals and not self._depth:
            raise NoRule("a global option in an alternative")
        return nodes[0] if len(nodes) == 1 else ("or", tuple(nodes))

    def _all(self) -> Node:
        nodes: list[Node] = []
        while self.words and self.words[0] not in ("-o", "-or", ")"):
            if self.words[0] in ("-a", "-and"):
                if not nodes:
                    raise NoRule("-a")
                self.words.pop(0)
            node = self._one()
            if node is not None:
                nodes.append(node)
        return ("and", tuple(nodes))

    def _one(self) -> Node | None:
        """A test, an action, a negation or a group; None for a global option, which is kept apart."""
        word = self._word()
        if word in ("!", "-not"):
            node = self._inside(self._one)
            if node is None:
                raise NoRule(word)
            return ("not", node)
        if word == "(":
            node = self._inside(self.expression)
            if self._word() != ")":
                raise NoRule("(")
            return node
        name = _SAME_NAME.get(word, word)
        if name in _LONE_TESTS:
            return ("test", (name,))
        if name in _TESTS:
            return ("test", (name, self._next()))
        if name in _GLOBAL or name in _LONE_GLOBAL:
            if self._depth:
                raise NoRule(name)
            self.globals.append((name, self._next() if name in _GLOBAL else ""))
            return None
        if name in _LONE_ACTIONS:
            return ("action", (name,))
        if name in _ACTIONS:
            return ("action", (name, self._next()))
        if name in _COMMANDS:
            return ("action", (name, *self._command()))
        raise NoRule(name)

    def _inside(self, read: Callable[[], Any]) -> Any:
        self._depth += 1
        node = read()
        self._depth -= 1
        return node

    def _command(self) -> list[Word]:
        """The words of ``-exec`` up to ``;`` or ``{} +``."""
        found = [self._next()]
        while found[-1] != ";" and found[-2:] != ["{}", "+"]:
            found.append(self._next())
        return found


def _is_pure(node: Node) -> bool:
    """Whether a node has no effect, so that its place among others without effect is free."""
    kind, content = node
    if kind == "not":
        return _is_pure(content)
    if kind in ("and", "or"):
        return all(_is_pure(one) for one in content)
    return kind == "test"


def _ordered(node: Node) -> Node:
    """The node with its tests in one order, each once."""
    kind, content = node
    if kind == "not":
        inner = _ordered(content)
        if inner[0] == "not":
            return inner[1]
        return ("not", inner)
    if kind not in ("and", "or"):
        return node
    flat: list[Node] = []
    for one in content:
        one = _ordered(one)
        flat += one[1] if one[0] == kind else [one]
    if kind == "or":
        ordered = _sorted(flat) if all(_is_pure(one) for one in flat) else flat
    else:
        ordered = _runs_sorted(flat)
    return ordered[0] if len(ordered) == 1 else (kind, tuple(ordered))


def _sorted(nodes: Sequence[Node]) -> list[Node]:
    return sorted(dict.fromkeys(nodes), key=repr)


def _runs_sorted(nodes: Sequence[Node]) -> list[Node]:
    """Each run of nodes without an effect sorted; actions keep their places."""
    found: list[Node] = []
    run: list[Node] = []
    for node in nodes:
        if _is_pure(node):
            run.append(node)
            continue
        found += [*_sorted(run), node]
        run = []
    return found + _sorted(run)


def _without_default_print(node: Node) -> Node:
    """``-print`` at the end of an expression without another action is what ``find`` does anyway."""
    if node == ("action", ("-print",)):
        return ("and", ())
    kind, content = node
    if kind != "and" or not content or content[-1] != ("action", ("-print",)):
        return node
    rest = content[:-1]
    if not all(_is_pure(one) for one in rest):
        return node
    return rest[0] if len(rest) == 1 else ("and", rest)
