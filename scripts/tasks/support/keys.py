"""Clean text, and what counts as the same request or the same answer: what the tasks share."""

import hashlib
import re
import unicodedata

MAXIMUM_CHARACTERS = 4_000  # of a request or an answer

# Space of every kind, and characters that have no width and carry nothing in a request or command.
_SPACE = re.compile(r"\s+")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
_QUOTES = re.compile("[\"'`\u2018\u2019\u201c\u201d]")
_WORD_END = re.compile(r"[.,;:!?]+(?= |$)")


def clean_request(text: str) -> str:
    """Unicode NFC, one space between words, nothing invisible."""
    return _SPACE.sub(" ", unicodedata.normalize("NFC", _INVISIBLE.sub("", text))).strip()


def clean_block(text: str) -> str:
    """Unicode NFC, Unix line ends, no space around it. What is inside stays: space can matter there."""
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def request_key(text: str) -> str:
    """What is left of a request when case, quotes, punctuation after words and width of characters don't count."""
    text = _QUOTES.sub("", unicodedata.normalize("NFKC", text).casefold())
    return _WORD_END.sub("", _SPACE.sub(" ", text).strip()).strip()


def key_number(*parts: str) -> int:
    """A 64-bit number for a text: of a million texts two share one with a chance of 3 in 100 million."""
    digest = hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def defect(
    request: str, command: str, most: int = MAXIMUM_CHARACTERS, answer: str = "command"
) -> str | None:
    """Why a cleaned pair can't be used, or None: ``most`` characters of each; ``answer`` is the second's name."""
    for name, text in (("request", request), (answer, command)):
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
            # Bidirectional overrides show an answer as what it is not.
            if (
                category == "Cc" and character not in "\n\t"
            ) or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
                return f"{name} has control characters"
    return None
