"""The card that is simulated is the scenario's, and a compiled step is followed on it."""

from importlib.util import find_spec

import pytest

from dryfit.cards.gpus import catalogue, find, known
from dryfit.common.errors import UserError
from dryfit.hours.step_time import speed_of
from dryfit.scenario.model import LIGER_MODELS
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.measure import measure
from dryfit.tracing.simulated_card import _asked_card, card_of
from dryfit.tracing.trace import record, trace
from tests.dryfit.decoders import DECODERS
from tests.dryfit.tracing.several_gpus import LLAMA


def test_a_card_has_what_the_catalogue_says():
    card = card_of(find("rtx-4090"))
    assert (card.name, card.capability, card.multiprocessors) == (
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        128,
    )
    assert card.memory_bytes == find("rtx-4090").total_bytes and card.l2_bytes == 75_497_472
    assert card.shared_memory_bytes == 99 * 1024
    assert card_of().capability == (8, 0)
    for name, gpu in known().items():
        if gpu.capability is not None:
            assert card_of(gpu).multiprocessors > 0, name
    assert card_of(find("rtx-3070-ti")).multiprocessors == 84, (
        "as the largest card of its capability"
    )


@pytest.mark.parametrize(
    ("named", "capability", "taken"),
    [
        (None, None, "a100-80gb"),
        (None, (8, 9), None),
        ("rtx-4090", (8, 9), "rtx-4090"),
        ("rtx-4090", (9, 0), None),
    ],
)
def test_a_card_that_nobody_names_is_the_largest_of_its_capability(named, capability, taken):
    card = _asked_card(scenario(gpu=named), capability)
    alike = [
        card_of(gpu).multiprocessors
        for gpu in catalogue().values()
        if gpu.capability == card.capability
    ]
    assert card.capability == (capability or (8, 0))
    assert card == card_of(find(taken)) if taken else card.multiprocessors == max(alike)


@pytest.mark.parametrize("gpu", ["mi300x", {"vram_gib": 24}])
def test_a_card_that_is_not_nvidias_is_named(gpu):
    with pytest.raises(UserError, match="no card of NVIDIA's") as caught:
        card_of(find(gpu))
    assert caught.value.write == "gpu: a100-80gb"


def scenario(**fields) -> Scenario:
    common = {
        "model": DECODERS["qwen2"],
        "precision": "bf16",
        "sequence_length": 256,
        "gpu": "rtx-4090",
    }
    return Scenario.from_mapping({**common, "gradient_checkpointing": False, **fields})


@pytest.mark.few(0, 2)
@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("how", ["layers", "model"])
def test_a_compiled_scenario_is_followed(how, method):
    eager, compiled = (
        trace(scenario(compile=way, method=method), capability=(8, 9), timeline=False)
        for way in ("none", how)
    )
    assert compiled["compiled"]["graphs"] >= 2 and "compiled" not in eager
    assert compiled["compiled"]["breaks"] == {} and compiled["warnings"] == eager["warnings"]
    assert compiled["resident_bytes"] == eager["resident_bytes"]
    assert compiled["components"]["activations"] < eager["components"]["activations"]


TITAN = {
    "strategy": "fsdp2",
    "gpus": 4,
    "tensor": 2,
    "sequence_parallel": True,
    "loss_parallel": True,
}


@pytest.mark.few(0, 1)
@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
@pytest.mark.parametrize(
    ("parallel", "method"),
    [
        ({"strategy": "fsdp2", "gpus": 2}, "lora"),
        ({"strategy": "fsdp2", "gpus": 2, "context": 2}, "full"),
        (TITAN, "full"),
    ],
)
def test_layers_on_a_mesh_are_compiled(parallel, method):
    """Whole, though FSDP2's hooks run around them: without a break."""
    step = scenario(model=LLAMA, method=method, parallel=parallel)
    eager, compiled = (
        trace(step.changed(compile=way), timeline=False) for way in ("none", "layers")
    )
    assert compiled["compiled"]["graphs"] >= 2 and compiled["compiled"]["breaks"] == {}
    assert compiled["resident_bytes"] == eager["resident_bytes"]
    assert compiled["components"]["activations"] < eager["components"]["activations"]


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_a_compiled_step_on_windows_has_no_flash_attention():
    """The difference is that of the eager step: the scores of grouped keys, which nothing fuses."""
    peaks = [
        trace(
            scenario(compile=how, method="full", sequence_length=512, platform=platform),
            timeline=False,
        )["peak_allocated_bytes"]
        for how in ("none", "layers")
        for platform in ("linux", "windows")
    ]
    assert peaks[1] > peaks[0] and peaks[3] > peaks[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_a_compiled_step_has_a_time_and_is_faster():
    """A larger model than the other tests': of a tiny one the CPU's launches are all that takes time."""
    wide = DECODERS["qwen2"] | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 2,
    }
    asked = {
        "model": wide,
        "method": "full",
        "gpu": "a100-80gb",
        "sequence_length": 2048,
        "micro_batch": 4,
    }
    times = []
    for step in (scenario(**asked, compile=how) for how in ("none", "layers")):
        speed = speed_of("a100-80gb", step)
        times.append(trace(step, capability=(8, 0), timeline=False, timed_on={"a": speed}))
    eager, compiled = (found["times"]["a"]["seconds_per_step"] for found in times)
    assert 0.4 * eager < compiled < 0.95 * eager
    told = [found["times"]["a"] for found in times]
    assert told[0]["range"] is not None and told[1]["range"] is None, (
        "no compiled step was timed on an A100"
    )
    assert told[1]["basis"].endswith("without the compiler")


@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("model", "reduce-overhead"),
        pytest.param("layers", "max-autotune", marks=pytest.mark.nightly),
    ],
)
def test_a_scenario_with_cuda_graphs_is_followed(how, mode):
    """The pool holds what the compiled layers make; beside it a batch is copied, and workspaces come and go."""
    step = scenario(compile=how, method="lora")
    plain, graphs = (
        trace(step.changed(compile_mode=each), capability=(8, 9), timeline=False)
        for each in ("default", mode)
    )
    assert graphs["compiled"] == plain["compiled"] and graphs["compiled"]["breaks"] == {}
    assert graphs["components"]["weights_fp32"] == plain["components"]["weights_fp32"]
    workspaces = 2 * 8_519_680
    assert abs(graphs["peak_allocated_bytes"] - plain["peak_allocated_bytes"]) < workspaces
    assert graphs["peak_reserved_bytes"] >= graphs["peak_allocated_bytes"]


@pytest.mark.parametrize(
    "more", [{"gradient_accumulation": 2}, {"parallel": {"strategy": "ddp", "gpus": 2}}]
)
def test_cuda_graphs_are_refused_where_pytorch_stops_or_nobody_follows(more):
    with pytest.raises(UserError, match="CUDA graphs"):
        scenario(compile="model", compile_mode="reduce-overhead", **more)


@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_what_a_benchmark_decides_is_a_range():
    found = trace(
        scenario(
            compile="layers",
            compile_mode="max-autotune-no-cudagraphs",
            method="full",
            gpu="h100-80gb",
        ),
        capability=(9, 0),
        timeline=False,
    )
    bounds = found["bounds"]
    assert bounds["lowest_bytes"] < bounds["highest_bytes"] == found["peak_allocated_bytes"]
    assert bounds["missing"] in found["warnings"] and "cuBLAS" in bounds["missing"]


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
def test_a_search_takes_the_way_of_a_benchmark_that_needs_more(monkeypatch):
    step = scenario(
        compile="layers", compile_mode="max-autotune-no-cudagraphs", method="full", gpu="h100-80gb"
    )
    either = [record(step, (9, 0)).peak_bytes()]
    for way in (False, True):
        monkeypatch.setattr("dryfit.tracing.trace.ways", lambda *asked, way=way: (way,))
        either.append(record(step, (9, 0)).peak_bytes())
    assert either[0] == max(either[1:]) > min(either[1:])


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_unsloths_step_is_a_range(method):
    """From norms, MLPs and rotation that keep what its kernels keep to transformers' own."""
    plain, unsloth = (
        trace(scenario(kernels=k, method=method), timeline=False)
        for k in ("transformers", "unsloth")
    )
    assert (
        unsloth["peak_allocated_bytes"] == plain["peak_allocated_bytes"] and "bounds" not in plain
    )
    assert unsloth["bounds"]["highest_bytes"] == plain["peak_allocated_bytes"]
    assert (
        plain["resident_bytes"]
        < unsloth["bounds"]["lowest_bytes"]
        < 0.99 * plain["peak_allocated_bytes"]
    )
    assert any("Unsloth's kernels can't be followed" in text for text in unsloth["warnings"])


def test_what_is_not_known_of_unsloth_and_not_measured():
    step = trace(scenario(kernels="unsloth", model=DECODERS["gemma2"]), timeline=False)
    assert step["bounds"]["lowest_bytes"] == step["resident_bytes"]
    assert "is not known" in step["bounds"]["missing"]
    with pytest.raises(UserError, match="isn't measured here") as caught:
        measure(scenario(compile="layers", method="full"), "cpu")
    assert caught.value.write == "compile: none"


@pytest.mark.thorough
def test_unsloth_leaves_small_inputs_of_layers_on_the_gpu():
    """Those of 2 MiB and less: 256 tokens of this model are smaller."""
    sizes = {}
    for kernels in ("transformers", "unsloth"):
        step = scenario(
            kernels=kernels, gradient_checkpointing="reentrant", activation_offload=True
        )
        sizes[kernels] = trace(step, timeline=False)["components_by_phase"]["forward"][
            "activations"
        ]
    assert sizes["transformers"] < sizes["unsloth"]


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_ligers_kernels_keep_less_than_its_loss_alone(method, checkpointing):
    asked = {"method": method, "loss": "liger", "gradient_checkpointing": checkpointing}
    alone, all_of_it = (
        trace(scenario(**asked, kernels=each), timeline=False) for each in ("transformers", "liger")
    )
    assert all_of_it["peak_allocated_bytes"] < alone["peak_allocated_bytes"]
    (note,) = [text for text in all_of_it["notes"] if text.startswith("Liger's kernels")]
    assert ("itself" in note) == (find_spec("liger_kernel") is not None)


@pytest.mark.few(0, 2)
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="`make test-kernels` runs it")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kernels", ["transformers", "liger"])
def test_ligers_package_and_the_copy_of_it_need_the_same(family, kernels, monkeypatch):
    """The package keeps the shifted labels a little longer, and counts them."""
    own = scenario(
        model=DECODERS[family], method="full", loss="liger", kernels=kernels, sequence_length=512
    )
    package = trace(own, timeline=False)
    monkeypatch.setattr("dryfit.step.liger.find_spec", lambda name: None)
    copied = trace(own, timeline=False)
    assert (
        package["triton_kernels"]["liger_cross_entropy_kernel"] > 0
        and copied.get("triton_kernels") is None
    )
    assert (package["triton_kernels"].get("_rms_norm_backward_kernel", 0) > 0) == (
        kernels == "liger"
    )
    for phase, size in package["phases"].items():
        assert abs(size - copied["phases"][phase]) <= 16 * 1024, phase


@pytest.mark.few(0, 3)
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="`make test-kernels` runs it")
@pytest.mark.parametrize(
    "family", sorted(set(LIGER_MODELS) & set(DECODERS) - {"llama", "qwen2", "qwen3"})
)
def test_every_family_that_liger_knows_goes_through_its_package(family):
    """Also those of which the copy has only the loss; it refuses them by name."""
    own = scenario(model=DECODERS[family], method="full", loss="liger", kernels="liger")
    found = trace(own, timeline=False)
    assert found["triton_kernels"]["liger_cross_entropy_kernel"] > 0
    assert any("rms_norm" in name for name in found["triton_kernels"])
    assert any(text.startswith("Liger's kernels: liger-kernel") for text in found["notes"])


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is installed")
def test_without_triton_a_compiled_scenario_says_what_to_install():
    with pytest.raises(UserError, match="needs the package triton") as caught:
        trace(scenario(compile="layers", method="full"))
    assert caught.value.write == 'pip install "dryfit[run]"'
