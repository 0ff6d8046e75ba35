"""A size of every module of Liger-Kernel's benchmark, against what it measured on an A100, an H100 and a B200.

``tests/nightly/test_every_size.py`` has all 97 rows.
"""

import pytest

from validation import modules

# Sizes that the benchmark measured in one process: what the ones before left cached decides how blocks are rounded.
ROUNDED = {f"h100-heads_and_jsd-{tokens}" for tokens in (1024, 2048, 8192)}
ROUNDED |= {f"a100-distill_cosine-{tokens}" for tokens in (2048, 4096, 8192)}
MORE = ("kto", "distill_jsd")  # blocks of a process that held more, or the script was another
FEW = list({row["module"]: row for row in reversed(modules.read())}.values())  # the first of each


def check_peaks(rows: list[dict]) -> None:
    """Each peak is to 2 KiB what was measured, but for those that a process's earlier sizes changed."""
    known = {row["id"]: row for row in modules.read()}
    far = {
        row["id"]
        for row in rows
        if abs(row["predicted_bytes"] - row["measured_bytes"]) > modules.NEAR
    }
    expected = ROUNDED | {name for name in known if known[name]["module"] in MORE}
    assert far == expected & {row["id"] for row in rows}
    assert all(
        abs(row["error_percent"]) < 0.11
        for row in rows
        if known[row["id"]]["module"] != "distill_jsd"
    )


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(modules.results(FEW))


def test_a_size_of_every_module_takes_what_was_measured(rows):
    assert len(rows) == 19
    check_peaks(rows)


def test_what_a_compiled_loss_left_behind_is_two_heads_five_inputs_and_three_labels():
    known = {row["id"]: row for row in modules.read()}
    sizes = {sum(modules.left_behind(known[f"a100-simpo-{texts}x1024"])) for texts in (2, 4, 8, 16)}
    assert sizes == {2 * 2 * 4096 * 128_256 + 5 * 2 * 2048 * 4096 + 3 * 8 * 2048 + 4}


def test_the_two_frames_of_kto_hold_five_heads_four_biases_and_two_batches():
    known = {row["id"]: row for row in modules.read()}
    head, bias, words = 2 * 1024 * 128_256, 2 * 128_256, 2 * 1024 * 512
    for texts in (2, 32):
        row = known[f"h100-kto-{texts}x512"]
        speed, memory = modules.left_behind(row), modules.left_again(row)
        assert sum(speed) == 2 * head + bias + 2 * 4 * words + 4 * 512 * 8 + 4 + 2
        assert sum(memory) == 3 * head + 3 * bias + 2 * 2 * words + 2 * 512 * 8 + 2 + 2
    assert modules.left_again(known["a100-simpo-2x1024"]) == []
