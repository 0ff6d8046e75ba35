"""Rules that every document keeps: complete, valid, escaped, honest, and without a number of its own."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.documents import render
from scripts.documents.evaluation import evaluation_rows
from scripts.documents.validate import prose
from tests.docs.test_commands import headings
from tests.docs.test_prose import complaints
from tests.task_parts import shell
from tests.unit.documents import inputs
from tests.unit.documents.inputs import (
    DOCUMENTS,
    HOSTILE,
    MARKDOWN,
    TEMPLATES,
    extreme,
    hostile,
    named,
)

NUMBERS = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
# What a template may say by itself: names of formats, units and the confidence of the intervals.
WORDS = re.compile(
    r"95 %|10\^9|[1-9]\.(?:\d)?|SHA-256|FP32|FP16|BF16|bf16|fp32|\b(?:16|32|4|8)-bit|16 bits|in 16|-{3,}|QLoRA \(4"
    r"|--cores 1|12 to 16 GB|1 Gi?B|2\^30|BSD-3-Clause|run\.seed: \[1, 2, 3\]|^#+ .*$|^\d (?=[A-Z])|\{method: .*?\}"
    r"|output\[0|\.shape\[1\]",  # the card's first code
    re.MULTILINE,
)


@pytest.mark.parametrize("template", sorted(TEMPLATES.glob("*.j2")), ids=lambda path: path.name)
def test_a_template_has_no_number_of_its_own(template: Path) -> None:
    from jinja2 import Environment

    text = re.sub(r"<style>.*?</style>", "", template.read_text(encoding="utf-8"), flags=re.DOTALL)
    said = [part for _, kind, part in Environment().lex(text) if kind == "data"]
    if template.name.endswith(".html.j2"):
        said = [re.sub(r"<[^>]*>|&#?\w+;", "", part, flags=re.DOTALL) for part in said]
    found = [number for part in said for number in NUMBERS.findall(WORDS.sub("", part))]
    assert not found, f"{template.name} states {found}"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("better", "better than the base"),
        ("worse", "worse than the base"),
        ("difference too small for this sample", "not demonstrably different from the base"),
    ],
)
def test_the_card_says_whatever_the_verdict_is(
    verdict: str, said: str, write: Callable[..., str]
) -> None:
    content = inputs.files()
    for compared in (content["comparison"], *content["comparison"]["tests"].values()):
        compared["equivalent"]["verdict"] = compared["loss"]["verdict"] = verdict
    content["execution"]["compared"]["verdict"] = verdict
    for name in ("MODEL_CARD.md", "docs/publication.md"):
        text = write(name, content)
        assert text.count(said) >= 2, name
        others = {"better than the base", "worse than the base", "not demonstrably different"} - {
            said,
            said[:26],
        }
        lead = text.split("## ", 1)[0]
        assert not any(other in lead for other in others if other not in said)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", MARKDOWN)
def test_text_of_others_is_data(name: str, write: Callable[..., str]) -> None:
    text = write(name, hostile(), named(HOSTILE))
    body = text if not text.startswith("---\n") else inputs.split_card(text)[1]
    assert "\x1b" not in text.split("\n---\n")[-1] and "\u202e" not in body
    plain = prose(body)
    for markup in ("<script", "**bold**", "[x](", "![i]", "http://h"):
        assert markup not in plain, markup
    assert not re.search(r"^# \*\*bold", plain, re.MULTILINE)
    for block in re.findall(
        r"(?:^\|.*\n)+", body, re.MULTILINE
    ):  # each row of a table has the columns of its head
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}
        assert len(columns) == 1, block


def test_a_run_with_lora_on_a_gpu_says_what_the_card_measured(write: Callable[..., str]) -> None:
    content = inputs.files()
    compared = content["training_memory"]
    compared["scenario"] |= {"method": "lora", "precision": "bf16", "quantization": None}
    compared["scenario"]["lora"]["target_modules"] = ["q_proj", "v_proj"]
    compared["measurement"] = {
        "context_bytes": 500_000_000,
        "device": {"capability": [9, 0], "name": "NVIDIA H100 80GB HBM3", "type": "cuda"},
        "peak_allocated_bytes": 7_100_000_000,
        "target": "cuda",
        "trace_on_the_same_device": {"components": {}, "peak_allocated_bytes": 7_101_000_000},
    }
    compared["differences"]["measurement_to_trace"] = {"bytes": 2_450_000, "share": 0.000345}
    content["training"] |= {
        "device": "NVIDIA H100 80GB HBM3",
        "peak_allocated_bytes": 6_543_210_000,
    }
    content["training"]["scenario"] = {
        key: item for key, item in compared["scenario"].items() if key != "model"
    }
    text = write("MODEL_CARD.md", content)
    metadata, body = inputs.split_card(text)
    assert metadata["tags"].count("lora") == 1 and "qlora" not in metadata["tags"]
    assert "LoRA, BF16" in body and "q\\_proj, v\\_proj" in write("docs/details.md", content)
    assert (
        "6.61 GiB (+0.03 %) on the NVIDIA H100 80GB HBM3, where the trace predicts 6.61 GiB" in body
    )
    assert (
        "PyTorch had at most 6.09 GiB allocated" in body
        and "trained on NVIDIA H100 80GB HBM3" in body
    )
    assert "differs in the last digits" in body and "byte for byte" not in body
    assert "byte for byte" not in write("docs/publication.md", content)


@pytest.mark.thorough
def test_without_an_analytic_estimate_the_documents_say_so(write: Callable[..., str]) -> None:
    content = inputs.files()
    for compared in (*content["profile"], content["training_memory"]):
        compared["analytic"] = None
        compared["reasons"]["analytic"] = (
            "the analytic estimate does not describe the architecture bloom"
        )
        del compared["differences"]["analytic_to_trace"]
    for name in DOCUMENTS.keys() - {"docs/details.md", "planner.html"}:
        assert "does not describe the architecture bloom" in write(name, content)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ls -l", "`ls -l`"),
        ("echo `date`", "`` echo `date` ``"),
        ("a\nb", "`a ⏎ b`"),
        ("", "(nothing)"),
        ("\u202eevil", "`\\u{202e}evil`"),
    ],
)
def test_code_spans(text: str, shown: str) -> None:
    assert render.code_span(text) == shown


def test_numbers_as_text() -> None:
    assert render.gigabytes(7_615_616_512) == "7.62 GB"
    assert render.gibibytes(7_615_616_512) == "7.09 GiB"
    assert render.memory_size(250_000_000) == "238.4 MiB" and render.memory_size(2048) == "2.0 KiB"
    assert render.percent(0.415) == "41.5 %"
    assert (
        render.signed_percent(-0.18914) == "−18.91 %"
        and render.signed_percent(-0.000004) == "0.00 %"
    )
    assert render.signed_size(-2_460_000_000) == "−2.29 GiB"
    assert render.points(0.395) == "+39.5 points"
    assert (
        render.duration(61.2) == "1 min 1 s"
        and render.duration(3.44) == "3.4 s"
        and render.duration(7260) == "2 h 1 min"
    )
    assert render.gigabytes(None) == "not measured"
    assert (
        render.setting({"double": True, "type": "nf4"}) == "double yes, type nf4"
        and render.setting(2e-4) == "0.0002"
    )


@pytest.mark.thorough
def test_the_card_links_to_headings_that_are_there(write: Callable[..., str]) -> None:
    card = write("MODEL_CARD.md")
    for name in ("docs/details.md", "docs/memory-profile.md", "docs/publication.md"):
        write(name)
    links = re.findall(r"\]\(([\w/.-]*\.md)?(?:#([\w-]+))?\)", card)
    assert len([anchor for _, anchor in links if anchor]) > 6
    for target, anchor in links:
        place = inputs.RUN / (target or "MODEL_CARD.md")
        assert place.is_file() and (not anchor or anchor in headings(place)), f"{target}#{anchor}"


@pytest.mark.few(1)
@pytest.mark.parametrize("name", MARKDOWN)
def test_documents_are_read_without_stumbling(write: Callable[..., str], name: str) -> None:
    """Each sentence as the documents of the project are held to; a run's extremes as well."""
    more = inputs.without_benchmark() | {"merging": []}
    assert [found for content in (None, more) for found in complaints(write(name, content))] == []


def test_every_metric_has_its_row_and_what_is_no_metric_has_none() -> None:
    rows = evaluation_rows(inputs.files()["comparison"], shell("words"))
    assert [row["name"] for row in rows][:2] == ["loss", "equivalent"] and {"chrf", "danger"} <= {
        row["name"] for row in rows
    }
    assert not {"n", "decoding", "prompt", "loss_tokens"} & {row["name"] for row in rows}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_one_and_none_are_said_as_people_say_them(name: str, write: Callable[..., str]) -> None:
    text = prose(write(name, extreme()))
    wrong = r"(?<![\d.,])1 (?:held-out |validation )?(?:requests|rows|groups|steps|answers|sources|threads|kinds)\b"
    assert not re.search(wrong, text), re.search(wrong, text)
    none = r"(?<![\d.,])0 (?:rows were|kinds|of the base|parse)|0e\+00"
    assert not re.search(none, text), re.search(none, text)


@pytest.mark.thorough
def test_nothing_dangerous_nothing_too_long_nothing_right(write: Callable[..., str]) -> None:
    card, article = write("MODEL_CARD.md", extreme()), write("docs/publication.md", extreme())
    details = write("docs/details.md", extreme())
    assert "flagged none of these answers as dangerous, and none of the base's" in card
    assert "of 1 held-out answer none can be parsed as Bash, none count as right" in card
    assert (
        "Every row had at most 384 tokens." in details and "the loss differed not at all" in details
    )
    assert "The screen found nothing dangerous among them." in article
    assert "took out 11 dangerous rows, of 1 kind." in write("docs/publication.md")
    assert "Left out, since longer than 384 tokens: 9 rows." in write("docs/details.md")


@pytest.mark.thorough
@pytest.mark.parametrize("name", MARKDOWN)
def test_a_heading_stands_after_an_empty_line(name: str, write: Callable[..., str]) -> None:
    for content in (inputs.files(), extreme()):
        text = re.sub(r"^(`{3,}).*?^\1$", "", write(name, content), flags=re.MULTILINE | re.DOTALL)
        assert not re.findall(r"^(?!#|---).+\n#+ .*$", text, re.MULTILINE)


@pytest.mark.thorough
def test_without_a_benchmark_nothing_is_said_of_one(write: Callable[..., str]) -> None:
    content = inputs.without_benchmark()
    for name in ("MODEL_CARD.md", "docs/publication.md", "report.html"):
        text = write(name, content).lower()
        assert "sandbox" not in text and "of icalfa" not in text and "were run" not in text


@pytest.mark.few(1)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_run_that_learned_nothing_is_documented_as_rules_recorded_it(
    name: str, write: Callable[..., str]
) -> None:
    content = inputs.recorded() | {"validation": []}
    text = write(name, content)
    assert (
        "better than the base" not in text.split("## ", 1)[0]
        or content["comparison"]["loss"]["verdict"] == "better"
    )
