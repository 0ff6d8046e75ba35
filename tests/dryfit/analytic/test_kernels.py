"""Which GPUs run the same kernels in a step."""

import pytest

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.analytic.kernels import kernels_of
from dryfit.cards.gpus import catalogue
from dryfit.scenario.scenario import Scenario


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "fields", [{"precision": "fp16"}, {"attention": "eager", "loss": "chunked"}], ids=str
)
def test_where_kernels_are_the_same_estimates_are(fields) -> None:
    scenario = Scenario.from_mapping({"model": "mistral-7b-v0.1", **fields})
    by_kernels: dict = {}
    for capability in {gpu.capability for gpu in catalogue().values()}:
        peaks = [
            analytic_estimate(
                scenario.changed(sequence_length=length, micro_batch=rows),
                capability=capability,
                blocks=False,
            )["peak_allocated_bytes"]
            for length, rows in ((64, 1), (257, 2), (4095, 1), (4097, 3))
        ]
        assert by_kernels.setdefault(kernels_of(scenario, capability), peaks) == peaks
    assert len(by_kernels) > 1


def test_cards_that_differ_run_other_kernels_and_what_is_not_described_says_so() -> None:
    scenario = Scenario.from_mapping({"model": "mistral-7b-v0.1", "precision": "fp16"})
    assert len({kernels_of(scenario, gpu.capability) for gpu in catalogue().values()}) > 2
    with pytest.raises(NotDescribed, match="bloom"):
        kernels_of(
            Scenario.from_mapping({"model": {"model_type": "bloom", "hidden_size": 64}}), None
        )
