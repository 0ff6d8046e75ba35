"""Steps of others: tensors made of tensors, compiled functions, optimizers' own choices, values, the host."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dryfit.engine import attention
from dryfit.engine.errors import CompiledError, TraceError, ValuesNeeded
from dryfit.engine.known_values import LIMIT
from dryfit.engine.patching import device_lists, on_meta, patched
from dryfit.engine.trace import Options, measure_step, trace_step


class Halved(torch.Tensor):
    """A tensor that says fp32 and is kept in two parts of 16 bits, as quantized ones of torchao are kept in several."""

    @staticmethod
    def __new__(cls, high, low):
        return torch.Tensor._make_wrapper_subclass(
            cls, high.shape, dtype=torch.float32, device=high.device
        )

    def __init__(self, high, low):
        self.high, self.low = high, low

    def __tensor_flatten__(self):
        return ["high", "low"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["high"], parts["low"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].high.detach(), args[0].low.detach())
        plain = torch.utils._pytree.tree_map_only(
            cls, lambda item: item.high.float() + item.low.float(), args
        )
        return func(*plain, **(kwargs or {}))


def halved(device):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False))
        parts = torch.ones(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.uint8)
    model[0].weight = nn.Parameter(Halved(*parts), requires_grad=False)
    return model


def test_a_tensor_made_of_tensors_counts_as_what_is_inside():
    answers = []
    for device, answer in (("meta", trace_step), ("cpu", measure_step)):
        model = halved(device)
        optimizer = torch.optim.SGD(model[1].parameters())

        def step(batch, model=model, optimizer=optimizer):
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        answers.append(answer(model, optimizer, step, torch.randn(4, 64), Options(target="cpu")))
    predicted, measured = answers
    assert predicted.phases == measured.phases
    assert predicted.components["weights_other"] == 64 * 64 * (2 + 1)  # not 64 * 64 * 4


def loop(model, optimizer):
    def step(batch):
        model(batch).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize(
    "compile", [torch.compile, lambda model: model.compile(backend="eager") or model]
)
def test_what_is_compiled_is_refused_or_told(compile):
    pytest.importorskip("torch._dynamo")
    with on_meta():
        model, batch = nn.Linear(64, 64), torch.empty(8, 64)
        optimizer = torch.optim.AdamW(model.parameters())
    plain = trace_step(model, optimizer, loop(model, optimizer), batch)
    assert plain.warnings == ()
    compiled = compile(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CompiledError, match="has compiled") as caught:
        trace_step(model, optimizer, loop(compiled, optimizer), batch)
    assert Path(__file__).name in caught.value.line
    told = trace_step(model, optimizer, loop(compiled, optimizer), batch, Options(compiled="eager"))
    assert told.phases == plain.phases
    assert "compiled by torch.compile" in told.warnings[0]
    assert told.to_mapping()["warnings"] == list(told.warnings)


def test_a_function_compiled_in_the_step_is_counted_as_one_kernel_where_that_is_asked():
    with on_meta():
        model, batch = nn.Linear(64, 64), torch.empty(8, 64)
        optimizer = torch.optim.SGD(model.parameters())

    def four_times(tensor):
        return (tensor.double() * 2).float() * 2

    def step(batch):
        output = torch.compile(four_times)(batch)
        (model(batch) + output).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    eager, fused = (
        trace_step(model, optimizer, step, batch, Options(compiled=policy, timeline=True))
        for policy in ("eager", "fused")
    )
    counts = [len(report.timeline["event"]) for report in (eager, fused)]
    assert (
        counts[0] - counts[1] == 3 * 2
    )  # three tensors that come and go; the fourth is the output
    assert max(fused.timeline["components"]["inputs"]) < max(eager.timeline["components"]["inputs"])
    assert "counted as one kernel" in fused.warnings[0]


@pytest.mark.parametrize("place", ["before", "after", "nowhere"])
def test_what_a_step_computes_outside_of_modules_counts(place):
    """A peak before the first module is called, or after the backward pass, is the step's peak too."""
    reports = []
    for device, answer in (("meta", trace_step), ("cpu", measure_step)):
        with torch.device(device):
            model, batch = nn.Linear(8, 8), torch.empty(4, 8)

        def step(batch, model=model):
            def much():
                return torch.ones(1 << 20, device=batch.device).cumsum(0).sum()

            batch = batch + (much() if place == "before" else 0)
            model(batch).sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad + (0 * much() if place == "after" else 0)
                    parameter.grad = None

        reports.append(answer(model, None, step, batch, Options(target="cpu")))
    traced, measured = reports
    assert traced.phases == measured.phases
    assert (traced.peak_allocated_bytes > 2 * 4 << 20) == (place != "nowhere")
    assert (
        traced.peak_phase
        == {"before": "forward", "after": "optimizer", "nowhere": "optimizer"}[place]
    )


def test_an_import_in_the_first_step_leaves_nothing_in_the_second(monkeypatch):
    """PyTorch imports its compiler when it first needs a shape function, and a frame that names itself stays."""
    with on_meta():
        model, batch = nn.Linear(64, 64), torch.empty(8, 64)

    def trace(imports):
        def step(batch):
            much = torch.ones(1 << 20, device="meta")  # noqa: F841
            if imports.pop("now", False):
                frame = sys._getframe()  # noqa: F841
                monkeypatch.setitem(sys.modules, "imported_in_a_step", sys)
            model(batch).sum().backward()

        return trace_step(model, None, step, batch, Options(target="cpu"))

    assert trace({"now": True}).phases == trace({}).phases


def test_workspaces_of_cudnn_are_a_range():
    def trace(target="cuda", **options):
        with on_meta(target):
            model, batch = (
                nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 62 * 62, 4096)),
                None,
            )
            batch = torch.empty(2, 3, 64, 64)
            optimizer = torch.optim.AdamW(model.parameters())
        return trace_step(
            model, optimizer, loop(model, optimizer), batch, Options(target=target, **options)
        )

    report, much = trace(), 1 << 30
    (told,) = report.warnings
    assert "CUDNN_CONV_WSCAP_DBG" in told and "peak_allocated_range_bytes" in told
    assert report.peak_allocated_range_bytes == (report.peak_allocated_bytes, None)
    assert (
        report.peak_phase == "optimizer"
    )  # where nothing convolves: a small workspace fits below that peak
    assert (
        trace(cudnn_workspace_bytes=1).peak_allocated_range_bytes
        == (report.peak_allocated_bytes,) * 2
    )
    low, high = trace(cudnn_workspace_bytes=much).peak_allocated_range_bytes
    assert low < high < low + much and high > report.phases["forward"]
    bounded = trace(capacity_bytes=4 * much)
    assert bounded.peak_allocated_range_bytes == (low, 4 * much)
    assert bounded.required_bytes == report.required_bytes  # a full GPU gets a smaller plan
    assert trace("cpu").warnings == () and trace("cpu").peak_allocated_range_bytes is None


def test_an_optimizer_takes_the_path_of_the_target():
    def trace(target, **options):
        with on_meta(target):
            model, batch = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), torch.empty(8, 64)
            optimizer = torch.optim.AdamW(model.parameters(), **options)
        return trace_step(model, optimizer, loop(model, optimizer), batch, Options(target=target))

    assert trace("cuda").phases == trace("cuda", foreach=True).phases
    assert trace("cuda").phases["optimizer"] > trace("cuda", foreach=False).phases["optimizer"]
    assert trace("cpu").phases == trace("cpu", foreach=False).phases
    assert trace("cuda", fused=True).phases["optimizer"] < trace("cuda").phases["optimizer"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_each_path_is_the_measured_one_to_the_byte(kind, options):
    answers = []
    for device, answer in (("meta", trace_step), ("cpu", measure_step)):
        with torch.device(device):
            model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        with patched(device_lists("cpu")):  # some look at the device at once
            optimizer = kind(model.parameters(), **options)
        answers.append(
            answer(
                model, optimizer, loop(model, optimizer), torch.randn(8, 64), Options(target="cpu")
            )
        )
    assert answers[0].phases == answers[1].phases


def test_states_that_exist_before_the_first_step_and_other_models_count():
    with on_meta():
        model, teacher, batch = nn.Linear(64, 64), nn.Linear(64, 64), torch.empty(8, 64)
    optimizer = torch.optim.Adagrad(model.parameters())

    def step(batch):
        with torch.no_grad():
            target = teacher(batch)
        functional.mse_loss(model(batch), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    report = trace_step(model, optimizer, step, batch, Options(target="cpu"))
    size = (64 * 64 + 64) * 4
    assert report.components["weights_fp32"] == 2 * size
    assert report.components["optimizer_states"] >= size


READERS = {
    "nonzero": lambda ids, mask: ids.nonzero(),
    "boolean index": lambda ids, mask: ids[mask],
    "if": lambda ids, mask: ids * 2 if mask.all() else ids,
    "lengths": lambda ids, mask: torch.cat([torch.ones(int(count)) for count in mask.sum(1)]),
    "repeat": lambda ids, mask: torch.repeat_interleave(ids[0], mask.sum(0)),
    "tolist": lambda ids, mask: torch.zeros(sum(mask.sum(1).tolist())),
    "unique": lambda ids, mask: torch.unique(ids),
    "shifted": lambda ids, mask: (torch.arange(16)[None] < mask.sum(1, keepdim=True)).nonzero(),
    "floats by a mask": lambda ids, mask: torch.ones(4, 16, 8).masked_select(mask[..., None]),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_small_integers_of_a_batch_have_their_values(read):
    ids = torch.arange(64).reshape(4, 16)
    mask = torch.arange(16)[None] < torch.tensor([[16], [9], [1], [3]])
    shapes = {}
    for device, answer in (("meta", trace_step), ("cpu", measure_step)):
        with torch.device(device):
            model = nn.Linear(4, 4)

            def step(batch, device=device):
                with torch.device(device):
                    shapes[device] = read(*batch).shape

            report = answer(model, None, step, (ids, mask), Options(target="cpu", steps=1))
        shapes[f"peak on {device}"] = report.phases
    assert shapes["meta"] == shapes["cpu"]


def test_values_that_nobody_knows_any_more_are_not_used():
    with torch.device("meta"):
        model, unknown = nn.Linear(4, 4), torch.empty(8, dtype=torch.long)

    def step(ids):
        ids.add_(unknown)
        ids.nonzero()

    with pytest.raises(ValuesNeeded):
        trace_step(model, None, step, torch.arange(8))
    with pytest.raises(ValuesNeeded):
        trace_step(model, None, lambda ids: ids.nonzero(), torch.arange(LIMIT + 1))


def test_the_users_batch_is_not_written_into_and_a_foreign_parameter_is_named():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    ids = torch.arange(8)
    trace_step(model, None, lambda batch: batch.add_(1).sum().item(), ids)
    assert ids.tolist() == list(range(8))
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(nn.Linear(4, 4).parameters())
    with pytest.raises(TraceError, match="A parameter of the optimizer lies on the device cpu"):
        trace_step(model, optimizer, lambda: None)


def test_a_library_can_be_answered():
    with torch.device("meta"):
        model = nn.Linear(4, 4)

    def step(batch):
        if model(batch).sum() > 0:
            model(batch)

    with pytest.raises(ValuesNeeded):
        trace_step(model, None, step, torch.empty(2, 4))
    trace_step(model, None, step, torch.empty(2, 4), Options(answers={f"{__name__}:step": True}))


@pytest.mark.parametrize("scalars", [None, 1.0])
def test_what_is_kept_on_the_host_takes_nothing_there(scalars):
    terabyte = 2**40
    with torch.device("meta"):
        model, batch = nn.Linear(2**20, 16), torch.empty(terabyte // 4 // 2**20, 2**20)
    optimizer = torch.optim.SGD(model.parameters())

    def step(batch):
        with torch.autograd.graph.save_on_cpu():
            loss = model(batch * 2).relu().sum()
        del batch
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    report = trace_step(model, optimizer, step, batch, Options(scalars=scalars, steps=1))
    assert report.phases["forward"] > 2 * terabyte > report.phases["optimizer"]
    assert report.phases["backward"] < 1.1 * terabyte  # the product's input has come back


def test_offloaded_activations_are_traced_to_the_byte():
    answers = []
    for device, answer in (("meta", trace_step), ("cpu", measure_step)):
        with torch.device(device):
            model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        optimizer = torch.optim.SGD(model.parameters(), foreach=False)

        def step(batch, model=model, optimizer=optimizer):
            with torch.autograd.graph.save_on_cpu():
                loss = model(batch).relu().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        answers.append(answer(model, optimizer, step, torch.randn(8, 64), Options(target="cpu")))
    assert answers[0].phases == answers[1].phases


@pytest.mark.parametrize("options", [{"target": "tpu"}, {"compiled": "yes"}, {"steps": 0}])
def test_a_wrong_option_is_named(options):
    with pytest.raises(TraceError, match=next(iter(options))):
        Options(**options)


def attending(policy, capability, target="cuda", device="meta"):
    """A step of some layers of attention, checkpointed; ``policy`` chooses the operators that are kept."""
    size, heads = 256, 4
    dtype = torch.bfloat16 if target == "cuda" else torch.float32

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(size, 3 * size), nn.Linear(size, size)

        def forward(self, hidden):
            rows, tokens, _ = hidden.shape
            parts = (
                self.inner(hidden)
                .view(rows, tokens, 3 * heads, size // heads)
                .transpose(1, 2)
                .chunk(3, 1)
            )
            mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
            return hidden + self.outer(mixed.transpose(1, 2).reshape(rows, tokens, size))

    with torch.device(device):
        model = nn.ModuleList(Layer() for _ in range(4)).to(dtype)

    def step(hidden):
        for layer in model:
            context = (
                {}
                if policy is None
                else {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
            )
            hidden = checkpoint(layer, hidden, use_reentrant=False, **context)
        hidden.sum().backward()

    batch = torch.randn(2, 512, size, dtype=dtype)
    options = Options(target=target, capability=capability)
    return (trace_step if device == "meta" else measure_step)(model, None, step, batch, options)


def keep(*operators):
    def policy(context, operator, *args, **kwargs):
        return (
            CheckpointPolicy.MUST_SAVE
            if operator in operators
            else CheckpointPolicy.PREFER_RECOMPUTE
        )

    return policy


@pytest.mark.parametrize("capability, kernel", [((8, 0), "flash"), ((8, 6), "efficient")])
def test_a_policy_on_attention_is_heeded_on_a_gpu(capability, kernel, monkeypatch):
    if kernel == "efficient":
        monkeypatch.setitem(
            attention._BACKENDS, "flash", (SDPBackend.FLASH_ATTENTION, lambda: False)
        )
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention").default
    plain, nothing, kept = (attending(each, capability) for each in (None, keep(), keep(operator)))
    small = 8 * 512  # seeds of dropout, for each of the layers
    outputs, sums = 2 * 512 * 256 * 2, 2 * 4 * 512 * 4
    assert abs(nothing.phases["forward"] - plain.phases["forward"]) <= small
    # Running a layer again ends early where no policy asks; with one its attention's output is there once more.
    assert nothing.phases["backward"] - plain.phases["backward"] <= outputs + sums + small
    assert (
        abs(kept.phases["forward"] - nothing.phases["forward"] - 3 * (outputs + sums)) <= 6 * small
    )  # the last is there anyway


def test_selective_checkpointing_is_traced_to_the_byte():
    operators = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten.addmm.default,
    )
    predicted, measured = (
        attending(keep(*operators), None, "cpu", device) for device in ("meta", "cpu")
    )
    assert predicted.phases == measured.phases


def _layer_and(
    make: Callable[[Any], torch.optim.Optimizer],
) -> tuple[nn.Module, torch.optim.Optimizer]:
    layer = nn.Linear(512, 512, device="meta")
    return layer, make(layer.parameters())


def test_an_optimizer_that_never_steps_is_an_error() -> None:
    layer, optimizer = _layer_and(torch.optim.AdamW)
    calls: list[int] = []

    def every_fourth(batch: torch.Tensor) -> None:
        calls.append(1)
        layer(batch).sum().backward()
        if len(calls) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()

    batch = torch.empty(8, 512)
    with pytest.raises(TraceError, match="the step took no update in 2 calls"):
        trace_step(layer, optimizer, every_fourth, batch)
    calls.clear()
    assert not trace_step(layer, optimizer, every_fourth, batch, Options(steps=8)).warnings
    calls.clear()
    warnings = trace_step(layer, optimizer, every_fourth, batch, Options(steps=7)).warnings
    assert any("the last call of the step took no update" in each for each in warnings)
    trace_step(layer, None, lambda given: layer(given).sum().backward(), batch)


def test_a_step_that_keeps_more_each_time_is_told() -> None:
    layer, optimizer = _layer_and(torch.optim.AdamW)
    kept: list[torch.Tensor] = []

    def step(keeps: int, batch: torch.Tensor) -> None:
        output = layer(batch)
        kept.append(output.detach())
        del kept[:-keeps]
        output.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for keeps, told in ((10, True), (1, False)):
        kept.clear()
        warnings = trace_step(layer, optimizer, partial(step, keeps), torch.empty(64, 512)).warnings
        assert any("keeps 0.1 MiB more each time" in each for each in warnings) is told


AVERAGED = {"swa": None, "ema": torch.optim.swa_utils.get_ema_multi_avg_fn()}


@pytest.mark.parametrize("kind", ["adafactor", "adafactor, foreach", *AVERAGED])
def test_adafactor_and_averaged_models(kind: str) -> None:
    peaks = []
    for device, answer in (("meta", trace_step), ("cpu", measure_step)):
        layer = nn.Linear(64, 96, device=device)
        averages: list[torch.optim.swa_utils.AveragedModel] = []
        if kind in AVERAGED:
            optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
            averages.append(
                torch.optim.swa_utils.AveragedModel(layer, device, multi_avg_fn=AVERAGED[kind])
            )
        else:
            optimizer = torch.optim.Adafactor(layer.parameters(), foreach=kind.endswith("foreach"))

        def step(batch: torch.Tensor, layer=layer, optimizer=optimizer, averages=averages) -> None:
            layer(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            for average in averages:
                average.update_parameters(layer)

        options = Options(target="cpu", beside=averages, steps=3)
        peaks.append(
            answer(layer, optimizer, step, torch.zeros(32, 64), options).peak_allocated_bytes
        )
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("make", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_gradients_have_an_answer_with_a_warning(make: Any) -> None:
    table = nn.Embedding(1000, 16, sparse=True, device="meta")
    optimizer = make(table.parameters())

    def step(batch: torch.Tensor) -> None:
        table(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    report = trace_step(
        table, optimizer, step, torch.zeros(4, 8, dtype=torch.long), Options(target="cpu")
    )
    assert any("a gradient is sparse" in warning for warning in report.warnings)
    assert report.peak_allocated_bytes > 64_000
