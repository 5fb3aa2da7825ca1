"""Standalone: every client trains its own adapter on its own data, and nobody shares anything.

The lower baseline in FLoRA (arXiv 2409.05976, section 4). A run has as many models as clients:
each is evaluated by itself, and the run's score is their mean. The ledger holds each client's
adapter under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow.adapters import adapter_pairs
from hedgerow.errors import InvalidMessage
from hedgerow.methods.base import Aggregate, Client, ClientRound, Expected, Holds, ServerRound
from hedgerow.methods.factors import check_factors, copy_factors, init_factors, with_scale
from hedgerow.methods.lora import LoraMethod, update_scale
from hedgerow.methods.parts import apart
from hedgerow.wire import kinds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.wire import Entry, Update


class Standalone(LoraMethod):
    """One adapter for each client, never aggregated."""

    name: str = "standalone"
    summary: ClassVar[str] = "every client by itself, and their mean score (lower baseline)"
    reference: ClassVar[str] = "the baseline in FLoRA, arXiv 2409.05976"
    communicates: ClassVar[bool] = False
    has_global_model: ClassVar[bool] = False

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the client's own adapter as it left it."""
        client, rank = client_round.client, self.rank(client_round.client)
        parameters = model.attach(self.config(rank))
        init_factors(parameters, client_round.seeds.torch("adapter", client.name), rank)
        if own := apart.of_client(model.factors or {}, client.name):
            copy_factors(parameters, own, self.scale(rank))
        return parameters

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for an adapter of each participant, and of nobody else."""
        given, names = kinds(entry.tensors), sorted(p.client for p in entry.participants)
        if apart.client_names(given) != names:
            raise InvalidMessage("expected one adapter for each participant, and no other")
        for name in names:
            check_factors(apart.of_client(given, name), shapes, self.possible_ranks(len(names)))

    def aggregate_holds(self, clients: Sequence[Client], expected: Expected) -> Holds:
        """Memory of all clients' adapters."""
        return Holds(sum(self.update_holds(client, expected).message for client in clients))

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Collect each client's factors under its name; nothing is combined."""
        tensors: dict[str, Tensor] = {}
        for update in updates:
            tensors |= apart.under(update.client, with_scale(update.tensors, update_scale(update)))
        return Aggregate(tensors, {"aggregation_error": 0.0})  # each client's update is its own

    def apply(self, model: Model, entry: Entry) -> None:
        """Replace the adapter of each client that trained."""
        model.factors = {**(model.factors or {}), **entry.tensors}

    def models(self, model: Model, clients: Sequence[str]) -> Iterator[str | None]:
        """Attach each client's adapter; one that has not trained yet still has the base."""
        yield from apart.models(model, clients)

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """Adapter of one client."""
        latest: dict[str, Tensor] = {n: t for entry in entries for n, t in entry.tensors.items()}
        return apart.chosen(latest, client, self.name)

    def merge(self, model: Model, client: str | None) -> None:
        """Add the adapter of one client to the weights, W + B·A."""
        for module, factors in adapter_pairs(apart.chosen(model.factors or {}, client, self.name)):
            model.merge(module, factors)
