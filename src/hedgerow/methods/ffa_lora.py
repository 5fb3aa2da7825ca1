"""FFA-LoRA: A is drawn once and frozen, B alone is trained, sent and averaged.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313.
Clients of different ranks share rows of A, so their averages are exact as well.

    once:        A is drawn from the run's seed, B = 0
    every round:
      client k:  go on from B on the first r_k rows of A, and train B alone
      server:    B = Σ p_k s_k B_k, the smaller padded with zeros
      everybody: the global adapter is (A, B); the base stays as it is

An entry holds B, and the seed of A, so that one entry is all that a newcomer needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.errors import InvalidMessage
from hedgerow.lazy import torch
from hedgerow.methods.base import Aggregate, Expected, ServerRound
from hedgerow.methods.continued import HeldAdapter
from hedgerow.methods.factors import draw_adapter, of_factor
from hedgerow.methods.one_factor import OneFactor, only
from hedgerow.methods.parts.message import check_derived
from hedgerow.wire import check_kinds, kinds, seed_kind

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.model import Model
    from hedgerow.seeds import Seeds
    from hedgerow.wire import Entry, Update


class FFALoRA(HeldAdapter, OneFactor):
    """Adapters of different ranks on one frozen A."""

    name: str = "ffa_lora"
    summary: ClassVar[str] = "LoRA of different ranks on one frozen A, B averaged: exact"
    reference: ClassVar[str] = "FFA-LoRA, arXiv 2403.12313"

    def entry_options(self) -> dict[str, Any]:
        """Largest rank: as many rows of A are drawn."""
        return {"largest_rank": self.largest_rank}

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for B of each module, of one rank that its participants may give it, and a seed."""
        given, ranks = kinds(entry.tensors), self.entry_ranks(len(entry.participants))
        shape = given[first].shape if (first := min(only("lora_B", shapes, 1))) in given else ()
        rank = shape[1] if len(shape) == 2 else ranks[0]
        if rank not in ranks:
            raise InvalidMessage(
                f"expected an adapter of rank {ranks[0]} to {ranks[-1]}, got rank {rank}"
            )
        check_kinds(given, only("lora_B", shapes, rank) | {"adapter_seed": seed_kind()})
        if int(entry.tensors["adapter_seed"]) < 0:
            raise InvalidMessage("adapter_seed must be non-negative")

    def check_derived(self, entry: Entry, expected: Expected) -> None:
        """Check that the seed is the run's."""
        check_derived(entry.tensors, _seed(expected.seeds))

    def fold(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Average B; A is for everybody to draw."""
        whole = super().fold(updates, server_round)
        tensors = of_factor("lora_B", whole.tensors)
        return whole._replace(tensors=tensors | _seed(server_round.expected.seeds))

    def apply(self, model: Model, entry: Entry) -> None:
        """Make the entry's B, on the rows of A that go with it, the global adapter."""
        drawn = self._drawn(self.trained_shapes(model), int(entry.tensors["adapter_seed"]))
        pairs = dict(adapter_pairs({**drawn, **entry.tensors}))
        model.factors = adapter_tensors(
            {module: pair._replace(A=pair.A[: pair.B.shape[1]]) for module, pair in pairs.items()}
        )

    def _drawn(self, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
        return draw_adapter(shapes, torch.Generator().manual_seed(seed), self.largest_rank)


def _seed(seeds: Seeds) -> dict[str, Tensor]:
    """The seed of A, as an entry has it."""
    return {"adapter_seed": torch.tensor([seeds.derive("adapter")])}
