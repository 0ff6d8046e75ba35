"""What every dataset step means by clean text, by "the same request" and by "the same command"."""

from __future__ import annotations

import hashlib
import re
import unicodedata

MAXIMUM_REQUEST_CHARACTERS = 4_000
MAXIMUM_COMMAND_CHARACTERS = 4_000

# Space of every kind, and characters that have no width and carry nothing in a request or command.
_SPACE = re.compile(r"\s+")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
_QUOTES = re.compile("[\"'`\u2018\u2019\u201c\u201d]")
_WORD_END = re.compile(r"[.,;:!?]+(?= |$)")
_OPERATOR = re.compile(r"\s*([|&;<>()]+)\s*")


def clean_request(text: str) -> str:
    """Unicode NFC, one space between words, nothing invisible."""
    return _SPACE.sub(" ", unicodedata.normalize("NFC", _INVISIBLE.sub("", text))).strip()


def clean_command(text: str) -> str:
    """Unicode NFC, Unix line ends, no space around it. What is inside stays: space can matter in a command."""
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def request_key(text: str) -> str:
    """What is left of a request when case, quotes, punctuation after words and width of characters don't count."""
    text = _QUOTES.sub("", unicodedata.normalize("NFKC", text).casefold())
    return _WORD_END.sub("", _SPACE.sub(" ", text).strip()).strip()


def command_key(text: str) -> str:
    """What is left of a command when case, quotes, space and the final semicolon don't count.

    Coarser than equality of meaning on purpose: more is kept together than is equal, so nothing leaks.
    """
    text = _QUOTES.sub("", unicodedata.normalize("NFKC", text).casefold())
    text = _OPERATOR.sub(r" \1 ", text.replace("\n", " ; "))
    return _SPACE.sub(" ", text).strip().rstrip("; ")


def key_number(*parts: str) -> int:
    """A 64-bit number for a text: of a million texts two share one with a chance of 3 in 100 million."""
    digest = hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def defect(request: str, command: str) -> str | None:
    """Why a cleaned pair can't be used, or None."""
    for name, text, most in (
        ("request", request, MAXIMUM_REQUEST_CHARACTERS),
        ("command", command, MAXIMUM_COMMAND_CHARACTERS),
    ):
        if not text:
            return f"{name} is empty"
        if len(text) > most:
            return f"{name} is longer than {most} characters"
        for character in set(text):
            category = unicodedata.category(character)
            if character == "\0":
                return f"{name} has a NUL byte"
            if character == "\ufffd":
                return f"{name} has characters lost in an earlier conversion (U+FFFD)"
            if category == "Cs":
                return f"{name} has half a surrogate pair"
            # Bidirectional overrides show a command as what it is not.
            if (
                category == "Cc" and character not in "\n\t"
            ) or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
                return f"{name} has control characters"
    if not any(character.isalpha() for character in request):
        return "request has no words"
    return None
