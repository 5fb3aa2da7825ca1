"""Stacking of the clients' factors, which sums low-rank updates exactly (FLoRA, section 3)."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class Arrived:
    """Who has sent updates of a round.

    Attributes:
        clients: their names, in the order in which they came.
        num_examples: |D_k| of each.
        said: metadata of each update.
    """

    def __init__(self) -> None:
        self.clients: list[str] = []
        self.num_examples: list[int] = []
        self.said: list[Mapping[str, str]] = []

    def count(self, update: Update) -> None:
        """Count a client in."""
        self.clients.append(update.client)
        self.num_examples.append(update.num_examples)
        self.said.append(update.about)


class StackedFactors(Arrived):
    """Factors of all clients, stacked module by module; they wait on disk until they are read."""

    def __init__(self, updates: Iterable[Update]) -> None:
        """Take updates with PEFT's keys, `r` and `lora_alpha`, as they arrive."""
        super().__init__()
        spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (gone with the last factors)
        self._spooled: dict[str, SpooledFactors] = defaultdict(lambda: SpooledFactors(spool))
        self._ranks: dict[str, list[int]] = defaultdict(list)
        self._scales: list[float] = []
        for update in updates:
            for module, pair in adapter_pairs(update.tensors):
                self._spooled[module].add(pair)
                self._ranks[module].append(pair.rank)
            self.count(update)
            self._scales.append(update_scale(update))

    def __iter__(self) -> Iterator[str]:
        """The modules, in a fixed order."""
        return iter(sorted(self._spooled))

    def shape(self, module: str) -> tuple[int, int]:
        """Shape of the adapted matrix, (m, n)."""
        return self._spooled[module].shape

    def rank(self, module: str) -> int:
        """Rank of all factors of a module together, Σ r_k."""
        return sum(self._ranks[module])

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


def average(stacked: Factors, parts: Sequence[Part]) -> Factors:
    """A = Σ p_k A_k, B = Σ p_k s_k B_k, the smaller padded with zeros to the largest."""
    rank = max(part.rows.stop - part.rows.start for part in parts)
    A = torch.zeros(rank, stacked.A.shape[1])
    B = torch.zeros(stacked.B.shape[0], rank)
    for part in parts:
        A_k, B_k = stacked.A[part.rows], stacked.B[:, part.rows]
        A[: len(A_k)] += part.weight * A_k
        B[:, : len(A_k)] += part.weight * part.scale * B_k
    return Factors(A, B)


def average_adapters(updates: Iterable[Update]) -> Aggregate:
    """Average the clients' factors, A and B apart, and measure the noise that this makes.

    Args:
        updates: each with PEFT's keys, `r` and `lora_alpha`.

    Returns:
        The factors, and `aggregation_error`: how far their products are from Σ p_k s_k B_k A_k,
        relative to it, in Frobenius norm over all modules (left out where that is zero).
    """
    arrived = StackedFactors(updates)
    shares = arrived.shares()
    averages: dict[str, Factors] = {}

    def applied_and_exact() -> Iterator[tuple[Factors, Factors]]:
        for module in arrived:
            stacked, parts = arrived.read(module, shares)
            averages[module] = average(stacked, parts)
            yield averages[module], exact_sum(stacked, parts)

    error = lowrank.relative_error(applied_and_exact())
    return Aggregate(adapter_tensors(averages), finite({"aggregation_error": error}))


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics that are finite: clients can make the exact sum zero, to which errors relate."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
