"""Supervised fine-tuning: the likelihood of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hedgerow.data import Tokenized, collate
from hedgerow.training.loss import batch_loss
from hedgerow.training.objectives.base import Batch, Objective

if TYPE_CHECKING:
    from torch import Tensor


class Supervised(Objective):
    """The cross-entropy of the tokens that `data.loss_on` names, of which all weigh the same.

    Of pairs it learns the better answers, of labelled answers the good ones.
    """

    name: str = "supervised"
    loss_on = ("answer", "turns", "all")

    def collate(self, examples: Tokenized, indices: Sequence[int], pad_id: int) -> Batch:
        """Sequences and their labels."""
        return collate([examples[int(i)] for i in indices], pad_id)

    def count(self, batch: Batch) -> int:
        """Number of tokens that have a label."""
        return int((batch["labels"][:, 1:] != -100).sum())

    def total(self, network: Any, batch: Batch) -> Tensor:
        """Cross-entropy of these tokens."""
        return batch_loss(network, batch)[0]
