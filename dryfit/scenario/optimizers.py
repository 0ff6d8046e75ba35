"""The optimizers: one row each, with what every module asks about one.

:mod:`dryfit.step.optimizers` makes them. Sources: PyTorch 2.13 (torch/optim/adamw.py), bitsandbytes 0.50
(optim/optimizer.py), torchao 0.14 (optim/subclass_*.py). Standard library only.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps and needs."""

    about: str  # for the reference, in Markdown
    moments: int = 2  # states for each number that is trained
    bits: int | None = (
        None  # of a number of a state; None: the states have the dtype of what is trained
    )
    block: int | None = None  # numbers of a state that share one scale of fp32
    elementwise: bool = (
        False  # each number is updated for itself, so that FSDP and ZeRO may cut tensors anywhere
    )
    copies_moments: bool = False  # PyTorch's `foreach` way: a step takes the square roots of all second moments at once
    counts_steps: bool = False  # a counter of 4 bytes for each tensor lies on the GPU
    paged: bool = False  # large states lie in CUDA's managed memory
    on_cpu: bool = True  # the step has a kernel for the CPU
    # Its name in `TrainingArguments.optim`, if its step inside TRL's trainers is predicted; None: it is not
    in_trl: str | None = None
    in_closed_form: bool = False  # the analytic estimate describes it
    package: str | None = None  # the optional package that brings it

    def state_bytes(self, width: int) -> float:
        """Bytes of state for a number that is trained and takes ``width`` bytes itself."""
        if self.bits is None:
            return self.moments * width
        return self.moments * (self.bits / 8 + 4 / self.block)


FUSED, EIGHT_BIT, PAGED = (
    "adamw_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
)  # what takes less than the default
OPTIMIZERS = {
    "adamw": Optimizer(
        "PyTorch's, tensor lists at once",
        elementwise=True,
        copies_moments=True,
        in_trl="adamw_torch",
        in_closed_form=True,
    ),
    FUSED: Optimizer(
        "PyTorch's, in one kernel",
        elementwise=True,
        counts_steps=True,
        in_trl="adamw_torch_fused",
        in_closed_form=True,
    ),
    EIGHT_BIT: Optimizer(
        "bitsandbytes', states of a quarter of the memory",
        bits=8,
        block=256,
        on_cpu=False,
        in_trl="adamw_bnb_8bit",
        in_closed_form=True,
    ),
    PAGED: Optimizer(
        "the same, and its states move to the host under pressure",
        bits=8,
        block=256,
        paged=True,
        on_cpu=False,
        in_closed_form=True,
    ),
    "lion_8bit": Optimizer(
        "bitsandbytes', one state a weight instead of two",
        moments=1,
        bits=8,
        block=256,
        on_cpu=False,
        in_trl="lion_8bit",
        in_closed_form=True,
    ),
    "adafactor": Optimizer("transformers', a row and a column for each matrix", in_trl="adafactor"),
    "muon": Optimizer(
        "PyTorch's, one state for the matrices of layers, and AdamW's for the others"
    ),
    "adamw_torchao_8bit": Optimizer(
        "torchao's, whose step is compiled", bits=8, block=256, package="torchao"
    ),
    "adamw_torchao_4bit": Optimizer("torchao's, in 4 bits", bits=4, block=128, package="torchao"),
    "galore": Optimizer("states of rank 128 for the matrices of layers", package="galore_torch"),
}
