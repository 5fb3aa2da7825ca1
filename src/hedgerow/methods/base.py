"""What a method is: four functions and its options, with nothing about transport or files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

if TYPE_CHECKING:
    from hedgerow.model import Model
    from hedgerow.seeds import Seeds
    from hedgerow.wire import Entry, Update


@dataclass(frozen=True)
class Client:
    """A client as a method sees it."""

    index: int
    """Its place in the experiment's list of clients (0, 1, …)."""
    name: str
    num_examples: int
    """|D_k|, which its weight in an aggregate is proportional to."""


class Payload(NamedTuple):
    """What travels up: tensors, and what the method says of them."""

    tensors: dict[str, Tensor]
    about: dict[str, str]


class Aggregate(NamedTuple):
    """What travels down and enters the ledger, and what the server learnt while making it."""

    tensors: dict[str, Tensor]
    metrics: dict[str, float]


class Method(BaseModel, ABC):
    """A federated method: its fields are the options under `method:` in the experiment file.

    The functions are pure but for the model that they are handed: a method keeps no state, so that
    the ledger is all that a participant needs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str

    summary: ClassVar[str]
    """One line for `hedgerow methods`."""
    paper: ClassVar[str]
    """Where the method is described."""
    pools_data: ClassVar[bool] = False
    """One participant holds the data of all clients (the centralized baseline)."""
    communicates: ClassVar[bool] = True
    """Whether updates and entries travel; where they don't, no bytes are counted."""
    has_global_model: ClassVar[bool] = True
    """Whether clients end with one model; else there is one for each, and `--client` names it."""
    entries_accumulate: ClassVar[bool] = True
    """Whether a client that was away needs every entry that it missed, or only the last."""

    def check(self, model: Model, num_clients: int) -> None:
        """Raise a `UserError` where the options do not fit the model or the clients."""

    @abstractmethod
    def start(
        self, model: Model, client: Client, round: int, seeds: Seeds
    ) -> Mapping[str, nn.Parameter]:
        """Attach what this client trains to the model; returns the trainable parameters."""

    @abstractmethod
    def update(
        self, model: Model, client: Client, parameters: Mapping[str, nn.Parameter]
    ) -> Payload:
        """After local training: what travels up."""

    def check_update(self, client: Client, update: Update) -> None:
        """On the server: raise `InvalidMessage` where an update is not what the client should send.

        Name, round, parent and the number of examples have been checked, and that all is finite.
        """

    @abstractmethod
    def aggregate(self, updates: Iterable[Update]) -> Aggregate:
        """On the server, without the model: fold the updates in as they arrive."""

    @abstractmethod
    def apply(self, model: Model, entry: Entry) -> None:
        """At every participant: advance the global model by one entry."""

    def models(self, model: Model, clients: Sequence[str]) -> Iterator[str | None]:
        """Put the model that the method has made into `model` while the caller evaluates it.

        Yields None for the global model. A method without one yields each of `clients` in turn.
        """
        yield None

    @abstractmethod
    def adapter(self, entries: Iterable[Entry], client: str | None) -> dict[str, Tensor]:
        """All that `entries` add to the base, as one adapter with its scale in its factors.

        Args:
            entries: the ledger from its first entry on.
            client: whose adapter, for methods without a global model; else None.

        Raises:
            UserError: the method does not make adapters, or needs a client's name.
        """

    def merge(self, model: Model, client: str | None) -> None:
        """Put what the model still holds beside its weights into them, for export."""
