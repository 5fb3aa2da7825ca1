"""Rice codes of ascending whole numbers: their gaps in about as few bits as their entropy.

Golomb (1966) and Rice (1979), as Sattler et al. use them for sparse updates, arXiv 1903.02891,
section 5.2 and algorithm 3. A gap g ≥ 1 is (g - 1) div 2ᵇ in unary and (g - 1) mod 2ᵇ in b bits.
Here the unary parts of all gaps stand together, and so do the others: then both are read at once,
by a kernel instead of bit by bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hedgerow.errors import InvalidMessage
from hedgerow.lazy import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_GOLDEN = (5**0.5 + 1) / 2

_PIECE = 1 << 16
"""Numbers that are coded at a time, a multiple of 8: about as many as a cache holds."""


class Gaps(NamedTuple):
    """Ascending numbers as they travel, each a uint8 tensor; unused bits of the last byte are 0."""

    unary: Tensor
    binary: Tensor


def parameter(count: int, total: int) -> int:
    """Number b of binary bits that suits `count` numbers below `total` at random places."""
    p = min(count / total, 0.5)
    return max(0, 1 + math.floor(math.log2(math.log(_GOLDEN - 1) / math.log1p(-p))))


def expected_bits(count: int, total: int) -> float:
    """Mean number of bits for each of `count` numbers below `total` at random places."""
    b = parameter(count, total)
    beyond = (1 - count / total) ** (1 << b)  # the share of gaps that a unary part goes on for
    return b + 1 / (1 - beyond)


def encode(places: NDArray[np.int64], total: int) -> Gaps:
    """Encode at least one number, ascending, each at least 0 and below `total`."""
    b = parameter(len(places), total)
    unary, binary, last = [], [], -1
    for start in range(0, len(places), _PIECE):
        piece = places[start : start + _PIECE]
        gaps = np.diff(piece, prepend=last) - 1
        last = piece[-1]
        ends = np.cumsum((gaps >> b) + 1) - 1  # each unary part is zeros, and a one
        ones = np.zeros(ends[-1] + 1, dtype=np.uint8)
        ones[ends] = 1
        unary.append(ones)
        # An empty tensor would be none: where there are no binary parts, there is a byte of zeros.
        digits = np.zeros((len(gaps), b) if b else (1, 1), dtype=np.uint8)
        for bit in range(b):
            digits[:, bit] = gaps >> bit & 1
        binary.append(np.packbits(digits, bitorder="little"))
    packed = np.packbits(np.concatenate(unary), bitorder="little")
    whole = np.concatenate(binary if b else binary[:1])
    return Gaps(torch.from_numpy(packed), torch.from_numpy(whole))


def decode(gaps: Gaps, count: int, total: int) -> NDArray[np.int64]:
    """The numbers that were encoded.

    Raises:
        InvalidMessage: it is not what `encode` makes of `count` numbers below `total`.
    """
    b = parameter(count, total)
    unary, binary = (np.unpackbits(each.numpy(), bitorder="little") for each in gaps)
    places: NDArray[np.int64] = np.flatnonzero(unary)  # of the ones that end unary parts, so far
    if len(places) != count or len(unary) - places[-1] > 8 or binary[count * b :].any():
        raise InvalidMessage(f"gaps must be those of {count} places")
    end = last = -1
    for start in range(0, count, _PIECE):
        piece = places[start : start + _PIECE]
        parts = np.diff(piece, prepend=end) - 1 << b
        end = piece[-1]
        for bit in range(b):
            parts += binary[start * b + bit :: b][: len(parts)].astype(np.int64) << bit
        np.cumsum(parts + 1, out=piece)
        piece += last
        last = piece[-1]
    if last >= total:
        raise InvalidMessage(f"gaps must end below {total}")
    return places


def binary_size(count: int, total: int) -> int:
    """Number of bytes of the binary parts, at least 1."""
    return max(1, -(-count * parameter(count, total) // 8))


def most_unary(count: int, total: int) -> int:
    """Largest number of bytes that the unary parts of `count` numbers below `total` have."""
    return -(-(count + (total >> parameter(count, total))) // 8)
