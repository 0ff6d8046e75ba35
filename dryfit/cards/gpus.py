"""GPUs: how much memory each has, and how much of it PyTorch's allocator can get.

A scenario names one of config/gpus.yaml, or a size; the gate may also ask for the one found in the machine.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from dryfit.cards.gpu_names import read_gpu
from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.text import GIB, MIB
from dryfit.data import data_path
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY
from dryfit.scenario.nested_fields import checked_gpu

CATALOGUE = data_path("gpus.yaml")
# PyTorch's allocators that are not replayed, and what an answer can't say of them.
UNMODELLED = {
    "rocm": "ROCm's kernels and workspaces are not modelled, nor how its allocator cuts segments. The allocated bytes"
    " are those of CUDA's kernels on the same step; what ROCm reserves beside them is not known",
    "mps": "Metal's kernels and MPS' allocator are not modelled. The allocated bytes are those of CUDA's kernels on"
    " the same step; what MPS keeps beside them is not known, nor whether each kernel and optimizer exists there",
}
GIVEN = "as given"  # by the scenario, not by the catalogue
MEASURED = "torch.cuda.get_device_properties"  # on this machine
FEW_KERNELS = (
    "kernels loaded later add to it"  # in the source of a context that was measured before a step
)
EXPANDABLE_LINE = (
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"  # 2.9 and later also know PYTORCH_ALLOC_CONF
)


@dataclass(frozen=True)
class Gpu:
    """A GPU. ``usable_bytes`` is what is left for PyTorch's allocator."""

    name: str
    title: str
    total_bytes: int  # as torch.cuda.get_device_properties reports it
    total_source: str
    context_bytes: int  # a process's CUDA context, outside the allocator
    context_source: str
    compute_capability: float | None
    held_bytes: int = 0  # by other processes, of the GPU found in the machine
    holders: tuple[str, ...] = ()  # which those are, as far as nvidia-smi says
    pool_bytes: int = 0  # unified memory: all that GPU and system share; 0: memory of its own
    system_bytes: int = 0  # of the pool, what system and other programs hold
    system_source: str = ""
    allocator: str = "cuda"  # PyTorch's for this kind of GPU: cuda, or one of UNMODELLED
    note: str = ""  # what its owner can change
    count: int = 1  # of such GPUs; every figure is that of one
    index: int | None = (
        None  # among those that CUDA_VISIBLE_DEVICES shows, in its order; None: not one of several
    )
    others: tuple[Gpu, ...] = ()  # of this machine, which the processes of the same training use

    @property
    def label(self) -> str:
        """What to call it: its title, and which of the machine's it is."""
        return self.title if self.index is None else f"GPU {self.index} ({self.title})"

    @property
    def usable_bytes(self) -> int:
        return (
            min(self.total_bytes, self.free_pool_bytes or self.total_bytes)
            - self.context_bytes
            - self.held_bytes
        )

    @property
    def free_pool_bytes(self) -> int:
        """What system and other programs leave of unified memory, for the GPU and for copies on the host; 0: none."""
        return max(self.pool_bytes - self.system_bytes, 0)

    @property
    def is_modelled(self) -> bool:
        """Whether PyTorch's allocator for it is replayed, and so a step can be said to fit."""
        return self.allocator not in UNMODELLED

    @property
    def context_has_kernels(self) -> bool:
        """Whether the context is that of a process that took a step: CUDA loads a kernel when it first runs."""
        return (
            not self.context_source.startswith("assumed") and FEW_KERNELS not in self.context_source
        )

    @property
    def capacity_line(self) -> str:
        """What is usable, and why it is not all, in words."""
        left_out = (
            f"{self.total_bytes / GIB:.2f} less {self.context_bytes / GIB:.2f} of CUDA context"
        )
        if 0 < self.free_pool_bytes < self.total_bytes:
            left_out += (
                f" and {(self.total_bytes - self.free_pool_bytes) / GIB:.2f} that the system holds"
            )
        if self.held_bytes:
            named = f" by {', '.join(self.holders)}" if self.holders else " by other processes"
            left_out += f" and {self.held_bytes / GIB:.2f} held{named}"
        line = f"{self.label} has {self.usable_bytes / GIB:.2f} GiB ({left_out})"
        if self.others:
            line += f", and of {len(self.others) + 1} GPUs it has the least left beside the step"
        if any(other.title != self.title for other in self.others):
            kinds = [
                f"{other.label} has {other.usable_bytes / GIB:.2f} GiB" for other in self.others
            ]
            line += f"; the GPUs are of different kinds: {', '.join(kinds)}"
        return line

    @property
    def setting(self) -> str | dict[str, Any]:
        """How a scenario names it."""
        kind: dict[str, Any] = (
            {"name": self.name} if self.name in known() else {"vram_gib": self.total_bytes / GIB}
        )
        own: dict[str, Any] = {"count": self.count} if self.count > 1 else {}
        if self.context_source == GIVEN:
            whole, rest = divmod(self.context_bytes, MIB)
            own["context_mib"] = self.context_bytes / MIB if rest else whole
        return {**kind, **own} if own else kind.get("name", kind)

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability as PyTorch gives it, (8, 6)."""
        if self.compute_capability is None:
            return None
        major, minor = divmod(round(self.compute_capability * 10), 10)
        return major, minor

    def to_mapping(self) -> dict[str, Any]:
        others = [other.to_mapping() for other in self.others]
        own = {"label": self.label, "others": others, "usable_bytes": self.usable_bytes}
        return {**asdict(self), **own, "is_modelled": self.is_modelled}


def catalogue() -> dict[str, Gpu]:
    """The GPUs of config/gpus.yaml that tables and pages show, in its order (by size)."""
    return _catalogue("gpus")


def known() -> dict[str, Gpu]:
    """All GPUs of config/gpus.yaml, those too that no table shows."""
    return _catalogue("gpus", "others", "unified") | _apple()


def catalogue_date() -> str:
    """When a card was last added, or a figure of one."""
    return str(_content()["as_of"])


@cache
def _content() -> dict[str, Any]:
    return read_yaml(CATALOGUE)


@cache
def _catalogue(*sections: str) -> dict[str, Gpu]:
    content = _content()
    return {
        name: _from_entry(name, entry, content["assumptions"])
        for section in sections
        for name, entry in content[section].items()
    }


@cache
def _sizes_on_boxes() -> dict[str, float]:
    sections = ("gpus", "others", "unified")
    return {
        name: entry["nominal_gb"]
        for section in sections
        for name, entry in _content()[section].items()
    }


@cache
def _apple() -> dict[str, Gpu]:
    """Apple's chips by the memory that they share with the system, which alone decides what Metal gives a GPU."""
    content = _content()
    kinds = content["apple"]
    cards = {}
    for size in kinds["sizes_gb"]:
        share = next(share for share in kinds["shares"] if size <= share.get("up_to_gb", size))
        entry = {
            "title": f"GPU of a Mac with {size} GB",
            "total_gib": size * share["share"],
            "source": share["source"],
            "pool_gib": size,
            "allocator": "mps",
            "context_mib": 0,
            "context_source": "Metal's own is not known",
        }
        cards[f"apple-{size}gb"] = _from_entry(f"apple-{size}gb", entry, content["assumptions"])
    return cards


def _from_entry(name: str, entry: Mapping[str, Any], assumptions: Mapping[str, float]) -> Gpu:
    capability = entry.get("compute_capability")
    if "total_bytes" in entry or "total_gib" in entry:
        total = entry.get("total_bytes") or int(entry["total_gib"] * GIB)
        source = entry["source"]
    else:
        share = assumptions["total_share"]
        total, source = (
            int(entry["nominal_gb"] * GIB * share),
            f"assumed: {share} x {entry['nominal_gb']} GiB",
        )
    if "context_mib" in entry:
        context, context_source = entry["context_mib"], entry["context_source"]
    else:
        context, context_source = _assumed_context(capability, assumptions)
    pool = int(entry.get("pool_gib", 0) * GIB)
    system = min(int(pool * assumptions["system_share"]), int(assumptions["system_most_gib"] * GIB))
    return Gpu(
        name,
        entry["title"],
        total,
        source,
        int(context * MIB),
        context_source,
        capability,
        pool_bytes=pool,
        system_bytes=system,
        system_source=assumptions["system_source"] if pool else "",
        allocator=entry.get("allocator", "cuda"),
        note=entry.get("note", ""),
    )


def _assumed_context(
    capability: float | None, assumptions: Mapping[str, float]
) -> tuple[float, str]:
    key = "context_mib" if capability is None or capability >= 8.0 else "context_mib_before_8_0"
    return assumptions[key], f"assumed: {assumptions[key]} MiB"


def find(gpu: str | Mapping[str, Any], where: object = "gpu") -> Gpu:
    """The GPU that has a name or a size.

    A name is one of config/gpus.yaml, or what people write for it (:mod:`dryfit.cards.gpu_names`). A size is
    ``{vram_gib: number}``; ``{..., count: 2}``: several; ``{..., context_mib: 530}``: yours holds so much beside
    the allocator.

    UserError: if the name is unknown, if it means several GPUs, if the count is less than 1, or if nothing is left.
    """
    if isinstance(gpu, str) and gpu.lstrip().startswith("{"):
        gpu = _mapping(gpu, where)
    gpu = checked_gpu(gpu, where)
    cards = known()
    if isinstance(gpu, str) and gpu not in cards:
        assumptions = _content()["assumptions"]
        titles = {name: card.title for name, card in cards.items()}
        gpu = read_gpu(gpu, titles, assumptions["total_share"], where, _sizes_on_boxes())
    if isinstance(gpu, str):
        return cards[gpu]
    own: dict[str, Any] = {"count": gpu["count"]} if "count" in gpu else {}
    if "context_mib" in gpu:
        own |= {"context_bytes": int(gpu["context_mib"] * MIB), "context_source": GIVEN}
    if own or "name" in gpu:
        kind = {key: value for key, value in gpu.items() if key in ("name", "vram_gib")}
        try:
            card = replace(find(kind.get("name", kind), where), **own)
        except UserError as error:
            if gpu.get("count", 1) < 2:
                raise
            meant = f"{gpu['count']}x{(error.change or {}).get('gpu', '24GiB')}"
            raise error.with_values(change={"gpu": meant}, write=None) from None
        if card.context_bytes >= card.total_bytes:
            raise UserError(
                f"`context_mib` leaves nothing of {card.title}.",
                where=where,
                found=gpu["context_mib"],
                allowed="what the card holds beside PyTorch's allocator, mostly 300 to 600",
                change={"gpu": {**kind, "context_mib": 530}},
            )
        return card
    context, source = _assumed_context(None, _content()["assumptions"])
    total = int(gpu["vram_gib"] * GIB)
    return Gpu(
        f"{gpu['vram_gib']:g} GiB",
        "a GPU of this size",
        total,
        GIVEN,
        int(context * MIB),
        source,
        None,
    )


def _mapping(text: str, where: object) -> Any:
    """A mapping that came as one word of a command line, ``{vram_gib: 10}``."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            "`gpu` is not YAML.", where=where, found=text, change={"gpu": {"vram_gib": 24}}
        ) from None


def named(gpu: str | Mapping[str, float] | None, where: object = "gpu") -> Gpu | None:
    """The GPU that a scenario names, if it names one."""
    return None if gpu is None else find(gpu, where)


def is_unified(gpu: str | Mapping[str, Any] | None) -> bool:
    """Whether the GPU that a scenario names shares its memory with the system."""
    card = named(gpu)
    return card is not None and card.pool_bytes > 0


def from_device(
    title: str,
    total_bytes: int,
    capability: tuple[int, int],
    free_bytes: int | None = None,
    holders: tuple[str, ...] = (),
) -> Gpu:
    """The GPU that a device says it is: its own memory, and the CUDA context of the catalogue's of that title.

    ``free_bytes``: what ``torch.cuda.mem_get_info`` says is free, this process's own context being there already: all
    of it is usable, and what else is missing others hold. None: nobody holds anything. ``holders``: names of those
    others.
    """
    listed = next((gpu for gpu in catalogue().values() if gpu.title == title), None)
    compute_capability = float(f"{capability[0]}.{capability[1]}")
    if listed:
        context, source = listed.context_bytes, listed.context_source
    else:
        mib, source = _assumed_context(compute_capability, _content()["assumptions"])
        context = int(mib * MIB)
    held = 0
    if free_bytes is not None:
        held = max(0, total_bytes - free_bytes - context)
        context = total_bytes - free_bytes - held
    name = listed.name if listed else title
    return Gpu(
        name,
        title,
        total_bytes,
        MEASURED,
        context,
        source,
        compute_capability,
        held,
        holders if held else (),
    )


def least_free(gpus: Sequence[Gpu], needs: Callable[[Gpu], int]) -> Gpu:
    """Of GPUs that share a training, the one with the least memory left beside the step; ``others`` has the rest.

    ``gpus``: the GPUs in CUDA's order. ``needs``: bytes that the step takes on such a GPU: other kinds run other
    kernels.
    """
    if len(gpus) == 1:
        return gpus[0]
    numbered = [replace(gpu, index=index) for index, gpu in enumerate(gpus)]
    least = min(numbered, key=lambda gpu: gpu.usable_bytes - needs(gpu))
    return replace(least, others=tuple(gpu for gpu in numbered if gpu is not least))


def processes_on(uuid: str, own: int) -> tuple[str, ...]:
    """Who has memory on a GPU, as ``nvidia-smi`` says it; () where it can't be asked.

    ``uuid``: of the GPU, as ``torch.cuda.get_device_properties`` has it, without the ``GPU-`` in front. ``own``: number
    of this process, which is left out.
    """
    query = [
        "--query-compute-apps=gpu_uuid,pid,process_name,used_memory",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    processes = []
    for line in said.splitlines():
        place, pid, name, size = (part.strip() for part in line.split(",", 3))
        if place.removeprefix("GPU-") == uuid and pid != str(own):
            # Windows and MIG give no size.
            amount = f" ({int(size) * MIB / GIB:.2f} GiB)" if size.isdigit() else ""
            processes.append(f"{name} (process {pid}){amount}")
    return tuple(processes)


def usable_sizes(capability: tuple[int, int] | None) -> list[int]:
    """Usable bytes of the catalogue's GPUs that run the same kernels."""
    like = capability or DEFAULT_CAPABILITY
    return sorted(
        {
            gpu.usable_bytes
            for gpu in catalogue().values()
            if (gpu.capability or DEFAULT_CAPABILITY) == like
        }
    )


def loading_on_unified_memory(needed: Mapping[str, Any], gpu: Gpu | None) -> int | None:
    """Bytes that loading takes where host and device share one memory; None: they don't, or it was not traced."""
    if (
        gpu is None
        or not gpu.pool_bytes
        or needed.get("host_copy_bytes") is None
        or not needed.get("phases")
    ):
        return None
    return needed["phases"].get("load", needed.get("resident_bytes", 0)) + needed["host_copy_bytes"]


def what_limits(needed: Mapping[str, Any], gpu: Gpu) -> list[str]:
    """What a verdict for this kind of GPU rests on: unified memory with its loading, an allocator that isn't modelled.

    ``needed``: as for :func:`dryfit.cards.verdict.verdict`.
    """
    texts = [f"{gpu.title}: {UNMODELLED[gpu.allocator]}"] if not gpu.is_modelled else []
    texts += [gpu.note] if gpu.note else []
    if not gpu.pool_bytes:
        return texts
    room = gpu.free_pool_bytes - gpu.context_bytes
    held = f"system and other programs hold {gpu.system_bytes / GIB:.2f} GiB of {gpu.pool_bytes / GIB:.2f}"
    texts.append(
        f"GPU and system share one memory; {held}, as is assumed (system_share in config/gpus.yaml)"
    )
    if (loading := loading_on_unified_memory(needed, gpu)) is not None:
        copy = needed["host_copy_bytes"]
        text = f"loading takes {loading / GIB:.2f} GiB of {room / GIB:.2f}, {copy / GIB:.2f} of it copies on the host"
        if loading > room:
            text += ": it fails before the first step"
        texts.append(text)
    return texts


def was_asked(trace: Mapping[str, Any], gpu: Gpu) -> bool:
    """Whether a trace's figures hold for a GPU's very size: it was replayed, or is beyond what chance decides."""
    usable = gpu.usable_bytes
    sure = usable >= trace["reserved_range_bytes"][1] or usable < trace["resident_bytes"]
    return sure or usable in trace["asked_bytes"]
