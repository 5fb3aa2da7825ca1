"""Adapters that begin anew in every round and end in the base: what FLoRA's relatives share.

Wang et al., FLoRA, arXiv 2409.05976, algorithm 1, but for what the server makes of the stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hedgerow.methods.base import Turn
from hedgerow.methods.factors import init_factors
from hedgerow.methods.residual import ResidualAdapter

if TYPE_CHECKING:
    from torch import nn

    from hedgerow.model import Model


class StackedAdapter(ResidualAdapter):
    """New adapters of any ranks in every round, merged into everybody's base after it.

    There is no global adapter: all of an entry is residual.
    """

    def start(self, model: Model, turn: Turn) -> Mapping[str, nn.Parameter]:
        """A new adapter of rank r_k on the merged weights."""
        rank = self.rank(turn.client)
        parameters = model.attach(self.config(rank))
        generator = turn.seeds.torch("adapter", turn.round, turn.client.name)
        init_factors(parameters, generator, rank)
        return parameters
