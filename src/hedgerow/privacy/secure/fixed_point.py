"""Fixed-point codes of real numbers, whose sums modulo 2^b are exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Bits = Literal[16, 32, 64]
"""Number of bits of a code, b."""

Codes = NDArray[np.unsignedinteger]
"""Codes modulo 2^b."""

PIECE = 1 << 16
"""Number of codes that are made, masked or read at a time; beside all codes, they are few."""

_UNSIGNED: dict[int, type[np.unsignedinteger]] = {16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED: dict[int, type[np.signedinteger]] = {16: np.int16, 32: np.int32, 64: np.int64}


@dataclass(frozen=True)
class FixedPoint:
    """Codes q = round(x·s) mod 2^b of numbers from -`largest` to `largest`.

    s is as large as it can be without any sum of so many codes leaving the range.
    """

    bits: Bits
    largest: float
    """Largest magnitude of a number."""
    count: int
    """Largest number of codes in a sum."""

    @property
    def scale(self) -> float:
        """Number of codes in a unit, s."""
        # Of 64 bits, a float64 holds 53.
        most: int = 2 ** (min(self.bits, 54) - 1) - 1
        return (most // self.count) / self.largest

    @property
    def step(self) -> float:
        """Distance of two codes, in units; a number is off by half of it at most."""
        return 1 / self.scale

    @property
    def unsigned(self) -> type[np.unsignedinteger]:
        """NumPy's type of codes."""
        return _UNSIGNED[self.bits]

    def encode(self, numbers: NDArray[np.floating], weight: float = 1.0) -> Codes:
        """Codes of weight · numbers, contiguous as masks need them, in whatever order those lie.

        Raises:
            ValueError: one is larger than `largest`, or not finite.
        """
        flat = numbers.reshape(-1)
        length = weight * float(np.maximum(flat.max(initial=0.0), -flat.min(initial=0.0)))
        if not length <= self.largest:
            raise ValueError(f"holds {length:.3g}, and codes go up to {self.largest:g}")
        codes = np.empty(flat.shape, self.unsigned)
        for first in range(0, len(flat), PIECE):
            wide = flat[first : first + PIECE].astype(np.float64)
            wide *= weight
            wide *= self.scale
            whole = np.rint(wide, out=wide).astype(np.int64)
            codes[first : first + PIECE] = whole.astype(_SIGNED[self.bits]).view(self.unsigned)
        return codes.reshape(numbers.shape)

    def decode(
        self, total: Codes, weight: float = 1.0, dtype: type[np.floating] = np.float64
    ) -> NDArray[np.floating]:
        """Sum of numbers, from the sum of their codes modulo 2^b, divided by `weight`.

        Args:
            total: sum of codes.
            weight: sum of the numbers' weights, where their mean is meant.
            dtype: of the result; what is between is in float64.
        """
        flat = total.reshape(-1).view(_SIGNED[self.bits])
        numbers = np.empty(flat.shape, dtype)
        for first in range(0, len(flat), PIECE):
            wide = flat[first : first + PIECE].astype(np.float64)
            wide /= self.scale
            wide /= weight
            numbers[first : first + PIECE] = wide
        return numbers.reshape(total.shape)
