"""What a server makes of a round's adapters, module by module: exact sums, averages, geometry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hedgerow import lowrank
from hedgerow.lowrank import Factors, Projections, SumSketch
from hedgerow.methods.lora import Stacks, exact_sum, update_scale
from hedgerow.model import adapter_pairs

if TYPE_CHECKING:
    from hedgerow.wire import Update


class Sums(ABC):
    """A round's sums over clients that went on from a global adapter, or from none.

    A client of rank r_k goes on from the first r_k rows of the global adapter and leaves the others
    as they are, so for every sum its adapter is [A_k; A_0[r_k:]], [B_k B_0[:, r_k:]].
    """

    def __init__(self, start: Mapping[str, Factors]) -> None:
        """With the global adapter (A_0, B_0) by module, its scale in it; maybe nothing."""
        self._start = start

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """The modules, in a fixed order."""

    @abstractmethod
    def trained(self, module: str) -> Factors:
        """Σ p_k s_k B_k A_k, float64."""

    @abstractmethod
    def averages(self, module: str) -> Factors:
        """Σ p_k A_k and Σ p_k s_k B_k apart, float64, of the start's rank; zeros where r_k ends."""

    @abstractmethod
    def shares(self, module: str) -> Tensor:
        """Σ p_k over the clients that train a row of the start, for each row, float64."""

    def exact(self, module: str) -> Factors:
        """What the global adapter becomes: B_0 A_0 + Σ p_k (s_k B_k A_k - B_0 A_0), float64."""
        if module not in self._start:
            return self.trained(module)
        start = self._start[module].double()
        kept = Factors(start.A * (1 - self.shares(module))[:, None], start.B)
        return lowrank.stack([self.trained(module), kept])

    def average(self, module: str) -> Factors:
        """The averages of A and of B that stand for `exact`, float64; of the start's rank."""
        start, averages = self._start[module].double(), self.averages(module)
        untouched = 1 - self.shares(module)
        return Factors(averages.A + start.A * untouched[:, None], averages.B + start.B * untouched)

    def step(self, module: str) -> Factors:
        """What the round adds to the global function: `exact` - B_0 A_0."""
        exact = self.exact(module)
        if module not in self._start:
            return exact
        return lowrank.difference(exact, self._start[module])


class StackedSums(Sums):
    """Exact sums, from stacks that wait on disk."""

    def __init__(
        self, stacks: Stacks, start: Mapping[str, Factors], weights: Sequence[float]
    ) -> None:
        """Read `stacks` as it is asked for; `weights` are p_k."""
        super().__init__(start)
        self._stacks, self._weights = stacks, weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._stacks)

    def trained(self, module: str) -> Factors:
        parts = self._stacks.parts(module, self._weights)
        return exact_sum(self._stacks.factors(module), parts)

    def averages(self, module: str) -> Factors:
        stacked = self._stacks.factors(module).double()
        A, B = (torch.zeros_like(factor) for factor in self._start[module].double())
        for part in self._stacks.parts(module, self._weights):
            rank = part.rows.stop - part.rows.start
            A[:rank] += part.weight * stacked.A[part.rows]
            B[:, :rank] += part.weight * part.scale * stacked.B[:, part.rows]
        return Factors(A, B)

    def shares(self, module: str) -> Tensor:
        shares = torch.zeros(self._start[module].rank, dtype=torch.float64)
        for part in self._stacks.parts(module, self._weights):
            shares[: part.rows.stop - part.rows.start] += part.weight
        return shares

    def gram(self) -> Tensor:
        """⟨Δ_i, Δ_j⟩ of what clients add, Δ_k = s_k B_k A_k - (B_0 A_0)[r_k], over all modules.

        Returns:
            Shape (N, N), float64.
        """
        total = torch.zeros(len(self._weights), len(self._weights), dtype=torch.float64)
        for module in self:
            parts, pairs = self._stacks.parts(module, self._weights), [self._stacks.factors(module)]
            if module in self._start:
                pairs.append(self._start[module])
            A, B = lowrank.stack([pair.double() for pair in pairs])
            # Each Δ_k as coefficients of the rank-one terms of everybody's factors.
            terms = torch.zeros(len(parts), len(A), dtype=torch.float64)
            trained = parts[-1].rows.stop
            for client, part in enumerate(parts):
                rank = part.rows.stop - part.rows.start
                terms[client, part.rows] = part.scale
                terms[client, trained : trained + rank] = -1.0
            total += terms @ ((B.T @ B) * (A @ A.T)) @ terms.T
        return total


class SketchedSums(Sums):
    """Sums in the memory of a few clients, however many there are; their products are sketches.

    Attributes:
        clients: who sent updates, in their order.
        num_examples: |D_k| of each.
        missed: an estimate of ‖Σ p_k s_k B_k A_k - what is given for it‖ / ‖Σ p_k s_k B_k A_k‖ in
            Frobenius norm over all modules.
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
            weigh: what an update counts, relative to the others (`finish` makes p_k of it).
            rank: how many components of a sum the sketches are made for.
            generator: draws what they multiply with.
        """
        super().__init__(start)
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
        self._found: dict[str, Factors] = {}
        self.missed = 0.0

    def finish(self, factor: float) -> None:
        """Decompose the sketches; p_k is `factor` times what `weigh` said."""
        self._factor = factor
        missed = size = 0.0
        for module in sorted(self._sketches):
            found, off, norm = self._sketches.pop(module).svd()
            self._found[module] = found.factors().float()
            missed, size = missed + off, size + norm
        self.missed = (missed / size) ** 0.5 if size else 0.0

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def trained(self, module: str) -> Factors:
        A, B = self._found[module].double()
        return Factors(A * self._factor, B)

    def averages(self, module: str) -> Factors:
        A, B = self._averages[module].double()
        return Factors(A * self._factor, B * self._factor)

    def shares(self, module: str) -> Tensor:
        return self._shares[module] * self._factor
