"""What tests of the engine stand on."""

import pytest

from dryfit.engine.replay import compiled


@pytest.fixture(params=["compiled", "python"])
def each_replay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the compiled replay, and on Python's."""
    if request.param == "python":
        monkeypatch.setattr("dryfit.engine.replay.compiled", lambda: None)
    elif compiled() is None:
        pytest.skip("no C compiler")
    return request.param
