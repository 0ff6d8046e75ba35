"""The quoted arithmetic, to the digit."""

import pytest

from dryfit.analytic.estimate import components, on_each, quoted_parameters, rule_of_thumb
from dryfit.scenario.nested_fields import Parallel
from dryfit.scenario.scenario import Scenario

EXACT = 7_615_616_512
GB = 10**9


@pytest.mark.parametrize(
    ("method", "width", "parts", "total"),
    [
        (
            "full",
            4,
            {
                "weights": 28,
                "gradients": 28,
                "optimizer_states": 56,
                "activations": 8,
                "overhead": 4,
            },
            124,
        ),
        (
            "full",
            2,
            {
                "weights": 14,
                "gradients": 14,
                "optimizer_states": 56,
                "activations": 6,
                "overhead": 4,
            },
            94,
        ),
        ("qlora", 2, {"weights": 4, "adapters": 0.25, "activations": 6, "overhead": 2}, 12.25),
    ],
)
def test_three_scenarios_to_the_digit(method, width, parts, total) -> None:
    found = components(method, width, 7 * GB)
    assert found == {name: size * GB for name, size in parts.items()}
    assert sum(found.values()) == total * GB


@pytest.mark.parametrize(
    ("method", "precision", "quoted", "exact"),
    [
        ("full", "fp32", 124 * GB, 16 * EXACT + 12 * GB),
        ("full", "bf16", 94 * GB, 12 * EXACT + 10 * GB),
        ("qlora", "bf16", 12_250_000_000, 12_270_000_000),
    ],
)
def test_beside_the_exact_count(method, precision, quoted, exact) -> None:
    scenario = Scenario.from_mapping(
        {"model": "qwen2.5-coder-7b", "method": method, "precision": precision}
    )
    answer = rule_of_thumb(scenario, EXACT)
    assert (answer["parameters"], answer["peak_allocated_bytes"]) == (7 * GB, quoted)
    assert answer["exact_count"]["parameters"] == EXACT
    assert answer["exact_count"]["peak_allocated_bytes"] == exact
    assert sum(answer["components"].values()) == quoted


def test_several_gpus_divide_what_people_say_they_divide() -> None:
    """Of 28 + 28 + 56 GB of weights, gradients and states; 8 of activations and 4 of overhead are each GPU's own."""
    parts = components("full", 4, 7 * GB)
    names = ("ddp", "zero2", "zero3", "fsdp1", "fsdp2")
    each = {name: sum(on_each(parts, Parallel(name, 4)).values()) for name in names}
    assert each == {
        "ddp": 124 * GB,
        "zero2": 61 * GB,
        "zero3": 40 * GB,
        "fsdp1": 40 * GB,
        "fsdp2": 40 * GB,
    }
    parallel = {"strategy": "fsdp2", "gpus": 4}
    scenario = Scenario.from_mapping(
        {"model": "qwen2.5-coder-7b", "method": "qlora", "parallel": parallel}
    )
    assert (
        rule_of_thumb(scenario, EXACT)["peak_allocated_bytes"] == (4 * GB + GB // 4) // 4 + 8 * GB
    )


@pytest.mark.parametrize(
    ("count", "name", "quoted"),
    [
        (EXACT, "qwen2.5-coder-7b", 7 * GB),
        (EXACT, None, 7 * GB),
        (1_543_714_304, "Qwen2.5-1.5B-Instruct", 1_500_000_000),
        (134_515_008, "smollm2-135m-instruct", 135_000_000),
        (134_515_008, None, 134_515_008),
        (8_030_261_248, "my-finetune-of-70b", 8 * GB),  # a name that can't be meant is not believed
    ],
)
def test_size_that_people_quote(count, name, quoted) -> None:
    assert quoted_parameters(count, name) == quoted
