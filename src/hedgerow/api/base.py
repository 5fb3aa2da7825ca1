"""A base model that stays in memory: lent to runs and given back as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hedgerow.loading import name_of
from hedgerow.model import Model
from hedgerow.runs.lender import Lender
from hedgerow.settings import ModelSettings


class BaseInMemory:
    """A transformers model and its tokenizer, which belong to whoever handed them over."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = copy.deepcopy(tokenizer)  # a padding token may be added to it
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        place = getattr(network.config, "name_or_path", None)
        self._name = name_of(place) if place else type(network).__name__

    @property
    def place(self) -> str | None:
        """Folder, or name on the Hub, that transformers loaded the model from; None if none."""
        place = getattr(self.network.config, "name_or_path", None)
        return str(Path(place).absolute()) if place and Path(place).is_dir() else place or None

    def load(self, _: ModelSettings) -> Model:
        """A copy, for whoever asks to change and to keep: a `runs.Loader`."""
        copied = copy.deepcopy(self.network)
        # A trainer may have put a function around it, which would go on calling the original.
        vars(copied).pop("forward", None)
        return Model(copied, self.tokenizer, self._name)

    @contextmanager
    def lent(self) -> Iterator[Lender]:
        """Lend the model itself; afterwards weights, gradients, flags and modes are what they were.

        A copy of the weights is in host memory meanwhile.
        """
        parameters = list(self.network.parameters())
        flags = [parameter.requires_grad for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        modes = {module: module.training for module in self.network.modules()}
        for parameter in parameters:
            parameter.grad = None  # or the first step would go down it as well
        lender = Lender(Model(self.network, self.tokenizer, self._name))
        try:
            yield lender
        finally:
            try:
                lender.give_back()
            finally:
                for module, training in modes.items():
                    module.training = training
                for parameter, flag, gradient in zip(parameters, flags, gradients, strict=True):
                    parameter.requires_grad_(flag).grad = gradient
