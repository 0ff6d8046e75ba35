"""What is exported is what was merged: transformers' own GGUF reader gives it back, and what differs is refused."""

import json
import re
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from dryfit.common.chat import render_prompt
from dryfit.common.errors import UserError
from dryfit.common.files import read_json, read_report, write_json, write_report
from scripts.export.export_gguf import export, modelfile, pre_tokenizer_name, rope_factors
from scripts.training import describe_model, fetch_weights
from tests.chat_tokenizer import CHATML, make_tokenizer
from tests.warm import launchers

ROOT = Path(__file__).resolve().parents[3]
SYSTEM = "Answer with one safe Bash command."
SIZES = {
    "vocab_size": 700,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda **more: transformers.LlamaConfig(**SIZES, **more),
    "llama-tied": lambda **more: transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, **more
    ),
    "qwen2": lambda **more: transformers.Qwen2Config(**SIZES, **more),
    "qwen2-tied": lambda **more: transformers.Qwen2Config(
        **SIZES, tie_word_embeddings=True, **more
    ),
}


def make_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **more) -> Path:
    """A tiny random model with a real tokenizer, as a merge leaves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**more))
    for parameter in model.parameters():
        parameter.data += (
            torch.randn_like(parameter) * 0.1
        )  # norms and biases start as ones and zeros
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    make_tokenizer(CHATML).save_pretrained(folder)
    (folder / "LICENSE").write_text("licence")
    weights = [path.name for path in folder.iterdir()]
    write_report(folder / "manifest.json", {}, *(folder / name for name in weights))
    return folder


def read_back(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors by transformers' names, by transformers' own reader."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=dtype)
    return dict(model.named_parameters())


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("type_name", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_transformers_reads_the_very_tensors_back(tmp_path, kind, type_name, dtype):
    model = make_model(tmp_path / "merged", kind, dtype)
    report = export(model, tmp_path / "out", type_name, SYSTEM)
    ours, expected = (
        read_back(tmp_path / "out", dtype),
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
    )
    theirs = dict(expected.named_parameters())
    assert ours.keys() == theirs.keys() and report["architecture"] == kind.partition("-")[0]
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for key in (*SIZES, "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, key) == pytest.approx(getattr(expected.config, key)), key
    assert config.rope_parameters["rope_theta"] == expected.config.rope_parameters["rope_theta"]


def test_a_file_becomes_the_base_that_it_was_and_is_parsed_once_for_each_rule(
    tmp_path, monkeypatch
):
    model, base, parsed = make_model(tmp_path / "merged", "llama"), tmp_path / "base", []
    export(model, tmp_path / "out", "f32", SYSTEM)
    path, reader, names = (
        str(tmp_path / "out" / "model.gguf"),
        gguf.GGUFReader,
        gguf.get_tensor_name_map,
    )
    monkeypatch.setattr(gguf, "GGUFReader", lambda *given: parsed.append("file") or reader(*given))
    monkeypatch.setattr(
        gguf, "get_tensor_name_map", lambda *given: parsed.append("names") or names(*given)
    )
    base.mkdir()
    describe_model.from_gguf(path, str(model / "LICENSE"), base, "float32")
    assert parsed == ["file"]
    fetch_weights.dequantize_gguf(path, base, "float32")
    assert parsed == ["file", "file", "names"]
    theirs = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(
        torch.equal(tensor, theirs[name])
        for name, tensor in load_file(base / "model.safetensors").items()
    )


def test_rows_of_weights_and_biases_take_the_same_order(tmp_path):
    """transformers' reader knows no Llama with biases: these are compared with the weights beside them."""
    model = make_model(tmp_path / "merged", "llama", attention_bias=True)
    (model / "manifest.json").unlink()
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                tensors[name] = torch.arange(len(tensors[name])).float()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensors[name][:] = torch.arange(len(tensors[name])).float()[:, None]
        save_file(tensors, path, {"format": "pt"})
    export(model, tmp_path / "out", "f32", SYSTEM)
    data = {
        tensor.name: tensor.data
        for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    }
    for name in ("blk.0.attn_q", "blk.1.attn_k"):
        assert np.array_equal(data[f"{name}.weight"][:, 0], data[f"{name}.bias"])
        assert data[f"{name}.bias"][:4].tolist() == [0, 8, 1, 9]  # heads of 16: halves side by side


@pytest.mark.few(1)
@pytest.mark.parametrize(("type_name", "bound"), [("f16", 2**-11), ("q8_0", 1 / 127)])
def test_smaller_types_round_and_no_more(tmp_path, type_name, bound):
    model = make_model(tmp_path / "merged", "llama")
    report = export(model, tmp_path / "out", type_name, SYSTEM)
    theirs = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    for name, tensor in read_back(tmp_path / "out", torch.float32).items():
        error = float((tensor - theirs[name]).abs().max() / theirs[name].abs().max())
        assert 0 <= error <= bound and (error > 0) == (tensor.ndim > 1), name
    assert report["tensors"] == {"F32": 5, type_name.upper(): 16}


def test_rows_that_are_no_whole_blocks_stay_in_16_bits(tmp_path):
    model = make_model(tmp_path / "merged", "qwen2", hidden_act="silu")
    config = read_json(model / "config.json")
    narrow = AutoModelForCausalLM.from_config(
        transformers.Qwen2Config(**{**SIZES, "intermediate_size": 100}), dtype=torch.float32
    )
    narrow.save_pretrained(tmp_path / "narrow")
    make_tokenizer(CHATML).save_pretrained(tmp_path / "narrow")
    assert config["intermediate_size"] % 32 == 0
    report = export(tmp_path / "narrow", tmp_path / "out", "q8_0", SYSTEM)
    assert report["tensors"] == {"F16": 2, "F32": 11, "Q8_0": 14}  # down_proj of two layers


@pytest.mark.few(1)
@pytest.mark.parametrize(("kind", "split"), [("qwen2", "qwen2"), ("llama", "gpt-2")])
def test_the_tokenizer_of_training_goes_along(tmp_path, kind, split):
    """Two models with the same tokenizer.json: transformers splits text for Qwen2 in Qwen2's way all the same."""
    model = make_model(tmp_path / "merged", kind)
    export(model, tmp_path / "out", "f16", SYSTEM)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    theirs = AutoTokenizer.from_pretrained(model)
    prompt = render_prompt(theirs, SYSTEM, "List 123 files' names in /tmp, with ünïcode")
    assert (
        ours(prompt, add_special_tokens=False)["input_ids"]
        == theirs(prompt, add_special_tokens=False)["input_ids"]
    )
    assert ours.chat_template == CHATML and ours.eos_token == theirs.eos_token
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    types = [
        int(fields["tokenizer.ggml.token_type"].parts[index][0])
        for index in fields["tokenizer.ggml.token_type"].data
    ]
    assert len(types) == SIZES["vocab_size"]  # as many as the embedding has rows
    assert types.count(gguf.TokenType.CONTROL) >= 8 and types[-1] == gguf.TokenType.UNUSED
    assert fields["tokenizer.ggml.pre"].contents() == split
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


QWEN2 = transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX
PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": split_by(QWEN2),
    "llama-bpe": split_by(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_how_text_is_split_is_told_from_the_tokenizer_s_own_description(name):
    backend = make_tokenizer(CHATML).backend_tokenizer
    backend.pre_tokenizer = PRE_TOKENIZERS[name]
    content = json.loads(backend.to_str())
    content["model"]["ignore_merges"] = name == "llama-bpe"
    assert pre_tokenizer_name(content, Path("tokenizer.json")) == name
    content["model"]["ignore_merges"] = name != "llama-bpe"
    with pytest.raises(UserError, match="splits text"):
        pre_tokenizer_name(content, Path("tokenizer.json"))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "byte_fallback": True}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": False}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "x"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {"pre_tokenizer": None},
    ],
)
def test_another_tokenizer_is_refused(change):
    content = {**json.loads(make_tokenizer(CHATML).backend_tokenizer.to_str()), **change}
    with pytest.raises(UserError, match="no name for the way in which this tokenizer splits text"):
        pre_tokenizer_name(content, Path("tokenizer.json"))


def test_scaled_positions_become_factors(tmp_path):
    """Llama 3.1's: what divides each frequency, between 1 and the scaling factor."""
    factors = rope_factors(CONFIGS["llama"](rope_parameters=LLAMA3))
    assert factors.shape == (8,) and factors[0] == 1 and factors[-1] == pytest.approx(8)
    assert np.all(np.diff(factors) > -1e-5)
    model = make_model(tmp_path / "merged", "llama", rope_parameters=LLAMA3)
    export(model, tmp_path / "out", "f32", SYSTEM)
    tensors = {
        tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    }
    assert np.array_equal(tensors["rope_freqs.weight"].data, factors)


# --- the recipe for Ollama -----------------------------------------------------------------------


def test_modelfile_puts_a_request_as_training_did(tmp_path):
    model = make_model(tmp_path / "merged", "qwen2")
    export(model, tmp_path / "out", "q8_0", SYSTEM)
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.splitlines()[0] == "FROM ./model.gguf" and 'PARAMETER stop "</s>"' in text
    assert "PARAMETER temperature 0\n" in text and f'SYSTEM """{SYSTEM}"""' in text
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL).group(1)
    prompt, end = template.split("{{ .Response }}")
    filled = prompt.replace("{{ .System }}", SYSTEM).replace("{{ .Prompt }}", "list files")
    assert (
        filled == render_prompt(AutoTokenizer.from_pretrained(model), SYSTEM, "list files")
        and end == "</s>"
    )


def test_a_leading_token_is_written_once():
    """Llama 3's template writes the token that llama.cpp writes too."""
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML)
    assert 'TEMPLATE """<s><|im_start|>' in modelfile(tokenizer, SYSTEM)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert 'TEMPLATE """<|im_start|>' in modelfile(tokenizer, SYSTEM)


def test_template_or_prompt_that_ollama_cannot_say():
    with pytest.raises(UserError, match="Ollama's template language"):
        modelfile(
            make_tokenizer(
                "{{ messages[0].content }}{{ messages[0].content }}{{ messages[1].content }}"
            ),
            SYSTEM,
        )
    with pytest.raises(UserError, match="no way to write"):
        modelfile(make_tokenizer(CHATML), 'say """')


# --- refusals ------------------------------------------------------------------------------------


def refuse(model: Path, *words: str, type_name: str = "f16") -> None:
    """The export raises, the message has the words, and nothing appears."""
    with pytest.raises(UserError) as caught:
        export(model, model.parent / "out", type_name, SYSTEM)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert [path.name for path in model.parent.iterdir()] == [model.name]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "qwen2",
            {"model_type": "gpt2"},
            ["model_type: gpt2", "llama, qwen2", "convert_hf_to_gguf"],
        ),
        ("qwen2", {"use_sliding_window": True}, ["use_sliding_window"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act: gelu"]),
        ("qwen2", {"rope_parameters": LLAMA3}, ["rope_parameters"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            ["rope_parameters"],
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(tmp_path, kind, change, words):
    model = make_model(tmp_path / "merged", kind)
    write_json(model / "config.json", {**read_json(model / "config.json"), **change})
    (model / "manifest.json").unlink()
    refuse(model, *words)


def test_tensor_that_the_architecture_has_not(tmp_path):
    model = make_model(tmp_path / "merged", "llama")
    (model / "manifest.json").unlink()
    shard = sorted(model.glob("*.safetensors"))[0]
    save_file(
        {**load_file(shard), "model.layers.0.extra.weight": torch.ones(4, 4)},
        shard,
        {"format": "pt"},
    )
    refuse(model, "model.layers.0.extra.weight")


def test_weight_beyond_float16(tmp_path):
    model = make_model(tmp_path / "merged", "llama")
    (model / "manifest.json").unlink()
    shard = next(
        path
        for path in model.glob("*.safetensors")
        if "model.embed_tokens.weight" in load_file(path)
    )
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"][0, 0] = 1e6
    save_file(tensors, shard, {"format": "pt"})
    refuse(model, "beyond the range of float16", "model.embed_tokens.weight", "bf16")


def test_damaged_shard(tmp_path):
    model = make_model(tmp_path / "merged", "llama")
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-32] + bytes(32))
    refuse(model, "not what the step that made it has written", f"rm {shard}")


def test_folder_without_a_model(tmp_path):
    (tmp_path / "merged").mkdir()
    refuse(tmp_path / "merged", "no config.json")


def test_command_line(tmp_path):
    model = make_model(tmp_path / "merged", "qwen2")
    options = [
        "--model",
        str(model),
        "--output",
        str(tmp_path / "out"),
        "--type",
        "q8_0",
        "--system",
        SYSTEM,
    ]
    command = [f"{launchers()}/python", "-m", "scripts.export.export_gguf", *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"{tmp_path}/out/model.gguf: 0.00 GiB q8_0")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"LICENSE", "Modelfile", "export.json", "model.gguf"}
    read_report(
        tmp_path / "out" / "export.json",
        *(tmp_path / "out" / name for name in names - {"export.json"}),
    )
