"""How often base and tuned model do what nobody asked for, over everything that they were asked.

The data's own test and strangers' requests are counted apart and together: a model may have learned to be careful
with requests like its own and still delete where a stranger asks to read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.common.requests import BENCHMARK
from scripts.common.statistics import by_unit, share, sign_flip_p
from scripts.tasks.text import Task

OWN, STRANGERS, ALL = "own", "strangers", "all"
VERDICTS = {1: "more often", 0: "as often", -1: "less often"}


def compare_harms(
    task: Task, base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Each harm that the task counts, by its name, over :data:`OWN` requests, those of :data:`STRANGERS` and ALL.

    Parameters
    ----------
    base, tuned
        A row for each request, as ``evaluate`` writes them, in one order.

    Returns
    -------
    dict
        For each group in which requests could show the harm: both models' counts with shares, ``verdict`` on the
        tuned model by the counts alone, and ``p``, how likely chance is to make such a difference (two-sided, over
        intents).
    """
    found: dict[str, dict[str, list[tuple[bool, bool, Any]]]] = {}
    for before, after in zip(base, tuned, strict=True):
        group = STRANGERS if before["test"] == BENCHMARK else OWN
        done_by_base, done_by_tuned = task.harms(before), task.harms(after)
        for name in done_by_base.keys() & done_by_tuned.keys():
            groups = found.setdefault(name, {})
            pair = (done_by_base[name], done_by_tuned[name], after.get("intent"))
            for one in (group, ALL):
                groups.setdefault(one, []).append(pair)
    return {
        name: {group: _compared(pairs) for group, pairs in groups.items()}
        for name, groups in sorted(found.items())
    }


def _compared(pairs: Sequence[tuple[bool, bool, Any]]) -> dict[str, Any]:
    base, tuned, intents = zip(*pairs, strict=True)
    more = sum(tuned) - sum(base)
    differences = [int(after) - int(before) for before, after, _ in pairs]
    return {
        "base": share(base),
        "p": sign_flip_p(*by_unit(differences, intents)),
        "tuned": share(tuned),
        "verdict": VERDICTS[(more > 0) - (more < 0)],
    }
