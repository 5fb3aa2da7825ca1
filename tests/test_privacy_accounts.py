"""Accounts of differential privacy, beside dp-accounting's own, and the noise."""

from __future__ import annotations

import math
import stat
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hedgerow.errors import UserError
from hedgerow.privacy.accounting import LARGEST_NOISE, Release, affordable, least_noise, spent
from hedgerow.privacy.noise import KEY_BYTES, PIECE, NoiseKey

DELTA = 1e-5


@given(
    noise=st.floats(0.3, 20),
    rate=st.floats(0.001, 1),
    count=st.integers(1, 500),
    delta=st.floats(1e-9, 1e-2),
)
@settings(max_examples=25, deadline=None)
def test_the_account_is_that_of_the_library(
    noise: float, rate: float, count: int, delta: float
) -> None:
    event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise)
    if rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(rate, event)
    account = rdp.RdpAccountant()
    account.compose(event, count)
    assert spent([Release(noise, rate, count)], delta) == account.get_epsilon(delta)


def test_privacy_loss_distributions_find_less_for_the_same_noise() -> None:
    release = Release(1.0, 0.1, 20)
    account = pld.PLDAccountant()
    account.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1)), 20)
    assert spent([release], DELTA, "pld") == account.get_epsilon(DELTA)
    assert spent([release], DELTA, "pld") < spent([release], DELTA, "rdp")


def test_mechanisms_compose() -> None:
    one, other = Release(1.0, 0.1, 7), Release(2.0, 1.0, 3)
    both = spent([one, other], DELTA)
    assert max(spent([one], DELTA), spent([other], DELTA)) < both
    assert both <= spent([one], DELTA / 2) + spent([other], DELTA / 2)
    assert spent([Release(1.0, 0.1, 3), Release(1.0, 0.1, 4)], DELTA) == pytest.approx(
        spent([one], DELTA), rel=1e-12
    )


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert spent([], DELTA) == spent([Release(1.0, count=0)], DELTA) == 0
    assert math.isinf(spent([Release(0.0)], DELTA))


@given(epsilon=st.floats(0.2, 20), count=st.integers(1, 200), rate=st.floats(0.01, 1))
@settings(max_examples=10, deadline=None)
def test_the_least_noise_keeps_to_the_budget_and_hardly_more(
    epsilon: float, count: int, rate: float
) -> None:
    noise = least_noise(epsilon, DELTA, count, rate)
    assert spent([Release(noise, rate, count)], DELTA) <= epsilon
    if noise > 0.011:
        assert spent([Release(noise * 0.998, rate, count)], DELTA) > epsilon


def test_a_budget_that_no_noise_keeps_to_is_refused() -> None:
    with pytest.raises(UserError, match=r"privacy\.epsilon 1e-05 cannot be kept"):
        least_noise(1e-5, DELTA, 10**6)
    assert least_noise(0.1, DELTA, 100) < LARGEST_NOISE


@given(epsilon=st.floats(0.5, 10), noise=st.floats(0.5, 4), rate=st.floats(0.05, 1))
@settings(max_examples=10, deadline=None)
def test_what_is_affordable_fits_and_one_more_does_not(
    epsilon: float, noise: float, rate: float
) -> None:
    count = affordable(Release(noise, rate, 60), epsilon, DELTA)
    assert spent([Release(noise, rate, count)], DELTA) <= epsilon
    assert count == 60 or spent([Release(noise, rate, count + 1)], DELTA) > epsilon


def test_noise_is_standard_normal_and_independent_by_use() -> None:
    key = NoiseKey(bytes(KEY_BYTES))
    drawn = key.normal((PIECE + 1001,), "server", 1).numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / len(drawn))
    other = key.normal((len(drawn),), "server", 2).numpy()
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 5 / math.sqrt(len(drawn))
    # Both halves of a pair are used, and every number once.
    assert len(np.unique(drawn)) == len(drawn)


def test_noise_is_that_of_its_key_and_use_alone() -> None:
    key = NoiseKey.of_seed(3)
    torch.manual_seed(0)
    first = key.normal((3, 5), "server", 1)
    torch.manual_seed(1)
    assert torch.equal(first, NoiseKey.of_seed(3).normal((3, 5), "server", 1))
    assert not torch.equal(first, key.normal((3, 5), "server", 11))
    assert not torch.equal(first, NoiseKey.of_seed(4).normal((3, 5), "server", 1))
    assert key.generator("sample", 1).integers(2**62) == key.generator("sample", 1).integers(2**62)


def test_a_key_is_made_once_and_is_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "privacy" / "noise.key"
    first = NoiseKey.kept_in(file).normal((4,), "use")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(file.read_bytes()) == KEY_BYTES
    assert torch.equal(NoiseKey.kept_in(file).normal((4,), "use"), first)
    other = NoiseKey.kept_in(tmp_path / "other.key").normal((4,), "use")
    assert not torch.equal(other, first)
    file.write_bytes(b"short")
    with pytest.raises(UserError, match=r"noise\.key is damaged: restore it from a copy"):
        NoiseKey.kept_in(file)
