"""GPUs: how much memory each has, and how much of it PyTorch's allocator can get.

A scenario names one of config/gpus.yaml, or a size; the gate may also ask for the one found in the machine.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from will_it_fit.cards.gpu_names import read_gpu
from will_it_fit.common.errors import UserError
from will_it_fit.common.files import read_yaml
from will_it_fit.common.text import GIB, MIB
from will_it_fit.data import data_path
from will_it_fit.engine.cuda_rules import DEFAULT_CAPABILITY
from will_it_fit.scenario.nested_fields import checked_gpu

CATALOGUE = data_path("gpus.yaml")
EXPANDABLE_LINE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"  # 2.9 and later also know PYTORCH_ALLOC_CONF


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
    count: int = 1  # of such GPUs; every figure is that of one
    index: int | None = None  # among those that CUDA_VISIBLE_DEVICES shows, in its order; None: not one of several
    others: tuple[Gpu, ...] = ()  # of this machine, which the processes of the same training use

    @property
    def label(self) -> str:
        """What to call it: its title, and which of the machine's it is."""
        return self.title if self.index is None else f"GPU {self.index} ({self.title})"

    @property
    def usable_bytes(self) -> int:
        return self.total_bytes - self.context_bytes - self.held_bytes

    @property
    def capacity_line(self) -> str:
        """What is usable, and why it is not all, in words."""
        left_out = f"{self.total_bytes / GIB:.2f} less {self.context_bytes / GIB:.2f} of CUDA context"
        if self.held_bytes:
            named = f" by {', '.join(self.holders)}" if self.holders else " by other processes"
            left_out += f" and {self.held_bytes / GIB:.2f} held{named}"
        line = f"{self.label} has {self.usable_bytes / GIB:.2f} GiB ({left_out})"
        if self.others:
            line += f", and of {len(self.others) + 1} GPUs it has the least left beside the step"
        if any(other.title != self.title for other in self.others):
            kinds = [f"{other.label} has {other.usable_bytes / GIB:.2f} GiB" for other in self.others]
            line += f"; the GPUs are of different kinds: {', '.join(kinds)}"
        return line

    @property
    def setting(self) -> str | dict[str, Any]:
        """How a scenario names it."""
        kind = {"vram_gib": self.total_bytes / GIB} if self.compute_capability is None else {"name": self.name}
        return {**kind, "count": self.count} if self.count > 1 else kind.get("name", kind)

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability as PyTorch gives it, (8, 6)."""
        if self.compute_capability is None:
            return None
        major, minor = divmod(round(self.compute_capability * 10), 10)
        return major, minor

    def to_mapping(self) -> dict[str, Any]:
        others = [other.to_mapping() for other in self.others]
        return {**asdict(self), "label": self.label, "others": others, "usable_bytes": self.usable_bytes}


def catalogue() -> dict[str, Gpu]:
    """The GPUs of config/gpus.yaml that tables and pages show, in its order (by size)."""
    return _catalogue("gpus")


def known() -> dict[str, Gpu]:
    """All GPUs of config/gpus.yaml, those too that no table shows."""
    return _catalogue("gpus", "others")


@cache
def _catalogue(*sections: str) -> dict[str, Gpu]:
    content = read_yaml(CATALOGUE)
    return {
        name: _from_entry(name, entry, content["assumptions"])
        for section in sections
        for name, entry in content[section].items()
    }


def _from_entry(name: str, entry: Mapping[str, Any], assumptions: Mapping[str, float]) -> Gpu:
    capability = entry.get("compute_capability")
    if "total_bytes" in entry or "total_gib" in entry:
        total = entry.get("total_bytes") or int(entry["total_gib"] * GIB)
        source = entry["source"]
    else:
        share = assumptions["total_share"]
        total, source = int(entry["nominal_gb"] * GIB * share), f"assumed: {share} x {entry['nominal_gb']} GiB"
    if "context_mib" in entry:
        context, context_source = entry["context_mib"], entry["context_source"]
    else:
        context, context_source = _assumed_context(capability, assumptions)
    return Gpu(name, entry["title"], total, source, int(context * MIB), context_source, capability)


def _assumed_context(capability: float | None, assumptions: Mapping[str, float]) -> tuple[float, str]:
    key = "context_mib" if capability is None or capability >= 8.0 else "context_mib_before_8_0"
    return assumptions[key], f"assumed: {assumptions[key]} MiB"


def find(gpu: str | Mapping[str, Any], where: object = "gpu") -> Gpu:
    """The GPU of a name, as config/gpus.yaml has it or as people write it (:mod:`will_it_fit.cards.gpu_names`), or of a
    size, ``{vram_gib: number}``; ``{..., count: 2}``: several.

    Raises
    ------
    UserError
        If the name is unknown, if it means several GPUs, or if the count is less than 1.
    """
    if isinstance(gpu, str) and gpu.lstrip().startswith("{"):
        gpu = _mapping(gpu, where)
    gpu = checked_gpu(gpu, where)
    cards = known()
    if isinstance(gpu, str) and gpu not in cards:
        assumptions = read_yaml(CATALOGUE)["assumptions"]
        gpu = read_gpu(gpu, {name: card.title for name, card in cards.items()}, assumptions["total_share"], where)
    if isinstance(gpu, str):
        return cards[gpu]
    if "count" in gpu:
        kind = {key: value for key, value in gpu.items() if key != "count"}
        return replace(find(kind.get("name", kind), where), count=gpu["count"])
    if "name" in gpu:
        return find(gpu["name"], where)
    context, source = _assumed_context(None, read_yaml(CATALOGUE)["assumptions"])
    total = int(gpu["vram_gib"] * GIB)
    return Gpu(f"{gpu['vram_gib']:g} GiB", "a GPU of this size", total, "as given", int(context * MIB), source, None)


def _mapping(text: str, where: object) -> Any:
    """A mapping that came as one word of a command line, ``{vram_gib: 10}``."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError("`gpu` is not YAML.", where=where, found=text, change={"gpu": {"vram_gib": 24}}) from None


def named(gpu: str | Mapping[str, float] | None, where: object = "gpu") -> Gpu | None:
    """The GPU that a scenario names, if it names one."""
    return None if gpu is None else find(gpu, where)


def from_device(
    title: str,
    total_bytes: int,
    capability: tuple[int, int],
    free_bytes: int | None = None,
    holders: tuple[str, ...] = (),
) -> Gpu:
    """The GPU that a device says it is: its own memory, and the CUDA context of the catalogue's of that title.

    Parameters
    ----------
    free_bytes
        What ``torch.cuda.mem_get_info`` says is free, this process's own context being there already: all of it is
        usable, and what else is missing others hold. None: nobody holds anything.
    holders
        Names of those others.
    """
    listed = next((gpu for gpu in catalogue().values() if gpu.title == title), None)
    compute_capability = float(f"{capability[0]}.{capability[1]}")
    if listed:
        context, source = listed.context_bytes, listed.context_source
    else:
        mib, source = _assumed_context(compute_capability, read_yaml(CATALOGUE)["assumptions"])
        context = int(mib * MIB)
    held = 0
    if free_bytes is not None:
        held = max(0, total_bytes - free_bytes - context)
        context = total_bytes - free_bytes - held
    name = listed.name if listed else title
    measured = "torch.cuda.get_device_properties"
    return Gpu(name, title, total_bytes, measured, context, source, compute_capability, held, holders if held else ())


def least_free(gpus: Sequence[Gpu], needs: Callable[[Gpu], int]) -> Gpu:
    """Of GPUs that share a training, the one with the least memory left beside the step; ``others`` has the rest.

    Parameters
    ----------
    gpus
        The GPUs in CUDA's order.
    needs
        Bytes that the step takes on such a GPU: other kinds run other kernels.
    """
    if len(gpus) == 1:
        return gpus[0]
    numbered = [replace(gpu, index=index) for index, gpu in enumerate(gpus)]
    least = min(numbered, key=lambda gpu: gpu.usable_bytes - needs(gpu))
    return replace(least, others=tuple(gpu for gpu in numbered if gpu is not least))


def processes_on(uuid: str, own: int) -> tuple[str, ...]:
    """Who has memory on a GPU, as ``nvidia-smi`` says it; () where it can't be asked.

    Parameters
    ----------
    uuid
        Of the GPU, as ``torch.cuda.get_device_properties`` has it, without the ``GPU-`` in front.
    own
        Number of this process, which is left out.
    """
    query = ["--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=10, check=True).stdout
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
    return sorted({gpu.usable_bytes for gpu in catalogue().values() if (gpu.capability or DEFAULT_CAPABILITY) == like})


class Verdict(NamedTuple):
    """Whether a step fits a GPU, and by how much; None and None where no GPU is named, or where nobody can say.

    ``headroom_bytes`` where it fits: by how much smaller the GPU might be so that every size between suffices. Where it
    does not, negative: what the least lacks from which on every size suffices.
    """

    fits: bool | None
    headroom_bytes: int | None


def verdict(needed: Mapping[str, Any], gpu: Gpu | None) -> Verdict:
    """The verdict on a step for a GPU.

    Parameters
    ----------
    needed
        What a trace says: ``required_bytes``, from where on every size suffices; ``also_fits_bytes``, intervals below
        it that suffice as well (:mod:`will_it_fit.engine.capacities`); ``bounds``, where these are a lower bound.
    """
    if gpu is None:
        return Verdict(None, None)
    usable, least = gpu.usable_bytes, needed["required_bytes"]
    if usable >= least and is_lower_bound(needed):
        return Verdict(None, None)
    for low, high in needed.get("also_fits_bytes", ()):
        if low <= usable < high:
            least = low
    return Verdict(usable >= least, usable - least)


def is_lower_bound(needed: Mapping[str, Any]) -> bool:
    """Whether a trace's figures are the least that a step can need, and nobody knows the most."""
    return "bounds" in needed and needed["bounds"]["highest_bytes"] is None


def verdicts_by_allocator(trace: Mapping[str, Any], gpu: Gpu | None) -> dict[str, dict[str, Any]]:
    """By the allocator's setting ``required_bytes`` of a step, and the fields of its :class:`Verdict`."""
    verdicts = {}
    for name, size in trace.get("required_bytes_by_allocator", {}).items():
        needed = {**trace, "required_bytes": size, "also_fits_bytes": trace["also_fits_bytes_by_allocator"][name]}
        verdicts[name] = {"required_bytes": size, **verdict(needed, gpu)._asdict()}
    return verdicts


def was_asked(trace: Mapping[str, Any], gpu: Gpu) -> bool:
    """Whether a trace's figures hold for a GPU's very size: it was replayed, or is beyond what chance decides."""
    usable = gpu.usable_bytes
    sure = usable >= trace["reserved_range_bytes"][1] or usable < trace["resident_bytes"]
    return sure or usable in trace["asked_bytes"]
