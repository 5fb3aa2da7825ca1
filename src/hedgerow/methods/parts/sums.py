"""Exact sums and averages of a round's adapters, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from hedgerow import lowrank
from hedgerow.adapters import adapter_pairs
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors, Projections, SumSketch
from hedgerow.methods.lora import update_scale
from hedgerow.methods.parts.stacking import Arrived, Part, StackedFactors, average, exact_sum

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.wire import Update


class Sum(NamedTuple):
    """What a round makes of one matrix, in float64."""

    exact: Factors
    """Next function of what clients trained, B·A: Σ p_k s_k B_k A_k, where all began at zero."""
    average: Factors | None = None
    """Adapter that clients go on from, which stands for a part of `exact`; None: there is none."""
    start: Factors | None = None
    """Adapter that they went on from, (A_0, B_0); None: each began at zero."""
    largest: int = 0
    """Largest rank of a client whose factors are in it; 0 where that is not kept."""
    apart: bool = False
    """Whether the rows of `exact` are single clients' own, one client after the other."""

    def step(self) -> Factors:
        """Change of the global function by the round: `exact` - B_0 A_0."""
        return self.exact if self.start is None else lowrank.difference(self.exact, self.start)


class Sums(Protocol):
    """The sum of each module, by its name, in a fixed order."""

    def __iter__(self) -> Iterator[tuple[str, Sum]]:
        """Read what has arrived, module by module."""

    @property
    def missed(self) -> float:
        """An estimate of ‖Σ p_k s_k B_k A_k - what was given for it‖_F² over all modules so far."""


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

    def sum(self, trained: Factors) -> Sum:
        """The round's sum, B_0 A_0 + Σ p_k (s_k B_k A_k - B_0 A_0), and the averages.

        Args:
            trained: Σ p_k s_k B_k A_k.
        """
        start, (A, B) = self.start, self.averages
        untouched = 1 - self.shares
        exact = lowrank.stack([trained, Factors(start.A * untouched[:, None], start.B)])
        average = Factors(A + start.A * untouched[:, None], B + start.B * untouched)
        return Sum(exact, average, start)


class StackedSums:
    """Sums as the stacked factors that were sent, of rank Σ r_k."""

    continues: ClassVar[bool] = False
    """Whether the adapter that clients went on from is a part of the sums."""
    missed = 0.0

    def __init__(
        self, arrived: StackedFactors, start: Mapping[str, Factors], weights: Sequence[float]
    ) -> None:
        """Read what has arrived as it is asked for.

        Args:
            arrived: the clients' factors.
            start: the global adapter that they went on from, by module; maybe nothing.
            weights: p_k.
        """
        self._arrived, self._start, self._weights = arrived, start, weights

    def __iter__(self) -> Iterator[tuple[str, Sum]]:
        for module in self._arrived:
            stacked, parts = self._arrived.read(module, self._weights)
            start = self._start.get(module)
            largest = max(part.rows.stop - part.rows.start for part in parts)
            average = self.average(stacked, parts)
            yield module, Sum(exact_sum(stacked, parts), average, start, largest, apart=True)

    def average(self, stacked: Factors, parts: Sequence[Part]) -> Factors | None:
        """Adapter that clients go on from; here none that is not the sum itself."""
        return None


class FactorAverages(StackedSums):
    """Exact sums of adapters of one rank, and the averages of A and B apart (FedIT's)."""

    def average(self, stacked: Factors, parts: Sequence[Part]) -> Factors | None:
        """A = Σ p_k A_k, B = Σ p_k s_k B_k."""
        return average(stacked, parts)


class ExactSums:
    """Exact sums of stacked factors that wait on disk and are read a piece at a time.

    A sum is a pair of the matrix's own rank where the stacked factors were larger.
    """

    continues: ClassVar[bool] = True
    missed = 0.0

    def __init__(
        self, arrived: StackedFactors, start: Mapping[str, Factors], weights: Sequence[float]
    ) -> None:
        """Read what has arrived as it is asked for; for the arguments, see `StackedSums`."""
        self._arrived, self._start, self._weights = arrived, start, weights

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

        most = min(self._arrived.shape(module))

        def pieces() -> Iterator[Factors]:
            for stacked, parts in self._arrived.pieces(module, self._weights, most):
                piece = stacked.double()
                if continued is not None:
                    continued.add(piece, parts)
                yield exact_sum(piece, parts)

        trained = lowrank.total(pieces())
        if continued is not None:
            return continued.sum(trained)
        return Sum(trained, apart=self._arrived.rank(module) <= most)


class SketchedSums(Arrived):
    """Sums in the memory of a few clients, however many there are; their products are sketches.

    Iterating gives each module and its sum once.
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
        super().__init__()
        self._start = start
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
            self.count(update)
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
            yield module, Continued(start, averages, shares).sum(trained)
