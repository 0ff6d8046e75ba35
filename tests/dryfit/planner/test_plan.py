"""The planner's command: what it refuses, and what to write instead."""

import pytest

from dryfit.common.errors import UserError
from dryfit.planner.plan import main


@pytest.mark.parametrize(
    ("arguments", "where", "write"),
    [
        ([], "the command line", "dryfit.planner.plan mine.yaml"),
    ],
)
def test_a_missing_scenario_is_refused_with_what_to_write(arguments, where, write) -> None:
    with pytest.raises(UserError) as error:
        main(arguments)
    assert error.value.where == where and write in error.value.write


def test_a_gpu_that_is_not_known_is_named(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("model: qwen2.5-coder-0.5b\n", encoding="utf-8")
    with pytest.raises(UserError, match="nosuch") as error:
        main([str(tmp_path / "mine.yaml"), "--gpu", "nosuch"])
    assert error.value.where == "--gpu"
