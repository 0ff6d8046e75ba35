"""The card that is simulated is the scenario's."""

from __future__ import annotations

import pytest

from will_it_fit.cards.gpus import catalogue, find
from will_it_fit.common.errors import UserError
from will_it_fit.tracing.simulated_card import card_of


def test_a_card_has_what_the_catalogue_says():
    card = card_of(find("rtx-4090"))
    assert (card.name, card.capability, card.multiprocessors) == ("NVIDIA GeForce RTX 4090", (8, 9), 128)
    assert card.memory_bytes == find("rtx-4090").total_bytes and card.l2_bytes == 75_497_472
    assert card.shared_memory_bytes == 99 * 1024
    assert card_of().capability == (8, 0)


def test_each_card_of_nvidias_can_be_simulated():
    for name, gpu in catalogue().items():
        if gpu.capability is not None:
            assert card_of(gpu).multiprocessors > 0, name


@pytest.mark.parametrize("gpu", ["mi300x", {"vram_gib": 24}])
def test_a_card_without_processors_is_named(gpu):
    with pytest.raises(UserError, match="how many processors") as caught:
        card_of(find(gpu))
    assert caught.value.write == "gpu: a100-80gb"
