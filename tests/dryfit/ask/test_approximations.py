"""The nearest that a scenario can say, whichever row of the table comes first."""

import random

import pytest

from dryfit.readers.approximations import TABLE, approximated
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.strategies import STRATEGIES
from tests.dryfit.pairwise import pairwise

MODELS = {
    "dense": {"model_type": "qwen2"},
    "unknown": {"model_type": "bloom"},
    "experts": {"num_experts": 8},
}
FACTORS = {
    "model": list(MODELS),
    "method": ["full", "lora", "qlora"],
    "strategy": list(STRATEGIES),
    "offload": ["none", "cpu"],
    "mesh": [(), ("tensor",), ("context",)],
    "activation_offload": [False, True],
    "quantization": [None, "nf4", "int8"],
    "loss": ["full", "chunked", "liger"],
    "kernels": ["transformers", "liger", "unsloth"],
    "optimizer": [*OPTIMIZERS],
    "attention": ["sdpa", "flash"],
    "precision": ["fp32", "bf16", "bf16-mixed"],
    "autocast": [None, "bf16"],
    "targets": ["all-linear", ("q_proj", "gate_proj")],
    "packed": [False, True],
}
ORDERS = 6


def fields(row: dict) -> dict:
    """A row of factors as a tool's file would have set the fields."""
    kept = {
        name: row[name]
        for name in ("method", "loss", "kernels", "optimizer", "attention", "precision")
    }
    return {
        **kept,
        **({"autocast": row["autocast"]} if row["autocast"] else {}),
        **({"quantization": {"type": row["quantization"]}} if row["quantization"] else {}),
        **({"experts": {"quantized": "bitsandbytes"}} if row["packed"] else {}),
        "attention_mask": "padding",
        "kbit_preparation": "peft",
        "lora": {"rank": 8, "dropout": 0.1, "target_modules": row["targets"]},
        "model": MODELS[row["model"]],
        **({"activation_offload": True} if row["activation_offload"] else {}),
        "parallel": {
            "strategy": row["strategy"],
            "gpus": 2,
            "offload": row["offload"],
            **dict.fromkeys(row["mesh"], 2),
        },
    }


def rows() -> list[dict]:
    """Half of the factors at a time, since the full product is too large to choose pairs from."""
    names, draw = list(FACTORS), random.Random(3)
    some = [pairwise({name: FACTORS[name] for name in half}) for half in (names[:6], names[6:])]
    return [{**draw.choice(some[0]), **draw.choice(some[1])} for _ in range(150)]


@pytest.mark.thorough
def test_the_order_of_the_rows_does_not_matter() -> None:
    draw = random.Random(1)
    for row in rows():
        asked = fields(row)
        before = repr(asked)
        expected, applied = approximated(asked)
        assert repr(asked) == before, "the question itself was changed"
        assert len(applied) == len({id(one.holds) for one in applied}), "a row was applied twice"
        for _ in range(ORDERS):
            assert approximated(asked, draw.sample(TABLE, len(TABLE)))[0] == expected, row


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"method": "full", "lora": {"rank": 8}}, {"method": "full"}),
        ({"attention": "flash", "precision": "fp32"}, {"attention": "sdpa", "precision": "fp32"}),
        (
            {"loss": "liger", "model": MODELS["unknown"]},
            {"loss": "chunked", "model": MODELS["unknown"]},
        ),
    ],
)
def test_what_becomes_of_a_field(given: dict, changed: dict) -> None:
    model = {"model": MODELS["dense"]}
    assert approximated({**model, **given})[0] == {**model, **changed}


def test_zero_is_read_under_no_other_name() -> None:
    parallel = {"strategy": "zero3", "gpus": 4, "ulysses": 2}
    now, rows = approximated({"model": MODELS["dense"], "parallel": parallel})
    assert now["parallel"] == parallel and not rows
