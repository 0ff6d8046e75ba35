"""vLLM's published logs: what its rules give beside what it printed. The rows that were held out stay unread here."""

import json
import re
from pathlib import Path

import pytest

from dryfit.common.text import GIB
from dryfit.serving.kv_cache import kv_cache, layers_of
from validation.vllm_logs import main, rows

MODELS = Path("dryfit/data/models")
LOGS = [row for row in rows("development") if row["catalogued"] and row["kv_gib"] and row["tokens"]]


@pytest.mark.parametrize("row", LOGS, ids=lambda row: row["id"])
def test_tokens_follow_from_the_memory_that_a_log_prints(row):
    model = json.loads((MODELS / f"{row['catalogued']}.json").read_text())
    numbers = 1 if row["kv_dtype"].startswith("fp8") else 2
    cache = kv_cache(layers_of(model, number_bytes=numbers, tensor_parallel=int(row["tp"])))
    longest = int(row["max_model_len"])
    half = 0.005 * GIB  # the log has two digits
    low, high = (cache.blocks(int(float(row["kv_gib"]) * GIB + sign * half)) for sign in (-1, 1))
    assert cache.tokens(low, longest, 1) <= int(row["tokens"]) <= cache.tokens(high, longest, 1)


def test_development_logs_are_as_near_as_the_document_says(capsys):
    main("development")
    printed = capsys.readouterr().out.splitlines()
    text = " ".join(Path("docs/grpo.md").read_text().split())
    found = re.match(r"cache: (\d+) logs, median ([\d.]+) %, worst ([\d.]+) %", printed[-2])
    assert f"Of {found[1]} with enough flags" in text
    assert "nine say enough" in text
    assert f"{found[2]} % in the median and by {found[3]} % at worst" in text
    assert printed[-1] == "graphs: 9 of 9 in their range"
