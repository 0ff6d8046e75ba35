"""Sizes for people, in GiB of 2^30 bytes. GB are the rule of thumb's alone, in the documents that quote it."""

GIB, MIB = 2**30, 2**20


def gib(size: float, digits: int = 2) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.{digits}f} GiB"


def size_text(size: float) -> str:
    """Bytes in GiB; less than a tenth of one in MiB."""
    return gib(size) if abs(size) >= GIB / 10 else f"{size / MIB:.1f} MiB"
