"""What of the model trains, and how the global model takes a step of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow.methods.parts.values import Shapes, Values

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.methods.base import ClientRound
    from hedgerow.model import Model
    from hedgerow.seeds import Seeds
    from hedgerow.wire import Entry, Kind


class Trains(ABC):
    """Parameters that clients change, and whose changes add."""

    keeps_weights: ClassVar[bool] = False
    """Whether the base's own weights stay as they are."""

    @abstractmethod
    def shapes(self, model: Model) -> Shapes:
        """Shapes of the parameters, by name."""

    @abstractmethod
    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Lend the model's parameters to a client, with a snapshot of them for `change`."""

    def change(self, model: Model, parameters: Mapping[str, nn.Parameter]) -> Values:
        """Change of each parameter by local training, Δ_k, in float32."""
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        return Values(shapes, model.trained_delta)

    @abstractmethod
    def add(self, model: Model, steps: Iterable[tuple[str, Tensor]], entry: Entry) -> None:
        """Add a step to the global model, tensor by tensor."""

    def derived(self, seeds: Seeds) -> dict[str, Tensor]:
        """Tensors beside an update and in the entry that anybody can derive: seeds."""
        return {}

    def derived_kinds(self) -> dict[str, Kind]:
        """Kinds of `derived`."""
        return {}

    def models(self, model: Model, clients: Sequence[str]) -> Iterator[str | None]:
        """Put the global model into `model` while the caller evaluates it."""
        yield None

    def adapter(
        self, entries: Iterable[Entry], load_model: Callable[[], Model]
    ) -> dict[str, Tensor] | None:
        """Adapter that the entries add up to; None where what trains is no adapter."""
        return None

    @abstractmethod
    def merge(self, model: Model) -> None:
        """Put what the model holds beside its weights into them."""


class AllWeights(Trains):
    """All parameters of the model."""

    def shapes(self, model: Model) -> Shapes:
        """Shapes of all weights."""
        return {name: tuple(weight.shape) for name, weight in model.network.named_parameters()}

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Unfreeze all weights."""
        return model.unfreeze()

    def add(self, model: Model, steps: Iterable[tuple[str, Tensor]], entry: Entry) -> None:
        """w <- w + Δ."""
        for name, step in steps:
            model.add(name, step)

    def merge(self, model: Model) -> None:
        """Do nothing: all is in the weights."""
