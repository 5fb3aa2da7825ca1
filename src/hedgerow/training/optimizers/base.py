"""What an optimiser is: its options, and how torch's is made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hedgerow.plugins import Plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Optimizer(Plugin, ABC):
    """A first-order optimiser: its fields are the options under `training.optimizer:`.

    Fields that are called `momentum` or `weight_decay` may also be given as `training.momentum` and
    `training.weight_decay`.
    """

    section = ("training", "optimizer")

    def check(self, device: torch.device) -> None:
        """Raise a `UserError` where it cannot step parameters on a device.

        By default that is where one of its `libraries` is missing.
        """
        self.check_installed()

    @abstractmethod
    def build(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float
    ) -> torch.optim.Optimizer:
        """torch's optimiser of one client's local training.

        What its `state` holds of a parameter is kept from round to round by methods that start
        warm, as far as it is tensors and numbers by name.

        Args:
            parameters: what is trained, by name; at least one.
            learning_rate: learning rate of the round, above 0.
        """

    def immediate_step(self, learning_rate: float) -> Callable[[Tensor], None] | None:
        """The step on one parameter that has its gradient, where it needs nothing else.

        Such a step is taken in the backward pass, so that no two gradients are there at a time; it
        may change `grad`, which is freed afterwards. None: steps need more than that, as other
        gradients or what is kept of earlier ones.
        """
        return None
