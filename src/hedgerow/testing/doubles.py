"""What a method or a run is handed where nothing comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.wire import Entry


def no_past(round: int) -> Entry:
    """The earlier entries of a round in which nobody reads them."""
    raise AssertionError("nobody reads an earlier entry")


class Forgetful:
    """The memory of a client, or a server, that keeps nothing."""

    def load(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Forget them."""
