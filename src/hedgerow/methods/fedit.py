"""FedIT: federated instruction tuning by averaging the factors of equal-rank adapters.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644;
FedAvg applied to A and B apart. The baseline whose noise FLoRA removes.

    every round:
      client k:  go on from the global adapter (A, B), and train it
      server:    A = Σ p_k A_k,  B = Σ p_k B_k
      everybody: the global adapter is (A, B); the base stays as it is
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Aggregate, ClientRound, ServerRound
from hedgerow.methods.lora import LoraMethod
from hedgerow.methods.parts.one_adapter import (
    attach_global,
    held_adapter,
    merge_global,
    with_global,
)
from hedgerow.methods.stacking import Part, aggregate_adapters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.wire import Entry, Update


class AveragedAdapter(LoraMethod):
    """One global adapter that clients go on training, averaged factor by factor."""

    entries_accumulate: ClassVar[bool] = False

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the global adapter; in round 1 one that the run's seed draws for everybody."""
        return attach_global(model, self, self.rank(client_round.client), client_round.seeds)

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Average A and B apart."""
        return aggregate_adapters(updates, lambda stacked, parts, _: average(stacked, parts))

    def apply(self, model: Model, entry: Entry) -> None:
        """Make the entry's adapter the global one."""
        model.factors = dict(entry.tensors)

    def models(self, model: Model, clients: Sequence[str]) -> Iterator[str | None]:
        """Attach the global adapter to the base."""
        yield from with_global(model)

    def merge(self, model: Model, client: str | None) -> None:
        """Add the global adapter to the weights, W + B·A."""
        merge_global(model)


class HeldAdapter(AveragedAdapter):
    """A global adapter of which entries hold a part, and the model the rest."""

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """Adapter that the model holds after the entries."""
        return held_adapter(load_model())


class FedIT(AveragedAdapter):
    """Adapters of one rank, averaged factor by factor."""

    name: str = "fedit"
    summary: ClassVar[str] = "LoRA of one rank, A and B averaged apart (noisy)"
    reference: ClassVar[str] = "FedIT, arXiv 2305.05644"
    same_rank: ClassVar[bool] = True


def average(stacked: Factors, parts: Sequence[Part]) -> Factors:
    """A = Σ p_k A_k, B = Σ p_k s_k B_k, the smaller padded with zeros to the largest."""
    rank = max(part.rows.stop - part.rows.start for part in parts)
    A = torch.zeros(rank, stacked.A.shape[1])
    B = torch.zeros(stacked.B.shape[0], rank)
    for part in parts:
        A_k, B_k = stacked.A[part.rows], stacked.B[:, part.rows]
        A[: len(A_k)] += part.weight * A_k
        B[:, : len(A_k)] += part.weight * part.scale * B_k
    return Factors(A, B)
