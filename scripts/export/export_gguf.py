"""Rule ``export_gguf``: the merged model as one GGUF file for llama.cpp and Ollama, with the tokenizer of training.

One tensor after the other passes through memory. Beside the file lies a Modelfile that puts a request to the model
as training did: its template, its system prompt, its stop token, greedy.

By hand::

    python -m scripts.export.export_gguf --model DIR --output DIR [--type q8_0] [--system "..."]
"""

import argparse
import json
import math
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dryfit.common.chat import render_prompt
from dryfit.common.errors import UserError
from dryfit.common.files import atomic_folder, read_folder, write_report, write_text
from dryfit.common.terminal import command, progress
from dryfit.common.text import gib
from scripts.common.job import job

if TYPE_CHECKING:
    import numpy as np

ARCHITECTURES = ("llama", "qwen2")  # model_type in config.json, and the name in GGUF
# Names of types in GGUF; vectors stay float32 in all of them.
TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
ADD_LATER = (
    "\ue000system\ue001",
    "\ue000request\ue001",
)  # private characters: no template has them by itself


def refuse_architecture(config: Any, where: Path) -> None:
    """Raise for a model that llama.cpp would compute otherwise, or that isn't known here."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            "This architecture is not exported to GGUF here.",
            where=where,
            found=f"model_type: {config.model_type}",
            allowed=f"{', '.join(ARCHITECTURES)}; for another, llama.cpp's own convert_hf_to_gguf.py",
        )
    other = {
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
        "use_sliding_window": getattr(config, "use_sliding_window", False),
        "rope_parameters": config.rope_parameters["rope_type"]
        not in ("default", "llama3", "linear")
        and config.rope_parameters,
    }
    if config.model_type == "qwen2" and config.rope_parameters["rope_type"] != "default":
        other["rope_parameters"] = config.rope_parameters  # llama.cpp reads no factors for it
    for name, value in other.items():
        if value:
            raise UserError(
                "llama.cpp does not support this setting of the model.",
                where=where,
                found=f"{name}: {value}",
                allowed="silu, no sliding window, and positions that are plain or (llama) scaled as linear or llama3",
            )


def pre_tokenizer_name(tokenizer: dict[str, Any], where: Path) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits text before it merges.

    llama.cpp has these patterns in its code, so the name must mean what the tokenizer does, or the exported model
    reads other tokens than the one that was trained.

    ``tokenizer``: the tokenizer as the tokenizers library describes it, in the form of tokenizer.json.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = []
    for step in pre.get("pretokenizers", [pre]):
        if step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            steps.append("words" if step["use_regex"] else "bytes")
        elif step.get("type") == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", "?"))
        else:
            steps.append(str(step.get("type")))
    known = {
        ("words",): "gpt-2",
        ("digits", "words"): "smollm",
        (GGUF_PRE_TOKENIZER_SPLITS["qwen2"], "bytes"): "qwen2",
        (GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"], "bytes"): "llama-bpe",
    }
    name = known.get(tuple(steps))
    normalizer = (tokenizer.get("normalizer") or {"type": None})["type"]
    # Only Llama 3's vocabulary takes a word that is one token before it looks at the merges, in both programs.
    whole_words = bool(model.get("ignore_merges")) == (name == "llama-bpe")
    if (
        model["type"] != "BPE"
        or model.get("byte_fallback")
        or name is None
        or not whole_words
        or normalizer not in (None, "NFC")
    ):
        raise UserError(
            "llama.cpp has no name for the way in which this tokenizer splits text.",
            where=where,
            found=f"{model['type']}, normalizer {normalizer}, {steps}",
            allowed="byte-level BPE that splits as GPT-2, SmolLM, Qwen2 or Llama 3 do",
        )
    return name


def add_tokenizer(writer: Any, folder: Path, rows: int, tokenizer: Any) -> str:
    """Write tokens, merges, control tokens and the chat template; returns the name of the pre-tokenizer.

    ``rows``: rows of the embedding, which may be more than there are tokens. ``tokenizer``: the folder's tokenizer,
    loaded by transformers.
    """
    from gguf import SpecialVocab, TokenType

    # As loaded: for some architectures transformers splits text otherwise than tokenizer.json says.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_name(content, folder / "tokenizer.json")
    tokens: list[str] = [f"[PAD{number}]" for number in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, number in content["model"]["vocab"].items():
        tokens[number], types[number] = text, TokenType.NORMAL
    for added in content["added_tokens"]:
        if added["id"] >= rows:  # transformers adds some on loading that the model has no row for
            continue
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    # What the tokenizer does, rather than what its settings say.
    special.add_special_token["bos"] = adds_bos(tokenizer)
    special.special_token_ids["eos"] = tokenizer.eos_token_id
    special.add_to_gguf(writer, quiet=True)
    return pre


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins each text with its own token."""
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def add_architecture(writer: Any, config: Any) -> None:
    """Write the sizes that llama.cpp builds the model from."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def rope_factors(config: Any) -> "np.ndarray | None":
    """By what each frequency of the positions is divided; None where they are plain."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    plain = rope["rope_theta"] ** (-torch.arange(len(scaled)) / len(scaled))
    return (plain / scaled).float().numpy()


def pair_up(values: Any, heads: int) -> Any:
    """The rows of each head in llama.cpp's order for Llama: the two of a rotated pair beside each other.

    transformers rotates row i with row i + size/2 of a head; llama.cpp's Llama rotates neighbours.
    """
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


@dataclass(frozen=True)
class Entry:
    """One tensor: its place in the model's folder, and its name, shape and type in GGUF."""

    path: Path
    key: str
    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType


def entries(folder: Path, config: Any, type_name: str) -> list[Entry]:
    """All tensors of a folder, known from the headers alone."""
    from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
    from safetensors import safe_open

    names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    values = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            shapes = {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
        for key, shape in sorted(shapes.items()):
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(
                    "GGUF has no name for this tensor of the model.", where=path, found=key
                )
            kind = GGMLQuantizationType[type_name.upper() if len(shape) > 1 else "F32"]
            if shape[-1] % GGML_QUANT_SIZES[kind][0]:
                kind = (
                    GGMLQuantizationType.F16
                )  # rows that are no whole number of blocks: as llama.cpp does
            values.append(Entry(path, key, name, shape, kind))
    if not values:
        raise UserError("The model's folder has no safetensors weights.", where=folder)
    return values


def converted(entry: Entry, config: Any) -> "np.ndarray":
    """A tensor's values in llama.cpp's order and GGUF's type."""
    import numpy as np
    import torch
    from gguf import quants
    from safetensors import safe_open

    with safe_open(entry.path, framework="pt") as shard:
        values = shard.get_tensor(entry.key).to(torch.float32).numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if config.model_type == "llama" and (layer := entry.key.split(".")[-2]) in heads:
        values = pair_up(values, heads[layer])
    with np.errstate(over="ignore"):
        array = quants.quantize(np.ascontiguousarray(values), entry.kind)
    if array.dtype == np.float16 and not np.isfinite(array).all():
        where = f"{entry.path}, {entry.key}"
        raise UserError(
            "A weight is beyond the range of float16.",
            where=where,
            allowed="type bf16, f32 or q8_0",
        )
    return array


def write_gguf(folder: Path, path: Path, type_name: str) -> dict[str, Any]:
    """Write the model in ``folder`` to one GGUF file; returns what is in it."""
    import numpy as np
    from gguf import GGUFWriter, LlamaFileType
    from gguf.quants import quant_shape_to_byte_shape
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    refuse_architecture(config, folder / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    writer = GGUFWriter(path, config.model_type)
    writer.add_type("model")
    writer.add_file_type(LlamaFileType[TYPES[type_name]])
    add_architecture(writer, config)
    pre = add_tokenizer(writer, folder, config.vocab_size, tokenizer)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    tensors = entries(folder, config, type_name)
    for entry in tensors:
        size = math.prod(quant_shape_to_byte_shape(entry.shape, entry.kind))
        writer.add_tensor_info(
            entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=entry.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for entry in progress(tensors, "writing", unit="tensor"):
        writer.write_tensor_data(converted(entry, config))
    writer.close()
    kinds = Counter(entry.kind.name for entry in tensors)
    return {
        "architecture": config.model_type,
        "pre_tokenizer": pre,
        "tensors": dict(kinds),
        "type": type_name,
    }


def modelfile(tokenizer: Any, system: str) -> str:
    """Ollama's recipe: the prompt of training around a request, the system prompt, the stop token, greedy.

    Ollama does not run Jinja. The template of a conversation of one turn is what the tokenizer's own template makes
    of two marks, which become Ollama's variables.
    """
    template = render_prompt(tokenizer, *ADD_LATER)
    if adds_bos(tokenizer):
        template = template.removeprefix(tokenizer.bos_token)  # llama.cpp writes it
    for mark, variable in zip(ADD_LATER, ("{{ .System }}", "{{ .Prompt }}"), strict=True):
        if template.count(mark) != 1 or "{{" in template.replace("{{ .System }}", ""):
            raise UserError(
                "The chat template can't be translated to Ollama's template language.",
                where="the model's chat template",
                found=template,
            )
        template = template.replace(mark, variable)
    for text in (template, system):
        if '"""' in text:
            raise UserError(
                'A Modelfile has no way to write """.',
                where="system prompt or chat template",
                found=text,
            )
    return "\n".join(
        [
            "FROM ./model.gguf",
            f'TEMPLATE """{template}{{{{ .Response }}}}{tokenizer.eos_token}"""',
            f'SYSTEM """{system}"""',
            f'PARAMETER stop "{tokenizer.eos_token}"',
            "PARAMETER temperature 0",
            "",
        ]
    )


def export(
    model: str | os.PathLike, output: str | os.PathLike, type_name: str, system: str
) -> dict[str, Any]:
    """Write model.gguf, Modelfile, the licence and export.json into a folder that appears whole.

    Parameters
    ----------
    model
        A merged model's folder. Where it has a manifest.json, every file must be what the merge wrote.
    output
        A folder; one that is there is replaced.

    Returns
    -------
    dict
        What export.json says.

    Raises
    ------
    UserError
        An architecture, a setting or a tokenizer that llama.cpp reads otherwise; weights that do not fit the type.
    """
    from transformers import AutoTokenizer

    model, output = Path(model), Path(output)
    if not (model / "config.json").is_file():
        raise UserError("There is no config.json in the model's folder.", where=model)
    if (manifest := model / "manifest.json").is_file():
        read_folder(manifest)
    with atomic_folder(output) as beside:
        report = write_gguf(model, beside / "model.gguf", type_name)
        report["bytes"] = (beside / "model.gguf").stat().st_size
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        write_text(beside / "Modelfile", modelfile(tokenizer, system))
        for pattern in LICENCES:
            for path in model.glob(pattern):
                shutil.copyfile(path, beside / path.name)
        write_report(beside / "export.json", report, *beside.iterdir())
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export.export_gguf",
        description="Write a model of transformers as GGUF, with a Modelfile.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="config.json, tokenizer.json and safetensors"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="replaced when it is there")
    parser.add_argument(
        "--type", default="q8_0", choices=TYPES, help="of the weights (default q8_0)"
    )
    parser.add_argument("--system", default="", help="system prompt of the training")
    options = parser.parse_args()
    report = export(options.model, options.output, options.type, options.system)
    print(f"{options.output}/model.gguf: {gib(report['bytes'])} {report['type']}")
    return 0


if __name__ == "__main__":
    if "snakemake" in globals():
        with job(snakemake):
            export(
                snakemake.input.merged,
                Path(snakemake.output.gguf).parent,
                snakemake.wildcards.type,
                snakemake.params.prompt["system"],
            )
    else:
        command(main)
