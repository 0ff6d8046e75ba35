"""The base model's tokenizer. Beside :mod:`scripts.common.chat`, which documents use without transformers."""

from __future__ import annotations

import os
from typing import Any

from scripts.common.errors import UserError


def read_tokenizer(folder: str | os.PathLike) -> Any:
    """The model's tokenizer, without running any code that comes with it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            "The model's tokenizer is Python code in its own repository, and nobody's code is run here.",
            where=f"{folder}/tokenizer_config.json: auto_map",
            allowed="a tokenizer that transformers has itself, as a tokenizer.json",
        ) from None
