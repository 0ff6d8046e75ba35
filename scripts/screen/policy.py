"""The policy: rules, places and facts about programs, read from YAML, checked, compiled and asked.

``config/screen/*.yaml`` is the project's own. Files of a team are laid over it: a rule of the same id replaces one,
``disable`` switches some off, ``groups``, ``places`` and ``programs`` are added to. Every rule carries its tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from scripts.common.digests import ROOT
from scripts.common.errors import UserError
from scripts.screen.commands import Command, Refused
from scripts.screen.paths import Places
from scripts.screen.predicates import Language, Test
from scripts.screen.programs import Programs
from scripts.screen.reader import read

FOLDER = ROOT / "config" / "screen"
SCHEMA = FOLDER / "schema.yaml"
LEVELS = ("medium", "high", "critical")
_PATTERNS = ("words", "subcommand", "operand", "argument", "unknown", "redirects", "code", "text", "inside-file")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the screen says.

    Parameters
    ----------
    status
        ``ok``, ``danger`` or ``unparsable``.
    category, rule, level, attack, title
        Of the most severe rule that matches; None unless ``danger``. ``attack`` is a technique of MITRE ATT&CK.
    """

    status: str
    category: str | None = None
    rule: str | None = None
    level: str | None = None
    attack: str | None = None
    title: str | None = None

    def line(self) -> str:
        """The verdict as the command line prints it."""
        return f"danger\t{self.category}\t{self.rule}" if self.status == "danger" else self.status


_OK, _UNPARSABLE = Verdict("ok"), Verdict("unparsable")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: what it tells, what it selects and excepts, and the commands that test it."""

    verdict: Verdict
    select: list[dict[str, Any]]
    excepted: list[dict[str, Any]]
    fires: tuple[str, ...]
    passes: tuple[str, ...]
    source: str

    @property
    def id(self) -> str:
        return str(self.verdict.rule)


@dataclass
class Policy:
    """Rules that judge commands."""

    rules: dict[str, Rule]
    programs: Programs
    places: Places
    _tests: dict[str, tuple[list[tuple[Test | None, Test]], Test | None]] = field(default_factory=dict)
    _asked: dict[str, list[tuple[Rule, list[Test]]]] = field(default_factory=dict)
    _judged: Callable[[str], Verdict] | None = None

    def __post_init__(self) -> None:
        self.language = Language(self.programs, self.places)
        self._order = sorted(self.rules.values(), key=lambda rule: -LEVELS.index(rule.verdict.level or "medium"))
        self._judged = lru_cache(maxsize=8192)(self._judge)

    def judge(self, text: str) -> Verdict:
        """Judge a text of shell commands: one command, or a script of several lines. Never an exception."""
        return self._judged(text)  # type: ignore[misc]

    def _judge(self, text: str) -> Verdict:
        try:
            reading = read(text, self.programs)
        except (Refused, RecursionError):
            return _UNPARSABLE
        best: tuple[int, Verdict] | None = None
        for command in reading.commands:
            for number, rule, tests in self._candidates(command):
                if best is not None and number >= best[0]:
                    break
                if any(test(command) for test in tests) and not self._excepts(rule, command):
                    best = (number, rule.verdict)
                    break
        return _OK if best is None else best[1]

    def fires(self, rule: Rule, text: str) -> bool:
        """Whether one rule fires on a text, whatever others say."""
        try:
            commands = read(text, self.programs).commands
        except (Refused, RecursionError):
            return False
        test = self.language.any_of(rule.select)
        return any(test(command) and not self._excepts(rule, command) for command in commands)

    def _excepts(self, rule: Rule, command: Command) -> bool:
        return bool(rule.excepted) and self._compiled(rule)[1](command)  # type: ignore[misc]

    def _compiled(self, rule: Rule) -> tuple[list[tuple[Test | None, Test]], Test | None]:
        if rule.id not in self._tests:
            selections = [
                (
                    self.language.program(keys["program"]) if "program" in keys else None,
                    self.language.selection({key: value for key, value in keys.items() if key != "program"}),
                )
                if set(keys) != {"program"}
                else (self.language.program(keys["program"]), lambda command: True)
                for keys in rule.select
            ]
            self._tests[rule.id] = (selections, self.language.any_of(rule.excepted) if rule.excepted else None)
        return self._tests[rule.id]

    def _candidates(self, command: Command) -> list[tuple[int, Rule, list[Test]]]:
        """The rules that may fire on a program, the most severe first, each with the selections that may."""
        found = self._asked.get(command.name)
        if found is None:
            found = []
            for number, rule in enumerate(self._order):
                tests = [test for about, test in self._compiled(rule)[0] if about is None or about(command)]
                if tests:
                    found.append((number, rule, tests))
            if len(self._asked) > 4096:
                self._asked.clear()
            self._asked[command.name] = found
        return found


# --- reading and checking ------------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML in which a key may stand once: the second would silently replace the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("A policy file can't be read.", where=str(path), found=str(error)) from error
    if not isinstance(content, dict):
        raise UserError("A policy file holds no mapping.", where=str(path), found=content, allowed="rules: [...]")
    return content


def build(*extra: Path | str, check: bool = False) -> Policy:
    """The project's policy with files of one's own laid over it, which are checked.

    Parameters
    ----------
    extra
        Policy files, the last one wins.
    check
        Check the project's own files too; tests and the rule ``screen_dataset`` do.

    Raises
    ------
    UserError
        Naming the file, the rule and what is wrong with it: an unknown field, a pattern that does not compile or
        explodes, a group or place that there is not, an example that does not fire.
    """
    rules: dict[str, Rule] = {}
    groups: dict[str, str] = {}
    places: dict[str, str] = {}
    rows: list[tuple[str, dict[str, Any]]] = []
    checked: list[str] = []
    own = sorted(path for path in FOLDER.glob("*.yaml") if path != SCHEMA)
    for path in (*own, *map(Path, extra)):
        content, theirs = _load(path), path not in own
        if check or theirs:
            check_shape(content, str(path))
        for name, spec in {**content.get("groups", {})}.items():
            groups[name] = f"{groups[name]} {spec}" if name in groups and theirs else spec
        for name, spec in {**content.get("places", {})}.items():
            places[name] = f"{places[name]} {spec}" if name in places and theirs else spec
        rows += content.get("programs", {}).items()
        for name in content.get("disable", []):
            if name not in rules:
                raise UserError("A rule to be disabled does not exist.", where=str(path), found=name,
                                allowed=", ".join(sorted(rules)))  # fmt: skip
            del rules[name]
        for raw in content.get("rules", []):
            if raw["id"] in rules and not theirs:
                raise UserError("Two rules have one id.", where=str(path), found=raw["id"])
            rules[raw["id"]] = _rule(raw, content, str(path))
            checked += [raw["id"]] if check or theirs else []
    table: dict[str, dict[str, Any]] = {}
    for names, row in rows:
        while names in table:  # one program may stand in several rows with the same names
            names += " "
        table[names] = row
    policy = Policy(rules, Programs(groups, table), Places(places))
    for name in checked:
        if name in rules:
            _check_rule(policy, rules[name])
    return policy


def _rule(raw: dict[str, Any], content: dict[str, Any], source: str) -> Rule:
    category, attack = raw.get("category", content.get("category")), raw.get("attack", content.get("attack"))
    for key, value in (("category", category), ("attack", attack)):
        if value is None:
            raise UserError(f"The rule {raw['id']} has no {key}.", where=source, write=f"{key}: ...")
    verdict = Verdict("danger", category, raw["id"], raw["level"], attack, raw["title"])
    select, excepted = raw["select"], raw.get("except", [])
    return Rule(
        verdict,
        select if isinstance(select, list) else [select],
        excepted if isinstance(excepted, list) else [excepted],
        tuple(raw["fires"]),
        tuple(raw["passes"]),
        source,
    )


def check_shape(content: dict[str, Any], source: str) -> None:
    """Hold a policy file against ``config/screen/schema.yaml``."""
    from jsonschema import Draft202012Validator

    errors = list(Draft202012Validator(_load(SCHEMA)).iter_errors(content))
    if not errors:
        return
    error = max(errors, key=lambda one: len(one.absolute_path))
    at = list(error.absolute_path)
    where = source
    if at[:1] == ["rules"] and len(at) > 1:
        where += (
            f", rule {content['rules'][at[1]].get('id', at[1]) if isinstance(content['rules'][at[1]], dict) else at[1]}"
        )
        at = at[2:]
    found, allowed = error.instance, str(error.message)[:300]
    if error.validator == "additionalProperties":
        unknown = sorted(set(found) - set(error.schema["properties"]))
        raise UserError(
            f"Unknown field: {'.'.join(map(str, [*at, unknown[0]]))}.",
            where=where,
            found=unknown[0],
            allowed=", ".join(sorted(error.schema["properties"])),
        )
    raise UserError(
        f"Wrong field: {'.'.join(map(str, at)) or 'the file'}.", where=where, found=str(found)[:200], allowed=allowed
    )


def _check_rule(policy: Policy, rule: Rule) -> None:
    """Every pattern compiles and can't explode, every group and place exists, every example comes out as it says."""
    where = f"{rule.source}, rule {rule.id}"

    def walk(value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if key in ("sets", "value"):
                    _check_pattern(inner, where)
                    _check_pattern(name, where) if key == "sets" else None
                else:
                    walk(inner, name)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, key)
        elif key in _PATTERNS:
            _check_pattern(value, where)
        elif isinstance(value, str) and key in (
            "program",
            "path",
            "deletes",
            "writes",
            "reads",
            "names",
            "sends",
            "anywhere",
        ):
            known = policy.programs.groups if key == "program" else policy.places.sets
            for name in re.findall(r"@(\S+)", value):
                if name not in known:
                    raise UserError("A group or place does not exist.", where=where, found="@" + name,
                                    allowed=", ".join("@" + one for one in sorted(known)))  # fmt: skip

    walk(rule.select)
    walk(rule.excepted)
    for text in rule.fires:
        if not policy.fires(rule, text):
            raise UserError("A rule does not fire on an example that it says it fires on.", where=where, found=text)
    for text in rule.passes:
        verdict = policy.judge(text)
        if verdict.status != "ok":
            raise UserError("A command that a rule says passes is refused.", where=where, found=text,
                            allowed=f"ok, not {verdict.line()!r}")  # fmt: skip


def _check_pattern(pattern: Any, where: str) -> None:
    try:
        compiled = re._parser.parse(str(pattern))  # type: ignore[attr-defined]
        re.compile(str(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            "A pattern is no regular expression.", where=where, found=pattern, allowed=str(error)
        ) from error
    if _explodes(compiled):
        raise UserError(
            "A pattern repeats what repeats itself: it could keep the screen busy for ever.",
            where=where, found=pattern, allowed="no +, * or {n,} around a group that holds only another",
        )  # fmt: skip


def _explodes(parsed: Any, within: bool = False) -> bool:
    """Whether an unbounded repeat directly holds another with nothing fixed beside it, as ``(a+)+`` does."""
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            _least, most, inner = argument
            unbounded = str(most) == "MAXREPEAT"
            if unbounded and within and len(parsed) == 1:
                return True
            if _explodes(inner, within or unbounded if unbounded else False):
                return True
        elif name == "SUBPATTERN":
            if _explodes(argument[-1], within):
                return True
        elif name == "BRANCH":
            if any(_explodes(branch, within) for branch in argument[1]):
                return True
        elif name in ("ASSERT", "ASSERT_NOT") and _explodes(argument[1], False):
            return True
    return False


@lru_cache(maxsize=1)
def default() -> Policy:
    """The project's own policy."""
    return build()


def screen(command: str) -> Verdict:
    """Judge a text of shell commands by the project's own policy. Never an exception, whatever the text."""
    return default().judge(command)
