"""The one error that a person is meant to read: values, made into text at the edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dryfit.common.text import printable, yaml_text


class UserError(Exception):
    """Something that the user can put right: what is wrong, where, what is allowed, what to write.

    Command lines print it without a traceback and exit with status 2; rules print it and fail. Whoever shows it in
    other words (a command line, another tool's file) takes its values, and never reads its text.

    Parameters
    ----------
    problem
        One sentence: what is wrong.
    where
        File, line, key: the place to go to.
    found
        The offending value (shown with ``repr``).
    allowed
        What would have been accepted, in words.
    write
        The corrected line, ready to be copied; made of ``change`` where it is left out.
    field
        The scenario's field that is wrong, as it was given: ``lora.rank``.
    change
        Fields of the scenario with the values that would be right, those with parts as mappings; or options of the
        command line, ``--rows``.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        found: object = None,
        allowed: str | None = None,
        write: str | None = None,
        field: str | None = None,
        change: Mapping[str, Any] | None = None,
    ) -> None:
        if write is None and change:
            write = "\n".join(
                f"{name} {value}" if name.startswith("-") else f"{name}: {yaml_text(value)}"
                for name, value in change.items()
            )
        self.problem, self.where, self.found, self.allowed, self.write = (
            problem,
            where,
            found,
            allowed,
            write,
        )
        self.field, self.change = field or next(iter(change or ()), None), change
        self.parts: tuple[UserError, ...] = ()  # of several errors in one
        lines = [problem]
        if where is not None:
            lines.append(f"  where:   {where}")
        if found is not None:
            lines.append(f"  found:   {found!r}")
        if allowed is not None:
            lines.append(f"  allowed: {allowed}")
        if write is not None:
            lines.append("  write:   " + write.rstrip().replace("\n", "\n           "))
        super().__init__(printable("\n".join(lines)))

    @classmethod
    def several(cls, errors: Sequence[UserError]) -> UserError:
        """One error for all that is wrong; each part keeps what was found, what is allowed and what to write."""
        parts = {str(part): part for error in errors for part in error.parts or (error,)}
        if len(parts) == 1:
            return errors[0]
        writes = dict.fromkeys(part.write for part in parts.values() if part.write)
        one = cls(f"{len(parts)} things are wrong.", where=errors[0].where, write="\n".join(writes))
        alike = len(writes) == 1  # one line in which all is put right: shown once, at the end
        texts = [
            str(part._with(write=None, change=None)) if alike else text
            for text, part in parts.items()
        ]
        if alike:
            texts.append(f"write, for all of them:\n  {next(iter(writes))}")
        one.parts, one.args = tuple(parts.values()), ("\n".join([one.problem, *texts]),)
        return one

    def at(self, where: object) -> UserError:
        """The same error, or errors, in a place with another name."""
        return self.with_values(where=where)

    def with_values(self, **values: Any) -> UserError:
        """The same error, or errors, with some of its values replaced."""
        if self.parts:
            return UserError.several([part.with_values(**values) for part in self.parts])
        return self._with(**values)

    def _with(self, **values: Any) -> UserError:
        names = ("problem", "where", "found", "allowed", "write", "field", "change")
        return UserError(**{**{name: getattr(self, name) for name in names}, **values})
