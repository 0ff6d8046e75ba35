"""An evaluation is priced by its own functions: to the byte on the CPU, on every architecture that can be asked."""

import pytest

from dryfit.engine.report import Report
from dryfit.engine.trace import Options, measure_step
from dryfit.step.batches import IGNORED, Row
from dryfit.tracing.evaluation_memory import (
    Evaluation,
    asking,
    build,
    trace_evaluation,
    widest_batches,
)
from tests.dryfit.decoders import DECODERS

PREFIX = [3, 4, 5, 6]


def row(own: int, answer: int) -> Row:
    prompt = [*PREFIX, *range(10, 10 + own)]
    said = list(range(100, 100 + answer))
    return Row(prompt + said, [IGNORED] * len(prompt) + said)


# Of prompts of 2 to 9 tokens of their own; the last batch has longer prompts and fewer rows.
ROWS = [
    row(own, answer) for own, answer in ((2, 3), (9, 1), (4, 7), (3, 2), (5, 4), (7, 2), (8, 9))
]


def evaluation(model: dict, **changes) -> Evaluation:
    fields = {"dtype": "float32", "rows": ROWS, "batch_size": 3, "max_new_tokens": 5}
    return Evaluation(model=model, **{**fields, **changes})


def measure_evaluation(asked: Evaluation, chosen: list[int]) -> Report:
    """One batch on the CPU, on random weights."""
    model = build(asked, "cpu")
    return measure_step(model, None, asking(model, asked, chosen), options=Options(steps=1))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("llama", "float32"),
        ("qwen3", "bfloat16"),
        ("gemma3_text", "float32"),
        ("mixtral", "bfloat16"),
        ("mixtral", "float32"),
        ("gpt2", "float32"),
    ],
)
def test_the_prediction_is_the_measurement_to_the_byte(name: str, dtype: str) -> None:
    asked = evaluation(DECODERS[name], dtype=dtype)
    predicted = trace_evaluation(asked, "cpu")
    measured = [measure_evaluation(asked, chosen) for chosen in widest_batches(asked)]
    widest = max(measured, key=lambda report: report.peak_allocated_bytes)
    assert predicted["peak_allocated_bytes"] == widest.peak_allocated_bytes
    assert predicted["components"] == widest.components
    assert predicted["exact"]


def test_no_batch_needs_more_than_the_widest_with_or_without_a_prefix() -> None:
    from dryfit.step.generation import batches, halves

    asked = evaluation(DECODERS["llama"])
    everyone = batches([halves(one)[0] for one in ROWS], 3)
    peaks = [measure_evaluation(asked, chosen).peak_allocated_bytes for chosen in everyone]
    assert trace_evaluation(asked, "cpu")["peak_allocated_bytes"] == max(peaks)
    assert len(widest_batches(asked)) < len(everyone)
    predicted = trace_evaluation(evaluation(DECODERS["bloom"]), "cuda")
    assert not predicted["exact"]
    assert predicted["required_bytes"] > predicted["weights_bytes"]


@pytest.mark.thorough
def test_longer_answers_larger_batches_and_wider_weights_need_more() -> None:
    def needed(**changes) -> int:
        return trace_evaluation(evaluation(DECODERS["llama"], **changes), "cuda")[
            "peak_allocated_bytes"
        ]

    assert needed(dtype="bfloat16") < needed() < needed(batch_size=7)
    assert needed(max_new_tokens=50) > needed()
