"""What a method or a run is handed where nothing comes of it."""

from __future__ import annotations

from typing import Any


def no_past(round: int) -> Any:
    """The earlier entries of a round in which nobody reads them."""
    raise AssertionError("nobody reads an earlier entry")


class Forgetful:
    """The memory of a client, or a server, that keeps nothing."""

    def load(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def save(self, tensors: Any) -> None:
        """Forget them."""


class Nobody:
    """Watches nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None
