"""Client-level differential privacy: means of bounded updates with Gaussian noise.

McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963,
algorithm 1 (DP-FedAvg), with a fixed denominator:

    server:  x = (Σ_k min(1, C/‖x_k‖)·x_k + N(0, (z·C)²)) / D      of the D clients that were asked

Of two neighbours, one has all of a client's updates and the other has zeros in their place, so one
client changes a round's sum by at most C. What is made of x afterwards costs nothing.

Where n of N clients are to take part in a round, each does with probability q = n/N, independently
of the others and as the server's secret key says, and D = n whoever was drawn. Then a round is a
sampled Gaussian mechanism (Mironov et al., arXiv 1908.10530), which costs less, as long as nothing
that is released says who was drawn, or how many. Each round counts for all clients.

With a quantile γ, C follows the lengths of updates (Andrew et al., "Differentially Private Learning
with Adaptive Clipping", arXiv 1905.03871, algorithm 1):

    server:  b = 1/2 + (Σ_k (1[‖x_k‖ ≤ C] - 1/2) + N(0, σ²)) / D,      C <- C·exp(-0.2·(b - γ))

One client changes that sum by 1/2, where it has zero in its place there, too. So that both together
cost as much as z says, x has noise of (1/z² - 1/(2σ)²)^(-1/2) in the place of z, and
σ = max(D/20, z). Both are of one sample, so that this holds for sampled rounds as well.

With b bands, noise is correlated from round to round (`hedgerow.privacy.bands`), of clients that
take part in turns, in one of b groups. D is the mean size of a group, N/b, in every round: so all
clients weigh the same, the mean over b rounds is that of all, and noise is taken back as it was
added.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hedgerow.errors import RunFailed, UserError
from hedgerow.lazy import torch
from hedgerow.privacy.accounting import (
    Accountant,
    Release,
    affordable,
    least_noise,
    of_samples,
    spent,
)
from hedgerow.privacy.bands import BandedNoise, Turns, column_norm
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
    denominator: float
    """Number D of clients that were asked, whether they answer or not; of those that are drawn
    in secret, or take turns, the number that it is on average."""
    round: int
    key: NoiseKey = field(repr=False)
    parent: str = ""
    """Hash of the entry before: noise of a round that begins from another is another."""
    quantile: float | None = None
    """Share γ of the clients that `clip` is to leave as they are; None: it stays as it is."""
    bands: BandedNoise | None = None
    """Correlates the noise with that of other rounds; None: each has its own."""
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
        drawn = self.key.beside(sums, "round", self.round, self.parent, *use)
        for name, noise in drawn if self.bands is None else self.bands.of(drawn):
            sums[name].add_(noise.mul_(deviation).to(sums[name].device))

    def of_nobody(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Sum of a round for which nobody was drawn: noise alone.

        Args:
            shapes: of the tensors of which updates are made, by name.
        """
        sums = {name: torch.zeros(tuple(shape)) for name, shape in shapes.items()}
        self.add_noise(sums)
        return sums

    @property
    def next_clip(self) -> float | None:
        """`clip` of the next round; None where it stays as it is."""
        if self.quantile is None:
            return None
        bits = {"bits": torch.tensor(self.count / 2 - self.clipped, dtype=torch.float64)}
        ((_, noise),) = self.key.beside(bits, "clip", self.round, self.parent)
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
class PoissonSampling:
    """Secret sampling of the clients of rounds, each of them independently of the others."""

    names: Sequence[str]
    """Names of all N clients, whether they are there or not."""
    expected: int
    """Number n of clients that a round has on average, below N."""
    key: NoiseKey = field(repr=False)

    @property
    def rate(self) -> float:
        """Probability q = n/N with which a client takes part in a round."""
        return self.expected / len(self.names)

    def drawn(self, round: int, parent: str) -> list[str]:
        """Names of the clients that take part in a round, in their order; maybe nobody.

        The same once more where a round is made again from the same entry.

        Args:
            round: from 1.
            parent: hash of the entry before.
        """
        numbers = self.key.generator("participants", round, parent).random(len(self.names))
        return [name for name, at in zip(self.names, numbers, strict=True) if at < self.rate]


@dataclass(frozen=True)
class ClientLevel:
    """Client-level privacy of a run, as its server keeps it."""

    settings: PrivacySettings
    release: Release
    """The mechanism of one round."""
    key: NoiseKey = field(repr=False)
    log: ReleaseLog
    """Entries that were made, each of the updates of some clients."""
    sampling: PoissonSampling | None = None
    """How the clients of a round are drawn in secret; None: everybody knows who they are."""
    turns: Turns | None = None
    """Turns in which clients take part, with `settings.bands`; None: each may in every round."""

    @staticmethod
    def of(
        settings: PrivacySettings,
        rounds: int,
        clients: Sequence[str],
        folder: Path,
        known: Iterable[tuple[int, str]],
        drawn: int | None = None,
        turns: Turns | None = None,
    ) -> ClientLevel:
        """Privacy of a run of so many rounds and clients; its key is made where there is none.

        Args:
            settings: what is promised.
            rounds: number of rounds of the whole run.
            clients: names of all clients, whether they have joined or not.
            folder: of the key and the log.
            known: rounds that the ledger has, each with the hash of the entry before.
            drawn: number of clients that a round has on average, below that of all, where they are
                drawn in secret; None: they are not.
            turns: in which clients take part, with `settings.bands`.

        Raises:
            UserError: the rounds spend more than the budget; δ is too large for so many clients;
                the key or the log is damaged, or is missing where there are rounds.
        """
        count = len(clients)
        if settings.delta >= 1 / count:
            raise UserError(
                f"privacy.delta {settings.delta:g} is not below 1/{count}, one over the number of "
                "clients, so that it would promise little: give a smaller one"
            )
        rate = 1.0 if drawn is None else drawn / count
        noise, bands = settings.noise_multiplier, 1 if turns is None else turns.bands
        times = math.ceil(rounds / bands)  # that the client which is in most rounds takes part
        if noise is None:
            assert settings.epsilon is not None
            least = least_noise(settings.epsilon, settings.delta, times, rate, settings.accountant)
            release = Release(least, rate)
        else:
            release = Release(noise / column_norm(bands), rate)
        if noise is not None and settings.epsilon is not None:
            all_times = replace(release, count=times)
            most = affordable(all_times, settings.epsilon, settings.delta, settings.accountant)
            if most < times:
                raise UserError(
                    f"privacy.epsilon {settings.epsilon:g} is spent after {most * bands} of the "
                    f"{rounds} rounds with noise_multiplier {noise:g}: give fewer rounds, more "
                    "noise, or leave noise_multiplier out"
                )
        if turns is not None:
            known = [(round, "") for round, _ in known]
        log = ReleaseLog(folder / RELEASES, known)
        key = NoiseKey.of(settings.seed, folder / PRIVACY_KEY, used=bool(log))
        sampling = None if drawn is None else PoissonSampling(clients, drawn, key)
        return ClientLevel(settings, release, key, log, sampling, turns)

    def mean(self, round: int, parent: str, asked: int, clip: float | None) -> GaussianMean:
        """Mean of a round.

        Args:
            round: from 1.
            parent: hash of the entry before.
            asked: number of clients that were asked, which counts where they were not drawn in
                secret.
            clip: as the round before has left it; None: as it was in the beginning.
        """
        turns = self.turns
        return GaussianMean(
            clip=self.settings.clip if clip is None else clip,
            noise_multiplier=self.release.noise_multiplier * self._norm,
            denominator=self._denominator(asked),
            round=round,
            key=self.key,
            parent=self.begins_from(parent),
            quantile=self.settings.quantile,
            bands=None if turns is None else turns.noise(round),
        )

    def begins_from(self, parent: str) -> str:
        """What counts, of the hash of the entry before, in the log and in an entry's digest.

        Nothing where noise is correlated: a round is then released once, from whatever entry it
        begins. After a rollback that may be another, whose account has more rounds, and no more.
        """
        return parent if self.turns is None else ""

    def account_for(self, round: int, parent: str, sha256: str, clients: Iterable[str]) -> float:
        """Account for an entry before it is written.

        Args:
            round: from 1.
            parent: hash of the entry before.
            sha256: digest of the entry, with what counts of that (`begins_from`) as its parent.
            clients: names of those whose updates it is made from; where they were drawn in secret,
                of all that might have been.

        Returns:
            Privacy loss ε so far, of the client that has lost most.

        Raises:
            RunFailed: it would exceed the budget; or the round was made before with other bits, or
                has a client too soon (`bands`), so that no account would hold.
        """
        names, parent = list(clients), self.begins_from(parent)
        is_known = self.log.has(round, parent, sha256)
        if not is_known and self.log.has(round, parent):
            # That two releases differ at all may tell that a client's update does.
            raise RunFailed(
                f"round {round} was made again and came to other bits, as on another processor or "
                "with other clients, but a round is released once, or once from one entry: nothing "
                "of it is released; go on where and with whom it was made, or begin anew with "
                "another --out"
            )
        if self.turns is not None:
            self._check_turn(self.turns, round, names)
        releases = self.log.by_client()
        if not is_known:
            for name in names:
                releases.setdefault(name, Counter())[round, parent] += 1
        # A round from one entry has one sample, however often it is made.
        accounts = {of_samples(self.release, own.values()) for own in releases.values()}
        found = max(
            _spent(account, self.settings.delta, self.settings.accountant) for account in accounts
        )
        budget = self.settings.epsilon
        if budget is not None and found > budget:
            raise RunFailed(
                f"round {round} was made again with other noise, and epsilon would be {found:.4g} "
                f"with both, above privacy.epsilon {budget:g}: nothing of it is released"
            )
        self.log.add(round, parent, sha256, names)
        return found

    @property
    def _norm(self) -> float:
        """What a client's part in a round changes, in units of its update; 1 without bands."""
        return 1.0 if self.turns is None else column_norm(self.turns.bands)

    def _denominator(self, asked: int) -> float:
        """What a round's sum is divided by, where so many clients were asked."""
        if self.turns is not None:
            return self.turns.mean_size
        return asked if self.sampling is None else self.sampling.expected

    def _check_turn(self, turns: Turns, round: int, names: Iterable[str]) -> None:
        """Raise `RunFailed` where a client comes too soon for what correlated noise hides."""
        for name in names:
            near = [n for n, _ in self.log.by_round(name) if 0 < abs(n - round) < turns.bands]
            if near:
                raise RunFailed(
                    f"round {round}: {name} took part in round {near[0]}, fewer than privacy.bands "
                    f"{turns.bands} rounds away: nothing of it is released"
                )


@cache
def _spent(releases: tuple[Release, ...], delta: float, accountant: Accountant) -> float:
    """`spent`, which is asked again for what was released before."""
    return spent(releases, delta, accountant)
