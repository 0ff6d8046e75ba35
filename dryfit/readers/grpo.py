"""The settings of a training that generates, by TRL's names: how answers are generated, compared and learned from.

TRL's own files and programs have them at their top, axolotl's in the block ``trl`` with the server's in ``vllm``.
Defaults are those of TRL 1.16 (``trl/trainer/grpo_config.py``, ``rloo_config.py``, ``distillation_config.py``,
``trl/experimental/online_dpo``).
"""

from collections.abc import Callable
from typing import Any

from dryfit.readers.reading import EITHER_WAY, TOO_LOW, Reading
from dryfit.scenario.objectives import OBJECTIVES

Get = Callable[..., Any]
_BETA, _GENERATIONS = {"grpo": 0.0, "rloo": 0.05}, {"grpo": 8, "rloo": 2}
_SHORT_ANSWER_TOKENS = (
    64  # online DPO's `max_new_tokens`; its `max_length` of 512 is prompt and answer
)
ANSWER_TOKENS, PROMPT_TOKENS = (
    512,
    512,
)  # TRL's `max_completion_length`; a prompt has no limit since TRL 1


def answer_tokens(get: Get, objective: str) -> int:
    """Of an answer at most."""
    if OBJECTIVES[objective].anew:
        return get("max_new_tokens", _SHORT_ANSWER_TOKENS)
    return get("max_completion_length", ANSWER_TOKENS)


def row_tokens(get: Get, objective: str) -> int:
    """Of a prompt and its answer at most."""
    if OBJECTIVES[objective].anew:
        return get("max_length", ANSWER_TOKENS)
    return get("max_prompt_length", PROMPT_TOKENS) + answer_tokens(get, objective)


def set_cycle(get: Get, reading: Reading) -> None:
    """Set ``preference`` and ``generation`` of a reading whose objective generates."""
    objective = reading.fields["objective"]
    aim, adapters = OBJECTIVES[objective], reading.fields["method"] != "full"
    preference = {"completion_length": answer_tokens(get, objective)}
    generation: dict[str, Any] = {"engine": "transformers"}
    if aim.grouped:
        compared = get("beta", _BETA[objective]) != 0.0
        preference |= {"generations": get("num_generations", _GENERATIONS[objective])}
        preference |= {"reference": ("adapter_off" if adapters else "model") if compared else None}
        generation |= {
            "steps_per_generation": get("steps_per_generation"),
            "iterations": get("num_iterations", 1),
        }
    if aim.taught:
        preference |= {"teacher": get("teacher_model_name_or_path")}
    reading.set(preference=preference, generation=generation)
    if get("use_vllm"):
        _beside_vllm(get, reading)


def answers(get: Get, reading: Reading, objective: str = "grpo", *, predicted: bool) -> None:
    """How answers are generated, of a step that is predicted; else what lies beside it."""
    if predicted:
        set_cycle(get, reading)
    else:
        beside_several(get, reading, objective)


def _beside_vllm(get: Get, reading: Reading) -> None:
    generation, mode = reading.fields["generation"], get("vllm_mode", "colocate")
    generation["engine"] = "none"
    if reading.fields["method"] == "qlora":
        why = "how vLLM packs a 4-bit model is not described, so its share of the GPU is left out"
        reading.approximates("use_vllm", True, TOO_LOW, why)
        return
    cards = get("vllm_tensor_parallel_size", 1)
    if mode == "colocate" and cards > 1:
        reading.approximates(
            "vllm_tensor_parallel_size", cards, TOO_LOW, "a cycle is predicted for one GPU"
        )
        return
    generation |= {"engine": "vllm", "mode": mode, "tensor_parallel": cards}
    longest = get("vllm_max_model_length")
    if longest:
        generation["max_model_length"] = longest
    if mode == "server":
        if not get("vllm_gpu_memory_utilization"):
            generation["utilization"] = 0.9  # of `trl vllm-serve`, trl/scripts/vllm_serve.py
        reading.notes.append(
            "the server's own settings are those of its command, which this file doesn't have"
        )
        return
    generation["utilization"] = get("vllm_gpu_memory_utilization", 0.3)
    generation["sleep_level"] = 2 if get("vllm_enable_sleep_mode") else 0


def beside_several(get: Get, reading: Reading, objective: str = "grpo") -> None:
    """Say what lies beside a training of several GPUs, whose cycle is not predicted: vLLM, and a reference.

    vLLM reserves its share of the card's whole memory and gives it back while it sleeps alone
    (``gpu_memory_utilization`` and ``enable_sleep_mode`` of vLLM's ``engine/arg_utils.py``).
    """
    if get("use_vllm") and get("vllm_mode", "colocate") == "colocate":
        share = get("vllm_gpu_memory_utilization", 0.3)
        why = f"vLLM takes {share:g} of each card beside, while it is awake; a cycle is predicted for one trainer"
        sleeps = " sleeps" if get("vllm_enable_sleep_mode") else ""
        reading.approximates("use_vllm", True, TOO_LOW, why, f"vllm {share:g}{sleeps}")
    if reading.fields["method"] == "full" and get("beta", _BETA.get(objective, 0.0)) != 0.0:
        why = "a reference model lies beside the one that is trained"
        reading.approximates("beta", get("beta", _BETA.get(objective)), TOO_LOW, why, "reference")


def of_unsloth(reading: Reading, utilization: float | None, *, sleeps: bool = False) -> None:
    """Say what Unsloth does otherwise than TRL in a cycle; ``sleeps``: its standby, which sets vLLM's share itself."""
    why = "Unsloth computes log-probabilities in its own chunks; this is the step of TRL's trainer"
    reading.approximates("unsloth", True, EITHER_WAY, why, "logits")
    if utilization is not None:
        why = "vLLM holds the one copy of the weights, and takes a share of the memory that is free"
        why += (
            ", which standby sets itself; it sleeps in the update"
            if sleeps
            else ", in the update too"
        )
        share = "standby" if sleeps else f"{utilization:g}"
        reading.approximates(
            "gpu_memory_utilization", utilization, TOO_LOW, why, f"shared vllm {share}"
        )
