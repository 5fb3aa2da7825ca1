"""Server optimisers: how the global model steps along the mean update, seen as a gradient.

Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2, where Δ is the mean
of the clients' changes; outer Nesterov momentum as in DiLoCo, arXiv 2311.08105; and signs, as in
Bernstein et al., "signSGD", arXiv 1802.04434.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, Field, SerializeAsAny

from hedgerow.lazy import torch
from hedgerow.plugins import Plugin, Registry

if TYPE_CHECKING:
    from torch import Tensor


State = dict[str, "Tensor"]
"""State of all tensors' steps, by the parameter's name and the slot: `{name}/momentum` …"""


class Linear(NamedTuple):
    """A step that is linear in the changes so far: m <- decay·m + Δ, along Δ and the m before."""

    of_change: float
    """Factor of Δ in the step."""
    of_momentum: float = 0.0
    """Factor in the step of m as it was before it."""
    decay: float = 0.0
    """Share of m that remains, β; 0: there is none."""


class ServerOptimizer(Plugin, ABC):
    """A step of the global model, tensor by tensor: its fields are options."""

    section = ("method", "server")

    slots: ClassVar[tuple[str, ...]] = ()
    """Names of what is kept of each tensor from step to step, each of the tensor's shape."""

    learning_rate: float = Field(1.0, gt=0)
    """Learning rate of the server, η: the factor of each step."""

    @property
    def linear(self) -> Linear | None:
        """The step, where it is linear in the changes; None where it is not."""
        return None

    @abstractmethod
    def step(self, change: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Step along the mean change of one tensor.

        Args:
            change: Δ, float32; it may be changed.
            state: of this tensor, by `slots`: nothing before the first step, and all afterwards.
        """


class Sgd(ServerOptimizer):
    """Plain steps: w <- w + η Δ."""

    name: str = "sgd"

    @property
    def linear(self) -> Linear:
        """η Δ."""
        return Linear(of_change=self.learning_rate)

    def step(self, change: Tensor, state: dict[str, Tensor]) -> Tensor:
        """η Δ."""
        return _scaled(change, self.learning_rate)


class Sign(ServerOptimizer):
    """Steps of one size for each coordinate: w <- w + η sign(Δ); none where Δ is 0."""

    name: str = "sign"

    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of the server, η: the change of a coordinate in a step."""

    def step(self, change: Tensor, state: dict[str, Tensor]) -> Tensor:
        """η sign(Δ)."""
        return _scaled(change.sign(), self.learning_rate)


class Momentum(ServerOptimizer):
    """Heavy-ball momentum: m <- β m + Δ, w <- w + η m."""

    name: str = "momentum"
    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum β: the share of its last step that each repeats."""

    @property
    def linear(self) -> Linear:
        """η (Δ + β m), with the m before."""
        return Linear(
            of_change=self.learning_rate,
            of_momentum=self.learning_rate * self.momentum,
            decay=self.momentum,
        )

    def step(self, change: Tensor, state: dict[str, Tensor]) -> Tensor:
        """η m."""
        return _scaled(_decayed(change, state, self.momentum), self.learning_rate)


class Nesterov(ServerOptimizer):
    """Nesterov momentum: m <- β m + Δ, w <- w + η (Δ + β m)."""

    name: str = "nesterov"
    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    learning_rate: float = Field(0.7, gt=0)
    """Learning rate of the server, η: the factor of each step; DiLoCo's by default."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum β: the share of its last step that each repeats."""

    @property
    def linear(self) -> Linear:
        """η ((1 + β) Δ + β² m), with the m before."""
        return Linear(
            of_change=self.learning_rate * (1 + self.momentum),
            of_momentum=self.learning_rate * self.momentum**2,
            decay=self.momentum,
        )

    def step(self, change: Tensor, state: dict[str, Tensor]) -> Tensor:
        """η (Δ + β m)."""
        ahead = _decayed(change, state, self.momentum).mul(self.momentum).add_(change)
        return _scaled(ahead, self.learning_rate)


class _Adaptive(ServerOptimizer):
    """Steps in units of each coordinate's own size: w <- w + η m / (√v + τ)."""

    slots: ClassVar[tuple[str, ...]] = ("mean", "square")

    learning_rate: float = Field(0.01, gt=0)
    """Learning rate of the server, η: about the change of a coordinate in a step."""
    beta: float = Field(0.9, ge=0, lt=1)
    """Decay β₁ of the running mean of changes."""
    tau: float = Field(1e-3, gt=0)
    """Adaptivity τ, in units of a change: coordinates that change less than that keep their
    proportions."""

    def step(self, change: Tensor, state: dict[str, Tensor]) -> Tensor:
        """η m / (√v + τ)."""
        if not state:
            state["mean"] = torch.zeros_like(change)
            state["square"] = torch.full_like(change, self.tau**2)
        state["mean"].mul_(self.beta).add_(change, alpha=1 - self.beta)
        self.accumulate(state["square"], change.square_())
        return state["mean"] / state["square"].sqrt().add_(self.tau) * self.learning_rate

    @abstractmethod
    def accumulate(self, square: Tensor, new: Tensor) -> None:
        """Update v, in place, by Δ²."""


class Adam(_Adaptive):
    """FedAdam's: v <- β₂ v + (1 - β₂) Δ²."""

    name: str = "adam"

    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay β₂ of the running mean of squares."""

    def accumulate(self, square: Tensor, new: Tensor) -> None:
        """Decay v towards Δ²."""
        square.mul_(self.beta2).add_(new, alpha=1 - self.beta2)


class Yogi(_Adaptive):
    """FedYogi's: v <- v - (1 - β₂) Δ² sign(v - Δ²)."""

    name: str = "yogi"

    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay β₂ of the sum of squares."""

    def accumulate(self, square: Tensor, new: Tensor) -> None:
        """Move v towards Δ², by a share of Δ²."""
        square.sub_(new * (square - new).sign(), alpha=1 - self.beta2)


class Adagrad(_Adaptive):
    """FedAdagrad's: v <- v + Δ²."""

    name: str = "adagrad"

    beta: float = Field(0.0, ge=0, lt=1)
    """Decay β₁ of the running mean of changes; 0 takes the last one alone."""

    def accumulate(self, square: Tensor, new: Tensor) -> None:
        """Add Δ² to v."""
        square.add_(new)


SERVER_OPTIMIZERS: Registry[ServerOptimizer] = Registry(
    "server optimizer",
    ServerOptimizer,
    "hedgerow.methods.parts",
    see="hedgerow explain method.server",
)
"""Every server optimiser by the name that the experiment file uses."""


def _server_optimizer_of(given: Any) -> Any:
    unnamed = (
        "`method.server` needs a name, as in {name: nesterov, momentum: 0.9}; see `hedgerow "
        "explain method.server`"
    )
    return SERVER_OPTIMIZERS.chosen(given, "method.server", unnamed)


ChosenServerOptimizer = Annotated[
    SerializeAsAny[ServerOptimizer] | None, BeforeValidator(_server_optimizer_of)
]
"""Option that is a server optimiser, by its name or with options; null is none."""


def steps_of(
    optimizer: ServerOptimizer,
    changes: Iterable[tuple[str, Tensor]],
    old: Mapping[str, Tensor],
    new: State,
) -> Iterator[tuple[str, Tensor]]:
    """Steps of an optimiser, tensor by tensor; its state after them is put into `new`."""
    for name, change in changes:
        keys = {slot: f"{name}/{slot}" for slot in optimizer.slots}
        state = {slot: old[key] for slot, key in keys.items() if key in old}
        yield name, optimizer.step(change, state)
        new |= {keys[slot]: each for slot, each in state.items()}


def _decayed(change: Tensor, state: dict[str, Tensor], decay: float) -> Tensor:
    """m <- decay·m + Δ, in place."""
    if state:
        state["momentum"].mul_(decay).add_(change)
    else:
        state["momentum"] = change.clone()
    return state["momentum"]


def _scaled(step: Tensor, rate: float) -> Tensor:
    """A new tensor: what is kept of a step must not change with it."""
    return step * rate
