"""Adapters of which each client keeps factors of its own, beside those that everybody shares.

They lie in the client's memory as peft has them, and are never sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from hedgerow.methods.base import ClientRound
from hedgerow.methods.continued import HeldAdapter

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.model import Model

_PREFIX = "own/"
"""Before the names of factors in a memory, which has more beside them, as moments."""


class OwnFactors(HeldAdapter):
    """An adapter of each client, made of the global one and of its own factors."""

    personal: ClassVar[bool] = True

    @property
    def clients_remember(self) -> bool:
        """Yes: their own factors."""
        return True

    def keep(self, client_round: ClientRound, factors: Mapping[str, Tensor]) -> None:
        """Have the client keep copies of factors, by PEFT's key names, for its next round."""
        own = {f"{_PREFIX}{name}": f.detach().to("cpu", copy=True) for name, f in factors.items()}
        client_round.remember(own)

    def kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The client's own factors, by PEFT's key names, of all that it has kept; maybe none."""
        own = [name for name in tensors if name.startswith(_PREFIX)]
        return {name.removeprefix(_PREFIX): tensors[name] for name in own}

    @contextmanager
    def personalized(self, model: Model, kept: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with the client's own factors in place of the global ones."""
        shared = model.factors
        own = {  # with their scale, as entries have it
            name: factor * self.scale(factor.shape[1]) if ".lora_B." in name else factor
            for name, factor in self.kept(kept).items()
        }
        try:
            if own:
                model.factors = {**(shared or {}), **own}
            yield
        finally:
            model.factors = shared
