"""The base model's tokenizer. Beside :mod:`dryfit.common.chat`, which documents use without transformers."""

import os
from typing import Any

from dryfit.common.errors import UserError


def read_tokenizer(folder: str | os.PathLike) -> Any:
    """The model's tokenizer, without running any code that comes with it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each kind of file is broken in its own way
        if "trust_remote_code" not in str(error):
            raise UserError(
                f"The model's tokenizer can't be read: {type(error).__name__}: {str(error).strip()[:200]}",
                where=folder,
                allowed="tokenizer.json and tokenizer_config.json, as save_pretrained writes them",
            ) from None
        raise UserError(
            "The model's tokenizer is Python code in its own repository, and nobody's code is run here.",
            where=f"{folder}/tokenizer_config.json: auto_map",
            allowed="a tokenizer that transformers has itself, as a tokenizer.json",
        ) from None
