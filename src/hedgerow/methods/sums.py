"""Exact sums and averages of a round's adapters, module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hedgerow import lowrank
from hedgerow.adapters import adapter_pairs
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors, Projections, SumSketch
from hedgerow.methods.lora import update_scale
from hedgerow.methods.stacking import Part, StackedFactors, exact_sum

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.wire import Update


class Continued(NamedTuple):
    """A global adapter of one matrix that clients went on from, and what they made of it.

    A client of rank r_k goes on from the first r_k rows of it and leaves the others as they are, so
    for every sum its adapter is [A_k; A_0[r_k:]], [B_k B_0[:, r_k:]].
    """

    start: Factors
    """(A_0, B_0), its scale in it."""
    averages: Factors
    """Σ p_k A_k and Σ p_k s_k B_k apart, of the start's rank; zeros where r_k ends."""
    shares: Tensor
    """Σ p_k over the clients that train a row of the start, for each row."""

    def add(self, stacked: Factors, parts: Sequence[Part]) -> None:
        """Count clients in, whose factors these are."""
        for part in parts:
            rank = part.rows.stop - part.rows.start
            self.averages.A[:rank] += part.weight * stacked.A[part.rows]
            self.averages.B[:, :rank] += part.weight * part.scale * stacked.B[:, part.rows]
            self.shares[:rank] += part.weight


class Sum(NamedTuple):
    """A round's sum for one matrix, in float64, and the averages that may stand for part of it."""

    trained: Factors
    """Σ p_k s_k B_k A_k."""
    continued: Continued | None = None
    """Adapter that clients went on from, unless each began at zero."""

    def exact(self) -> Factors:
        """Next function of the global adapter: B_0 A_0 + Σ p_k (s_k B_k A_k - B_0 A_0)."""
        if self.continued is None:
            return self.trained
        start, _, shares = self.continued
        untouched = start.A * (1 - shares)[:, None]
        return lowrank.stack([self.trained, Factors(untouched, start.B)])

    def average(self) -> Factors | None:
        """The averages of A and of B that stand for `exact`, of the start's rank."""
        if self.continued is None:
            return None
        start, (A, B), shares = self.continued
        untouched = 1 - shares
        return Factors(A + start.A * untouched[:, None], B + start.B * untouched)

    def step(self) -> Factors:
        """Change of the global function by the round: `exact` - B_0 A_0."""
        exact = self.exact()
        if self.continued is None:
            return exact
        return lowrank.difference(exact, self.continued.start)


class ExactSums:
    """Exact sums of stacked factors that wait on disk and are read a piece at a time.

    Iterating gives each module and its sum, in a fixed order.
    """

    missed = 0.0

    def __init__(
        self,
        arrived: StackedFactors,
        start: Mapping[str, Factors],
        weights: Sequence[float],
        *,
        whole: bool = False,
    ) -> None:
        """Read what has arrived as it is asked for.

        Args:
            arrived: the clients' factors.
            start: the global adapter that they went on from, by module; maybe nothing.
            weights: p_k.
            whole: give the sums as stacked factors even where these are larger than a pair of the
                matrix's own rank.
        """
        self._arrived, self._start, self._weights = arrived, start, weights
        self._whole = whole

    def __iter__(self) -> Iterator[tuple[str, Sum]]:
        for module in self._arrived:
            yield module, self._sum(module)

    def _sum(self, module: str) -> Sum:
        """The sum of a module's pieces: stacked, or a product where that is smaller."""
        continued: Continued | None = None
        if module in self._start:
            start = self._start[module].double()
            averages = Factors(torch.zeros_like(start.A), torch.zeros_like(start.B))
            continued = Continued(start, averages, torch.zeros_like(start.A[:, 0]))

        def pieces() -> Iterator[Factors]:
            most = math.inf if self._whole else min(self._arrived.shape(module))
            for stacked, parts in self._arrived.pieces(module, self._weights, most):
                piece = stacked.double()
                if continued is not None:
                    continued.add(piece, parts)
                yield exact_sum(piece, parts)

        trained = next(pieces()) if self._whole else lowrank.total(pieces())
        return Sum(trained, continued)


class SketchedSums:
    """Sums in the memory of a few clients, however many there are; their products are sketches.

    Iterating gives each module and its sum, in a fixed order, once.

    Attributes:
        clients: who sent updates, in their order.
        num_examples: |D_k| of each.
    """

    def __init__(
        self,
        updates: Iterable[Update],
        start: Mapping[str, Factors],
        weigh: Callable[[Update], float],
        rank: int,
        generator: torch.Generator,
    ) -> None:
        """Fold updates in as they arrive.

        Args:
            updates: with PEFT's keys, `r` and `lora_alpha`.
            start: the global adapter.
            weigh: what an update counts, relative to the others (`normalise` makes p_k of it).
            rank: how many components of a sum the sketches are made for.
            generator: draws what they multiply with.
        """
        self._start = start
        self.clients: list[str] = []
        self.num_examples: list[int] = []
        self._sketches: dict[str, SumSketch] = {}
        self._averages: dict[str, Factors] = {
            m: Factors(torch.zeros_like(pair.A), torch.zeros_like(pair.B))
            for m, pair in start.items()
        }
        self._shares: dict[str, Tensor] = {
            m: torch.zeros(pair.rank, dtype=torch.float64) for m, pair in start.items()
        }
        tests: dict[tuple[int, int], Projections] = {}
        for update in updates:
            self.clients.append(update.client)
            self.num_examples.append(update.num_examples)
            weight, scale = weigh(update), update_scale(update)
            for module, pair in adapter_pairs(update.tensors):
                shape = pair.B.shape[0], pair.A.shape[1]
                if module not in self._sketches:
                    if shape not in tests:
                        tests[shape] = Projections.draw(*shape, rank, generator)
                    self._sketches[module] = SumSketch(tests[shape])
                self._sketches[module].add(pair, weight * scale)
                if module in start:
                    self._shares[module][: pair.rank] += weight
                    self._averages[module].A[: pair.rank] += weight * pair.A
                    self._averages[module].B[:, : pair.rank] += weight * scale * pair.B
        self._factor = 1.0
        self._missed = self._size = 0.0

    def normalise(self, factor: float) -> None:
        """Make p_k `factor` times what `weigh` said."""
        self._factor = factor

    @property
    def missed(self) -> float:
        """An estimate of ‖Σ p_k s_k B_k A_k - what was given for it‖_F² over all modules so far."""
        return self._missed * self._factor**2

    @property
    def relative_error(self) -> float:
        """The root of `missed` beside ‖Σ p_k s_k B_k A_k‖_F."""
        return (self._missed / self._size) ** 0.5 if self._size else 0.0

    def __iter__(self) -> Iterator[tuple[str, Sum]]:
        for module in sorted(self._sketches):
            # A sketch is as large as several clients' factors, and goes when it has been used.
            found, off, norm = self._sketches.pop(module).svd()
            self._missed, self._size = self._missed + off, self._size + norm
            trained = found.factors()
            trained = trained._replace(A=trained.A * self._factor)
            if module not in self._start:
                yield module, Sum(trained)
                continue
            A, B = self._averages.pop(module).double()
            averages = Factors(A * self._factor, B * self._factor)
            shares = self._shares.pop(module) * self._factor
            start = self._start[module].double()
            yield module, Sum(trained, Continued(start, averages, shares))
