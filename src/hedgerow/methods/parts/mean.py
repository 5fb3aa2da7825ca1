"""Weighted sums of updates, Σ p_k x_k, folded in as they arrive (FedAvg, arXiv 1602.05629)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from hedgerow.lazy import torch
from hedgerow.methods.parts.through import Basis
from hedgerow.methods.parts.values import Values

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.privacy.client_level import GaussianMean


class Mean:
    """Sums of values, those on each basis apart."""

    def __init__(self) -> None:
        self._total = 0.0
        self._sums: dict[Basis, dict[str, Tensor]] = {}
        self._counts: Counter[Basis] = Counter()

    def add(self, basis: Basis, values: Values, weight: float) -> None:
        """Add a client's values, times its weight relative to the others."""
        self._total += weight
        self._counts[basis] += weight != 0
        sums = self._sums.setdefault(basis, {})
        for name, each in values:
            if name not in sums:
                sums[name] = each * weight
                continue
            # On some bases a client has more coordinates than another: the first are the same.
            more = len(each) - len(sums[name]) if each.dim() == 1 else 0
            if more > 0:
                sums[name] = torch.nn.functional.pad(sums[name], (0, more))
            whole = sums[name] if more >= 0 else sums[name][: len(each)]
            whole.add_(each, alpha=weight)

    @property
    def alone(self) -> int:
        """Number of bases with one client's values alone."""
        return sum(count == 1 for count in self._counts.values())

    def make_private(self, private: GaussianMean) -> None:
        """Add noise to the sums of bounded values, whose weights then sum to a fixed number."""
        for basis, sums in sorted(self._sums.items()):
            private.add_noise(sums, *basis)
        self.divide_by(private.denominator)

    def divide_by(self, total: float) -> None:
        """Take this for the sum of the weights, whatever they sum to."""
        self._total = total

    def means(self, rate: float | None) -> Iterator[tuple[Basis, Values]]:
        """The means on each basis, in ascending order, times a learning rate if there is one.

        They are made in the sums' own memory: what iterates over them has the tensors themselves.
        """
        for basis, sums in sorted(self._sums.items()):
            for total in sums.values():
                if rate is None:
                    total.div_(self._total)
                else:
                    total.mul_(rate / self._total)
            shapes = {name: tuple(each.shape) for name, each in sums.items()}
            yield basis, Values(shapes, partial(_items, sums))


def _items(sums: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return iter(sums.items())
