"""Weighted sums of updates, Σ p_k x_k (FedAvg, arXiv 1602.05629).

Updates that are together smaller, as they travel, than their sum are kept encoded until all have
arrived, and then summed one tensor at a time: where clients train in the same process, no sum of
the model's size is held beside them. Others are folded in as they arrive. Either way the same
numbers are added in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

from hedgerow.lazy import torch
from hedgerow.methods.parts.through import Basis
from hedgerow.methods.parts.values import Shapes, Values

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.privacy.client_level import GaussianMean


class Mean:
    """Sums of values, those on each basis apart."""

    def __init__(self, *, waits: bool = False) -> None:
        """Sums of nothing yet.

        Args:
            waits: whether updates are kept, and summed when the means are asked for.
        """
        self._total, self._waits = 0.0, waits
        self._waiting: dict[Basis, list[tuple[Values, float]]] = {}
        self._sums: dict[Basis, dict[str, Tensor]] = {}
        self._counts: Counter[Basis] = Counter()

    def add(self, basis: Basis, values: Values, weight: float) -> None:
        """Add a client's values, times its weight relative to the others."""
        self._total += weight
        self._counts[basis] += weight != 0
        if self._waits:
            self._waiting.setdefault(basis, []).append((values, weight))
            return
        sums = self._sums.setdefault(basis, {})
        for name, each in values:
            sums[name] = _plus(sums.get(name), each, weight)

    @property
    def alone(self) -> int:
        """Number of bases with one client's values alone."""
        return sum(count == 1 for count in self._counts.values())

    def make_private(self, private: GaussianMean) -> None:
        """Add noise to the sums of bounded values, whose weights then sum to a fixed number."""
        assert not self._waits, "noise is added to sums"
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

        def scaled(total: Tensor) -> Tensor:
            return total.div_(self._total) if rate is None else total.mul_(rate / self._total)

        for basis, sums in sorted(self._sums.items()):
            for total in sums.values():
                scaled(total)
            shapes = {name: tuple(each.shape) for name, each in sums.items()}
            yield basis, Values(shapes, partial(_items, sums))
        for basis, waiting in sorted(self._waiting.items(), key=itemgetter(0)):
            whole = Values(_longest(waiting), partial(_summed, waiting))
            yield basis, whole.mapped(lambda _, total: scaled(total))


def _plus(total: Tensor | None, each: Tensor, weight: float) -> Tensor:
    """A sum, None where there is none yet, and a client's tensor times its weight."""
    if total is None:
        return each * weight
    # On some bases a client has more coordinates than another: the first are the same.
    more = len(each) - len(total) if each.dim() == 1 else 0
    if more > 0:
        total = torch.nn.functional.pad(total, (0, more))
    whole = total if more >= 0 else total[: len(each)]
    whole.add_(each, alpha=weight)
    return total


def _longest(waiting: Sequence[tuple[Values, float]]) -> Shapes:
    """Shapes of the sums."""
    first, *_ = (values.shapes for values, _ in waiting)
    return {name: max(tuple(values.shapes[name]) for values, _ in waiting) for name in first}


def _summed(waiting: Sequence[tuple[Values, float]]) -> Iterator[tuple[str, Tensor]]:
    """Sums, one tensor at a time."""
    (first, weight), *others = [(iter(values), weight) for values, weight in waiting]
    for name, each in first:
        total = each * weight
        for values, other in others:  # one at a time, since a tensor may be large
            same, more = next(values)
            assert same == name, "all updates have one order"
            total = _plus(total, more, other)
        yield name, total


def _items(sums: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return iter(sums.items())
