"""What the short form of adapters can say beside rank and layers: traced as it is measured, or refused in words."""

import warnings

import pytest

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.setting import check_described
from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import peft_config
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS

MODEL = {**DECODERS["qwen2"], "hidden_size": 128}
QLORA = {"method": "qlora"}
INT8 = {"method": "qlora", "quantization": {"type": "int8"}}
PACKED = {"loss": "chunked", "packing": "shared_prefix"}
STEPS = {
    "rsLoRA": ({"rslora": True}, {}),
    "ranks by pattern": ({"rank_pattern": {"q_proj": 4, "layers.0.mlp.down_proj": 2}}, {}),
    "alphas by pattern": ({"alpha_pattern": {"q_proj": 4}}, QLORA),
    "DoRA": ({"dora": True, "dropout": 0.1}, {}),
    "DoRA, 4 bits": ({"dora": True}, QLORA),
    "DoRA, checkpointed": ({"dora": True}, {**QLORA, "gradient_checkpointing": True}),
    "PiSSA": ({"initialization": "pissa"}, {}),
    "PiSSA, fast": ({"initialization": "pissa_niter_4"}, {}),
    "OLoRA": ({"initialization": "olora"}, {}),
    "OLoRA, 4 bits": ({"initialization": "olora"}, QLORA),
    "OLoRA, 8 bits": ({"initialization": "olora"}, INT8),
    "MiCA": ({"initialization": "mica"}, {}),
    "orthogonal": ({"initialization": "orthogonal"}, {}),
    "Gaussian": ({"initialization": "gaussian"}, QLORA),
    "whole tables": ({"modules_to_save": ["lm_head", "embed_tokens"]}, QLORA),
    "a whole head, packed": ({"modules_to_save": ["lm_head"]}, {**QLORA, **PACKED}),
}


def scenario(lora, **fields) -> Scenario:
    usual = {
        "method": "lora",
        "precision": "bf16",
        "sequence_length": 64,
        "gradient_checkpointing": False,
    }
    mapping = {"model": MODEL, **usual, **fields, "lora": {"rank": 8, **lora}}
    return Scenario.from_mapping(mapping, where="test.yaml")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.few(6)
@pytest.mark.parametrize(("lora", "fields"), STEPS.values(), ids=STEPS)
def test_a_step_is_traced_to_the_byte(lora, fields):
    asked = scenario(lora, **fields)
    assert Scenario.from_mapping(asked.to_mapping()) == asked
    predicted, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    for field in ("parameters", "resident_bytes", "phases", "components"):
        assert predicted[field] == measured[field], field


def test_what_is_trained_whole_or_by_pattern_is_priced():
    def trained(**lora):
        return trace(scenario(lora), timeline=False)["trainable_parameters"]

    plain, layers = trained(), MODEL["num_hidden_layers"]
    assert plain - trained(rank_pattern={"q_proj": 4}) == layers * 4 * (128 + 128)
    assert trained(modules_to_save=["lm_head"]) - plain == MODEL["vocab_size"] * 128
    assert trained(dora=True) > plain  # a length for each output
    assert trained(initialization="mica") < plain  # one of the factors stays as it started


def test_the_estimate_describes_only_what_it_can_price():
    for lora in (
        {"rslora": True},
        {"alpha_pattern": {"q_proj": 4}},
        {"initialization": "gaussian"},
    ):
        check_described(scenario(lora))
    for lora in (
        {"dora": True},
        {"initialization": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 4}},
    ):
        with pytest.raises(NotDescribed, match=next(iter(lora))):
            check_described(scenario(lora))


def test_peft_is_told_all_of_it():
    config = peft_config(
        scenario(
            {
                "rslora": True,
                "dora": True,
                "initialization": "olora",
                "modules_to_save": ["lm_head"],
                "rank_pattern": {"q_proj": 4},
                "alpha_pattern": {"q_proj": 3},
            }
        )
    )
    assert (config.use_rslora, config.use_dora) == (True, True)
    assert config.init_lora_weights == "olora" and config.modules_to_save == ["lm_head"]
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 4}, {"q_proj": 3})
    assert peft_config(scenario({})).init_lora_weights is True


WRONG = {
    "an unknown start": ({"initialization": "pisa"}, {}, "no `lora.initialization: pisa`", "pissa"),
    "a start that needs data": ({"initialization": "eva"}, {}, "rows of data", "default"),
    "PiSSA on 4 bits": ({"initialization": "pissa"}, QLORA, "floating point alone", "olora"),
    "orthogonal on 4 bits": ({"initialization": "orthogonal"}, QLORA, "floating point", "olora"),
    "an odd rank": ({"initialization": "orthogonal", "rank": 5}, {}, "there is 5", "default"),
    "DoRA on 8 bits": ({"dora": True}, INT8, "`lora.dora` and `quantization.type: int8`", "nf4"),
    "DoRA and MiCA": ({"dora": True, "initialization": "mica"}, {}, "has no both", "default"),
    "a rank that is none": ({"rank_pattern": {"q_proj": 0}}, {}, "no whole number", "q_proj: 8"),
    "a broken pattern": ({"rank_pattern": {"(q_proj": 4}}, {}, "no regular", "q_proj: 8"),
    "a list of numbers": ({"modules_to_save": [1]}, {}, "list of module names", "lm_head"),
}


@pytest.mark.parametrize(("lora", "fields", "says", "write"), WRONG.values(), ids=WRONG)
def test_what_peft_refuses_is_refused_before_anything_is_built(lora, fields, says, write):
    with pytest.raises(UserError) as caught:
        scenario(lora, **fields)
    assert says in str(caught.value) and write in caught.value.write


NOT_THERE = {
    "a pattern without a layer": ({"rank_pattern": {"k_prj": 4}}, "matches no layer", "k_proj: 4"),
    "an alpha without a layer": ({"alpha_pattern": {"nothing": 4}}, "matches no layer", ": 4"),
    "a layer that is not there": ({"rank_pattern": {"layers.9.q_proj": 4}}, "no layer", ": 4"),
    "two for one layer": (
        {"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 2}},
        "which match model.layers.0.self_attn.q_proj",
        "q_proj: 4",
    ),
    "no such module": ({"modules_to_save": ["lm_haed"]}, "no such module", "lm_head"),
}


@pytest.mark.parametrize(("lora", "says", "write"), NOT_THERE.values(), ids=NOT_THERE)
def test_what_the_model_does_not_have_is_refused_by_the_trace(lora, says, write):
    with pytest.raises(UserError) as caught:
        trace(scenario(lora), timeline=False)
    assert says in str(caught.value) and write in caught.value.write


def test_adapters_beyond_factors_are_not_divided():
    with pytest.raises(UserError, match="an adapter with dora can't be combined"):
        scenario({"dora": True}, parallel={"strategy": "fsdp2", "gpus": 2, "tensor": 2})
