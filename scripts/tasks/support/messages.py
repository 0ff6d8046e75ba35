"""Chat messages as rows: each answer of the assistant is one, behind the turns before it.

Roles that are neither the user's nor the assistant's become text of the user's turn (a system message goes before the
first one), and calls of tools become text of the assistant's, as JSON. So every model's template can write them.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
_SPEAKERS = {"user": "User", "assistant": "Assistant"}


def rows(messages: Any) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of one conversation: ``request``, ``command`` (the answer) and, after a first answer, ``turns``.

    ``messages`` are in OpenAI's form (role, content, tool_calls) or ShareGPT's (from, value). Returns the rows and
    None, or none and the reason.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError:
            return [], "messages are not a list"
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return [], "messages are not a list"
    turns: list[dict[str, str]] = []
    before: list[str] = []  # of a system message
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            return [], f"message {number} is not a mapping"
        role = message.get("role", message.get("from"))
        role = ROLES.get(str(role), role)
        text = _text(message)
        if text is None:
            return [], f"message {number} has no text"
        if role in ("system", "developer"):
            before.append(text)
            continue
        if role == "tool":
            role, text = (
                "user",
                f"Tool{' ' + str(message['name']) if message.get('name') else ''}: {text}",
            )
        if role not in _SPEAKERS:
            return [], f"message {number} has the role {role!r}"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{text}"
        elif not turns and role == "assistant":
            continue  # a greeting that nobody asked for
        else:
            content = "\n\n".join([*before, text]) if not turns else text
            turns.append({"role": role, "content": content})
    if not turns or all(turn["role"] == "user" for turn in turns):
        return [], "messages have no answer"
    if turns[-1]["role"] == "user":
        return [], "messages end without an answer"
    made = []
    for end in range(1, len(turns), 2):
        asked = turns[:end]
        row: dict[str, Any] = {"request": transcript(asked), "command": turns[end]["content"]}
        made.append({**row, "turns": asked} if len(asked) > 1 else row)
    return made, None


def transcript(turns: Sequence[Mapping[str, str]]) -> str:
    """Turns as one text; a request alone as it stands."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{_SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns)


def _text(message: Mapping[str, Any]) -> str | None:
    """A message's text, with its calls of tools; None where there is none."""
    content = message.get("content", message.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts: those of text
        content = "\n".join(
            str(part.get("text", "")) for part in content if isinstance(part, Mapping)
        )
    parts = [content] if isinstance(content, str) and content.strip() else []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI's form: JSON in a text
            with suppress(ValueError):
                arguments = json.loads(arguments)
        parts.append(
            json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)
        )
    return "\n".join(parts) or None
