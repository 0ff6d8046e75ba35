"""The article: what it argues from a run's figures, and what it leaves out."""

from collections.abc import Callable

import pytest

from scripts.documents import render
from tests.unit.documents import inputs
from tests.unit.documents.inputs import extreme


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("fitting", "said"),
    [
        ((True, True), "LoRA fits this GPU too"),
        ((False, True), "LoRA does not fit"),
        ((False, False), "holds neither"),
    ],
)
def test_the_article_argues_from_the_figures_of_lora_and_qlora(
    write: Callable[..., str], fitting, said: str
) -> None:
    content = inputs.files()
    rows = content["plan"]["feasibility"]
    for row in rows:
        row["fits"] = fitting[row["method"] == "qlora"] and row["gpu"] == "rtx-4090"
    article = write("docs/publication.md", content)
    argument = article.partition("## Why QLoRA and not LoRA?")[2].partition("## How far")[0]
    named = {row["method"]: row for row in rows if row["gpu"] == "rtx-4090"}
    sizes = [render.gibibytes(named[method]["required_bytes"]) for method in ("lora", "qlora")]
    assert (
        said in argument
        and all(f"| {size}, " in argument for size in sizes)
        and sizes[0] != sizes[1]
    )
    assert ("`rtx-4090` (23.64 GiB)" in argument) is any(
        fitting
    ) and "worse than the trained one's (+0.048" in argument
    content["plan"]["feasibility"] = [row for row in rows if row["method"] != "lora"]
    assert "Why QLoRA" not in write("docs/publication.md", content), (
        "the planner was not asked for LoRA"
    )


def test_an_article_on_a_merge_that_failed_does_not_praise_it(write: Callable[..., str]) -> None:
    article = write("docs/publication.md", extreme())
    assert "and checked" not in article and "At least one check of the merge failed" in article
    assert "## Merged, and checked" in write("docs/publication.md")


@pytest.mark.few(1)
@pytest.mark.parametrize("licence", ["unknown", "Unknown ", "none", "?"])
def test_a_licence_that_nobody_knows_is_said(licence: str, write: Callable[..., str]) -> None:
    content = inputs.files()
    content["acquire"]["sources"][0]["license"] = licence
    assert "licence of some of it is unknown" in write("docs/publication.md", content)
