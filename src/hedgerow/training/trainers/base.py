"""What a trainer is: whatever takes a client's local steps in the place of hedgerow's own loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hedgerow.plugins import Plugin
from hedgerow.settings import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hedgerow.training.job import Job


class Trainer(Plugin, ABC):
    """Local training: its fields are the options under `training.trainer:`."""

    section = ("training", "trainer")

    def check(self, training: TrainingSettings, device: torch.device) -> None:
        """Raise a `UserError` where it cannot train so, before anything is written.

        By default that is where one of its `libraries` is missing.

        Args:
            training: the experiment's settings.
            device: of the model.
        """
        self.check_installed()

    @abstractmethod
    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Train a client's parameters in place, and nothing else of the network.

        The learning rate of a step (0, 1, …) is `job.learning_rate * job.pace(step)`, the batches
        that hedgerow's own loop would take are `job.steps()`, and dropout layers draw from the
        global generator, seeded with `job.dropout_seed`. Global randomness is to be as it was in
        the end, and the network in evaluation mode.

        Args:
            job: the model as the method has prepared it (`network`), the client's examples
                (`data`, whose items are tokens and which of them are learnt), and the settings.
            parameters: what trains, by name; all else of the network is frozen.

        Returns:
            The mean training loss.

        Raises:
            Diverged: the loss is no longer a number (`hedgerow.training.job.check_finite`).
        """
