"""One base model for many runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hedgerow.ledger import Base, Ledger
from hedgerow.model import Model
from hedgerow.names import MEMORY
from hedgerow.settings import ModelSettings

if TYPE_CHECKING:
    from torch import Tensor


class Lender:
    """Lends one model again and again, each time as it was loaded."""

    def __init__(self, own: Model | None = None) -> None:
        """Lend a model in memory, or one that is loaded when it is first asked for.

        Args:
            own: the model that experiments call `(memory)`; `give_back` makes it what it was.
        """
        self._own, self._own_state = own, {} if own is None else own.state()
        self._settings: ModelSettings | None = None
        self._model: Model | None = None
        self.state: dict[str, Tensor] = {}
        """Its weights and buffers as they were loaded, in host memory."""
        self._base: Base | None = None

    def give_back(self) -> None:
        """Make the model in memory what it was before it was lent."""
        if self._own is not None:
            self._own.reset(self._own_state)

    def lend(self, settings: ModelSettings) -> Model:
        """The model, for the caller to change until it is lent again.

        Raises:
            UserError: there is no such model.
        """
        if settings.path == MEMORY and self._own is not None:
            self.give_back()
            if self._model is not self._own:
                self._model, self.state, self._base = self._own, self._own_state, None
        elif self._model is None or settings != self._settings:
            self._model, self.state = None, {}  # before the next one is in memory
            self._model = Model.load(settings)
            self.state, self._base = self._model.state(), None
        else:
            self._model.reset(self.state)
        self._settings = settings
        return self._model

    def check_base(self, ledger: Ledger) -> None:
        """Raise a `UserError` unless the model, which was just lent, is the base of `ledger`."""
        assert self._model is not None
        assert self._settings is not None
        if self._base is None:  # hashing all weights takes a while
            self._base = Base.of(self._model)
        ledger.check_base(self._base, f"model.path {self._settings.path}")
