"""Kinds of tensors, whatever their numbers: types, shapes and names that are expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hedgerow.errors import InvalidMessage
from hedgerow.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
}
"""Number types that may travel: safetensors' names, and torch's."""
_CODES = {name: code for code, name in TYPES.items()}


def code_of(dtype: torch.dtype) -> str:
    """Name of a number type in a safetensors header; torch's of one that may not travel."""
    name = str(dtype).removeprefix("torch.")
    return _CODES.get(name, name)


def dtype_of(code: str) -> torch.dtype:
    """Number type with this name in a safetensors header."""
    dtype: torch.dtype = getattr(torch, TYPES[code])
    return dtype


def is_writable(tensor: Tensor) -> bool:
    """Whether a tensor's type and shape are ones that files here may have."""
    return str(tensor.dtype).removeprefix("torch.") in _CODES and 0 not in tensor.shape


class Kind(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of such a tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"dtype {str(self.dtype).removeprefix('torch.')} of shape {list(self.shape)}"


def in_float32(shapes: Mapping[str, Sequence[int]]) -> dict[str, Kind]:
    """Kinds of float32 tensors of these shapes, by name."""
    return {name: Kind(torch.float32, tuple(shape)) for name, shape in shapes.items()}


def seed_kind() -> Kind:
    """Kind of a seed that travels: int64 of shape (1,)."""
    return Kind(torch.int64, (1,))


def check_kinds(given: Mapping[str, Kind], expected: Mapping[str, Kind]) -> None:
    """Raise `InvalidMessage` unless tensors of exactly the expected names and kinds are given."""
    if missing := expected.keys() - given.keys():
        raise InvalidMessage(f"tensor {min(missing)} is missing")
    if unknown := given.keys() - expected.keys():
        raise InvalidMessage(f"unexpected tensor {min(unknown)}")
    for name, kind in expected.items():
        if given[name] != kind:
            raise InvalidMessage(f"{name}: expected {kind}, got {given[name]}")
