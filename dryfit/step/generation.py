"""Greedy answers to requests, and the loss of the expected answers, from one pass over each prompt.

What all prompts begin with (the template and the system prompt) is computed once, and its keys and values serve every
row. Then each prompt's own part is read together with the answer expected to it, some rows of like length at a time.
Keys and values stay where they were written, and all rows' answers go on from there in one batch, blind to the expected
answers:

    keys         [prefix] [own part of the prompt] [unseen] [answer]
    positions     0..P-1   P..n-1                            n..

Logits are made where one of the two needs them, and rows that have ended leave the batch.

It needs an architecture that takes positions and a mask as given (as packing does). Where the shortest and the longest
row so have other logits than alone, :func:`separately` asks the model in transformers' own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from dryfit.common.chat import Shots, encode_pairs
from dryfit.common.terminal import log, progress
from dryfit.step.batches import IGNORED, Row, collate
from dryfit.step.packing import attention_masks, common_prefix, is_of_the_device
from dryfit.step.step import decoder_returns

# How far the self-test's logits may be apart, as a share of their spread: rounding is less, an unheeded mask more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
READ_TOKENS = 1024  # prompts and expected answers in one pass: more makes a CPU no faster and only needs more memory
LIKE = 3  # prompts so many times as long as the shortest go into another batch: each row has room for the longest
DROP_AT = 8  # of so many rows one may have ended before rows are dropped, for that copies the others' keys and values
# Settings of a model's own generation_config that change greedy answers, but for `repetition_penalty`.
_OTHER_RULES = (
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
)
_OTHER_RULES += (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
    "stop_strings",
)


class Answered(NamedTuple):
    """One request: the model's text, and the expected answer's summed loss (nats) and number of tokens."""

    answer: str
    loss_sum: float
    tokens: int


def ask(
    model: nn.Module,
    tokenizer: Any,
    system: str,
    pairs: Sequence[tuple[str, str]],
    shots: Sequence[Shots] | None = None,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answered]:
    """Put requests to a model, each behind its shots.

    The answers are in the order of the pairs.
    """
    if not pairs:
        return []
    rows = [Row(*row) for row in encode_pairs(tokenizer, system, pairs, shots)]
    shared, reason = _shared(model, rows)
    if shared is None:
        log.warning("loss and answers are computed apart, in twice the time: %s", reason)
        return separately(
            model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    results: list[Answered | None] = [None] * len(rows)
    for chosen in progress(batches(shared.prompts, batch_size), "loss and answers", unit="batch"):
        losses, said = shared.ask(chosen, max_new_tokens)
        texts = _texts(tokenizer, said)
        for number, index in enumerate(chosen):
            results[index] = Answered(texts[number], losses[number], len(shared.expected[index]))
    return results  # type: ignore[return-value]


def batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of the prompts that are put at once: those of like length, the shortest first."""
    chosen: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        begins = not chosen or len(chosen[-1]) == batch_size
        if begins or len(prompts[index]) > LIKE * len(prompts[chosen[-1][0]]):
            chosen.append([])
        chosen[-1].append(index)
    return chosen


def _texts(tokenizer: Any, said: list[list[int]]) -> list[str]:
    """Tokens as text; a NUL byte can stand in no file of commands."""
    return [
        text.replace("\0", " ").strip()
        for text in tokenizer.batch_decode(said, skip_special_tokens=True)
    ]


def halves(row: Row) -> tuple[list[int], list[int]]:
    """Prompt and expected answer of a row."""
    end = next(index for index, label in enumerate(row.labels) if label != IGNORED)
    return row.input_ids[:end], row.input_ids[end:]


class _Keys(DynamicCache):
    """Keys and values of a batch, written in place into room that is made once; every layer keeps all of them.

    Masks say what a sliding window sees. ``rows`` and ``begin``: where the next ones belong. ``head``: the keys and
    values of one row that all rows begin with.
    """

    def __init__(self, count: int, length: int, head: _Keys | None = None) -> None:
        super().__init__()
        self.count, self.length, self.head = count, length, head
        self.room: list[
            list[torch.Tensor]
        ] = []  # of each layer: keys and values, (rows, heads, length, width)
        self.rows, self.begin = slice(0, count), 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        new = keys, values
        if layer_idx == len(self.room):
            self.room.append(
                [one.new_zeros(self.count, one.shape[1], self.length, one.shape[3]) for one in new]
            )
            if self.head is not None:
                for whole, shared in zip(self.room[-1], self.head.room[layer_idx], strict=True):
                    whole[:, :, : shared.shape[2]] = shared
        end = self.begin + keys.shape[2]
        for whole, one in zip(self.room[layer_idx], new, strict=True):
            whole[self.rows, :, self.begin : end] = one
        return tuple(whole[self.rows, :, :end] for whole in self.room[layer_idx])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.begin

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all but some rows."""
        self.room = [[whole[rows.to(whole.device)] for whole in layer] for layer in self.room]
        self.rows = slice(0, len(rows))


class Shared:
    """A model, with the keys and values of the tokens that all prompts begin with computed once."""

    def __init__(self, model: nn.Module, rows: Sequence[Row]) -> None:
        self.model, self.device = model, model.device
        self.prompts, self.expected = map(list, zip(*map(halves, rows), strict=True))
        # At least one token of each prompt is its own: the one that the answer follows.
        self.prefix = self.prompts[0][: common_prefix(rows)]
        settings = model.generation_config
        ends = settings.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.penalty = settings.repetition_penalty or 1.0
        self.config = model.config.get_text_config()
        self.head = None
        if self.prefix:
            self.head = _Keys(1, len(self.prefix))
            places = torch.arange(len(self.prefix), device=self.device)[None]
            with torch.inference_mode():
                self.run(self.head, [self.prefix], places, places)

    def run(
        self,
        keys: _Keys,
        tokens: Any,
        positions: torch.Tensor,
        of_keys: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> Any:
        """Read tokens at positions of shape (rows, new); returns the decoder's output.

        ``of_keys`` and ``valid`` (rows, keys): the positions of the keys, and which of them are seen at all.
        """
        distance = positions[:, :, None] - of_keys[:, None, :]
        seen = distance >= 0
        return self.model.get_decoder()(
            input_ids=torch.as_tensor(tokens, device=self.device),
            attention_mask=attention_masks(
                seen if valid is None else seen & valid[:, None, :],
                distance,
                self.config,
                self.model.dtype,
            ),
            position_ids=positions,
            cache=keys,
            use_cache=True,
        )

    def logits(self, output: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocabulary) at n places of the decoder's output, by the architecture's own head."""
        hidden = output.last_hidden_state[rows, places]
        with decoder_returns(
            self.model.get_decoder(), type(output)(last_hidden_state=hidden[None])
        ):
            return self.model(inputs_embeds=hidden[None]).logits[0].float()

    def ask(
        self, chosen: Sequence[int], max_new_tokens: int
    ) -> tuple[list[float], list[list[int]]]:
        """Losses of the expected answers (nats) and tokens of the answers given, for some prompts at once."""
        with torch.inference_mode():
            batch = _Batch(self, chosen, max_new_tokens)
            losses = {index: loss for group in batch.groups for index, loss in batch.losses(group)}
            said = dict(zip(batch.chosen, batch.answers(max_new_tokens), strict=True))
        return [losses[index] for index in chosen], [said[index] for index in chosen]


class _Batch:
    """Prompts that are answered at once: read in groups of like length, which stand together in ``keys``."""

    def __init__(self, shared: Shared, chosen: Sequence[int], max_new_tokens: int) -> None:
        self.shared, self.device = shared, shared.device
        whole = {
            index: len(shared.prompts[index]) + len(shared.expected[index]) - 1 for index in chosen
        }
        self.chosen = sorted(chosen, key=whole.__getitem__)
        self.groups: list[list[int]] = []
        for index in self.chosen:  # each the longest of its group so far
            own = whole[index] - len(shared.prefix)
            if not self.groups or (len(self.groups[-1]) + 1) * own > READ_TOKENS:
                self.groups.append([])
            self.groups[-1].append(index)
        lengths = [len(shared.prompts[index]) for index in self.chosen]
        self.read = max(lengths)  # answers follow here, behind the longest prompt
        length = max(*whole.values(), self.read + max_new_tokens - 1)
        self.keys = _Keys(len(self.chosen), length, shared.head)
        self.lengths = torch.tensor(lengths, device=self.device)[:, None]
        places = torch.arange(length, device=self.device)[None]
        said = places >= self.read
        self.positions = torch.where(
            said, self.lengths + places - self.read, places
        )  # of each row's keys
        self.valid = said | (places < self.lengths)
        self.first: list[
            torch.Tensor
        ] = []  # logits of the answers' first tokens, (1, vocabulary) each

    def logits(self, group: list[int]) -> torch.Tensor:
        """Read a group's prompts and expected answers; the logits of all answers' tokens: (tokens, vocabulary)."""
        shared, prefix = self.shared, len(self.shared.prefix)
        parts = [shared.prompts[index][prefix:] + shared.expected[index][:-1] for index in group]
        begin, longest = self.chosen.index(group[0]), max(map(len, parts))
        self.keys.rows, self.keys.begin = slice(begin, begin + len(group)), prefix
        tokens = [
            part + [part[-1]] * (longest - len(part)) for part in parts
        ]  # padding that nothing looks at
        places = torch.arange(prefix + longest, device=self.device).expand(len(group), -1)
        output = shared.run(self.keys, tokens, places[:, prefix:], places)
        own = [len(shared.prompts[index]) - prefix for index in group]
        learned = [
            (row, place)
            for row, part in enumerate(parts)
            for place in range(own[row] - 1, len(part))
        ]
        logits = shared.logits(output, *torch.tensor(learned, device=self.device).T)
        begin = 0
        for index in group:
            self.first.append(logits[begin : begin + 1].clone())
            begin += len(shared.expected[index])
        return logits

    def losses(self, group: list[int]) -> list[tuple[int, float]]:
        """Each expected answer's summed loss (nats); the prompts then stand in ``keys``."""
        logits, answers = self.logits(group), [self.shared.expected[index] for index in group]
        targets = torch.tensor(
            [token for answer in answers for token in answer], device=self.device
        )
        rows = torch.tensor(
            [row for row, answer in enumerate(answers) for _ in answer], device=self.device
        )
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        sums = losses.new_zeros(len(group)).index_add(0, rows, losses)
        return list(zip(group, sums.tolist(), strict=True))

    def step(self, tokens: list[int], said: int) -> torch.Tensor:
        """Logits (rows, vocabulary) after one more token of each row's answer, of which ``said`` stand there."""
        end = self.read + said
        self.keys.rows, self.keys.begin = slice(0, len(tokens)), end
        places = (
            self.positions[:, end : end + 1],
            self.positions[:, : end + 1],
            self.valid[:, : end + 1],
        )
        output = self.shared.run(self.keys, [[token] for token in tokens], *places)
        rows = torch.arange(len(tokens), device=self.device)
        return self.shared.logits(output, rows, torch.zeros_like(rows))

    def answers(self, max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens of each row up to its end, after all groups were read."""
        shared = self.shared
        said: list[list[int]] = [[] for _ in self.chosen]
        alive, logits = list(range(len(said))), torch.cat(self.first)
        going = set(alive)
        for count in range(max_new_tokens):
            if shared.penalty != 1.0:
                for row, number in enumerate(alive):
                    met = sorted({*shared.prompts[self.chosen[number]], *said[number]})
                    score = logits[row, met]
                    logits[row, met] = torch.where(
                        score < 0, score * shared.penalty, score / shared.penalty
                    )
            tokens = logits.argmax(dim=-1).tolist()
            for number, token in zip(alive, tokens, strict=True):
                if number in going:
                    said[number].append(token)
                    if token in shared.ends:
                        going.remove(number)
            if not going or count + 1 == max_new_tokens:
                break
            if (len(alive) - len(going)) * DROP_AT >= len(alive):
                rows = [row for row, number in enumerate(alive) if number in going]
                alive, tokens = [alive[row] for row in rows], [tokens[row] for row in rows]
                kept = torch.tensor(rows, device=self.device)
                self.keys.keep(kept)
                self.positions, self.valid = self.positions[kept], self.valid[kept]
            logits = self.step(tokens, count)
        return said


def _shared(model: nn.Module, rows: Sequence[Row]) -> tuple[Shared | None, str]:
    """The model with the prompts' beginning read; None, and why, where two rows so have other logits than alone."""
    settings = model.generation_config
    if used := [name for name in _OTHER_RULES if getattr(settings, name, None)]:
        return None, f"the model's generation_config sets {', '.join(used)}"
    pair = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    pair = sorted({pair[0], pair[-1]})
    with torch.inference_mode():
        alone = [_alone(model, rows[index]) for index in pair]
        try:
            shared = Shared(model, rows)
            batch = _Batch(shared, pair, 2)
            logits = torch.cat([batch.logits(group) for group in batch.groups])
            said = batch.step([shared.expected[index][0] for index in batch.chosen], 0)
        except (
            Exception
        ) as error:  # architectures refuse masks, positions and caches each in their own way
            if is_of_the_device(error):
                raise
            return None, f"{type(error).__name__}: {str(error)[:200]}"
    order = [pair.index(index) for index in batch.chosen]
    expected = torch.cat([alone[number][: len(shared.expected[pair[number]])] for number in order])
    logits = torch.cat([logits, said])
    expected = torch.cat([expected, *(alone[number][1:2] for number in order)])
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm()
    apart = float((logits - expected).norm() / spread)
    if apart <= TOLERANCE.get(model.dtype, 1e-3):
        return shared, ""
    return (
        None,
        f"with a shared prefix the logits of two rows are {apart:.1e} of their spread from those alone",
    )


def _alone(model: nn.Module, row: Row) -> torch.Tensor:
    """Logits (tokens + 1, vocabulary) from the last token of a row's prompt on."""
    ids = torch.tensor([row.input_ids], device=model.device)
    return model(input_ids=ids, logits_to_keep=len(halves(row)[1]) + 1).logits[0].float()


# --- transformers' own way --------------------------------------------------------------------------------------------


def separately(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, max_new_tokens: int, batch_size: int
) -> list[Answered]:
    """The same by ``generate`` and a forward pass over whole rows: for every architecture, in twice the time."""
    losses = answer_losses(model, tokenizer, rows, batch_size)
    texts = generate(model, tokenizer, rows, max_new_tokens, batch_size)
    return [Answered(text, *loss) for text, loss in zip(texts, losses, strict=True)]


def answer_losses(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], batch_size: int
) -> list[tuple[float, int]]:
    """Summed negative log-likelihood (nats) and number of tokens of each expected answer."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for chosen in batches([row.input_ids for row in rows], batch_size):
        batch = collate([rows[index] for index in chosen], pad, model.device)
        labels = batch["labels"][:, 1:]
        kept = (
            (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
        )  # the positions where any row is learned
        labels = labels[:, kept]
        with torch.inference_mode():
            logits = model(input_ids=batch["input_ids"], logits_to_keep=kept).logits
            # Word by word in one row each: over the middle of three dimensions a CPU is off by 1e-4 nats.
            losses = nn.functional.cross_entropy(
                logits.float().flatten(0, 1),
                labels.flatten(),
                ignore_index=IGNORED,
                reduction="none",
            ).view(labels.shape)
        for position, index in enumerate(chosen):
            results[index] = (
                float(losses[position].sum()),
                int((labels[position] != IGNORED).sum()),
            )
    return results


def generate(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers by transformers' ``generate``, padded on the left, in batches of prompts of like length."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts = [halves(row)[0] for row in rows]
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
