"""FLoRIST: FLoRA's stacked factors, re-factorised and cut where its singular values fall off.

Ramesh et al., "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated
Fine-Tuning of Large Language Models", arXiv 2506.09199. The broadcast no longer grows with the
number of clients, but with the energy that is to be kept: each matrix has its own rank.

    every round:
      client k:  attach a new adapter (A_k random, B_k = 0) of its own rank r_k, and train it
      server:    U·S·Vᵀ = Σ p_k s_k B_k A_k by SVDs of the small stacked factors; of each matrix
                 the fewest leading components whose squares reach `threshold` of all,
                 A = √S·Vᵀ, B = U·√S
      everybody: W <- W + B·A
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hedgerow import lowrank
from hedgerow.lowrank import Factors
from hedgerow.methods.factors import check_pairs
from hedgerow.methods.parts.broadcast import Whole
from hedgerow.methods.parts.starts import New, Starts
from hedgerow.methods.residual import ResidualAdapter
from hedgerow.methods.stacked import StackedAdapters, StackedParts
from hedgerow.wire import kinds

if TYPE_CHECKING:
    from hedgerow.methods.parts.sums import Sum
    from hedgerow.settings import TrainingSettings
    from hedgerow.wire import Entry


class FLoRIST(StackedAdapters, ResidualAdapter):
    """Adapters of any ranks, stacked and cut at a share of the energy."""

    name: str = "florist"
    summary: ClassVar[str] = "LoRA of different ranks, stacked and cut by a threshold on the energy"
    reference: ClassVar[str] = "FLoRIST, arXiv 2506.09199"
    renews: ClassVar[bool] = True
    compresses_broadcast: ClassVar[bool] = True

    threshold: float = Field(0.9, gt=0, le=1)
    """Share of the squared singular values of each matrix that is kept."""

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for a pair for each module, of a rank that the stacked factors may have had."""
        _, most = self.possible_sums(len(entry.participants))
        check_pairs(kinds(entry.tensors), shapes, {m: min(*mn, most) for m, mn in shapes.items()})

    def starts(self, training: TrainingSettings) -> Starts:
        """A new adapter in every round."""
        return New(self)

    @property
    def parts(self) -> StackedParts:
        """Sums cut to their leading components; `aggregation_error` is what was cut."""
        return StackedParts(broadcast=Whole(cut=self._cut))

    def _cut(self, each: Sum) -> Factors:
        return lowrank.truncate(each.exact, energy=self.threshold)
