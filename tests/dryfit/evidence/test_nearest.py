"""Which measured steps an answer names: the rule on rows made for it, and the questions of questions.md."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from dryfit.ask.options import parsed
from dryfit.ask.question import Question, QuestionOptions, question
from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.evidence.measured import (
    UNREAD,
    Kinds,
    MeasuredStep,
    kinds_of,
    measured_steps,
    published,
    read,
    write,
)
from dryfit.evidence.nearest import evidence, nearest, program_evidence, time_shares
from dryfit.readers.request import parse_request
from dryfit.scenario.scenario import Scenario

PAGE = Path(__file__).with_name("questions.md")
ASKED = re.findall(
    r"^\| `(.+?)` \| (yes|no) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
)
KINDS = kinds_of(Scenario.from_mapping({"model": "qwen2.5-coder-0.5b", "loop": "manual"}), (8, 9))
STEP = MeasuredStep(
    "a",
    "somebody",
    "rtx-4080",
    KINDS,
    "Qwen2.5",
    494.0,
    1,
    512,
    allocated_error=-0.001,
    reserved_error=0.02,
    time_error=-0.3,
    memory_known=UNREAD,
)


def asked(line: str) -> Question:
    options = parsed(shlex.split(line))
    return question(
        options.what,
        QuestionOptions(
            gpu=options.gpu,
            method=options.method,
            sequence_length=options.sequence_length,
            micro_batch=options.micro_batch,
            strategy=options.strategy,
            settings=options.set,
        ),
    )


def test_most_of_thirty_questions_find_measured_steps_that_are_like_theirs_or_near() -> None:
    assert len(ASKED) == 30 and {like for _, like, _ in ASKED} == {"yes", "no"}
    # About a model alone the step is TRL's; its weights under autocast and its loss in chunks are what differs.
    found = [evidence(of.scenario, of.gpu) for of in map(asked, (line for line, _, _ in ASKED))]
    assert sum(bool(one.rows or one.near) for one in found) >= 25
    near = next(one for one in found if one.near)
    assert len(near.differences) <= 3 and "The nearest are " in near.text() and not near.rows


@pytest.mark.parametrize(("line", "like", "said"), ASKED, ids=[line[:60] for line, _, _ in ASKED])
def test_a_question_of_the_page_names_what_the_page_says(line: str, like: str, said: str) -> None:
    of = asked(line)
    if of.asked.like_is_default:  # this project's own step, as a file has it
        of = replace(of, scenario=parse_request(of.asked.mapping).scenario)
    found = evidence(of.scenario, of.gpu)
    assert bool(found.rows) == (like == "yes")
    cards = found.to_mapping()["cards"]
    shown = [f"{count} {card}" for card, count in cards.items()] or [
        one.kind for one in found.differences
    ]
    assert ", ".join(shown) == said
    known = {
        kind: value
        for kind, value in kinds_of(of.scenario, of.gpu and of.gpu.capability)._asdict().items()
        if value
    }
    for row in found.rows:
        assert known.items() <= row.kinds._asdict().items()


@pytest.mark.parametrize("kind", Kinds._fields)
def test_a_step_that_differs_in_one_kind_is_never_named(kind: str) -> None:
    other = replace(STEP, kinds=KINDS._replace(**{kind: "something else"}))
    found = nearest(KINDS, "rtx-4080", [other])
    assert not found.rows and [one.kind for one in found.differences] == [kind]
    assert "something else" in found.text() and found.text().startswith(
        "No measured step resembles this one: "
    )


def test_steps_on_the_same_card_are_named_alone_and_time_is_the_cards_own() -> None:
    elsewhere = replace(STEP, id="b", card="l40s", allocated_error=0.5)
    found = nearest(KINDS, "rtx-4080", [STEP, elsewhere])
    assert [row.id for row in found.rows] == ["a"] and "time off by -30 %" in found.text()
    other = nearest(KINDS, "rtx-4090", [STEP, elsewhere])
    assert len(other.rows) == 2 and other.errors("time") is None and "time" not in other.text()
    assert other.errors("allocated").worst_size == 0.5


def test_kinds_of_steps_and_cards() -> None:
    assert nearest(KINDS._replace(capability=""), None, [STEP]).rows
    amd = evidence(
        Scenario.from_mapping({"model": "qwen2.5-coder-7b"}),
        asked("qwen2.5-coder-7b --gpu mi300x").gpu,
    )
    assert "not CUDA" in amd.text() and not amd.rows
    from dryfit.evidence.measured import layers_of

    assert (
        layers_of({"model_type": "qwen3_5"}) == layers_of({"mamba_d_state": 16}) == "hybrid kinds"
    )
    assert layers_of({"model_type": "mixtral", "num_local_experts": 8}) == "attention and experts"
    assert layers_of({"model_type": "llama"}) == "attention"
    step = {"model": "qwen2.5-coder-0.5b", "method": "lora"}
    assert time_shares("rtx-4090", Scenario.from_mapping(step)) is None
    assert time_shares("rtx-4080", Scenario.from_mapping(step)) is None  # measured under Windows
    assert time_shares("v100-16gb", None) is None  # an encoder was
    assert time_shares("a100-80gb", Scenario.from_mapping(step | {"compile": "layers"})) is None
    assert time_shares("a100-40gb", None) == time_shares("a100-80gb", None)


def test_a_mesh_is_a_kind_of_its_own() -> None:
    meshes = (
        {},
        {"tensor": 2},
        {"context": 2},
        {"replicate": 2},
        {"strategy": "none", "pipeline": 4},
    )
    step = {"model": "llama-3.1-8b", "method": "full", "gradient_accumulation": 4}
    found = [
        kinds_of(
            Scenario.from_mapping(step | {"parallel": {"strategy": "fsdp2", "gpus": 4} | mesh}),
            None,
        ).parallel
        for mesh in meshes
    ]
    assert found == [
        "fsdp2 on 4 GPUs",
        "fsdp2 x tensor 2 on 4 GPUs",
        "fsdp2 x context 2 on 4 GPUs",
        "fsdp2 x replicate 2 on 4 GPUs",
        "pipeline 4 x schedule 1f1b on 4 GPUs",
    ]


def test_a_table_reads_as_it_was_written_and_your_own_is_read_too(tmp_path, monkeypatch) -> None:
    path = tmp_path / "own" / "measured_steps.csv"
    write(path, [STEP])
    assert list(read(path)) == [STEP]
    monkeypatch.setenv("DRYFIT_MEASURED", str(path))
    assert measured_steps()[-1] == STEP


def test_a_table_of_another_form_and_a_cell_without_a_number_are_refused(tmp_path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("id,card\n1,t4\n")
    with pytest.raises(UserError, match="not a table of measured steps"):
        read(path)
    write(path, [STEP])
    path.write_text(path.read_text().replace("-0.001", "much"))
    with pytest.raises(UserError, match="line 2") as caught:
        read(path)
    assert "no number" in str(caught.value)


def test_a_range_of_time_holds_nineteen_of_twenty_rows_of_its_kind() -> None:
    step = {"model": "qwen2.5-coder-0.5b", "method": "lora"}
    for card, fields in (
        ("a100-80gb", step),
        ("a100-80gb", step | {"parallel": {"strategy": "fsdp2", "gpus": 2}}),
        ("t4", step),
        ("l40s", step | {"adapter": {"peft_type": "IA3"}}),
        ("rtx-4080", step | {"platform": "windows"}),
    ):
        scenario = Scenario.from_mapping(fields)
        found, own = time_shares(card, scenario), kinds_of(scenario, None)
        rows = [
            row
            for row in published()
            if row.card == card
            and row.time_error is not None
            and row.time_known != "fitted"
            and (row.kinds.parallel == "one GPU") == (own.parallel == "one GPU")
            and row.kinds.platform == own.platform
        ]
        outside = [row for row in rows if not found.low <= 1 / (1 + row.time_error) <= found.high]
        assert len(rows) >= 12 and len(outside) <= 0.08 * len(rows), [row.id for row in outside]
        assert found.low <= 0.9 and found.high >= 1.1


@pytest.mark.parametrize(
    ("gpus", "compiled", "card", "said"),
    [
        (
            8,
            True,
            "h100-80gb",
            r"Like 16 measured runs on an H100 80GB HBM3 \(full fine-tuning, modded-nanogpt\): ",
        ),
        (
            8,
            False,
            "h100-80gb",
            r"No measured program resembles this one: compile no \(measured: model\)",
        ),
        (
            1,
            True,
            "a100-80gb",
            r"No measured program resembles this one: one GPU \(measured: ddp on 8 GPUs\); ",
        ),
    ],
)
def test_a_program_is_like_the_programs_that_were_run_whole(gpus, compiled, card, said):
    """What it trains is not known; the rows of scenarios say nothing of it."""
    assert re.match(
        said, program_evidence(gpus, compiled, find(card)).text(("allocated", "reserved"))
    )
