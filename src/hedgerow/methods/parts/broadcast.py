"""What the server broadcasts of the sums: all, a part of each, or what fits a size.

whole:      B·A = the sum, or its averages and, by SVD, the residual that they lack of it
cut:        B·A = what a function of one matrix leaves of the sum
truncated:  B·A = the leading components that are large for their bytes, of the sum and of what is
            owed, in few bits; and what this leaves out is owed (error feedback)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def make(
        self, sums: Sums, owed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> Sent:
        """The averages, where there are some, and by SVD, at its numeric rank, what they lack."""
        starts: dict[str, Factors] = {}
        residuals: dict[str, Factors] = {}

        def applied_and_exact() -> Iterator[tuple[Factors, Factors]]:
            for module, each in sums:
                exact = each.exact
                if each.average is None:
                    residuals[module] = (self._cut(each) if self._cut else exact).float()
                    yield residuals[module], exact
                    continue
                starts[module] = each.average.float()
                lacking = lowrank.svd(lowrank.difference(exact, starts[module]))
                rank = lacking.rank(beside=lowrank.norm(exact))
                residuals[module] = lacking.factors(max(rank, 1)).float()
                yield lowrank.stack([starts[module], residuals[module]]), exact

        error = lowrank.relative_error(applied_and_exact())
        tensors = {START + key: factor for key, factor in adapter_tensors(starts).items()}
        return Sent(tensors | adapter_tensors(residuals), {}, {"aggregation_error": error})


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
        self.sketches = self.bound is not None

    def make(
        self, sums: Sums, owed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> Sent:
        """Truncate the sums, and what is owed."""
        return truncate_sums(self._compress, sums, owed, shapes, self._largest_rank)
