"""What a pipeline's stages ask their neighbours, answered where nobody else runs.

Before its first step a stage takes part in a vote on whether all of them know their shapes; where they don't, it is
told its inputs' and its outputs' gradients' by its neighbours. In a fake group this process votes for all. A stage's
outputs are kept for the ranks that are traced after it; shapes of gradients follow from those of outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import TraceError

# What each patch is for, as fake_group.PATCHES.
PATCHES = {
    "_PipelineSchedule._warmup_p2p": "a pipeline reads the number that its neighbours' vote gives",
    "PipelineStage._send_meta": "a stage sends its outputs' shapes as bytes, which nobody gets",
    "PipelineStage._recv_meta": "a stage unpacks its inputs' shapes from bytes that nobody has sent",
}
# By the number of a stage: the shapes of its inputs, which the stage before it sent. One group of ranks shares them.
_outputs: dict[int, Any] = {}


@contextmanager
def ranks_in_turn() -> Iterator[None]:
    """Trace the ranks of a pipeline one after the other, the first stage's first: each is told the one's shapes before.

    Only pipelines whose stages don't know their shapes need it.
    """
    _outputs.clear()
    try:
        yield
    finally:
        _outputs.clear()


def pipeline_patches() -> list[tuple[Any, str, Any]]:
    """What is replaced where pipelines are imported, as :func:`dryfit.engine.patching.patched` takes it."""
    if "torch.distributed.pipelining.stage" not in sys.modules:
        return []
    from torch.distributed.pipelining import _utils, schedules, stage

    mode = _utils.InferenceMode

    def vote(schedule: Any, stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
        dynamic = any(mode.needs_dynamic(each._user_meta, has_backward) for each in stages)
        for each in stages:
            each._inference_mode = mode.DYNAMIC if dynamic else mode.STATIC

    def send(sender: Any, meta: Any, dst_stage: int) -> None:
        if dst_stage > sender.stage_index:
            _outputs[dst_stage] = meta

    def receive(receiver: Any, src_stage: int) -> Any:
        if src_stage > receiver.stage_index:
            return _utils._StageBackwardMeta(
                backward_metas=_utils._derive_grad_metas(receiver._stage_meta.outputs)
            )
        if receiver.stage_index not in _outputs:
            raise TraceError(
                f"Stage {receiver.stage_index} of the pipeline does not know the shapes of its input.",
                "Give PipelineStage `input_args` and `output_args`, or trace the ranks in turn inside `ranks_in_turn()`"
                " of dryfit.engine.fake_pipeline, the first stage's first.",
            )
        return _outputs[receiver.stage_index]

    return [
        (schedules._PipelineSchedule, "_warmup_p2p", vote),
        (stage.PipelineStage, "_send_meta", send),
        (stage.PipelineStage, "_recv_meta", receive),
    ]
