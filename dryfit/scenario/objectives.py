"""What a training aims at: one row each, with what every module asks about one. Standard library only.

All but supervised fine-tuning are steps of TRL's trainers: :mod:`dryfit.step.objectives`.
"""

from dataclasses import dataclass

REFERENCES = ("adapter_off", "model", "precomputed")


@dataclass(frozen=True)
class Objective:
    """What an objective takes."""

    trainer: str | None = (
        None  # TRL's trainer, by its name without ``Trainer``; None: the step is the pipeline's own
    )
    texts_in_a_row: int = (
        1  # texts that go through the model for each row of the micro-batch: a pair has two
    )
    # What its answers may be compared with, of :data:`REFERENCES`; without one, what TRL does by default
    references: tuple[str, ...] = ()
    least_rows: int = 1  # of a micro-batch
    generates: bool = False  # its rows are answers that the model itself has generated
    # Several answers to a prompt are judged beside each other. One generation may serve many updates.
    grouped: bool = False
    anew: bool = False  # answers are generated for each micro-batch
    taught: bool = False  # a second model, which is not trained, says how likely each token is
    scores: bool = False  # a head of one number replaces the output head
    judged: bool = (
        False  # each row is one answer with a mark, good or bad, instead of two that are compared
    )
    module: str = "trl"  # where TRL keeps the trainer

    @property
    def in_pairs(self) -> bool:
        """Whether two answers from the data go through the model together, and their probabilities are compared."""
        return self.texts_in_a_row == 2 and not self.scores and not self.generates


SUPERVISED = "sft"
OBJECTIVES = {
    SUPERVISED: Objective(),
    "dpo": Objective("DPO", texts_in_a_row=2, references=REFERENCES),
    "orpo": Objective("ORPO", texts_in_a_row=2, module="trl.experimental.orpo"),
    "kto": Objective("KTO", references=REFERENCES, least_rows=2, judged=True),
    "reward": Objective("Reward", texts_in_a_row=2, scores=True),
    "grpo": Objective("GRPO", references=("adapter_off", "model"), generates=True, grouped=True),
    "rloo": Objective("RLOO", references=("adapter_off", "model"), generates=True, grouped=True),
    "online_dpo": Objective(
        "OnlineDPO",
        texts_in_a_row=2,
        references=("adapter_off", "model"),
        generates=True,
        anew=True,
        module="trl.experimental.online_dpo",
    ),
    "distillation": Objective("Distillation", generates=True, taught=True),
}
