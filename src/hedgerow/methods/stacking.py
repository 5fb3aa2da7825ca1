"""Stacking of the clients' factors, which sums low-rank updates exactly (FLoRA, section 3)."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, NamedTuple

from hedgerow import lowrank
from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors, SpooledFactors
from hedgerow.methods.base import Aggregate
from hedgerow.methods.lora import update_scale

if TYPE_CHECKING:
    from hedgerow.wire import Update


class Part(NamedTuple):
    """One client's place among stacked factors, and what it counts."""

    rows: slice
    """Its rows of A and columns of B."""
    weight: float
    """Weight of the client, p_k."""
    scale: float
    """Scale of its factors, s_k."""


class StackedFactors:
    """Factors of all clients, stacked module by module; they wait on disk until they are read.

    Attributes:
        clients: who sent them, in their order.
        num_examples: |D_k| of each.
    """

    def __init__(self, updates: Iterable[Update]) -> None:
        """Take updates with PEFT's keys, `r` and `lora_alpha`, as they arrive."""
        spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (gone with the last factors)
        self._spooled: dict[str, SpooledFactors] = defaultdict(lambda: SpooledFactors(spool))
        self.clients: list[str] = []
        self.num_examples: list[int] = []
        self._ranks: dict[str, list[int]] = defaultdict(list)
        self._scales: list[float] = []
        for update in updates:
            for module, pair in adapter_pairs(update.tensors):
                self._spooled[module].add(pair)
                self._ranks[module].append(pair.rank)
            self.clients.append(update.client)
            self.num_examples.append(update.num_examples)
            self._scales.append(update_scale(update))

    def __iter__(self) -> Iterator[str]:
        """The modules, in a fixed order."""
        return iter(sorted(self._spooled))

    def shape(self, module: str) -> tuple[int, int]:
        """Shape of the adapted matrix, (m, n)."""
        return self._spooled[module].shape

    def shares(self) -> list[float]:
        """Weights by size, p_k = n_k / Σ n."""
        total = sum(self.num_examples)
        return [count / total for count in self.num_examples]

    def read(self, module: str, weights: Sequence[float]) -> tuple[Factors, list[Part]]:
        """The stacked factors of a module, as they were sent.

        Args:
            module: one of those that iterating gives.
            weights: p_k of each client.

        Returns:
            A of shape (Σ r_k, n) and B of shape (m, Σ r_k), on the CPU; and each client's part.
        """
        ((stacked, parts),) = self.pieces(module, weights)
        return stacked, parts

    def pieces(
        self, module: str, weights: Sequence[float], most: float = math.inf
    ) -> Iterator[tuple[Factors, list[Part]]]:
        """The stacked factors of a module, in pieces of `most` rows (or of one client with more).

        The parts' rows are those of their piece.
        """
        ranks = self._ranks[module]
        first = 0
        while first < len(ranks):
            fitting = takewhile(lambda end: end <= most, accumulate(ranks[first:]))
            last = first + max(len(list(fitting)), 1)
            own = slice(first, last)
            ends = accumulate(ranks[own])
            given = zip(ends, ranks[own], weights[own], self._scales[own], strict=True)
            parts = [Part(slice(end - rank, end), weight, s) for end, rank, weight, s in given]
            yield self._spooled[module].factors(first, last), parts
            first = last


def exact_sum(stacked: Factors, parts: Sequence[Part]) -> Factors:
    """Exact sum, Σ p_k s_k B_k A_k, as one pair in float64: A = [p_1 s_1 A_1; …], B = [B_1 …].

    Args:
        stacked: A of shape (Σ r_k, n) and B of shape (m, Σ r_k), which stay as they are.
        parts: of each client in turn.
    """
    counts = torch.tensor([part.weight * part.scale for part in parts], dtype=torch.float64)
    ranks = torch.tensor([part.rows.stop - part.rows.start for part in parts])
    A = stacked.A.double() * counts.repeat_interleave(ranks)[:, None]
    return Factors(A, stacked.B.double())


def aggregate_adapters(
    updates: Iterable[Update], combine: Callable[[Factors, Sequence[Part], Factors], Factors]
) -> Aggregate:
    """Combine the clients' factors module by module, and measure the noise that this makes.

    Args:
        updates: each with PEFT's keys, `r` and `lora_alpha`.
        combine: from the stacked factors of one module, whose rows are whose, and their exact
            sum, to the factors that are broadcast.

    Returns:
        The factors, and `aggregation_error`: how far their products are from Σ p_k s_k B_k A_k,
        relative to it, in Frobenius norm over all modules (left out where that is zero).
    """
    arrived = StackedFactors(updates)
    shares = arrived.shares()
    combined: dict[str, Factors] = {}

    def applied_and_exact() -> Iterator[tuple[Factors, Factors]]:
        for module in arrived:
            stacked, parts = arrived.read(module, shares)
            exact = exact_sum(stacked, parts)
            combined[module] = combine(stacked, parts, exact)
            yield combined[module], exact

    error = lowrank.relative_error(applied_and_exact())
    return Aggregate(adapter_tensors(combined), finite({"aggregation_error": error}))


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics that are finite: clients can make the exact sum zero, to which errors relate."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
