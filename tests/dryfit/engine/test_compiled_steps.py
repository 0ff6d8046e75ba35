"""Compiled steps, followed on ``meta``, against Inductor's C++ backend that really runs; what nobody compiled is told.

On a GPU no test here can measure: that Inductor's wrapper is followed there too is tried where Triton is installed,
`make test-kernels`.
"""

from __future__ import annotations

import shutil
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional

from dryfit.engine.card import H100
from dryfit.engine.errors import CompiledError, TraceError
from dryfit.engine.fake_group import fake_group
from dryfit.engine.patching import on_meta
from dryfit.engine.simulation import simulated
from dryfit.engine.trace import Options, trace_step
from tests.dryfit.engine.compiled_steps import followed, measured, peak, without_scratch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")


class Perceptron(nn.Module):
    """Two layers with both norms and dropout between them."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(64, 256), nn.LayerNorm(256), nn.Dropout(0.1)
        self.scale, self.second, self.breaks = nn.RMSNorm(256), nn.Linear(256, 64), breaks

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.dropout(functional.gelu(self.norm(self.first(inputs))))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.second(self.scale(features))


def perceptron(
    autocast: bool = False, compiled_optimizer: bool = False, breaks: bool = False, rows: int = 320
):
    model, batch = Perceptron(breaks), torch.zeros(rows, 64)
    optimizer = (
        torch.optim.AdamW(model.parameters())
        if compiled_optimizer
        else torch.optim.SGD(model.parameters())
    )
    update = torch.compile(optimizer.step) if compiled_optimizer else optimizer.step
    model.compile()

    def step(inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(inputs).float().square().mean()
        loss.backward()
        update()
        optimizer.zero_grad()

    return model, optimizer, step, batch


def divided(device: str):
    """Two layers of a group of two processes, each compiled, with PyTorch's tensor and sequence parallel plan."""
    from torch.distributed import init_device_mesh
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.tensor import Replicate, Shard, parallel

    mesh = init_device_mesh(device, (2,), mesh_dim_names=("tensor",))
    with torch.device(device):
        model, batch = nn.Sequential(*(Perceptron() for _ in range(2))), torch.zeros(4, 80, 64)
    for index, layer in enumerate(model):
        whole = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
        plan = {
            "": parallel.PrepareModuleInput(**whole),
            "first": parallel.ColwiseParallel(output_layouts=Shard(1)),
        }
        plan |= {"norm": parallel.SequenceParallel(), "scale": parallel.SequenceParallel()}
        plan |= {
            "second": parallel.RowwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1))
        }
        parallel.parallelize_module(layer, mesh, plan)
        model[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
        model[index].compile(dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), foreach=False)

    def step(inputs):
        model(inputs[:, :40]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step, batch


def decoder(family: str, how: str, checkpointing: bool):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "vocab_size": 1000,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads))
    batch = torch.zeros(2, 128, dtype=torch.long)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for part in [model] if how == "model" else model.model.layers:
        part.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(ids):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step, batch


@pytest.mark.few(0, 2)
@pytest.mark.parametrize(
    ("build", "graphs"),
    [
        pytest.param(perceptron, 2, id="perceptron"),
        pytest.param(partial(perceptron, autocast=True), 2, id="autocast"),
        pytest.param(partial(perceptron, compiled_optimizer=True), 3, id="compiled AdamW"),
        # Minutes of g++ each:
        pytest.param(partial(decoder, "qwen2", "model", False), 2, id="qwen2", marks=with_triton),
        pytest.param(
            partial(decoder, "qwen2", "layers", False), 2, id="qwen2, layers", marks=with_triton
        ),
        pytest.param(
            partial(decoder, "llama", "layers", True),
            2,
            id="llama, layers, ckpt",
            marks=with_triton,
        ),
        pytest.param(
            partial(decoder, "qwen2", "model", True), 2, id="qwen2, ckpt", marks=with_triton
        ),
    ],
)
def test_what_is_followed_is_what_runs(build, graphs):
    events, report = followed(build)
    real = measured(build)
    assert without_scratch(events) == without_scratch(real), (
        "each allocation and each end, in order"
    )
    assert peak(without_scratch(events)) == peak(without_scratch(real))
    assert report.compiled["graphs"] == graphs and not report.compiled["skipped_frames"]


@pytest.mark.thorough
def test_phases_of_a_compiled_step_are_heard():
    """A compiled optimizer's step is no forward pass, though its hooks are not for Dynamo to see."""
    with on_meta("cpu"):
        model, optimizer, step, batch = perceptron(compiled_optimizer=True)
    report = trace_step(model, optimizer, step, batch, Options(target="cpu", compiled="follow"))
    assert list(report.phases) == ["load", "forward", "backward", "optimizer"]
    assert report.components_by_phase["optimizer"]["optimizer_states"] > 2 * 4 * sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert report.components_by_phase["backward"]["gradients"] > 0


@pytest.mark.thorough
def test_a_graph_break_is_told_with_its_line():
    with on_meta("cpu"):
        model, optimizer, step, batch = perceptron(breaks=True)
    report = trace_step(model, optimizer, step, batch, Options(target="cpu", compiled="follow"))
    assert report.compiled["graphs"] == 4 and sum(report.compiled["breaks"].values()) == 1
    (told,) = report.warnings
    assert "a graph break" in told and "test_compiled_steps.py" in told and "in forward" in told


@pytest.mark.thorough
def test_a_frame_that_dynamo_skips_is_told():
    """A break in a loop can't be resumed: the whole frame runs without the compiler."""

    class Looping(Perceptron):
        def forward(self, inputs):
            with torch.no_grad():
                for _ in range(2):
                    with torch.autograd.graph.saved_tensors_hooks(
                        lambda each: each, lambda each: each
                    ):
                        torch._dynamo.graph_break()
            return super().forward(inputs)

    with on_meta("cpu"):
        model, batch = Looping(), torch.zeros(320, 64)
        model.compile()
    report = trace_step(
        model,
        None,
        lambda inputs: model(inputs).sum().backward(),
        batch,
        Options(target="cpu", compiled="follow"),
    )
    assert any("ran without the compiler" in text and "forward" in text for text in report.warnings)
    assert sum(report.compiled["skipped_frames"].values()) >= 1


def test_a_step_in_which_nothing_is_compiled_says_so():
    with on_meta("cpu"):
        model, batch = nn.Linear(8, 8), torch.zeros(2, 8)
    report = trace_step(
        model,
        None,
        lambda inputs: model(inputs).sum().backward(),
        batch,
        Options(target="cpu", compiled="follow"),
    )
    assert "nothing was compiled" in report.warnings[0] and report.compiled["graphs"] == 0


def test_a_compiled_kernel_costs_what_it_reads_and_writes():
    """Three operations in one kernel read one tensor and write one; without the compiler each does."""
    costs = {}
    for compiled in ("eager", "follow"):
        with on_meta("cpu"):
            scale, batch = nn.Linear(1, 1, bias=False), torch.zeros(1024, 1024)
        add = torch.compile(lambda inputs: (inputs + inputs) * inputs + 1)
        options = Options(target="cpu", compiled=compiled, costs=True)
        found = trace_step(scale, None, lambda inputs, add=add: add(inputs), batch, options).costs
        costs[compiled] = [found.operators[index] for index in found.calls]
    (fused,) = [one for one in costs["follow"] if one.name.startswith("inductor::")]
    assert fused.bytes == 2 * batch.nbytes
    assert sum(one.bytes for one in costs["eager"]) > 3 * fused.bytes


def sums(costs) -> dict[str, dict[str, int]]:
    """Of all phases, by kind: ``flops`` and ``bytes``."""
    found: dict[str, dict[str, int]] = {}
    for index in costs.calls:
        operator = costs.operators[index]
        kind = found.setdefault(operator.kind, {"flops": 0, "bytes": 0})
        kind["flops"] += operator.flops
        kind["bytes"] += operator.bytes
    return found


@with_triton
def test_a_compiled_decoder_computes_what_the_eager_one_does_and_moves_less():
    found = {}
    with simulated(H100):
        for policy in ("eager", "follow"):
            with on_meta():
                model, optimizer, step, batch = decoder("qwen2", "layers", False)
            found[policy] = trace_step(
                model, optimizer, step, batch, Options(compiled=policy, costs=True)
            ).costs
    eager, compiled = (sums(each) for each in found.values())
    assert compiled["products"]["flops"] == eager["products"]["flops"]
    assert compiled["memory"]["bytes"] < 0.8 * eager["memory"]["bytes"]


class Causal(nn.Module):
    """Causal attention of 16-bit heads."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(256, 768, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        heads = self.project(inputs).view(1, 1024, 3, 4, 64).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(*heads, is_causal=True).square().mean()


@with_triton
def test_compiled_attention_leaves_out_what_lies_above_the_diagonal():
    found = []
    with simulated(H100):
        for policy in ("eager", "follow"):
            with on_meta():
                model, batch = (
                    Causal().to(torch.bfloat16),
                    torch.empty(1, 1024, 256, dtype=torch.bfloat16),
                )
                model.compile()
            options = Options(compiled=policy, costs=True)
            costs = trace_step(
                model, None, lambda inputs, of=model: of(inputs).backward(), batch, options
            ).costs
            found.append(
                [(one.dtype, one.flops) for one in costs.operators if one.kind == "attention"]
            )
    assert (
        found[0]
        == found[1]
        == [("bfloat16", 2 * 4 * 1024 * 1024 * 64), ("bfloat16", 5 * 4 * 1024 * 1024 * 64)]
    )


@with_triton
def test_a_product_that_writes_where_it_is_told_counts_that_once():
    with simulated(H100):
        with on_meta():
            model, batch = nn.Linear(512, 256, bias=False), torch.empty(1024, 512)
        compiled = torch.compile(lambda inputs: model(inputs).sum())
        options = Options(compiled="follow", costs=True)
        costs = trace_step(model, None, lambda inputs: compiled(inputs), batch, options).costs
    (product,) = [one for one in costs.operators if one.kind == "products"]
    assert product.bytes == 4 * (1024 * 512 + 512 * 256 + 1024 * 256)


@with_triton
def test_what_a_kernel_of_inductors_picks_is_all_that_it_reads():
    """A large table of which some rows are taken costs these rows."""
    with simulated(H100):
        with on_meta():
            table, batch = nn.Embedding(100_000, 64), torch.empty(32, dtype=torch.long)
        compiled = torch.compile(lambda words: table(words) * 2 + 1)
        options = Options(compiled="follow", costs=True)
        costs = trace_step(table, None, lambda words: compiled(words), batch, options).costs
    (kernel,) = [costs.operators[index] for index in costs.calls]
    assert kernel.bytes < 10 * 32 * 64 * 4 < table.weight.nbytes


@with_triton
def test_who_wins_the_benchmarks_of_max_autotune_is_told():
    """Inductor's own products take the activation in; cuBLAS hands it over in memory."""
    peaks = {}
    for templates in (None, False, True):
        with simulated(H100, templates=bool(templates)) as simulation:
            with on_meta():
                layers = [
                    nn.Linear(4096, 4096),
                    nn.GELU(),
                    nn.Linear(4096, 4096),
                    nn.ReLU(),
                    nn.Linear(4096, 1024),
                ]
                model = nn.Sequential(*layers).to(torch.bfloat16)
            run = torch.compile(
                model, mode=None if templates is None else "max-autotune-no-cudagraphs"
            )
            batch = torch.empty(8192, 4096, dtype=torch.bfloat16)

            def step(inputs, run=run):
                run(inputs).sum().backward()
                run.zero_grad()

            peaks[templates] = trace_step(
                model, None, step, batch, Options(compiled="follow")
            ).peak_allocated_bytes
        winners = [name for _, name in simulation.chosen.values()]
        assert bool(winners) == (templates is not None)
        assert all(name.startswith("triton") == templates for name in winners)
    assert peaks[None] == peaks[False] > peaks[True]


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_what_decides_on_the_gpu_is_refused_by_name(mode):
    with on_meta("cpu"):
        model, batch = Perceptron(), torch.zeros(320, 64)
    compiled = torch.compile(model, mode=mode)
    with pytest.raises(CompiledError, match=r"CUDA graphs|max-autotune") as caught:
        trace_step(
            model,
            None,
            lambda inputs: compiled(inputs).sum().backward(),
            batch,
            Options(target="cpu", compiled="follow"),
        )
    assert "mode='default'" in str(caught.value) and "test_compiled_steps.py" in caught.value.line


def test_for_a_gpu_a_card_has_to_be_simulated():
    with on_meta():
        model, _, step, batch = perceptron()
    with pytest.raises(TraceError, match=r"with simulated\(card\)"):
        trace_step(model, None, step, batch, Options(compiled="follow"))


@with_triton
def test_a_gradient_beside_what_is_compiled_is_written_in_place_as_ever():
    """Autograd writes the gradient of `gather` into zeros: 8 MiB that would count twice."""
    with torch.device("meta"):
        head, states, words = (
            nn.Linear(256, 4096, bias=False),
            torch.empty(512, 256),
            torch.empty(512, 1).long(),
        )

    def step() -> None:
        head(states).gather(1, words).sum().backward()

    eager, beside = (
        trace_step(head, None, step, options=Options(capability=(9, 0), compiled=how))
        for how in ("refuse", "eager")
    )
    with simulated(H100):
        following = trace_step(head, None, step, options=Options(compiled="follow"))
    assert (
        following.peak_allocated_bytes == eager.peak_allocated_bytes == beside.peak_allocated_bytes
    )


@pytest.mark.thorough
def test_an_eager_step_is_as_before_once_a_compiled_one_was_followed():
    def eager():
        with on_meta("cpu"):
            model, batch = Perceptron(), torch.zeros(320, 64)
        return trace_step(
            model, None, lambda inputs: model(inputs).sum().backward(), batch, Options(target="cpu")
        )

    before = eager()
    followed(perceptron)
    assert eager() == before


# --- for a GPU ----------------------------------------------------------------------------------------------------


@with_triton
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_step_is_followed_for_a_gpu(autocast):
    """Fusion leaves what is between the two products out; what the backward pass needs is kept in 16 bits at most."""

    def traced(policy: str):
        with on_meta():
            model, optimizer, step, batch = perceptron(autocast=autocast, rows=32_000)
        return trace_step(model, optimizer, step, batch, Options(compiled=policy))

    with simulated(H100):
        report, eager = traced("follow"), traced("eager")
    assert (
        report.compiled == {"graphs": 2, "breaks": {}, "skipped_frames": {}}
        and report.warnings == ()
    )
    assert list(report.phases) == ["load", "forward", "backward", "optimizer"]
    assert report.phases["forward"] < 0.8 * eager.phases["forward"]
    assert report.phases["optimizer"] == eager.phases["optimizer"], "which is not compiled"
    assert torch._C._get_accelerator().type == "cpu" and not torch.cuda.is_available()


@pytest.mark.few(0, 1)
@with_triton
@pytest.mark.parametrize("how", ["model", "layers"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_is_followed_for_a_gpu(how, checkpointing):
    with simulated(H100):
        with on_meta():
            model, optimizer, step, batch = decoder("qwen2", how, checkpointing)
        report = trace_step(model, optimizer, step, batch, Options(compiled="follow"))
    assert (
        report.compiled == {"graphs": 2, "breaks": {}, "skipped_frames": {}}
        and report.warnings == ()
    )


class Flex(nn.Module):
    """FlexAttention over 4,096 tokens, whose scores would take 32 MiB a head."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(256, 768, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        heads = self.project(inputs).view(1, 4096, 3, 4, 64).permute(2, 0, 3, 1, 4)
        return flex_attention(*heads).square().mean()


@pytest.mark.few(0, 1)
@with_triton
@pytest.mark.parametrize(("attended", "keys"), [(None, 2048), (256, 256), (100_000, 4096)])
def test_flex_attentions_work_is_that_of_the_keys_that_a_query_sees(attended, keys):
    with simulated(H100, attended_keys=attended):
        with on_meta():
            model, batch = (
                Flex().to(torch.bfloat16),
                torch.empty(1, 4096, 256, dtype=torch.bfloat16),
            )
            model.compile()
        options = Options(compiled="follow", costs=True)
        costs = trace_step(
            model, None, lambda inputs: model(inputs).backward(), batch, options
        ).costs
    forward, backward = (one for one in costs.operators if one.kind == "attention")
    assert (forward.dtype, forward.flops) == ("bfloat16", 4 * 4 * 4096 * 64 * keys)
    assert backward.flops == 2.5 * forward.flops


@with_triton
def test_flex_attention_is_followed_without_its_scores():
    with simulated(H100):
        with on_meta():
            model, batch = (
                Flex().to(torch.bfloat16),
                torch.empty(1, 4096, 256, dtype=torch.bfloat16),
            )
            model.compile()
        report = trace_step(
            model, None, lambda inputs: model(inputs).backward(), batch, Options(compiled="follow")
        )
    assert report.compiled["graphs"] == 2 and report.warnings == ()
    scores = 4 * 4096 * 4096 * 2
    assert report.peak_allocated_bytes - report.components["workspaces"] < scores


class Scaled(nn.Module):
    """A number that is made on the device, and multiplies."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.features, self.how = nn.Linear(64, 64), how

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        number = (
            torch.tensor(3.0, device=inputs.device)
            if self.how == "tensor"
            else inputs.new_tensor(3.0)
        )
        return (self.features(inputs) * number).sum()


@with_triton
@pytest.mark.parametrize("how", ["tensor", "new_tensor"])
def test_constants_that_the_compiler_works_out_on_the_device_are_worked_out_here(how):
    with simulated(H100):
        with on_meta():
            model, batch = Scaled(how), torch.empty(32, 64)
            model.compile()
        report = trace_step(
            model, None, lambda inputs: model(inputs).backward(), batch, Options(compiled="follow")
        )
    assert report.compiled == {"graphs": 2, "breaks": {}, "skipped_frames": {}}


@torch.library.custom_op("steptest::scaled", mutates_args=())
def scaled(inputs: torch.Tensor, factor: float) -> torch.Tensor:
    @torch.compile
    def own(inputs):
        return inputs * inputs.new_tensor(1 / factor)

    return own(inputs)


@scaled.register_fake
def _(inputs, factor):
    return torch.empty_like(inputs)


scaled.register_autograd(lambda ctx, grad: (grad, None))


class Outer(nn.Module):
    """A custom operator whose code is compiled itself."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(64, 64)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return scaled(self.features(inputs), 3.0).sum()


@with_triton
def test_a_custom_operators_compiled_code_is_followed_too():
    with simulated(H100):
        with on_meta():
            model, batch = Outer(), torch.empty(32, 64)
        report = trace_step(
            model, None, lambda inputs: model(inputs).backward(), batch, Options(compiled="follow")
        )
    assert (
        report.compiled == {"graphs": 1, "breaks": {}, "skipped_frames": {}}
        and report.warnings == ()
    )


@with_triton
def test_a_custom_operator_in_a_compiled_graph_runs_its_own_code():
    from tests.dryfit.engine.test_card import Scratch

    with simulated(H100):
        with on_meta():
            model, batch = Scratch(), torch.empty(64, 64)
            model.compile()
        report = trace_step(
            model, None, lambda inputs: model(inputs).backward(), batch, Options(compiled="follow")
        )
    assert report.compiled["graphs"] == 2 and report.warnings == ()
    assert report.phases["forward"] > 64 * 64 * 256 * 4


@with_triton
def test_ddps_buckets_split_the_graph_and_nothing_is_told():
    with simulated(H100), fake_group(2):
        with on_meta():
            model, batch = (
                nn.Sequential(*(nn.Linear(512, 512) for _ in range(6))),
                torch.empty(32, 512),
            )

        def begin():
            wrapped = nn.parallel.DistributedDataParallel(torch.compile(model), bucket_cap_mb=2)
            return lambda inputs: wrapped(inputs).sum().backward()

        report = trace_step(model, None, None, batch, Options(compiled="follow", begin=begin))
    assert report.compiled["graphs"] > 2 and report.warnings == ()


class WithFlashAttention3(nn.Module):
    """Attention by a package that isn't installed, and a size that depends on the card's processors."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(256, 3 * 256, dtype=torch.bfloat16)

    def forward(self, inputs: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        from flash_attn_interface import flash_attn_varlen_func

        rows = torch.cuda.get_device_properties("cuda").multi_processor_count
        query, key, value = self.projection(inputs).view(-1, 3 * 2, 128).chunk(3, dim=1)
        output = flash_attn_varlen_func(
            query, key, value, starts, starts, 512, 512, causal=True, window_size=(64, 0)
        )
        return output.float().sum() + inputs.new_ones(rows).sum()


@with_triton
def test_a_stand_in_in_python_is_compiled_as_its_package_would_be():
    with simulated(H100):
        import flash_attn_interface  # noqa: F401

        with on_meta():
            model, batch = (
                WithFlashAttention3(),
                (torch.empty(512, 256, dtype=torch.bfloat16), torch.empty(3).int()),
            )
            model.compile(fullgraph=True)
        report = trace_step(
            model, None, lambda given: model(*given).backward(), batch, Options(compiled="follow")
        )
    assert report.compiled == {"graphs": 2, "breaks": {}, "skipped_frames": {}}
    (said,) = report.warnings
    assert "FlashAttention-3" in said


@pytest.mark.nightly
def test_a_layer_divided_on_a_mesh_allocates_what_it_does_when_it_runs():
    """Compiled DTensors: in a group of one real process and one that is not there, and in the simulated group."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with fake_group(2):
        traced, report = followed(partial(divided, "meta"))
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        ran = measured(partial(divided, "cpu"))
    finally:
        distributed.destroy_process_group()
    assert report.compiled["graphs"] == 4 and not report.compiled["breaks"]
    assert without_scratch(traced) == without_scratch(ran)
