"""`snakemake --report` over a finished run, opened in a real browser; and the run's own page."""

from pathlib import Path

import pytest

from tests.browser import errors, needs_browser, opened
from tests.end_to_end import chain

pytestmark = pytest.mark.thorough

# Of each result that is an image: its width once it is decoded, 0 when it can't be.
WIDTHS = """
const done = arguments[0];
const images = Object.entries(results).filter(([, result]) => result.mime_type.startsWith("image/"));
Promise.all(images.map(([path, result]) => new Promise((resolve) => {
  const image = new Image();
  image.onload = () => resolve([path, image.naturalWidth]);
  image.onerror = () => resolve([path, 0]);
  image.src = result.data_uri;
}))).then((widths) => done(Object.fromEntries(widths)));
"""


@pytest.fixture(scope="module")
def report(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = finished
    path = tmp_path_factory.mktemp("report") / "report.html"
    chain.snakemake(folder, "--report", path)
    return path


def test_report_holds_figures_captions_and_documents(
    report: Path, finished: tuple[Path, str]
) -> None:
    text = report.read_text(encoding="utf-8")
    for name in ("memory.png", "timeline.png", "training_curve.png", "evaluation.png"):
        assert f"{chain.RUN}/figures/{name}" in text
    for name in ("MODEL_CARD.md", "provenance.json", "report.html"):
        assert f"{chain.RUN}/{name}" in text
    assert "Training loss of tiny-r4" in text, "captions are filled in"
    described = text[text.index("workflow_desc") :]
    (exact,) = (
        line
        for line in (finished[0] / chain.RUN / "summary.txt").read_text().splitlines()
        if "known" in line
    )
    assert exact.strip()[:40] in described, "the first page shows the result"


@needs_browser
def test_report_opens_without_an_error_and_every_figure_shows(report: Path) -> None:
    with opened(report.as_uri()) as browser:
        widths = browser.execute_async_script(WIDTHS)
        assert len(widths) >= 4 and all(width > 300 for width in widths.values()), widths
        assert browser.execute_script("return document.body.innerText.length") > 50
        assert errors(browser) == []


@needs_browser
def test_the_runs_own_page_opens_without_an_error(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    with opened((folder / chain.RUN / "report.html").as_uri()) as browser:
        shown = browser.execute_script(
            "return [...document.images].map((image) => [image.alt, image.complete && image.naturalWidth])"
        )
        assert shown and all(width > 300 for _, width in shown), shown
        assert errors(browser) == []
