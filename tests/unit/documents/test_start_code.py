"""The card's first code does what training and evaluation did, and runs."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dryfit.common.chat import render_prompt
from tests.unit.documents import inputs

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_model(folder: Path) -> Any:
    """A model of one layer, with a tokenizer of bytes, as ``merged/`` holds them; returns the tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    plain.pre_tokenizer, plain.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return tokenizer


def test_the_code_runs_and_gives_the_prompt_of_training(
    tmp_path: Path, write: Callable[..., str]
) -> None:
    tokenizer = save_model(tmp_path / "merged")
    content = inputs.files()
    comparison = content["comparison"]
    comparison["tuned"]["decoding"]["max_new_tokens"] = 3
    request = 'find "big" files in C:\\temp – über 1 GB ```'
    for row in content["tuned_answers"]:
        row["request"] = request
    code = write("MODEL_CARD.md", content).partition("```python\n")[2].partition("\n```\n")[0]
    assert max(len(line) for line in code.splitlines()) <= 120
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, "the card", "exec"), names)  # the project's own text
    asked = tokenizer.decode(names["inputs"]["input_ids"][0])
    assert asked == render_prompt(tokenizer, comparison["tuned"]["prompt"]["system"], request)
    assert len(names["answer"]) <= 3 and said.getvalue().endswith("\n")
