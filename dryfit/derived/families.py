"""What a record's family has to be told: which numbers its configurations have, and what of them changes the events.

A family is what a person writes for a new one, some lines. From there the recorder (:mod:`dryfit.recorder`) goes by
itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dryfit.data import data_path

Model = Mapping[str, Any]
Numbers = dict[str, int]

# Keys of a configuration that change no allocation of a step: the recorder's checks and the tests at random numbers
# trace models that differ in them.
_NO_SIZE = {
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "hidden_act", "initializer_range",
    "max_position_embeddings", "max_window_layers", "model_type", "pad_token_id", "pretraining_tp", "rms_norm_eps",
    "rope_theta", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_ROPE = {"factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"}  # numbers of a table
_SILENT = {"attention_dropout": 0.0, "hidden_act": "silu"}  # the values that those keys have to have


@dataclass(frozen=True, kw_only=True)
class Family:
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
    only_with
        Keys that count only where another one is true.
    alike
        Keys and values that leave the events as they are, checked by the recorder.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str] = field(default_factory=lambda: dict(_KEYS))
    points: Mapping[str, Sequence[int]] = field(default_factory=lambda: dict(_POINTS))
    odd: Mapping[str, Sequence[int]] = field(default_factory=lambda: dict(_ODD))
    ends: Mapping[str, tuple[int, int]] = field(default_factory=lambda: dict(_ENDS))
    fixed: Mapping[str, Any] = field(default_factory=dict)
    silent: Mapping[str, Any] = field(default_factory=dict)
    only_with: Mapping[str, str] = field(default_factory=dict)
    alike: Sequence[Model] = ()
    whole_heads: bool = False  # the hidden size is a multiple of the heads
    window: Callable[[Model], int | None] = lambda model: None
    tied: bool = False  # what the configuration's class takes where a file leaves it out
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
        heads = 2 * numbers["K"] * numbers["g"]
        return {**numbers, "h": -(-numbers["h"] // heads) * heads} if self.whole_heads else numbers

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
        if heads[0] % heads[1] or any(model.get(key, value) != value for key, value in _SILENT.items()):
            return None
        numbers = {*self.keys.values(), "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"}
        rest = {
            key: value
            for key, value in model.items()
            if key not in numbers | _NO_SIZE
            and not (key in self.silent and value in (None, self.silent[key]))
            and not (key in self.fixed and value == self.fixed[key])
        }
        for key, said_by in self.only_with.items():
            if not model.get(said_by):
                rest.pop(key, None)
        rest["tie_word_embeddings"] = bool(rest.get("tie_word_embeddings", self.tied))
        rope = (rest.pop("rope_scaling", None) or {}) | (rest.pop("rope_parameters", None) or {})
        rope = {
            "rope_type" if key == "type" else key: value for key, value in rope.items() if key not in _NO_SIZE | _ROPE
        }
        return rest | ({"rope": rope} if rope.get("rope_type", "default") != "default" or len(rope) > 1 else {})

    def flags(self, model: Model, numbers: Numbers) -> dict[str, bool]:
        """What numbers decide beyond sizes: where a kernel, a mask or a squeezed dimension is another one."""
        window = self.window(model)
        found = {"one_row": numbers["b"] == 1, "one_group": numbers["K"] == 1, "no_groups": numbers["g"] == 1}
        found["unaligned"] = bool(numbers["d"] % 8 or numbers["h"] % 8)
        return found | ({"windowed": numbers["s"] >= window} if window else {})


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
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            silent={"use_sliding_window": False},
            only_with={"sliding_window": "use_sliding_window"},
        ),
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            silent={"attention_bias": False, "mlp_bias": False},
            alike=({"rope_scaling": _LLAMA3},),
            **_whole(),
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            silent={"attention_bias": False, "use_sliding_window": False},
            only_with={"sliding_window": "use_sliding_window"},
        ),
    )
}
