"""The merged folder holds what PEFT's own merge holds, to the last bit, and computes what base plus adapter compute."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts.merging.merge import merge
from tests.unit.merging.models import (
    distance,
    load_weights,
    logits,
    make_adapter,
    make_base,
    with_adapter,
)

CASES = {
    "lora": ("qwen2", {}),
    "rslora with patterns": (
        "qwen2",
        {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
        },
    ),
    "dora": ("llama-tied", {"use_dora": True}),
    "fused layers": ("phi3", {}),
    "mixture of experts": ("mixtral", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "transposed layers": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "transposed square layer alone": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "transposed layers, dora": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True},
    ),
    "transposed and not, so that the flag is wrong": (
        "gpt2",
        {"target_modules": ["attn.c_proj", "lm_head"]},
    ),
    "bias all": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "modules_to_save": (
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "modules_to_save, tied head": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "modules_to_save, tied embedding": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding, dora": ("qwen2", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "another plain start": ("qwen2", {"init_lora_weights": "orthogonal"}),
    "mica": ("qwen2", {"init_lora_weights": "mica"}),
    "all layers but one": (
        "qwen2",
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "some layers": ("qwen2", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
}
# Where PEFT's merge adds one layer's difference to both ends of tied weights, so that it is not base plus adapter.
PEFT_IS_WRONG = {"transposed and not, so that the flag is wrong"}
# PEFT rounds the difference itself to the base's dtype before adding it to an embedding, and of MiCA always; here it is
# rounded once.
ROUNDED_TWICE = {"embedding", "mica"}


@pytest.mark.few(5, 12)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_peft_to_the_last_bit(tmp_path, case, dtype):
    kind, settings = CASES[case]
    base = make_base(tmp_path / "base", kind, dtype)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)

    manifest = merge(base, adapter, tmp_path / "merged", threads=1)

    peft = with_adapter(base, adapter)
    expected = logits(peft)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert merged.dtype == getattr(torch, dtype)
    assert distance(logits(merged), expected) <= (1e-5 if dtype == "float32" else 5e-2)
    assert 0 < manifest["tensors"]["changed"] < manifest["tensors"]["total"]

    if case in PEFT_IS_WRONG:
        return
    theirs = dict(peft.merge_and_unload().named_parameters(remove_duplicate=False))
    ours = dict(merged.named_parameters(remove_duplicate=False))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if case in ROUNDED_TWICE and dtype == "bfloat16":
            torch.testing.assert_close(tensor, theirs[name], rtol=2**-7, atol=2**-9)
        else:
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_one_end_of_tied_weights_unties_them(tmp_path, target):
    """PEFT's merge changes both ends here; the model with the adapter has only the one changed."""
    base = make_base(tmp_path / "base", "llama-tied")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", target])
    manifest = merge(base, adapter, tmp_path / "merged")
    assert manifest["untied"] == "lm_head.weight"

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    expected = logits(with_adapter(base, adapter))
    assert distance(logits(merged), expected) <= 1e-5
    before, after = load_weights(base), load_weights(tmp_path / "merged")
    same = "lm_head.weight" if target == "embed_tokens" else "model.embed_tokens.weight"
    assert torch.equal(after[same], before["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_ensure_weight_tying_keeps_one_tensor(tmp_path, settings):
    base = make_base(tmp_path / "base", "llama-tied")
    adapter = make_adapter(tmp_path / "adapter", base, ensure_weight_tying=True, **settings)
    manifest = merge(base, adapter, tmp_path / "merged")
    assert manifest["untied"] is None
    assert load_weights(tmp_path / "merged").keys() == load_weights(base).keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(with_adapter(base, adapter))
    assert distance(logits(merged), expected) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gpt2", {"target_modules": ["c_attn", "c_fc", "wte"]}), ("llama-tied", {"use_dora": True})],
)
def test_blocks_of_rows_change_no_bit(kind, settings, tmp_path, monkeypatch):
    """Large weights are merged some rows at a time."""
    base = make_base(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    merge(base, adapter, tmp_path / "whole")
    monkeypatch.setattr("scripts.merging.merge.BLOCK_ELEMENTS", 32 * 5)
    merge(base, adapter, tmp_path / "blocks")
    whole, blocks = load_weights(tmp_path / "whole"), load_weights(tmp_path / "blocks")
    for name, tensor in whole.items():
        torch.testing.assert_close(blocks[name], tensor, rtol=2**-22, atol=2**-24)


def test_folder_saved_without_the_head_keeps_its_names(tmp_path):
    """GPT-2 on the Hub says h.0..., the adapter says transformer.h.0..."""
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn"])
    expected = logits(with_adapter(base, adapter))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.transformer.save_pretrained(tmp_path / "bare")
    assert "h.0.attn.c_attn.weight" in load_weights(tmp_path / "bare")
    merge(tmp_path / "bare", adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), expected) <= 1e-5
