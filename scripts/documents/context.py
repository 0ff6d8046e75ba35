"""The context of a template: the JSON that the rules wrote, and what is read out of it.

Nothing here or in the modules beside it knows a result: each says what it can from the inputs that are there.
"""

from collections.abc import Mapping
from typing import Any

from scripts.documents import card, dataset, evaluation, memory
from scripts.documents.traced_values import plain
from scripts.tasks.support import registry


def derive(
    files: Mapping[str, Any], settings: Mapping[str, Any], paths: Mapping[str, Any]
) -> dict[str, Any]:
    """The context of a template.

    Parameters
    ----------
    files
        Content of the rule's inputs by name.
    settings
        The rule's params: ``run``, ``scenarios`` (names, in the order of the ``profile`` inputs), and, for the
        card, ``configuration`` (the whole of it).
    paths
        The rule's inputs by name.
    """
    context: dict[str, Any] = {**files, **settings}
    if "configuration" in settings:
        context["description"] = titled(files["description"], settings["configuration"]["model"])
    context |= memory.read(files, settings, paths)
    if "profile_title" in context and "description" in context:
        titles = (context["profile_title"], context["description"]["title"])
        context["profile_is_own"] = len({plain(title).casefold() for title in titles}) == 1
    # The memory profile has no configuration: no task decides it.
    task = registry.task(bare(settings.get("configuration", {}).get("task", {"name": "text"})))
    context["words"] = {**marked(task.words()), **task.options.get("words", {})}
    context |= dataset.read(files, task)
    context |= evaluation.read(files, task)
    context |= evaluation.read_benchmark(files, task)
    context["alt"] = alternative_texts(context)
    context |= card.read(files, settings, paths, context)
    return context


def titled(description: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a base with what the configuration calls it: its title and its licence."""
    return {**description, "license": model["license"], "title": model["title"]}


def bare(value: Any) -> Any:
    """A value without the files that its texts came from."""
    if isinstance(value, Mapping):
        return {plain(str(key)): bare(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bare(item) for item in value]
    return plain(value) if isinstance(value, str) else value


def marked(words: Mapping[str, Any]) -> dict[str, Any]:
    """A task's own words, which templates print as they stand."""
    from markupsafe import Markup

    return {name: Markup(word) if isinstance(word, str) else word for name, word in words.items()}


def alternative_texts(context: Mapping[str, Any]) -> dict[str, str]:
    """What each figure shows, for those who don't see it."""
    texts = {}
    if "profile" in context:
        peaks = "; ".join(
            f"{s['title']} {memory.short_size(s['answers']['trace']['peak_allocated_bytes'])} by the trace, "
            f"{memory.short_size(s['answers']['rule_of_thumb']['peak_allocated_bytes'])} by the rule of thumb"
            for s in context["profile"]
        )
        texts["memory"] = f"Peak memory of a training step by component: {peaks}"
        texts["timeline"] = (
            "Memory by component in the course of one training step, from forward to optimizer"
        )
    if "training" in context:
        first, last = context["training"]["first_loss"], context["training"]["final_loss"]
        texts["training_curve"] = f"Training loss by step, from {first:.2f} to {last:.2f}"
    if "comparison" in context:
        compared = context["comparison"]
        base, tuned = (
            compared[model][compared["right_flag"]]["share"] for model in ("base", "tuned")
        )
        texts["evaluation"] = (
            f"Right answers of base and tuned model: {100 * base:.1f} % and {100 * tuned:.1f} %"
        )
    return texts
