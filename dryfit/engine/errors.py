"""What the core raises. It knows no scenario: whoever has one says which of its fields to change."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

_CORE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_PYTHON = str(Path(traceback.__file__).parent)
# What PyTorch says, what it means here, and what to do.
_KNOWN = (
    (
        "is not on the expected device|to be on the same device",
        "A tensor lies on another device than the model, which is on `meta` while it is traced",
        "Make it where the batch is, as `torch.ones(3, device=batch.device)` does, or hand it over in the batch.",
    ),
    (
        # The second is what a build without CUDA says once a card was simulated: PyTorch starts CUDA only once.
        "not compiled with CUDA|with arguments from the 'CUDA' backend|NVIDIA driver|[Nn]o CUDA|CUDA is not available"
        "|(requires?|needs?|must be on|only supports?) (a )?(CUDA|cuda|GPU)",
        "The step, or its optimizer, asks for CUDA itself, and a traced step runs on `meta`",
        "Take the device from the batch (`batch.device`) and leave calls of `torch.cuda` out of the traced step; an"
        " optimizer whose kernels need CUDA can't be traced, one of `torch.optim` or bitsandbytes can.",
    ),
)
_PACKAGES = ("site-packages", "dist-packages")


class TraceError(Exception):
    """A step can't be traced.

    Attributes
    ----------
    problem
        One sentence: what is wrong.
    hint
        What to do about it.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        self.problem, self.hint = problem, hint
        super().__init__(f"{problem}\n  {hint}" if hint else problem)


class AttentionKernelError(TraceError):
    """None of the enabled attention kernels takes the tensors that the model hands it."""


class StepError(TraceError):
    """The step raised something.

    Attributes
    ----------
    line
        ``file:line, in function: code`` of the user's own code that led there.
    inner
        The same inside the library that it called; None where it is the user's line itself.
    """

    def __init__(self, problem: str, hint: str, line: str, inner: str | None) -> None:
        self.line, self.inner = line, inner
        super().__init__(problem, hint)

    def __str__(self) -> str:
        through = [f"  through: {self.inner}"] if self.inner else []
        return "\n".join([self.problem, f"  at: {self.line}", *through, f"  {self.hint}"])


class CompiledError(StepError):
    """The step runs what ``torch.compile`` has compiled; raised without a line, which :func:`step_error` adds."""

    def __init__(self, problem: str, hint: str, line: str = "", inner: str | None = None) -> None:
        super().__init__(problem, hint, line, inner)


class ValuesNeeded(StepError):
    """The step asks a tensor for its values, and a traced step's tensors have none."""


class NoValues(Exception):
    """Raised by the tracker where an operator would need values; the trace turns it into :class:`ValuesNeeded`."""


def step_error(error: Exception) -> StepError:
    """Name the lines that an exception of a step came from, and say what to do."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_CORE)
    ]
    frames = [frame for frame in frames if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not any(name in frame.filename for name in _PACKAGES)]
    own = [frame for frame in own if not frame.filename.startswith((_TORCH, _PYTHON))]
    last = own[-1] if own else (frames[-1] if frames else None)
    below = [frame for frame in frames if not frame.filename.startswith(_TORCH)]
    inner = _line(below[-1]) if below and below[-1] is not last else None
    line = _line(last) if last is not None else "unknown"
    text = str(error).strip().splitlines()
    refused = getattr(error, "inner_exception", error)  # Dynamo wraps what the compiler raises
    if isinstance(refused, CompiledError):
        return CompiledError(refused.problem, refused.hint, line, inner)
    for words, problem, hint in _KNOWN:
        if re.search(words, str(error)):
            return StepError(f"{problem} ({text[0][:200]}).", hint, line, inner)
    if _needs_values(error):
        return ValuesNeeded(
            f"The step reads a tensor's value ({text[0][:200] if text else type(error).__name__}), and the tensors of"
            " a traced step have shapes but no values.",
            "Leave the line out of the traced step; where only a number for a log is read, `scalars=1.0` of"
            " trace_step() answers `.item()`; where values decide about shapes (nonzero, boolean indices), write the"
            " same with a mask, as `torch.where` does.",
            line,
            inner,
        )
    return StepError(
        f"The step can't be traced: {type(error).__name__}: {' '.join(text)[:500]}",
        "On `meta` only operators run whose result has a shape that follows from the shapes of their inputs.",
        line,
        inner,
    )


def _needs_values(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error)
        if isinstance(error, NoValues) or (
            "meta" in text.lower() and ("no data" in text or "item()" in text)
        ):
            return True
        if (
            "data-dependent" in text
            or "data_ptr" in text
            or ("numpy" in text and "meta" in text.lower())
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _line(frame: traceback.FrameSummary) -> str:
    code = f": {frame.line}" if frame.line else ""
    return f"{frame.filename}:{frame.lineno}, in {frame.name}{code}"
