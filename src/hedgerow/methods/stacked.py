"""Adapters that begin anew in every round and end in the base: what FLoRA's relatives share.

Wang et al., FLoRA, arXiv 2409.05976, algorithm 1, but for what the server makes of the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hedgerow import lowrank
from hedgerow.errors import UserError
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Turn
from hedgerow.methods.lora import LoraMethod, Part, init_factors
from hedgerow.model import adapter_pairs, adapter_tensors

if TYPE_CHECKING:
    from hedgerow.model import Model
    from hedgerow.wire import Entry


class StackedAdapter(LoraMethod):
    """New adapters of any ranks in every round, merged into everybody's base after it."""

    def start(self, model: Model, turn: Turn) -> Mapping[str, nn.Parameter]:
        """A new adapter of rank r_k on the merged weights."""
        rank = self.rank(turn.client)
        parameters = model.attach(self.config(rank))
        generator = turn.seeds.torch("adapter", turn.round, turn.client.name)
        init_factors(parameters, generator, rank)
        return parameters

    def apply(self, model: Model, entry: Entry) -> None:
        """W <- W + B·A."""
        for module, factors in adapter_pairs(entry.tensors):
            model.merge(module, factors)

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """The stack of all rounds' stacks."""
        rounds = [dict(adapter_pairs(entry.tensors)) for entry in entries]
        if not rounds:
            raise UserError("round 0 is the base model: there is no adapter to export yet")
        return adapter_tensors({m: lowrank.stack([r[m] for r in rounds]) for m in rounds[0]})


def stack(stacked: Factors, parts: Sequence[Part]) -> Factors:
    """A = [p_1 s_1 A_1; …], B = [B_1 …] (eq. 5): weight and scale are on one factor, once."""
    for part in parts:
        stacked.A[part.rows] *= part.weight * part.scale
    return stacked
