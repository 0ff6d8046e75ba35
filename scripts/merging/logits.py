"""Base plus adapter against the merged model: the same logits, and so the same greedy answers.

Rounding alone may differ; how much of it the dtypes explain is in :data:`LOGITS_TOLERANCE`.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.terminal import progress
from dryfit.common.text import gib
from scripts.common.checkpoint import ITEM_BYTES, SAFETENSORS_NAMES, WeightFolder
from scripts.common.machine import host_memory
from scripts.merging.adapter import MergePlan

# Root mean square of the logits' differences that rounding explains, as a share of the logits' standard
# deviation, by the dtype of the weights and the dtype of the computation. Three to ten times what a 30-layer model
# shows (float32 3e-6; bfloat16 weights 7e-3, computing in bfloat16 as well 4e-2); an adapter that was left out
# or added twice differs by more, unless it hardly learned anything.
LOGITS_TOLERANCE = {
    ("float32", "float32"): 1e-4,
    ("float16", "float32"): 3e-3,
    ("bfloat16", "float32"): 2e-2,
    ("float16", "float16"): 2e-2,
    ("bfloat16", "bfloat16"): 1e-1,
}
# The most, in units of that tolerance, by which an answer's token may lead over the one that the merged model
# prefers for the two to be called a tie: four standard deviations of the difference of two logits.
TIE = 6
WORKING_BYTES = 700_000_000  # of a forward pass and of the process beside the weights


@dataclass(frozen=True)
class Questions:
    """What both models are asked: held-out requests, the system prompt of the training, the longest answer."""

    requests: Sequence[str] = ()
    system: str = ""
    max_new_tokens: int = 32


NO_QUESTIONS = Questions()


def result_of(good: bool, **facts: Any) -> dict[str, Any]:
    """A check that ran, with its figures."""
    return {"status": "passed" if good else "failed", **facts}


def not_run(reason: str) -> dict[str, Any]:
    return {"status": "not run", "reason": f"not run: {reason}"}


def comparison_bytes(stored: int, dtype: str, adapter_bytes: int) -> dict[str, int]:
    """Bytes that the comparison of the models needs, by the dtype that it computes in, the preferred one first.

    ``stored``: bytes of the weights' files, of ``dtype``.
    """
    itemsize = ITEM_BYTES[SAFETENSORS_NAMES[dtype]]
    return {
        name: stored * size // itemsize + adapter_bytes + WORKING_BYTES
        for name, size in (("float32", 4), (dtype, itemsize))
    }


def choose_device(sizes: dict[str, int], free: dict[str, int]) -> tuple[str, str] | None:
    """Device and dtype of the computation; None when no device has the room.

    ``sizes``: bytes needed by dtype, the preferred one first. ``free``: free bytes by device, the preferred one first.
    """
    return next(
        ((device, dtype) for device in free for dtype in sizes if free[device] >= sizes[dtype]),
        None,
    )


def free_memory() -> dict[str, int]:
    """Free bytes of the GPU, if there is one, and of the machine."""
    import torch

    free = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    return {**free, "cpu": host_memory()}


class _Answer(NamedTuple):
    sequence: Any  # prompt and answer
    start: int  # tokens of the prompt
    logits: Any  # that chose the answer's tokens

    def logits_of(self, model: Any) -> Any:
        """Another model's logits in the same places."""
        return _logits(model, self.sequence, self.start)


@dataclass
class _Differences:
    """The merged model against base plus adapter, answer by answer.

    Where its most likely token is the answer's at every step, it would have given the same answer. A step at which
    the two best tokens lie within the tolerance is a tie that rounding may break either way.
    """

    tolerance: float
    worst: float = 0.0
    squares: float = 0.0
    same: int = 0
    ties: int = 0
    different: list[int] = field(default_factory=list)

    def add(self, number: int, answer: _Answer, ours: Any) -> None:
        """Count one answer; ``ours`` are the merged model's logits."""
        expected, difference = answer.logits, (ours - answer.logits).abs()
        self.worst = max(self.worst, float(difference.max()))
        self.squares += float(difference.double().square().sum())
        missed = (
            (ours.argmax(-1) != answer.sequence[0, answer.start :].cpu())
            .nonzero()
            .flatten()
            .tolist()
        )
        if not missed:
            self.same += 1
        elif (
            float(expected[missed[0]].max() - expected[missed[0], ours[missed[0]].argmax()])
            <= TIE * self.tolerance
        ):
            self.ties += 1
        else:
            self.different.append(number)


def check_logits(
    plan: MergePlan, merged: WeightFolder, weights: str, questions: Questions, free: dict[str, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Logits and greedy answers of the merged model against base plus adapter; one model in memory at a time.

    Parameters
    ----------
    weights
        Dtype of the merged folder.
    free
        Free bytes by device, the preferred one first.

    Returns
    -------
    tuple
        The results of the checks ``logits`` and ``answers``.
    """
    stored = max(
        sum(shard.bytes for shard in checkpoint.shards) for checkpoint in (plan.base, merged)
    )
    sizes = comparison_bytes(stored, weights, plan.adapter.path.stat().st_size)
    place = choose_device(sizes, free)
    if not questions.requests:
        return (not_run("no requests were given"),) * 2
    if place is None:
        room = ", ".join(
            f"{gib(size, 1)} free" + (f" on {name}" * (len(free) > 1))
            for name, size in free.items()
        )
        return (not_run(f"needs {gib(sizes[weights], 1)}, {room}"),) * 2
    return _compare(plan, merged.folder, weights, place, questions)


def _compare(
    plan: MergePlan, merged: Path, weights: str, place: tuple[str, str], questions: Questions
) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, dtype = place
    gc.freeze()  # the libraries' objects, which the collection would look through
    with torch.inference_mode():
        try:
            answers, effect = _answers(plan, merged, place, questions)
            gc.collect()  # base plus adapter go before the merged model comes
        finally:
            gc.unfreeze()
        model = _load(merged, dtype).to(device).eval()
        spread = float(torch.cat([answer.logits for answer in answers]).std())
        differences = _Differences(LOGITS_TOLERANCE.get((weights, dtype), 1e-4) * spread)
        for number, answer in enumerate(progress(answers, "merged", unit="prompt")):
            differences.add(number, answer, answer.logits_of(model))
    count = sum(answer.logits.numel() for answer in answers)
    tokens = sum(len(answer.logits) for answer in answers)
    rms = (differences.squares / count) ** 0.5
    logits = {
        "adapter_effect": (effect / count) ** 0.5,
        "computed_in": dtype,
        "device": device,
        "logits_standard_deviation": spread,
        "max_abs_difference": differences.worst,
        "positions": tokens,
        "prompts": len(answers),
        "rms_difference": rms,
        "tolerance": differences.tolerance,
    }
    counts = {
        "different": differences.different,
        "prompts": len(answers),
        "same": differences.same,
        "ties": differences.ties,
    }
    return (
        result_of(rms <= differences.tolerance, **logits),
        result_of(not differences.different, **counts, tokens=tokens),
    )


def _answers(
    plan: MergePlan, merged: Path, place: tuple[str, str], questions: Questions
) -> tuple[list[_Answer], float]:
    """Greedy answers of base plus adapter, and by how much the adapter moves their logits (sum of squares)."""
    from peft import PeftModel
    from transformers import GenerationConfig

    device, dtype = place
    prompts, stop = _prompts(merged, questions)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=questions.max_new_tokens,
        eos_token_id=stop,
        pad_token_id=0 if stop is None else stop,
    )
    model = (
        PeftModel.from_pretrained(_load(plan.base.folder, dtype), plan.adapter.folder)
        .to(device)
        .eval()
    )
    answers, effect = [], 0.0
    for prompt in progress(prompts, "base plus adapter", unit="prompt"):
        prompt, start = prompt.to(device), prompt["input_ids"].shape[1]
        sequence = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            generation_config=greedy,
        )
        answers.append(_Answer(sequence, start, _logits(model, sequence, start)))
        with model.disable_adapter():
            effect += float(
                (answers[-1].logits_of(model) - answers[-1].logits).double().square().sum()
            )
    return answers, effect


def _prompts(merged: Path, questions: Questions) -> tuple[list[Any], int | None]:
    """The requests as token ids, and the token that ends an answer."""
    from transformers import AutoTokenizer

    from dryfit.common.chat import render_prompt

    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    texts = [render_prompt(tokenizer, questions.system, request) for request in questions.requests]
    prompts = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
    return prompts, tokenizer.eos_token_id


def _load(folder: Path, dtype: str) -> Any:
    """A model in the dtype of the computation: float32 shows what the merge rounded and nothing else."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=False
    )


def _logits(model: Any, sequence: Any, start: int) -> Any:
    """Logits from the prompt's last token on: each position there predicted one token of the answer."""
    return model(sequence).logits[0, start - 1 : -1].float().cpu()
