"""What tests of the engine stand on."""

import pytest

from will_it_fit.engine import native_replay


@pytest.fixture(params=["compiled", "python"])
def each_replay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the compiled replay, and on Python's."""
    if request.param == "python":
        monkeypatch.setattr(native_replay, "compiled", lambda: None)
    elif native_replay.compiled() is None:
        pytest.skip("no C compiler")
    return request.param
