"""Adapters that begin anew in every round and end in the base: what FLoRA's relatives share.

Wang et al., FLoRA, arXiv 2409.05976, algorithm 1, but for what the server makes of the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hedgerow.methods.base import ClientRound
from hedgerow.methods.factors import init_factors
from hedgerow.methods.residual import ResidualAdapter

if TYPE_CHECKING:
    from torch import nn

    from hedgerow.model import Model


class RestartedAdapter(ResidualAdapter):
    """New adapters of any ranks in every round, merged into everybody's base after it.

    There is no global adapter: all of an entry is residual.
    """

    @property
    def keeps_optimizer(self) -> bool | None:
        """Nothing: moments would belong to another A."""
        return None

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach a new adapter of rank r_k to the merged weights."""
        rank = self.rank(client_round.client)
        parameters = model.attach(self.config(rank))
        generator = client_round.seeds.torch(
            "adapter", client_round.round, client_round.client.name
        )
        init_factors(parameters, generator, rank)
        return parameters
