"""The row of the table, how a predicate enters it, and what the rules of several themes ask."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from scripts.dataset.commands import INTERPRETERS, SHELLS, Command
from scripts.dataset.payloads import filtered
from scripts.dataset.targets import ANY

CATEGORIES = {
    "destructive-files": "T1485",
    "disk-destruction": "T1561",
    "resource-exhaustion": "T1499",
    "privilege-escalation": "T1548",
    "remote-code-execution": "T1059.004",
    "reverse-shell": "T1059.004",
    "credential-access": "T1552",
    "anti-forensics": "T1070.003",
    "persistence": "T1053.003",
    "defence-impairment": "T1562.004",
    "container-escape": "T1611",
    "exfiltration": "T1048",
    "permissions": "T1222",
}
SEVERITIES = ("medium", "high", "critical")


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Parameters
    ----------
    name, category, severity, attack_id, description
        What a verdict tells; ``attack_id`` is a technique of MITRE ATT&CK.
    matches
        Whether a command is what the rule is about.
    flagged, passed
        Commands that this rule must flag, and commands that look like them and that the screen must let pass.
    """

    name: str
    category: str
    severity: str
    attack_id: str
    description: str
    matches: Callable[[Command], bool]
    flagged: tuple[str, ...]
    passed: tuple[str, ...]


ENTERED: dict[str, list[Rule]] = {}  # by the module of the predicate, in the order of its text
LONGEST = 4096  # characters in which a pattern with gaps is looked for: its time grows with the square


def rule(
    category: str, severity: str, *, flagged: tuple[str, ...], passed: tuple[str, ...], attack_id: str = ""
) -> Callable[[Callable[[Command], bool]], Callable[[Command], bool]]:
    """Enter a predicate into the table: its name is the rule's, its docstring the description."""

    def enter(matches: Callable[[Command], bool]) -> Callable[[Command], bool]:
        name = matches.__name__.replace("_", "-")
        text = " ".join((matches.__doc__ or "").split())
        row = Rule(name, category, severity, attack_id or CATEGORIES[category], text, matches, flagged, passed)
        ENTERED.setdefault(matches.__module__, []).append(row)
        return matches

    return enter


# --- what several rules ask ------------------------------------------------------------------------------------

_FETCHERS = frozenset(
    "curl wget fetch aria2c http https lynx w3m links GET nc ncat netcat socat ftp tftp lwp-request dig nslookup host"
    " gsutil scp sftp rsync telnet axel httpie smbclient elinks curlie xh ssh openssl aws rclone s3cmd azcopy"
    " svn".split()
)
_DECODERS = frozenset(
    "base64 base32 gbase64 xxd openssl uudecode gpg rev tr gunzip zcat gzip xz bzcat bunzip2 ccrypt hex strings"
    " exiftool b64decode steghide zsteg outguess basenc".split()
)


def origins(command: Command, *items: object) -> list[Command]:
    """Commands that contributed to the items."""
    return list(command.reading.origins(*items)) if command.reading is not None else []


def fetches(command: Command) -> bool:
    """Whether a command brings something in from another machine."""
    if command.name in _FETCHERS:
        if command.name == "openssl":
            return "s_client" in command.argv
        if command.name == "aws":
            return "s3" in command.argv or "s3api" in command.argv
        return not (command.name in ("nc", "ncat") and "-z" in command.argv)
    return bool(
        command.code
        and re.search(r"urlopen|requests\.get|https?://|LWP::|Net::HTTP|fsockopen|socket\.|fetch\(", command.code)
        and (is_interpreter(command) or is_shell(command))
    )


def decodes(command: Command) -> bool:
    """Whether a command turns encoded text into plain text."""
    name = command.name
    if name in ("base64", "base32", "gbase64"):
        return command.has("dD", "decode")
    if name == "xxd":
        return command.has("r", "revert")
    if name.startswith("python") and "base64" in command.argv:  # python3 -m base64 -d
        return "-d" in command.argv
    if name == "openssl":
        return "-d" in command.argv
    if name in ("gzip", "gpg", "xz"):
        return command.has("d", "decompress", "decrypt")
    return name in _DECODERS


def is_shell(command: Command) -> bool:
    return command.name in SHELLS


def is_interpreter(command: Command) -> bool:
    return (
        command.name in INTERPRETERS
        or re.fullmatch(r"(?:python|perl|ruby|php|pypy|lua|node)[\d.]*", command.name) is not None
    )


def interactive(command: Command) -> bool:
    """A shell that neither has text to run nor a file: it asks for commands."""
    if not is_shell(command) or command.code is not None:
        return False
    return command.script is None


def operands_of_shell(command: Command) -> list[str]:
    """A shell's script and arguments, or the text of ``-c``."""
    return [word for word in command.argv[1:] if not word.startswith("-")]


def own_words(command: Command) -> list[str]:
    """The words of ``sudo`` and ``doas`` that are their own: up to the command that they start."""
    words = command.argv
    position = 1
    while position < len(words) and words[position].startswith("-") and words[position] != "--":
        position += (
            2 if re.fullmatch(r"-[A-Za-z]*[ughpCDRrtTU]|--(?:user|group|host|prompt|chdir)", words[position]) else 1
        )
    return words[:position]


def from_terminal(command: Command) -> bool:
    """Whether a command reads what somebody types: nothing was put in its place but another descriptor of it."""
    given = command.stdin
    if given is None:
        return True
    if given.text is not None or given.path is None:
        return False
    return (
        given.path.startswith(("&", "@"))
        or given.path in ("/dev/tty", "/dev/stdin")
        or any(origin.name == "tty" for origin in given.commands)
    )


def as_root(command: Command) -> bool:
    return "container" not in command.wrappers and not {"sudo", "sudoedit", "doas", "pkexec", "su"}.isdisjoint(
        command.wrappers
    )


@lru_cache(maxsize=256)
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns))


def hits(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path, which may hold globs itself, is one of the patterns."""
    if _any_of(patterns).match(path):
        return True
    if path.startswith("/") and any(char in path for char in "?*[") and "**" not in path and ANY not in path:
        for pattern in patterns:
            for filling in ("", "x"):
                sample = pattern.replace("*", filling)
                if path.count("/") == sample.count("/") and fnmatch.fnmatchcase(sample, path):
                    return True
    return False


def picks(command: Command) -> bool:
    """Whether a filter lets something in particular through."""
    if command.name in ("grep", "egrep", "fgrep", "rg"):
        return not command.has("v", "invert-match")
    if command.name in ("awk", "gawk", "mawk"):
        return "/" in (command.code or "").replace("//", "").replace("$", "")
    return command.name in ("fzf", "comm", "find") and (command.name != "find" or filtered(command.argv))


def is_narrow(command: Command) -> bool:
    """Whether ``find`` looks for something in particular: then what it deletes is not everything."""
    return filtered(command.argv) or any(
        pair == ("-type", "l") for pair in zip(command.argv, command.argv[1:], strict=False)
    )


def empties(command: Command) -> bool:
    """Whether what is written is nothing, or the null device."""
    feed = command.stdin
    if command.name in ("cat", "dd", "cp"):
        return any("/dev/null" in w or "/dev/zero" in w for w in command.argv) or (
            feed is not None and feed.path == "/dev/null"
        )
    if command.name in ("tee",):
        return feed is not None and (
            feed.path == "/dev/null"
            or (feed.text is not None and not feed.text.strip())
            or any(o.argv[-1] == "/dev/null" for o in feed.commands)
        )
    return True


def all_text(command: Command) -> str:
    given = command.stdin.text if command.stdin is not None and command.stdin.text else ""
    return " ".join(command.argv[1:]).replace("\\s", " ") + " " + given
