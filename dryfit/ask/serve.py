"""Serving, the other half of the question: weights, and keys and values for a length and a number of requests.

The weights as they will be served: in 16 bits (merged, or base and adapter), in NF4, or in a GGUF quantization. Keys
and values follow from the configuration: layers x 2 x key-value heads x head size x tokens. What the forward pass takes
beside them is traced, where torch is installed: reading one prompt of the whole length, the most that a request takes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.hybrids import Hybrid
from dryfit.analytic.setting import describe
from dryfit.ask.options import BITS
from dryfit.ask.question import Question
from dryfit.cards.beside import ALONE, beside
from dryfit.cards.gpus import Gpu
from dryfit.cards.sentences import has_usable, sentence, smallest
from dryfit.cards.verdict import Verdict
from dryfit.common.errors import UserError
from dryfit.common.text import gib
from dryfit.scenario.scenario import Scenario


@dataclass(frozen=True)
class Serving:
    """What serving takes; ``step_bytes``: what the forward pass needs beside weights, keys and values."""

    model: str
    weights: str
    requests: int
    tokens: int
    weights_bytes: int
    cache_bytes: int
    cache_bytes_a_token: int
    step_bytes: int
    step_is: str
    gpu: Gpu | None

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.step_bytes

    @property
    def verdict(self) -> Verdict:
        """Whether it fits, beside what a server's process holds; the step's length is fixed, so no fragments grow."""
        if self.gpu is None:
            return Verdict()
        own = replace(beside(ALONE, self.gpu), least_share=0.0, most_share=0.0, evidence="")
        return Verdict(self.gpu.usable_bytes - self.total_bytes, self.total_bytes, own)

    @property
    def most_requests(self) -> int | None:
        """How many requests of the length fit the GPU."""
        if self.gpu is None:
            return None
        room = self.gpu.usable_bytes - self.weights_bytes - self.step_bytes
        return max(0, room // (self.cache_bytes_a_token * self.tokens))

    def to_mapping(self) -> dict[str, Any]:
        kept = {name: value for name, value in asdict(self).items() if name != "gpu"}
        more = {
            "total_bytes": self.total_bytes,
            **self.verdict.to_mapping(),
            "most_requests": self.most_requests,
        }
        return kept | more | {"gpu": self.gpu.to_mapping() if self.gpu else None}

    def text(self) -> str:
        need = f"serving needs {gib(self.total_bytes)}"
        if self.gpu is None:
            first = f"{need[0].upper()}{need[1:]}: {_smallest(self.total_bytes)}"
        else:
            first = sentence(self.verdict, need, has_usable(self.gpu.to_mapping()))
        of = f"{self.requests} request{'s' if self.requests > 1 else ''} of {self.tokens:,} tokens"
        lines = [
            first,
            f"for: {self.model}, weights in {self.weights}, {of}",
            f"  {gib(self.weights_bytes):>10}  weights",
            f"  {gib(self.cache_bytes):>10}  keys and values, {self.cache_bytes_a_token / 1024:,.0f} KiB a token",
            f"  {gib(self.step_bytes):>10}  the forward pass, {self.step_is}",
        ]
        if self.most_requests:
            lines.append(f"at most {self.most_requests:,} such requests at once fit this GPU")
        elif self.gpu is not None:
            one = self.weights_bytes + self.step_bytes + self.cache_bytes_a_token * self.tokens
            fewer = (
                "or shorter requests (-s)"
                if BITS[self.weights] <= 5
                else "or fewer bits: --weights q4_k_m"
            )
            lines.append(f"one such request needs {gib(one)}: {_smallest(one)}; {fewer}")
        lines.append(
            "a server that takes memory in advance (vLLM: 90 % of the GPU) has room for more with the rest"
        )
        return "\n".join(lines)


def _smallest(needed_bytes: int) -> str:
    """The smallest card that has it; serving is not divided here."""
    return smallest(needed_bytes).partition(";")[0]


def refuse_several(asked: Question) -> None:
    """Refuse to serve on several GPUs."""
    if asked.scenario.parallel.gpus > 1:
        raise UserError(
            "Serving on several GPUs has no answer: weights and cache are counted on one.",
            where="--gpu",
            found=f"{asked.scenario.parallel.gpus} GPUs",
            allowed="one GPU",
            change={"gpu": asked.gpu.name} if asked.gpu else None,
        )


def serve(asked: Question, requests: int, weights: str | None) -> Serving:
    """What serving a model takes.

    UserError: for an unknown quantization, or an architecture whose keys and values are not described.
    """
    scenario = asked.scenario
    refuse_several(asked)
    kind = (
        weights
        or ("nf4" if scenario.method == "qlora" and "method" in asked.asked.mapping else "bf16")
    ).lower()
    if kind not in BITS:
        raise UserError(
            "This format of weights is not known.",
            where="--weights",
            found=weights,
            allowed=", ".join(BITS),
            write="--weights q4_k_m",
        )
    try:
        decoder = describe(scenario.model)
        if isinstance(decoder, Hybrid):
            raise NotDescribed("its layers keep states of several kinds")
    except NotDescribed as error:
        raise UserError(
            f"What serving this architecture takes is not described: {error}.",
            where=asked.where,
            found=f"model_type {scenario.model['model_type']}",
            allowed="a decoder that the analytic estimate describes: Llama, Qwen, Mistral, Gemma, Phi, ...",
        ) from None
    counts = decoder.parameter_counts()
    packed = counts["linear"] + counts.get("experts", 0)
    rest = counts["total"] - packed
    all_packed = kind.startswith(("q", "int"))  # GGUF quantizes embeddings and head too
    size = round(
        packed * BITS[kind] / 8
        + rest * (BITS[kind] / 8 if all_packed else (4 if kind == "fp32" else 2))
    )
    a_token = 2 * decoder.sizes["L"] * decoder.sizes["k"] * 2
    step, how = _step(scenario, decoder.sizes, kind, asked.gpu)
    return Serving(
        scenario.model_name or scenario.model["model_type"],
        kind,
        requests,
        scenario.sequence_length,
        size,
        requests * scenario.sequence_length * a_token,
        a_token,
        step,
        how,
        asked.gpu,
    )


def _step(
    scenario: Scenario, sizes: Mapping[str, int], kind: str, gpu: Gpu | None
) -> tuple[int, str]:
    """What the forward pass of one request needs beside weights and cache: traced where torch is there.

    It computes in 16 bits unless the weights have 32: a training's dtype says nothing of it.
    """
    tokens, capability = scenario.sequence_length, (gpu and gpu.capability) or (8, 0)
    try:
        import torch

        from dryfit.engine.trace import Options, trace_step
        from dryfit.tracing.evaluation_memory import Evaluation, build
        from dryfit.tracing.imports import import_quietly

        import_quietly(scenario)
    except ImportError:
        return tokens * (4 * sizes["h"] + 3 * sizes["i"]) * 2 + 6 * sizes["V"], "estimated"
    half = "bfloat16" if kind != "fp16" and capability >= (8, 0) else "float16"
    dtype = "float32" if kind == "fp32" else half
    model = build(Evaluation(scenario.model, dtype, [], 1, 1), "meta")

    def step() -> None:
        with torch.inference_mode():
            model(
                torch.zeros(1, tokens, dtype=torch.long, device="meta"),
                use_cache=True,
                logits_to_keep=1,
            ).logits.float()

    report = trace_step(
        model, None, step, options=Options(steps=1, scalars=0, capability=capability)
    )
    weights = sum(
        tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())
    )
    cache = tokens * 2 * sizes["L"] * sizes["k"] * (4 if dtype == "float32" else 2)
    return max(0, report.peak_allocated_bytes - weights - cache), "traced, one prompt read at once"
