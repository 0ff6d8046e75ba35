"""What is known of a shell command once it is read: its words, redirections and input, and where each came from.

What is not known stays visible in the words, as marks of Unicode's private use area: :data:`UNKNOWN` encloses the name
of a variable, :data:`OUTPUT` the number of a substitution in ``Parsed.outputs``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = ("\ue000", "\ue001")
OUTPUT = ("\ue002", "\ue003")
MARK = re.compile("\ue000([^\ue000-\ue003]*)\ue001|\ue002([0-9]+)\ue003")
MAX_TEXT = 65_536  # characters of an output that is followed
HOME = "/home/user"


class Refused(Exception):
    """The text can't be read: not shell, or beyond a limit. The message says which."""


@dataclass(slots=True)
class Stream:
    """What stands at a standard input or came out of a substitution: who wrote it; its text, where that follows from
    the words alone; the file that it is, ``&3`` for a descriptor."""

    commands: tuple[ShellCommand, ...] = ()
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
class ShellCommand:
    """One simple command with its words resolved."""

    name: str  # without quotes and the system's folders: /usr/bin/rm is rm, ./rm stays
    argv: list[str]
    redirects: list[Redirect] = field(default_factory=list)
    stdin: Stream | None = None
    wrappers: tuple[str, ...] = ()  # what starts it, outermost first
    cwd: str | None = None  # None where unknown
    background: bool = False
    piped: bool = False
    loop: str = ""  # "", "loop", "endless": what surrounds it
    recursive: bool = False
    grows: str = ""  # the variable that it makes longer, as x=$x$x does
    code: str | None = None  # the text handed to an interpreter
    script: Stream | None = None  # what is known about the file that it executes
    hidden: bool = False  # its output is known text, changed beyond what is followed
    assignments: dict[str, str] = field(default_factory=dict)
    reading: Parsed = None  # type: ignore[assignment]
    memo: dict[str, Any] = field(default_factory=dict)  # what was worked out about it once

    def options(self) -> tuple[str, list[str], list[str]]:
        """Letters of the short options, the long options as written, and the operands, in the manner of getopt."""
        if "options" not in self.memo:
            words, after = self.argv[1:], []
            if "--" in words:
                words, after = words[: words.index("--")], words[words.index("--") + 1 :]
            short = "".join(word[1:] for word in words if word[:1] == "-" != word[1:2])
            long = [word for word in words if word[:2] == "--"]
            self.memo["options"] = (
                short,
                long,
                [w for w in words if w[:1] != "-" or w == "-"] + after,
            )
        return self.memo["options"]

    def has(self, *options: str) -> bool:
        """Whether one of the options is given: ``-r`` (also among ``-vr``), ``--recursive`` (or an abbreviation of
        it), or another word as it stands (``-delete``, ``+o``)."""
        short, long, _ = self.options()
        for option in options:
            if option[:2] == "--" and len(option) > 2:
                if any(
                    option.startswith(given.partition("=")[0]) and len(given) > 3 for given in long
                ):
                    return True
            elif option in self.argv or (
                len(option) == 2 and option[0] == "-" and option[1] in short
            ):
                return True
        return False

    def values(self, *options: str) -> list[str]:
        """All values of the options given as ``-o v``, ``-ov``, ``-xo v``, ``--opt v``, ``--opt=v`` or ``opt=v``."""
        words = []
        for position, word in enumerate(self.argv[1:], 1):
            for option in options:
                after = word[len(option) :] if word.startswith(option) else None
                letter = len(option) == 2 and word[:1] == "-" != word[1:2]
                if after == "" and option[-1] != "=":
                    words.extend(self.argv[position + 1 : position + 2])
                elif after and (option[-1] == "=" or after[0] == "=" or letter):
                    words.append(after.removeprefix("="))
                elif letter and word[-1] == option[1] and word[1:].isalpha():
                    words.extend(self.argv[position + 1 : position + 2])
        return words

    @property
    def said(self) -> list[str]:
        """The words and where they redirect to."""
        return [*self.argv, *(redirect.target for redirect in self.redirects)]

    @property
    def operands(self) -> list[str]:
        return self.options()[2]


@dataclass(slots=True)
class Parsed:
    """All that was noted about a text."""

    commands: list[ShellCommand] = field(default_factory=list)
    outputs: list[Stream] = field(default_factory=list)
    sockets: bool = False  # a descriptor was opened on /dev/tcp or /dev/udp
    files: dict[str, Stream] = field(
        default_factory=dict
    )  # what was written where, by the tidied path

    def origins(self, *items: Any, seen: set[int] | None = None) -> Iterator[ShellCommand]:
        """Yield every command that contributed to the words, feeds or commands given."""
        seen = set() if seen is None else seen
        for item in items:
            if isinstance(item, str):
                numbers = (
                    [int(match[2]) for match in MARK.finditer(item) if match[2]]
                    if OUTPUT[0] in item
                    else ()
                )
                yield from self.origins(
                    *(self.outputs[n] for n in numbers if n < len(self.outputs)), seen=seen
                )
            elif isinstance(item, Stream):
                yield from self.origins(*item.commands, item.path, seen=seen)
            elif item is not None and id(item) not in seen:
                seen.add(id(item))
                yield item
                yield from self.origins(*item.argv, item.stdin, seen=seen)


def unknown_names(word: str) -> list[str]:
    """Names of the variables in a word whose values are not known."""
    return [match[1] for match in MARK.finditer(word) if match[1] is not None]


_ANSI = re.compile(
    r"\\(?:0?([0-7]{1,3})|x([0-9a-fA-F]{1,2})|[uU]([0-9a-fA-F]{1,8})|c(.)|(.))", re.DOTALL
)
_CONTROL = dict(zip("abeEfnrtv", "\a\b\033\033\f\n\r\t\v", strict=True))


def ansi(text: str) -> str:
    """Backslash sequences of ``$'...'``, ``printf`` and ``echo -e``."""

    def one(match: re.Match) -> str:
        octal, short, long, control, char = match.groups()
        if char or control:
            return (
                chr(ord(control) & 0x1F)
                if control
                else _CONTROL.get(char, char if char in "\\'\"?" else match[0])
            )
        code = int(octal, 8) if octal else int(short or long, 16)
        return chr(code) if 0 < code < 0xD800 else ""

    return _ANSI.sub(one, text) if "\\" in text else text


def tilde(text: str) -> str:
    name = re.match(r"~([A-Za-z_][\w-]*)?(?=/|$)", text)
    folder = (
        HOME
        if name is None or not name[1]
        else "/root"
        if name[1] == "root"
        else f"/home/{name[1]}"
    )
    return folder + text[name.end() :] if name else text
