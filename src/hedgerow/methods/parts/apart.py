"""Updates that are not summed by the server: each is kept as it came, in its codec."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from hedgerow.methods.parts.through import Basis
from hedgerow.methods.parts.values import Values

if TYPE_CHECKING:
    from torch import Tensor


class Apart:
    """Values of each client, times its weight."""

    def __init__(self) -> None:
        self._all: list[tuple[Values, float]] = []

    def add(self, basis: Basis, values: Values, weight: float) -> None:
        """Keep a client's values, which are decoded when they are asked for."""
        self._all.append((values, weight))

    def means(self, rate: float | None) -> Iterator[tuple[Basis, Values]]:
        """The parts of the mean, in the clients' order, times a learning rate if there is one."""
        total = sum(weight for _, weight in self._all)
        for index, (values, weight) in enumerate(self._all):
            factor = weight / total * (1.0 if rate is None else rate)
            yield (index,), values.mapped(partial(_scaled, factor))


def _scaled(factor: float, name: str, each: Tensor) -> Tensor:
    return each * factor
