"""The memory profile: nine sections, the rule of thumb to the digit, what each answer says."""

import copy
import re
from collections.abc import Callable

import pytest
import yaml

from dryfit.common.files import read_json
from scripts.documents import render
from scripts.documents.memory import scenario_memory
from tests.unit.documents import example, inputs

NINE = [
    "1. Assumptions",
    "2. Memory Components Refresher",
    "3. Scenario A — Full Fine-Tuning, FP32",
    "4. Scenario B — Full Fine-Tuning, FP16/BF16",
    "5. Scenario C — QLoRA Fine-Tuning (What SecureCLI-Tuner Uses)",
    "6. Summary Table",
    "7. Why This Matters for SecureCLI-Tuner",
    "8. Recommended Citation in Documentation",
    "9. End of Document",
]


@pytest.mark.thorough
def test_the_memory_profile_has_the_hours_of_a_step(write: Callable[..., str]) -> None:
    content = inputs.files()
    compared = content["profile"][0]
    compared["time"] |= {"seconds_per_step": 3.6, "limited_by": "matrix products", "range": None}
    compared["scenario"] |= {"micro_batch": 4, "gradient_accumulation": 1}
    text = write("docs/memory-profile.md", content)
    assert "3.600 s there, by its operators: 2.500 hours for 10,000 rows of this length." in text
    assert "limits it most is matrix products" in text and "on this GPU were not measured" in text
    compared["time"]["range"] = [2.88, 4.32]
    assert "2.500 hours for 10,000 rows of this length (2.000 to 3.000)" in write(
        "docs/memory-profile.md", content
    )
    for one in content["profile"]:
        one["time"] = None
    assert "by its operators" not in write("docs/memory-profile.md", content)


def test_the_memory_profile_has_the_nine_sections_and_the_rule_to_the_digit(
    write: Callable[..., str],
) -> None:
    text = write("docs/memory-profile.md")
    headings = re.findall(r"^# (.*)$", text, re.MULTILINE)
    assert headings == [
        "Qwen2.5-Coder-0.5B — GPU Memory Profile for Training and Fine-Tuning",
        *NINE,
    ]
    for part in (
        "### 3.5 Framework / CUDA Overhead",
        "### 4.3 Optimizer States",
        "### 5.4 Overhead",
    ):
        assert part in text
    for figure in ("~20 GB", "~16 GB", "500,000,000 × 4.00 bytes = **2.00 GB**", "494,032,768"):
        assert figure in text, figure
    for step in inputs.files()["profile"]:  # what the trace says instead
        assert f"**{render.gibibytes(step['trace']['peak_allocated_bytes'])}**" in text
        other = step["allocators"]["expandable_segments"]
        assert (
            f"With `{other['write']}` it needs {render.gibibytes(other['required_bytes'])}" in text
        )
    assert "| the allocator needs | with expandable segments |" in text


def test_what_would_make_a_step_fit_is_listed(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["profile"][0]["suggestions"] = [
        {"cost": "no time", "headroom_bytes": 2**30, "write": "loss: chunked"}
    ]
    text = write("docs/memory-profile.md", content)
    assert "- `loss: chunked`: no time (1.00 GiB to spare)\n" in text


def test_the_memory_profile_says_on_how_many_gpus_full_fine_tuning_becomes_possible(
    write: Callable[..., str],
) -> None:
    content = inputs.files()
    needs = {"full-fp32": [153.4, 76.8, 38.5, 22.9], "full-bf16": [77.9, 38.6, 19.6, 11.9]}
    kinds = (("rtx-4090", 23.64, 8, 4), ("a100-80gb", 79.25, 2, 1), ("t4", 14.56, None, None))
    content["plan"]["several_gpus"] = {
        "counts": [1, 2, 4, 8],
        "scenarios": {
            name: [
                {"gpus": n, "required_bytes": int(size * 1e9)}
                for n, size in zip((1, 2, 4, 8), sizes, strict=True)
            ]
            for name, sizes in needs.items()
        },
        "gpus": [
            {
                "gpu": name,
                "title": f"NVIDIA {name}",
                "total_gib": gib,
                "first": {"full-fp32": a, "full-bf16": b},
            }
            for name, gib, a, b in kinds
        ],
        "first": {"full-fp32": {"gpu": "a100-80gb", "gpus": 2}, "full-bf16": None},
    }
    text = write("docs/memory-profile.md", content)
    assert "## 6.1 On several GPUs" in text
    assert "| Full fine-tuning, FP32 | 142.86 GiB | 71.53 GiB | 35.86 GiB | 21.33 GiB |" in text
    assert "becomes possible first on **2 × NVIDIA a100-80gb**" in text
    assert "Full fine-tuning, BF16 does not fit eight GPUs of any kind" in text
    assert (
        "| `rtx-4090` | 23.64 | 8 | 4 |" in text
        and "`t4` | 14.56" not in text.partition("On several GPUs")[2]
    )
    assert "On several GPUs" not in write("docs/memory-profile.md")


def test_a_scenario_that_is_not_configured_is_missed_by_name(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["profile"] = content["profile"][1:]
    settings = {**inputs.CARD_SETTINGS, "scenarios": ["full-bf16", "qlora"]}
    text = write("docs/memory-profile.md", content, settings)
    assert "This run's configuration has no such scenario" in text and NINE[2] in text
    assert "~20 GB" not in text


def test_what_is_told_apart_in_the_profile(write: Callable[..., str]) -> None:
    text = write("docs/memory-profile.md")
    for row in (
        "| weights | 8.4 MiB | 8.4 MiB |",
        "| gradients | – | – |",
        "| optimizer states | 16.8 MiB | 16.8 MiB |",
    ):
        assert row in text, row
    # Its Adam has FP32 states, the 16-bit step 16-bit ones; the rest is the number of parameters.
    text = write("docs/memory-profile.md")
    section = text.partition("### 4.3 Optimizer States")[2].partition("###")[0]
    assert (
        "keeps its two states in FP32, this step's in BF16: that is another setting, and +1.84 GiB"
        in section
    )
    assert "The rest, +45.5 MiB, is the rule's round number of parameters" in section
    assert (
        "another setting" not in text.partition("### 3.3 Optimizer States")[2].partition("###")[0]
    )
    summary = write("docs/memory-profile.md").partition("# 6. Summary Table")[2].partition("![")[0]
    quoted, summary = summary.split("Each figure below", 1)
    assert [line.count("✔ Yes") for line in quoted.splitlines() if line.startswith("| Full")] == [
        1,
        1,
    ]
    assert "| feasible on NVIDIA GeForce RTX 4090? |" in summary
    verdicts = [
        line.rsplit("|", 2)[1].strip()
        for line in summary.splitlines()
        if line.startswith(("| Full", "| QLoRA"))
    ]
    assert [verdict[:3] for verdict in verdicts] == ["no,", "no,", "yes"]
    assert "20.00 GB = 18.63 GiB" in summary  # quoted, and comparable


def test_what_is_gone_at_the_peak_is_no_error(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["profile"][0]["trace"]["peak_phase"] = "optimizer"
    text = write("docs/memory-profile.md", content)
    section = text.partition("### 3.4 Activations")[2].partition("###")[0]
    assert "by the trace, the backward pass has freed them before the peak" in section
    assert "nothing by the trace" not in text


def test_components_keep_their_sum_in_their_groups() -> None:
    from dryfit.engine.components import GROUPS, grouped
    from scripts.documents.memory import GROUP_TITLES

    assert list(GROUP_TITLES) == list(GROUPS)
    for step in inputs.recorded()["profile"]:
        for answer in ("rule_of_thumb", "analytic", "trace"):
            components = step[answer]["components"]
            groups = grouped(components, adapters=step["scenario"]["method"] != "full")
            assert (
                sum(groups.values()) == sum(components.values()) and groups.keys() <= GROUPS.keys()
            )
    assert grouped({"gradients": 1, "optimizer_states": 2}, adapters=True) == {"adapters": 3}
    with pytest.raises(KeyError):
        grouped({"gradients of activations": 1}, adapters=False)


def test_full_fine_tuning_is_judged_only_for_the_gpu_that_was_asked_of_it(
    write: Callable[..., str],
) -> None:
    content = inputs.files()
    for compared in content["profile"][:2]:
        compared |= {"fits": None, "gpu": None, "headroom_bytes": None}
    text = write("docs/memory-profile.md", content)
    assert (
        "QLoRA fits a single NVIDIA GeForce RTX 4090." in text
        and "full fine-tuning does not" not in text
    )
    assert "QLoRA fits a single NVIDIA GeForce RTX 4090; full fine-tuning does not." in write(
        "docs/memory-profile.md"
    )


def with_readings(*, fp32_states: bool) -> tuple[dict, dict]:
    """The record with what else is called 16 bits, as files and settings."""
    content = inputs.files()
    fp32, bf16, qlora = content["profile"]
    mixed, wide = copy.deepcopy(fp32), copy.deepcopy(bf16)
    mixed["scenario"] |= {"precision": "bf16-mixed"}
    mixed["differences"]["rule_of_thumb_to_trace"]["share"] = -0.384
    wide["scenario"] |= {"optimizer_state_precision": "fp32"}
    wide["differences"]["rule_of_thumb_to_trace"]["share"] = 0.0018
    names = ["full-fp32", "full-bf16-mixed", "full-bf16-fp32-states", "full-bf16", "qlora"]
    content["profile"] = [fp32, mixed, wide, bf16, qlora]
    if not fp32_states:
        del content["profile"][2], names[2]
    return content, {**inputs.CARD_SETTINGS, "scenarios": names}


def test_pure_16_bits_and_mixed_precision_stand_side_by_side(write: Callable[..., str]) -> None:
    """The rule's second figure is too high for the one and too low for the other, and each says which it is."""
    content, settings = with_readings(fp32_states=False)
    for name in ("docs/memory-profile.md", "docs/publication.md", "MODEL_CARD.md"):
        text = write(name, content, settings)
        assert "second figure is of a step wholly in 16 bits, optimizer states too" in text, name
        assert (
            "keeps FP32 weights and states and computes under autocast" in text
            and "38 % too low" in text
        ), name
    text = write("docs/memory-profile.md", content, settings)
    assert "### 4.6 Other readings of 16 bits" in text and "BF16 mixed" in text
    assert "× 2 bytes = 0.003 GB" in text and "12 to 16 GB" in text


def test_scenario_b_is_the_step_with_fp32_states(write: Callable[..., str]) -> None:
    """The rule's second figure is judged by the step that it counts; what else is called 16 bits stands below."""
    content, settings = with_readings(fp32_states=True)
    for name in ("docs/memory-profile.md", "docs/publication.md", "MODEL_CARD.md"):
        text = write(name, content, settings)
        assert "weights and gradients in 16 bits with FP32 states" in text, name
        assert "A step wholly in 16 bits, optimizer states too" in text, name
        assert "Mixed precision keeps FP32 weights and states" in text, name
        assert "0.18 % too high and" in text, name
    text = write("docs/memory-profile.md", content, settings)
    section = text.partition("# 4. Scenario B")[2].partition("# 5. Scenario C")[0]
    scenario, _, others = section.partition("### 4.6 Other readings of 16 bits")
    assert "### 4.3 Optimizer States (Adam – FP32)" in scenario
    assert "another setting" not in scenario  # the rule's states are the step's
    titles = ["**Full fine-tuning, BF16**", "**Full fine-tuning, BF16 mixed**"]
    assert [line for line in others.splitlines() if line.startswith("**Full")] == titles
    assert "Full fine-tuning, BF16 with FP32 states" in text


def test_the_profile_has_all_that_the_hand_written_one_had_in_its_order() -> None:
    """Section by section: its figures and marks, where a reader of both looks for them."""
    rest = (example.EXAMPLE / "docs" / "memory-profile.md").read_text(encoding="utf-8")
    known = inputs.TEMPLATES.parents[1] / "tests" / "unit" / "documents" / "first_profile.yaml"
    for section in yaml.safe_load(known.read_text(encoding="utf-8")):
        before, heading, rest = rest.partition(f"# {section['section']}\n")
        assert heading, f"{section['section']} is missing, or comes too early: {before[-200:]}"
        text = re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]
        for figure in section["is"]:
            before, found, text = text.partition(figure)
            assert found, f"{section['section']}: {figure} is missing after {before[:200]}"


def test_the_rule_is_within_five_per_cent_of_its_own_step_before_temporaries() -> None:
    """Scenario B of a 7B: 94 GB against the traced step with 16-bit weights and fp32 states."""
    kept = read_json(example.EXAMPLE / "run.json")
    names = kept["settings"]["scenarios"]
    compared = kept["files"]["profile"][names.index("full-bf16-fp32-states")]
    step = scenario_memory("full-bf16-fp32-states", compared)
    assert compared["rule_of_thumb"]["peak_allocated_bytes"] == 94_000_000_000
    assert abs(step["before_temporaries"]["rule_share"]) < 0.05
    parts = compared["trace"]["components"]
    assert parts["optimizer_states"] == 4 * parts["gradients"]


@pytest.mark.thorough
def test_the_kept_trace_of_scenario_b_is_todays() -> None:
    from dryfit.scenario.scenario import Scenario
    from dryfit.tracing.trace import trace

    kept = read_json(example.EXAMPLE / "run.json")
    names = kept["settings"]["scenarios"]
    compared = kept["files"]["profile"][names.index("full-bf16-fp32-states")]
    found = trace(Scenario.from_mapping(compared["scenario"]), timeline=False)
    for field in ("peak_allocated_bytes", "components"):
        assert found[field] == compared["trace"][field], field
