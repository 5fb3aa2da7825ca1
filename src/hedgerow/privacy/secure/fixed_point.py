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

    def encode(self, numbers: NDArray[np.floating]) -> Codes:
        """Codes of numbers, contiguous as masks need them, whatever order the numbers are in.

        Raises:
            ValueError: one is larger than `largest`, or not finite.
        """
        wide = np.asarray(numbers, dtype=np.float64, order="C")
        length = float(np.max(np.abs(wide), initial=0.0))
        if not length <= self.largest:
            raise ValueError(f"holds {length:.3g}, and codes go up to {self.largest:g}")
        codes = np.rint(wide * self.scale).astype(np.int64)
        return codes.astype(_SIGNED[self.bits]).view(self.unsigned)

    def decode(self, total: Codes) -> NDArray[np.float64]:
        """Sum of numbers, from the sum of their codes modulo 2^b."""
        return total.view(_SIGNED[self.bits]).astype(np.float64) / self.scale
