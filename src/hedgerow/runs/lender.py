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

    def __init__(self, model: Model | None = None) -> None:
        """Lend a model in memory, or one that is loaded when it is first asked for.

        Args:
            model: the model that experiments call `(memory)`; `give_back` makes it what it was.
        """
        self._settings = None if model is None else ModelSettings(path=MEMORY)
        self._model = model
        self.state: dict[str, Tensor] = {} if model is None else model.state()
        """Its weights and buffers as they were loaded, in host memory."""
        self._base: Base | None = None

    def give_back(self) -> None:
        """Make the model what it was before it was lent."""
        if self._model is not None:
            self._model.reset(self.state)

    def lend(self, settings: ModelSettings) -> Model:
        """The model, for the caller to change until it is lent again.

        Raises:
            UserError: there is no such model.
        """
        if self._model is None or not self._holds(settings):
            self._model, self.state = None, {}  # before the next one is in memory
            self._model, self._settings = Model.load(settings), settings
            self.state, self._base = self._model.state(), None
        else:
            self._model.reset(self.state)
        return self._model

    def _holds(self, settings: ModelSettings) -> bool:
        """Whether the model that is here is the one that the settings name."""
        mine = self._settings
        return mine is not None and (mine == settings or mine.path == settings.path == MEMORY)

    def check_base(self, ledger: Ledger) -> None:
        """Raise a `UserError` unless the model, which was just lent, is the base of `ledger`."""
        assert self._model is not None
        assert self._settings is not None
        if self._base is None:  # hashing all weights takes a while
            self._base = Base.of(self._model)
        ledger.check_base(self._base, f"model.path {self._settings.path}")
