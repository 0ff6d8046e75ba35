"""Rule ``compare_models``: is the tuned model better than the base, by more than chance? It may say "worse"."""

from scripts.common.errors import UserError
from scripts.common.files import read_json, read_jsonl, write_json
from scripts.common.job import job, log
from scripts.common.statistics import paired_bootstrap_interval

VERDICTS = {1: "better", -1: "worse", 0: "no difference that the interval can carry"}


def _sign(low: float, high: float) -> int:
    """1 when the whole interval is above zero, -1 when it is below, else 0."""
    return int(low > 0) - int(high < 0)


def compare(base: list[dict], tuned: list[dict]) -> dict:
    """Paired differences (tuned minus base) with 95 % bootstrap intervals, over the same requests.

    Raises
    ------
    UserError
        When the two did not answer the same requests.
    """
    if [row["request"] for row in base] != [row["request"] for row in tuned]:
        raise UserError("Base and tuned model did not answer the same requests.", where="evaluation")
    result: dict = {"n": len(base)}
    weights = [float(row["learned_tokens"]) for row in base]
    differences = [
        (after["loss_sum"] - before["loss_sum"]) / before["learned_tokens"]
        for before, after in zip(base, tuned, strict=True)
    ]
    low, high = paired_bootstrap_interval(differences, weights)
    mean = sum(d * w for d, w in zip(differences, weights, strict=True)) / sum(weights)
    result["loss"] = {"difference": mean, "high_95": high, "low_95": low, "verdict": VERDICTS[-_sign(low, high)]}
    for name in ("exact", "exact_canonical", "parses", "program"):
        differences = [float(after[name]) - float(before[name]) for before, after in zip(base, tuned, strict=True)]
        low, high = paired_bootstrap_interval(differences)
        result[name] = {
            "difference": sum(differences) / len(differences),
            "gained": sum(d > 0 for d in differences),
            "high_95": high,
            "lost": sum(d < 0 for d in differences),
            "low_95": low,
            "verdict": VERDICTS[_sign(low, high)],
        }
    return result


def main(base: str, tuned: str, base_metrics: str, tuned_metrics: str, comparison: str) -> None:
    result = compare(list(read_jsonl(base)), list(read_jsonl(tuned)))
    write_json(comparison, {**result, "base": read_json(base_metrics), "tuned": read_json(tuned_metrics)})
    for name in ("loss", "exact"):
        row = result[name]
        log.info("%s: %+.3f [%+.3f, %+.3f], %s", name, row["difference"], row["low_95"], row["high_95"], row["verdict"])


if __name__ == "__main__":
    with job(snakemake):
        main(**dict(snakemake.input.items()), comparison=snakemake.output.comparison)
