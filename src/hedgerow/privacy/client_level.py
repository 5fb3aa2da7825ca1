"""Client-level differential privacy: means of bounded updates with Gaussian noise.

McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963,
algorithm 1 (DP-FedAvg), with a fixed denominator:

    server:  x = (Σ_k min(1, C/‖x_k‖)·x_k + N(0, (z·C)²)) / D      of the D clients that were asked

Of two neighbours, one has all of a client's updates and the other has zeros in their place, so one
client changes a round's sum by at most C. What is made of x afterwards costs nothing.

With a quantile γ, C follows the lengths of updates (Andrew et al., "Differentially Private Learning
with Adaptive Clipping", arXiv 1905.03871, algorithm 1):

    server:  b = 1/2 + (Σ_k (1[‖x_k‖ ≤ C] - 1/2) + N(0, σ²)) / D,      C <- C·exp(-0.2·(b - γ))

One client changes that sum by 1/2. So that both together cost as much as z says, x has noise of
(1/z² - 1/(2σ)²)^(-1/2) in the place of z, and σ = max(D/20, z).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hedgerow.errors import RunFailed, UserError
from hedgerow.lazy import torch
from hedgerow.privacy.accounting import Release, affordable, least_noise, spent
from hedgerow.privacy.noise import PRIVACY_KEY, NoiseKey
from hedgerow.privacy.releases import RELEASES, ReleaseLog
from hedgerow.settings import PrivacySettings

if TYPE_CHECKING:
    from torch import Tensor


RATE = 0.2
"""Rate at which C follows the quantile, as in the paper."""


@dataclass
class GaussianMean:
    """Mean of a round's bounded updates, with noise."""

    clip: float
    """Largest 2-norm C of an update."""
    noise_multiplier: float
    """Standard deviation z of the noise on the sum, in units of `clip`."""
    denominator: int
    """Number D of clients that were asked, whether they answer or not."""
    round: int
    key: NoiseKey = field(repr=False)
    quantile: float | None = None
    """Share γ of the clients that `clip` is to leave as they are; None: it stays as it is."""
    count: int = 0
    """Number of updates so far."""
    clipped: int = 0
    """Number of those that were longer than `clip`."""

    def weight(self, change: Iterable[Tensor]) -> float:
        """Factor min(1, C/‖x‖) that bounds an update, of the tensors of which it is made."""
        norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in change]
        length = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        self.count += 1
        self.clipped += length > self.clip
        return min(1.0, self.clip / length) if length else 1.0

    def add_noise(self, sums: Mapping[str, Tensor], *use: str | int) -> None:
        """Add noise to the sum of bounded updates, in place.

        Args:
            sums: tensors by name.
            use: tells several sums of one round apart.
        """
        deviation = self._of_sum * self.clip
        for name, noise in self.key.beside(sums, "round", self.round, *use):
            sums[name].add_(noise.mul_(deviation).to(sums[name].device))

    @property
    def next_clip(self) -> float | None:
        """`clip` of the next round; None where it stays as it is."""
        if self.quantile is None:
            return None
        bits = {"bits": torch.tensor(self.count / 2 - self.clipped, dtype=torch.float64)}
        ((_, noise),) = self.key.beside(bits, "clip", self.round)
        share = 0.5 + (float(bits["bits"]) + self._of_bits * float(noise)) / self.denominator
        return self.clip * math.exp(-RATE * (share - self.quantile))

    @property
    def _of_bits(self) -> float:
        """Standard deviation σ of the noise on the count of updates that are short enough."""
        return max(self.denominator / 20, self.noise_multiplier)

    @property
    def _of_sum(self) -> float:
        """Noise multiplier of the sum, which with that of the count is worth `noise_multiplier`."""
        if self.quantile is None or not self.noise_multiplier:
            return self.noise_multiplier
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self._of_bits) ** -2)

    @property
    def clipped_share(self) -> float:
        """Share of the updates that were longer than `clip`."""
        return self.clipped / max(self.count, 1)


@dataclass(frozen=True)
class ClientLevel:
    """Client-level privacy of a run, as its server keeps it."""

    settings: PrivacySettings
    noise_multiplier: float
    key: NoiseKey = field(repr=False)
    log: ReleaseLog
    """Entries that were made, each of the updates of some clients."""

    @staticmethod
    def of(
        settings: PrivacySettings,
        rounds: int,
        clients: int,
        folder: Path,
        known: Iterable[tuple[int, str]],
    ) -> ClientLevel:
        """Privacy of a run of so many rounds and clients; its key is made where there is none.

        Args:
            settings: what is promised.
            rounds: number of rounds of the whole run.
            clients: number of clients that may be asked.
            folder: of the key and the log.
            known: rounds that the ledger has, each with the hash of the entry before.

        Raises:
            UserError: the rounds spend more than the budget; δ is too large for so many clients;
                the key or the log is damaged, or is missing where there are rounds.
        """
        if settings.delta >= 1 / clients:
            raise UserError(
                f"privacy.delta {settings.delta:g} is not below 1/{clients}, one over the number "
                "of clients, so that it would promise little: give a smaller one"
            )
        noise = settings.noise_multiplier
        if noise is None:
            assert settings.epsilon is not None
            noise = least_noise(
                settings.epsilon, settings.delta, rounds, accountant=settings.accountant
            )
        elif settings.epsilon is not None:
            release = Release(noise, count=rounds)
            most = affordable(release, settings.epsilon, settings.delta, settings.accountant)
            if most < rounds:
                raise UserError(
                    f"privacy.epsilon {settings.epsilon:g} is spent after {most} of the {rounds} "
                    f"rounds with noise_multiplier {noise:g}: give fewer rounds, more noise, or "
                    "leave noise_multiplier out"
                )
        log = ReleaseLog(folder / RELEASES, known)
        key = NoiseKey.of(settings.seed, folder / PRIVACY_KEY, used=bool(log))
        return ClientLevel(settings, noise, key, log)

    def mean(self, round: int, asked: int, clip: float | None) -> GaussianMean:
        """Mean of a round for which so many clients were asked.

        Args:
            round: from 1.
            asked: number of clients.
            clip: as the round before has left it; None: as it was in the beginning.
        """
        return GaussianMean(
            clip=self.settings.clip if clip is None else clip,
            noise_multiplier=self.noise_multiplier,
            denominator=asked,
            round=round,
            key=self.key,
            quantile=self.settings.quantile,
        )

    def account_for(self, round: int, parent: str, sha256: str, clients: Iterable[str]) -> float:
        """Account for an entry before it is written.

        Args:
            round: from 1.
            parent: hash of the entry before.
            sha256: digest of the entry.
            clients: names of those whose updates it is made from.

        Returns:
            Privacy loss ε so far, of the client that is in most entries.

        Raises:
            RunFailed: it would exceed the budget.
        """
        names = list(clients)
        more = 0 if self.log.has(round, parent, sha256) else 1
        most = max([self.log.most, *(self.log.count(name) + more for name in names)])
        found = spent(
            [Release(self.noise_multiplier, count=most)],
            self.settings.delta,
            self.settings.accountant,
        )
        budget = self.settings.epsilon
        if budget is not None and found > budget:
            raise RunFailed(
                f"round {round} was made again with other noise, and epsilon would be {found:.4g} "
                f"with both, above privacy.epsilon {budget:g}: nothing of it is released"
            )
        self.log.add(round, parent, sha256, names)
        return found
