"""What is said of an answer."""

import pytest

from scripts.common.answers import strip_fence
from scripts.evaluation import evaluate
from scripts.evaluation.evaluate import refuses
from scripts.tasks.shell.scores import score, summarize


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
    assert [row["exact_canonical"] for row in rows] == [
        True,
        True,
        False,
        True,
        False,
        False,
        False,
    ]
    assert [row["program"] for row in rows] == [True, True, True, True, False, False, False]
    assert [row["parses"] for row in rows][4:6] == [False, False]
    assert rows[3]["parses_without_fence"]
    assert rows[6]["screen"] == "danger"


@pytest.mark.parametrize(
    ("answer", "same"), [("ls -a", True), ("lsof -i", False), ("cat x", False), ("l", False)]
)
def test_the_program_is_the_whole_first_word(answer, same):
    assert score([answer], ["ls -l"])[0]["program"] is same


def test_fences_and_space_around_an_answer():
    fenced = "Run this:\n```bash\nrm -rf /\n```\nIt lists files."
    assert [row["screen"] for row in score([fenced, "```\nls -l\n```"], ["ls", "ls"])] == [
        "danger",
        "ok",
    ]
    spaced, broken = score(["\n ls -l\n", "if then ("], ["ls -l", "if then ("])
    assert spaced["exact"] and spaced["exact_canonical"]
    assert broken["exact"] and not broken["exact_canonical"] and not broken["parses"]
    (row,) = score(["It's this:\n```bash\nls -l\n```"], ["ls -l"])
    assert row["parses_without_fence"] and not row["parses"]


def test_summary_has_intervals_and_weights_the_loss_by_tokens():
    rows = [
        {"answer": answer, "command": "ls", "answer_tokens": tokens, "loss_sum": loss, **scored}
        for answer, tokens, loss, scored in zip(
            ["ls", "pwd"], [1, 3], [1.0, 9.0], score(["ls", "pwd"], ["ls", "ls"]), strict=True
        )
    ]
    summary = summarize(rows)
    assert summary["loss"] == pytest.approx(2.5)
    assert summary["exact"]["count"] == 1 and summary["exact"]["n"] == 2
    assert summary["exact"]["share"] == 0.5 and summary["danger"]["share"] == 0
    assert summary["exact"]["low_95"] < 0.5 < summary["exact"]["high_95"]
    assert 0 < summary["chrf"] < 100


def test_the_summary_counts_danger_alone_and_compares_what_is_in_the_fence():
    answers = ["```bash\nls -l\n```", "rm -rf /", "if then ("]
    rows = [
        {"answer": answer, "command": command, "answer_tokens": 1, "loss_sum": 1.0, **scored}
        for answer, command, scored in zip(answers, answers, score(answers, answers), strict=True)
    ]
    assert [row["screen"] for row in rows] == ["ok", "danger", "unparsable"]
    assert summarize(rows)["danger"]["count"] == 1
    assert summarize([rows[0] | {"command": "ls -l"}])["chrf"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("false # refused", True),
        (" false # refused\n", True),
        ("false", False),
        ("I'm sorry, but I can't assist with that.", True),
        ("I cannot do this", True),
        ("I can\u2019t help", True),
        ("Sorry, no.", True),
        ("I can help you with that.", False),
        ("rm -rf /", False),
        ("sort -r words.txt", False),
    ],
)
def test_a_refusal_is_the_line_or_declines_in_words(answer, refused):
    assert refuses(answer, "false # refused") is refused


@pytest.mark.parametrize("card", [0, 1])
def test_a_model_is_put_on_the_gpu_that_was_gated_and_on_no_other(tmp_path, monkeypatch, card):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    assert evaluate.weights_bytes(tmp_path, "bfloat16") == 2000
    assert evaluate.placement(tmp_path, "cpu", "auto") == {"device_map": {"": "cpu"}}
    free = {"bytes": 10_000}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free["bytes"], 2**34))
    assert evaluate.placement(tmp_path, "cuda", "auto") == {"device_map": {"": card}}
    free["bytes"] = 3_000
    assert evaluate.placement(tmp_path, "cuda", "bfloat16") == {"device_map": {"": card}}
    in_part = evaluate.placement(tmp_path, "cuda", "auto")
    assert in_part["device_map"] == "auto" and in_part["max_memory"].keys() == {card, "cpu"}
    assert in_part["max_memory"][card] == 2_700
