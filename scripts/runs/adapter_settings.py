"""The section ``lora`` of a configuration: which settings can't be trained and merged together, before any job.

What PEFT itself refuses of a step is refused with its scenario (:mod:`dryfit.scenario.contradictions`), and what the
model's layers decide, where they are not described, by the trace.
"""

import re
from collections.abc import Iterator

from dryfit.common.errors import UserError
from dryfit.common.text import closest
from dryfit.scenario.value_fields import DEFAULT_START, Lora

_WHERE = "lora in the configuration"
# What a pattern may end in and still be a name: the end of a module's path.
_NAME = re.compile(r"[A-Za-z_][\w.]*$")


def refused_together(lora: Lora, gpus: int) -> Iterator[UserError]:
    """Settings that can't be trained together although each can.

    An adapter that is taken out of the base is saved as PEFT converts it, for the base as it was. That conversion
    (peft 0.21 ``LoraModel.subtract_mutated_init``) keeps LoRA's two factors alone, and knows one scale.

    Parameters
    ----------
    lora
        The adapter.
    gpus
        Of the training.
    """
    if not lora.takes_from_base:
        return
    other = None
    if lora.dora:
        other = ("dora", "PEFT's conversion to an adapter of the base drops DoRA's lengths")
    elif lora.modules_to_save:
        other = ("modules_to_save", "PEFT's conversion to an adapter of the base drops these")
    elif lora.rslora and (lora.rank_pattern or lora.alpha_pattern):
        pattern = "rank_pattern" if lora.rank_pattern else "alpha_pattern"
        other = (f"rslora with {pattern}", "PEFT can't convert their scales for the base")
    if other:
        setting, reason = other
        yield UserError(
            f"`lora.initialization: {lora.initialization}` and `lora.{setting}` don't go together: {reason}.",
            where=_WHERE,
            found=lora.initialization,
            allowed="initialization default, gaussian, orthogonal or mica; or without the other setting",
            write=f"lora:\n  initialization: {DEFAULT_START}",
        )
    if gpus > 1:
        yield UserError(
            f"`lora.initialization: {lora.initialization}` is trained on one GPU alone: each process would take its"
            " own factors out of the base.",
            where=f"{_WHERE}, training.parallel",
            found=f"{gpus} GPUs",
            allowed="initialization default, gaussian, orthogonal or mica; or one GPU",
            write=f"lora:\n  initialization: {DEFAULT_START}",
        )


def unmatched_patterns(lora: Lora, layers: tuple[str, ...]) -> Iterator[UserError]:
    """Ranks and alphas for layers that get no adapter.

    Parameters
    ----------
    lora
        The adapter.
    layers
        The names of the layers with adapters, such as ``q_proj``. The trace compares whole paths; here a pattern that
        ends in no name is passed over.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, field) or ():
            last = pattern.rsplit(".", 1)[-1]
            if not _NAME.match(pattern) or last in layers:
                continue
            number = getattr(lora, field)[pattern]
            near = closest(last, layers) or layers[0]
            yield UserError(
                f"`lora.{field}` has {pattern}, which matches no layer with an adapter.",
                where=_WHERE,
                found=dict(getattr(lora, field)),
                allowed=f"the end of a layer's path: {', '.join(sorted(layers))}",
                write=f"lora:\n  {field}: {{{near}: {number}}}",
            )


def unknown_modules(lora: Lora, layers: tuple[str, ...]) -> Iterator[UserError]:
    """Modules to train whole that a model of Llama's form does not have; of others the trace knows.

    ``layers``: the names of all linear layers of a block.
    """
    if "q_proj" not in layers or "gate_proj" not in layers:
        return
    around = ("embed_tokens", "lm_head", "norm")
    norms = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
    more = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "self_attn", "mlp")
    known = {*around, *norms, *more, *layers}
    for name in lora.modules_to_save or ():
        if name.rsplit(".", 1)[-1] in known:
            continue
        yield UserError(
            f"`lora.modules_to_save` names {name}, and this model has no such module.",
            where=_WHERE,
            found=list(lora.modules_to_save),
            allowed=f"{', '.join(around)}, or a module of a layer",
            write=f"lora:\n  modules_to_save: [{closest(name, known) or 'lm_head'}]",
        )
