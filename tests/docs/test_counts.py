"""Counts that pages state: each is that of the tables and tests which it counts."""

import json
import re
from pathlib import Path

from dryfit.analytic import families, hybrid_weights
from dryfit.analytic.certainty import ROWS
from dryfit.ask.mcp_server import TOOLS
from dryfit.cards.gpus import GIB
from dryfit.evidence.measured import published
from tests.dryfit.analytic.test_parameters import UNKNOWN
from tests.dryfit.engine.pairs import BUILDS
from tests.dryfit.families import FAMILIES
from tests.dryfit.serving.test_kv_cache import TABLE as CACHES
from tests.dryfit.tracing.mesh_steps import STEPS
from tests.dryfit.tracing.test_snapshot import PLANTED
from validation.families import FAMILIES as TABLE

ROOT = Path(__file__).resolve().parents[2]


def page(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_programs_that_ran_and_those_that_did_not() -> None:
    text = (
        (ROOT / "validation" / "data" / "programs.md")
        .read_text(encoding="utf-8")
        .partition("## Programs")[2]
    )
    ran, failed = (
        re.findall(r"^\| (?!---|program)(.+?) \| (.+?) \|", table, re.MULTILINE)
        for table in text.split("These programs came to no update:")
    )
    ran = [what for name, what in ran if name.removesuffix(" *") != "the same"]
    helped = [what for what in ran if "of its own options" in what]
    names = [name for cell, _ in failed for name in re.findall(r"`([^`]+)`", cell)]
    assert len(helped) == 1
    said = f"Of {len(ran) + len(names)} known programs {len(ran) - 1} ran, and another one with two of its own options."
    assert said in page("dryfit/README.md")


def test_measured_steps() -> None:
    least = len(published()) // 10 * 10
    for name in ("dryfit/README.md", "CHANGELOG.md"):
        assert re.search(rf"more than {least} (measured )?steps", page(name)), name


def test_families() -> None:
    core = page("docs/memory-core.md")
    assert f"{len(FAMILIES)} families of 2025 and 2026 by transformers' own code" in core
    assert (
        f"the parameters of {len(set(FAMILIES) - UNKNOWN)} of these families, and of the whole catalogue"
        in core
    )
    packages = r"(?:[\w-]+(?:, )?)+"
    text = (ROOT / "validation/data/families.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| (\w+) \| [\d,]+ \| {packages} \|", text, re.MULTILINE)
    assert rows == list(TABLE)


def test_families_that_the_closed_form_knows() -> None:
    assert f"without PyTorch for {len(families.FAMILIES)} families" in page("CHANGELOG.md")
    of_weights = f"is known for {len(hybrid_weights._FAMILIES)} such families"
    assert of_weights in page("docs/memory-core.md")


def test_models_whose_cache_vllm_divides_itself() -> None:
    models = {json.dumps(row["config"], sort_keys=True) for row in CACHES["rows"].values()}
    assert f"gives them for {len(models)} models" in page("docs/grpo.md")


def test_ways_to_divide() -> None:
    text = page("docs/several-gpus.md")
    assert f"took a small model's step on {len(STEPS)} meshes" in text
    assert f"took a small decoder's step in {len(BUILDS)} ways" in text


def test_differences_that_were_planted_and_steps_that_were_drawn() -> None:
    assert f"was found in {PLANTED} of {PLANTED} with one planted" in page("docs/evidence.md")
    drawn = len(ROWS.read_text(encoding="utf-8").splitlines()) - 1
    assert f"It takes {drawn} steps that were drawn at random" in page("docs/evidence.md")


def test_tools_for_assistants() -> None:
    assert len(TOOLS) == 3 and "`dryfit mcp` has three tools" in page("CHANGELOG.md")
    assert [f"| `{name}` |" in page("docs/package.md") for name in TOOLS] == [True] * 3


def test_the_step_that_calculators_are_compared_on() -> None:
    (row,) = (row for row in published() if row.id == "canifinetune-10")
    text = page("docs/verdict.md")
    for who, share in (("measured", 0.0), ("dryfit, the trace", 1.0)):
        sizes = [
            size * (1 + share * error) / GIB
            for size, error in (
                (row.allocated_bytes, row.allocated_error),
                (row.reserved_bytes, row.reserved_error),
            )
        ]
        assert f"| {who} | {sizes[0]:.2f} GiB allocated, {sizes[1]:.2f} GiB reserved |" in text
    for said, share in re.findall(r"\| (?:about )?([\d.]+) GB \| (\d+) % \|", text):
        assert round(100 * float(said) * 1e9 / row.allocated_bytes) == int(share)


def test_each_protection_of_the_guide_is_a_test() -> None:
    named = re.findall(
        r"`(tests/[\w/]+\.py)::(test_\w+)`",
        (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"),
    )
    assert len(named) == 10
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {name}"


def test_the_readme_repeats_the_librarys_figures() -> None:
    """The five rows of the pipeline's README, the worst of each among them, stand in the library's README too."""
    library = page("dryfit/README.md")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!measured|---)(.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    *measured, reports = rows
    for _, count, errors in measured:
        figures = errors.partition(" (")[0]
        assert f"| {count} | {figures}" in library
    last_draw = re.search(
        r"\| fifth, [^|]+\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", library
    )
    asked, right, unsafe, safe_side, unanswered = last_draw.groups()
    assert reports[1] == asked
    assert reports[2] == (
        f"{right} right, {unsafe} unsafe, {safe_side} wrong on the safe side, {unanswered} unanswered"
    )
