"""Tokens appear in no log, file or error."""

from __future__ import annotations

import os
import re

_TOKEN = re.compile(r"\bhf_\w{6,}")


def without_secrets(text: str) -> str:
    """The text without the token of the environment, or anything that looks like one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)
