"""What the library knows about cards, models and other tools: files that are installed with it."""

from __future__ import annotations

from pathlib import Path


def data_path(*parts: str) -> Path:
    """The path of a file or folder of the library's data: ``data_path("models", "qwen2.5-coder-7b.json")``."""
    return Path(__file__).parent.joinpath(*parts)
