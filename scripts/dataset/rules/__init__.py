"""The rules of the safety screen: what a command must not do, each with examples on both sides.

A rule judges one :class:`~scripts.dataset.commands.Command` (its words already resolved) by what it would do and to
what, never by its spelling. :data:`RULES` is the table; the most severe match gives the verdict, of equally severe ones
the first.
"""

from __future__ import annotations

from scripts.dataset.rules import (
    containers,
    credentials,
    defences,
    exfiltration,
    files,
    load,
    permissions,
    persistence,
    remote,
    rights,
    traces,
)
from scripts.dataset.rules.table import CATEGORIES, ENTERED, SEVERITIES, Rule

_THEMES = (
    files,
    load,
    rights,
    remote,
    credentials,
    traces,
    persistence,
    defences,
    containers,
    exfiltration,
    permissions,
)
RULES: list[Rule] = [rule for theme in _THEMES for rule in ENTERED[theme.__name__]]

__all__ = ["CATEGORIES", "RULES", "SEVERITIES", "Rule"]
