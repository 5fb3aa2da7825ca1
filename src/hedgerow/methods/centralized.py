"""Centralized: one participant holds everybody's data and trains one adapter on it.

What federation is measured against in FLoRA (arXiv 2409.05976, section 4); it has the same
hyper-parameters as a client. Nothing travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from hedgerow.errors import InvalidMessage
from hedgerow.methods.base import Client
from hedgerow.methods.continued import AveragedAdapter


class Centralized(AveragedAdapter):
    """One adapter on the data of all clients together."""

    name: str = "centralized"
    summary: ClassVar[str] = "one adapter trained on all clients' data together (upper baseline)"
    reference: ClassVar[str] = "the baseline in FLoRA, arXiv 2409.05976"
    pools_data: ClassVar[bool] = True
    communicates: ClassVar[bool] = False

    def rank(self, client: Client) -> int:
        """The largest of `ranks`: what the best-equipped client has."""
        return self.largest_rank

    def entry_ranks(self, participants: int) -> Sequence[int]:
        """Rank of the one participant."""
        if participants > 1:
            raise InvalidMessage(f"expected 1 participant, got {participants}")
        return [self.largest_rank]
