"""Every module of Liger-Kernel's benchmark, against what it measured on an A100 and an H100."""

from scripts.validation import modules


def test_every_module_takes_what_was_measured():
    rows = list(modules.results())
    assert len(rows) == 34 and {row["module"] for row in modules.read()} == {
        "cross_entropy",
        "geglu",
        "head_and_cross_entropy",
        "layer_norm",
        "rms_norm",
        "swiglu",
    }
    worst = max(rows, key=lambda row: abs(row["predicted_bytes"] - row["measured_bytes"]))
    assert abs(worst["predicted_bytes"] - worst["measured_bytes"]) <= 2 * 1024, (
        worst
    )  # published to a few hundred bytes
    assert all(abs(row["error_percent"]) < 0.001 for row in rows)
