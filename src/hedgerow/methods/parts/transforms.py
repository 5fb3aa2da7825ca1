"""Orthogonal transforms, in which a codec chooses the values that are sent.

Of a change as it is, the largest values are where one part of the model moves most. In another
orthonormal basis they are what all its values have in common: a direction that a random rotation
finds (EDEN, arXiv 2108.08842), or the slow waves of a cosine transform (DeMo, arXiv 2411.19870).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from hedgerow.lazy import torch
from hedgerow.sketch import project, reconstruct

if TYPE_CHECKING:
    from torch import Tensor

TransformName = Literal["hadamard", "dct"]

LONGEST_SIDE = 64
"""Longest side of the pieces that a cosine transform is made of, as in DeMo's code."""


AT_ONCE = 1 << 16
"""Number of values that are rebuilt at once, about as many as a cache holds."""


class Transform(NamedTuple):
    """An orthonormal map of one tensor, and its inverse."""

    forward: Callable[[Tensor, int], Tensor]
    """Values, shape (size,), of a tensor of any shape in float32, and a seed."""
    backward: Callable[[Tensor, tuple[int, ...], int], Tensor]
    """Tensor of a given shape, rebuilt from its values, shape (size,), on the CPU, and the seed."""
    is_random: bool
    """Whether it depends on the seed."""


def _hadamard(tensor: Tensor, seed: int) -> Tensor:
    return project(tensor, seed, tensor.numel())


def _hadamard_back(values: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    return reconstruct(values, seed, len(values)).view(shape)


def _dct(tensor: Tensor, seed: int) -> Tensor:
    rows, a, columns, b = _pieces(tuple(tensor.shape))
    pieces = tensor.reshape(rows, a, columns, b).transpose(1, 2)
    left, right = (_cosines(side).to(tensor.device) for side in (a, b))
    return (left @ pieces @ right.T).reshape(-1)


def _dct_back(values: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    rows, a, columns, b = _pieces(shape)
    down, across = _cosines(a), _cosines(b)
    # A product of matrices adds in another order on another machine, and everybody has to rebuild
    # the same bits.
    blocks = [
        _sum_of_waves(_sum_of_waves(block, down, axis=1), across, axis=2)
        for block in torch.split(values.view(-1, a, b), max(1, AT_ONCE // (a * b)))
    ]
    return torch.cat(blocks).view(rows, columns, a, b).transpose(1, 2).reshape(shape)


def _sum_of_waves(pieces: Tensor, waves: Tensor, axis: int) -> Tensor:
    """Σ_j c_j·(wave j) along an axis of pieces, whose values are c_j: one wave after another."""
    total = torch.zeros_like(pieces)
    for j, wave in enumerate(waves):
        total += pieces.narrow(axis, j, 1) * wave.view(-1, *[1] * (2 - axis))
    return total


def _pieces(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A matrix of (rows × a, columns × b) values, of pieces of a × b; a vector has one row."""
    m = shape[0] if len(shape) > 1 else 1
    n = math.prod(shape) // m
    a, b = (max(i for i in range(1, LONGEST_SIDE + 1) if side % i == 0) for side in (m, n))
    return m // a, a, n // b, b


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, shape (size, size): row j is a wave of j half periods."""
    places = torch.arange(size, dtype=torch.float64)
    waves: Tensor = torch.cos(math.pi / size * places[:, None] * (places + 0.5))
    waves[0] *= 0.5**0.5
    return waves.mul_((2 / size) ** 0.5).float()


TRANSFORMS: dict[TransformName, Transform] = {
    "hadamard": Transform(_hadamard, _hadamard_back, is_random=True),
    "dct": Transform(_dct, _dct_back, is_random=False),
}
"""Transforms by the name that the experiment file uses."""
