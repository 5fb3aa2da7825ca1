"""SGD: steps along the gradient, with momentum where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from hedgerow.lazy import torch
from hedgerow.training.optimizers.base import Optimizer

if TYPE_CHECKING:
    from torch import Tensor, nn


class SGD(Optimizer):
    """torch.optim.SGD; how it is computed (`foreach`, `fused` …) is left to torch."""

    name: str = "sgd"

    momentum: float = Field(0.0, ge=0, lt=1)
    """Share (0 or more, below 1) of the sum of past gradients that is left after a step; by default
    0, which needs no memory."""
    dampening: float = Field(0.0, ge=0, le=1)
    """Share (0 to 1) of a gradient that the sum does without; by default 0."""
    nesterov: bool = False
    """Whether steps look ahead by the momentum; by default not."""
    weight_decay: float = Field(0.0, ge=0)
    """Factor (0 or more) of the weights in what is added to the gradient; by default 0."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("`nesterov` needs a `momentum` above 0, and no `dampening`")
        return self

    def build(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float
    ) -> torch.optim.Optimizer:
        """torch's."""
        return torch.optim.SGD(
            list(parameters.values()),
            lr=learning_rate,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )

    def immediate_step(self, learning_rate: float) -> Callable[[Tensor], None] | None:
        """The step without momentum, which needs one gradient alone."""
        if self.momentum:
            return None

        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if self.weight_decay:
                parameter.grad.add_(parameter, alpha=self.weight_decay)
            parameter.add_(parameter.grad, alpha=-learning_rate)

        return step
