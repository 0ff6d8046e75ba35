"""What bitsandbytes keeps and allocates, as arithmetic: no torch, so that the trace and the closed form share it.

Sources: bitsandbytes 0.50 ``functional.py`` (``quantize_4bit``, ``get_4bit_type``, ``quantize_blockwise``),
``nn/modules.py`` (``Params4bit._quantize``), ``backends/cuda/ops.py``, ``optim/optimizer.py`` (``get_state_buffer``,
``min_8bit_size``).
"""

from __future__ import annotations

from collections.abc import Iterator

BLOCK, NESTED_BLOCK = 64, 256  # 4-bit weights to a scale, scales to a scale of theirs
VALUES_4BIT, VALUES_8BIT = 16, 256  # fp32 numbers of the maps
EIGHT_BIT_FROM = 4096  # elements: smaller tensors keep their states in fp32
PAGED_FROM = 100_000  # elements: smaller states of paged optimizers stay on the device


def packed(
    elements: int, *, nested: bool, block: int = BLOCK, storage: int = 1
) -> dict[str, tuple[int, int]]:
    """What a 4-bit weight is: bytes of an element and elements by name, statistics as ``quantization_state`` has them.

    Two weights to a byte, a scale for each ``block`` of them; ``nested``: the scales quantized again, with scales and a
    map of their own and an offset. ``storage``: bytes of an element that holds packed weights.
    """
    scales = -(-elements // block)
    parts = {"weight": (storage, -(-elements // (2 * storage))), "code": (4, VALUES_4BIT)}
    if not nested:
        return parts | {"absmax": (4, scales)}
    nests = {
        "nested_absmax": (4, -(-scales // NESTED_BLOCK)),
        "nested_code": (4, VALUES_8BIT),
        "offset": (4, 1),
    }
    return parts | {"absmax": (1, scales)} | nests


def packing(
    elements: int, *, nested: bool, block: int = BLOCK, storage: int = 1, in_place: bool = False
) -> Iterator[tuple[str, int]]:
    """What packing a weight allocates, in order: name and bytes; with 0 bytes what has that name goes.

    What stays has its name in :func:`packed`. ``map`` is made for the first weight alone; before 0.46 (``in_place``)
    all weights share it, and scales are centred in place.
    """
    parts = packed(elements, nested=nested, block=block, storage=storage)
    sizes = {name: width * count for name, (width, count) in parts.items()}
    scales, code = -(-elements // block) * 4, sizes["code"]
    yield from (
        ("scales" if nested else "absmax", scales),
        ("weight", sizes["weight"]),
        ("code", code),
    )
    yield from (("magnitudes", code), ("largest", 4), ("magnitudes", 0), ("largest", 0))
    if nested:
        own = not in_place
        yield from (("offset", 4), *[("centred", scales)] * own, ("map", sizes["nested_code"]))
        yield from (
            (name, sizes[name]) for name in ("nested_absmax", "absmax", *["nested_code"] * own)
        )
        yield from (*[("centred", 0)] * own, ("scales", 0))
