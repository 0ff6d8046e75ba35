"""On this machine's GPUs, the whole chain that tests/end_to_end/test_stages.py has over a simulated card."""

import math
from pathlib import Path

import pytest

from tests.end_to_end import whole_chain

torch = pytest.importorskip("torch")
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device: no GPU was found here"),
]
two = pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices: {GPUS} found here")


@pytest.mark.parametrize(
    ("case", "gpus", "is_resumed"),
    [
        ("qlora", 1, True),
        ("lora", 1, False),
        ("fp16", 1, True),
        ("shared_prefix", 1, False),
        pytest.param("lora ddp", 2, False, marks=two),
        pytest.param("qlora ddp", 2, False, marks=two),
        pytest.param("qlora fsdp2", 2, False, marks=two),
    ],
)
def test_the_whole_chain(tmp_path: Path, case: str, gpus: int, is_resumed: bool) -> None:
    found = whole_chain.run(tmp_path, case, is_resumed=is_resumed, real=True)
    whole_chain.check(found, gpus, is_resumed)
    curve = [row["loss"] for row in found["training"]["curve"]]
    assert all(map(math.isfinite, curve))


def test_a_resumed_training_ends_like_one_that_was_not_killed(tmp_path: Path) -> None:
    curves = []
    for name, words in (("killed", ["resumed"]), ("whole", [])):
        folder = tmp_path / name
        folder.mkdir()
        whole_chain.started(folder, "make")
        found = whole_chain.ended(folder, "qlora", "0", "real", *words)
        curves.append([row["loss"] for row in found["curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_the_measured_peak_is_the_traced_one(tmp_path: Path) -> None:
    whole_chain.started(tmp_path, "make")
    measured = whole_chain.ended(tmp_path, "measurement", "0", "real")
    predicted, _ = whole_chain.started(tmp_path, "trace")
    assert predicted["peak_allocated_bytes"] == pytest.approx(
        measured["peak_allocated_bytes"], rel=0.01
    )


def test_an_evaluation_stays_on_the_gpu_that_was_gated(tmp_path: Path) -> None:
    """However many GPUs there are, the model lies on the current one alone."""
    from scripts.evaluation import evaluate

    whole_chain.started(tmp_path, "make")
    model = evaluate.load(tmp_path / "base", "cuda")
    places = {parameter.device for parameter in model.parameters()}
    assert places == {torch.device("cuda", torch.cuda.current_device())}
