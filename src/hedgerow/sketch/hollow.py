"""What the kernels return, without values: for vectors on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hedgerow.lazy import torch
from hedgerow.sketch.layout import Basis

if TYPE_CHECKING:
    from torch import Tensor


def project_dense(x: Tensor, seed: int, k: int, kind: Basis) -> Tensor:
    """Dot products, shape (k,), float64."""
    return torch.empty(k, dtype=torch.float64, device="meta")


def reconstruct_dense(coordinates: Tensor, seed: int, size: int, kind: Basis) -> Tensor:
    """Their combination, shape (size,), float32."""
    return torch.empty(size, dtype=torch.float32, device="meta")


def project_hadamard(x: Tensor, seed: int, k: int, offset: int) -> Tensor:
    """Sampled rows, shape (k,), float32."""
    return torch.empty(k, dtype=torch.float32, device="meta")


def reconstruct_hadamard(coordinates: Tensor, seed: int, size: int, offset: int) -> Tensor:
    """Their combination, shape (size,), float32."""
    return torch.empty(size, dtype=torch.float32, device="meta")
