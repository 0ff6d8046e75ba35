"""A value as a short number that depends on what it says alone. Standard library only."""

import hashlib
import json


def canonical(value: object) -> object:
    """The same value with every mapping's keys sorted, so that equal settings have equal text."""
    if isinstance(value, dict):
        return {key: canonical(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value


def digest(value: object) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a JSON-like value, independent of the order of keys."""
    text = json.dumps(canonical(value), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
