"""What whole programs do in a step beside a loop: empty masks, numbers copied into tensors, threads that allocate."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dryfit.engine.fake_group import fake_group
from dryfit.engine.trace import Options, trace_step


@pytest.mark.parametrize("carrying", [False, True])
def test_a_mask_without_elements_picks_nothing(carrying):
    """A tensor without elements has no value that a trace could lack, so the step goes on."""
    with torch.device("meta"):
        model, features = nn.Linear(4, 4), torch.empty(0, 4)

    def step(ids):
        picked = features[features.sum(1) > 0]
        assert picked.shape == (0, 4)
        model(picked).sum().backward()

    trace_step(model, None, step, torch.arange(8) if carrying else torch.empty(8))


def test_tensors_of_the_host_stay_there_while_values_are_carried():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    ranks = torch.arange(4, device="cpu")

    def step(ids):
        assert ids.sum().item() == 28  # values are carried
        assert (ranks == 2).nonzero()[0].tolist() == [2]
        model(torch.empty(2, 4, device="meta"))

    trace_step(model, None, step, torch.arange(8))


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_number_is_copied_into_a_tensor(gpus):
    with torch.device("meta"):
        model = nn.Linear(4, 4)

    def step(batch):
        batch.copy_(5)
        model(batch).sum().backward()

    with fake_group(gpus) if gpus > 1 else nullcontext():
        report = trace_step(model, None, step, torch.empty(2, 4))
    assert report.warnings == ()


def test_what_a_thread_allocates_counts():
    """A dispatch mode belongs to a thread; transformers loads weights in several."""
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    kept = []

    def step(batch):
        thread = threading.Thread(
            target=lambda: kept.append(torch.empty(1000, 1000, device="meta"))
        )
        thread.start()
        thread.join()
        with ThreadPoolExecutor(1) as pool:
            kept.append(pool.submit(torch.empty, 1000, 1000, device="meta").result())
        model(batch)
        kept.clear()

    report = trace_step(model, None, step, torch.empty(2, 4), Options(target="cpu"))
    assert 2 * 4_000_000 < report.peak_allocated_bytes < 2 * 4_000_000 + 1000
