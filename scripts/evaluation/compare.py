"""Rules ``compare_models``, ``compare_on_benchmark``: is the tuned model better than the base, by more than chance?

It may say "worse".
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scripts.common.job import job
from scripts.common.statistics import paired_bootstrap_interval
from will_it_fit.common.errors import UserError
from will_it_fit.common.files import read_report, write_report
from will_it_fit.common.terminal import log

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = {1: "better", -1: "worse", 0: "difference too small for this sample"}
FLAGS = ("exact", "exact_canonical", "parses", "program")  # more of each is better


def _sign(low: float, high: float) -> int:
    """1 when the whole interval is above zero, -1 when it is below, else 0."""
    return int(low > 0) - int(high < 0)


def paired(base: Sequence[bool], tuned: Sequence[bool]) -> dict:
    """Tuned minus base on a flag that is better set, over the same rows, with a 95 % bootstrap interval."""
    differences = [float(after) - float(before) for before, after in zip(base, tuned, strict=True)]
    low, high = paired_bootstrap_interval(differences)
    return {
        "difference": sum(differences) / len(differences),
        "gained": differences.count(1.0),
        "high_95": high,
        "lost": differences.count(-1.0),
        "low_95": low,
        "verdict": VERDICTS[_sign(low, high)],
    }


def compare(base: "pd.DataFrame", tuned: "pd.DataFrame") -> dict:
    """Paired differences (tuned minus base) with 95 % bootstrap intervals, over the same requests.

    Parameters
    ----------
    base, tuned
        A row for each request, as ``evaluate`` writes them.

    Raises
    ------
    UserError
        When the two did not answer the same requests.
    """
    if base["request"].tolist() != tuned["request"].tolist():
        raise UserError("Base and tuned model did not answer the same requests.", where="evaluation")
    tokens = base["answer_tokens"].astype(float)
    per_token = (tuned["loss_sum"] - base["loss_sum"]) / tokens
    low, high = paired_bootstrap_interval(per_token.tolist(), tokens.tolist())
    mean = float((per_token * tokens).sum() / tokens.sum())
    result: dict = {
        "loss": {"difference": mean, "high_95": high, "low_95": low, "verdict": VERDICTS[-_sign(low, high)]},
        "n": len(base),
    }
    for name in FLAGS:
        result[name] = paired(base[name].tolist(), tuned[name].tolist())
    return result


def main(base: str, tuned: str, base_metrics: str, tuned_metrics: str, comparison: str) -> None:
    import pandas as pd

    # No guessing of types: a request that reads like a number or a date stays text.
    metrics = [read_report(base_metrics, base), read_report(tuned_metrics, tuned)]
    rows = [pd.read_json(path, lines=True, dtype=False, convert_dates=False) for path in (base, tuned)]
    for report in metrics:
        report.pop("sha256")
    result = compare(*rows)
    write_report(comparison, {**result, "base": metrics[0], "tuned": metrics[1]})
    for name in ("loss", "exact"):
        row = result[name]
        log.info("%s: %+.3f [%+.3f, %+.3f], %s", name, row["difference"], row["low_95"], row["high_95"], row["verdict"])


if __name__ == "__main__":
    with job(snakemake):
        main(**dict(snakemake.input.items()), comparison=snakemake.output.comparison)
