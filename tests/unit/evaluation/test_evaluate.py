"""What is said of an answer."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.common.chat import encode_pair
from scripts.evaluation.evaluate import answer_losses, answers, score, strip_fence, summarize
from tests.unit.chat_tokenizer import CHATML, make_tokenizer
from tests.unit.decoders import DECODERS


@pytest.mark.parametrize(
    ("answer", "stripped"),
    [
        ("ls -l", "ls -l"),
        ("```bash\nls -l\n```", "ls -l"),
        ("```\nls -l\npwd\n```\nThis lists files.", "ls -l\npwd"),
        ("```bash\nls -l", "ls -l"),
        ("You can use:\n\n```\nls -l\n```\n\nIt lists files.", "ls -l"),
        ("echo '```'", "echo '```'"),
        ("  ls  ", "ls"),
        ("", ""),
    ],
)
def test_a_fence_is_stripped(answer, stripped):
    assert strip_fence(answer) == stripped


def test_scores():
    answers = ["ls -l", "ls   -l", "ls -a", "```bash\nls -l\n```", "if then (", "", "rm -rf /"]
    rows = score(answers, ["ls -l"] * len(answers))
    assert [row["exact"] for row in rows] == [True, False, False, False, False, False, False]
    assert [row["exact_canonical"] for row in rows] == [True, True, False, True, False, False, False]
    assert [row["program"] for row in rows] == [True, True, True, True, False, False, False]
    assert [row["parses"] for row in rows][4:6] == [False, False]
    assert rows[3]["parses_without_fence"]
    assert rows[6]["screen"] == "danger"


def test_summary_has_intervals_and_weights_the_loss_by_tokens():
    rows = [
        {"answer": answer, "command": "ls", "learned_tokens": tokens, "loss_sum": loss, **scored}
        for answer, tokens, loss, scored in zip(
            ["ls", "pwd"], [1, 3], [1.0, 9.0], score(["ls", "pwd"], ["ls", "ls"]), strict=True
        )
    ]
    summary = summarize(rows)
    assert summary["loss"] == pytest.approx(2.5)
    assert summary["exact"]["count"] == 1 and summary["exact"]["n"] == 2
    assert summary["exact"]["low_95"] < 0.5 < summary["exact"]["high_95"]
    assert 0 < summary["chrf"] < 100


SYSTEM = "Answer with one command."
PAIRS = [
    {"request": request, "command": command}
    for request, command in [
        ("List files", "ls"),
        ("Find the word TODO in all files of src, and show the numbers of the lines", "grep -rn TODO src"),
        ("Make the nested directory notes/v1", "mkdir -p notes/v1"),
        ("Who am I?", "whoami"),
        ("Show the last 20 lines of log.txt", "tail -n 20 log.txt"),
    ]
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML)


def build(name, tokenizer, **changes):
    torch.manual_seed(0)
    mapping = {**DECODERS[name], "vocab_size": len(tokenizer), **changes}
    config = AutoConfig.for_model(mapping.pop("model_type"), **mapping)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", DECODERS)
def test_losses_are_those_of_each_row_alone(name, tokenizer):
    model = build(name, tokenizer)
    losses = answer_losses(model, tokenizer, PAIRS, SYSTEM, batch_size=3)
    for pair, (loss_sum, tokens) in zip(PAIRS, losses, strict=True):
        ids, labels = encode_pair(tokenizer, SYSTEM, pair["request"], pair["command"])
        with torch.inference_mode():
            alone = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        assert tokens == sum(label != -100 for label in labels)
        assert loss_sum == pytest.approx(float(alone.loss) * tokens, rel=1e-4)


def test_answers_are_those_of_each_request_alone(tokenizer):
    model = build("llama", tokenizer, initializer_range=0.5)  # large enough that requests get different answers
    together = answers(model, tokenizer, PAIRS, SYSTEM, max_new_tokens=8, batch_size=4)
    alone = [answers(model, tokenizer, [pair], SYSTEM, max_new_tokens=8, batch_size=1)[0] for pair in PAIRS]
    assert together == alone
    assert len(set(together)) > 1  # else an order that got lost would go unseen
