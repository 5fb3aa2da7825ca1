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

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow import lowrank
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Aggregate, ServerRound
from hedgerow.methods.continued import AveragedAdapter
from hedgerow.methods.stacking import Part, aggregate_adapters

if TYPE_CHECKING:
    from hedgerow.wire import Update


class FlexLoRA(AveragedAdapter):
    """Adapters of different ranks, stacked and cut to the largest."""

    name: str = "flexlora"
    summary: ClassVar[str] = "LoRA of different ranks, summed exactly and cut by SVD to the largest"
    reference: ClassVar[str] = "FlexLoRA, arXiv 2402.11505"

    @property
    def keeps_optimizer(self) -> bool | None:
        """Nothing: moments would belong to factors that are no more once these are made anew."""
        return None

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Approximate the exact sum by the largest rank, and report the error."""
        return aggregate_adapters(updates, cut)


def cut(stacked: Factors, parts: Sequence[Part], exact: Factors) -> Factors:
    """Leading components of Σ p_k s_k B_k A_k, in descending order, of the largest rank.

    A matrix that has not so many is filled with zeros, which no training could make more of: its
    own rank is used up.
    """
    rank = max(part.rows.stop - part.rows.start for part in parts)
    return lowrank.truncate(exact, rank=rank).padded(rank).float()
