"""FlexLoRA: adapters of any ranks, summed exactly and cut by SVD to what each client can train.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", arXiv 2402.11505. Unlike FLoRA's the broadcast does not grow with the
clients' ranks, and clients go on from what they have; what does not fit the largest rank is lost.

    every round:
      client k:  go on from the leading r_k components of (A, B), and train them
      server:    U·S·Vᵀ = Σ p_k s_k B_k A_k,  A = √S·Vᵀ,  B = U·√S, to the largest rank
      everybody: the global adapter is (A, B); the base stays as it is
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hedgerow import lowrank
from hedgerow.lowrank import Factors
from hedgerow.methods.continued import AveragedAdapter
from hedgerow.methods.parts.broadcast import Whole
from hedgerow.methods.parts.starts import Global, Starts
from hedgerow.methods.stacked import StackedAdapters, StackedParts

if TYPE_CHECKING:
    from hedgerow.methods.parts.sums import Sum
    from hedgerow.settings import TrainingSettings


class FlexLoRA(StackedAdapters, AveragedAdapter):
    """Adapters of different ranks, stacked and cut to the largest."""

    name: str = "flexlora"
    summary: ClassVar[str] = "LoRA of different ranks, summed exactly and cut by SVD to the largest"
    reference: ClassVar[str] = "FlexLoRA, arXiv 2402.11505"
    renews: ClassVar[bool] = True

    def starts(self, training: TrainingSettings) -> Starts:
        """The leading components of the global adapter."""
        return Global(self)

    @property
    def parts(self) -> StackedParts:
        """Sums cut to the largest rank; `aggregation_error` is what was cut."""
        return StackedParts(broadcast=Whole(cut=cut, bound=self.largest_rank))


def cut(each: Sum) -> Factors:
    """Leading components of Σ p_k s_k B_k A_k, in descending order, of the largest rank.

    A matrix that has not so many is filled with zeros, which no training could make more of: its
    own rank is used up.
    """
    return lowrank.truncate(each.exact, rank=each.largest).padded(each.largest)
