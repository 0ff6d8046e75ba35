"""The one error that a person is meant to read."""

from __future__ import annotations


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
