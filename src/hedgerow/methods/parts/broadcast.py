"""What the server broadcasts of the sums: all, a part of each, or what fits a size.

whole:      B·A = the sum, or its averages and, by SVD, the residual that they lack of it
orthogonal: the same, but where the sum is a stack of the clients' factors, √S·Vᵀ and U·√S of it
cut:        B·A = what a function of one matrix leaves of the sum
truncated:  B·A = the leading components that are large for their bytes, of the sum and of what is
            owed, in few bits; and what this leaves out is owed (error feedback)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hedgerow import lowrank
from hedgerow.adapters import adapter_tensors
from hedgerow.methods.parts.start_and_residual import START
from hedgerow.methods.parts.truncation import Compress, Sent, truncate_sums

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.lowrank import Factors
    from hedgerow.methods.parts.sums import Sum, Sums


class Broadcast(ABC):
    """How an entry is made of the sums."""

    is_whole: bool = False
    """Whether nothing is left out."""
    owes: bool = False
    """Whether what is left out is owed, and sent later."""
    bound: int | None = None
    """Largest rank of a matrix of the broadcast, on average over matrices; None: nothing bounds
    it."""
    bits: int = 32
    """Number of bits of each number."""
    sketches: bool = False
    """Whether of sums that are too large as many components as `bound` suffice."""

    @abstractmethod
    def make(
        self, sums: Sums, owed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> Sent:
        """Make an entry.

        Args:
            sums: of each module, read once.
            owed: what the rounds before left out, by PEFT's keys.
            shapes: (m, n) of the adapted matrices, by module.
        """


class Whole(Broadcast):
    """Nothing is lost; or what is cut of each matrix is, and `aggregation_error` tells it."""

    def __init__(
        self, cut: Callable[[Sum], Factors] | None = None, bound: int | None = None
    ) -> None:
        """Cut each matrix by itself.

        Args:
            cut: makes the broadcast of a sum that has no averages; None leaves it as it is.
            bound: largest rank that it leaves, if there is one.
        """
        self._cut, self.bound, self.is_whole = cut, bound, cut is None

    def shows_parts(self, each: Sum) -> bool:
        """Whether the broadcast of a sum that has no averages has clients' own factors in it."""
        return each.apart and self._cut is None

    def sent(self, each: Sum) -> tuple[Factors, float, float]:
        """The broadcast of a sum that has no averages, in float32.

        Returns:
            Its factors; how far they are from the sum; and the sum's norm (Frobenius, both).
        """
        pair = (each.exact if self._cut is None else self._cut(each)).float()
        return pair, lowrank.distance(pair, each.exact), lowrank.norm(each.exact)

    def make(
        self, sums: Sums, owed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> Sent:
        """The averages, where there are some, and by SVD, at its numeric rank, what they lack."""
        starts: dict[str, Factors] = {}
        residuals: dict[str, Factors] = {}
        error = size = 0.0
        apart = False
        for module, each in sums:
            exact = each.exact
            if each.average is None:
                apart |= self.shows_parts(each)
                residuals[module], missed, norm = self.sent(each)
            else:
                starts[module], norm = each.average.float(), lowrank.norm(exact)
                lacking = lowrank.svd(lowrank.difference(exact, starts[module]))
                rank = lacking.rank(beside=norm)
                residuals[module] = lacking.factors(max(rank, 1)).float()
                both = lowrank.stack([starts[module], residuals[module]])
                missed = lowrank.distance(both, exact)
            error, size = error + missed**2, size + norm**2
        relative = lowrank.relative(error, size)
        tensors = {START + key: factor for key, factor in adapter_tensors(starts).items()}
        tensors |= adapter_tensors(residuals)
        return Sent(tensors, {}, {"aggregation_error": relative}, apart)


class Orthogonal(Whole):
    """Nothing is lost, and of single clients' factors nothing is left but their sum.

    The singular value decomposition of a sum follows from the sum alone, whatever it is a stack of;
    its factors are as large as the stack, or smaller.
    """

    def shows_parts(self, each: Sum) -> bool:
        """No."""
        return False

    def sent(self, each: Sum) -> tuple[Factors, float, float]:
        """Stacked factors by SVD, at their numeric rank; a product, which is a sum, as it is."""
        if not each.apart:
            return super().sent(each)
        found = lowrank.svd(each.exact)
        norm = float(found.values.norm())
        rank = max(found.rank(beside=norm), 1)
        pair, missed = lowrank.rounded(found.factors(rank))
        return pair, math.hypot(missed, float(found.values[rank:].norm())), norm


class Truncated(Broadcast):
    """What `compress` leaves of the sums of all matrices together."""

    def __init__(self, compress: Compress, largest_rank: int) -> None:
        """Cut to what fits.

        Args:
            compress: says how far.
            largest_rank: that of the largest client.
        """
        self._compress, self._largest_rank = compress, largest_rank
        self.owes, self.bound = compress.carry, compress.largest(largest_rank)
        self.bits, self.sketches = compress.bits, self.bound is not None

    def make(
        self, sums: Sums, owed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> Sent:
        """Truncate the sums, and what is owed."""
        return truncate_sums(self._compress, sums, owed, shapes, self._largest_rank)
