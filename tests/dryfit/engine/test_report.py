"""Figures of a record made by hand: where each phase's peak is, and what lived there."""

import pytest

from dryfit.engine.report import History, make_report
from dryfit.engine.tracker import Tracker


def record() -> Tracker:
    """Two steps alike: the forward pass ends with its largest allocation, the backward pass frees it first."""
    tracker = Tracker(("meta",))
    for step in range(2):
        tracker.mark("forward", step)
        kept = tracker.allocate(512, "activations")
        top = tracker.allocate(4096, "logits_and_loss")
        tracker.mark("backward", step)
        tracker.free(top)
        gradient = tracker.allocate(1024, "gradients")
        tracker.free(kept)
        tracker.mark("optimizer", step)
        state = tracker.allocate(2048, "temporaries")
        tracker.free(state)
        tracker.free(gradient)
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


def test_the_whole_record_says_what_a_gpu_must_have_and_the_timeline_shows_its_last_step() -> None:
    report = make_report(record(), on_gpu=True)
    assert report.required_bytes == report.peak_reserved_bytes == 2 * 2**20
    assert report.reserved_range_bytes == (2 * 2**20, 2 * 2**20)
    line = make_report(record(), on_gpu=True).timeline
    assert max(line["allocated_bytes"]) == 4608
    for moment, total in enumerate(line["allocated_bytes"]):
        assert sum(column[moment] for column in line["components"].values()) == total
    tracker = Tracker(("meta",))
    for step, size in enumerate((8192, 1024)):
        tracker.mark("forward", step)
        tracker.free(tracker.allocate(size, "activations"))
    tracker.mark("end", 2)
    line = make_report(tracker, on_gpu=True).timeline
    assert line["event"] == [0, 1, 2] and line["allocated_bytes"] == [0, 1024, 0]


def test_loading_and_each_part_of_an_accumulated_step_count() -> None:
    """Two micro-batches, the second one larger: the phase's peak is the second's."""
    tracker = Tracker(("meta",))
    for size in (512, 2048):
        tracker.mark("forward", 0)
        kept = tracker.allocate(size, "activations")
        tracker.mark("backward", 0)
        tracker.free(kept)
    tracker.mark("end", 1)
    report = make_report(tracker, on_gpu=False)
    assert report.phases == {"load": 0, "forward": 2048, "backward": 2048}
    tracker = Tracker(("meta",))
    tracker.free(tracker.allocate(8192, "weights_bf16"))
    tracker.allocate(512, "weights_bf16")
    tracker.mark("forward", 0)
    tracker.free(tracker.allocate(1024, "activations"))
    tracker.mark("end", 1)
    report = make_report(tracker, on_gpu=True)
    assert report.phases == {"load": 8192, "forward": 1536} and report.resident_bytes == 512


def test_where_chance_orders_the_loading_the_worst_decides_what_a_gpu_must_have() -> None:
    """Three histories leave the same tensor; on the way they take one, two and three segments of 20 MiB."""
    segment, large = 20 * 2**20, 9 * 2**20
    histories = []
    for count in (1, 3, 2):
        passing = [(10 + number, large) for number in range(2 * count - 1)]
        gone = [(-identity, 0) for identity, _ in passing]
        histories.append(History([(1, large), *passing, *gone], {7: 1}, {}))
    tracker = Tracker(("meta",), first_id=100)
    tracker.events += histories[0].events
    tracker.components |= dict.fromkeys(
        (identity for identity, count in histories[0].events if count), "weights_bf16"
    )
    tracker.mark("forward", 0)
    tracker.free(tracker.allocate(512, "activations"))
    tracker.mark("end", 1)
    report = make_report(tracker, histories, on_gpu=True)
    small = 2 * 2**20
    assert report.reserved_range_bytes == (segment + small, 3 * segment + small)
    assert report.peak_reserved_bytes == 2 * segment + small
    assert report.required_range_bytes == (segment + small, 3 * segment)
    assert report.required_bytes == 3 * segment
    assert [order["resident_bytes"] for order in report.orders] == [large] * 3
