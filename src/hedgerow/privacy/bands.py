"""Noise that is correlated from round to round, so that later rounds take back what earlier added.

The matrix mechanism for streams, of which prefix sums matter (DP-FTRL): in place of independent
noise z, rounds have w = C⁻¹z, where C is lower triangular. What everybody gets,
x + w = C⁻¹(Cx + z), is made of Cx + z alone, also where x_t depends on what was released before
(Denisov et al., "Improved Differential Privacy for SGD via Optimal Private Linear Operators on
Adaptive Streams", arXiv 2202.08312, theorem 2.1).

C is the square root of the matrix of prefix sums (Fichtenberger et al., "Constant matters",
arXiv 2202.11205), cut to b bands (Kalinin and Lampert, "Banded Square Root Matrix Factorization for
Differentially Private Model Training", arXiv 2405.13763): Toeplitz, with

    c_0 = 1,   c_j = c_{j-1}·(2j - 1)/(2j)  for j < b,   and 0 beyond,
    w_t = z_t - Σ_{0 < j < b} c_j·w_{t-j}

Columns of C that are b or more apart have no row in common. So a client that takes part k times,
never twice within b rounds, changes Cx by at most √k·‖c‖ times its largest update, and the account
is that of k Gaussian mechanisms with the noise multiplier of z over ‖c‖ (Choquette-Choo et al.,
"(Amplified) Banded Matrix Factorization", arXiv 2306.08153, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from hedgerow.errors import RunFailed

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.seeds import Seeds


def coefficients(bands: int) -> list[float]:
    """First column of C: c_0 … c_{b-1}.

    Args:
        bands: number b of them, from 1, with which noise is independent.
    """
    found = [1.0]
    for j in range(1, bands):
        found.append(found[-1] * (2 * j - 1) / (2 * j))
    return found


def column_norm(bands: int) -> float:
    """2-norm ‖c‖ of a column of C, by which one round with a client changes Cx more than x."""
    return math.sqrt(math.fsum(each**2 for each in coefficients(bands)))


class NoiseMemory(Protocol):
    """Noise of a round, kept for the next ones."""

    def check(self, since: int) -> None:
        """Raise a `UserError` unless there is that of round `since`, or a later one before this."""

    def load(self) -> Mapping[str, Tensor]:
        """Noise of the last round before this one, by name of the sum."""

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep this round's noise."""


@dataclass
class BandedNoise:
    """Noise w_t of one round, in units of the standard deviation of z."""

    bands: int
    """Number b of bands, from 2."""
    round: int
    """Number t of the round, from 1."""
    memory: Callable[[int], NoiseMemory] = field(repr=False)
    """Memory in a round."""

    def of(self, independent: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Correlated noise of independent noise; it is kept for the next rounds.

        What is kept is what is added, rounded to float32: the rounding is as if z were rounded.

        Args:
            independent: standard normal numbers z_t of the round's one sum, by name.

        Yields:
            Name and a float64 tensor on the CPU; all of them are made before the first.

        Raises:
            RunFailed: earlier rounds summed other tensors.
            UserError: noise of an earlier round is missing or damaged.
        """
        earlier = list(self._earlier())
        made: dict[str, Tensor] = {}
        for name, drawn in independent:
            for c, noise in earlier:
                drawn.sub_(self._same(noise, name, drawn).double(), alpha=c)
            made[name] = drawn.float()
        self.memory(self.round).save(made)
        for name, each in made.items():
            yield name, each.double()

    def _earlier(self) -> Iterator[tuple[float, Mapping[str, Tensor]]]:
        """Coefficient c_j and noise w_{t-j}, from the last round back."""
        for j, c in enumerate(coefficients(min(self.bands, self.round))[1:], start=1):
            memory = self.memory(self.round - j + 1)
            memory.check(self.round - j)
            yield c, memory.load()

    def _same(self, earlier: Mapping[str, Tensor], name: str, drawn: Tensor) -> Tensor:
        if name not in earlier or earlier[name].shape != drawn.shape:
            raise RunFailed(
                f"round {self.round} sums {name} of shape {tuple(drawn.shape)}, and rounds before "
                "did not, so that noise cannot make up for theirs (privacy.bands): the method is "
                "to say so by `keeps_coordinates`"
            )
        return earlier[name]


def groups_of(names: Sequence[str], bands: int, seeds: Seeds) -> dict[str, int]:
    """Group of each client, 0 … b-1, in an order that everybody knows, as the run's seed draws it.

    Args:
        names: of all clients.
        bands: number b of groups, whose sizes differ by one at most.
        seeds: of the run.
    """
    order = seeds.numpy("groups").permutation(len(names))
    return {names[place]: turn % bands for turn, place in enumerate(order)}


@dataclass(frozen=True)
class Turns:
    """Turns in which clients take part: one of b groups in each round, so that all rest between."""

    bands: int
    """Number b of groups."""
    groups: Mapping[str, int]
    """Group of each client, 0 … b-1; sizes differ by one at most."""
    memory: Callable[[int], NoiseMemory] = field(repr=False)
    """Memory of noise in a round."""

    @staticmethod
    def of(
        names: Sequence[str], bands: int, seeds: Seeds, memory: Callable[[int], NoiseMemory]
    ) -> Turns:
        """Turns in the groups that a run's seed draws.

        Args:
            names: of all clients, whether they take part or not.
            bands: number of groups, at most as many.
            seeds: of the run.
            memory: of noise in a round.
        """
        return Turns(bands, groups_of(names, bands, seeds), memory)

    def has(self, name: str, round: int) -> bool:
        """Whether it is a client's turn in a round, from 1."""
        return self.groups[name] == (round - 1) % self.bands

    @property
    def mean_size(self) -> float:
        """Number of clients of a group, N/b."""
        return len(self.groups) / self.bands

    def noise(self, round: int) -> BandedNoise:
        """Correlated noise of a round."""
        return BandedNoise(self.bands, round, self.memory)
