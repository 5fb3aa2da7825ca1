"""FLoRA: federated fine-tuning with heterogeneous low-rank adapters, aggregated by stacking.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", arXiv 2409.05976, section 3 and algorithm 1. Averaging factors is wrong, since
(Σ p_k B_k)(Σ p_k A_k) has cross terms that Σ p_k B_k A_k has not; stacking them is exact, and does
not ask that all clients have one rank.

    every round:
      client k:  attach a new adapter (A_k random, B_k = 0) of its own rank r_k, and train it
      server:    A = [p_1 s_1 A_1; …; p_N s_N A_N],  B = [B_1 … B_N],  so B·A = Σ p_k s_k B_k A_k
      everybody: W <- W + B·A
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from hedgerow import lowrank
from hedgerow.errors import UserError
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Aggregate, ServerTurn, Turn
from hedgerow.methods.lora import LoraMethod, Part, aggregate_adapters, init_factors
from hedgerow.model import adapter_pairs, adapter_tensors

if TYPE_CHECKING:
    from hedgerow.model import Model
    from hedgerow.wire import Entry, Update


class FLoRA(LoraMethod):
    """Adapters of any ranks, stacked: the aggregate is exact."""

    name: Literal["flora"] = "flora"
    summary: ClassVar[str] = "LoRA of different ranks, stacked: the aggregate is exact"
    reference: ClassVar[str] = "FLoRA, arXiv 2409.05976"

    def start(self, model: Model, turn: Turn) -> Mapping[str, nn.Parameter]:
        """A new adapter of rank r_k on the merged weights."""
        rank = self.rank(turn.client)
        parameters = model.attach(self.config(rank))
        generator = turn.seeds.torch("adapter", turn.round, turn.client.name)
        init_factors(parameters, generator, rank)
        return parameters

    def entry_ranks(self, participants: int) -> Sequence[int]:
        """Σ r_k, of which more is known only where all clients take part, or all have one rank."""
        ranks = self.possible_ranks(participants)
        return range(sum(ranks[:participants]), sum(ranks[-participants:]) + 1)

    def aggregate(self, updates: Iterable[Update], turn: ServerTurn) -> Aggregate:
        """Stack the factors, of rank Σ r_k."""
        return aggregate_adapters(updates, stack)

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
