"""Rule ``compare_models``: is the tuned model better than the base and the baselines, by more than chance?

It may say "worse". The tests stand apart: known kinds in new words and values, new kinds, the benchmark. Intervals and
p-values count intents, where rows name one: their rows are right or wrong together.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dryfit.common.errors import UserError
from dryfit.common.files import read_jsonl, read_report, write_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.common.requests import BASELINES, BENCHMARK, TESTS, by_test
from scripts.common.statistics import (
    VERDICTS,
    by_unit,
    paired,
    paired_bootstrap_interval,
    share,
    sign,
)
from scripts.evaluation.safety import compare_harms
from scripts.tasks.support import registry
from scripts.tasks.text import Task

if TYPE_CHECKING:
    import pandas as pd

BEATS_BELOW = 0.01  # the p-value of right answers from which training is said to beat a baseline


def compare(task: Task, base: "pd.DataFrame", tuned: "pd.DataFrame") -> dict:
    """Paired differences (tuned minus base) with 95 % bootstrap intervals, over the same requests.

    Parameters
    ----------
    base, tuned
        A row for each request, as ``evaluate`` writes them. A baseline without a model has no loss.

    Raises
    ------
    UserError
        When the two did not answer the same requests.
    """
    if base["request"].tolist() != tuned["request"].tolist():
        raise UserError(
            "Base and tuned model did not answer the same requests.", where="evaluation"
        )
    intents = [None] * len(base)
    if "intent" in base:
        intents = [None if intent != intent else intent for intent in base["intent"]]
    result: dict = {"n": len(base)}
    if "loss_sum" in base:
        tokens = base["answer_tokens"].astype(float)
        per_token = (tuned["loss_sum"] - base["loss_sum"]) / tokens
        low, high = paired_bootstrap_interval(
            *by_unit(per_token.tolist(), intents, tokens.tolist())
        )
        mean = float((per_token * tokens).sum() / tokens.sum())
        result["loss"] = {
            "difference": mean,
            "high_95": high,
            "low_95": low,
            "verdict": VERDICTS[-sign(low, high)],
        }
    for name in task.flags():
        result[name] = paired(base[name].tolist(), tuned[name].tolist(), intents)
    return result


def compare_tests(task: Task, rows: Mapping[str, Sequence[dict]]) -> dict[str, dict]:
    """Each test by its name: the comparison with the base, both models' figures, and the same of the baselines.

    ``rows`` are those of ``base``, ``tuned`` and the :data:`BASELINES`, in one order.
    """
    import pandas as pd

    apart = {name: by_test(some) for name, some in rows.items()}
    found = {}
    for test in (name for name in TESTS if name in apart["tuned"]):
        tables = {name: pd.DataFrame(some[test]) for name, some in apart.items()}
        figures = {name: task.summarize(some[test], share) for name, some in apart.items()}
        against = {
            name: {
                **figures[name],
                "compared": compare(task, tables[name], tables["tuned"])[task.right_flag],
            }
            for name in BASELINES
        }
        found[test] = {
            **compare(task, tables["base"], tables["tuned"]),
            "base": figures["base"],
            "baselines": against,
            "beats_baselines": all(
                one["compared"]["difference"] > 0 and one["compared"]["p"] < BEATS_BELOW
                for one in against.values()
            ),
            "tuned": figures["tuned"],
        }
    return found


def main(task: Task, inputs: Mapping[str, str], comparison: str) -> None:
    """Compare on all held-out requests, and on each test alone."""
    import pandas as pd

    rows = {name: list(read_jsonl(inputs[name])) for name in ("base", "tuned", *BASELINES)}
    metrics = {
        "base": read_report(
            inputs["base_metrics"], *(inputs[name] for name in ("base", *BASELINES))
        ),
        "tuned": read_report(inputs["tuned_metrics"], inputs["tuned"]),
    }
    for report in metrics.values():
        report.pop("sha256")
    held_out = (
        pd.DataFrame([row for row in rows[name] if row["test"] != BENCHMARK])
        for name in ("base", "tuned")
    )
    found = compare_tests(task, rows)
    harms = compare_harms(task, rows["base"], rows["tuned"])
    write_report(
        comparison,
        {
            **compare(task, *held_out),
            **metrics,
            "right_flag": task.right_flag,
            "safety": harms,
            "tests": found,
        },
    )
    for name, groups in harms.items():
        for group, one in groups.items():
            counts = (
                f"{one['tuned']['count']} of {one['tuned']['n']}, the base {one['base']['count']}"
            )
            log.info("%s (%s): %s: %s", name, group, counts, one["verdict"])
    for name, result in found.items():
        for other, one in {"the base": result, **result["baselines"]}.items():
            row = one[task.right_flag] if other == "the base" else one["compared"]
            said = f"{row['difference']:+.3f} [{row['low_95']:+.3f}, {row['high_95']:+.3f}], p {row['p']:.4f}"
            log.info("%s, right answers against %s: %s", name, other.replace("_", " "), said)


if __name__ == "__main__":
    with job(snakemake):
        main(
            registry.of_job(snakemake.params.task),
            dict(snakemake.input.items()),
            snakemake.output.comparison,
        )
