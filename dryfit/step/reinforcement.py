"""What a step of TRL's reinforcement trainers takes besides: its answers, and who judges them.

A training generates for each of many updates; a trace takes as few micro-batches as are like them (`CycleSteps`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, gcd
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dryfit.engine.costs import begin
from dryfit.scenario.fields import MICRO_BATCHES
from dryfit.scenario.model import read_model
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model

WORD = 2  # the id of the one word that texts consist of
LAST_TOKEN = "last_token"  # where a trace's costs of it begin


@dataclass(frozen=True)
class CycleSteps:
    """How many micro-batches a generation serves, and how many an update has."""

    # TRL's `steps_per_generation`, `num_iterations` and `gradient_accumulation_steps`.
    steps: int
    iterations: int
    accumulation: int
    updates: int  # so many that answers are generated again when the optimizer's states exist

    @classmethod
    def of(cls, scenario: Scenario, *, whole: bool) -> CycleSteps:
        """A scenario's, ``whole``, or as few micro-batches as make the same tensors at once.

        TRL takes the old log-probabilities anew where an update doesn't end with its answers. So a short cycle keeps
        whether it does. A reward model judges all answers at once, so with one no micro-batch is left out.
        """
        steps, iterations = scenario.steps_per_generation, scenario.generation.iterations
        accumulation = scenario.gradient_accumulation
        aligned = accumulation % (steps * iterations) == 0
        if (
            not whole
            and not scenario.preference.reward_model
            and scenario.generation.engine != "transformers"
        ):
            generations = scenario.preference.generations if scenario.aim.grouped else 1
            least = generations // gcd(
                scenario.micro_batch, generations
            )  # groups of answers are not cut
            steps = min(steps, least * ceil(MICRO_BATCHES / least))
            iterations = min(iterations, MICRO_BATCHES)
            if aligned:
                accumulation = min(accumulation, max(MICRO_BATCHES, steps * iterations))
                accumulation -= accumulation % (steps * iterations)
            else:
                accumulation = min(accumulation, MICRO_BATCHES)
                while accumulation % (steps * iterations) == 0:
                    steps += least
        return cls(
            steps, iterations, accumulation, max(2, ceil((steps * iterations + 1) / accumulation))
        )


def rollout(scenario: Scenario) -> Callable[[list, Any], Mapping[str, list]]:
    """Answers as another process would generate them; with ``attention_mask: padding`` the first is shorter."""
    prompt, answer = (
        scenario.sequence_length - scenario.completion_length,
        scenario.completion_length,
    )

    def answers(prompts: list, trainer: Any) -> Mapping[str, list]:
        del trainer
        lengths = [
            answer - (scenario.attention_mask == "padding" and number == 0)
            for number in range(len(prompts))
        ]
        return {
            "prompt_ids": [[WORD] * prompt] * len(prompts),
            "completion_ids": [[WORD] * length for length in lengths],
            "logprobs": [[0.0] * length for length in lengths],
        }

    return answers


def reward(completions: list, **_: Any) -> list[float]:
    """A function that judges answers, on the host."""
    return [float(number) for number in range(len(completions))]


def model_beside(
    scenario: Scenario, field: str, device: str, attention: str | None, **fields: str
) -> nn.Module | None:
    """The frozen model that a field of ``preference`` names, which judges answers or teaches; None: it names none.

    It is in the dtype of the scenario's weights; ``fields``: of its own scenario.
    """
    name = getattr(scenario.preference, field)
    if name is None:
        return None
    config, _ = read_model(name, f"preference.{field}")
    own = Scenario.from_mapping(
        {"model": config, "method": "full", "precision": scenario.weight_precision, **fields}
        | {"sequence_length": scenario.sequence_length, "attention": scenario.attention}
    )
    model = build_model(own, device, attention_implementation=attention, for_trainer=True)
    return model.requires_grad_(False).eval()


class RewardRows:
    """A tokenizer whose rows are all of one length: those of a prompt with its answer."""

    pad_token_id = 0

    def __init__(self, scenario: Scenario) -> None:
        self._length = scenario.sequence_length

    def __call__(self, text: list[str], **_: Any) -> dict[str, torch.Tensor]:
        shape = (len(text), self._length)
        return {
            "input_ids": torch.full(shape, WORD),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }


def answers_from_elsewhere(trainer: Any, scenario: Scenario) -> None:
    """Let a trainer that takes no function for it get answers as another process would generate them."""
    answer = scenario.completion_length

    def single_turn(prompt_ids: list, *_: Any, **__: Any) -> list[list[int]]:
        return [[WORD] * answer for _ in prompt_ids]

    def pairs(model: nn.Module, prompts: list, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """Online DPO: prompts with their masks, two answers to each with theirs."""
        shape, device = (
            (2 * len(prompts), scenario.sequence_length - answer),
            trainer.accelerator.device,
        )
        words = [torch.full(each, WORD, device=device) for each in (shape, (shape[0], answer))]
        prompt, made = words
        return prompt, torch.ones_like(prompt), made, torch.ones_like(made), None

    if scenario.aim.anew:
        trainer._generate = pairs
    else:
        trainer._generate_single_turn = single_turn


def whole_answers(trainer: Any) -> None:
    """Online DPO on ``meta``: let it know that no generated answer is cut, as its mask would say."""

    def generate(*args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        prompt, prompt_mask, made, _, images = type(trainer)._generate(
            trainer, *args, **kwargs
        )  # its phase is heard
        return prompt, prompt_mask, made, torch.ones_like(made), images

    trainer._generate = generate


def without_an_end(trainer: Any, vocabulary: int) -> None:
    """Let no answer end before its longest: the end is a token that no model writes."""
    trainer.eos_token_ids = [vocabulary]
    trainer.generation_config.eos_token_id = [vocabulary]
    trainer.generation_kwargs["eos_token_id"] = [vocabulary]


def first_and_last_token(model: nn.Module) -> None:
    """Let ``generate`` write the first token of its answers and the last, since those between take less.

    Keys and values grow by a token each time, and those of a layer are copied while the others lie beside. So the most
    is held at the prompt, whose activations are the largest, or at the last token. Where no keys and values are kept,
    a token goes through all before it, beside what the token before has left: then the last two are written.
    """
    own = model.generate

    def generate(*args: Any, generation_config: Any, **inputs: Any) -> torch.Tensor:
        count = generation_config.max_new_tokens
        if count < 3:
            return own(*args, generation_config=generation_config, **inputs)
        wanted = {"max_new_tokens": 1, "return_dict_in_generate": True}
        first = own(*args, generation_config=generation_config, **inputs, **wanted)
        cache, tokens = first.past_key_values, first.sequences
        del first
        written = 2 if cache is None else 1
        length = tokens.shape[1] + count - 1 - written  # of what is there before the last tokens
        if cache is not None:
            _lengthen(cache, length - 1)
        tokens = tokens.new_full((len(tokens), length), WORD)
        begin(LAST_TOKEN)
        last = inputs | {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "past_key_values": cache,
        }
        return own(*args, generation_config=generation_config, **last, max_new_tokens=written)

    model.generate = generate


def _lengthen(cache: Any, tokens: int) -> None:
    """Keys and values of so many tokens, those of sliding layers of their window at most; states stay as they are."""
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        held = tokens if window is None else min(tokens, window - 1)
        for name in ("keys", "values"):
            known = getattr(layer, name, None)
            if known is not None:
                setattr(layer, name, known.new_empty((*known.shape[:2], held, known.shape[3])))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = tokens


def beside_vllm(trainer: Any) -> None:
    """Let TRL's trainer correct for what vLLM computes otherwise: it then takes its own log-probabilities always.

    The engine itself isn't there, and neither are its weights to load.
    """
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
