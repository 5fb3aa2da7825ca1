"""Which message it is that values pass through: what its randomness derives from."""

from __future__ import annotations

from dataclasses import dataclass

from hedgerow.seeds import Seeds


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
