"""The model is the same on every device: names, shapes, dtypes, quantization states."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dryfit.common.errors import UserError
from dryfit.engine.model_tensors import quantization_state
from dryfit.readers.request import read_request
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import attention_kernel, build_model, configuration, parameter_count
from dryfit.step.optimizers import build_optimizer
from dryfit.step.quantized import assert_quantized, quantized_layers
from tests.dryfit.decoders import DECODERS, SIZES

ARCHITECTURES = ("qwen2", "llama", "gemma2", "phi3", "gpt2", "mixtral")


def scenario(model_type: str = "qwen2", sizes: dict | None = None, **fields) -> Scenario:
    fields = {"precision": "bf16", "sequence_length": 32, **fields}
    return Scenario.from_mapping(
        {"model": {"model_type": model_type, **sizes} if sizes else DECODERS[model_type], **fields}
    )


def layout(model: torch.nn.Module) -> dict:
    found = {}
    for name, parameter in model.named_parameters():
        state = {key: (tuple(x.shape), x.dtype) for key, x in quantization_state(parameter).items()}
        if hasattr(parameter, "quant_state"):
            packed = parameter.quant_state
            state |= {
                "of": (
                    packed.dtype,
                    tuple(packed.shape),
                    packed.blocksize,
                    packed.quant_type,
                    packed.nested,
                )
            }
        found[name] = (
            tuple(parameter.shape),
            parameter.dtype,
            parameter.requires_grad,
            type(parameter),
            state,
        )
    return found | {name: (tuple(x.shape), x.dtype) for name, x in model.named_buffers()}


def storage_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        tensors += quantization_state(parameter).values()
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with weights as transformers saves them, one for each architecture, made when asked for."""
    made = {}

    def folder(model_type: str):
        if model_type not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                configuration(scenario(model_type)), dtype=torch.bfloat16
            )
            made[model_type] = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(made[model_type])
        return made[model_type]

    return folder


@pytest.mark.few(5)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_meta_random_and_loaded_models_are_alike(model_type, method, folders):
    asked = scenario(model_type, method=method)
    meta = build_model(asked, "meta")
    random = build_model(asked, "cpu")
    loaded = build_model(asked, "cpu", weights=folders(model_type))
    assert layout(meta) == layout(random) == layout(loaded)
    assert storage_bytes(meta) == storage_bytes(random) == storage_bytes(loaded)
    assert meta.training and random.training and loaded.training


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "fields",
    [
        {"quantization": {"type": "nf4", "double": False}},
        {"quantization": {"type": "fp4", "double": True}},
        {"quantization": {"type": "int8"}},
        {"quantization": {"type": "int8"}, "kbit_preparation": "peft", "precision": "fp32"},
        {"kbit_preparation": "peft"},
        {"precision": "fp16", "adapter_precision": "fp16"},
        {"precision": "fp32", "adapter_precision": "bf16"},
        {"gradient_checkpointing": False},
    ],
    ids=str,
)
def test_every_setting_gives_one_structure(fields, folders):
    asked = scenario(method="qlora", **fields)
    assert layout(build_model(asked, "meta")) == layout(
        build_model(asked, "cpu", weights=folders("qwen2"))
    )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_random_models_have_the_buffers_of_a_new_model(model_type):
    asked = scenario(model_type, method="full", precision="fp32")
    own = dict(build_model(asked, "cpu").named_buffers())
    for name, expected in AutoModelForCausalLM.from_config(configuration(asked)).named_buffers():
        assert torch.equal(own[name], expected), name


def test_weights_are_those_of_the_folder_and_the_head_stays_dense(folders):
    model = build_model(scenario(method="full"), "cpu", weights=folders("qwen2"))
    expected = AutoModelForCausalLM.from_pretrained(
        folders("qwen2"), dtype=torch.bfloat16
    ).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    model = build_model(scenario(method="qlora"), "cpu", weights=folders("qwen2"))
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert len(quantized_layers(model)) == 14


def test_seed_and_folder_decide_weights_and_adapters(folders):
    def weights(seed):
        return torch.cat(
            [p.flatten().float() for p in build_model(scenario(), "cpu", seed=seed).parameters()]
        )

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))

    def adapter(seed):
        model = build_model(scenario(), "cpu", weights=folders("qwen2"), seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(adapter(1), adapter(1))
    assert not torch.equal(adapter(1), adapter(2))


def test_layers_of_llm_int8_are_counted_and_missed_where_they_are_not():
    asked = scenario("gpt2", method="qlora", quantization={"type": "int8"})
    model, other = build_model(asked, "meta"), build_model(scenario("gpt2", method="qlora"), "meta")
    counts = assert_quantized(model, asked)
    assert (
        counts["linear_8bit_parameters"]
        == sum(p.numel() for p in model.parameters() if p.dtype == torch.int8)
        > 0
    )
    assert parameter_count(model) == parameter_count(other)
    with pytest.raises(UserError, match="not 8-bit"):
        assert_quantized(other, asked)


@pytest.mark.thorough
def test_parameters_of_the_7b_model(tmp_path):
    """7,615,616,512 parameters, 6,525,288,448 of them in linear layers (the published configuration)."""
    file = tmp_path / "scenario.yaml"
    file.write_text("model: qwen2.5-coder-7b\n")
    asked = read_request(file).scenario
    model = build_model(asked, "meta")
    assert parameter_count(model) == 7_615_616_512
    counts = assert_quantized(model, asked)
    assert counts == {
        "linear_4bit_layers": 28 * 7,
        "linear_4bit_parameters": 6_525_288_448,
        "linear_dense_layers": 1,
    }


@pytest.mark.few(4)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_parameter_count_is_that_of_the_built_model(model_type, method):
    asked = scenario(model_type, method=method)
    dense = AutoModelForCausalLM.from_config(configuration(asked))
    assert parameter_count(build_model(asked, "meta")) == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize(
    "head", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_the_output_head_may_be_trained_beside_a_quantized_base(head):
    adapter = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **head}
    asked = scenario(method="qlora", lora=None, adapter=adapter)
    model = build_model(asked, "cpu")
    assert assert_quantized(model, asked)["linear_dense_layers"] == 1
    assert any(
        "lm_head" in name for name, parameter in model.named_parameters() if parameter.requires_grad
    )


def test_layers_that_are_not_quantized_are_found():
    asked = scenario(method="qlora", kbit_preparation="none")
    model = build_model(asked, "cpu")
    layer = model.get_submodule("base_model.model.model.layers.1.mlp")
    layer.down_proj = torch.nn.Linear(96, 64)
    with pytest.raises(UserError, match="not 4-bit") as error:
        assert_quantized(model, asked)
    assert "layers.1.mlp.down_proj" in str(error.value)
    dense = build_model(scenario(method="lora"), "cpu")
    with pytest.raises(UserError, match="not 4-bit"):
        assert_quantized(dense, scenario(method="qlora"))


@pytest.mark.parametrize(("kbit", "dtype"), [("none", torch.bfloat16), ("peft", torch.float32)])
def test_peft_preparation_casts_what_is_not_quantized(kbit, dtype):
    model = build_model(scenario(method="qlora", kbit_preparation=kbit), "meta")
    others = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if "lora_" not in name and not quantization_state(parameter)
    }
    assert set(others.values()) == {dtype}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_only_adapters_are_trained_and_in_their_precision(precision, dtype):
    model = build_model(scenario(method="lora", adapter_precision=precision), "meta")
    trained = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert all("lora_" in name for name in trained)
    assert set(trained.values()) == {dtype}


def test_attention_is_one_that_the_architecture_can_run():
    assert attention_kernel(scenario("gemma2", attention="sdpa")) == "eager"
    assert attention_kernel(scenario("qwen2", attention="sdpa")) == "sdpa"
    with pytest.raises(UserError, match="attention: eager"):
        attention_kernel(scenario("gemma2", attention="mem_efficient"))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({**SIZES, "model_type": "qwen22"}, ["no such architecture", "qwen22"]),
        ({**SIZES, "hidden_act": "sillu"}, ["can't build a model", "unknown key 'sillu'"]),
    ],
)
def test_configurations_that_cannot_be_built(sizes, words):
    asked = Scenario.from_mapping(
        {"model": {"model_type": "qwen2", **sizes}, "sequence_length": 32}
    )
    with pytest.raises(UserError) as error:
        build_model(asked, "meta")
    assert all(word in str(error.value) for word in words)


def test_what_no_model_can_be_built_of(tmp_path):
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["no_such_proj"]}
    with pytest.raises(UserError) as error:
        build_model(scenario(lora=lora), "meta")
    assert "no_such_proj" in str(error.value) and "q_proj" in str(error.value)
    with pytest.raises(UserError, match="no model"):
        build_model(scenario(), "cpu", weights=tmp_path)
    asked = scenario(optimizer="paged_adamw_8bit")
    with pytest.raises(UserError, match="optimizer: adamw_8bit"):
        build_optimizer(build_model(asked, "cpu"), asked, learning_rate=1e-3)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "optimizer", [name for name, one in OPTIMIZERS.items() if one.package is None]
)
def test_optimizers_on_meta_hold_only_trained_parameters(optimizer):
    asked = scenario(optimizer=optimizer)
    model = build_model(asked, "meta")
    own = build_optimizer(model, asked, learning_rate=1e-3)
    held = [parameter for group in own.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
