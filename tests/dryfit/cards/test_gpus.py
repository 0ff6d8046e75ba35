"""The catalogue of cards: plausible, sourced, and found by name."""

import pytest

from dryfit.cards.gpus import (
    GIB,
    MIB,
    catalogue,
    find,
    from_device,
    known,
    least_free,
    processes_on,
    usable_sizes,
    was_asked,
)
from dryfit.common.errors import UserError


def test_every_card_has_its_figures_and_their_sources() -> None:
    for card in catalogue().values():
        assert 10 * GIB < card.total_bytes < 192 * GIB
        assert 0 < card.context_bytes < GIB
        assert card.total_source
        assert card.context_source
        assert card.usable_bytes == card.total_bytes - card.context_bytes
    sizes = [card.total_bytes / GIB for card in catalogue().values()]
    assert min(sizes) < 12
    assert max(sizes) > 178
    cards = known()
    assert len(cards) >= 80
    for name, card in cards.items():
        assert card.name == name and card.total_source and card.usable_bytes > 0
        assert not card.pool_bytes or card.system_source.startswith("assumed")
    for card in known().values():
        assert card.total_source and (card.compute_capability or not card.is_modelled)


def test_a_card_by_its_name_and_by_its_size() -> None:
    card = find("t4")
    assert (card.total_bytes, card.context_bytes, card.capability) == (
        14912 * MIB,
        int(140.875 * MIB),
        (7, 5),
    )
    assert find("t4").capacity_line == "Tesla T4 has 14.42 GiB (14.56 less 0.14 of CUDA context)"
    card = find({"vram_gib": 24})
    assert card.total_bytes == 24 * GIB
    assert card.context_source.startswith("assumed")


@pytest.mark.parametrize(
    ("written", "name", "count"),
    [
        ("4090", "rtx-4090", 1),
        (4090, "rtx-4090", 1),  # as YAML reads `gpu: 4090`
        ("rtx4090", "rtx-4090", 1),
        ("a800", "a800-80gb", 1),
        ("8xA800-80G", "a800-80gb", 8),
        ("NVIDIA A800-SXM4-80GB", "a800-80gb", 1),
        ("A800 80G PCIe", "a800-80gb", 1),
        ("h800", "h800", 1),
        ("H800-80GB", "h800", 1),
        ("4090d", "rtx-4090-d", 1),
        ("RTX 4090 D", "rtx-4090-d", 1),
        ("4090 48gb", "rtx-4090-48gb", 1),
        ("5090D", "rtx-5090-d", 1),
        ("l20", "l20", 1),
        ("h20", "h20", 1),
        ("H20-3e", "h20-3e", 1),
        ("H20 141GB", "h20-3e", 1),
        ("gh200 480gb", "gh200-96gb", 1),
        ("gb200", "gb200", 1),
        ("v100s", "v100s-32gb", 1),
        ("2080ti 22g", "rtx-2080-ti-22gb", 1),
        ("RTX 3090 24GB", "rtx-3090", 1),
        ("h100 pcie", "h100-80gb", 1),
        ("a100-pcie-40gb", "a100-40gb", 1),
        ("5060", "rtx-5060", 1),
        ("RTX 3090", "rtx-3090", 1),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super", 1),
        ("3090 ti", "rtx-3090-ti", 1),
        ("1080ti", "gtx-1080-ti", 1),
        ("T4", "t4", 1),
        ("h100 80gb", "h100-80gb", 1),
        ("H100", "h100-80gb", 1),
        ("a100 40", "a100-40gb", 1),
        ("A100 80G", "a100-80gb", 1),
        ("L40", "l40", 1),
        ("L40S", "l40s", 1),
        ("6000 ada", "rtx-6000-ada", 1),
        ("2x3090", "rtx-3090", 2),
        ("8 x H100 80GB", "h100-80gb", 8),
        ("H100 x 8", "h100-80gb", 8),
    ],
)
def test_cards_are_found_as_people_write_them(written, name, count) -> None:
    card = find(written)
    assert (card.name, card.count) == (name, count)


@pytest.mark.parametrize(
    ("written", "gib", "count"),
    [
        ("24GiB", 24, 1),
        ("10GB", 9.75, 1),
        ("2x24GB", 23.4, 2),
        ("{vram_gib: 10}", 10, 1),
        ("80 g", 78, 1),
    ],
)
def test_sizes_in_gib_are_exact_and_those_in_gb_what_stands_on_the_box(written, gib, count) -> None:
    card = find(written)
    assert card.total_bytes == int(gib * GIB)
    assert card.count == count


@pytest.mark.parametrize(
    ("written", "cards"),
    [
        ("A100", ["a100-40gb", "a100-80gb"]),
        ("v100", ["v100-16gb", "v100-32gb"]),
        ("4060 ti", ["rtx-4060-ti-16gb", "rtx-4060-ti-8gb"]),
        ("RTX 6000", ["rtx-6000-ada", "quadro-rtx-6000"]),
    ],
)
def test_a_name_of_several_cards_lists_them(written, cards) -> None:
    with pytest.raises(UserError) as caught:
        find(written, "--gpu")
    assert [part.split(" (")[0] for part in caught.value.allowed.split("; ")] == cards
    assert caught.value.write == f"gpu: {cards[0]}"


@pytest.mark.parametrize(
    ("written", "write"),
    [
        ("rtx-4091", "gpu: rtx-4090"),
        ("4099", "gpu: rtx-4090"),
        ("x", "gpu: 12GiB"),
        ("some card 32gb", "gpu: 32GiB"),
        ("Google Colab", "gpu: t4"),
        ("kaggle", "gpu: 2xt4"),
        ("24", "gpu: 24GiB"),
        (24, "gpu: {vram_gib: 24}"),
        ("0x3090", "gpu: 2x3090"),
        ("9999GiB", "gpu: 24GiB"),
        ("{vram_gib: [}", "gpu: {vram_gib: 24}"),
    ],
)
def test_an_unknown_card_says_what_to_write(written, write) -> None:
    with pytest.raises(UserError) as caught:
        find(written, "scenario.yaml")
    assert "scenario.yaml" in str(caught.value)
    assert caught.value.write == write


def test_a_device_is_what_it_says_with_the_catalogues_context() -> None:
    t4 = find("t4")
    found = from_device("Tesla T4", 15_000_000_000, (7, 5))
    assert (found.name, found.total_bytes, found.context_bytes) == (
        "t4",
        15_000_000_000,
        t4.context_bytes,
    )
    assert found.capability == (7, 5)
    unknown = from_device("NVIDIA Something", 10**10, (12, 0))
    assert unknown.name == "NVIDIA Something" and "assumed" in unknown.context_source


def test_what_others_hold_of_a_gpu_decides() -> None:
    """Another process holds 20 of 24 GB."""
    free = 4 * GIB
    held = from_device(
        "NVIDIA GeForce RTX 4090", 24 * GIB, (8, 9), free, ("python (process 42) (19.50 GiB)",)
    )
    assert held.usable_bytes == free
    assert held.held_bytes == 24 * GIB - free - find("rtx-4090").context_bytes
    assert "held by python (process 42)" in held.capacity_line
    alone = from_device("NVIDIA GeForce RTX 4090", 24 * GIB, (8, 9), 24 * GIB - 300 * MIB, ())
    assert (alone.held_bytes, alone.context_bytes, alone.holders) == (0, 300 * MIB, ())
    assert "held" not in alone.capacity_line
    # The first is free; another process holds 20 of the second's 24 GB.
    least = least_free(
        [rtx_3090(), rtx_3090(20, "python (process 42)"), rtx_3090(1, "Xorg (process 7)")],
        lambda gpu: 0,
    )
    assert (least.index, [other.index for other in least.others]) == (1, [0, 2])
    assert least.capacity_line.startswith("GPU 1 (NVIDIA GeForce RTX 3090) has 3.")
    assert (
        "20.00 held by python (process 42)" in least.capacity_line
        and "of 3 GPUs it has the least" in least.capacity_line
    )
    assert "Xorg" not in least.capacity_line and "kinds" not in least.capacity_line
    assert least.to_mapping()["others"][1]["label"] == "GPU 2 (NVIDIA GeForce RTX 3090)"


def rtx_3090(held_gib: float = 0, *by: str):
    """A GPU of 24 GB as torch describes it, with what others hold of it."""
    free = 24 * GIB - find("rtx-3090").context_bytes - int(held_gib * GIB)
    return from_device("NVIDIA GeForce RTX 3090", 24 * GIB, (8, 6), free, by)


def test_kinds_of_gpus_that_differ_are_judged_each_by_its_own_step_and_said() -> None:
    t4 = from_device("Tesla T4", 14912 * MIB, (7, 5), 14912 * MIB - find("t4").context_bytes)
    held = rtx_3090(12, "python (process 42)")
    assert held.usable_bytes < t4.usable_bytes
    assert least_free([held, t4], lambda gpu: 0).title == held.title
    least = least_free([held, t4], lambda gpu: 10 * GIB if gpu.title == "Tesla T4" else 5 * GIB)
    assert (least.title, least.index) == ("Tesla T4", 1)
    assert (
        f"of different kinds: GPU 0 (NVIDIA GeForce RTX 3090) has {held.usable_bytes / GIB:.2f} GiB"
        in least.capacity_line
    )
    alone = least_free([t4], lambda gpu: 0)
    assert (alone.index, alone.others, alone.label) == (None, (), "Tesla T4")


def test_who_holds_it_is_what_nvidia_smi_says(tmp_path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    lines = [
        "GPU-aa, 42, python, 19968",
        "GPU-aa, 7, /usr/bin/own, 300",
        "GPU-bb, 43, other, 5",
        "GPU-aa, 44, w, [N/A]",
    ]
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert processes_on("aa", own=7) == ("python (process 42) (19.50 GiB)", "w (process 44)")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert processes_on("aa", own=7) == ()


def test_several_of_a_kind_are_that_gpu_with_a_count_and_several_kinds_are_listed() -> None:
    two = find({"name": "rtx-3090", "count": 2})
    assert (two.count, two.usable_bytes, two.name) == (2, find("rtx-3090").usable_bytes, "rtx-3090")
    assert two.to_mapping()["count"] == 2 and find("rtx-3090").count == 1
    assert find({"vram_gib": 24, "count": 8}).count == 8
    assert find({"name": "rtx3090", "count": 2}) == two
    with pytest.raises(UserError, match=r"gpu\.count"):
        find({"name": "rtx-3090", "count": 0}, "memory.gate.gpu")
    with pytest.raises(UserError, match="may mean 3 GPUs"):
        find("Ryzen AI Max+ 395")


@pytest.mark.parametrize(
    ("capability", "mib"), [(None, 512), (7.5, 320), (8.0, 512), (8.6, 512), (9.0, 512)]
)
def test_a_context_that_nobody_measured_is_assumed_by_the_compute_capability(
    capability, mib
) -> None:
    """config/gpus.yaml's assumptions: 512 MiB from 8.0 on and for a size without a name, 320 MiB before."""
    if capability is None:
        assert find({"vram_gib": 24}).context_bytes == mib * MIB
        return
    major, minor = divmod(round(capability * 10), 10)
    assert from_device("NVIDIA Something", 10**10, (major, minor)).context_bytes == mib * MIB


def test_a_size_was_asked_about_or_is_that_of_a_card_with_the_same_kernels() -> None:
    card = find({"vram_gib": 1})
    usable = card.usable_bytes
    trace = {"reserved_range_bytes": [1, usable + 1], "resident_bytes": usable, "asked_bytes": [5]}
    assert not was_asked(trace, card)
    assert was_asked({**trace, "asked_bytes": [5, usable]}, card)
    assert was_asked({**trace, "reserved_range_bytes": [1, usable]}, card)  # it never runs short
    assert was_asked({**trace, "resident_bytes": usable + 1}, card)
    assert find("rtx-4090").usable_bytes in usable_sizes((8, 9))
    assert find("rtx-4090").usable_bytes not in usable_sizes((8, 0))
    assert usable_sizes(None) == usable_sizes((8, 0)) and find(
        "a100-80gb"
    ).usable_bytes in usable_sizes(None)


# --- unified memory, and allocators that are not replayed -----------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name", "allocator"),
    [
        ("DGX Spark", "gb10", "cuda"),
        ("Jetson Thor", "jetson-agx-thor", "cuda"),
        ("8xB300", "b300", "cuda"),
        ("RTX PRO 6000", "rtx-pro-6000", "cuda"),
        ("RTX PRO 5000 72GB", "rtx-pro-5000-72gb", "cuda"),
        ("MI355", "mi355x", "rocm"),
        ("MI300X", "mi300x", "rocm"),
        ("Radeon 8060S", "strix-halo-128gb", "rocm"),
        ("strix halo 64gb", "strix-halo-64gb", "rocm"),
        ("MacBook Pro M3 Max 64GB", "apple-64gb", "mps"),
        ("Mac Studio M3 Ultra 512 GB", "apple-512gb", "mps"),
        ("apple silicon 32gb", "apple-32gb", "mps"),
    ],
)
def test_cards_of_2026_are_found_with_their_allocator(written, name, allocator) -> None:
    card = find(written)
    assert (card.name, card.allocator, card.is_modelled) == (name, allocator, allocator == "cuda")
    assert card.total_source and card.context_source and card.usable_bytes > 0
    assert find(card.setting).name == name  # what a scenario says leads back to it


@pytest.mark.parametrize(
    "written", ["MacBook Pro M3 Max 63GB", "Mac mini", "M4 Pro", "MacBook Air"]
)
def test_a_mac_without_its_memory_is_asked_for_it_and_is_no_cuda_card(written) -> None:
    with pytest.raises(UserError) as caught:
        find(written, "--gpu")
    assert "apple-64gb" in caught.value.allowed and caught.value.write.startswith("gpu: apple-")


def test_of_unified_memory_the_system_keeps_a_part() -> None:
    spark = find("gb10")
    assert spark.system_bytes == 16 * GIB and spark.free_pool_bytes == spark.pool_bytes - 16 * GIB
    assert spark.usable_bytes == spark.free_pool_bytes - spark.context_bytes
    assert "16.00 that the system holds" in spark.capacity_line
    small = find("apple-16gb")  # macOS gives the GPU less than the system leaves
    assert small.system_bytes == pytest.approx(3.2 * GIB, rel=1e-6)
    assert small.usable_bytes == small.total_bytes < small.free_pool_bytes


def test_what_your_card_holds_beside_the_allocator_can_be_said() -> None:
    card = find("{name: rtx4090, context_mib: 530}")
    assert (
        card.usable_bytes == find("rtx-4090").total_bytes - 530 * MIB
        and card.context_source == "as given"
    )
    assert card.setting == {"name": "rtx-4090", "context_mib": 530} and find(card.setting) == card
    several = find({"name": "2x3090", "context_mib": 300.5})
    assert (several.count, several.context_bytes) == (2, int(300.5 * MIB)) and find(
        several.setting
    ) == several
    assert find({"vram_gib": 24, "context_mib": 0}).usable_bytes == 24 * GIB
    with pytest.raises(UserError, match="leaves nothing of Tesla T4") as caught:
        find({"name": "t4", "context_mib": 16_000})
    assert "context_mib: 530" in caught.value.write
    with pytest.raises(UserError, match="context_mib"):
        find({"name": "t4", "context_mib": -1})


@pytest.mark.parametrize(
    ("written", "offered", "not_offered"),
    [
        ("a900", "rtx-4090", "rtx-a6000"),  # no slip of a workstation's card
        ("h300", "h800, h200", "rtx-4090"),
        ("m40", "a size such as 40GiB", "l40"),
        ("4099", "rtx-4090", "a100-80gb"),
        ("gh200", "gh200-96gb", "h200 "),
        ("ascend 910b", "a size", "a10,"),
        ("MTT S4000", "a size", "a4000"),
        ("rx 9060", "rx-9070-xt", "rtx-5060"),
    ],
)
def test_a_name_that_is_not_known_offers_its_own_family(
    written: str, offered: str, not_offered: str
) -> None:
    with pytest.raises(UserError) as caught:
        find(written)
    assert offered in caught.value.allowed and not_offered not in caught.value.allowed + str(
        caught.value.write
    )
