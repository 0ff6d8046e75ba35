"""The project's version, and those of the packages that decide a result. Standard library only."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec

# Documents and provenance carry it; CITATION.cff and CHANGELOG.md name the same one.
VERSION = "0.1.0"
STACK = ("torch", "transformers", "peft", "bitsandbytes")  # what builds a model and takes its step

INSTALL_TRACE = 'pip install "dryfit[trace]"'


def can_trace() -> bool:
    """Whether the packages are installed that a trace needs; they are not imported."""
    return all(find_spec(name) for name in STACK)


def versions(names: Iterable[str] = STACK) -> dict[str, str | None]:
    """Python's version and those of packages; None for one that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    numbers: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in names:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = None
    return numbers
