"""The reference: plain torch operations that follow `layout` word by word; slow, on any device.

What the compiled backends are tested against, and the backend of devices that have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hedgerow.lazy import torch
from hedgerow.sketch import layout
from hedgerow.sketch.layout import TILE, Basis

if TYPE_CHECKING:
    from torch import Tensor

_LOW = 0xFFFFFFFF


def philox(counter: list[Tensor | int], seed: int) -> list[Tensor]:
    """Philox4x32-10: four words for each counter.

    Args:
        counter: four words (int64 tensors that broadcast, or numbers), each below 2³².
        seed: of 64 bits, the two words of the key.

    Returns:
        Four int64 tensors of values below 2³².
    """
    words = [torch.as_tensor(word) for word in counter]
    c = list(torch.broadcast_tensors(*words))  # type: ignore[no-untyped-call]
    key = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(layout.PHILOX_ROUNDS):
        high0, low0 = _multiply(c[0], layout.PHILOX_M[0])
        high1, low1 = _multiply(c[2], layout.PHILOX_M[1])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(k + w) & _LOW for k, w in zip(key, layout.PHILOX_W, strict=True)]
    return c


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of two words; int64 has no room for all of it at once."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def entries(
    kind: Basis, seed: int, base: int, start: int, stop: int, device: torch.device | str
) -> Tensor:
    """Unscaled entries start … stop of a dense base; float32."""
    index = torch.arange(start, stop, device=device)
    if kind == "rademacher":
        return _signs(seed, base, index, layout.RADEMACHER)
    purpose = layout.UNIFORM if kind == "uniform" else layout.GAUSSIAN
    word, half = _words(seed, base, index, purpose, 2)
    if kind == "uniform":
        return (2 * (word >> 16 * half & 0xFFFF) - 65535).float() * 2.0**-16
    return _normal(word & 0xFFFF, word >> 16, half == 1)


def _signs(seed: int, base: int, index: Tensor, purpose: int) -> Tensor:
    word, bit = _words(seed, base, index, purpose, 32)
    return (1 - 2 * (word >> bit & 1)).float()


def _words(seed: int, base: int, index: Tensor, purpose: int, parts: int) -> tuple[Tensor, Tensor]:
    """The word that each entry is made of, and which of the word's `parts` it is."""
    lanes = TILE // (4 * parts)
    tile, entry = index // TILE, index % TILE
    words = philox([tile * lanes + entry % lanes, 0, base, purpose], seed)
    slot = entry // lanes
    return torch.stack(words).gather(0, (slot // parts)[None])[0], slot % parts


def _normal(radius: Tensor, angle: Tensor, second: Tensor) -> Tensor:
    """Box–Muller: the first or second of two normal numbers from 16 bits of radius and of angle."""
    mantissa, exponent = torch.frexp((2 * radius + 1).float())
    mantissa = mantissa * 2
    log = _polynomial(layout.LOG, mantissa) + (exponent - 18).float() * layout.LN2
    # torch's own square root of float32 is not always the nearest number.
    length = torch.sqrt(torch.clamp(log * -2, min=0).double()).float()
    quarter = angle >> 14
    t = (2 * (angle & 0x3FFF) - 16383).float() * 2.0**-15
    square = t * t
    sine, cosine = _polynomial(layout.SIN, square) * t, _polynomial(layout.COS, square)
    odd = (quarter & 1) == 1
    value = torch.where(odd ^ second, sine, cosine)
    negative = torch.where(second, quarter & 2, (quarter + 1) & 2) != 0
    return length * torch.where(negative, -value, value)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def project_dense(x: Tensor, seed: int, k: int, kind: Basis) -> Tensor:
    """Inner products of x with k unscaled bases; float64."""
    dot = [entries(kind, seed, j, 0, len(x), x.device).double() @ x.double() for j in range(k)]
    return torch.stack(dot)


def reconstruct_dense(coordinates: Tensor, seed: int, size: int, kind: Basis) -> Tensor:
    """The sum of unscaled bases, each times its coordinate; float32."""
    total = torch.zeros(size, dtype=torch.float64, device=coordinates.device)
    for j, coordinate in enumerate(coordinates.double()):
        total += entries(kind, seed, j, 0, size, coordinates.device) * coordinate
    return total.float()


def project_hadamard(x: Tensor, seed: int, k: int, offset: int) -> Tensor:
    """The sampled rows of the signed, transformed x; float32."""
    coordinates = torch.empty(k, dtype=torch.float32, device=x.device)
    for segment, start, rows, first in _sampled(seed, len(x), k, offset, x.device):
        signs = _signs(seed, 0, segment, layout.SIGNS)
        coordinates[first : first + len(rows)] = fwht(x[segment] * signs)[rows - start]
    return coordinates


def reconstruct_hadamard(coordinates: Tensor, seed: int, size: int, offset: int) -> Tensor:
    """The transpose of `project_hadamard`; float32."""
    device = coordinates.device
    out = torch.zeros(size, dtype=torch.float32, device=device)
    for segment, start, rows, first in _sampled(seed, size, len(coordinates), offset, device):
        spread = torch.zeros(len(segment), dtype=torch.float32, device=device)
        spread[rows - start] = coordinates[first : first + len(rows)]
        out[segment] = fwht(spread) * _signs(seed, 0, segment, layout.SIGNS)
    return out


def fwht(x: Tensor) -> Tensor:
    """The orthonormal Walsh–Hadamard transform of a vector of 2ᵇ entries, strides 1, 2, 4 …"""
    size, stride = len(x), 1
    while stride < size:
        pairs = x.view(-1, 2, stride)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).view(-1)
        stride *= 2
    return x * float(np.float32(size**-0.5))


def rows(seed: int, start: int, length: int, count: int, device: torch.device | str) -> Tensor:
    """The first `count` of a segment's rows (`start` and on), in a pseudo-random order.

    The order is a bijection of [0, length): three times multiply by an odd number, add a number,
    and mix the high bits into the low ones; the last addition makes every row equally likely.
    """
    a, b, c, d = layout.philox((start, 0, 0, layout.ROWS), seed)
    e, f, g, h = layout.philox((start, 1, 0, layout.ROWS), seed)
    mask, shift = length - 1, (length.bit_length()) // 2
    row = torch.arange(count, device=device)
    for factor, addend in ((a, b), (c, d), (e, f)):
        row = (row * (factor | 1) + addend) & mask
        row = row ^ row >> shift
    return ((row * (g | 1) + h) & mask) + start


def _sampled(
    seed: int, size: int, k: int, offset: int, device: torch.device
) -> Iterator[tuple[Tensor, int, Tensor, int]]:
    """Each segment's indices, its start, its sampled rows, and their place in the coordinates."""
    whole = [(start, TILE) for start in range(0, size - size % TILE, TILE)]
    for start, length in [*whole, *layout.segments(size)]:
        first = layout.samples_before(start, size, k, offset)
        count = layout.samples_before(start + length, size, k, offset) - first
        segment = torch.arange(start, start + length, device=device)
        yield segment, start, rows(seed, start, length, count, device), first
