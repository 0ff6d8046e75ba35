"""The policy: rules, places and facts about programs, read from YAML, checked, compiled and asked.

``config/screen/*.yaml`` is the project's own. Files of a team are laid over it: a rule of the same id replaces one,
``disable`` switches some off, ``groups``, ``places`` and ``programs`` are added to. Every rule carries its tests.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.schema import problems, validate
from scripts.common.code_digests import ROOT
from scripts.tasks.shell.screen.commands import Refused, ShellCommand
from scripts.tasks.shell.screen.paths import Places
from scripts.tasks.shell.screen.predicates import Language, Test
from scripts.tasks.shell.screen.programs import Programs, check_pattern
from scripts.tasks.shell.screen.reader import read

FOLDER = ROOT / "config" / "screen"
SCHEMA = FOLDER / "schema.yaml"
LEVELS = ("medium", "high", "critical")
_PATTERNS = ("words", "subcommand", "operand", "argument", "unknown", "redirects", "code", "text")
_PLACES = ("path", "deletes", "writes", "reads", "names", "sends", "anywhere")


@dataclass(frozen=True, slots=True)
class ScreenVerdict:
    """What the screen says: ``ok``, ``danger`` or ``unparsable``; of a danger what the most severe rule tells."""

    status: str
    category: str | None = None
    rule: str | None = None
    level: str | None = None
    attack: str | None = None  # a technique of MITRE ATT&CK
    title: str | None = None

    def line(self) -> str:
        """The verdict as the command line prints it."""
        return f"danger\t{self.category}\t{self.rule}" if self.status == "danger" else self.status


_OK, UNPARSABLE = ScreenVerdict("ok"), ScreenVerdict("unparsable")


class Rule:
    """One rule: what it tells, what it selects and excepts, and the commands that test it."""

    def __init__(
        self, raw: dict[str, Any], content: dict[str, Any], source: str, language: Language
    ) -> None:
        self.raw, self.id, self.source = raw, raw["id"], source
        self.fires, self.passes = tuple(raw["fires"]), tuple(raw["passes"])
        told = {key: raw.get(key, content.get(key)) for key in ("category", "attack")}
        for key in (key for key, value in told.items() if value is None):
            raise UserError(f"The rule {self.id} has no {key}.", where=source, write=f"{key}: ...")
        self.verdict = ScreenVerdict(
            "danger", told["category"], self.id, raw["level"], told["attack"], raw["title"]
        )
        self._language = language

    @cached_property
    def selections(self) -> list[tuple[Test, Test]]:
        """For each selection, whether it is about a program, and whether it holds for a command of it."""
        chosen = (
            self.raw["select"] if isinstance(self.raw["select"], list) else [self.raw["select"]]
        )
        return [
            (
                self._language.selection({"program": keys.get("program", "*")}),
                self._language.selection(keys),
            )
            for keys in chosen
        ]

    @cached_property
    def excepts(self) -> Test:
        """Whether a command is excepted."""
        return (
            self._language.any_of(self.raw["except"])
            if "except" in self.raw
            else lambda command: False
        )


class Policy:
    def __init__(self, rules: dict[str, Rule], language: Language) -> None:
        self.rules, self.programs, self.places = rules, language.programs, language.places
        self._order = sorted(
            rules.values(), key=lambda rule: -LEVELS.index(rule.verdict.level or "")
        )
        self._candidates = lru_cache(maxsize=4096)(self._candidates_of)
        self.judge = lru_cache(maxsize=8192)(self._judge)

    def _judge(self, text: str) -> ScreenVerdict:
        """Judge a text of shell commands: one command, or a script of several lines. Never an exception."""
        try:
            commands = read(text, self.programs).commands
        except (Refused, RecursionError):
            return UNPARSABLE
        best = len(self._order)
        for command in commands:
            for number, tests in self._candidates(command.name):
                if number >= best:
                    break
                if any(test(command) for test in tests) and not self._order[number].excepts(
                    command
                ):
                    best = number
        return self._order[best].verdict if best < len(self._order) else _OK

    def _candidates_of(self, name: str) -> list[tuple[int, list[Test]]]:
        """The rules that may fire on a program, the most severe first, each with the selections that may."""
        command = ShellCommand(name, [name])
        candidates = [
            (number, [test for about, test in rule.selections if about(command)])
            for number, rule in enumerate(self._order)
        ]
        return [(number, tests) for number, tests in candidates if tests]


# --- reading and checking ------------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(
            "A policy file holds no mapping.", where=path, found=content, allowed="rules: [...]"
        )
    return content


def build(*extra: Path | str) -> Policy:
    """The project's policy with files of one's own laid over it, the last one wins; all of it is checked.

    A :class:`UserError` names the file, the rule and what is wrong with it: an unknown field, a pattern that does not
    compile or explodes, a group or place that there is not, an example that does not come out as it says.
    """
    own = sorted(path for path in FOLDER.glob("*.yaml") if path != SCHEMA)
    files = [(path, _load(path)) for path in (*own, *map(Path, extra))]
    tables: dict[str, dict[str, str]] = {"groups": {}, "places": {}}
    for path, content in files:
        check_shape(content, path)
        for key, table in tables.items():
            for name, spec in content.get(key, {}).items():
                table[name] = f"{table[name]} {spec}" if name in table else spec
    rows = [row for _, content in files for row in content.get("programs", {}).items()]
    language = Language(Programs(tables["groups"], rows), Places(tables["places"]))
    rules: dict[str, Rule] = {}
    for path, content in files:
        for name in content.get("disable", []):
            if rules.pop(name, None) is None:
                known = ", ".join(sorted(rules))
                raise UserError(
                    "A rule to be disabled does not exist.", where=path, found=name, allowed=known
                )
        ids = [raw["id"] for raw in content.get("rules", [])]
        for raw in content.get("rules", []):
            if ids.count(raw["id"]) > 1 or (raw["id"] in rules and path in own):
                raise UserError("Two rules have one id.", where=path, found=raw["id"])
            rules[raw["id"]] = Rule(raw, content, str(path), language)
    for name, spec in tables["places"].items():
        _check_names(spec, tables["places"], f"the place {name}")
    for rule in rules.values():
        _check_rule(language, rule)
    policy = Policy(rules, language)
    for rule in rules.values():
        # A rule of one's own may well refuse what one of the project's lets pass.
        _check_examples(
            policy, rule, rule.passes if not extra or Path(rule.source) not in own else ()
        )
    return policy


def check_shape(content: dict[str, Any], source: Path | str) -> None:
    """Hold a policy file against ``config/screen/schema.yaml``; a rule is named by its id."""
    schema, rules = _load(SCHEMA), content.get("rules")
    if not isinstance(rules, list):
        return validate(content, schema, source)
    wrong = problems({**content, "rules": []}, schema, source)
    one = {**schema["properties"]["rules"]["items"], "$defs": schema["$defs"]}
    for number, rule in enumerate(rules):
        name = rule.get("id", number) if isinstance(rule, dict) else number
        wrong += problems(rule, one, f"{source}, rule {name}")
    if wrong:
        raise UserError.several(wrong)
    return None


def _check_rule(language: Language, rule: Rule) -> None:
    """Every pattern compiles and can't explode, every group and place exists."""
    where = f"{rule.source}, rule {rule.id}"

    def walk(value: Any, key: str = "") -> None:
        for inner in value if isinstance(value, list) else ():
            walk(inner, key)
        for name, inner in value.items() if isinstance(value, dict) else ():
            for pattern in [name, inner] if key == "sets" else [inner] if key == "value" else []:
                check_pattern(pattern, where)
            if key not in ("sets", "value"):
                walk(inner, name)
        if isinstance(value, str) and key in _PATTERNS:
            check_pattern(value, where)
        if isinstance(value, str) and key in (*_PLACES, "program"):
            _check_names(
                value, language.programs.groups if key == "program" else language.places.sets, where
            )

    walk({key: rule.raw[key] for key in ("select", "except") if key in rule.raw})


def _check_names(spec: str, known: dict[str, str], where: str) -> None:
    for name in re.findall(r"@(\S+)", spec):
        if name not in known:
            allowed = ", ".join("@" + one for one in sorted(known))
            raise UserError(
                "The rule names a group or a place that does not exist.",
                where=where,
                found=f"@{name}",
                allowed=allowed,
            )


def _check_examples(policy: Policy, rule: Rule, passes: Iterable[str]) -> None:
    where = f"{rule.source}, rule {rule.id}"
    for text in rule.fires:
        try:
            commands = read(text, policy.programs).commands
        except (Refused, RecursionError):
            commands = []
        if not any(
            test(c) and not rule.excepts(c) for c in commands for _, test in rule.selections
        ):
            raise UserError(
                "A rule does not fire on an example that it says it fires on.",
                where=where,
                found=text,
            )
    for text in passes:
        line = policy.judge(text).line()
        if line != "ok":
            raise UserError(
                f"A command that a rule says passes is refused: {line}.", where=where, found=text
            )


@lru_cache(maxsize=1)
def default() -> Policy:
    """The project's own policy."""
    return build()


def screen(command: str) -> ScreenVerdict:
    """Judge a text of shell commands by the project's own policy. Never an exception, whatever the text."""
    return default().judge(command)
