"""Lets the versions of libraries that were measured run on ``meta``, where they were never meant to run.

Their own Python code runs, and decides which tensors exist: that is why their versions are installed
(``envs/validation-*.yaml``). Only what needs a GPU is left out: the C functions of bitsandbytes before 0.46, which
write into tensors that exist already, and the package flash-attn, in whose place stands what it allocates
(:class:`dryfit.engine.attention.FlashAttention2`).
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import sys
import types
from typing import Any

import torch

FLASH_ATTN = "2.7.3"  # of the A100 rows (the packages of `make run` beside them); the later ones allocate the same


@functools.cache
def prepare() -> None:
    """Make the installed versions ready, once; before any model of transformers is imported."""
    if older("transformers", "5"):
        _flash_attn()
        _transformers()
    if older("bitsandbytes", "0.46"):
        _bitsandbytes()


def installed(*names: str) -> dict[str, str]:
    """Versions of the libraries that decide a step's memory."""
    names = names or ("torch", "transformers", "peft", "bitsandbytes")
    return {name: importlib.metadata.version(name) for name in names}


def older(name: str, than: str) -> bool:
    """Whether a library's installed version is older than another one."""
    return _numbers(importlib.metadata.version(name)) < _numbers(than)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _flash_attn() -> None:
    """Put a stand-in for the package flash-attn in place; transformers then runs its own FlashAttention code."""
    from dryfit.engine.attention import FlashAttention2

    def flash_attn_func(
        query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return FlashAttention2.apply(query, key, value)

    def never(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Only batches without padding are traced through flash-attn.")

    contents = {
        "flash_attn": {
            "flash_attn_func": flash_attn_func,
            "flash_attn_varlen_func": never,
            "__version__": FLASH_ATTN,
        },
        "flash_attn.bert_padding": {
            "index_first_axis": never,
            "pad_input": never,
            "unpad_input": never,
        },
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {"apply_rotary_emb": never},
    }
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(attributes)
        sys.modules[name] = module
    original = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        FLASH_ATTN if name.replace("-", "_") == "flash_attn" else original(name)
    )


def _transformers() -> None:
    """Answer transformers' questions about a GPU, and give older versions the signatures of 5.x."""
    import transformers.processing_utils  # puts another object in the place of `transformers`: has to come first
    import transformers.utils

    for place in (transformers.utils, transformers.utils.import_utils):
        place.is_flash_attn_2_available = lambda: True
    from transformers import modeling_utils
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    modeling_utils.is_flash_attn_2_available = lambda: True
    check = modeling_utils.PreTrainedModel._check_and_enable_flash_attn_2.__func__

    def checked(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        return check(
            cls, config, *args, **kwargs | {"check_device_map": False}
        )  # no GPU to put the model on

    modeling_utils.PreTrainedModel._check_and_enable_flash_attn_2 = classmethod(checked)
    original = Bnb4BitHfQuantizer._process_model_before_weight_loading

    def before_loading(self: Any, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        original(self, model, device_map, keep_in_fp32_modules=[], **kwargs)

    Bnb4BitHfQuantizer._process_model_before_weight_loading = before_loading


def _bitsandbytes() -> None:
    """Leave out bitsandbytes' C functions: before 0.46 its Python code allocates their results and calls them."""
    from bitsandbytes import functional

    class NoLibrary:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: None

    functional.lib = NoLibrary()
    functional.get_ptr = lambda tensor: None
    functional.pre_call = functional.post_call = lambda device: None
    functional.is_on_gpu = lambda tensors: True
