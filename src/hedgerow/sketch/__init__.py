"""Shared randomness: a long vector as its coordinates on random bases that anybody can regenerate.

    coordinates = project(delta, seed, k)            # a sender: k numbers instead of delta
    estimate = reconstruct(coordinates, seed, size)  # everybody: E[estimate] = delta

Nothing is stored and nothing is drawn in order: entry i of base j is a function of (seed, j, i),
the same bits on every device, for any chunking and thread count (`layout` says how). The bases v,
with E v² = ρ/size for each entry:

    uniform     uniform on (-1/√size, 1/√size), ρ = 1/3. Ferret's: a normal distribution truncated
                to this interval is flat to within 1/(2 size).
    rademacher  ±1/√size, ρ = 1. One random bit an entry.
    gaussian    normal with variance 1/size, ρ = 1.
    hadamard    rows of an orthogonal matrix: random signs, then a fast Walsh–Hadamard transform,
                then k rows sampled without replacement. The cost does not depend on k.

Coordinates are γ_j = size/(ρ k) ⟨v_j, delta⟩, so that Σ γ_j v_j is an unbiased estimate (Ferret,
arXiv 2409.06277, section 3). Its mean squared error is about size/k·‖delta‖² for independent bases,
and (size/k - 1)·‖delta‖² for hadamard, which is exact where k = size.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from hedgerow.lazy import torch
from hedgerow.sketch import layout, reference
from hedgerow.sketch.layout import BASES, MAX_SIZE, Basis

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BASES", "Basis", "project", "reconstruct"]


def project(delta: Tensor, seed: int, k: int, basis: Basis = "hadamard") -> Tensor:
    """The coordinates of `delta` on k random bases.

    Args:
        delta: of any shape and floating type, with at most 2³¹ - 1 entries; finite.
        seed: of 64 bits; who has it can reconstruct.
        k: the number of bases; at most as many as entries for `hadamard`.
        basis: which kind of bases.

    Returns:
        γ, shape (k,), float32, on delta's device.

    Raises:
        ValueError: an argument is out of its range.
    """
    size = delta.numel()
    _check(seed, size, k, basis)
    if not delta.is_floating_point():
        raise ValueError(f"delta must have a floating dtype, got {delta.dtype}")
    x = delta.detach().reshape(-1)
    backend = _backend(x.device)
    if basis == "hadamard":
        gamma = backend.project_hadamard(x, seed, k, _offset(seed, size))
        return gamma if k == size else torch.mul(gamma, size / k, out=gamma)
    dots = backend.project_dense(x, seed, k, basis)
    return torch.mul(dots, size**0.5 / (layout.SECOND_MOMENT[basis] * k)).float()


def reconstruct(coordinates: Tensor, seed: int, size: int, basis: Basis = "hadamard") -> Tensor:
    """Σ γ_j v_j: an unbiased estimate of the vector that was projected.

    Args:
        coordinates: γ, shape (k,).
        seed: the one that it was projected with.
        size: the vector's number of entries.
        basis: the kind of bases that it was projected on.

    Returns:
        shape (size,), float32, on the coordinates' device.

    Raises:
        ValueError: an argument is out of its range.
    """
    if coordinates.dim() != 1:
        raise ValueError(
            f"coordinates must have one dimension, got shape {list(coordinates.shape)}"
        )
    _check(seed, size, len(coordinates), basis)
    gamma = coordinates.detach().float()
    backend = _backend(gamma.device)
    if basis == "hadamard":
        return backend.reconstruct_hadamard(gamma, seed, size, _offset(seed, size))
    return backend.reconstruct_dense(gamma * size**-0.5, seed, size, basis)


def _check(seed: int, size: int, k: int, basis: str) -> None:
    if basis not in BASES:
        raise ValueError(f"basis must be one of {', '.join(BASES)}, got {basis!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be at least 0 and below 2^64, got {seed}")
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"a vector must have 1 to {MAX_SIZE} entries, got {size}")
    if k < 1 or (basis == "hadamard" and k > size):
        most = f"1 to {size} (the size)" if basis == "hadamard" else "at least 1"
        raise ValueError(f"k must be {most} for {basis}, got {k}")


def _offset(seed: int, size: int) -> int:
    """Where systematic sampling begins: uniform in [0, size)."""
    low, high, *_ = layout.philox((0, 0, 0, layout.OFFSET), seed)
    return (low | high << 32) % size


class _Backend(Protocol):
    """What the modules `reference`, `cpu` and `gpu` offer: bases unscaled, vectors flat."""

    def project_dense(self, x: Tensor, seed: int, k: int, kind: Basis) -> Tensor: ...

    def reconstruct_dense(
        self, coordinates: Tensor, seed: int, size: int, kind: Basis
    ) -> Tensor: ...

    def project_hadamard(self, x: Tensor, seed: int, k: int, offset: int) -> Tensor: ...

    def reconstruct_hadamard(
        self, coordinates: Tensor, seed: int, size: int, offset: int
    ) -> Tensor: ...


def _backend(device: torch.device) -> _Backend:
    # Compilers are loaded where they are first needed.
    if device.type == "cpu":
        from hedgerow.sketch import cpu

        return cpu
    if device.type == "cuda" and find_spec("triton") is not None:
        from hedgerow.sketch import gpu

        return gpu
    if device.type == "meta":
        from hedgerow.sketch import hollow

        return hollow
    return reference
