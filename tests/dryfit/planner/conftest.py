"""Cards for models so small that what a process has beside the step would be larger than the card."""

import pytest


@pytest.fixture
def nothing_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict to the byte: nothing is beside a step."""
    none = {"least_mib": {"two": 0, "more": 0}, "most_mib": 0, "evidence": ""}
    table = {
        "fragments": [{"when": "any", "least_share": 0.0, "most_share": 0.0, "evidence": ""}],
        "kernels": {"most_context_mib": 0, "evidence": ""},
        "desktop": {"titles": []},
        "nccl": {"nvlink": none | {"capabilities": []}, "pcie": none},
    }
    monkeypatch.setattr("dryfit.cards.beside._table", lambda: table)
