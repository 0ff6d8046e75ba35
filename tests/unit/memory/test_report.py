"""Figures of a record made by hand: where each phase's peak is, and what lived there."""

import pytest

from scripts.memory.core.report import make_report
from scripts.memory.core.tracker import Tracker


def record() -> Tracker:
    """Two steps alike: the forward pass ends with its largest allocation, the backward pass frees it first."""
    tracker = Tracker(("meta",))
    for step in range(2):
        tracker.mark("forward", step)
        kept = tracker.hold(512, "activations")
        top = tracker.hold(4096, "logits_and_loss")
        tracker.mark("backward", step)
        tracker.drop(top)
        gradient = tracker.hold(1024, "gradients")
        tracker.drop(kept)
        tracker.mark("optimizer", step)
        state = tracker.hold(2048, "temporaries")
        tracker.drop(state)
        tracker.drop(gradient)
    tracker.mark("end", 2)
    return tracker


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_peak_may_be_the_last_event_of_a_phase(on_gpu) -> None:
    report = make_report(record(), on_gpu=on_gpu)
    assert report.phases == {"load": 0, "forward": 4608, "backward": 4608, "optimizer": 3072}
    assert (report.peak_phase, report.peak_allocated_bytes) == ("forward", 4608)
    parts = {name: size for name, size in report.components.items() if size}
    assert parts == {"activations": 512, "logits_and_loss": 4096}
    assert report.components_by_phase["optimizer"]["gradients"] == 1024
    assert report.resident_bytes == 0


def test_what_a_gpu_must_have_is_asked_of_the_whole_record() -> None:
    report = make_report(record(), on_gpu=True)
    assert report.required_bytes == report.peak_reserved_bytes == 2 * 2**20
    assert report.reserved_range_bytes == (2 * 2**20, 2 * 2**20)


def test_the_timeline_shows_the_last_step() -> None:
    line = make_report(record(), on_gpu=True).timeline
    assert max(line["allocated_bytes"]) == 4608
    for moment, total in enumerate(line["allocated_bytes"]):
        assert sum(column[moment] for column in line["components"].values()) == total
