"""Models that a scenario is not about: what they do instead of continuing a text, and what answers for them."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.data import data_path

RUN = "dryfit run train.py"
# What architectures of other kinds are called: MODEL_FOR_*_MAPPING_NAMES of transformers 5.24.
_NOT_CAUSAL = re.compile(
    r"For(MaskedLM|PreTraining|ImageClassification|CTC|SpeechSeq2Seq|ObjectDetection|SemanticSegmentation"
    r"|DepthEstimation|AudioClassification|ZeroShot\w+|MaskGeneration|QuestionAnswering|TokenClassification)$"
)


@cache
def _known() -> dict[str, str]:
    does = read_yaml(data_path("other_models.yaml"))
    return {_plain(name): what for what, names in does.items() for name in names}


def _plain(name: str) -> str:
    return re.sub(r"[_\s]", "-", name.lower())


def not_a_language_model(
    kind: str, where: object = "model.model_type", does: str | None = None
) -> UserError:
    """The error of a model that does not continue a text; ``does``: what it does instead, where that is known."""
    what = does or _known().get(_plain(kind))
    return UserError(
        f"This model {what}, and a scenario is about models that continue one."
        if what and "a text" in what
        else f"This model {what}, and a scenario is about models that continue a text."
        if what
        else "This model does not continue a text, as a scenario's does.",
        where=where,
        found=kind,
        allowed="your own training program as it stands, whatever it trains; a recipe, see `dryfit --recipe list`; or a"
        " model that continues a text",
        write=RUN,
        field="model",
    )


def refuse_other_kinds(model: Mapping[str, Any], where: object) -> None:
    """Refuse a configuration that says itself that its model continues no text.

    UserError: with the command that answers for it.
    """
    if isinstance(pipeline := model.get("_class_name"), str):  # of diffusers
        raise not_a_language_model(pipeline, where, "makes images or films")
    kind = model.get("model_type")
    if not isinstance(kind, str) or model.get("is_decoder") is True:
        return
    architectures = model.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if any(name.endswith("ForCausalLM") for name in names) and _plain(kind) not in _known():
        return
    both = "reads a text and writes another" if model.get("is_encoder_decoder") is True else None
    if _plain(kind) in _known() or both or (names and all(map(_NOT_CAUSAL.search, names))):
        raise not_a_language_model(kind, where, _known().get(_plain(kind), both))


def is_other_kind(model: Mapping[str, Any]) -> bool:
    """Whether a configuration says itself that its model continues no text."""
    try:
        refuse_other_kinds(model, None)
    except UserError:
        return True
    return False


def by_name(text: str) -> str | None:
    """What a model does whose name alone is known, an id's too: ``openai/whisper-tiny``; None: nothing is known."""
    owner, _, name = _plain(text.partition("@")[0]).rpartition("/")
    for one in (name, owner):
        words = one.split("-")
        for count in range(len(words), 0, -1):
            start = "-".join(words[:count])
            for known in (start, re.sub(r"[.\d]+$", "", start)):
                if known and known in _known():
                    return _known()[known]
    return None
