"""DTensor's answer for a list of tensors, worked out once for those that are alike.

An optimizer calls operators on the list of all parameters. For each of them DTensor looks for the cheapest way to
divide the result: milliseconds a tensor, and no answer serves a list of another length. But layers repeat: a model of
any depth has a dozen kinds of parameters, and what holds for one of a kind holds for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_OF_LISTS = (
    "aten::_foreach_",
    "aten::_fused_adam",
    "aten::_fused_sgd",
)  # of lists of one length, or empty ones


def sharding_patches() -> list[tuple[Any, str, Any]]:
    """What is replaced, as :func:`dryfit.engine.patching.patched` takes it; answers stay the same."""
    from torch.distributed.tensor import DTensor

    propagator = type(DTensor._op_dispatcher.sharding_propagator)
    name = "propagate_op_sharding_non_cached"
    return [(propagator, name, _once_for_each_kind(getattr(propagator, name)))]


def _once_for_each_kind(propagate: Callable) -> Callable:
    def answered(propagator: Any, schema: Any) -> Any:
        lists = {
            place: value
            for place, value in enumerate(schema.args_schema)
            if isinstance(value, (list, tuple))
        }
        places = [place for place, value in lists.items() if value]
        if not places or not schema.op.name().startswith(_OF_LISTS):
            return propagate(propagator, schema)
        if len({len(lists[place]) for place in places}) > 1:
            return propagate(propagator, schema)
        rows = list(zip(*(lists[place] for place in places), strict=True))
        kinds = {row: number for number, row in enumerate(dict.fromkeys(rows))}
        if len(kinds) == len(rows):
            return propagate(propagator, schema)
        answer = propagate(propagator, _with(schema, places, list(zip(*kinds, strict=True))))
        numbers = [kinds[row] for row in rows]
        if isinstance(answer.output_spec, (list, tuple)):
            answer.output_spec = type(answer.output_spec)(
                answer.output_spec[number] for number in numbers
            )
        other = answer.redistribute_schema
        if other is not None:
            columns = [[other.args_schema[place][number] for number in numbers] for place in places]
            answer.redistribute_schema = _with(other, places, columns)
        return answer

    return answered


def _with(schema: Any, places: list[int], columns: list[Any]) -> Any:
    """The same operator with other lists, each of the type that was there."""
    arguments = list(schema.args_schema)
    for place, column in zip(places, columns, strict=True):
        arguments[place] = type(arguments[place])(column)
    return type(schema)(schema.op, tuple(arguments), schema.kwargs_schema, schema.schema_info)
