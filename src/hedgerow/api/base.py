"""A base model that stays in memory: lent to runs and given back as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hedgerow.model import Model
from hedgerow.runs.lender import Lender
from hedgerow.settings import ModelSettings


class BaseInMemory:
    """A transformers model and its tokenizer, which belong to whoever handed them over."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self._network = network
        self.tokenizer = copy.deepcopy(tokenizer)  # a padding token may be added to it
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        place = getattr(network.config, "name_or_path", None)
        self._name = Path(place).name if place else type(network).__name__

    def load(self, _: ModelSettings) -> Model:
        """A copy, for whoever asks to change and to keep: a `runs.Loader`."""
        return Model(copy.deepcopy(self._network), self.tokenizer, self._name)

    @contextmanager
    def lent(self) -> Iterator[Lender]:
        """Lend the model itself; afterwards its weights, flags and mode are what they were.

        A copy of the weights is in host memory meanwhile.
        """
        flags = [parameter.requires_grad for parameter in self._network.parameters()]
        training = self._network.training
        lender = Lender(Model(self._network, self.tokenizer, self._name))
        try:
            yield lender
        finally:
            lender.give_back()
            for parameter, flag in zip(self._network.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)
            self._network.train(training)
