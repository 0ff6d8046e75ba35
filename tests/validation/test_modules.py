"""Every module of Liger-Kernel's benchmark, against what it measured on an A100, an H100 and a B200."""

import pytest

from validation import modules

# Sizes that the benchmark measured in one process: what the ones before left cached decides how blocks are rounded.
ROUNDED = {f"h100-heads_and_jsd-{tokens}" for tokens in (1024, 2048, 8192)}
ROUNDED |= {f"a100-distill_cosine-{tokens}" for tokens in (2048, 4096, 8192)}
LEFT_BEHIND = ("orpo", "orpo_16bit", "cpo", "simpo", "kto", "distill_jsd")  # the process held more before they ran


@pytest.fixture(scope="module")
def rows():
    return list(modules.results())


def test_every_module_takes_what_was_measured(rows):
    known = {row["id"]: row for row in modules.read()}
    assert len(rows) == 97 and len({row["module"] for row in known.values()}) == 19
    far = {row["id"] for row in rows if abs(row["predicted_bytes"] - row["measured_bytes"]) > modules.NEAR}
    assert far == ROUNDED | {name for name in known if known[name]["module"] in LEFT_BEHIND}
    assert all(abs(row["error_percent"]) < 0.11 for row in rows if known[row["id"]]["module"] not in LEFT_BEHIND)


def test_what_a_process_held_before_is_the_same_for_all_sizes(rows):
    """Two heads, five inputs and three targets of the smallest size, which the script measures first."""
    traced = {row["id"]: row["predicted_bytes"] for row in rows}
    for row in modules.read():
        if row["module"] in LEFT_BEHIND[:4]:
            hidden, texts = int(row["hidden_size"]), 2 * int(row["id"].rpartition("x")[2])
            held = 2 * 2 * hidden * int(row["outputs"]) + texts * (5 * 2 * hidden + 3 * 8) + 512
            assert abs(int(row["peak_allocated_bytes"]) - traced[row["id"]] - held) <= modules.NEAR, row["id"]
