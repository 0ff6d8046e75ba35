"""Random questions across thresholds: what a record answers is the trace's, to the byte; the others it leaves alone."""

import random
from typing import Any

import pytest

from dryfit.common.errors import UserError
from dryfit.data import data_path
from dryfit.derived.families import FAMILIES, language_model_of
from dryfit.derived.form import NoRecord, form_of
from dryfit.derived.step import derived_step
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace

RECORDED = sorted(path.stem for path in data_path("records").glob("*.zip"))
CAPABILITIES = (
    (7, 5),
    (8, 0),
    (8, 0),
    (8, 6),
    (8, 9),
    (8, 9),
    (9, 0),
    (9, 0),
    (10, 0),
    (12, 0),
    (12, 1),
)
# What TRL's scripts set, which the command line asks about, beside their loss in chunks.
OF_TRL = {
    "qlora": {
        "autocast": "bf16",
        "precision": "fp32",
        "adapter_precision": "bf16",
        "quantization": {"double": False},
    },
    "lora": {"precision": "bf16-mixed"},
    "full": {"precision": "bf16-mixed"},
}


def drawn_model(family: str, draw: random.Random) -> Any:
    """A model of the catalogue, or one with sizes on both sides of what changes kernels and squeezes dimensions.

    A mixture or a hybrid is always such a one: the catalogue's take minutes to trace.
    """
    own = FAMILIES[family]
    keys, names = own.keys, own.catalogue()
    if draw.random() < 0.7 and "E" not in keys and not own.exact_length:
        return draw.choice(names)
    groups, heads, head = (
        draw.choice([1, 2, 4, 5, 8]),
        draw.choice([1, 2, 3, 7]),
        draw.choice([32, 64, 80, 100, 128, 256, 264]),
    )
    hidden = draw.choice([576, 896, 1000, 1536, 2048, 900])
    mixture = (
        {keys["m"]: draw.choice([512, 768, 1000, 1004]), keys["E"]: draw.choice([16, 60, 128])}
        if "E" in keys
        else {}
    )
    kinds = draw.choice([kinds for pair in own.sequences for kinds in pair])
    return dict(language_model_of(names[0])) | {
        "hidden_size": -(-hidden // (2 * groups * heads)) * 2 * groups * heads,
        "intermediate_size": draw.choice([1536, 4864, 5633]),
        "num_attention_heads": groups * heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "vocab_size": draw.choice([32000, 50257, 151936]),
        **own.layers(kinds if len({*own.sequence}) > 1 else "a" * draw.choice([3, 5, 6, 9])),
        "tie_word_embeddings": draw.random() < 0.4,
        **mixture,
    }


def drawn(number: int) -> tuple[dict[str, Any], tuple[int, int]]:
    """A question and the compute capability of its GPU."""
    draw = random.Random(f"derived {number}")
    method, family = draw.choice(sorted(OF_TRL)), draw.choice(RECORDED)
    chunked = draw.random() < 0.5
    near = draw.choice(
        [257, 258, 259, 512, 513, 514, 770, 771, 1024, 1025, 1026, 2048, 2049, 3072, 3073, 15, 16]
    )
    length = draw.choice(
        [near, 512, 1024, draw.randint(259, 513), draw.randint(771, 1025), draw.randint(16, 4096)]
    )
    fields: dict[str, Any] = {
        "model": drawn_model(family, draw),
        "method": method,
        "sequence_length": length,
    }
    fields["micro_batch"] = draw.choice([1, 1, 1, 1, 1, 1, 1, 1, 2, 8])
    if method != "full":
        fields["lora"] = {"rank": draw.choice([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600])}
    if chunked:
        fields |= {"loss": "chunked", "optimizer": "adamw_fused", **OF_TRL[method]}
    elif draw.random() < 0.2:
        fields |= draw.choice(
            [
                {"optimizer": "adamw_8bit"},
                {"gradient_checkpointing": False},
                {"gradient_accumulation": 2},
                {"attention_mask": "padding"},
                {"autocast": "bf16"},
                {"attention": "eager"},
            ]
        )
    if draw.random() < 0.2:
        fields["allocator"] = {"expandable_segments": True}
    return fields, draw.choice(CAPABILITIES)


def checked(fields: dict[str, Any], capability: tuple[int, int]) -> bool:
    """Whether a record answered; then it has to say what the trace says."""
    try:
        scenario = Scenario.from_mapping(fields, {})
    except UserError:
        return False
    try:
        derived = derived_step(scenario, capability)
    except NoRecord:
        return False
    traced = trace(scenario, capability=capability, timeline=False)
    own = derived.to_mapping() | derived.capacities.to_mapping()
    names = (
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "required_bytes",
        "also_fits_bytes",
        "resident_bytes",
    )
    for name in (*names, "components", "phases"):
        assert own[name] == traced[name], name
    return True


@pytest.mark.few(4, 40)
@pytest.mark.parametrize("number", range(300))
def test_an_answer_is_the_traces_or_there_is_none(number) -> None:
    checked(*drawn(number))


@pytest.mark.few(1, 1)
@pytest.mark.parametrize("method", sorted(OF_TRL))
@pytest.mark.parametrize("family", RECORDED)
def test_a_small_model_of_each_family_is_answered_as_it_is_traced(family, method) -> None:
    own = FAMILIES[family]
    keys, model = own.keys, dict(language_model_of(own.catalogue()[0]))
    sizes = {keys["m"]: 712, keys["E"]: 24} if "E" in keys else {"intermediate_size": 1500}
    model |= {
        "hidden_size": 2 * own.multiples.get("d", 32) * model["num_attention_heads"],
        "vocab_size": 130001 if family == "smollm3" else 50257,  # whose class pads with 128004
        **sizes,
        **own.layers(own.sequence),
    }
    fields = {
        "model": model,
        "method": method,
        "sequence_length": 512,
        "micro_batch": 1,
        "optimizer": "adamw_fused",
    }
    assert checked({**fields, "loss": "chunked", **OF_TRL[method]}, (8, 9))


def test_most_questions_inside_of_what_was_recorded_are_answered() -> None:
    inside = 0
    for number in range(300):
        try:
            scenario = Scenario.from_mapping(drawn(number)[0], {})
            form_of(scenario, (8, 0))
            inside += 1
        except (NoRecord, UserError):
            continue
    assert inside >= 60  # or the questions above show nothing
