"""What models put around an answer."""


def strip_fence(answer: str) -> str:
    """The content of the first Markdown fence, wherever a model put its command into one; else the answer."""
    text = answer.strip()
    before, fence, rest = text.partition("```")
    if not fence or (before and not before.endswith("\n")):
        return text
    content = rest.partition("\n")[2]  # after the language's name
    return content.partition("\n```")[0].strip()
