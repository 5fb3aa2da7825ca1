"""Adapters by PEFT's key names: the only room, beside wire and export, that knows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hedgerow.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."


def adapter_pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Factors]]:
    """The factors of each adapted module, from tensors with PEFT's key names, in a fixed order."""
    for key in sorted(tensors):
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            other = key.replace(".lora_A.", ".lora_B.")
            if other in tensors:
                yield module, Factors(tensors[key], tensors[other])


def adapter_pair(tensors: Mapping[str, Tensor], module: str) -> Factors | None:
    """The factors of one module, from tensors with PEFT's key names; None where it has none."""
    A, B = (f"{PREFIX}{module}.lora_{factor}.weight" for factor in "AB")
    return Factors(tensors[A], tensors[B]) if A in tensors and B in tensors else None


def adapter_tensors(pairs: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The inverse of `adapter_pairs`."""
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.B
    return tensors


def embedding_pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Factors]]:
    """The factors of each adapted embedding; their product is its transposed change."""
    for key in sorted(tensors):
        if key.endswith(_EMBEDDING_A):
            module = key.removeprefix(PREFIX).removesuffix(_EMBEDDING_A)
            other = key.removesuffix(_EMBEDDING_A) + _EMBEDDING_B
            if other in tensors:
                yield module, Factors(tensors[key], tensors[other])


def embedding_tensors(pairs: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The inverse of `embedding_pairs`."""
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{PREFIX}{module}{_EMBEDDING_A}"] = pair.A
        tensors[f"{PREFIX}{module}{_EMBEDDING_B}"] = pair.B
    return tensors


_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
