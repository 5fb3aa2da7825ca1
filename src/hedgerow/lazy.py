"""Libraries that take seconds to import, each of them imported when something of it is first used.

The experiment file names methods, and so whoever reads one imports them all; but `hedgerow --help`,
`methods`, `explain` and a mistake in a file need no tensors, and should answer at once. Rooms that
those commands enter take torch and its like from here. Type checkers see the libraries themselves.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    """A library's stand-in, which hands on what it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    @cached_property
    def _library(self) -> ModuleType:
        return importlib.import_module(self.__name__)


if TYPE_CHECKING:
    import bitsandbytes as bitsandbytes
    import huggingface_hub as huggingface_hub
    import peft as peft
    import safetensors as safetensors
    import tokenizers as tokenizers
    import torch as torch
    import transformers as transformers
else:
    bitsandbytes = _Lazy("bitsandbytes")
    huggingface_hub = _Lazy("huggingface_hub")
    peft = _Lazy("peft")
    safetensors = _Lazy("safetensors")
    tokenizers = _Lazy("tokenizers")
    torch = _Lazy("torch")
    transformers = _Lazy("transformers")
