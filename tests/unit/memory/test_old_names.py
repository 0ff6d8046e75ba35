"""Commands that have moved go on working, and say their new name."""

import json

import pytest

from scripts.memory.explain import main as old_name
from tests.will_it_fit.decoders import DECODERS
from will_it_fit.common.errors import UserError


def test_the_old_name_says_the_new_one(tmp_path, capsys):
    (tmp_path / "model.json").write_text(json.dumps(DECODERS["qwen2"]))
    file = tmp_path / "scenario.yaml"
    file.write_text("model: model.json\nsequence_length: 64\n")
    assert old_name([str(file), "--json", "--count", "4"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["tensors"]) == 4
    assert f"is now python -m will_it_fit.ask {file} --explain --count 4" in printed.err
    with pytest.raises(UserError, match="--count 10"):
        old_name([str(file), "--count", "0"])
