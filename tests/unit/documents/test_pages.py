"""The page and the map of what fits: each one file, without a script, for a telephone too."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.documents.memory import METHODS
from tests.browser import errors, needs_browser, opened
from tests.unit.documents import inputs
from tests.unit.documents.inputs import HOSTILE, hostile, named


def test_the_page_is_one_file_and_escapes_text_of_others(write: Callable[..., str]) -> None:
    page = write("report.html", hostile(), named(HOSTILE))
    assert (
        "<script" not in page
        and "&lt;script&gt;" in page
        and "\x1b" not in page
        and "\u202e" not in page
    )
    assert (
        not re.search(r"(?:src|href)=\"(?!data:)", page)
        and page.count("data:image/png;base64,") == 4
    )


def test_the_first_screen_of_the_page_answers_what_people_ask(write: Callable[..., str]) -> None:
    page = write("report.html")
    first, *hidden = page.split("<details>")
    asked = ["Does it fit?", "Did it learn?", "Is it safe to use?", "What did it cost?"]
    assert re.findall(r"<h2>(.*?)</h2>", first) == asked and len(hidden) == 6
    assert "prefers-color-scheme: dark" in first
    loose = re.sub(r'<span class="figure">.*?</span>', "", page)
    assert not re.search(r"\[[\d.]+ %", loose), "an interval may not break before its sign"


def test_the_planner_is_a_map_of_the_rows_that_were_traced_without_a_script(
    write: Callable[..., str],
) -> None:
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
    assert (
        "<script" not in page
        and "default-src 'none'; style-src" in page
        and not re.search(r"(?:src|href)=", page)
    )
    assert f"Longest row: <strong>{largest['largest_sequence_length']:,} tokens</strong>" in page
    full, lora, qlora = (
        page.partition(f"<h2>{title}</h2>")[2].partition("<h2>")[0] for title in METHODS.values()
    )
    assert (
        "Not even the shortest row fits t4." in full and "t4" not in full.partition("</table>")[0]
    )
    bars = [
        [float(width) for width in re.findall(r"width: ([\d.]+)%", row)]
        for row in re.findall("<tr.*", lora)
    ]
    step = 100 / math.log2(
        end / 64
    )  # of a doubling, on the axis from 64 tokens to the longest row of all
    assert bars[1] == [pytest.approx(3 * step, abs=0.01), pytest.approx(step, abs=0.01)]
    assert (
        '<i class="fits" style="width: 0.00%">' in qlora and '<td class="number">none</td>' in qlora
    )
    assert page.count('<tr class="chosen">') == 3


@pytest.mark.thorough
@needs_browser
def test_the_planner_fits_a_telephone(write: Callable[..., str], tmp_path: Path) -> None:
    write("planner.html")
    with opened((tmp_path / inputs.RUN / "planner.html").as_uri()) as page:
        for width in (390, 1400):
            metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert errors(page) == []
