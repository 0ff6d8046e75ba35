"""The words of the policy's language: each key of a selection, as a question about one command.

A selection holds where all of its keys hold. Patterns are searched in the first :data:`LONGEST` characters and compiled
when they are first asked for, so that importing the screen costs little.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

from scripts.tasks.shell.screen import paths
from scripts.tasks.shell.screen.commands import MARK, OUTPUT, ShellCommand, Stream, unknown_names
from scripts.tasks.shell.screen.paths import Places
from scripts.tasks.shell.screen.programs import Programs, names_pattern
from scripts.tasks.shell.screen.spawned_commands import after_options

LONGEST = 4096  # characters in which a pattern is looked for: the time of one with gaps grows with the square
_SUDO_VALUES = (
    *tuple(f"-{letter}" for letter in "ughpCDRrtTU"),
    "--user",
    "--group",
    "--host",
    "--prompt",
    "--chdir",
)
Test = Callable[[ShellCommand], bool]
compiled = cache(re.compile)


class Language:
    """Compiles selections; holds what they name: programs and places."""

    def __init__(self, programs: Programs, places: Places) -> None:
        self.programs, self.places = programs, places
        # In the order in which they are asked: what costs least first.
        self.predicates: dict[str, Callable[[Any], Test]] = {
            "program": self.program,
            "under": lambda names: lambda c: any(name in c.wrappers for name in names.split()),
            **{
                flag: partial(_flag, flag)
                for flag in ("background", "piped", "recursive", "hidden", "grows")
            },
            "sockets": lambda wanted: lambda c: c.reading.sockets is wanted,
            "loop": lambda kind: lambda c: c.loop == kind or (kind == "any" and c.loop != ""),
            "bare": lambda wanted: lambda c: (len(c.argv) == 1) is wanted,
            "as-root": lambda wanted: lambda c: _as_root(c) is wanted,
            "prompt": lambda wanted: lambda c: _prompt(c) is wanted,
            "option": lambda options: (lambda wanted: lambda c: c.has(*wanted))(options.split()),
            "words": lambda pattern: lambda c: _search(pattern, _words(c)),
            "subcommand": lambda pattern: (
                lambda c: (
                    compiled(pattern).match(
                        " ".join(paths.operands(c, self.programs.of(c.name))[:3])[:LONGEST]
                    )
                    is not None
                )
            ),
            "operand": lambda pattern: (
                lambda c: any(compiled(pattern).fullmatch(word) for word in c.operands)
            ),
            "value": lambda pairs: (
                lambda c: any(
                    compiled(pattern).fullmatch(value.lstrip("="))
                    for options, pattern in pairs.items()
                    for value in c.values(*options.split())
                )
            ),
            "argument": lambda pattern: (
                lambda c: any(compiled(pattern).search(w[:LONGEST]) for w in c.argv[1:])
            ),
            "varies": lambda wanted: lambda c: any(r.varies for r in c.redirects) is wanted,
            "unknown": lambda pattern: (
                lambda c: any(
                    compiled(pattern).fullmatch(name)
                    for word in c.argv
                    for name in unknown_names(word)
                )
            ),
            "sets": lambda pairs: (
                lambda c: any(
                    compiled(name).fullmatch(variable) and compiled(pattern).search(value)
                    for variable, value in c.assignments.items()
                    for name, pattern in pairs.items()
                )
            ),
            "size": _size,
            "redirects": lambda pattern: (
                lambda c: any(
                    _search(pattern, r.descriptor + r.operator + MARK.sub("", r.target))
                    for r in c.redirects
                )
            ),
            "code": lambda pattern: lambda c: c.code is not None and _search(pattern, c.code),
            "has-code": lambda wanted: lambda c: (c.code is not None) is wanted,
            **{
                effect.__name__: partial(self.touches, effect)
                for effect in (paths.deletes, paths.writes, paths.reads)
            },
            "names": partial(self.touches, self._named),
            "empties": lambda wanted: lambda c: self._empties(c) is wanted,
            "text": lambda pattern: lambda c: _search(pattern, _all_text(c)),
            "stdin-text": lambda known: (
                lambda c: (c.stdin is not None and c.stdin.text is not None) is known
            ),
            "sends": partial(self.touches, paths.network_uploads),
            "executes": partial(self.among, self._executed),
            "fed": partial(self.among, lambda c: c.reading.origins(c.stdin)),
            "from": partial(
                self.among, lambda c: c.reading.origins(c.stdin, *c.said, *c.assignments.values())
            ),
            "with": partial(self.among, lambda c: c.reading.commands),
            "any": self.any_of,
            "all": lambda inner: _all([self.selection(keys) for keys in inner]),
            "not": lambda inner: (lambda test: lambda c: not test(c))(self.any_of(inner)),
        }

    def selection(self, keys: dict[str, Any]) -> Test:
        """A selection as one test."""
        return _all([make(keys[key]) for key, make in self.predicates.items() if key in keys])

    def any_of(self, selections: Any) -> Test:
        tests = [
            self.selection(keys)
            for keys in (selections if isinstance(selections, list) else [selections])
        ]
        return tests[0] if len(tests) == 1 else lambda command: any(test(command) for test in tests)

    def among(
        self, candidates: Callable[[ShellCommand], Iterable[ShellCommand]], selections: Any
    ) -> Test:
        """Whether one of the other commands is selected."""
        test = self.any_of(selections)
        return lambda command: any(
            test(other) for other in candidates(command) if other is not command
        )

    def program(self, names: str) -> Test:
        """Whether the program is one of the names, globs and @groups."""
        groups = [name[1:] for name in names.split() if name[0] == "@"]
        pattern = names_pattern(" ".join(name for name in names.split() if name[0] != "@"))

        def test(command: ShellCommand) -> bool:
            base = command.name.rpartition("/")[2] or command.name
            named = pattern.match(base) or pattern.match(command.name)
            return bool(named) or any(self.programs.member(base, group) for group in groups)

        return test

    def touches(
        self, effect: Callable[[ShellCommand, Programs], list[paths.Touched]], spec: Any
    ) -> Test:
        """Whether a command touches one of the places in this way.

        ``tree``: with all that is below it, by an option or by a glob; ``recursive``: by an option; ``appends``: what
        was there stays; ``keys``: also what only identifies; ``anywhere``: what ``find`` finds below, other than these.
        """
        spec = {"path": spec} if isinstance(spec, str) else spec
        where, tree, appends = spec["path"], spec.get("tree"), spec.get("appends")
        recursive = spec.get("recursive")
        keys, anywhere = spec.get("keys", False), spec.get("anywhere", False)
        inside = self.places.inside

        def test(command: ShellCommand) -> bool:
            for one in effect(command, self.programs):
                if one.as_key and not keys:
                    continue
                if appends is not None and one.appends is not appends:
                    continue
                if recursive is not None and one.whole is not recursive:
                    continue
                if anywhere:
                    base, between, name = one.path.partition("/**/")
                    if (
                        between
                        and paths.ANY not in name
                        and inside(base or "/", where)
                        and not inside(name, anywhere)
                    ):
                        return True
                    continue
                if inside(one.path, where) and (tree is None or tree is one.whole):
                    return True
                base, whole = paths.trunk(one.path)
                if (
                    base != one.path
                    and inside(base, where)
                    and (tree is None or tree is (one.whole or whole))
                ):
                    return True
            return False

        return test

    def _named(self, command: ShellCommand, programs: Programs) -> list[paths.Touched]:
        words = paths.operands(command, programs.of(command.name))
        return [paths.Touched(paths.resolve(word.rpartition("=")[2], command)) for word in words]

    def _executed(self, command: ShellCommand) -> Iterator[ShellCommand]:
        """The commands that made what a shell or interpreter runs."""
        sources: list[object] = [command.script]
        if command.name in ("eval", "source", ".") or (
            command.code is not None and OUTPUT[0] in command.code
        ):
            sources += [*command.argv[1:], command.code]
        if OUTPUT[0] in command.argv[0]:
            sources.append(command.argv[0])
        for name in ("LD_PRELOAD", "LD_AUDIT", "BASH_ENV"):
            sources.append(command.reading.files.get(command.assignments.get(name, "")))
        if command.name in ("insmod", "gcc", "cc", "clang"):
            sources += [command.reading.files.get(word) for word in command.argv[1:]]
        return command.reading.origins(*sources)

    def _empties(self, command: ShellCommand) -> bool:
        """Whether what is written is nothing, or the null device."""
        if command.name in ("echo", "printf"):
            return not "".join(word for word in command.argv[1:] if word[:1] != "-").strip("\\n ")
        if command.name not in ("cat", "dd", "cp", "tee", "sponge"):
            return command.name in (":", "true", "truncate", "shred", "ln", "mv", "rm")
        feed = command.stdin or Stream()
        return (
            any(null in word for word in command.argv[1:] for null in ("/dev/null", "/dev/zero"))
            or feed.path == "/dev/null"
            or (feed.text is not None and not feed.text.strip())
            or any(origin.argv[-1] == "/dev/null" for origin in feed.commands)
        )


def _all(tests: list[Test]) -> Test:
    return tests[0] if len(tests) == 1 else lambda command: all(test(command) for test in tests)


def _flag(name: str, wanted: bool) -> Test:
    return lambda command: bool(getattr(command, name)) is wanted


def _search(pattern: str, text: str) -> bool:
    return compiled(pattern).search(text[:LONGEST]) is not None


def _words(command: ShellCommand) -> str:
    if "words" not in command.memo:
        command.memo["words"] = MARK.sub("", " ".join(command.argv[1:]))[:LONGEST]
    return command.memo["words"]


def _all_text(command: ShellCommand) -> str:
    """A command's words and what is known of its input."""
    given = command.stdin.text if command.stdin is not None and command.stdin.text else ""
    return _words(command) + " " + given[:LONGEST]


def _as_root(command: ShellCommand) -> bool:
    """Whether a command runs with root's rights: under sudo and its like, in no container, as nobody else."""
    if "container" in command.wrappers or {
        "sudo",
        "doas",
        "pkexec",
        "su",
        "runuser",
        "gosu",
    }.isdisjoint(command.wrappers):
        return False
    for outer in command.reading.commands:
        users: list[str] = []
        if outer.name in ("sudo", "doas", "runuser") and outer is not command:
            own = outer.argv[: len(outer.argv) - len(after_options(outer.argv[1:], _SUDO_VALUES))]
            users = [
                user.lstrip("=") for user in ShellCommand(outer.name, own).values("-u", "--user")
            ]
        elif outer.name == "su":
            values = outer.values("-c", "--command", "-s", "--shell", "-g")
            users = [word for word in outer.operands if word not in (*values, "-")]
        if users and users[0] not in ("root", "0", "#0"):
            return False
    return True


def _prompt(command: ShellCommand) -> bool:
    """A shell or interpreter that has neither text nor a file to run: it asks whoever sits at its input."""
    if command.code is not None or any(word[:1] != "-" for word in command.argv[1:]):
        return False
    given = command.stdin
    if given is None:
        return command.script is None
    typed = (given.path or "").startswith(("&", "@", "/dev/tty", "/dev/stdin"))
    return (
        given.text is None
        and given.path is not None
        and (typed or any(o.name == "tty" for o in given.commands))
    )


_UNITS = {
    "": 1,
    "c": 1,
    "b": 512,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "p": 1 << 50,
    "e": 1 << 60,
}


def _bytes(text: str) -> int:
    """``10G`` in bytes; 0 where it is no size."""
    match = re.fullmatch(r"=?\+?(\d{1,18})([cbkmgtpe]?)(?:i?b)?", text.lower())
    return int(match[1]) * _UNITS[match[2]] if match else 0


def _size(spec: dict[str, str]) -> Test:
    """Whether the value of one of the options reaches a size."""
    options, least = spec["options"].split(), _bytes(spec["least"])
    return lambda command: any(_bytes(value) >= least for value in command.values(*options))
