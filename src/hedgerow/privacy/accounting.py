"""Accounts of differential privacy: ε of Gaussian mechanisms, and the least noise for a budget.

The mathematics is Google's dp-accounting: Rényi differential privacy (Mironov, 1702.07476; of
sampled mechanisms, 1908.10530) or privacy loss distributions (Koskela et al., 1906.03049). Of two
neighbours, one has a record that the other has not.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from hedgerow.errors import UserError
from hedgerow.optional import check_installed

Accountant = Literal["rdp", "pld"]
"""Rényi differential privacy, or privacy loss distributions: tighter, and slower."""

LARGEST_NOISE = 1e4
"""Largest noise multiplier that is looked for; a budget that needs more is refused."""
SMALLEST_NOISE = 1e-2
"""Smallest noise multiplier that is looked for; a budget that needs less gets this one."""


@dataclass(frozen=True)
class Release:
    """Gaussian mechanism on a sample, applied so many times."""

    noise_multiplier: float
    """Standard deviation of the noise, in units of the largest contribution of one record."""
    sampling_rate: float = 1.0
    """Probability with which a record is in a sample, each independently of the others (Poisson
    sampling); 1: all are."""
    count: int = 1
    """Number of times."""


def of_samples(release: Release, times: Iterable[int]) -> tuple[Release, ...]:
    """Mechanisms of several samples, some of which were released more than once.

    m releases of one sample, each with noise z of its own, are one sampled Gaussian mechanism with
    noise z/√m: a record is in all of them or in none. That is more than m samples cost.

    Args:
        release: what is applied to each sample.
        times: of each sample, the number of times that it was released.
    """
    return tuple(
        replace(
            release,
            noise_multiplier=release.noise_multiplier / math.sqrt(number),
            count=release.count * samples,
        )
        for number, samples in sorted(Counter(times).items())
    )


def spent(releases: Sequence[Release], delta: float, accountant: Accountant = "rdp") -> float:
    """Privacy loss ε of mechanisms, one after another.

    Args:
        releases: the mechanisms; none of them costs nothing.
        delta: δ of the promise, above 0 and below 1.
        accountant: what the account is made with.

    Returns:
        ε at δ; infinite where there is a mechanism without noise.

    Raises:
        UserError: dp-accounting is not installed.
    """
    releases = [each for each in releases if each.count]
    if not releases:
        return 0.0
    if any(each.noise_multiplier <= 0 for each in releases):
        return float("inf")
    account = _accountant(accountant)
    for each in releases:
        account.compose(_event(each), each.count)
    return float(account.get_epsilon(delta))


@cache
def least_noise(
    epsilon: float,
    delta: float,
    count: int,
    sampling_rate: float = 1.0,
    accountant: Accountant = "rdp",
) -> float:
    """Smallest noise multiplier with which so many releases keep to a budget, to 1e-3 of it.

    Args:
        epsilon: the budget, ε.
        delta: δ of the promise.
        count: number of releases.
        sampling_rate: probability with which a record is in each.
        accountant: what the account is made with.

    Raises:
        UserError: dp-accounting is not installed; or no noise below `LARGEST_NOISE` suffices.
    """

    def fits(multiplier: float) -> bool:
        return spent([Release(multiplier, sampling_rate, count)], delta, accountant) <= epsilon

    low = high = 1.0
    while not fits(high):
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise UserError(
                f"privacy.epsilon {epsilon:g} cannot be kept in {count:,} releases at delta "
                f"{delta:g}: give a larger one, or fewer rounds or steps"
            )
    # Down from 1: an account of next to no noise takes minutes, and is hardly ever needed.
    while low == high and high > SMALLEST_NOISE:
        half = max(high / 2, SMALLEST_NOISE)
        low, high = (half, half) if fits(half) else (half, high)
    while high > (1 + 1e-3) * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def of_group(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """Promise for so many records together, from that for one.

    Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", theorem 2.2, with δ as in
    its proof: δ·(1 + e^ε + … + e^((size - 1)·ε)).

    Args:
        epsilon: ε of one record, finite.
        delta: δ of one record.
        size: number of records, from 1.

    Returns:
        ε and δ of the group; δ is at most 1, with which nothing is promised.
    """
    terms = (math.exp(min(number * epsilon, 700.0)) for number in range(size))
    return size * epsilon, min(1.0, delta * math.fsum(terms))


def affordable(
    release: Release, epsilon: float, delta: float, accountant: Accountant = "rdp"
) -> int:
    """Largest number of times, at most `release.count`, that a mechanism keeps to a budget.

    Args:
        release: the mechanism.
        epsilon: the budget, ε.
        delta: δ of the promise.
        accountant: what the account is made with.

    Raises:
        UserError: dp-accounting is not installed.
    """
    low, high = 0, release.count
    while low < high:
        middle = (low + high + 1) // 2
        times = Release(release.noise_multiplier, release.sampling_rate, middle)
        fits = spent([times], delta, accountant) <= epsilon
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _event(release: Release) -> Any:
    library = _library("dp_accounting")
    event = library.GaussianDpEvent(release.noise_multiplier)
    if release.sampling_rate < 1:
        event = library.PoissonSampledDpEvent(release.sampling_rate, event)
    return event


def _accountant(name: Accountant) -> Any:
    if name == "pld":
        return _library("dp_accounting.pld").PLDAccountant()
    return _library("dp_accounting.rdp").RdpAccountant()


def _library(name: str) -> Any:
    """dp-accounting, which takes seconds to import and is needed by private runs alone."""
    check_installed("privacy", "dp_accounting")
    module = importlib.import_module(name)
    # It warns of orders that it leaves out, among many, where noise is too little anyway.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return module
