"""What an objective is: its options, what it learns from, and the loss of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hedgerow.data import Learns, Tokenized
from hedgerow.plugins import Plugin

if TYPE_CHECKING:
    from torch import Tensor

Batch = Mapping[str, "Tensor"]
"""Tensors of a batch by name, on the CPU: `input_ids` and `labels` as `data.collate` makes them,
and what else an objective has put there."""
Reference = Literal["base", "round"]
"""Model that an objective compares with: the base that the run began with; or the one with which a
client begins its local training in the round."""


class Objective(Plugin, ABC):
    """What local steps descend: its fields are the options under `training.objective:`."""

    section = ("training", "objective")

    learns: ClassVar[Learns] = "answers"
    """What an example is."""
    loss_on: ClassVar[Sequence[str]] = ("answer",)
    """Values of `data.loss_on` that it can follow."""
    separable: ClassVar[bool] = True
    """Whether the loss of an example depends on no other example, which example-level privacy
    needs."""

    @property
    def refers_to(self) -> Reference | None:
        """Model whose log-likelihoods it needs (`Tokenized.reference`); None: it needs none."""
        return None

    @property
    def reward_scale(self) -> float:
        """Factor β of the reward β·log(π(y|x) / π_base(y|x)) that metrics give."""
        return 1.0

    @abstractmethod
    def collate(self, examples: Tokenized, indices: Sequence[int], pad_id: int) -> Batch:
        """The batch of some of a client's examples, padded on the right.

        Args:
            examples: with log-likelihoods of the model that it `refers_to`.
            indices: which of them.
            pad_id: token that fills up.
        """

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Number of what the loss of a step is a mean over: tokens, pairs, answers."""

    @abstractmethod
    def total(self, network: Any, batch: Batch) -> Tensor:
        """The loss, summed over all that `count` counts: a float32 scalar, differentiable.

        Args:
            network: a causal language model of transformers.
            batch: as `collate` makes it.
        """
