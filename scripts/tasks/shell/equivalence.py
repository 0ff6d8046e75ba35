"""Which commands do the same although they are written in another way. Nothing is run.

Each command is parsed by shfmt and brought into one form by rules: quotes that change nothing go; a program's options
stand in one order, by the table ``config/equivalence.yaml``; the tests of ``find`` stand in one order wherever no
action is between them. Two commands do the same if their forms are equal. Where no rule is known to hold, a command
keeps its words as they stand, so that a wrong "equal" is rarer than a missed one.
"""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dryfit.common.files import read_yaml
from scripts.common.code_digests import ROOT
from scripts.tasks.shell import find_expression
from scripts.tasks.shell.find_expression import NoRule
from scripts.tasks.shell.syntax import find_shfmt

TABLE = ROOT / "config" / "equivalence.yaml"
GLOB = frozenset("*?[]")  # these mean themselves where they are quoted
_PLACES = frozenset(
    ("Pos", "End", "ValuePos", "ValueEnd", "Left", "Right", "OpPos", "Position", "Semicolon")
)
# A word: a text that the shell passes on as it stands, or a tuple of parts where it may become something else.
Word = str | tuple


@dataclass(frozen=True)
class OptionRules:
    """What is known of a program's options: a row of ``config/equivalence.yaml``."""

    flags: str = ""
    values: str = ""
    long: Any = ()
    long_values: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    number: str | None = None
    defaults: Any = ()
    bare_path: str | None = None
    options_first: bool = False

    def takes_value(self, name: str) -> bool:
        return name in self.long_values or (len(name) == 1 and name in self.values)


@cache
def options_table() -> dict[str, OptionRules]:
    """The rows of ``config/equivalence.yaml`` by program."""
    rows = {}
    for program, row in read_yaml(TABLE).items():
        lists = {key: tuple(row[key]) for key in ("long_values", "overrides") if key in row}
        rows[program] = OptionRules(**{**row, **lists})
    return rows


def same(first: str, second: str) -> bool:
    """Whether two commands are known to do the same; False where one can't be parsed."""
    if first.strip() == second.strip():
        return bool(first.strip())
    form = canonical(first)
    return form is not None and form == canonical(second)


@cache
def canonical(command: str) -> Any:
    """The form that commands which do the same have in common; None for a text that Bash can't parse."""
    done = subprocess.run(
        [find_shfmt(), "--language-dialect", "bash", "--to-json"],
        input=command.encode("utf-8", "surrogatepass"),
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        return None
    statements = json.loads(done.stdout).get("Stmts", [])
    return tuple(_form(statement) for statement in statements) or None


def _form(node: Any) -> Any:
    """A part of the syntax tree, hashable, with its commands in their canonical forms."""
    if isinstance(node, list):
        return tuple(_form(part) for part in node)
    if not isinstance(node, dict):
        return node
    if node.get("Type") == "CallExpr":
        return _call(node)
    if node.get("Op") in (">", ">>", "<", ">&", "<&", "&>") and "Word" in node:
        return _redirection(node)
    parts = [(key, _form(part)) for key, part in node.items() if key not in _PLACES]
    return tuple(sorted(parts, key=lambda part: part[0]))


def _raw(node: Any) -> Any:
    """A part of the syntax tree as it stands, without the places in the text."""
    if isinstance(node, list):
        return tuple(_raw(part) for part in node)
    if isinstance(node, dict):
        parts = [(key, _raw(part)) for key, part in node.items() if key not in _PLACES]
        return tuple(sorted(parts, key=lambda part: part[0]))
    return node


def _redirection(node: dict[str, Any]) -> tuple:
    descriptor = _raw(node.get("N"))
    return ("redirection", node["Op"], descriptor, _word(node["Word"]), _raw(node.get("Hdoc")))


def _call(node: dict[str, Any]) -> tuple:
    words = [_word(word) for word in node.get("Args", [])]
    return ("call", _raw(node.get("Assigns", [])), _arguments(words))


def _arguments(words: list[Word]) -> tuple:
    """A program's words in canonical order, or as they stand where no rule is known."""
    if words[:1] == ["sudo"] and len(words) > 1 and not _is_option(words[1]):
        return ("sudo", _arguments(words[1:]))
    try:
        if words[:1] == ["find"]:
            return ("find", *find_expression.canonical(words[1:]))
        if words and words[0] in options_table():
            return _by_options(words)
    except NoRule:
        pass
    return ("words", *words)


# --- words ------------------------------------------------------------------------------------------------------------


def _word(node: dict[str, Any]) -> Word:
    """A word without the quotes that change nothing."""
    signs: list[Any] = []  # (character, whether it is quoted), or a part that is computed
    for part in node["Parts"]:
        signs += _signs(part, quoted=False)
    return _without_idle_quotes(signs)


def _signs(part: dict[str, Any], quoted: bool) -> list[Any]:
    kind = part["Type"]
    if kind == "Lit":
        return _literal(part["Value"], quoted)
    if kind == "SglQuoted" and not part.get("Dollar"):
        return [("", True)] + [(sign, True) for sign in part.get("Value", "")]
    if kind == "DblQuoted" and not part.get("Dollar"):
        found: list[Any] = [("", True)]
        for inner in part.get("Parts", []):
            found += _signs(inner, quoted=True)
        return found
    if kind == "CmdSubst":
        return [("computed", quoted, _form(part["Stmts"]))]
    return [("computed", quoted, _raw(part))]


def _literal(text: str, quoted: bool) -> list[tuple[str, bool]]:
    """The characters of a literal; a backslash quotes the next one, in double quotes only what is special there."""
    found = []
    position = 0
    while position < len(text):
        sign = text[position]
        following = text[position + 1 : position + 2]
        escapes = sign == "\\" and following and (not quoted or following in '$`"\\')
        if escapes:
            found.append((following, True))
            position += 2
        else:
            found.append((sign, quoted))
            position += 1
    return found


def _without_idle_quotes(signs: list[Any]) -> Word:
    computed = any(sign[0] == "computed" for sign in signs)
    plain = "".join(sign[0] for sign in signs if not sign[1] and sign[0] != "computed")
    expands = bool(re.search(r"\{.*(,|\.\.).*\}", plain))
    special = GLOB | (frozenset("{},.") if expands else frozenset())
    kept: list[Any] = []
    for number, sign in enumerate(signs):
        if sign[0] == "computed":
            kept.append(sign)
        elif sign[0]:
            tilde = sign[0] == "~" and number == 0
            kept.append((sign[0], not sign[1] and (sign[0] in special or tilde)))
    if computed or any(sign[1] for sign in kept):
        return tuple(kept)
    return "".join(sign[0] for sign in kept)


def _is_option(word: Word) -> bool:
    return isinstance(word, str) and len(word) > 1 and word.startswith("-")


# --- options ----------------------------------------------------------------------------------------------------------


def _by_options(words: list[Word]) -> tuple:
    """A program's flags, values and operands, each in canonical order.

    NoRule: for an option that the table does not know, or for two of which the last one wins.
    """
    program = str(words[0])
    options = options_table()[program]
    flags, values, operands = _read_options(program, options, words[1:])
    given = "".join(flags) + "".join(name for name, _ in values if len(name) == 1)
    for group in options.overrides:
        if len(set(group) & set(given)) > 1:
            raise NoRule(program)
    values = [(name, value) for name, value in values if dict(options.defaults).get(name) != value]
    if program == "tar":
        _check_tar(flags, values, operands)
    if program == "grep":
        values, operands = _grep_pattern(values, operands)
    if options.bare_path is not None and not set(options.bare_path) & set(flags):
        operands = [_bare(operand) for operand in operands]
    # Sorting is stable: of the same option given twice, the order stays.
    ordered = sorted(values, key=lambda value: value[0])
    return (program, tuple(sorted(flags)), tuple(ordered), tuple(operands))


def _read_options(
    program: str, options: OptionRules, words: Sequence[Word]
) -> tuple[list[str], list[tuple[str, Word]], list[Word]]:
    """Flags, values and operands in the order in which they are given."""
    flags: list[str] = []
    values: list[tuple[str, Word]] = []
    operands: list[Word] = []
    waiting: list[str] = []  # options whose value is the next word
    for number, word in enumerate(words):
        if waiting:
            values.append((waiting.pop(0), word))
        elif program == "tar" and number == 0 and isinstance(word, str) and word.isalpha():
            waiting = _tar_bundle(options, word, flags)
        elif not isinstance(word, str):
            _refuse_hidden_option(word)
            operands.append(word)
        elif word == "--":
            operands += words[number + 1 :]
            break
        elif options.options_first and operands:
            operands.append(word)
        elif word.startswith("--"):
            waiting = _long(options, word, flags, values)
        elif len(word) > 1 and word.startswith("-"):
            waiting = _short(options, word, flags, values)
        else:
            operands.append(word)
    if waiting:
        raise NoRule(program)
    return flags, values, operands


def _refuse_hidden_option(word: tuple) -> None:
    """A word that is computed may turn out to be an option: ``$flags``, or a file that is called ``-r``."""
    first = word[0]
    if first[0] == "computed" and not first[1]:
        raise NoRule("computed")


def _tar_bundle(options: OptionRules, word: str, flags: list[str]) -> list[str]:
    """tar's first word without a dash: the values of its letters follow in their order."""
    waiting = []
    for letter in word:
        if letter in options.values:
            waiting.append(letter)
        elif letter in options.flags:
            flags.append(letter)
        else:
            raise NoRule(letter)
    return waiting


def _long(
    options: OptionRules, word: str, flags: list[str], values: list[tuple[str, Word]]
) -> list[str]:
    name, equals, value = word[2:].partition("=")
    letter = dict(options.long).get(name)
    if letter is None:
        raise NoRule(word)
    if not options.takes_value(letter):
        if equals:
            raise NoRule(word)
        flags.append(letter)
        return []
    if not equals:
        return [letter]
    values.append((letter, value))
    return []


def _short(
    options: OptionRules, word: str, flags: list[str], values: list[tuple[str, Word]]
) -> list[str]:
    if options.number and word[1:].isdigit():
        values.append((options.number, word[1:]))
        return []
    for position, letter in enumerate(word[1:], 1):
        if letter in options.values:
            rest = word[position + 1 :]
            if not rest:
                return [letter]
            values.append((letter, rest))
            return []
        if letter not in options.flags:
            raise NoRule(word)
        flags.append(letter)
    return []


def _check_tar(flags: list[str], values: list[tuple[str, Word]], operands: list[Word]) -> None:
    """``-C`` counts from where it stands, so its place matters beside operands."""
    changes_folder = any(name == "C" for name, _ in values)
    if changes_folder and operands:
        raise NoRule("tar")
    if not set(flags) & set("cxtru"):
        raise NoRule("tar")


def _grep_pattern(
    values: list[tuple[str, Word]], operands: list[Word]
) -> tuple[list[tuple[str, Word]], list[Word]]:
    """One ``-e pattern`` is the same as the pattern as first operand."""
    patterns = [value for name, value in values if name == "e"]
    if len(patterns) != 1 or any(name == "f" for name, _ in values):
        return values, operands
    return [value for value in values if value[0] != "e"], [patterns[0], *operands]


def _bare(operand: Word) -> Word:
    """A path without a leading ``./``, unless it then could be an option."""
    if not isinstance(operand, str):
        return operand
    bare = re.sub(r"^(?:\./+)+(?=[^/])", "", operand)
    return operand if bare.startswith("-") else bare
