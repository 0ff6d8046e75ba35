"""Rule ``encode_dataset``: from text to tokens, with the model's own chat template and one system prompt.

Labels are on the answer and its end token only. A row that is longer than the sequence length is dropped and
counted, or stops the run, as configured; nothing is ever cut.
"""

from pathlib import Path
from typing import Any

from dryfit.common.chat import IGNORED, encode_pairs
from dryfit.common.errors import UserError
from dryfit.common.files import atomic_open, read_folder, read_json, read_report, write_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.common.requests import asked
from scripts.common.tokenizer import read_tokenizer
from scripts.dataset.rows import SPLITS, must_keep_some, read_chunks, write_rows

OVERLONG = "longer than the sequence length"
_ROWS_AT_ONCE = 1_000
_PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)


def percentiles(values: Any) -> dict[str, int]:
    """Percentiles of whole numbers, by nearest rank: each is a length that really occurs."""
    import numpy as np

    if not len(values):
        return {}
    found = np.percentile(values, _PERCENTILES, method="inverted_cdf")
    return {
        f"p{percent:03d}": int(value) for percent, value in zip(_PERCENTILES, found, strict=True)
    }


def refuse_unknown(
    tokenizer: Any, token: int | None, vocabulary: int | None, where: object
) -> None:
    """Raise when the model has no embedding for a token: it would end the run in the middle of a step.

    A tokenizer may have more words than the model as long as no row has them (Gemma 3's image token).
    """
    if token is not None and vocabulary is not None and token >= vocabulary:
        raise UserError(
            f"The tokenizer knows a token that the model does not: {tokenizer.convert_ids_to_tokens(token)!r},"
            f" number {token}, of a vocabulary of {vocabulary}.",
            where=where,
            found=f"{len(tokenizer)} tokens in the tokenizer, vocab_size: {vocabulary} in the model's config.json",
            allowed="the tokenizer that the model was trained with, or a model whose embeddings were resized to it",
        )


def encode_split(
    tokenizer: Any,
    system: str,
    path: str,
    output: str,
    most: int,
    overlong: str,
    vocabulary: int | None = None,
) -> tuple[dict, Any]:
    """Encode one split into a Parquet file of ``input_ids`` and ``labels`` (lists of int32).

    ``vocabulary`` is the number of tokens that the model has embeddings for. Returns what the report says (counts of
    rows and tokens; percentiles of the lengths, in tokens, of whole rows before any was dropped, and of the answers)
    and the dropped rows.
    """
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    lengths: list[int] = []
    answers: list[int] = []
    dropped = [pd.DataFrame()]
    # Small files that are read once: speed of reading counts, and equal rows must be equal bytes.
    with (
        atomic_open(output, "wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        # A few at a time: as lists of Python's numbers, the tokens of 100,000 rows take half a GB.
        for rows in read_chunks(path, _ROWS_AT_ONCE):
            pairs, before = asked(rows.to_dict("records"))
            encoded = encode_pairs(tokenizer, system, pairs, before)
            rows["length"] = [len(ids) for ids, _ in encoded]
            lengths += rows["length"].tolist()
            for top in sorted(range(len(encoded)), key=lambda number: -max(encoded[number][0]))[:1]:
                place = f"{path}: {rows['source'].iloc[top]}, line {rows['line'].iloc[top]}"
                refuse_unknown(tokenizer, max(encoded[top][0]), vocabulary, place)
            answers += [len(labels) - labels.count(IGNORED) for _, labels in encoded]
            dropped.append(rows[rows["length"] > most])
            kept = [pair for pair in encoded if len(pair[0]) <= most]
            columns = [
                pa.array([pair[column] for pair in kept], schema[column].type) for column in (0, 1)
            ]
            writer.write_table(pa.table(columns, schema=schema))
        refused = pd.concat(dropped)
        if overlong == "fail" and len(refused):
            first = refused.iloc[0]
            raise UserError(
                f"A row is too long: {first['length']} tokens, more than the sequence length of {most}.",
                where=f"{path}: {first['source']}, line {first['line']}",
                found=first["request"][:120],
                allowed=f"at most {most} tokens; or a longer training.sequence_length; or dropping such rows",
                write="dataset:\n  encode:\n    overlong: drop",
            )
    if len(refused):
        detail = (
            refused.pop("length").astype(str) + f" tokens, more than the sequence length of {most}"
        )
        refused = refused.assign(detail=detail, reason=OVERLONG, stage="encode")
    whole, learned = np.array(lengths, dtype=int), np.array(answers, dtype=int)
    fits = whole <= most
    return {
        "answer_lengths": percentiles(learned),
        "answer_tokens": int(learned[fits].sum()),
        "kept": int(fits.sum()),
        "lengths": percentiles(whole),
        "overlong": int((~fits).sum()),
        "rows": len(whole),
        "tokens": int(whole[fits].sum()),
    }, refused


def must_be_enough(splits: dict[str, dict], rows_a_step: int) -> None:
    """Raise when a split is empty, or when there are not enough rows for one optimizer step."""
    for name, split in splits.items():
        must_keep_some(
            f"encode {name}",
            split["kept"],
            {OVERLONG: split["overlong"]},
            "training.sequence_length",
        )
    if splits["train"]["kept"] < rows_a_step:
        raise UserError(
            "There are fewer rows to train on than one step takes.",
            where="dataset.sources; training.rows_per_step, without packing micro_batch and gradient_accumulation",
            found=f"{splits['train']['kept']} rows, {rows_a_step} for a step",
            allowed=f"at least {rows_a_step} rows in the training split; or smaller steps",
            write=f"training:\n  rows_per_step: {splits['train']['kept']}  # with packing\n"
            "  micro_batch: 1\n  gradient_accumulation: 1",
        )


def main(
    inputs: dict,
    outputs: dict,
    system: str,
    overlong: str,
    sequence_length: int,
    rows_a_step: int = 1,
) -> None:
    """Encode the three splits for one model (its tokenizer) and one sequence length, in tokens."""
    import pandas as pd

    read_report(inputs["split"], *(inputs[name] for name in SPLITS))
    read_report(inputs["check"])
    read_folder(inputs["description"])
    folder = Path(inputs["tokenizer"]).parent
    tokenizer, model = read_tokenizer(folder), read_json(folder / "config.json")
    vocabulary = (model.get("text_config") or model).get("vocab_size")
    refuse_unknown(
        tokenizer,
        tokenizer.pad_token_id,
        vocabulary,
        f"{inputs['tokenizer']}: the token for padding",
    )
    splits, dropped = {}, []
    for name in SPLITS:
        found, some = encode_split(
            tokenizer, system, inputs[name], outputs[name], sequence_length, overlong, vocabulary
        )
        splits[name] = found
        dropped.append(some)
        log.info(
            "%s: %s",
            name,
            ", ".join(
                f"{found[key]} {key}" for key in ("rows", "overlong", "tokens", "answer_tokens")
            ),
        )
    must_be_enough(splits, rows_a_step)
    write_rows(outputs["rejected"], pd.concat(dropped))
    report = {
        "overlong": overlong,
        "sequence_length": sequence_length,
        "splits": splits,
        "system_prompt": system,
    }
    write_report(outputs["report"], report, *(outputs[name] for name in (*SPLITS, "rejected")))


if __name__ == "__main__":
    with job(snakemake):
        main(
            dict(snakemake.input.items()),
            dict(snakemake.output.items()),
            snakemake.params.prompt["system"],
            snakemake.params.encode["overlong"],
            int(snakemake.wildcards.sequence_length),
            snakemake.resources.rows_a_step,
        )
