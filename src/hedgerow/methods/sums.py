"""What a server makes of a round's adapters, module by module: exact sums, averages, geometry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hedgerow import lowrank
from hedgerow.lowrank import Factors
from hedgerow.methods.lora import Part, Stacks, exact_sum


class Sums:
    """A round's sums over clients that went on from a global adapter, or from none.

    A client of rank r_k goes on from the first r_k rows of the global adapter and leaves the others
    as they are, so for every sum its adapter is [A_k; A_0[r_k:]], [B_k B_0[:, r_k:]].
    """

    def __init__(
        self, stacks: Stacks, start: Mapping[str, Factors], weights: Sequence[float]
    ) -> None:
        """Read `stacks` as it is asked for.

        Args:
            stacks: the clients' factors.
            start: the global adapter (A_0, B_0) by module, with its scale in it; maybe nothing.
            weights: p_k of each client.
        """
        self._stacks, self._start, self._weights = stacks, start, weights

    def __iter__(self) -> Iterator[str]:
        """The modules, in a fixed order."""
        return iter(self._stacks)

    def exact(self, module: str) -> Factors:
        """What the global adapter becomes: B_0 A_0 + Σ p_k (s_k B_k A_k - B_0 A_0), float64."""
        parts = self._stacks.parts(module, self._weights)
        trained = exact_sum(self._stacks.factors(module), parts)
        if module not in self._start:
            return trained
        start = self._start[module].double()
        kept = Factors(start.A * _untouched(parts, start.rank)[:, None], start.B)
        return lowrank.stack([trained, kept])

    def average(self, module: str) -> Factors:
        """The averages of A and of B that stand for `exact`, float64; of the start's rank."""
        parts, stacked = (
            self._stacks.parts(module, self._weights),
            self._stacks.factors(module).double(),
        )
        start = self._start[module].double()
        untouched = _untouched(parts, start.rank)
        A, B = start.A * untouched[:, None], start.B * untouched
        for part in parts:
            rank = part.rows.stop - part.rows.start
            A[:rank] += part.weight * stacked.A[part.rows]
            B[:, :rank] += part.weight * part.scale * stacked.B[:, part.rows]
        return Factors(A, B)

    def step(self, module: str) -> Factors:
        """What the round adds to the global function: `exact` - B_0 A_0."""
        exact = self.exact(module)
        if module not in self._start:
            return exact
        return lowrank.difference(exact, self._start[module])

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


def _untouched(parts: Sequence[Part], rank: int) -> Tensor:
    """1 - Σ p_k over the clients that train a row, for each row of the global adapter."""
    shares = torch.ones(rank, dtype=torch.float64)
    for part in parts:
        shares[: part.rows.stop - part.rows.start] -= part.weight
    return shares
