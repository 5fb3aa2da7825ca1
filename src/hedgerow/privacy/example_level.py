"""Example-level differential privacy: a client's steps along noisy sums of bounded gradients.

Of two neighbours, one has a row of a client's data where the other has none, so that one row
changes a step's sum by at most C; who takes part in a step is drawn in secret, each row with
probability q. So a round is so many sampled Gaussian mechanisms, and whatever its update says costs
nothing more. A round that is made again with other bits has the same samples, and other noise: m
releases of it are as many mechanisms with noise z/√m, which is more than m rounds cost.

Each client has its own account, by its own number of rows, and the noise that this asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hedgerow.errors import ClientFailed, UserError
from hedgerow.privacy.accounting import Accountant, Release, least_noise, of_samples, spent
from hedgerow.privacy.noise import NoiseKey
from hedgerow.privacy.releases import ReleaseLog
from hedgerow.settings import PrivacySettings, TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GaussianSteps:
    """Steps of one local training along sums of bounded gradients, with noise."""

    clip: float
    """Largest 2-norm C of an example's gradient, over all parameters that train."""
    noise_multiplier: float
    """Standard deviation z of the noise on the sum, in units of `clip`."""
    sampling_rate: float
    """Probability q with which an example is in a step, each independently of the others."""
    expected: float
    """Number of examples that a step has on average, q·n."""
    count: int
    """Number of steps."""
    key: NoiseKey = field(repr=False)
    use: tuple[str | int, ...] = ()
    """Tells this training apart from others with the same key."""
    trainings: int = 1
    """Number of trainings of the round that are accounted for."""
    begun: set[tuple[str | int, ...]] = field(default_factory=set, repr=False)
    """Uses of the trainings of the round that have begun."""

    def begin(self) -> None:
        """Begin this training.

        Raises:
            UserError: it is one more than is accounted for.
        """
        if self.use in self.begun or len(self.begun) == self.trainings:
            raise UserError(
                f"privacy.level example: the method trains more than {self.trainings} times in a "
                "round, which `trainings` has to say, or twice with the same noise (`again`)"
            )
        self.begun.add(self.use)

    def again(self) -> GaussianSteps:
        """As many steps of a further training of the round, with other samples and noise."""
        return replace(self, use=(*self.use, "again"))

    def sampled(self, num_examples: int, step: int) -> Iterator[tuple[int, int]]:
        """Places of a step's examples among so many, each with a seed for its dropout."""
        generator = self.key.generator("sample", *self.use, step)
        chosen = np.flatnonzero(generator.random(num_examples) < self.sampling_rate)
        seeds = generator.integers(2**63, size=num_examples)[chosen]
        yield from zip(chosen.tolist(), seeds.tolist(), strict=True)

    def add_noise(self, sums: Mapping[str, Tensor], step: int) -> None:
        """Add noise to a step's sum of bounded gradients, in place."""
        for name, noise in self.key.beside(sums, "step", *self.use, step):
            sums[name].add_(noise.mul_(self.noise_multiplier * self.clip).to(sums[name].device))


@dataclass
class ExampleLevel:
    """Example-level privacy of one client in a run, as its site keeps it."""

    settings: PrivacySettings
    client: str
    release: Release
    """The mechanism of one round."""
    expected: int
    """Number of examples that a step has on average."""
    trainings: int
    """Number of times that the client trains in a round."""
    key: NoiseKey = field(repr=False)
    log: ReleaseLog
    """What has been released of the client's data."""

    @staticmethod
    def of(
        settings: PrivacySettings,
        training: TrainingSettings,
        *,
        rounds: int,
        trainings: int,
        client: str,
        num_examples: int,
        key_file: Path,
        log_file: Path,
        known: Iterable[tuple[int, str]],
    ) -> ExampleLevel:
        """Privacy of a client; its key is made where there is none.

        Args:
            settings: what is promised.
            training: of each round.
            rounds: number of rounds of the whole run.
            trainings: number of times that a client trains in a round.
            client: its name.
            num_examples: number of its rows.
            key_file: file of the key.
            log_file: file of what has been released of its data.
            known: rounds that it has trained by the ledger, each with the hash of the entry before.

        Raises:
            UserError: as `check_example_level` says; the key or the log is damaged, or is missing
                where there are rounds.
        """
        release = check_example_level(
            settings,
            training,
            rounds=rounds,
            trainings=trainings,
            client=client,
            num_examples=num_examples,
        )
        log = ReleaseLog(log_file, known)
        return ExampleLevel(
            settings=settings,
            client=client,
            release=release,
            expected=training.sample_size(num_examples),
            trainings=trainings,
            key=NoiseKey.of(settings.seed, key_file, used=bool(log)),
            log=log,
        )

    def begin(self, round: int, parent: str) -> GaussianSteps:
        """Steps of a round, which counts from now on, whether anything comes of it or not.

        Args:
            round: from 1.
            parent: hash of the entry before, from which the client trains.

        Raises:
            ClientFailed: the round would spend more than the budget.
        """
        if not self.log.has(round, parent):
            self._check_budget(round, parent)
            self.log.begin(round, parent, [self.client])
        return GaussianSteps(
            clip=self.settings.clip,
            noise_multiplier=self.release.noise_multiplier,
            sampling_rate=self.release.sampling_rate,
            expected=self.expected,
            count=self.release.count // self.trainings,
            key=self.key,
            use=(self.client, round, parent),
            trainings=self.trainings,
        )

    def account_for(self, round: int, parent: str, sha256: str) -> None:
        """Account for what the client is about to say of a round that it began.

        The same once more costs nothing; anything else has independent noise, and costs more.

        Args:
            round: from 1.
            parent: hash of the entry before.
            sha256: digest of all that will be said.

        Raises:
            ClientFailed: it would spend more than the budget, and must not be said.
        """
        if self.log.costs(round, parent, sha256):
            self._check_budget(round, parent)
        self.log.add(round, parent, sha256, [self.client])

    def _check_budget(self, round: int, parent: str) -> None:
        """Raise `ClientFailed` unless there is budget for one more release of a round."""
        budget, releases = self.settings.epsilon, self.log.by_round(self.client)
        count = releases.total()
        releases[round, parent] += 1
        if budget is not None and self._spent(releases) > budget:
            raise ClientFailed(
                f"its privacy budget is spent: after {count} rounds, with epsilon "
                f"{self.epsilon():.4g}, another would exceed privacy.epsilon {budget:g}",
                kind="its privacy budget is spent",
            )

    def epsilon(self) -> float:
        """Privacy loss ε of the rounds so far."""
        return self._spent(self.log.by_round(self.client))

    def _spent(self, releases: Counter[tuple[int, str]]) -> float:
        """Privacy loss ε of so many releases by round, those of one round with the same samples."""
        mechanisms = of_samples(self.release, releases.values())
        return _spent(mechanisms, self.settings.delta, self.settings.accountant)


@cache
def _spent(releases: tuple[Release, ...], delta: float, accountant: Accountant) -> float:
    """`spent`, which clients of one size ask for each."""
    return spent(releases, delta, accountant)


def check_example_level(
    settings: PrivacySettings,
    training: TrainingSettings,
    *,
    rounds: int,
    trainings: int,
    client: str,
    num_examples: int,
) -> Release:
    """Mechanism of one round of a client with so many examples.

    For arguments, see `ExampleLevel.of`.

    Raises:
        UserError: δ is too large for so many examples, or no noise is enough for the budget.
    """
    if settings.delta >= 1 / num_examples:
        raise UserError(
            f"privacy.delta {settings.delta:g} is not below 1/{num_examples}, one over the number "
            f"of examples of {client}, so that it would promise little: give a smaller one"
        )
    rate = training.sample_size(num_examples) / num_examples
    steps = trainings * training.sampled_steps(num_examples)
    noise = settings.noise_multiplier
    if noise is None:
        assert settings.epsilon is not None
        noise = least_noise(
            settings.epsilon, settings.delta, rounds * steps, rate, settings.accountant
        )
    return Release(noise, rate, steps)
