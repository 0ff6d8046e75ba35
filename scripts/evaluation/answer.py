"""Greedy answers to requests, and the loss of the expected answers, from one pass over each prompt.

What all prompts begin with (the template and the system prompt) is computed once and its keys and values serve every
row. Each prompt's own part is computed once, for the expected answer and for the answer given. Logits are made where
one of them needs them, and a row that has ended is dropped from its batch.

    keys        [prefix] [own part of the prompt, padded on the left] [answer]
    positions    0..P-1   P..n-1                                        n..

It needs an architecture that takes positions and a mask as given (as packing does). Where the two shortest and longest
prompts' losses are not those of the rows alone, :func:`separately` asks the model in transformers' own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from scripts.common.chat import encode_pairs
from scripts.common.job import log, progress
from scripts.training.batches import IGNORED, Row, collate
from scripts.training.packing import attention_masks, common_prefix
from scripts.training.step import decoder_returns

# How far the self-test's losses may be apart, as a share: rounding is less, a mask that went unheeded more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Settings of a model's own generation_config that change greedy answers, but for `repetition_penalty`.
_OTHER_RULES = ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")
_OTHER_RULES += ("forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens", "stop_strings")


class Answered(NamedTuple):
    """One request: what the model said, and the expected answer's summed loss (nats) and number of tokens."""

    answer: str
    loss_sum: float
    tokens: int


def ask(
    model: nn.Module,
    tokenizer: Any,
    system: str,
    pairs: Sequence[tuple[str, str]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answered]:
    """Put requests to a model.

    Parameters
    ----------
    model
        A causal language model of transformers in evaluation mode.
    tokenizer
        Its tokenizer, with a chat template.
    system
        The system prompt.
    pairs
        Requests and expected commands.
    max_new_tokens
        Where an answer ends if the model does not end it.
    batch_size
        Requests that are answered at once.

    Returns
    -------
    list of Answered
        In the order of the pairs.
    """
    if not pairs:
        return []
    rows = [Row(*row) for row in encode_pairs(tokenizer, system, pairs)]
    shared, reason = _shared(model, tokenizer, rows)
    if shared is None:
        log.warning("loss and answers are computed apart, in twice the time: %s", reason)
        return separately(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size)
    results: list[Answered | None] = [None] * len(rows)
    for chosen in progress(batches(shared.prompts, batch_size), "loss and answers", unit="batch"):
        losses, said = shared.ask(chosen, max_new_tokens)
        texts = _texts(tokenizer, said)
        for number, index in enumerate(chosen):
            results[index] = Answered(texts[number], losses[number], len(shared.expected[index]))
    return results  # type: ignore[return-value]


def batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of the prompts that are put at once: those of like length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _texts(tokenizer: Any, said: list[list[int]]) -> list[str]:
    """Tokens as text; a NUL byte can stand in no file of commands."""
    return [text.replace("\0", " ").strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


def _halves(row: Row) -> tuple[list[int], list[int]]:
    """Prompt and expected answer of a row."""
    end = next(index for index, label in enumerate(row.labels) if label != IGNORED)
    return row.input_ids[:end], row.input_ids[end:]


class _State:
    """A batch whose prompts have been read: cache, positions and validity of its keys, logits of the first token."""

    def __init__(self, chosen: list[int], cache: Any, positions: torch.Tensor, valid: torch.Tensor) -> None:
        self.chosen, self.cache, self.positions, self.valid = chosen, cache, positions, valid
        self.first: torch.Tensor | None = None  # logits of each answer's first token: (rows, vocabulary)

    def cut(self, length: int) -> None:
        """Forget the keys and values of all but the first ``length`` tokens."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        self.positions, self.valid = self.positions[:, :length], self.valid[:, :length]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all but some rows."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.positions, self.valid = self.positions[rows], self.valid[rows]


class Shared:
    """A model and what all its prompts begin with."""

    def __init__(self, model: nn.Module, rows: Sequence[Row]) -> None:
        self.model, self.device = model, model.device
        self.prompts, self.expected = map(list, zip(*map(_halves, rows), strict=True))
        # At least one token of each prompt is its own: the one that the answer follows.
        self.prefix = self.prompts[0][: common_prefix(rows)]
        settings = model.generation_config
        ends = settings.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.penalty = settings.repetition_penalty or 1.0
        self.config = model.config.get_text_config()
        with torch.inference_mode():
            self.head = self._cache()
            if self.prefix:
                positions = torch.arange(len(self.prefix), device=self.device)[None]
                valid = torch.ones_like(positions, dtype=torch.bool)
                self._run([self.prefix], positions, _State([0], self.head, positions[:, :0], valid[:, :0]))

    def _cache(self) -> Any:
        """A cache that keeps every key: the masks say what a sliding window sees."""
        from transformers import DynamicCache

        return DynamicCache()

    def _run(self, tokens: Any, positions: torch.Tensor, state: _State, valid: torch.Tensor | None = None) -> Any:
        """Read tokens of shape (rows, new) after what the cache holds; returns the decoder's output."""
        valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        state.positions = torch.cat([state.positions, positions], dim=1)
        state.valid = torch.cat([state.valid, valid], dim=1)
        distance = positions[:, :, None] - state.positions[:, None, :]
        seen = state.valid[:, None, :] & (distance >= 0)
        return self.model.get_decoder()(
            input_ids=torch.as_tensor(tokens, device=self.device),
            attention_mask=attention_masks(seen, distance, self.config, self.model.dtype),
            position_ids=positions,
            cache=state.cache,
            use_cache=True,
        )

    def _logits(self, output: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocabulary) at n places of the decoder's output, by the architecture's own head."""
        hidden = output.last_hidden_state[rows, places]
        with decoder_returns(self.model.get_decoder(), type(output)(last_hidden_state=hidden[None])):
            return self.model(inputs_embeds=hidden[None]).logits[0].float()

    def ask(self, chosen: list[int], max_new_tokens: int) -> tuple[list[float], list[list[int]]]:
        """Losses of the expected answers (nats) and tokens of the answers given, for some prompts at once."""
        with torch.inference_mode():
            state = self.read_prompts(chosen)
            return self.losses(state), self.answers(state, max_new_tokens)

    def read_prompts(self, chosen: list[int]) -> _State:
        """Read the prompts' own parts after the prefix."""
        shared = len(self.prefix)
        own = [self.prompts[index][shared:] for index in chosen]
        longest = max(map(len, own))
        cache, count = self._cache(), len(chosen)
        for number, layer in enumerate(self.head.layers):
            cache.update(layer.keys.expand(count, -1, -1, -1), layer.values.expand(count, -1, -1, -1), number)
        positions = torch.arange(shared, device=self.device).expand(count, -1)
        state = _State(chosen, cache, positions, torch.ones_like(positions, dtype=torch.bool))
        gaps = torch.tensor([longest - len(part) for part in own], device=self.device)[:, None]
        places = torch.arange(longest, device=self.device)[None]
        tokens = [[part[0]] * (longest - len(part)) + part for part in own]  # padding that nothing looks at
        positions = (shared + places - gaps).clamp(min=0)
        output = self._run(tokens, positions, state, places >= gaps)
        everyone = torch.arange(count, device=self.device)
        state.first = self._logits(output, everyone, torch.full_like(everyone, longest - 1))
        return state

    def losses(self, state: _State) -> list[float]:
        """Summed loss (nats) of each expected answer; the state is left as it was."""
        answers = [self.expected[index] for index in state.chosen]
        targets = torch.tensor([answer[0] for answer in answers], device=self.device)
        sums = nn.functional.cross_entropy(state.first, targets, reduction="none")
        longest = max(map(len, answers))
        if longest > 1:
            length = state.positions.shape[1]
            tokens = [answer[:-1] + [answer[-1]] * (longest - len(answer)) for answer in answers]
            positions = state.positions[:, -1:] + torch.arange(1, longest, device=self.device)
            output = self._run(tokens, positions, state)
            pairs = [(row, place) for row, answer in enumerate(answers) for place in range(len(answer) - 1)]
            rows, places = torch.tensor(pairs, device=self.device).T
            targets = torch.tensor([token for answer in answers for token in answer[1:]], device=self.device)
            rest = nn.functional.cross_entropy(self._logits(output, rows, places), targets, reduction="none")
            sums = sums.index_add(0, rows, rest)
            state.cut(length)
        return sums.tolist()

    def answers(self, state: _State, max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens of each row up to its end; the state is used up."""
        said: list[list[int]] = [[] for _ in state.chosen]
        alive, logits = list(range(len(state.chosen))), state.first
        for step in range(max_new_tokens):
            if self.penalty != 1.0:
                for row, number in enumerate(alive):
                    met = sorted({*self.prompts[state.chosen[number]], *said[number]})
                    score = logits[row, met]
                    logits[row, met] = torch.where(score < 0, score * self.penalty, score / self.penalty)
            tokens = logits.argmax(dim=-1).tolist()
            for number, token in zip(alive, tokens, strict=True):
                said[number].append(token)
            going = [row for row, token in enumerate(tokens) if token not in self.ends]
            if not going or step + 1 == max_new_tokens:
                break
            if len(going) < len(alive):
                state.keep(torch.tensor(going, device=self.device))
                alive = [alive[row] for row in going]
            positions = state.positions[:, -1:] + 1
            output = self._run([[tokens[row]] for row in going], positions, state)
            everyone = torch.arange(len(going), device=self.device)
            logits = self._logits(output, everyone, torch.zeros_like(everyone))
        return said


def _shared(model: nn.Module, tokenizer: Any, rows: Sequence[Row]) -> tuple[Shared | None, str]:
    """The model with the prompts' beginning read; None, and why, where two rows so have other losses than alone."""
    settings = model.generation_config
    if used := [name for name in _OTHER_RULES if getattr(settings, name, None)]:
        return None, f"the model's generation_config sets {', '.join(used)}"
    pair = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    pair = sorted({pair[0], pair[-1]})
    try:
        shared = Shared(model, rows)
        with torch.inference_mode():
            found = shared.losses(shared.read_prompts(pair))
    except Exception as error:  # architectures refuse masks, positions and caches each in their own way
        return None, f"{type(error).__name__}: {str(error)[:200]}"
    alone = [answer_losses(model, tokenizer, [rows[index]], 1)[0][0] for index in pair]
    tolerance = TOLERANCE.get(model.dtype, 1e-4)
    if all(abs(one - other) <= tolerance * abs(other) for one, other in zip(found, alone, strict=True)):
        return shared, ""
    return None, f"with a shared prefix two losses are {found}, alone {alone}"


# --- transformers' own way --------------------------------------------------------------------------------------------


def separately(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, max_new_tokens: int, batch_size: int
) -> list[Answered]:
    """The same by ``generate`` and a forward pass over whole rows: for every architecture, in twice the time."""
    losses = answer_losses(model, tokenizer, rows, batch_size)
    texts = generate(model, tokenizer, rows, max_new_tokens, batch_size)
    return [Answered(text, *loss) for text, loss in zip(texts, losses, strict=True)]


def answer_losses(model: nn.Module, tokenizer: Any, rows: Sequence[Row], batch_size: int) -> list[tuple[float, int]]:
    """Summed negative log-likelihood (nats) and number of tokens of each expected answer."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for chosen in batches([row.input_ids for row in rows], batch_size):
        batch = collate([rows[index] for index in chosen], pad, model.device)
        labels = batch["labels"][:, 1:]
        kept = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)  # the positions where any row is learned
        labels = labels[:, kept]
        with torch.inference_mode():
            logits = model(input_ids=batch["input_ids"], logits_to_keep=kept).logits
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        for position, index in enumerate(chosen):
            results[index] = (float(losses[position].sum()), int((labels[position] != IGNORED).sum()))
    return results


def generate(model: nn.Module, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int, batch_size: int) -> list[str]:
    """Greedy answers by transformers' ``generate``, padded on the left, in batches of prompts of like length."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts = [_halves(row)[0] for row in rows]
    results = [""] * len(rows)
    for chosen in progress(batches(prompts, batch_size), "answers", unit="batch"):
        longest = max(len(prompts[index]) for index in chosen)
        gaps = [longest - len(prompts[index]) for index in chosen]
        ids = [[pad] * gap + prompts[index] for gap, index in zip(gaps, chosen, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        for index, text in zip(chosen, _texts(tokenizer, output[:, longest:]), strict=True):
            results[index] = text
    return results
