"""The core prices anybody's step: loops that are not the project's, exact on the CPU; what it can't trace it names."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dryfit.engine.errors import StepError, TraceError, ValuesNeeded
from dryfit.engine.trace import Options, measure_step, trace_step
from tests.repository import ROOT

CORE = ROOT / "dryfit" / "engine"


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(32, 64), torch.randint(10, (32,))


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer):
    def step(batch):
        inputs, labels = batch
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def mixed_loop(model: nn.Module, optimizer: torch.optim.Optimizer):
    """Autocast, checkpointing and an accumulated gradient."""

    def step(batch):
        inputs, labels = batch
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = checkpoint(model[:3], inputs, use_reentrant=False)
                loss = functional.cross_entropy(model[3:](hidden), labels)
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def both(loop, kind=perceptron, optimizer=torch.optim.AdamW, **options):
    """The trace for a CPU and the measurement there."""
    answers = []
    for device, answer in (("meta", trace_step), ("cpu", measure_step)):
        with torch.device(device):
            model = kind()
        more = {"target": "cpu"} if device == "meta" else {}
        own = optimizer(model.parameters(), foreach=False, **options)
        answers.append(answer(model, own, loop(model, own), batch(), Options(**more)))
    return answers


@pytest.mark.parametrize("loop", [plain_loop, mixed_loop])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_plain_loop_is_traced_to_the_byte(loop, optimizer):
    predicted, measured = both(loop, optimizer=optimizer)
    assert predicted.phases == measured.phases
    assert set(predicted.phases) == {"load", "forward", "backward", "optimizer"}
    assert predicted.peak_allocated_bytes == measured.peak_allocated_bytes
    casts = predicted.components.pop(
        "weight_casts", 0
    )  # a measurement doesn't know which copies are of weights
    predicted.components["activations"] = predicted.components.get("activations", 0) + casts
    measured.components.setdefault("activations", 0)
    assert predicted.components == measured.components


def test_wide_logits_under_autocast_are_copied_to_fp32_as_on_a_cpu():
    def wide() -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2048)
        )

    predicted, measured = both(mixed_loop, wide)
    assert predicted.phases == measured.phases


def test_a_gpu_has_blocks_segments_and_workspaces():
    with torch.device("meta"):
        model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    report = trace_step(
        model,
        optimizer,
        plain_loop(model, optimizer),
        batch(),
        Options(capability=(8, 9), timeline=True),
    )
    assert report.components["workspaces"] >= 8_519_680
    assert (
        sum(report.components.values())
        == report.peak_allocated_bytes
        == max(report.timeline["allocated_bytes"])
    )
    assert report.peak_reserved_bytes % 2**21 == 0
    assert report.reserved_range_bytes == (report.peak_reserved_bytes, report.peak_reserved_bytes)
    assert report.required_bytes <= report.peak_reserved_bytes
    assert report.to_mapping()["required_range_bytes"] == [report.required_bytes] * 2


def test_outputs_of_the_batch_before_have_its_length():
    def loop(model, optimizer):
        kept = []

        def step(batch):
            output = model(batch[0])
            output.sum().backward()
            kept[:] = [output]
            optimizer.step()
            optimizer.zero_grad()

        return step

    peaks = []
    for rows in (32, 3200):
        with torch.device("meta"):
            model = perceptron()
        own = torch.optim.SGD(model.parameters())
        longer = (torch.empty(rows, 64), None)
        answer = trace_step(
            model, own, loop(model, own), batch(), Options(previous_batch=longer, target="cpu")
        )
        peaks.append(answer.phases["forward"])
    assert peaks[1] - peaks[0] == (3200 - 32) * 10 * 4


def test_a_loop_that_empties_the_cache_starts_the_next_step_without_free_segments():
    def loop(model, optimizer, empties):
        def step(batch):
            model(batch[0]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if empties:
                torch.cuda.empty_cache()

        return step

    reports = []
    for empties in (False, True):
        with torch.device("meta"):
            model = perceptron()
        own = torch.optim.SGD(model.parameters())
        shorter = (
            torch.empty(100_000, 64),
            None,
        )  # leaves segments that are too small for the longer batch's tensors
        longer = (torch.empty(300_000, 64), None)
        reports.append(
            trace_step(
                model, own, loop(model, own, empties), longer, Options(previous_batch=shorter)
            )
        )
    kept, emptied = reports
    for (
        phase,
        peak,
    ) in (
        kept.phases.items()
    ):  # a block taken from a free one is up to 1 MiB larger than its request
        assert abs(peak - emptied.phases[phase]) < 2**20
    assert kept.peak_reserved_bytes > 1.1 * emptied.peak_reserved_bytes


def test_gradients_and_peaks_are_traced_back_to_their_modules():
    with torch.device("meta"):
        model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    report = trace_step(
        model, optimizer, plain_loop(model, optimizer), batch(), Options(target="cpu", origins=True)
    )
    assert sum(row["bytes"] for row in report.tensors) == report.peak_allocated_bytes
    assert report.tensors[0]["bytes"] == 128 * 128 * 4
    weights = [row for row in report.tensors if row["component"] == "weights_fp32"]
    assert {(row["module"], row["operator"]) for row in weights} >= {("0", "weight"), ("4", "bias")}
    lines = {row["line"].split(" in ")[1] for row in report.tensors if row["line"]}
    assert "step" in lines
    with torch.device("meta"):
        model = perceptron()
    report = trace_step(
        model, None, lambda batch: model(batch[0]).sum().backward(), batch(), Options(origins=True)
    )
    gradients = [row for row in report.tensors if row["component"] == "gradients"]
    assert {row["module"] for row in gradients} >= {"2", "4"}


READERS = {
    "item": lambda output: output.sum().item(),
    "if": lambda output: output if output.sum() > 0 else None,
    "nonzero": lambda output: output.nonzero(),
    "boolean index": lambda output: output[output > 0],
    "tolist": lambda output: output.tolist(),
    "cpu": lambda output: output.cpu().sum().item(),
    "numpy": lambda output: output.detach().numpy(),
    "float": lambda output: float(output.sum()),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_step_that_reads_values_is_named(read):
    with torch.device("meta"):
        model = perceptron()

    def step(batch):
        read(model(batch[0]))

    with pytest.raises(ValuesNeeded, match="reads a tensor's value") as caught:
        trace_step(model, None, step, batch())
    assert Path(__file__).name in caught.value.line
    assert "lambda output" in caught.value.line
    assert "trace_step()" in str(caught.value)


def test_a_number_for_a_log_can_be_answered():
    with torch.device("meta"):
        model = perceptron()
    seen = []

    def step(batch):
        output = model(batch[0])
        seen.append(output.sum().item())
        output.sum().backward()

    trace_step(model, None, step, batch(), Options(scalars=1.0))
    assert seen == [1.0, 1.0]


def test_inference_mode_may_be_a_decorator():
    with torch.device("meta"):
        model = perceptron()
    seen = []

    def step(batch):
        decorators = torch.inference_mode(False), torch.inference_mode(), torch.inference_mode
        trains, *looks = (decorate(lambda rows: model(rows)) for decorate in decorators)
        seen.append([each(batch[0]).requires_grad for each in looks])
        trains(batch[0]).sum().backward()

    trace_step(model, None, step, batch())
    assert seen[-1] == [False, False]


class Decoding:
    """Greedy decoding as people write it: inference mode, a cache that grows, numbers that go to Python and back."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.said = model, []

    def __call__(self, tokens: torch.Tensor) -> None:
        embed, head, device = *self.model, self.model[0].weight.device
        with torch.inference_mode():
            cache = embed(tokens)
            for _ in range(5):
                mixed = functional.scaled_dot_product_attention(cache[:, -1:], cache, cache)
                scores = functional.cross_entropy(
                    head(mixed)[:, 0], tokens[:, 0], reduction="none"
                ).tolist()
                chosen = head(mixed)[:, 0].argmax(-1).tolist()
                self.said.append((scores, chosen))
                cache = torch.cat(
                    [cache, embed(torch.tensor(chosen, device=device)[:, None])], dim=1
                )


def test_answers_without_gradients_are_traced_to_the_byte():
    tokens = torch.randint(50, (3, 7))
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 50))
    measured = measure_step(model, None, Decoding(model), tokens, Options(steps=1))
    again = measure_step(model, None, Decoding(model), tokens)
    answered = Decoding(model.to("meta"))
    traced = trace_step(model, None, answered, tokens, Options(target="cpu", steps=1, scalars=0))
    assert answered.said == [([0.0] * 3, [0] * 3)] * 5
    assert measured.peak_allocated_bytes == again.peak_allocated_bytes
    assert traced.peak_allocated_bytes == measured.peak_allocated_bytes
    assert traced.components == measured.components


def kernels_for_cuda(parameters):
    raise RuntimeError(f"this optimizer only supports CUDA tensors, not {parameters[0].device}")


ELSEWHERE = {
    "a tensor on the CPU": (
        lambda model, inputs: model(inputs) + torch.ones(32, 10),
        "lies on another device",
    ),
    "inputs on the CPU": (
        lambda model, inputs: model(torch.ones(32, 64)),
        "lies on another device",
    ),
    "an optimizer's kernel": (
        lambda model, inputs: torch.cuda.synchronize(),
        "asks for CUDA itself",
    ),
    "an optimizer for CUDA": (
        lambda model, inputs: kernels_for_cuda([*model.parameters()]),
        "asks for CUDA itself",
    ),
    "moved to a GPU": (
        lambda model, inputs: model(torch.ones(32, 64, device="cuda")),
        "asks for CUDA itself",
    ),
}


@pytest.mark.parametrize(("act", "problem"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_step_on_another_device_is_named(act, problem):
    if "CUDA" in problem and torch.cuda.is_available():
        pytest.skip("asks for a GPU, and here is one")
    with torch.device("meta"):
        model = perceptron()
    with pytest.raises(StepError, match=problem) as caught:
        trace_step(model, None, lambda batch: act(model, batch[0]), batch())
    assert Path(__file__).name in caught.value.line
    assert "lambda model, inputs" in caught.value.line or "in kernels_for_cuda" in caught.value.line
    assert "batch.device" in caught.value.hint


def test_a_step_that_fails_and_what_can_not_be_traced_are_named():
    with torch.device("meta"):
        model = perceptron()
    with pytest.raises(StepError, match="same reduction dim") as caught:
        trace_step(model, None, lambda batch: model(batch[0].T), batch())
    assert Path(__file__).name in caught.value.line
    assert not isinstance(caught.value, ValuesNeeded)
    with pytest.raises(TraceError, match="lies on the device cpu, not on meta"):
        trace_step(perceptron(), None, lambda: None)
    with (
        torch.device("meta"),
        pytest.raises(TraceError, match="Unknown target of the trace: 'tpu'"),
    ):
        trace_step(perceptron(), None, lambda: None, options=Options(target="tpu"))


def test_nothing_stays_exchanged():
    names = ("autocast", "is_autocast_enabled", "get_autocast_dtype", "softmax")
    before = [getattr(torch, name) for name in names] + [
        torch.autocast.__enter__,
        torch.autograd._engine_run_backward,
    ]
    test_a_gpu_has_blocks_segments_and_workspaces()
    after = [getattr(torch, name) for name in names] + [
        torch.autocast.__enter__,
        torch.autograd._engine_run_backward,
    ]
    assert before == after
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_the_core_needs_torch_and_nothing_of_the_pipeline():
    allowed = {"torch", *sys.stdlib_module_names}
    for path in CORE.glob("*.py"):
        tree = ast.parse(path.read_text())
        modules = [
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and not node.level
        ]
        modules += [
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        ]
        assert not {name.split(".")[0] for name in modules} & {"scripts", "dryfit"}, path
        for node in ast.parse(path.read_text()).body:  # what importing it takes
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            build = (
                {"setuptools"} if path.name == "wheel.py" else set()
            )  # building a wheel alone imports it
            assert {name.split(".")[0] for name in names} <= allowed | build, path
