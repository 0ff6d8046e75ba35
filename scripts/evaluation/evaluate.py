"""Rules ``evaluate_base`` and ``evaluate_tuned``: put held-out requests to a model and score what it says.

Both models get the same prompt and greedy decoding. What a model says is text: it is parsed and screened,
never run.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.common.chat import encode_pairs, render_prompt
from scripts.common.files import read_jsonl, write_json, write_jsonl
from scripts.common.job import job, keep_host_memory, log, progress
from scripts.common.statistics import wilson_interval
from scripts.common.syntax import check_syntax
from scripts.dataset.screen import screen


def strip_fence(answer: str) -> str:
    """The content of the first Markdown fence, wherever a model put its command into one; else the answer."""
    text = answer.strip()
    before, fence, rest = text.partition("```")
    if not fence or (before and not before.endswith("\n")):
        return text
    content = rest.partition("\n")[2]  # after the language's name
    return content.partition("\n```")[0].strip()


def program(command: str) -> str:
    """The first word of a command."""
    return command.split(maxsplit=1)[0] if command.split() else ""


def score(answers: list[str], expected: list[str]) -> list[dict]:
    """Everything that can be said of answers without running them."""
    stripped = [strip_fence(answer) for answer in answers]
    raw, forms, wanted = check_syntax(answers), check_syntax(stripped), check_syntax(expected)
    return [
        {
            "exact": answers[i].strip() == expected[i].strip(),
            "exact_canonical": forms[i].canonical is not None and forms[i].canonical == wanted[i].canonical,
            "parses": bool(answers[i].strip()) and raw[i].error is None,
            "parses_without_fence": bool(stripped[i]) and forms[i].error is None,
            "program": program(stripped[i]) == program(expected[i]),
            "screen": screen(stripped[i]).status,
        }
        for i in range(len(answers))
    ]


def summarize(rows: list[dict]) -> dict:
    """Counts with Wilson intervals, chrF, and the mean loss of an answer token in nats."""
    from sacrebleu.metrics import CHRF

    n = len(rows)

    def share(flags: Iterable[bool]) -> dict:
        count = sum(flags)
        low, high = wilson_interval(count, n)
        return {"count": count, "high_95": high, "low_95": low, "n": n, "share": count / n}

    tokens = sum(row["learned_tokens"] for row in rows)
    chrf = CHRF().corpus_score([strip_fence(row["answer"]) for row in rows], [[row["command"] for row in rows]])
    return {
        "chrf": chrf.score,
        "danger": share(row["screen"] == "danger" for row in rows),
        "loss": sum(row["loss_sum"] for row in rows) / tokens,
        "loss_tokens": tokens,
        "n": n,
        **{
            name: share(row[name] for row in rows)
            for name in ("exact", "exact_canonical", "parses", "parses_without_fence", "program")
        },
    }


def answer_losses(model: Any, tokenizer: Any, pairs: list[dict], system: str, batch_size: int) -> list[tuple]:
    """Summed negative log-likelihood (nats) and number of tokens of each expected answer."""
    import torch

    from scripts.training.batches import IGNORED, Row, collate

    encoded = encode_pairs(tokenizer, system, [(pair["request"], pair["command"]) for pair in pairs])
    rows = [Row(*row) for row in encoded]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    results: list[tuple] = [()] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    starts = range(0, len(order), batch_size)
    for first in progress(starts, "loss on the expected answers", unit="batch"):
        chosen = order[first : first + batch_size]
        batch = collate([rows[index] for index in chosen], pad, model.device)
        labels = batch["labels"][:, 1:]
        kept = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)  # the positions where any row is learned
        labels = labels[:, kept]
        with torch.inference_mode():  # a vocabulary of logits for each token of the prompts takes time and memory
            logits = model(input_ids=batch["input_ids"], logits_to_keep=kept).logits
        losses = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        for position, index in enumerate(chosen):
            results[index] = (float(losses[position].sum()), int((labels[position] != IGNORED).sum()))
    return results


def answers(
    model: Any, tokenizer: Any, pairs: list[dict], system: str, max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers, padded on the left, in batches of prompts of like length."""
    import torch

    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompts = [render_prompt(tokenizer, system, pair["request"]) for pair in pairs]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results = [""] * len(prompts)
    for first in progress(range(0, len(order), batch_size), "answers", unit="batch"):
        chosen = order[first : first + batch_size]
        batch = tokenizer(
            [prompts[index] for index in chosen], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            results[index] = text.replace("\0", " ").strip()
    return results


def main(
    model_folder: Path,
    tokenizer_folder: Path,
    test: str,
    prompt: dict,
    settings: dict,
    device: str,
    threads: int,
    answers_path: str,
    metrics_path: str,
) -> None:
    """Answer, score, and write a row for each request and the summary."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_host_memory()
    pairs = list(read_jsonl(test))[: settings["requests"]]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    # A 16-bit 7B model is larger than a card of 16 GB: "auto" leaves the layers that don't fit to the processor.
    placement = "auto" if device == "cuda" else device
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto", device_map=placement).eval()
    elsewhere = sum(place in ("cpu", "disk") for place in model.hf_device_map.values()) if device == "cuda" else 0
    if elsewhere:
        log.warning("%d parts of the model don't fit the card and are copied to it for each batch: slow", elsewhere)
    losses = answer_losses(model, tokenizer, pairs, prompt["system"], settings["batch_size"])
    said = answers(model, tokenizer, pairs, prompt["system"], settings["max_new_tokens"], settings["batch_size"])
    scores = score(said, [pair["command"] for pair in pairs])
    rows = [
        {
            "answer": answer,
            "command": pair["command"],
            "learned_tokens": learned,
            "loss_sum": loss_sum,
            "request": pair["request"],
            **scored,
        }
        for pair, (loss_sum, learned), answer, scored in zip(pairs, losses, said, scores, strict=True)
    ]
    write_jsonl(answers_path, rows)
    summary = summarize(rows)
    write_json(metrics_path, {**summary, "decoding": {"do_sample": False, **settings}, "prompt": prompt})
    exact = summary["exact"]
    log.info("loss %.3f, exact match %d of %d", summary["loss"], exact["count"], exact["n"])


if __name__ == "__main__":
    with job(snakemake):
        main(
            Path(snakemake.input.weights).parent,
            Path(snakemake.input.tokenizer).parent,
            snakemake.input.test,
            snakemake.params.prompt,
            snakemake.params.evaluation,
            snakemake.params.device["device"],
            snakemake.threads,
            snakemake.output.answers,
            snakemake.output.metrics,
        )
