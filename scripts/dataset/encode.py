"""Rule ``encode_dataset``: from text to tokens, with the model's own chat template and one system prompt.

Labels are on the answer and its end token only. A row that is longer than the sequence length is dropped and
counted, or stops the run, as configured; nothing is ever cut.
"""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scripts.common.chat import IGNORED, encode_pairs
from scripts.common.errors import UserError
from scripts.common.files import atomic_open, read_jsonl, write_json
from scripts.common.job import job, log
from scripts.dataset.rows import chunks, must_keep_some, write_row

_PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)


def percentiles(values: Any) -> dict[str, int]:
    """Percentiles of whole numbers, by nearest rank: each is a length that really occurs."""
    import numpy as np

    if not len(values):
        return {}
    found = np.percentile(values, _PERCENTILES, method="inverted_cdf")
    return {f"p{percent:03d}": int(value) for percent, value in zip(_PERCENTILES, found, strict=True)}


def encode_split(tokenizer: Any, system: str, path: str, output: str, most: int, overlong: str, refuse: Any) -> dict:
    """Encode one split into a Parquet file of ``input_ids`` and ``labels`` (lists of int32).

    Returns
    -------
    dict
        ``rows``, ``kept``, ``overlong``, ``tokens``, ``learned_tokens``, and the percentiles of the lengths
        (in tokens) of whole rows before any was dropped, and of the answers.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    lengths: list[Any] = []
    answers: list[Any] = []
    with ExitStack() as stack:
        file = stack.enter_context(atomic_open(output, "wb"))
        # Small files that are read once: speed of reading counts, and equal rows must be equal bytes.
        writer = stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
        for chunk in chunks(read_jsonl(path), 1_000):
            encoded = encode_pairs(tokenizer, system, [(row["request"], row["command"]) for row in chunk])
            lengths.append(np.array([len(ids) for ids, _ in encoded]))
            answers.append(np.array([len(labels) - labels.count(IGNORED) for _, labels in encoded]))
            kept = []
            for row, pair in zip(chunk, encoded, strict=True):
                if len(pair[0]) <= most:
                    kept.append(pair)
                    continue
                reason = f"{len(pair[0])} tokens, more than the sequence length of {most}"
                if overlong == "fail":
                    raise UserError(
                        f"A row is too long: {reason}.",
                        where=f"{path}: {row['source']}, line {row['line']}",
                        found=row["request"][:120],
                        allowed=f"at most {most} tokens; or a longer training.sequence_length; or dropping such rows",
                        write="dataset:\n  encode:\n    overlong: drop",
                    )
                write_row(
                    refuse, {**row, "reason": "longer than the sequence length", "detail": reason, "stage": "encode"}
                )
            columns = [pa.array([pair[column] for pair in kept], schema[column].type) for column in (0, 1)]
            writer.write_table(pa.table(columns, schema=schema))
    whole = np.concatenate(lengths) if lengths else np.array([], dtype=int)
    learned = np.concatenate(answers) if answers else np.array([], dtype=int)
    fits = whole <= most
    return {
        "answer_lengths": percentiles(learned),
        "kept": int(fits.sum()),
        "learned_tokens": int(learned[fits].sum()),
        "lengths": percentiles(whole),
        "overlong": int((~fits).sum()),
        "rows": len(whole),
        "tokens": int(whole[fits].sum()),
    }


def main(inputs: dict[str, str], outputs: dict[str, str], prompt: dict, encode: dict, sequence_length: int) -> None:
    """Encode the three splits for one model and one sequence length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(inputs["tokenizer"]).parent)
    report: dict[str, Any] = {}
    with atomic_open(outputs["rejected"]) as refuse:
        for split in ("train", "validation", "test"):
            report[split] = encode_split(
                tokenizer, prompt["system"], inputs[split], outputs[split], sequence_length, encode["overlong"], refuse
            )
            log.info(
                "%s: %d rows, %d too long; %d tokens, %d of them learned",
                *(split, report[split]["rows"], report[split]["overlong"]),
                *(report[split]["tokens"], report[split]["learned_tokens"]),
            )
        dropped = Counter({"longer than the sequence length": report["train"]["overlong"]})
        must_keep_some("encode", report["train"]["kept"], dropped, "training.sequence_length")
    write_json(
        outputs["report"],
        {
            "overlong": encode["overlong"],
            "sequence_length": sequence_length,
            "splits": report,
            "system_prompt": prompt["system"],
        },
    )


if __name__ == "__main__":
    with job(snakemake):
        main(
            dict(snakemake.input.items()),
            dict(snakemake.output.items()),
            snakemake.params.prompt,
            snakemake.params.encode,
            int(snakemake.wildcards.sequence_length),
        )
