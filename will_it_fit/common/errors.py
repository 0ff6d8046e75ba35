"""The one error that a person is meant to read."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something that the user can put right: what is wrong, where, what is allowed, what to write.

    Command lines print it without a traceback and exit with status 2; rules print it and fail.

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
        The corrected line, ready to be copied.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        found: object = None,
        allowed: str | None = None,
        write: str | None = None,
    ) -> None:
        self.problem, self.where, self.found, self.allowed, self.write = problem, where, found, allowed, write
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
        super().__init__("\n".join(lines))

    @classmethod
    def several(cls, errors: Sequence[UserError]) -> UserError:
        """One error for all that is wrong; each part keeps what was found, what is allowed and what to write."""
        parts = {str(part): part for error in errors for part in error.parts or (error,)}
        if len(parts) == 1:
            return errors[0]
        writes = dict.fromkeys(part.write for part in parts.values() if part.write)
        one = cls(f"{len(parts)} things are wrong.", where=errors[0].where, write="\n".join(writes))
        one.parts, one.args = tuple(parts.values()), ("\n".join([one.problem, *parts]),)
        return one

    def at(self, where: object) -> UserError:
        """The same error, or errors, in a place with another name."""
        if self.parts:
            return UserError.several([part.at(where) for part in self.parts])
        return UserError(self.problem, where=where, found=self.found, allowed=self.allowed, write=self.write)
