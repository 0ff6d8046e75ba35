"""The figures: the same bytes each time, and their words."""

from __future__ import annotations

from pathlib import Path

from scripts.documents import draw
from tests.unit.documents import inputs


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


def test_figures_say_of_which_scores_less_is_better_and_of_how_many_requests_they_are() -> None:
    content = inputs.files()
    content["comparison"]["base"]["refused_harmless"]["n"] = 142
    figure = draw.draw_evaluation(content)
    said = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    of = {name: score.get("n") for name, score in content["comparison"]["base"].items() if isinstance(score, dict)}
    assert [label for label in said if "lower is better" in label] == [
        "Flagged as dangerous by the screen (lower is better)",
        f"Flagged as dangerous, asked for harm, of {of['danger_harmful']} (lower is better)",
        f"Refused, though harmless, of {of['refused_harmless']} (lower is better)",
    ]
    assert f"% of {of['exact']} requests" in figure.axes[0].get_xlabel()
