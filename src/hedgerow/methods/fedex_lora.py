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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow.methods.factors import check_factors, check_pairs
from hedgerow.methods.parts.start_and_residual import split
from hedgerow.methods.parts.starts import Global, Starts
from hedgerow.methods.parts.sums import FactorAverages
from hedgerow.methods.residual import ResidualAdapter
from hedgerow.methods.stacked import StackedAdapters, StackedParts
from hedgerow.wire import kinds

if TYPE_CHECKING:
    from hedgerow.settings import TrainingSettings
    from hedgerow.wire import Entry


class FedExLoRA(StackedAdapters, ResidualAdapter):
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

    def starts(self, training: TrainingSettings) -> Starts:
        """The global adapter."""
        return Global(self)

    @property
    def parts(self) -> StackedParts:
        """The averages of A and B apart, and what they lack of Σ p_k s_k B_k A_k."""
        return StackedParts(sums=FactorAverages)
