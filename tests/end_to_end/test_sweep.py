"""A sweep over ranks, really trained: a rank that is new trains alone, and the page about both opens in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.browser import errors, needs_browser, opened
from tests.end_to_end import chain
from tests.warm import launchers

pytestmark = pytest.mark.thorough

OLD, NEW = chain.SETTINGS["lora"]["rank"], 2
SWEEP = f"results/{chain.SETTINGS['run']['name']}-sweep"


@pytest.fixture(scope="module")
def swept(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of the finished chain to which the configuration has added a rank, and what Snakemake said."""
    folder = tmp_path_factory.mktemp("sweep") / "project"
    shutil.copytree(finished[0], folder, symlinks=True)
    (folder / "sweep.yaml").write_text(
        yaml.safe_dump({"lora": {"rank": [OLD, NEW]}}), encoding="utf-8"
    )
    return folder, chain.snakemake(
        folder, "sweep.yaml", "--", f"{SWEEP}/SWEEP.md", f"{SWEEP}/sweep.html"
    )


def test_only_what_carries_the_new_rank_is_made(swept: tuple[Path, str]) -> None:
    _, said = swept
    finished = chain.finished_rules(said)
    assert {
        "train_adapter",
        "evaluate_tuned",
        "summarize_sweep",
        "draw_sweep",
        "render_sweep",
    } <= finished
    assert not finished & {"clean_dataset", "encode_dataset", "fetch_weights", "evaluate_base"}
    runs = set(
        re.findall(rf"^Job \d+: .*\b({chain.SETTINGS['run']['name']}-r\d+)", said, re.MULTILINE)
    )
    assert runs == {f"{chain.SETTINGS['run']['name']}-r{NEW}"}


def test_the_sweeps_document_compares_the_runs(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    summary = json.loads((folder / SWEEP / "sweep.json").read_text(encoding="utf-8"))
    assert [point["varied"] for point in summary["points"]] == [
        {"lora.rank": OLD},
        {"lora.rank": NEW},
    ]
    assert len({point["adapter_bytes"] for point in summary["points"]}) == 2
    text = (folder / SWEEP / "SWEEP.md").read_text(encoding="utf-8")
    for point in summary["points"]:
        assert f"{point['loss']['mean']:.3f} [" in text and point["measured_peak_bytes"]
    for shown in re.findall(r"\]\(([^)]+\.png)\)", text):
        assert (folder / SWEEP / shown).is_file(), shown


def test_finished_runs_are_compared_by_a_command_and_others_refused(
    swept: tuple[Path, str],
) -> None:
    """A sweep alone leaves its other ranks without documents, so without a record of their settings."""
    folder, _ = swept
    old, new = (f"results/{chain.SETTINGS['run']['name']}-r{rank}" for rank in (OLD, NEW))
    command = [f"{launchers()}/python", "-m", "scripts.sweep", old]
    done = subprocess.run([*command, new], cwd=folder, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and f"No finished run lies in this folder.\n  where:   {new}" in done.stderr
    )
    done = subprocess.run([*command, old], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "requests that both were asked" in done.stdout, done.stderr


@needs_browser
def test_the_sweeps_page_opens_without_an_error_and_every_figure_shows(
    swept: tuple[Path, str],
) -> None:
    folder, _ = swept
    with opened((folder / SWEEP / "sweep.html").as_uri()) as browser:
        shown = browser.execute_script(
            "return [...document.images].map((image) => [image.alt, image.complete && image.naturalWidth])"
        )
        assert len(shown) == 6 and all(width > 300 for _, width in shown), shown
        rows = browser.execute_script("return document.querySelectorAll('table tr').length")
        assert rows == 1 + 2
        assert errors(browser) == []
