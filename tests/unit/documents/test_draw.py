"""The figures: the same bytes each time, and their words."""

from pathlib import Path

import pytest

from scripts.documents import draw
from tests.unit.documents import inputs


@pytest.mark.thorough
def test_figures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    content = inputs.files()
    given = inputs.write(
        tmp_path, {**content, "curve": [{"loss": 3 / step, "step": step} for step in range(1, 40)]}
    )
    needed = {name: given[name] for name in ("profile", "curve", "rows", "training", "comparison")}
    figures = []
    for attempt in ("first", "second"):
        outputs = {
            name: str(tmp_path / attempt / f"{name}.png")
            for name in ("memory", "timeline", "training_curve", "evaluation")
        }
        draw.main(
            {**needed, "step": given["profile"][-1]}, inputs.CARD_SETTINGS["scenarios"], outputs
        )
        figures.append({name: Path(path).read_bytes() for name, path in outputs.items()})
    assert figures[0] == figures[1]
    assert all(
        figure.startswith(b"\x89PNG") and b"Software" not in figure
        for figure in figures[0].values()
    )


def test_the_evaluation_has_a_panel_for_each_test_and_a_line_for_each_rival() -> None:
    figure = draw.draw_evaluation(inputs.files())
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        *("Known Kinds in New Words and Values", "New Kinds", "Requests That Other People Wrote")
    ]
    for axes in figure.axes:
        lines = [label.get_text() for label in axes.get_yticklabels()]
        assert len(lines) == 4 and lines[-2:] == ["the untrained base", "the tuned model"]
    assert "70 of 90" in [text.get_text() for text in figure.axes[0].texts]
    one = inputs.extreme()
    assert len(draw.draw_evaluation(one).axes) == 1


def test_the_curve_shows_each_validation_and_the_step_that_is_kept() -> None:
    content = inputs.files()
    content["curve"] = [{"loss": 3 / step, "step": step} for step in range(1, 10)]
    for step, loss in ((3, 1.5), (6, 1.25), (9, 1.75)):
        content["curve"][step - 1]["validation_loss"] = loss
    content["training"] |= {"kept_step": 6, "steps": 9, "validation_loss": 1.25}
    (axes,) = draw.draw_training_curve(content).axes
    *_, validated, kept = axes.get_lines()
    assert list(validated.get_xdata()) == [3, 6, 9]
    assert list(validated.get_ydata()) == [1.5, 1.25, 1.75]
    assert (list(kept.get_xdata()), list(kept.get_ydata())) == ([6], [1.25])
    assert kept.get_label() == "the adapter, step 6: 1.250"
