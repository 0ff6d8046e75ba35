"""What a record's family has to be told: which numbers its configurations have, and what of them changes the events.

A family is what a person writes for a new one, some lines. From there the recorder (:mod:`dryfit.recorder`) goes by
itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import Any

from dryfit.data import data_path
from dryfit.engine.cuda_rules import up

Model = Mapping[str, Any]
Numbers = dict[str, int]

# Keys of a configuration that change no allocation of a step: the recorder's checks and the tests at random numbers
# trace models that differ in them.
_NO_SIZE = {
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "hidden_act", "initializer_range",
    "max_position_embeddings", "max_window_layers", "model_type", "pad_token_id", "pretraining_tp",
    "query_pre_attn_scalar", "rms_norm_eps",
    "rope_theta", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_ROPE = {"factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"}  # numbers of a table
_GELU = ("gelu_pytorch_tanh",)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Models with one code in transformers.

    Attributes
    ----------
    model_type, architecture
        As a ``config.json`` has them.
    keys
        By symbol the key of a number that says a size.
    points
        By symbol the values to record at: the base, a single variation, others for points at random.
    odd
        By symbol values at which scales of quantized weights don't come out whole.
    ends
        By symbol the least and the largest value that the record is checked at.
    fixed
        Keys that every model of the family that is recorded has, with their values.
    silent
        Keys that may be absent or have this value.
    alike
        Keys and values that leave the events as they are, checked by the recorder.
    whole_heads
        The hidden size is a multiple of the heads.
    window, slides_if
        The sliding window where a file leaves it out, and the key without which there is none.
    implied
        Keys that follow from the number of heads where a file leaves them out; for others the class has a number.
    activations
        The activation functions that make the same tensors, the class's own first.
    tied
        Whether embeddings and head are one where a file leaves that out.
    sequence
        The kinds of the layers that are recorded.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str] = field(default_factory=lambda: dict(_KEYS))
    points: Mapping[str, Sequence[int]] = field(default_factory=lambda: dict(_POINTS))
    odd: Mapping[str, Sequence[int]] = field(default_factory=lambda: dict(_ODD))
    ends: Mapping[str, tuple[int, int]] = field(default_factory=lambda: dict(_ENDS))
    fixed: Mapping[str, Any] = field(default_factory=dict)
    silent: Mapping[str, Any] = field(default_factory=dict)
    alike: Sequence[Model] = ()
    whole_heads: bool = False
    window: int | None = None
    slides_if: str | None = None
    implied: frozenset[str] = frozenset({"num_key_value_heads", "head_dim"})
    activations: Sequence[str] = ("silu",)
    tied: bool = False
    sequence: str = "aaaaa"

    def numbers(self, model: Model) -> Numbers:
        """The model's numbers by symbol."""
        heads = model["num_attention_heads"]
        groups = model.get("num_key_value_heads") or heads
        known = {symbol: model[key] for symbol, key in self.keys.items()}
        head = model.get("head_dim") or model["hidden_size"] // heads
        return known | {"K": groups, "g": heads // groups, "d": head}

    def possible(self, numbers: Numbers) -> Numbers:
        """The numbers with a hidden size that transformers takes."""
        return {**numbers, "h": up(numbers["h"], lcm(8, numbers["K"] * numbers["g"]))} if self.whole_heads else numbers

    def catalogue(self) -> list[str]:
        """The models of `config/models/` that are of the family."""
        models = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in _catalogue()}
        return [name for name, model in models.items() if model["model_type"] == self.model_type]

    def kinds(self, model: Model) -> Sequence[str]:
        """The kind of each layer."""
        return "a" * model["num_hidden_layers"]

    def config(self, numbers: Mapping[str, int], kinds: Sequence[str], **more: Any) -> dict[str, Any]:
        """A configuration with these numbers, and so many layers."""
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            **{key: numbers[symbol] for symbol, key in self.keys.items()},
            "num_attention_heads": numbers["K"] * numbers["g"],
            "num_key_value_heads": numbers["K"],
            "head_dim": numbers["d"],
            "num_hidden_layers": len(kinds),
            "max_position_embeddings": 131072,
            **self.fixed,
            **more,
        }

    def particular(self, model: Model) -> dict[str, Any] | None:
        """What of a configuration is no number and decides the events; None: something that no record knows."""
        heads = model["num_attention_heads"], model.get("num_key_value_heads") or model["num_attention_heads"]
        told = all(model.get(key) is not None for key in ("num_key_value_heads", "head_dim") if key not in self.implied)
        active = (model.get("hidden_act") or self.activations[0]) in self.activations
        if heads[0] % heads[1] or not told or not active or model.get("attention_dropout"):
            return None
        numbers = {*self.keys.values(), "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"}
        rest = {
            key: value
            for key, value in model.items()
            if key not in numbers | _NO_SIZE | {"sliding_window"}
            and not (key in self.silent and value in (None, self.silent[key]))
            and not (key in self.fixed and value == self.fixed[key])
        }
        if self._window(model) is not None:
            rest["sliding"] = True
        rest["tie_word_embeddings"] = bool(rest.get("tie_word_embeddings", self.tied))
        rope = (rest.pop("rope_scaling", None) or {}) | (rest.pop("rope_parameters", None) or {})
        rope = {
            "rope_type" if key == "type" else key: value for key, value in rope.items() if key not in _NO_SIZE | _ROPE
        }
        return rest | ({"rope": rope} if rope.get("rope_type", "default") != "default" or len(rope) > 1 else {})

    def flags(self, model: Model, numbers: Numbers) -> dict[str, bool]:
        """What numbers decide beyond sizes: where a kernel, a mask or a squeezed dimension is another one."""
        window = self._window(model)
        found = {"one_row": numbers["b"] == 1, "one_group": numbers["K"] == 1, "no_groups": numbers["g"] == 1}
        found["unaligned"] = bool(numbers["d"] % 8 or numbers["h"] % 8)
        return found | ({"windowed": True} if window and numbers["s"] >= window else {})

    def _window(self, model: Model) -> int | None:
        """Tokens that attention looks back at; None: at all of them."""
        if self.slides_if is not None and not model.get(self.slides_if):
            return None
        return model.get("sliding_window", self.window)


def _catalogue() -> list[Path]:
    return sorted(data_path("models").glob("*.json"))


_KEYS = {"h": "hidden_size", "i": "intermediate_size", "V": "vocab_size"}
# Multiples of 128 where scales of quantized weights come out whole.
_POINTS = {
    "h": (1280, 1664, 896, 1408, 2176), "i": (2432, 3712, 1792, 2944), "V": (1408, 1664, 2176, 3968),
    "K": (3, 5, 2, 4), "g": (4, 2, 3, 6), "d": (128, 256, 96, 64), "b": (7, 11, 5, 8),
    "s": (640, 645, 1152, 709, 901), "r": (8, 12, 24, 20),
}  # fmt: skip
_ODD = {"d": (80, 152, 72), "h": (1000, 1496, 968), "i": (2730, 1234, 3005), "V": (50257, 1003)}
_ENDS = {
    "h": (256, 16384), "i": (512, 65536), "V": (1000, 262144), "K": (2, 64), "g": (2, 16), "d": (32, 256),
    "b": (2, 64), "s": (16, 131072), "r": (2, 512),
}  # fmt: skip
_WHOLE = {"h": (1536, 3072, 2304), "K": (4, 2, 8), "g": (3, 2, 6)}  # a hidden size that all these heads divide
_LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip


def _whole(**more: Any) -> dict[str, Any]:
    return {"whole_heads": True, "points": {**_POINTS, **_WHOLE}, "odd": {**_ODD, "h": (1200, 2064)}, **more}


FAMILIES = {
    family.model_type: family
    for family in (
        ModelFamily(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            silent={"use_sliding_window": False},
            slides_if="use_sliding_window",
            implied=frozenset({"head_dim"}),
        ),
        ModelFamily(
            model_type="llama",
            architecture="LlamaForCausalLM",
            silent={"attention_bias": False, "mlp_bias": False},
            alike=({"rope_scaling": _LLAMA3},),
            **_whole(),
        ),
        ModelFamily(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            silent={"attention_bias": False, "use_sliding_window": False},
            slides_if="use_sliding_window",
            implied=frozenset(),
        ),
        ModelFamily(
            model_type="mistral",
            architecture="MistralForCausalLM",
            fixed={"sliding_window": None},
            window=4096,
            implied=frozenset({"head_dim"}),
            alike=({"sliding_window": 2**20},),
        ),
        ModelFamily(
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            fixed={
                "sliding_window": 2**20,
                "final_logit_softcapping": 30.0,
                "attn_logit_softcapping": 50.0,
                "hidden_activation": _GELU[0],
            },
            silent={"attention_bias": False},
            window=4096,
            implied=frozenset(),
            activations=_GELU,
            tied=True,
            **_whole(),
        ),
        ModelFamily(
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            fixed={"pad_token_id": 0, "original_max_position_embeddings": 131072},
            silent={"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
            alike=({"sliding_window": 2**20},),
        ),
    )
}
