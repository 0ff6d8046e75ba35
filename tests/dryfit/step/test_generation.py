"""Answers and losses from one pass over each prompt: those of each request alone, on every architecture."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dryfit.common.chat import encode_pairs
from dryfit.step import generation as answer
from dryfit.step.batches import IGNORED, Row
from dryfit.step.generation import ask, separately
from tests.chat_tokenizer import CHATML, make_tokenizer
from tests.dryfit.decoders import DECODERS
from tests.repository import ROOT

SYSTEM = "Answer with one command."
PAIRS = [
    ("List files", "ls"),
    (
        "Find the word TODO in all files of src, and show the numbers of the lines",
        "grep -rn TODO src",
    ),
    ("Make the nested directory notes/v1", "mkdir -p notes/v1"),
    ("Who am I?", "whoami"),
    ("Show the last 20 lines of log.txt", "tail -n 20 log.txt"),
]
SEPARATELY = ("bloom",)  # attends by distance in the sequence (ALiBi): no mask of rows


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML, (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines())


def build(name, tokenizer, **changes):
    torch.manual_seed(0)
    mapping = {**DECODERS[name], "vocab_size": len(tokenizer), "initializer_range": 0.5, **changes}
    config = AutoConfig.for_model(mapping.pop("model_type"), **mapping)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = [
        1,
        7,
        30,
        90,
        120,
        200,
        260,
        400,
        500,
    ]  # so that some answers end early
    return model


def ask_all(model, tokenizer, pairs=PAIRS, batch_size=3, max_new_tokens=8):
    return ask(
        model, tokenizer, SYSTEM, pairs, max_new_tokens=max_new_tokens, batch_size=batch_size
    )


@pytest.mark.few(3)
@pytest.mark.parametrize("name", DECODERS)
def test_answers_and_losses_are_those_of_each_request_alone(name, tokenizer, monkeypatch):
    model = build(name, tokenizer)
    rows = [Row(*row) for row in encode_pairs(tokenizer, SYSTEM, PAIRS)]
    alone = [separately(model, tokenizer, [row], max_new_tokens=8, batch_size=1)[0] for row in rows]
    used = []
    real = answer.separately
    monkeypatch.setattr(
        answer, "separately", lambda *args, **kwargs: used.append(1) or real(*args, **kwargs)
    )
    monkeypatch.setattr(answer, "READ_TOKENS", 64)  # so that one batch is read in several groups
    together = ask_all(model, tokenizer, batch_size=4)
    assert bool(used) == (name in SEPARATELY)
    assert [one.answer for one in together] == [one.answer for one in alone]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.loss_sum for one in together] == pytest.approx(
        [one.loss_sum for one in alone], rel=1e-4
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_do_not_depend_on_the_batch(tokenizer, batch_size):
    model = build("llama", tokenizer)
    expected = ask_all(model, tokenizer, batch_size=4)
    found = ask_all(model, tokenizer, batch_size=batch_size)
    assert [one.answer for one in found] == [one.answer for one in expected]
    assert len({one.answer for one in expected}) > 3  # else an order that got lost would go unseen


def test_what_is_expected_changes_no_answer(tokenizer):
    model = build("llama", tokenizer)
    others = [
        (request, "true " * (number * 3) + "false") for number, (request, _) in enumerate(PAIRS)
    ]
    assert [one.answer for one in ask_all(model, tokenizer, others)] == [
        one.answer for one in ask_all(model, tokenizer)
    ]


@pytest.mark.parametrize("broken", ["mask", "positions"])
def test_a_model_that_heeds_no_mask_or_position_is_asked_in_transformers_own_way(
    tokenizer, monkeypatch, broken
):
    model = build("llama", tokenizer)
    rows = [Row(*row) for row in encode_pairs(tokenizer, SYSTEM, PAIRS)]
    expected = separately(model, tokenizer, rows, max_new_tokens=8, batch_size=3)
    real = model.get_decoder().forward

    def heedless(**given):
        name = {"mask": "attention_mask", "positions": "position_ids"}[broken]
        if isinstance(given.get("cache"), answer._Keys):
            given[name] = given[name] * 0
        return real(**given)

    monkeypatch.setattr(model.get_decoder(), "forward", heedless)
    used = []
    separate = answer.separately
    monkeypatch.setattr(
        answer, "separately", lambda *args, **kwargs: used.append(1) or separate(*args, **kwargs)
    )
    assert ask_all(model, tokenizer) == expected
    assert used


def test_a_model_that_is_sure_of_its_answers_shares_the_prefix_too(tokenizer):
    """Its losses are next to nothing, and rounding is then a large share of them."""
    model = build("llama", tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(200.0)  # tied to the head
    rows = []
    for ids, labels in encode_pairs(tokenizer, SYSTEM, PAIRS):
        prompt = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[
            0
        ].tolist()
        rows.append(Row(whole, [IGNORED] * len(prompt) + whole[len(prompt) :]))
    assert max(loss for loss, _ in answer.answer_losses(model, tokenizer, rows, 5)) < 1e-2
    assert answer._shared(model, rows)[0] is not None


@pytest.mark.parametrize(("penalty", "shift"), [(1.0, 0), (1.3, 0), (1.3, -50)])
def test_a_repetition_penalty_of_the_models_own_is_heeded(tokenizer, penalty, shift):
    """Qwen2.5's generation_config has one, and it changes greedy answers; with logits below zero it works the same."""
    model = build("llama", tokenizer, initializer_range=0.05)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + shift)
    model.generation_config.repetition_penalty = penalty
    rows = [Row(*row) for row in encode_pairs(tokenizer, SYSTEM, PAIRS)]
    alone = [
        separately(model, tokenizer, [row], max_new_tokens=8, batch_size=1)[0].answer
        for row in rows
    ]
    assert [one.answer for one in ask_all(model, tokenizer)] == alone


def test_other_rules_of_the_models_own_are_left_to_transformers(tokenizer, monkeypatch):
    model = build("llama", tokenizer)
    model.generation_config.no_repeat_ngram_size = 2
    used = []
    real = answer.separately
    monkeypatch.setattr(
        answer, "separately", lambda *args, **kwargs: used.append(1) or real(*args, **kwargs)
    )
    ask_all(model, tokenizer)
    assert used


def test_the_prefix_is_read_once_and_finished_rows_are_dropped(tokenizer):
    model = build("llama", tokenizer)
    read = []

    def count(module, args, kwargs):
        if kwargs.get("input_ids") is not None:  # else the head alone is run
            read.append(kwargs["input_ids"].numel())

    model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    encoded = encode_pairs(tokenizer, SYSTEM, PAIRS)
    rows = [Row(*row) for row in encoded]
    separately(model, tokenizer, rows, max_new_tokens=32, batch_size=5)
    apart, _ = sum(read), read.clear()
    ask_all(model, tokenizer, batch_size=5, max_new_tokens=32)
    # But for the self-test: two rows so, and two rows alone.
    tested = 2 * max(len(ids) for ids, _ in encoded) * 2
    assert 2 * (sum(read) - tested) < apart


def test_nothing_and_one_token_are_answers_too(tokenizer):
    assert ask_all(build("llama", tokenizer), tokenizer, pairs=[]) == []
    model = build("llama", tokenizer)
    assert [one.answer for one in ask_all(model, tokenizer, max_new_tokens=1)]


def test_shots_are_read_before_the_request_and_stand_in_batches_of_their_own(tokenizer):
    model = build("llama", tokenizer)
    shots = [[], [PAIRS[0], PAIRS[2], PAIRS[3], PAIRS[4]] * 2, []]
    lengths = {"max_new_tokens": 8, "batch_size": 3}
    together = ask(model, tokenizer, SYSTEM, PAIRS[:3], shots, **lengths)
    for pair, shown, found in zip(PAIRS[:3], shots, together, strict=True):
        (alone,) = ask(model, tokenizer, SYSTEM, [pair], [shown], **lengths)
        assert (found.answer, found.tokens) == (alone.answer, alone.tokens)
        assert found.loss_sum == pytest.approx(alone.loss_sum, rel=1e-4)
    prompts = [row[0] for row in encode_pairs(tokenizer, SYSTEM, PAIRS[:3], shots)]
    assert answer.batches(prompts, 3)[-1] == [1], (
        "rows of three times the length take no room for the others"
    )
    assert together[1].loss_sum != ask(model, tokenizer, SYSTEM, PAIRS[1:2], **lengths)[0].loss_sum
