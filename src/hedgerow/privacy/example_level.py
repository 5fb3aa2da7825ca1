"""Example-level differential privacy: a client's steps along noisy sums of bounded gradients.

Of two neighbours, one has a row of a client's data where the other has none, so that one row
changes a step's sum by at most C; who takes part in a step is drawn in secret, each row with
probability q. So a round is so many sampled Gaussian mechanisms, and whatever its update says costs
nothing more.
Each client has its own account, by its own number of rows, and the noise that this asks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hedgerow.errors import ClientFailed, UserError
from hedgerow.files import replacing
from hedgerow.privacy.accounting import Accountant, Release, least_noise, spent
from hedgerow.privacy.noise import NoiseKey
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
    record: Path
    """File of the rounds that the client has trained, each with the hash of the entry before it."""
    rounds: set[tuple[int, str]]
    """Content of `record`."""

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
        record: Path,
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
            record: file of the rounds that the client has trained.
            known: rounds that it has trained by the ledger, each with the hash of the entry before.

        Raises:
            UserError: as `check_example_level` says; the key or the record is damaged, or lacks a
                round that the ledger has.
        """
        release = check_example_level(
            settings,
            training,
            rounds=rounds,
            trainings=trainings,
            client=client,
            num_examples=num_examples,
        )
        trained, seed = _read(record, known), settings.seed
        if trained and seed is None and not key_file.exists():
            # A round made again with another key would be another release, and not be counted.
            raise UserError(
                f"{key_file} is missing, which noise derives from: restore it from a copy, or "
                "begin anew with another --out"
            )
        return ExampleLevel(
            settings=settings,
            client=client,
            release=release,
            expected=training.sample_size(num_examples),
            trainings=trainings,
            key=NoiseKey.kept_in(key_file) if seed is None else NoiseKey.of_seed(seed),
            record=record,
            rounds=trained,
        )

    def begin(self, round: int, parent: str) -> GaussianSteps:
        """Steps of a round, which counts from now on; once, however often it is begun.

        Args:
            round: from 1.
            parent: hash of the entry before, from which the client trains.

        Raises:
            ClientFailed: the round would spend more than the budget.
        """
        begun = self.rounds | {(round, parent)}
        budget = self.settings.epsilon
        if begun != self.rounds:
            if budget is not None and self._spent(len(begun)) > budget:
                raise ClientFailed(
                    f"its privacy budget is spent: after {len(self.rounds)} rounds, with epsilon "
                    f"{self.epsilon():.4g}, another would exceed privacy.epsilon {budget:g}"
                )
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.record) as file:
                file.write(json.dumps(sorted(begun)).encode())
            self.rounds = begun
        return GaussianSteps(
            clip=self.settings.clip,
            noise_multiplier=self.release.noise_multiplier,
            sampling_rate=self.release.sampling_rate,
            expected=self.expected,
            count=self.release.count // self.trainings,
            key=self.key,
            use=(self.client, round, parent),
        )

    def epsilon(self) -> float:
        """Privacy loss ε of the rounds so far."""
        return self._spent(len(self.rounds))

    def _spent(self, rounds: int) -> float:
        times = Release(
            self.release.noise_multiplier, self.release.sampling_rate, self.release.count * rounds
        )
        return _spent(times, self.settings.delta, self.settings.accountant)


@cache
def _spent(release: Release, delta: float, accountant: Accountant) -> float:
    """`spent`, which clients of one size ask for each."""
    return spent([release], delta, accountant)


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


def _read(record: Path, known: Iterable[tuple[int, str]]) -> set[tuple[int, str]]:
    """Rounds in a record; none where there is no file.

    Raises:
        UserError: it is damaged, or lacks one that is known, so that the account would be too low.
    """
    try:
        content = json.loads(record.read_bytes()) if record.exists() else []
        rounds = {(int(round), str(parent)) for round, parent in content}
    except (ValueError, TypeError):
        raise UserError(f"{record} is damaged: restore it from a copy") from None
    if missing := set(known) - rounds:
        raise UserError(
            f"{record} lacks round {min(missing)[0]}, which was trained, so that privacy would be "
            "spent twice: restore it from a copy, or begin anew with another --out"
        )
    return rounds
