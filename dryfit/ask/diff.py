"""``dryfit diff`` and ``dryfit check``: training files in a repository, for a pull request and for a commit hook.

``check`` asks the analytic estimate where it can answer, and else the trace. A file that can't be read, or that no tool
has written, is an error.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import dryfit.readers as readers
from dryfit.ask import answer
from dryfit.ask.answer import quick, traced
from dryfit.ask.options import json_line
from dryfit.ask.question import Question, QuestionOptions, question
from dryfit.ask.text import WORDS
from dryfit.cards.sentences import card, said
from dryfit.common.errors import UserError
from dryfit.common.terminal import working
from dryfit.common.text import bytes_of, gib, printable, size_text, yaml_text
from dryfit.scenario.fields import BY_NAME

_READ = (
    ".json",
    ".yaml",
    ".yml",
    ".toml",
    ".jinja",
    ".j2",
    ".py",
    ".ipynb",
)  # what a training file may name
_LARGEST = 2**20  # bytes of such a file
_MOST_SETTINGS = 6  # whose shares are traced one by one
_LEAST = 2**20  # bytes of a component that is named


@dataclass(frozen=True)
class Changed:
    """A field of the step that two versions have differently; ``bytes``: what it adds, after those before it."""

    field: str
    before: Any
    after: Any
    bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.field}: {yaml_text(self.before)} -> {yaml_text(self.after)}"


@dataclass(frozen=True)
class StepDifference:
    """Two steps beside each other; sizes are of one GPU."""

    # The answers of ``predict``; ``before`` is None where the file is new
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]
    settings: Sequence[Changed]  # the fields that differ, in the order of a scenario's fields
    components: Mapping[str, int]  # how much more each component takes at the peak, in bytes

    @property
    def more_bytes(self) -> int | None:
        """How much more the GPU must have."""
        if self.before is None:
            return None
        return self.after["trace"]["required_bytes"] - self.before["trace"]["required_bytes"]

    def to_mapping(self) -> dict[str, Any]:
        told = ("verdict", "fits", "headroom_bytes", "gpu", "evidence", "warnings")
        sides = {
            name: one
            and {key: one[key] for key in told}
            | {key: one["trace"][key] for key in ("required_bytes", "peak_allocated_bytes")}
            for name, one in (("before", self.before), ("after", self.after))
        }
        settings = [
            {"field": one.field, "before": one.before, "after": one.after, "more_bytes": one.bytes}
            for one in self.settings
        ]
        return sides | {
            "more_bytes": self.more_bytes,
            "settings": settings,
            "components": dict(self.components),
        }

    def sentence(self) -> str:
        """What happened, and whether the step fits."""
        if self.before is None:
            return f"The file is new. {self.after['sentence']}"
        more, need = self.more_bytes, self.after["trace"]["required_bytes"]
        sizes = f"{gib(need - more)} before, {gib(need)} after"
        changed = (
            "takes as much as before"
            if not more
            else (f"takes {size_text(abs(more))} {'more' if more > 0 else 'less'}")
        )
        return f"The step {changed} ({sizes}){self._fit()}."

    def _fit(self) -> str:
        gpu = self.after["gpu"]
        if gpu is None:
            return ""
        fits, spare = self.after["fits"], self.after["headroom_bytes"]
        word = said(self.after["verdict"])
        if (
            self.before["gpu"] == gpu and fits
        ):  # else it is another card, or the first that is named
            word = "still fits" if self.before["fits"] else "fits now"
        elif self.before["gpu"] == gpu:
            if self.before["verdict"] == self.after["verdict"]:
                word = f"{word}, as before,"
            elif self.before["fits"] and fits is False:
                word = "no longer fits"
        return f": it {word} on {card(gpu)}, " + (
            f"{size_text(spare)} to spare" if spare >= 0 else f"short by {size_text(-spare)}"
        )

    def lines(self) -> list[str]:
        """The causes, one a line."""
        shares = [f"  {_signed(one.bytes):>11}  {one}" for one in self.settings]
        parts = [
            f"  {_signed(size):>11}  {WORDS.get(name, name)}"
            for name, size in self.components.items()
        ]
        lines = (
            ["what changed, and what each change adds after those above it:", *shares]
            if shares
            else []
        )
        return [*lines, "at the peak:", *parts] if parts else lines


def _signed(size: int | None) -> str:
    return "" if size is None else f"{'+' if size >= 0 else '-'}{size_text(abs(size))}"


def compare_steps(before: Question | None, after: Question) -> StepDifference:
    """What differs between two steps, each setting's share and each component's.

    UserError: if a step can't be traced.
    """
    last = _answer(after)
    if before is None:
        return StepDifference(None, last, (), {})
    settings = [
        Changed(name, one, other)
        for name in BY_NAME
        if (one := _shown(before, name)) != (other := _shown(after, name))
        and name not in ("gpu", "model_name")
    ]
    same = before.scenario == after.scenario and before.gpu == after.gpu
    first = last if same else _answer(before)  # a model's file may have changed under its name
    if 0 < len(settings) <= _MOST_SETTINGS:
        settings = list(_shares(before, after, settings, first, last))
    parts = (first["trace"]["components"], last["trace"]["components"])
    more = {name: parts[1].get(name, 0) - parts[0].get(name, 0) for name in {*parts[0], *parts[1]}}
    shown = {
        name: size
        for name, size in sorted(more.items(), key=lambda item: -abs(item[1]))
        if abs(size) >= _LEAST
    }
    return StepDifference(first, last, settings, shown)


def _shown(asked: Question, name: str) -> Any:
    value = asked.scenario.to_mapping().get(name)
    if name == "model":
        return asked.model or value["model_type"]
    return value


def _shares(
    before: Question,
    after: Question,
    settings: Sequence[Changed],
    first: Mapping[str, Any],
    last: Mapping[str, Any],
) -> Iterator[Changed]:
    """What each change adds after those before it; without a share where the steps between can't be."""
    needed, scenario, given = first["trace"]["required_bytes"], before.scenario, after.scenario
    unknown = False
    for number, one in enumerate(settings):
        scenario = replace(scenario, **{one.field: getattr(given, one.field)})
        if number == len(settings) - 1:
            now = last["trace"]["required_bytes"]
        else:
            try:
                checked = scenario.changed()
                now = _answer(replace(after, scenario=checked))["trace"]["required_bytes"]
            except UserError:
                unknown = True
                yield one
                continue
        yield one if unknown else replace(one, bytes=now - needed)
        needed, unknown = now, False


def _answer(asked: Question) -> dict[str, Any]:
    with working("tracing the versions"):
        return answer.traced(asked, suggested=False)


# --- the file at a revision ----------------------------------------------------------------------------------------


def _git(*words: str, input: bytes | None = None) -> bytes:
    try:
        done = subprocess.run(["git", *words], input=input, capture_output=True)
    except FileNotFoundError:
        raise UserError(
            "git is not installed, and `diff` asks it for the two versions.", allowed="git"
        ) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(
            f"git refuses: {printable(said[-1] if said else 'no reason')}",
            where=f"git {' '.join(words[:3])}",
            allowed="a revision of this repository",
            write="dryfit diff main HEAD --file config.yml",
        )
    return done.stdout


def checked_out(revision: str, folder: Path) -> None:
    """Write what training files may name, as a revision of this repository has it, into a folder."""
    if revision.startswith("-"):
        raise UserError(
            "A revision does not begin with a hyphen.",
            where="the command line",
            found=revision,
            write="dryfit diff main HEAD --file config.yml",
        )
    commit = (
        _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        .decode()
        .strip()
    )
    names = []
    for line in (
        _git("ls-tree", "-r", "-l", "-z", "--full-tree", commit)
        .decode(errors="replace")
        .split("\0")
    ):
        about, _, name = line.partition("\t")
        kind = about.split()  # mode, type, object, size
        if (
            len(kind) == 4
            and kind[0] in ("100644", "100755")
            and int(kind[3]) <= _LARGEST
            and name.endswith(_READ)
        ):
            names.append(name)
    asked = "".join(f"{commit}:{name}\n" for name in names if "\n" not in name).encode()
    content = _git("cat-file", "--batch", input=asked)
    for name in (name for name in names if "\n" not in name):
        head, _, rest = content.partition(b"\n")
        size = int(head.split()[-1])
        path = folder.joinpath(*PurePosixPath(name).parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rest[:size])
        content = rest[size + 1 :]


def _question(root: Path, file: str, options: QuestionOptions, title: str) -> Question | None:
    """The question that a version of the file is; None: that version does not have it."""
    path = root / file
    if not path.is_file():
        return None
    try:
        return question([path], options)
    except UserError as error:
        where = str(error.where or "").replace(f"{root}/", "")
        raise error.with_values(where=f"{where} in {title}") from None


def _refuse_two_tools(before: Question, after: Question, file: str, titles: Sequence[str]) -> None:
    tools = [one.reading.tool if one.reading else "dryfit (a scenario)" for one in (before, after)]
    if tools[0] != tools[1]:
        raise UserError(
            f"The two versions of the file are of two tools: {tools[0]} in {titles[0]}, {tools[1]} in {titles[1]}."
            " Each tool has its own defaults, so a comparison would not show what somebody changed.",
            where=file,
            allowed="two versions for the same tool",
            write=f"dryfit {file}",
        )


# --- the commands --------------------------------------------------------------------------------------------------


def main(options: argparse.Namespace) -> int:
    """The command ``dryfit diff``."""
    most = _size(options.most) if options.most is not None else None
    titles = (options.base, options.head or "the working tree")
    asking = QuestionOptions(gpu=options.gpu, tool=options.tool)
    root = Path(_git("rev-parse", "--show-toplevel").decode().strip())
    file = str(PurePosixPath(options.file))
    with TemporaryDirectory() as scratch:
        folders = [Path(scratch) / "base", Path(scratch) / "head" if options.head else root]
        for revision, folder in zip((options.base, options.head), folders, strict=True):
            if revision:
                checked_out(revision, folder)
        before, after = (
            _question(folder, file, asking, title)
            for folder, title in zip(folders, titles, strict=True)
        )
        if before is None and after is None:
            raise UserError(
                "Neither version has the file.",
                where=file,
                found=" and ".join(titles),
                allowed="a path from the repository's root",
            )
        if after is None:
            print(f"{file} is gone in {titles[1]}: there is no step to ask about.")
            return 0
        if before:
            _refuse_two_tools(before, after, file, titles)
        found = compare_steps(before, after)
    over = most is not None and found.more_bytes is not None and found.more_bytes > most
    if options.json:
        print(json_line(found.to_mapping() | {"file": file, "over_most": over}))
    else:
        limit = f"That is more than the {size_text(most)} that --most allows." if over else ""
        print(
            printable(
                markdown(found, file, titles, limit)
                if options.markdown
                else text(found, file, limit)
            )
        )
    return 1 if over or found.after["fits"] is False else 0


def _size(written: str) -> int:
    if (size := bytes_of(written)) is None:
        raise UserError(
            "`--most` takes a size.",
            where="--most",
            found=written,
            allowed="GiB, GB, MiB or MB",
            write="--most 0.5GiB",
        )
    return size


def text(found: StepDifference, file: str, limit: str) -> str:
    """The difference for a terminal."""
    evidence = f"evidence: {found.after['evidence']['text']}"
    warnings = [f"  warning: {warning}" for warning in found.after["warnings"]]
    return "\n".join(
        line
        for line in (f"{file}: {found.sentence()}", limit, *found.lines(), evidence, *warnings)
        if line
    )


def markdown(found: StepDifference, file: str, titles: Sequence[str], limit: str) -> str:
    """The difference as a comment's text."""
    mark = {True: "✅", False: "❌", None: "ℹ️"}[False if limit else found.after["fits"]]
    lines = [
        f"### {mark} Memory of `{_plain(file)}`",
        "",
        found.sentence(),
        *([limit] if limit else []),
        "",
    ]
    if found.settings:
        lines += [
            f"| setting | {_cell(titles[0])} | {_cell(titles[1])} | adds |",
            "| --- | --- | --- | ---: |",
        ]
        lines += [
            f"| `{one.field}` | {_cell(one.before)} | {_cell(one.after)} | {_signed(one.bytes)} |"
            for one in found.settings
        ]
        lines.append("")
    if found.components:
        lines += ["| at the peak | more |", "| --- | ---: |"]
        lines += [
            f"| {WORDS.get(name, name)} | {_signed(size)} |"
            for name, size in found.components.items()
        ]
        lines.append("")
    lines += [f"> {warning}" for warning in found.after["warnings"]]
    evidence = f"{found.after['evidence']['text']}."
    return "\n".join(
        [*lines, evidence, "", "<sub>The step itself, traced without a GPU by dryfit.</sub>"]
    )


def _plain(written: str) -> str:
    return re.sub(r"[`|<>\n\r]", "", written)


def _cell(value: Any) -> str:
    """A value out of a file as code: nothing in it is Markdown or ends the cell."""
    return f"`{_plain(value if isinstance(value, str) else yaml_text(value))[:120]}`"


def check(options: argparse.Namespace) -> int:
    """The command ``dryfit check``."""
    refused: list[str] = []
    wrong: list[UserError] = []
    for file in options.files:
        try:
            if not _is_checked(Path(file)):
                print(f"{file}: passed over, since {_PASSED_OVER}")
                continue
            asked = question([file], QuestionOptions(gpu=options.gpu))
        except UserError as error:
            wrong.append(
                error
                if file in str(error.where)
                else error.at(f"{file}: {error.where or 'the file'}")
            )
            continue
        answered = quick(asked, others=False)
        if answered["fits"] is None:
            answered = traced(asked, suggested=False)
        if answered["fits"] is not True:
            refused.append(file)
        print(
            f"{file}: {printable(answered['sentence'])}",
            file=sys.stderr if file in refused else sys.stdout,
        )
    if wrong:
        raise UserError.several(wrong)
    return 1 if refused else 0


_PASSED_OVER = (
    "it has no step: a model's configuration, or settings that lie beside a training file"
)


def _is_checked(path: Path) -> bool:
    """Whether a file has a step of its own.

    UserError: if it can't be read, or no tool can have written it. A gate lets nothing through that it can't read.
    """
    if path.suffix in (".py", ".ipynb", ".sh"):
        return True
    if not path.is_file():
        raise UserError("The file isn't there.", where=str(path), allowed="a training file")
    kind = readers.kind_of(readers.mapping_of(path), path)
    return kind not in ("model", "run") and not (
        kind in readers.READERS and readers.READERS[kind].beside
    )
