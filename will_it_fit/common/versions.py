"""The project's version, and those of the packages that decide a result. Standard library only."""

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

# Documents and provenance carry it; CITATION.cff and CHANGELOG.md name the same one.
VERSION = "0.1.0"
STACK = ("torch", "transformers", "peft", "bitsandbytes")  # what builds a model and takes its step


def versions(names: Iterable[str] = STACK) -> dict[str, str | None]:
    """Python's version and those of packages; None for one that is not installed."""
    numbers: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in names:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = None
    return numbers
