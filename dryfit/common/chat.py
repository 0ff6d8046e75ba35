"""One way to put a request to the model, the same in encoding, training, evaluation, verification and the card.

The model's own chat template with one system prompt. Text of a request is data: whatever in it reads like
one of the tokenizer's control tokens is broken up, so that no request can end its own turn.
"""

from collections.abc import Sequence
from typing import Any

from dryfit.common.errors import UserError

Shots = Sequence[
    tuple[str, str]
]  # requests with their answers, as turns before the request that is asked
IGNORED = -100  # the label that transformers' loss leaves out
# What templates may ask for beside the messages: no thinking out loud (Qwen3), and a fixed date (Llama 3.1
# would write today's into every prompt).
TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "01 Jan 2025"}


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts that the tokenizer reads as control tokens, longest first."""
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted((text for text in texts if text), key=lambda text: (-len(text), text)))


def as_data(text: str, controls: Sequence[str]) -> str:
    """The text with each control token broken up by a space after its first character, until none is left."""
    while control := next((token for token in controls if token in text), None):
        if len(control) == 1:
            return text.replace(control, " ")
        text = text.replace(control, f"{control[0]} {control[1:]}")
    return text


def _render(
    tokenizer: Any, system: str, request: str, answer: str | None, shots: Shots = ()
) -> str:
    """The conversation as text, behind the shots; without an answer it ends where the model has to begin."""
    end = [] if answer is None else [{"role": "assistant", "content": answer}]
    settings = {"tokenize": False, "add_generation_prompt": answer is None, **TEMPLATE_SETTINGS}
    turns = ("user", "assistant")
    before = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in zip(turns, shot, strict=True)
    ]
    asked = [*before, {"role": "user", "content": request}]
    try:
        messages = [{"role": "system", "content": system}, *asked, *end]
        text = tokenizer.apply_chat_template(messages, **settings)
        if system.strip() in text:
            return text
    except Exception as error:  # templates refuse in their own words: jinja2's raise_exception
        if "system" not in str(error).lower() and "role" not in str(error).lower():
            raise
    # The template has no place for a system prompt (Gemma): it goes before the request.
    first, *others = asked
    messages = [{**first, "content": f"{system}\n\n{first['content']}"}, *others, *end]
    return tokenizer.apply_chat_template(messages, **settings)


def _check_template(tokenizer: Any) -> None:
    """Put a request to the tokenizer's chat template, to see whether it can be done.

    UserError: where the template fails, each in its own way, or leaves the request out.
    """
    where = "the model's chat template"
    write = "# chat_template.jinja beside the tokenizer, as the model's instruction-tuned relatives have it"
    allowed = "a template that writes a system prompt or not, and a user's message"
    try:
        text = render_prompt(tokenizer, "Answer with one command.", "list the files")
    except Exception as error:
        said = str(error).strip().partition("\n")[0] or "no reason given"
        problem = f"The model's chat template can't be used: {type(error).__name__}: {said[:300]}"
        raise UserError(problem, where=where, allowed=allowed, write=write) from None
    if "list the files" not in text:
        problem = "The model's chat template leaves out what the user writes."
        raise UserError(problem, where=where, found=text[:200], allowed=allowed, write=write)


def render_prompt(tokenizer: Any, system: str, request: str) -> str:
    """What the model reads before it answers. Tokenize it with ``add_special_tokens=False``."""
    return _render(tokenizer, system, as_data(request, control_tokens(tokenizer)), None)


def encode_pairs(
    tokenizer: Any,
    system: str,
    pairs: Sequence[tuple[str, str]],
    shots: Sequence[Shots] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of whole conversations: labels on the answer and its end token, elsewhere -100.

    ``shots`` are those of each pair; None: no pair has any.

    Prompt and answer are tokenized apart, so the model learns to go on from exactly those tokens that it is
    given when it is asked. What the template writes after the end token (a line break in ChatML) is left out.

    Returns
    -------
    list of (input_ids, labels)
        In the order of the pairs, untruncated.

    Raises
    ------
    UserError
        When the template fails, or does not keep prompt and answer as they are.
    """
    _check_template(tokenizer)
    controls = control_tokens(tokenizer)
    prompts, answers = [], []
    for (request, command), shown in zip(pairs, shots or [()] * len(pairs), strict=True):
        request, command = as_data(request, controls), as_data(command, controls)
        before = [(as_data(one, controls), as_data(other, controls)) for one, other in shown]
        prompt = _render(tokenizer, system, request, None, before)
        whole = _render(tokenizer, system, request, command, before)
        rest = whole.removeprefix(prompt)
        if rest == whole or command not in rest:
            raise UserError(
                "The chat template changes the prompt when an answer is added, so the answer can't be told apart.",
                where="the model's chat template",
                found=whole[-200:],
                allowed="a template whose prompt (add_generation_prompt) begins the whole conversation",
            )
        answer, _, tail = rest.rpartition(command)
        end = min(
            (tail.find(token) + len(token) for token in controls if token in tail), default=None
        )
        answers.append(answer + command + (tail[:end] if end else tokenizer.eos_token))
        prompts.append(prompt)
    if not prompts:
        return []
    settings = {"add_special_tokens": False, "return_attention_mask": False}
    prompt_ids = tokenizer(prompts, **settings)["input_ids"]
    answer_ids = tokenizer(answers, **settings)["input_ids"]
    return [
        (left + right, [IGNORED] * len(left) + right)
        for left, right in zip(prompt_ids, answer_ids, strict=True)
    ]
