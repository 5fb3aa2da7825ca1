"""Which message it is that values pass through: what its randomness derives from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hedgerow.errors import InvalidMessage
from hedgerow.lazy import torch
from hedgerow.seeds import Seeds

if TYPE_CHECKING:
    from torch import Tensor


def check_derived(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `InvalidMessage` unless a message has the seeds that the run derives for it."""
    for name, seed in expected.items():
        own = given.get(name)
        if own is None or own.dtype != seed.dtype or not torch.equal(own, seed):
            raise InvalidMessage(f"{name} must be the one that the run derives for this round")


@dataclass(frozen=True)
class Message:
    """An update, or the server's broadcast."""

    seeds: Seeds
    """Seeds of the run."""
    round: int
    """Number of the round, from 1."""
    sender: str | None = None
    """Name of the client; None is the server."""

    def seed(self, purpose: str) -> int:
        """Seed for a purpose in this message."""
        sender = [] if self.sender is None else [self.sender]
        return self.seeds.derive(purpose, self.round, *sender)
