"""FedEx-LoRA: FedIT made exact by merging what the averages lack into everybody's base.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large
Language Models", arXiv 2410.09432. The residual has a rank of at most N·r beside B·A's r; it
travels as low-rank factors, never as a matrix.

    every round:
      client k:  go on from the global adapter (A, B), and train it
      server:    A = Σ p_k A_k,  B = Σ p_k s_k B_k,  B'·A' = Σ p_k s_k B_k A_k - B·A  (by SVD)
      everybody: W <- W + B'·A', and the global adapter is (A, B)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow.lowrank import Factors
from hedgerow.methods.base import Aggregate, ServerRound
from hedgerow.methods.continued import average
from hedgerow.methods.factors import check_factors, check_pairs
from hedgerow.methods.residual import ResidualAdapter, split, with_residuals
from hedgerow.methods.stacking import StackedFactors, exact_sum
from hedgerow.wire import kinds

if TYPE_CHECKING:
    from hedgerow.wire import Entry, Update


class FedExLoRA(ResidualAdapter):
    """Adapters of one rank, averaged factor by factor, with the residual in the base."""

    name: str = "fedex_lora"
    summary: ClassVar[str] = "LoRA of one rank, averaged; what averages lack enters the base: exact"
    reference: ClassVar[str] = "FedEx-LoRA, arXiv 2410.09432"
    same_rank: ClassVar[bool] = True

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for a start adapter of one rank, and a residual of up to the rank of all in it."""
        start, residual = split(kinds(entry.tensors))
        check_factors(start, shapes, self.entry_ranks(len(entry.participants)))
        most = (len(entry.participants) + 1) * self.largest_rank
        check_pairs(residual, shapes, {m: min(*shape, most) for m, shape in shapes.items()})

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """The averages of A and B apart, and what they lack of Σ p_k s_k B_k A_k."""
        arrived = StackedFactors(updates)
        shares = arrived.shares()

        def sums() -> Iterator[tuple[str, Factors, Factors]]:
            for module in arrived:
                stacked, parts = arrived.read(module, shares)
                exact = exact_sum(stacked, parts)
                yield module, average(stacked, parts), exact

        return with_residuals(sums())
