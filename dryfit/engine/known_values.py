"""The few values that a traced step has: those of small integer tensors, of a log's numbers, and what libraries ask.

A tensor on ``meta`` has no values. But a step often wants those of small tensors that a batch brings along (which rows
are chosen, how large an image is), and shapes follow from them. So integers and booleans of a batch keep their values
on the CPU beside the traced tensor, and so does whatever is computed of such tensors alone.

What is brought to the host takes no memory there: a stand-in has one element, repeated. Operators on stand-ins work out
shapes, as those on ``meta``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .errors import NoValues
from .origins import calling_frame

LIMIT = 1_048_576  # elements of an integer or boolean tensor whose values are carried
FLOAT_LIMIT = 1_048_576  # of one in floating point that is computed of such, as Gemma 4 pools the patches of an image
FILLED_LIMIT = 4096  # of one in floating point that is made of one number: an optimizer's states are made so, and large
# Libraries ask about values that don't decide what is allocated, or that a real batch answers in one way. By module, or
# by module and function:
# What of PyTorch's own reads numbers: norms that scale an update, whether an average has begun, which it has in every
# step but the first, and whether a variance is negative.
_ASKING: Mapping[str, bool] = {
    "torch.optim._adafactor": True,
    "torch.optim.asgd": True,
    "torch.optim.swa_utils": True,
    "torch.nn.functional:gaussian_nll_loss": False,
}
ANSWERS: Mapping[str, bool] = {
    "transformers.modeling_utils:warn_if_padding_and_no_attention_mask": False,
    "transformers.masking_utils:find_packed_sequence_indices": True,  # each row is one text
    "transformers.modeling_flash_attention_utils:_flash_attention_forward": True,  # before 5: positions increase
    "transformers.masking_utils": False,  # a mask that is given masks something
    "transformers.utils.import_utils:torch_compilable_check": True,  # such as as many image tokens as features
    "deepspeed.runtime.utils:is_invalid_grad_norm": False,  # gradients are finite
    "deepspeed.runtime.zero.stage_1_and_2:has_overflow": False,
    "deepspeed.runtime.zero.stage3:has_overflow": False,
    "peft.tuners.vblora.layer": False,  # logits that inference has thrown away
    "peft.tuners.waveft.layer": True,  # indices lie within the padded matrix
    # Whether a gradient is exactly 1: where its value isn't known, something has scaled it.
    "liger_kernel.ops.cross_entropy:cross_entropy_backward": False,
    "liger_kernel.ops.fused_linear_cross_entropy:fused_linear_cross_entropy_backward": False,
    "liger_kernel.ops.jsd:jsd_backward": False,
    "liger_kernel.ops.tvd:tv_distance_backward": False,
    **_ASKING,
}
_DYNAMIC = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_aten = torch.ops.aten
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)
_FILLED = {  # made without the values of their first argument
    _aten.zeros_like.default: 0,
    _aten.ones_like.default: 1,
    _aten.new_zeros.default: 0,
    _aten.new_ones.default: 1,
    _aten.full_like.default: None,
    _aten.new_full.default: None,
    _aten.fill_.Scalar: None,
    _aten.zero_.default: 0,
}
_COPY, _TO_COPY, _SCATTER_ADD = (
    _aten.copy_.default,
    _aten._to_copy.default,
    _aten.scatter_add_.default,
)
ASKED = (
    _COPY,
    _TO_COPY,
    _SCATTER_ADD,
)  # which :class:`Values` has to hear of although no value is known
UNANSWERED = object()


class _End(weakref.ref):
    """Calls back with the storage's address when the storage is gone."""

    __slots__ = ("key",)


@dataclass(frozen=True)
class _Kind:
    dynamic: bool  # its result, or the shape of it, follows from values
    written: tuple[int, ...]  # the arguments that it writes into
    view: bool
    random: bool
    source: bool  # takes no tensors


class Values:
    """Values of tensors on ``meta``, where they are known.

    Parameters
    ----------
    scalars
        What a number is that nobody knows. None: :class:`~dryfit.engine.errors.NoValues`.
    answers
        What questions of libraries are answered, beside :data:`ANSWERS`: by ``module`` or ``module:function``.
    host_is_device
        Whether the device is the CPU: then what is brought to the host stays where it is.
    """

    def __init__(
        self,
        scalars: float | None = None,
        answers: Mapping[str, bool] | None = None,
        *,
        host_is_device: bool = False,
    ) -> None:
        self.carrying = False  # whether any value is known, or was
        self.reading = False  # whether Python is about to read a whole tensor
        self.counts_evenly = (
            False  # whether counts of choices that nobody knows are taken to be even
        )
        self.chosen_share = 1.0  # of what is counted, from the first on: which part alone is chosen
        self.asked: Callable[[torch.dtype], float | None] | None = (
            None  # gives numbers in the place of `scalars`
        )
        self.chooses: Callable[[Any, tuple], Any] | None = (
            None  # by values that nobody knows; None: refused
        )
        self._scalars = scalars
        self._answers = {**ANSWERS, **(answers or {})}
        self._host_is_device = host_is_device
        self._known: dict[
            int, torch.Tensor
        ] = {}  # the bytes on the CPU, by the address of the storage on `meta`
        self.stand_ins: dict[int, _End] = {}
        self._ends: dict[int, _End] = {}
        self._sources: dict[
            int, torch.Tensor
        ] = {}  # on the CPU, by the address of what stands for them on `meta`
        self._source_ends: dict[int, _End] = {}
        self._kinds: dict[Any, _Kind] = {}

    # --- what a tracker asks -------------------------------------------------------------------------------------

    def before(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What an operator gives, where that is not the device's affair; :data:`UNANSWERED`: run it."""
        if func is _TO_COPY:
            if (
                kwargs.get("device") is not None
                and torch.device(kwargs["device"]).type != args[0].device.type
            ):
                return self._moved(args[0], kwargs)
        elif func is _COPY and args[0].is_meta != args[1].is_meta:
            return self._copied(*args)
        if self.stand_ins and any(self._stands_in(item) for item in _tensors(args, kwargs)):
            return self._on_host(func, args, kwargs)
        if func is _SCATTER_ADD and (counts := self._even(*args)) is not None:
            self.remember(args[0], counts)
            return UNANSWERED
        if not self.carrying:
            return UNANSWERED
        kind = self._kind(func)
        if kind.dynamic:
            return self._dynamic(func, args, kwargs)
        if kind.written:
            self._write(func, kind, args, kwargs)
        return UNANSWERED

    def after(self, func: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """Carry the values of what an operator has made of known ones."""
        if func is _TO_COPY and output.is_meta and not args[0].is_meta:
            if carried(args[0]) and not self._stands_in(args[0]):
                self.remember(output, args[0].to(output.dtype, copy=True))
            if self._host_is_device:  # the tensor itself, for as long as either lives
                storage = output.untyped_storage()
                self._sources[storage._cdata] = args[0]
                self._until_its_end(storage, self._source_ends, self._sources)
            return
        if not self.carrying:
            return
        kind = self._kind(func)
        if kind.view or kind.written or kind.random or not _small(output):
            return
        if func.namespace == "_c10d_functional":  # what other ranks hold is not known here
            return
        if func in _FILLED:
            value = _FILLED[func]
            filled = args[-1] if value is None else value
            if type(filled) in (int, float, bool) and (
                output.numel() <= FILLED_LIMIT or carried(output)
            ):
                self.remember(output, torch.full(output.shape, filled, dtype=output.dtype))
            return
        moved = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
        known = self._arguments(args, moved)
        if known is None and func is _aten.any.dim and (answer := self._answer()) is not None:
            self.remember(output, torch.full(output.shape, answer))
        if known is None or (
            kind.source and func in (_aten.empty.memory_format, _aten.empty_strided.default)
        ):
            return
        try:
            value = func(*known[0], **known[1])
        except Exception:  # no kernel for the CPU
            return
        for made, item in zip(_listed(output), _listed(value), strict=False):
            if isinstance(made, torch.Tensor) and made.is_meta and made.shape == item.shape:
                self.remember(made, item)

    def failed(self, func: Any, args: tuple, error: Exception) -> Any:
        """The answer to an operator that ``meta`` can't run without values; :data:`UNANSWERED`: an error."""
        if _DYNAMIC.isdisjoint(func.tags):
            return UNANSWERED
        if func is _aten._local_scalar_dense.default:
            return self._number(func, args[0].dtype)
        if (
            not self.carrying and (answer := self._dynamic(func, args, {})) is not UNANSWERED
        ):  # masks without elements
            return answer
        if func is _aten.equal.default and (answer := self._answer()) is not None:
            return answer
        if func in _INDEXED and self._answer():
            return func(args[0], without_masks(args[1]), *args[2:])
        if self.chooses is not None and (chosen := self.chooses(func, args)) is not None:
            return chosen
        raise NoValues(func._schema.name) from error

    def remember(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Carry a tensor's values, from now on also for its views."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return
        whole = (
            value.untyped_storage().nbytes() == storage.nbytes()
            and value.stride() == tensor.stride()
        )
        if (
            not whole
            or value.storage_offset()
            or tensor.storage_offset()
            or value.dtype != tensor.dtype
        ):
            held = self._known.get(storage._cdata)
            if held is None:
                held = torch.zeros(storage.nbytes(), dtype=torch.uint8)
            self._known[storage._cdata] = held
            self._view(held, tensor).copy_(value)
        else:
            self._known[storage._cdata] = value.detach()
        self.carrying = True
        self._until_its_end(storage, self._ends, self._known)

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Values of tensors that something unknown may have written into are not known any more."""
        for tensor in (item for item in tensors if item.layout is torch.strided):
            self._known.pop(tensor.untyped_storage()._cdata, None)

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor's values on the CPU; None: nobody knows them."""
        if tensor.is_meta and not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        if tensor.layout is not torch.strided:
            return None
        held = self._known.get(tensor.untyped_storage()._cdata) if tensor.is_meta else None
        return None if held is None else self._view(held, tensor)

    # --- to the host and back ------------------------------------------------------------------------------------

    def _moved(self, tensor: torch.Tensor, kwargs: dict) -> Any:
        to_host, dtype = (
            torch.device(kwargs["device"]).type == "cpu",
            kwargs.get("dtype") or tensor.dtype,
        )
        if tensor.is_meta and to_host:
            known = self.known(tensor)
            if known is not None:
                return known.to(dtype, copy=True)
            if self.reading:
                if self._scalars is None:
                    raise NoValues("reading a tensor")
                return torch.full((), self._scalars, dtype=dtype).expand(tensor.shape)
            if self._host_is_device:
                return _aten.alias(tensor) if dtype == tensor.dtype else tensor.to(dtype)
            return self.stand_in(tensor.shape, dtype)
        return UNANSWERED

    def _copied(self, into: torch.Tensor, tensor: torch.Tensor, *_: Any) -> Any:
        if into.is_meta:
            if not self._stands_in(tensor) and carried(into) and carried(tensor):
                self.remember(into, tensor.expand(into.shape))
            elif self.carrying:
                self._known.pop(into.untyped_storage()._cdata, None)
            return into
        known = self.known(tensor)
        if known is not None:
            return into.copy_(known)
        self._until_its_end(into.untyped_storage(), self.stand_ins)
        return into

    def stand_in(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the host without values of its own: one element, repeated."""
        value = self._scalars if self._scalars is not None else 0
        made = (
            torch.full((1,), value, dtype=dtype).expand(shape)
            if len(shape)
            else torch.full((), value, dtype=dtype)
        )
        self._until_its_end(made.untyped_storage(), self.stand_ins)
        return made

    def _stands_in(self, tensor: torch.Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage()._cdata in self.stand_ins

    def _on_host(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operator on what lies on the host: its shapes alone."""
        kind = self._kind(func)
        if func is _aten._local_scalar_dense.default:
            return self._number(func, args[0].dtype)
        if func is _aten.index.Tensor and self._answer():
            args = (args[0], without_masks(args[1]))
        elif kind.dynamic:
            if self.chooses is None or (chosen := self.chooses(func, args)) is None:
                raise NoValues(func._schema.name)
            return chosen
        if kind.view:
            return UNANSWERED
        if func is _COPY and args[0].is_meta:
            return args[0]
        if kind.written:
            return args[kind.written[0]]

        def shape(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")

        moved, named = tree_map_only(torch.Tensor, shape, (args, kwargs))
        output = func(*moved, **({**named, "device": "meta"} if "device" in named else named))
        return tree_map_only(
            torch.Tensor, lambda made: self.stand_in(made.shape, made.dtype), output
        )

    # --- operators on known values -------------------------------------------------------------------------------

    def _dynamic(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if not any(
            tensor.is_meta for tensor in _tensors(args, kwargs)
        ):  # of the host's own, as a mesh of devices
            return UNANSWERED
        known = self._arguments(args, kwargs)
        if known is not None:
            value = func(*known[0], **known[1])
            return tree_map_only(torch.Tensor, self._on_meta, value)
        if func in _INDEXED:
            indices = self._without_known_masks(args[1])
            return UNANSWERED if indices is None else func(args[0], indices, *args[2:], **kwargs)
        if func is _aten.masked_select.default and (mask := self.known(args[1])) is not None:
            shape = torch.broadcast_shapes(args[0].shape, mask.shape)
            return args[0].new_empty((int(mask.expand(shape).sum()),))
        return UNANSWERED

    def _on_meta(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor with these values, in a storage as large: what finds unlike ones may leave a rest of it unused."""
        count = value.untyped_storage().nbytes() // value.itemsize
        made = torch.empty(count, dtype=value.dtype, device="meta")
        made = made.as_strided(value.size(), value.stride(), value.storage_offset())
        self.remember(made, value)
        return made

    def _without_known_masks(self, indices: Any) -> list[torch.Tensor | None] | None:
        """Indices with the places of known masks instead of these; None: nothing to do."""
        found: list[torch.Tensor | None] = []
        changed = False
        for index in indices:
            known = self.known(index) if index is not None and index.dtype == torch.bool else None
            if known is None:
                found.append(index)
            else:
                changed = True
                found += [self._on_meta(place) for place in known.nonzero(as_tuple=True)]
        return found if changed else None

    def _write(self, func: Any, kind: _Kind, args: tuple, kwargs: dict) -> None:
        """Write into carried values too, or forget those that nobody knows any more."""
        if (
            func in _FILLED
            and isinstance(args[0], torch.Tensor)
            and args[0].is_meta
            and carried(args[0])
        ):
            self.remember(
                args[0],
                torch.full(args[0].shape, args[-1] if len(args) > 1 else 0, dtype=args[0].dtype),
            )
            return
        if func is torch.ops.c10d.broadcast_.default:  # by the first process, which is this one
            return
        if not any(
            tensor.is_meta for tensor in _tensors(args, kwargs)
        ):  # the host's own, which the operator computes
            return
        known = self._arguments(args, kwargs)
        if known is not None:
            func(*known[0], **known[1])
            return
        if kind.dynamic and (indices := self._without_known_masks(args[1])) is not None:
            args = (args[0], indices, *args[2:])
        for place in kind.written:
            if place < len(args):
                self.forget(_tensors((args[place],), {}))
        self.forget(_tensors((), {name: value for name, value in kwargs.items() if "out" in name}))

    def _even(
        self, counts: torch.Tensor, dim: int, chosen: torch.Tensor, ones: torch.Tensor
    ) -> torch.Tensor | None:
        """How often each of several is chosen where nobody knows, as a router's experts: those that are, equally often.

        None: it is no such count, or nobody needs it: only experts on several GPUs are sent as many tokens.
        """
        of_numbers = not counts.dtype.is_floating_point and counts.dim() == ones.dim() == 1
        if not self.counts_evenly or not of_numbers or self.known(chosen) is not None:
            return None
        total, places = ones.numel(), torch.arange(counts.numel())
        bins = max(1, round(counts.numel() * self.chosen_share))
        return (total // bins + (places < total % bins)).to(counts.dtype) * (places < bins)

    def _arguments(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The arguments with the values of all tensors; None: some are not known."""
        for tensor in _tensors(args, kwargs):
            if tensor.layout is not torch.strided:
                return None
            if not tensor.is_meta:
                if self._stands_in(tensor):
                    return None
            elif tensor.numel() and tensor.untyped_storage()._cdata not in self._known:
                return None
        return tree_map_only(
            torch.Tensor, lambda item: self.known(item) if item.is_meta else item, (args, kwargs)
        )

    def _number(self, func: Any, kind: torch.dtype) -> bool | int | float:
        number = self._answer()
        if number is None and self.asked is not None:
            number = self.asked(kind)
        number = self._scalars if number is None else number
        if number is None:
            raise NoValues(func._schema.name)
        return (bool if kind == torch.bool else float if kind.is_floating_point else int)(number)

    def _answer(self) -> bool | None:
        """What a library's own question is answered, by the function that asks; None: it is no library's."""
        caller = calling_frame()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not caller:  # PyTorch's own questions
            module = frame.f_globals.get("__name__", "")
            for name in (module, f"{module}:{frame.f_code.co_name}"):
                if name in _ASKING and name in self._answers:
                    return self._answers[name]
            frame = frame.f_back
        frame = caller
        while frame is not None and frame.f_code.co_name.startswith(
            "<"
        ):  # a comprehension belongs to its function
            frame = frame.f_back
        if frame is None:
            return None
        module = frame.f_globals.get("__name__", "")
        return self._answers.get(f"{module}:{frame.f_code.co_name}", self._answers.get(module))

    # --- details -------------------------------------------------------------------------------------------------

    @staticmethod
    def _view(held: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(
            held.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )

    def _until_its_end(
        self, storage: Any, ends: dict[int, _End], held: dict[int, Any] | None = None
    ) -> None:
        def gone(end: _End) -> None:
            ends.pop(end.key, None)
            if held is not None:
                held.pop(end.key, None)

        if storage._cdata not in ends:
            end = ends[storage._cdata] = _End(storage, gone)
            end.key = storage._cdata

    def _kind(self, func: Any) -> _Kind:
        kind = self._kinds.get(func)
        if kind is None:
            schema = func._schema
            aliases = [argument.alias_info for argument in schema.arguments]
            written = tuple(
                place for place, alias in enumerate(aliases) if alias is not None and alias.is_write
            )
            kind = self._kinds[func] = _Kind(
                dynamic=not _DYNAMIC.isdisjoint(func.tags),
                written=written,
                view=not written and any(item.alias_info is not None for item in schema.returns),
                random=torch.Tag.nondeterministic_seeded in func.tags,
                source=not any("Tensor" in str(argument.type) for argument in schema.arguments),
            )
        return kind


def carried(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor of a batch are carried: integers and booleans, up to a size."""
    return (
        not tensor.dtype.is_floating_point
        and not tensor.dtype.is_complex
        and tensor.numel() <= LIMIT
    )


def _small(output: Any) -> bool:
    return all(
        item.numel() <= (FLOAT_LIMIT if item.dtype.is_floating_point else LIMIT)
        and not item.dtype.is_complex
        for item in _listed(output)
        if isinstance(item, torch.Tensor)
    )


def _listed(output: Any) -> Any:
    return output if isinstance(output, (tuple, list)) else (output,)


def _tensors(args: Any, kwargs: dict) -> Iterator[torch.Tensor]:
    for item in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _tensors(item, {})


def without_masks(indices: Any, share: float = 1.0) -> list[torch.Tensor | None]:
    """Indices that pick as much as boolean ones would, of which a share is true."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            found += [
                torch.empty(round(share * index.numel()), dtype=torch.long, device="meta")
            ] * index.dim()
    return found
