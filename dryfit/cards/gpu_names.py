"""GPUs as people write them: "4090", "RTX 3090", "A100 80GB", "2x24GB", "24GiB", "8 x h100".

A name is a set of words. It means every GPU whose words contain them; where that is one GPU it is found, where it is
several of a size the answer lists them. A size in GB is what stands on the box, of which PyTorch sees a little less; a
size in GiB is taken as it is. A Mac is found by its memory, "MacBook Pro M3 Max 64GB", and is never a CUDA GPU.
"""

import difflib
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from dryfit.common.errors import UserError
from dryfit.scenario.nested_fields import counted

_MAKERS = {
    "nvidia",
    "geforce",
    "tesla",
    "quadro",
    "amd",
    "instinct",
    "radeon",
    "gpu",
    "gpus",
    "graphics",
    "card",
}
_SERIES = {"rtx", "gtx", "rx", "ada", "generation", "pcie", "sxm", "sxm2", "sxm4", "hbm3"}
# Units of memory, French ones too: GiB of each, and whether they are those of a box.
_UNITS = {
    "gib": 1.0,
    "gio": 1.0,
    "gb": 1.0,
    "go": 1.0,
    "g": 1.0,
    "mib": 1 / 1024,
    "mio": 1 / 1024,
    "mb": 1 / 1000,
    "mo": 1 / 1000,
}
_SIZE = re.compile(rf"^(?P<number>\d+(?:[.,]\d+)?)\s*(?P<unit>{'|'.join(_UNITS)})$", re.I)
# Machines and chips of Apple. Which chip it is does not matter for memory; the size does.
_APPLE = re.compile(
    r"\b(?:mac(?:book|mini|os)?|imac|apple|mps|m[1-5](?: (?:pro|max|ultra))?)\b", re.I
)
# Hosts of notebooks, and GPUs that they are known to give, the free one first; which it is, is theirs to say.
_HOSTS = {"colab": ("t4", "l4", "a100-40gb"), "kaggle": ("2xt4", "p100")}
_FAMOUS = ("rtx-4090", "rtx-3060-12gb", "t4", "a100-80gb", "h100-80gb")
# Accelerators that are no CUDA GPUs, by their names.
_NO_GPUS = re.compile(
    r"ascend|\b910[a-d]\b|atlas|cambricon|\bmlu\d|\bmtt\b|moore ?threads|hygon|\bdcu\b|kunlun|biren|metax|gaudi|habana"
    r"|\btpu\b|trainium|inferentia|\barc\b",
    re.I,
)
_FORMS = {
    "pcie",
    "sxm",
    "sxm2",
    "sxm4",
    "sxm5",
}  # how a card is built in, which its memory doesn't depend on
_FEW = 4  # GPUs that a part of a name may mean, all listed: "Ryzen AI Max+ 395"
_PRODUCT = re.compile(r"(?<!\d)(?:\d0[3-9]0|16[3-6]0)(?!\d)")  # numbers of GeForce and Radeon cards
_LARGEST_GIB = 4096  # beyond it a number is a slip


def read_gpu(
    text: str, cards: Mapping[str, str], box_share: float, where: object, sizes: Mapping[str, float]
) -> dict[str, Any]:
    """What a text says: ``{name: ...}`` or ``{vram_gib: ...}``, and ``count`` where it says how many.

    Parameters
    ----------
    cards
        The known GPUs' titles, by name.
    box_share
        How much of the size on a box PyTorch sees.
    sizes
        That on the box, in GB, by name.

    Raises
    ------
    UserError
        For a name that is unknown or means several GPUs.
    """
    written = " ".join(text.strip().split())
    if written in cards:
        return {"name": written}
    name, count = counted(written)
    if count is not None:
        kind = read_gpu(name, cards, box_share, where, sizes)
        if count < 1:
            raise UserError(
                "There is no such number of GPUs.",
                where=where,
                found=text,
                change={"gpu": f"2x{name}"},
            )
        return kind | ({"count": count} if count > 1 else {})
    size = _SIZE.match(written)
    if size:
        return {
            "vram_gib": _gib(
                float(size["number"].replace(",", ".")),
                size["unit"].lower(),
                box_share,
                text,
                where,
            )
        }
    if is_apple(written):
        return {"name": _mac(written, cards, where)}
    if _NO_GPUS.search(written):
        raise UserError(
            "This is no CUDA GPU, and its kernels and allocator are not described.",
            where=where,
            found=text,
            allowed="a CUDA GPU; or a size, for what CUDA's kernels would take: 64GiB",
            change={"gpu": "64GiB"},
        )
    plain = " ".join(word for word in re.split(r"[\s_-]+", written) if word.lower() not in _FORMS)
    numbered = re.sub(r"\b(\d+)$", r"\1gb", written)  # "a100 40"
    meant = next(
        filter(None, (_meant(one, cards, sizes) for one in (written, numbered, plain))), []
    )
    if len(meant) == 1:
        return {"name": meant[0]}
    if meant:
        raise UserError(
            f"`gpu` may mean {len(meant)} GPUs.",
            where=where,
            found=text,
            allowed="; ".join(f"{name} ({cards[name]})" for name in meant),
            change={"gpu": meant[0]},
        )
    raise _unknown(text, cards, where)


def is_apple(text: str) -> bool:
    """Whether a text names a machine or a chip of Apple, whatever else it says."""
    return bool(_APPLE.search(text))


def _gib(number: float, unit: str, box_share: float, text: str, where: object) -> float:
    number *= _UNITS[unit]
    if not 0 < number <= _LARGEST_GIB:
        raise UserError(
            "No GPU has this much memory.",
            where=where,
            found=text,
            allowed="a size such as 24GiB",
            change={"gpu": "24GiB"},
        )
    return number if "i" in unit else round(number * box_share, 4)


def _mac(text: str, cards: Mapping[str, str], where: object) -> str:
    size = re.search(r"\b(\d+)\s*g(?:i?b)?\b", text, re.I)
    name = f"apple-{size[1]}gb" if size else ""
    if name in cards:
        return name
    sizes = [known for known in cards if known.startswith("apple-")]
    raise UserError(
        "Apple builds no chip with this memory."
        if size
        else "A Mac's GPU shares the Mac's memory; how much has it?",
        where=where,
        found=text,
        allowed=f"the size behind the name, as in MacBook Pro M3 Max 64GB: {', '.join(sizes)}",
        change={
            "gpu": min(
                sizes,
                key=lambda known: abs(int(re.sub(r"\D", "", known)) - int(size[1] if size else 32)),
            )
        },
    )


def _meant(written: str, cards: Mapping[str, str], sizes: Mapping[str, float]) -> list[str]:
    """The GPUs whose words hold all that was written: whole names if there are any, else those of several sizes."""
    asked = _words(written)
    words = {
        name: _words(f"{name} {title} {sizes.get(name, 0):g}gb") for name, title in cards.items()
    }
    rest = {name: _words(name) - asked - _SERIES for name in cards if asked <= words[name]}
    if all(re.fullmatch(r"\d+gb", word) for word in asked):  # a size alone names nothing
        return []
    if len(rest) == 1:
        return list(rest)
    whole = [name for name, left in rest.items() if not left]  # "4090" is a name but for its series
    sizes = [
        name for name, left in rest.items() if all(re.fullmatch(r"\d+gb", word) for word in left)
    ]
    return whole or sizes or (list(rest) if len(rest) <= _FEW else [])


def _family(name: str) -> tuple[str, int]:
    """The letters in front of a name's first number and how many digits that has: ``a`` and 3 of an A800; none and 4 of
    a GeForce."""
    match = re.search(
        r"([a-z]*?)(\d+)", re.sub(r"\b(rtx|gtx|tesla|quadro|nvidia|geforce|pro)\b-?", "", name)
    )
    letters = "amd" if re.search(r"\brx\b|radeon", name) else match[1] if match else ""
    return letters, len(match[2]) if match else 0


@cache
def _words(text: str) -> frozenset[str]:
    """Words of a name: letters and digits, a size in GB as one word, makers left out."""
    text = re.sub(r"(\d+)\s*g(?:i?b)?\b", r"\1gb", text.lower())
    text = re.sub(r"\b(rtx|gtx|rx|tesla|quadro)(?=\d)", r"\1 ", text)  # rtx4090
    text = re.sub(r"(?<=\d)(ti|super|d|xtx?|gre)\b", r" \1", text)  # 4060ti, 4090D, 7900xtx
    text = re.sub(r"\b(mi\d{3})\b", r"\1x", text)  # MI355
    text = re.sub(r"\bmobile\b", "laptop", text)
    return frozenset(re.findall(r"[a-z0-9.]+", text)) - _MAKERS


def _unknown(text: str, cards: Mapping[str, str], where: object) -> UserError:
    host = next((name for name in _HOSTS if name in text.lower()), None)
    if host:
        given = [gpu for gpu in _HOSTS[host] if counted(gpu)[0] in cards]
        return UserError(
            f"{host.capitalize()} is no GPU: it gives one of several.",
            where=where,
            found=text,
            allowed=", ".join(given or cards),
            change={"gpu": (given or ["24GiB"])[0]},
        )
    # A slip in a number is nearest to the number alone: "4099" to "4090", which is the rtx-4090. Another letter is
    # another family: an A900 is no slip of the RTX A6000.
    known = {name: name for name in cards} | {
        re.sub(r"^(rtx|gtx|tesla|quadro)-", "", name): name for name in cards
    }
    written = "-".join(re.findall(r"[a-z0-9]+", text.lower()))
    close = difflib.get_close_matches(written, known, n=8, cutoff=0.55)
    near = list(dict.fromkeys(known[one] for one in close if _family(one) == _family(written)))[:3]
    product = _PRODUCT.search(text)
    is_slip = near and (
        product is None or product[0] in near[0]
    )  # a card that exists is no slip of another one
    size = re.search(r"(\d+)\s*(gi?b)\b|(?<!\d)(\d{1,3})$", text, re.I)
    own = f"{size[1] or size[3]}GiB" if size and 4 <= int(size[1] or size[3]) <= 512 else "12GiB"
    is_said = size and size[2] and own != "12GiB"
    guess = "" if is_slip or size else " Write its memory where 12GiB stands."
    return UserError(
        f"`gpu` is not known.{guess}",
        where=where,
        found=text,
        allowed=f"{', '.join(near or _FAMOUS)}, ... (config/gpus.yaml lists {len(cards)}); a size such as {own};"
        " several, such as 2xrtx-3090",
        change={"gpu": near[0] if is_slip and not is_said else own},
    )
