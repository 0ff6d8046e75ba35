"""What a scenario decides for the analytic estimate: its decoder, widths, attention's kernel; what is not described."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dryfit.analytic.decoder import Decoder, Matrix, NotDescribed
from dryfit.analytic.families import FAMILIES, Family
from dryfit.analytic.hybrids import Hybrid
from dryfit.common.errors import UserError
from dryfit.engine.bitsandbytes_rules import BLOCK
from dryfit.engine.components import weights
from dryfit.engine.cuda_rules import (
    BIAS_ALIGNMENT,
    LOG_SUM_EXP_ALIGNMENT,
    PLATFORMS,
    WIDTH,
    Capability,
    flash_padding,
    up,
)
from dryfit.engine.cuda_rules import attention_kernel as kernel_of_attention
from dryfit.scenario.fields import CHUNK_TOKENS, FIELDS
from dryfit.scenario.model import size
from dryfit.scenario.scenario import Scenario

LARGEST_GROUPED_HEAD = 256  # elements


# --- which decoder ----------------------------------------------------------------------------------------------------


def _window(model: Mapping[str, Any], read: Callable[[str], Any]) -> int:
    """Tokens that attention looks back in some layers; 0: all. A window of null means all, not the class's default."""
    used = model.get("use_sliding_window", not str(model["model_type"]).startswith("qwen"))
    if not used or model.get("sliding_window", 1) is None:
        return 0
    return read("sliding_window") or 0


def describe(model: Mapping[str, Any]) -> Decoder | Hybrid:
    """Describe a decoder's weights from its transformers configuration; of a :class:`Decoder` the step follows too.

    NotDescribed: for a family that the table does not know, or a configuration whose layers differ from each other.
    """
    kind = model["model_type"]
    family = FAMILIES.get(kind)
    if model.get("quantization_config"):
        raise NotDescribed("the analytic estimate does not describe weights that come quantized")
    if family is None:
        from dryfit.analytic.hybrid_weights import (
            hybrid,
        )  # for dense decoders it would be of no use

        return hybrid(model)
    if model.get("mlp_only_layers") or model.get("decoder_sparse_step", 1) != 1:
        raise NotDescribed("the analytic estimate does not describe experts in some layers only")

    def read(name: str, default: Any = None) -> Any:
        return size(model, name, family.defaults.get(name, default))

    hidden, heads = read("hidden_size"), read("num_attention_heads")
    groups = read("num_key_value_heads") or heads
    head = model.get("head_dim") or family.own_head_dim or hidden // heads
    intermediate = read(family.expert_width) or 4 * hidden
    experts = int(model.get("num_local_experts") or read(family.experts)) if family.experts else 0
    flag = lambda key: key if isinstance(key, bool) else bool(read(key, False))  # noqa: E731
    sizes = {
        **({"E": experts, "e": read("num_experts_per_tok")} if experts else {}),
        "h": hidden,
        "i": intermediate,
        "a": heads * head,
        "k": groups * head,
        "V": read("vocab_size"),
        "L": read("num_hidden_layers"),
        "H": heads,
        "K": groups,
        "d": head,
    }
    attention, mlp = _matrices(family, flag, dense=not experts)
    rotary = family.rotary
    if rotary and kind in ("phi", "phi3"):
        parameters = model.get("rope_parameters") or {}
        rotary = parameters.get("partial_rotary_factor", model.get("partial_rotary_factor", rotary))
    dropout = [float(read(key, 0.0) or 0.0) if key else 0.0 for key in (*family.dropout, "", "")]
    attention_dropout = read("attn_pdrop" if kind == "gpt2" else "attention_dropout", 0.0) or 0.0
    return Decoder(
        family=family,
        model_type=kind,
        sizes=sizes,
        attention=attention,
        mlp=mlp,
        tied=bool(model.get("tie_word_embeddings", family.defaults["tie_word_embeddings"])),
        activation=str(
            model.get(family.activation) or family.defaults.get(family.activation) or "silu"
        ),
        qk_norm=flag(family.qk_norm),
        rotary=float(rotary),
        softcap=bool(read("attn_logit_softcapping")),
        logit_softcap=bool(read("final_logit_softcapping")),
        embedding_dropout=dropout[0],
        residual_dropout=dropout[1],
        attention_dropout=float(attention_dropout),
        positions=read("max_position_embeddings") if family.positions else 0,
        window=_window(model, read),
        experts=experts,
    )


def _matrices(
    family: Family, flag: Callable[[str | bool], bool], dense: bool
) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
    """The matrices of a layer's attention and of its MLP; experts have theirs elsewhere."""
    output, up, down, gate = family.names
    qkv, bias = flag(family.qkv_bias), flag(family.mlp_bias)
    if family.fused_qkv:
        attention = (Matrix(family.fused_qkv, "a+k+k", "h", qkv),)
    else:
        attention = tuple(
            Matrix(f"{x}_proj", width, "h", qkv)
            for x, width in (("q", "a"), ("k", "k"), ("v", "k"))
        )
    attention += (Matrix(output, "h", "a", flag(family.o_bias)),)
    last = Matrix(down, "h", "i", bias)
    if not dense:
        return attention, ()
    if family.fused_gate_up:
        return attention, (Matrix(family.fused_gate_up, "i+i", "h", bias), last)
    if family.gated:
        return attention, (Matrix(gate, "i", "h", bias), Matrix(up, "i", "h", bias), last)
    return attention, (Matrix(up, "i", "h", bias), last)


def described(scenario: Scenario, where: object = "scenario") -> Decoder:
    """The decoder of a scenario, with the checks that need its layers: target modules, learned positions.

    NotDescribed: Also where the layers are known by their weights alone.
    """
    decoder = describe(scenario.model)
    if scenario.lora:
        decoder.targets(scenario.lora, where)
    if isinstance(decoder, Hybrid):
        kind = scenario.model["model_type"]
        raise NotDescribed(
            f"the analytic estimate does not describe the layers of {kind}, whose steps are traced"
        )
    if decoder.positions and scenario.sequence_length > decoder.positions:
        raise UserError(
            f"`sequence_length` is beyond the {decoder.positions} positions of the model.",
            where=where,
            found=scenario.sequence_length,
            allowed=f"1 to {decoder.positions}",
            change={"sequence_length": decoder.positions},
        )
    return decoder


# --- what a scenario means for it --------------------------------------------------------------------------------


def check_described(scenario: Scenario) -> None:
    """Refuse what the estimate would silently get wrong.

    NotDescribed: for the first field whose value is not described.
    """
    for field in FIELDS:
        value = getattr(scenario, field.name)
        if not field.in_closed_form(value):
            value = value.get("peft_type", value) if isinstance(value, dict) else value
            raise NotDescribed(f"the analytic estimate does not describe {field.name}: {value}")
        for part in field.parts if value is not None else ():
            own = getattr(value, part.name)
            if not part.in_closed_form(own):
                raise NotDescribed(
                    f"the analytic estimate does not describe {field.name}.{part.name}: {own}"
                )
    cast, own = scenario.autocast_precision, scenario.weight_precision
    if cast is not None and own not in (
        "fp32",
        cast,
    ):  # products cast both operands, which have the same width
        raise NotDescribed(
            f"the analytic estimate does not describe autocast to {cast} over weights in {own}"
        )
    if scenario.parallel.sharded and scenario.autocast_precision is not None:
        raise NotDescribed(
            "the analytic estimate does not describe FSDP2 under autocast, which gathers weights cast"
        )


@dataclass(frozen=True)
class Setting:
    """A scenario on a decoder and a GPU, by what it means for sizes."""

    decoder: Decoder
    scenario: Scenario
    capability: Capability

    @property
    def full(self) -> bool:
        """Whether every weight is trained."""
        return self.scenario.method == "full"

    @property
    def quantized(self) -> bool:
        """Whether linear layers are packed to 4 bits."""
        return self.scenario.method == "qlora"

    @property
    def nested(self) -> bool:
        """Whether the scales of 4-bit weights are quantized too."""
        return self.quantized and self.scenario.quantization.double

    @property
    def autocast(self) -> bool:
        """Whether the step runs under autocast, products then in 16 bits."""
        return self.scenario.autocast_precision is not None

    @property
    def dtype(self) -> str:
        """Dtype that the model is loaded in, and that 4-bit products are computed in."""
        return self.scenario.weight_precision

    @property
    def dense_width(self) -> int:
        """Bytes of an element of that dtype."""
        return WIDTH[self.dtype]

    def weight_width(self, group: str) -> int:
        """Bytes of an element of weights that are not packed, by group (:meth:`Decoder.weight_shapes`).

        PEFT's k-bit preparation turns all of them to fp32, TRL's norms and biases alone.
        """
        prepared = {"none": (), "peft": (group,), "trl": ("norms", "biases")}[
            self.scenario.kbit_preparation
        ]
        return 4 if group in prepared else self.dense_width

    def weight_component(self, group: str) -> str:
        """Component of such weights."""
        return weights("fp32" if self.weight_width(group) == 4 else self.dtype)

    @property
    def adapter_width(self) -> int:
        """Bytes of an element of an adapter."""
        return WIDTH[self.scenario.adapter_dtype]

    def trained_shapes(self) -> list[tuple[int, int, int]]:
        """Trained tensors that get a gradient, as this GPU has them: (bytes of an element, elements, how many such)."""
        if self.scenario.lora:
            shapes = self.decoder.adapter_shapes(self.scenario.lora)
            return [
                (self.adapter_width, self.share(elements), times) for _, elements, times in shapes
            ]
        shapes = self.decoder.weight_shapes()
        return [(self.dense_width, self.share(elements), times) for _, elements, _, times in shapes]

    def state_width(self, width: int) -> int:
        """Bytes of an element of an optimizer state that is no 8-bit one, for what takes ``width`` bytes itself."""
        return 4 if self.scenario.has_wider_states else width

    # --- several GPUs ---

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and optimizer states are divided among GPUs."""
        return self.scenario.parallel.sharded

    @property
    def packed_sharded(self) -> bool:
        """Whether 4-bit weights are divided too: FSDP2 leaves those stored as integers whole on each GPU."""
        return self.sharded and self.quantized and self.scenario.quantization.storage != "uint8"

    def share(self, count: int) -> int:
        """The first GPU's share of elements that are divided; all of them if none are.

        FSDP2 divides rows, so that the share may be up to a row larger where GPUs don't divide the rows.
        """
        return -(-count // self.scenario.parallel.gpus) if self.sharded else count

    # --- attention ---

    @property
    def windowed(self) -> bool:
        """Whether some layers' attention gets a mask, since it might not look back over the whole text.

        Source: transformers masking_utils.py, _ignore_causal_mask_sdpa (a window as long as the text makes one too).
        """
        return 0 < self.decoder.window <= self.scenario.sequence_length

    @property
    def packed(self) -> bool:
        """Whether rows share a sequence: the batch brings positions of each row, and masks for all layers."""
        return self.scenario.packing != "none"

    @property
    def padded(self) -> bool:
        """Whether the batch says which tokens are padding: then each row has a mask of its own, for all layers."""
        return self.scenario.attention_mask == "padding"

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask."""
        return self.packed or self.padded or self.windowed

    @property
    def packing_masks(self) -> int:
        """How many masks a packed batch brings: one, or where layers alternate (Gemma 2, 3) one for each kind.

        NotDescribed: where the configuration gives the kind of each layer by numbers that the decoder doesn't keep.
        """
        if self.decoder.window and self.scenario.model["model_type"].startswith("qwen"):
            raise NotDescribed(
                "the analytic estimate does not describe packing where some layers have a window"
            )
        return 2 if self.decoder.family.post_norms else 1

    @property
    def mask_width(self) -> int:
        """Bytes of an element of them: the dtype of queries (dryfit.step.packing.mask_dtype)."""
        if self.scenario.kbit_preparation == "peft" and not self.autocast:
            return 4
        return WIDTH[self.scenario.compute_precision]

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        return self.decoder.sizes["H"] != self.decoder.sizes["K"]

    def attention_dtype(self, width: int) -> str:
        """The dtype that attention computes in on queries whose elements take ``width`` bytes."""
        return self.scenario.compute_precision if self.autocast or width == 2 else "fp32"

    def attention_kernel(self, width: int) -> str:
        """What runs on queries whose elements take ``width`` bytes: eager, or a kernel of the fused attention."""
        if self.scenario.attention != "sdpa":
            return self.scenario.attention
        if not self.decoder.family.sdpa:
            return "eager"
        head = self.decoder.sizes["d"]
        # With a mask, or with large heads, transformers repeats keys and values (sdpa_attention.py, use_gqa_in_sdpa).
        return kernel_of_attention(
            self.attention_dtype(width),
            head,
            head,
            grouped=self.grouped and not self.masked and head <= LARGEST_GROUPED_HEAD,
            masked=self.masked,
            capability=self.capability,
            enabled=PLATFORMS[self.scenario.platform],
        )

    def symbols(self) -> dict[str, int]:
        """The numbers behind the symbols of formulas."""
        scenario, decoder = self.scenario, self.decoder
        length, head = scenario.sequence_length, decoder.sizes["d"]
        learned = scenario.tokens - scenario.micro_batch  # the first token of a row is no target
        flash_length = flash_padding(length, head)[0]
        sizes = {
            **decoder.sizes,
            "1": 1,
            "b": scenario.micro_batch,
            "s": length,
            "t": scenario.tokens,
            "p": decoder.positions,
            "r": scenario.lora.rank if scenario.lora else 0,
            "n": learned,
            "c": min(CHUNK_TOKENS, learned),
            "s8": up(length, BIAS_ALIGNMENT),
            "s32": up(length, LOG_SUM_EXP_ALIGNMENT),
            "s128": flash_length,
        }
        for matrix in decoder.matrices:
            sizes[f"{matrix.outputs}·{matrix.inputs}/{BLOCK}"] = -(
                -decoder.elements(matrix) // BLOCK
            )
        return sizes
