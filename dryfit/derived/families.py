"""What a record's family has to be told: which numbers its configurations have, and what of them changes the events.

A family is what a person writes for a new one, some lines. From there the recorder (:mod:`dryfit.recorder`) goes by
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import lcm
from typing import Any

from dryfit.data import data_path
from dryfit.derived.layers import Kinds, windows
from dryfit.engine.cuda_rules import SORTED_IN_PLACE, up
from dryfit.scenario.model import configuration, language_model

Model = Mapping[str, Any]
Numbers = dict[str, int]

# Keys of a configuration that change no allocation of a step: the recorder's checks and the tests at random numbers
# trace models that differ in them.
_NO_SIZE = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "layer_norm_eps",
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "router_aux_loss_coef",
    "rope_local_base_freq",
    "rope_theta",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_ROPE = {
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
}  # numbers of a table
_GELU = ("gelu_pytorch_tanh",)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Models with one code in transformers.

    Attributes
    ----------
    model_type
        As a ``config.json`` has it.
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
    sequence, order
        The kinds of the layers that are recorded, and another order of them that is checked.
    kinds_key, words, every
        The key that lists the layers' kinds, what it says by kind, and the key that says how many layers apart the
        last kind stands where they are not listed, with its value where that is left out.
    kinds_of, layers_of
        The kinds of a model's layers where no single key lists them, and what a configuration says of such layers.
    others
        Other sequences and orders, of models whose layers stand between other neighbours.
    multiples
        By symbol what its values are multiples of; a model with others has no record.
    radius
        Neighbours on either side that tell one layer's events from another's.
    unused
        Keys that the class doesn't read, with spaces between them.
    plain
        A configuration in the form that is recorded, where a class computes sizes from what a file says.
    exact_length
        Rows are cut into chunks, in a loop or padded: a record is for one length, and one number of the loss's chunks.
    chooses
        The key that says how many tokens an indexer chooses for each one. Attention has a mask of them.
    with_experts
        The models of this code whose layers have experts; those without are another family.
    """

    model_type: str
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
    order: str = "aaaaaaa"
    kinds_key: str = ""
    words: Mapping[str, Any] = field(default_factory=dict)
    every: tuple[str, int] | None = None
    kinds_of: Callable[[Model], Kinds] | None = None
    layers_of: Callable[[Kinds], Model] = lambda kinds: {}
    others: Sequence[tuple[str, str]] = ()
    multiples: Mapping[str, int] = field(default_factory=dict)
    radius: int = 2
    unused: str = ""
    plain: Callable[[Model], Model] = dict
    exact_length: bool = False
    chooses: str = ""
    with_experts: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.model_type}_experts" if self.with_experts else self.model_type

    def numbers(self, model: Model) -> Numbers:
        """The model's numbers by symbol."""
        heads = model["num_attention_heads"]
        groups = model.get("num_key_value_heads") or heads
        known = {symbol: model[key] for symbol, key in self.keys.items()}
        head = model.get("head_dim") or model["hidden_size"] // heads
        return known | {"K": groups, "g": heads // groups, "d": head}

    def possible(self, numbers: Numbers) -> Numbers:
        """The numbers with a hidden size that transformers takes, and with fewer heads of keys than of values."""
        numbers = {
            symbol: up(count, self.multiples.get(symbol, 1)) for symbol, count in numbers.items()
        }
        if self.whole_heads:
            numbers = {**numbers, "h": up(numbers["h"], lcm(8, numbers["K"] * numbers["g"]))}
        if "nk" in numbers:
            numbers = {**numbers, "nv": max(up(numbers["nv"], numbers["nk"]), 2 * numbers["nk"])}
        return numbers

    def catalogue(self) -> list[str]:
        """The models of `config/models/` that are of the family, and of which it knows what their layers are."""
        models = {
            path.stem: language_model_of(path.stem)
            for path in sorted(data_path("models").glob("*.json"))
        }
        return [
            name
            for name, model in models.items()
            if family_of(model) is self and self._knows(model)
        ]

    def _knows(self, model: Model) -> bool:
        try:
            return bool(self.kinds(self.plain(model)))
        except KeyError:
            return False

    def kinds(self, model: Model) -> Sequence[str]:
        """The kind of each layer."""
        count = model["num_hidden_layers"]
        if self.kinds_of:
            return self.kinds_of(model)
        if not self.words:
            return "a" * count
        if listed := model.get(self.kinds_key):
            letters = {word: kind for kind, word in self.words.items()}
            return [letters[word] for word in listed[:count]]
        key, apart = self.every or ("", 0)
        usual, other = self.words
        return [
            usual if (layer + 1) % (model.get(key) or apart) else other for layer in range(count)
        ]

    def layers(self, kinds: Kinds) -> dict[str, Any]:
        """What a configuration says of layers of these kinds."""
        listed = {self.kinds_key: [self.words[kind] for kind in kinds]} if self.kinds_key else {}
        return {"num_hidden_layers": len(kinds), **listed, **self.layers_of(kinds)}

    def config(
        self, numbers: Mapping[str, int], kinds: Sequence[str], **more: Any
    ) -> dict[str, Any]:
        """A configuration with these numbers, and so many layers."""
        return {
            "model_type": self.model_type,
            **{key: numbers[symbol] for symbol, key in self.keys.items()},
            "num_attention_heads": numbers["K"] * numbers["g"],
            "num_key_value_heads": numbers["K"],
            "head_dim": numbers["d"],
            **self.layers(kinds),
            "max_position_embeddings": 131072,
            **self.fixed,
            **more,
        }

    def particular(self, model: Model) -> dict[str, Any] | None:
        """What of a configuration is no number and decides the events; None: something that no record knows."""
        heads = (
            model["num_attention_heads"],
            model.get("num_key_value_heads") or model["num_attention_heads"],
        )
        told = all(
            model.get(key) is not None
            for key in ("num_key_value_heads", "head_dim")
            if key not in self.implied
        )
        active = (model.get("hidden_act") or self.activations[0]) in self.activations
        padding = model.get("pad_token_id")
        beyond = (
            isinstance(padding, int) and padding >= model["vocab_size"]
        )  # transformers doesn't build it
        beyond |= (model.get("attention_dropout") or 0.0) != self.fixed.get(
            "attention_dropout", 0.0
        )
        if heads[0] % heads[1] or not told or not active or beyond:
            return None
        numbers = {
            *self.keys.values(),
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_hidden_layers",
        }
        numbers |= {*self.unused.split(), self.kinds_key, *(self.every or ())[:1]}
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
            "rope_type" if key == "type" else key: value
            for key, value in rope.items()
            if key not in _NO_SIZE | _ROPE
        }
        return rest | (
            {"rope": rope} if rope.get("rope_type", "default") != "default" or len(rope) > 1 else {}
        )

    def flags(self, model: Model, numbers: Numbers) -> dict[str, Any]:
        """What numbers decide beyond sizes: where a kernel, a mask or a squeezed dimension is another one."""
        window = self._window(model)
        found: dict[str, Any] = {"length": numbers["s"]} if self.exact_length else {}
        found |= {
            "one_row": numbers["b"] == 1,
            "one_group": numbers["K"] == 1,
            "no_groups": numbers["g"] == 1,
        }
        found["unaligned"] = any(numbers.get(symbol, 0) % 8 for symbol in "dhmS")
        if "nk" in numbers:
            found["no_repeats"] = numbers["nv"] == numbers["nk"]
        if "e" in numbers and numbers["b"] * numbers["s"] * numbers["e"] <= SORTED_IN_PLACE:
            found["sorted_in_place"] = True  # the experts of all tokens
        if self.others and (number := self._sequence(model)):
            found["layers"] = number
        heads = numbers["K"] * numbers["g"] * numbers["d"]
        widths = {
            heads,
            *(times * numbers[symbol] for symbol in "him" if symbol in numbers for times in (1, 2)),
        }
        if numbers["V"] in widths:
            found["vocabulary_as_wide"] = (
                True  # the trace counts what is as wide as the vocabulary to the logits
            )
        if self.chooses and numbers["s"] > (model.get(self.chooses) or 0):
            found["chosen"] = True
        if window and numbers["s"] >= window:
            found["windowed"] = True
        if self.chooses or "windowed" in found:
            found["aligned"] = numbers["s"] % 8 == 0  # a mask's rows are padded to that
        return found

    @property
    def sequences(self) -> Sequence[tuple[str, str]]:
        """The kinds of the layers that are recorded, with another order of each that is checked."""
        return (self.sequence, self.order), *self.others

    def _sequence(self, model: Model) -> int:
        """Which of the sequences has layers between the same neighbours as a model's."""
        own = windows(self.kinds(model), self.radius)
        found = (
            number
            for number, (kinds, _) in enumerate(self.sequences)
            if own <= windows(kinds, self.radius)
        )
        return next(found, 0)

    def _window(self, model: Model) -> int | None:
        """Tokens that attention looks back at; None: at all of them."""
        if self.slides_if is not None and not model.get(self.slides_if):
            return None
        return model.get("sliding_window", self.window)


def family_of(model: Model) -> ModelFamily | None:
    """The family of a model; None: there is none."""
    kind = model.get("model_type", "")
    return FAMILIES.get(f"{kind}_experts" if model.get("enable_moe_block") else kind)


@cache
def language_model_of(name: str) -> Model:
    """The language model's configuration of one of the catalogue."""
    return language_model(configuration(name, "the catalogue")[0])[0]


_KEYS = {"h": "hidden_size", "i": "intermediate_size", "V": "vocab_size"}
# Multiples of 128 where scales of quantized weights come out whole.
_POINTS = {
    "h": (1280, 1664, 896, 1408, 2176),
    "i": (2432, 3712, 1792, 2944),
    "V": (1408, 1664, 2176, 3968),
    "K": (3, 5, 2, 4),
    "g": (4, 2, 3, 6),
    "d": (128, 256, 96, 64),
    "b": (7, 11, 5, 8),
    "s": (640, 645, 1152, 709, 901),
    "r": (8, 12, 24, 20),
}
_ODD = {"d": (80, 152, 72), "h": (1000, 1496, 968), "i": (2730, 1234, 3005), "V": (50257, 1003)}
_ENDS = {
    "h": (256, 16384),
    "i": (512, 65536),
    "V": (1000, 262144),
    "K": (2, 64),
    "g": (2, 16),
    "d": (32, 256),
    "b": (2, 64),
    "s": (16, 131072),
    "r": (2, 512),
}
_WHOLE = {
    "h": (1536, 3072, 2304),
    "K": (4, 2, 8),
    "g": (3, 2, 6),
}  # a hidden size that all these heads divide
_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_MROPE = {
    "mrope_interleaved": True,
    "mrope_section": [24, 20, 20],
    "rope_type": "default",
}  # of images, of no text
_YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 48.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 1e8,
    "rope_type": "yarn",
    "type": "yarn",
}
_DEEPSEEK_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
_KIMI_YARN = {**_DEEPSEEK_YARN, "beta_fast": 32.0, "beta_slow": 1.0}
_OLMO3_YARN = {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "yarn",
}
_DELTA_ROPE = {
    "mrope_interleaved": True,
    "mrope_section": [11, 11, 10],
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "rope_type": "default",
}
_GEMMA4_ROPE = {
    "full_attention": {
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
        "rope_type": "proportional",
    },
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
_WINDOWS = {"s": "sliding_attention", "f": "full_attention"}


def _whole(**more: Any) -> dict[str, Any]:
    return {
        "whole_heads": True,
        "points": {**_POINTS, **_WHOLE},
        "odd": {**_ODD, "h": (1200, 2064)},
        **more,
    }


def _sizes(without: str = "", **more: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """A family's numbers: those of most families, and others by symbol with their key, points, odd values and ends."""
    tables = {"keys": _KEYS, "points": _POINTS, "odd": _ODD, "ends": _ENDS}
    found = {
        name: {symbol: own for symbol, own in each.items() if symbol not in without}
        for name, each in tables.items()
    }
    for symbol, told in more.items():
        for name, own in zip(tables, told, strict=True):
            if own:
                found[name][symbol] = own
    return found


def _experts(width: str, count: str, *e: int, **more: Sequence[Any]) -> dict[str, Any]:
    """Of families with experts in each layer: the keys of their width and number, how many a token takes."""
    numbers: dict[str, Sequence[Any]] = {
        "h": ("hidden_size", _POINTS["h"], (1000, 1496, 968), _ENDS["h"]),
        "m": (width, (768, 896, 640, 384), (712, 1000, 520), (128, 16384)),
        "E": (count, (16, 24, 12, 40), (), (8, 512)),
        "e": ("num_experts_per_tok", e, (), (min(e), max(e))),
    }
    return {**_sizes("i", **{**numbers, **more}), "sequence": "aaa", "order": "aaaaa", "radius": 1}


_DELTA = {  # three layers of the delta rule for one of attention
    "implied": frozenset(),
    "exact_length": True,
    "kinds_key": "layer_types",
    "words": {"l": "linear_attention", "f": "full_attention"},
    "every": ("full_attention_interval", 4),
    "sequence": "lllflfllf",
    "order": "lllflllflllf",
    "radius": 1,
}
_DELTA_SIZES = {
    "V": ("vocab_size", _POINTS["V"], _ODD["V"], (1000, 262208)),
    "d": ("", (256, 128, 96), _ODD["d"], _ENDS["d"]),
    "nk": ("linear_num_key_heads", (4, 8, 2), (3, 5, 6), (2, 32)),
    "nv": ("linear_num_value_heads", (16, 32, 48), (9, 20, 18), (8, 128)),
}
_SHARED = {
    "S": ("shared_expert_intermediate_size", (1536, 1792, 1280), (1000, 712), (128, 16384)),
    "E": ("num_experts", (16, 24, 12, 40), (), (16, 512)),  # at least as many as a token takes
}
_QWEN3_5 = {
    "fixed": {"rope_parameters": _DELTA_ROPE, "attn_output_gate": True},
    "silent": {"attention_bias": False, "partial_rotary_factor": 0.25, "mlp_only_layers": []},
}
_NEMOTRON = {"M": "mamba", "E": "moe", "*": "attention"}


def _nemotron(model: Model) -> Model:
    """A configuration with a list of its layers, whose length is the number of layers."""
    rest = {key: value for key, value in model.items() if key != "hybrid_override_pattern"}
    listed = model.get("layers_block_type") or [
        _NEMOTRON[letter] for letter in model["hybrid_override_pattern"]
    ]
    return rest | {"layers_block_type": listed, "num_hidden_layers": len(listed)}


_GPT_OSS_YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}


def _lfm2(model: Model) -> Model:
    """A configuration with the width of its MLP, which the class computes from what a file says."""
    wide = model.get("block_ff_dim") or model["intermediate_size"]
    if model.get("block_auto_adjust_ff_dim", True):
        wide = int((model.get("block_ffn_dim_multiplier") or 1.0) * int(2 * wide / 3))
        wide = up(wide, model.get("block_multiple_of") or 256)
    rest = {key: value for key, value in model.items() if not key.startswith("block_")}
    return rest | {"intermediate_size": wide, "block_auto_adjust_ff_dim": False}


_DENSE_FIRST = {"d": "dense", "s": "sparse"}


def _dense_first(model: Model) -> Kinds:
    """Layers with one MLP stand before those with experts; indexers that several layers share are not recorded."""
    if (
        model.get("indexer_types")
        or model.get("index_topk_freq", 1) != 1
        or model.get("index_topk_pattern")
    ):
        raise KeyError("indexer_types")
    count, dense = model["num_hidden_layers"], model["first_k_dense_replace"]
    kinds = "d" * min(dense, count) + "s" * (count - dense)
    listed = model.get("mlp_layer_types")
    if listed and [*listed[:count]] != [_DENSE_FIRST[kind] for kind in kinds]:
        raise KeyError("mlp_layer_types")
    return kinds


def _sparse_attention(model: Model) -> Kinds:
    """As :func:`_dense_first`; t: layers with experts that take over which tokens an indexer before them chose."""
    count, own = (
        model["num_hidden_layers"],
        {"index_topk_freq": 1, "index_skip_topk_offset": 2, **model},
    )
    if model.get("index_topk_pattern"):
        raise KeyError("index_topk_pattern")
    indexers = model.get("indexer_types") or [
        "shared"
        if max(layer - own["index_skip_topk_offset"] + 1, 0) % own["index_topk_freq"]
        else "full"
        for layer in range(count)
    ]
    rest = {
        key: value
        for key, value in model.items()
        if key not in ("indexer_types", "index_topk_freq")
    }
    pairs = [*zip(_dense_first(rest), indexers[:count], strict=True)]
    if ("d", "shared") in pairs:
        raise KeyError("indexer_types")
    return ["t" if indexer == "shared" else kind for kind, indexer in pairs]


def _sparse_layers(kinds: Kinds) -> Model:
    return {
        "first_k_dense_replace": kinds.count("d"),
        "mlp_layer_types": ["dense" if kind == "d" else "sparse" for kind in kinds],
        "indexer_types": ["shared" if kind == "t" else "full" for kind in kinds],
    }


def _mimo(model: Model) -> Model:
    """A configuration with the window that the class makes of a file's."""
    size = model.get("sliding_window_size")
    rest = {key: value for key, value in model.items() if key != "sliding_window_size"}
    return rest if size is None else rest | {"sliding_window": size + 1}


_MIMO = {
    "D": ("full_attention", "dense"),
    "f": ("full_attention", "sparse"),
    "s": ("sliding_attention", "sparse"),
}


def _mimo_kinds(model: Model) -> Kinds:
    """D: full attention and one MLP; f and s: full attention or a window, and experts."""
    layers = range(model["num_hidden_layers"])
    windows = model.get("layer_types") or [
        "sliding_attention" if layer and (layer + 1) % 6 else "full_attention" for layer in layers
    ]
    mixtures = model.get("mlp_layer_types") or ["sparse" if layer else "dense" for layer in layers]
    letters = {told: kind for kind, told in _MIMO.items()}
    return [letters[windows[layer], mixtures[layer]] for layer in layers]


def _mimo_layers(kinds: Kinds) -> Model:
    windows, mixtures = zip(*(_MIMO[kind] for kind in kinds), strict=True)
    return {"layer_types": [*windows], "mlp_layer_types": [*mixtures]}


def _one_dense(model: Model) -> Kinds:
    """As :func:`_dense_first`, where the class leaves the key unread that counts the layers with one MLP."""
    if model.get("first_k_dense_replace", 1) != 1:
        raise KeyError("first_k_dense_replace")
    return _dense_first({**model, "first_k_dense_replace": 1})


def _latent_heads(model: Model) -> Model:
    """A configuration with the width of queries and keys, which no single key says."""
    return {**model, "head_dim": model["qk_nope_head_dim"] + model["qk_rope_head_dim"]}


def _latent(
    sequence: str, order: str, *others: tuple[str, str], d: int = 192, e: int = 8
) -> dict[str, Any]:
    """Of families with multi-head latent attention, whose heads' widths are no numbers here, and experts."""
    return {
        **_experts(
            "moe_intermediate_size",
            "n_routed_experts",
            e,
            E=("n_routed_experts", (16, 24, 32, 40), (), (16, 512)),
            i=("intermediate_size", _POINTS["i"], _ODD["i"], _ENDS["i"]),
            K=("", _POINTS["K"], (), (2, 128)),
            d=("", (d,), (d,), (d, d)),
        ),
        "plain": _latent_heads,
        "silent": {"attention_bias": False, "return_dict_in_generate": False, "moe_layer_freq": 1},
        "unused": (
            "first_k_dense_replace mlp_layer_types moe_router_dtype routed_scaling_factor scoring_func topk_method"
        ),
        "fixed": {"head_dim": 64},  # which the class takes from qk_rope_head_dim
        "kinds_of": _dense_first,
        "layers_of": lambda kinds: {
            "first_k_dense_replace": kinds.count("d"),
            "mlp_layer_types": [_DENSE_FIRST[kind] for kind in kinds],
        },
        "sequence": sequence,
        "order": order,
        "others": others,
        "radius": 1,
    }


def _llama4_kinds(model: Model) -> Kinds:
    """Layers with one MLP (d) or experts (m); those that rotate nothing are D and n."""
    if "layer_types" in model or "no_rope_layer_interval" in model:
        raise KeyError("layer_types")
    layers, step = range(model["num_hidden_layers"]), model.get("interleave_moe_layer_step") or 1
    mixtures = model.get("moe_layers", layers[step - 1 :: step])
    rotated = model.get("no_rope_layers") or [(layer + 1) % 4 for layer in layers]
    return ["Dndm"[2 * bool(rotated[layer]) + (layer in mixtures)] for layer in layers]


def _llama4_layers(kinds: Kinds) -> Model:
    return {
        "moe_layers": [layer for layer, kind in enumerate(kinds) if kind in "mn"],
        "no_rope_layers": [int(kind in "dm") for kind in kinds],
    }


_GEMMA: dict[str, Any] = {
    "silent": {"attention_bias": False},
    "implied": frozenset(),
    "activations": _GELU,
    "tied": True,
}
_GEMMA4_FIXED = {
    "sliding_window": 2**20,
    "hidden_activation": _GELU[0],
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": _GEMMA4_ROPE,
}
_GEMMA4_SIZES = {
    "K": ("", (4, 8, 16, 12), (), (4, 64)),
    "d": ("", (256, 128, 96), _ODD["d"], _ENDS["d"]),
    "D": ("global_head_dim", (512,), (512,), (512, 512)),
}
_GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    **_GEMMA,
    "unused": "vocab_size_per_layer_input",
    "multiples": {"K": 4},  # of the keys' heads of a layer that looks back at all tokens
    "kinds_key": "layer_types",
    "words": _WINDOWS,
    "sequence": "sssssfsssssfsssssf",
    "order": "sssssfsssssfsssssfsssssf",
    "radius": 3,
}


FAMILIES = {
    family.name: family
    for family in (
        ModelFamily(
            model_type="qwen2",
            silent={"use_sliding_window": False},
            slides_if="use_sliding_window",
            implied=frozenset({"head_dim"}),
        ),
        ModelFamily(
            model_type="llama",
            silent={"attention_bias": False, "mlp_bias": False},
            alike=({"rope_scaling": _LLAMA3},),
            **_whole(),
        ),
        ModelFamily(
            model_type="qwen3",
            silent={"attention_bias": False, "use_sliding_window": False},
            slides_if="use_sliding_window",
            implied=frozenset(),
            alike=({"rope_scaling": _MROPE},),
        ),
        ModelFamily(
            model_type="mistral",
            fixed={"sliding_window": None},
            window=4096,
            implied=frozenset({"head_dim"}),
            alike=({"sliding_window": 2**20},),
        ),
        ModelFamily(
            model_type="gemma2",
            fixed={
                "sliding_window": 2**20,
                "final_logit_softcapping": 30.0,
                "attn_logit_softcapping": 50.0,
                "hidden_activation": _GELU[0],
            },
            window=4096,
            **_whole(**_GEMMA),
        ),
        ModelFamily(
            model_type="phi3",
            fixed={"pad_token_id": 0, "original_max_position_embeddings": 131072},
            silent={"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
            alike=({"sliding_window": 2**20},),
        ),
        ModelFamily(
            model_type="qwen3_moe",
            fixed={"decoder_sparse_step": 1, "mlp_only_layers": []},
            silent={"attention_bias": False, "use_sliding_window": False},
            slides_if="use_sliding_window",
            implied=frozenset(),
            unused="intermediate_size qkv_bias shared_expert_intermediate_size use_qk_norm",
            alike=({"rope_scaling": _MROPE},),
            **_experts("moe_intermediate_size", "num_experts", 8),
        ),
        ModelFamily(
            model_type="mixtral",
            fixed={"sliding_window": None},
            implied=frozenset({"head_dim"}),
            **_experts("intermediate_size", "num_local_experts", 2),
        ),
        ModelFamily(
            model_type="minimax_m2",
            implied=frozenset(),
            unused=(
                "attn_type_list num_mtp_modules qk_norm_type scoring_func shared_intermediate_size use_mtp "
                "use_qk_norm use_routing_bias"
            ),
            **_experts(
                "intermediate_size",
                "num_local_experts",
                8,
                d=("", (128, 256, 96, 160), (80, 152, 72), (72, 256)),
            ),
        ),
        ModelFamily(
            model_type="qwen3_5_text",
            **{**_QWEN3_5, **_sizes(**_DELTA_SIZES), **_DELTA},
        ),
        ModelFamily(
            model_type="qwen3_5_moe_text",
            **{
                **_QWEN3_5,
                **_experts(
                    "moe_intermediate_size", "num_experts", 8, 6, 10, 12, **_DELTA_SIZES, **_SHARED
                ),
                **_DELTA,
            },
        ),
        ModelFamily(
            model_type="qwen3_next",
            fixed={"decoder_sparse_step": 1, "mlp_only_layers": []},
            silent={"attention_bias": False, "use_sliding_window": False},
            unused="intermediate_size",
            **{
                **_experts(
                    "moe_intermediate_size", "num_experts", 10, 8, 6, 12, **_DELTA_SIZES, **_SHARED
                ),
                **_DELTA,
            },
        ),
        ModelFamily(
            model_type="nemotron_h",
            silent={
                "attention_bias": False,
                "mlp_bias": False,
                "use_bias": False,
                "mamba_proj_bias": False,
            },
            implied=frozenset(),
            unused=(
                "intermediate_size layer_norm_epsilon moe_shared_expert_overlap norm_eps routed_scaling_factor "
                "time_step_floor time_step_limit time_step_max time_step_min"
            ),
            plain=_nemotron,
            multiples={"N": 8},
            exact_length=True,
            kinds_key="layers_block_type",
            words=_NEMOTRON,
            **{
                **_experts(
                    "moe_intermediate_size",
                    "n_routed_experts",
                    *(6, 4, 8, 22, 16),
                    S=("moe_shared_expert_intermediate_size", *_SHARED["S"][1:]),
                    E=("n_routed_experts", (32, 48, 24, 40), (), (24, 512)),
                    N=("mamba_num_heads", (32, 64, 16), (24, 40, 56), (16, 256)),
                    g=("", _POINTS["g"], (), (2, 32)),
                ),
                "sequence": "MEMEM*EM*EM*EME",
                "order": "MEMEMEM*EM*EM*EMEM*EMEME",
            },
        ),
        ModelFamily(
            model_type="lfm2",
            fixed={"block_auto_adjust_ff_dim": False},
            unused="norm_eps",
            tied=True,
            plain=_lfm2,
            kinds_key="layer_types",
            words={"c": "conv", "f": "full_attention"},
            sequence="ccfccfcfc",
            order="ccfccfccfcfcfcfc",
            radius=1,
            **_whole(),
        ),
        ModelFamily(
            model_type="gpt_oss",
            unused="experts_per_token initial_context_length swiglu_limit",
            window=128,
            implied=frozenset(),
            alike=({"rope_scaling": _GPT_OSS_YARN},),
            kinds_key="layer_types",
            words=_WINDOWS,
            **{
                **_experts("intermediate_size", "num_local_experts", 4),
                "sequence": "sfsfsf",
                "order": "sfsfsfsfsf",
            },
        ),
        ModelFamily(
            model_type="llama4_text",
            fixed={"num_experts_per_tok": 1},  # each expert computes all tokens
            silent={"attention_bias": False, "attention_chunk_size": 8192},
            unused="interleave_moe_layer_step moe_layers no_rope_layers",
            implied=frozenset(),
            alike=({"rope_scaling": {**_LLAMA3, "factor": 16.0, "high_freq_factor": 1.0}},),
            kinds_of=_llama4_kinds,
            layers_of=_llama4_layers,
            sequence="dmdndmdndmdn",
            order="dmdndmdndmdndmdn",
            others=(("mmmnmmmnmmmn", "mmmnmmmnmmmnmmmn"),),
            **_sizes(
                i=("intermediate_size_mlp", _POINTS["i"], _ODD["i"], _ENDS["i"]),
                m=("intermediate_size", (768, 896, 640, 384), (712, 1000, 520), (128, 16384)),
                E=("num_local_experts", (16, 24, 12, 40), (), (8, 512)),
                s=("", _POINTS["s"], (), (16, 8191)),  # from 8192 on the chunks have a mask
            ),
        ),
        ModelFamily(
            model_type="phi",
            silent={"embd_pdrop": 0.0},
            activations=("gelu_new", "gelu_fast"),
            multiples={"d": 40},  # of which a part of 0.4 is rotated, rounded down
            whole_heads=True,
            **_sizes(
                h=("", _WHOLE["h"], (1200, 2064), ()),
                d=("", (80, 160, 120), (120, 80, 160), (80, 160)),
            ),
        ),
        ModelFamily(
            model_type="deepseek_v3",
            multiples={"E": 8},
            alike=({"rope_scaling": _DEEPSEEK_YARN}, {"rope_scaling": _KIMI_YARN}),
            **_latent("dddsss", "dddsssss", ("dsss", "dsssss")),
        ),
        ModelFamily(
            model_type="glm4_moe_lite",
            **{**_latent("dsss", "dsssss", d=256, e=4), "kinds_of": _one_dense},
        ),
        ModelFamily(
            model_type="deepseek_v32",
            multiples={"E": 8},
            alike=({"rope_scaling": _DEEPSEEK_YARN},),
            chooses="index_topk",
            **_latent("dddsss", "dddsssss"),
        ),
        ModelFamily(
            model_type="glm_moe_dsa",
            chooses="index_topk",
            **{
                **_latent(
                    "dddsss", "dddsssss", ("dddtttsttsttstt", "dddtttstttstttstttsttt"), d=256
                ),
                "kinds_of": _sparse_attention,
                "layers_of": _sparse_layers,
                "unused": (
                    "first_k_dense_replace mlp_layer_types moe_router_dtype routed_scaling_factor scoring_func "
                    "topk_method index_share_for_mtp_iteration index_skip_topk_offset index_topk_freq indexer_types"
                ),
            },
        ),
        ModelFamily(
            model_type="mimo_v2_flash",
            implied=frozenset(),
            silent={"attention_bias": False},
            window=129,
            plain=_mimo,
            unused=(
                "add_full_attention_sink_bias add_swa_attention_sink_bias attention_chunk_size hybrid_layer_pattern "
                "layer_types layernorm_epsilon mlp_layer_types moe_layer_freq routed_scaling_factor scoring_func "
                "swa_head_dim swa_num_attention_heads swa_num_key_value_heads swa_rope_theta swa_v_head_dim topk_method"
            ),
            multiples={"g": 2},
            kinds_of=_mimo_kinds,
            layers_of=_mimo_layers,
            **{
                **_experts(
                    "moe_intermediate_size",
                    "n_routed_experts",
                    8,
                    i=("intermediate_size", _POINTS["i"], _ODD["i"], _ENDS["i"]),
                    d=(
                        "",
                        (192,),
                        (192,),
                        (192, 192),
                    ),  # of which a part of 0.334 is rotated, rounded down
                    g=("", (4, 6, 8, 12), (), (4, 16)),  # layers with a window have half as many
                    E=("n_routed_experts", (16, 24, 32, 40), (), (16, 512)),
                ),
                "sequence": "Dsssfsssfsssf",
                "order": "Dssssfsssssfsssssf",
            },
        ),
        ModelFamily(
            fixed={**_GEMMA4_FIXED, "enable_moe_block": False},
            **{**_sizes(**_GEMMA4_SIZES), **_GEMMA4},
        ),
        ModelFamily(
            fixed={**_GEMMA4_FIXED, "enable_moe_block": True},
            with_experts=True,
            **{
                **_experts(
                    "moe_intermediate_size",
                    "num_experts",
                    8,
                    i=("intermediate_size", _POINTS["i"], _ODD["i"], _ENDS["i"]),
                    e=("top_k_experts", (8,), (), (8, 8)),
                    **_GEMMA4_SIZES,
                ),
                **_GEMMA4,
            },
        ),
        ModelFamily(
            model_type="gemma",
            **_whole(**_GEMMA),
        ),
        ModelFamily(
            model_type="starcoder2",
            fixed={
                "sliding_window": 2**20,
                "use_bias": True,
                "attention_dropout": 0.1,
                "embedding_dropout": 0.1,
                "residual_dropout": 0.1,
            },
            unused="norm_epsilon",
            window=4096,
            activations=_GELU,
            tied=True,
        ),
        ModelFamily(
            model_type="ministral3",
            fixed={"rope_parameters": _YARN},
            implied=frozenset(),
        ),
        ModelFamily(
            model_type="olmo2",
            silent={"attention_bias": False},
            **_whole(),
        ),
        ModelFamily(
            model_type="gemma3_text",
            fixed={"sliding_window": 2**20, "hidden_activation": _GELU[0]},
            window=4096,
            alike=({"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},),
            kinds_key="layer_types",
            words=_WINDOWS,
            every=("sliding_window_pattern", 6),
            sequence="sssfsfsfss",
            order="sssssfsssssfsssssfssss",
            others=(("sssfsfsssf", "sssssfsssssfsssssf"),),
            radius=1,
            ends={**_ENDS, "V": (1000, 262208)},  # a multiple of 64 above Gemma 2's
            **_whole(
                **{
                    **_GEMMA,
                    "silent": {
                        "attention_bias": False,
                        "final_logit_softcapping": None,
                        "attn_logit_softcapping": None,
                    },
                }
            ),
        ),
        ModelFamily(
            model_type="olmo3",
            fixed={"sliding_window": 2**20},
            silent={"attention_bias": False},
            window=4096,
            alike=({"rope_scaling": _OLMO3_YARN},),
            kinds_key="layer_types",
            words=_WINDOWS,
            every=("", 4),
            sequence="sssfsfsssf",
            order="sssfsssfsssfsssf",
            radius=1,
            **_whole(),
        ),
        ModelFamily(
            model_type="exaone4",
            fixed={"sliding_window": 2**20},
            silent={"sliding_window_pattern": "LLLG"},
            window=4096,
            implied=frozenset(),
            alike=({"rope_scaling": _LLAMA3},),
            kinds_key="layer_types",
            words=_WINDOWS,
            sequence="sssfsfsssf",
            order="sssfsssfsssfsssf",
            radius=1,
        ),
        ModelFamily(
            model_type="smollm3",
            fixed={"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
            silent={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
            slides_if="use_sliding_window",
            tied=True,
            kinds_key="no_rope_layers",
            words={"r": 1, "n": 0},
            every=("no_rope_layer_interval", 4),
            sequence="rrrnrnrrrn",
            order="rrrnrrrnrrrnrrrn",
            radius=1,
            **_whole(),
        ),
    )
}
