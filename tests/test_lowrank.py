"""The algebra of stacked factors, against plain matrices."""

import tempfile
import weakref

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgerow import lowrank
from hedgerow.lowrank import Factors


def random_factors(seed: int, rank: int, m: int = 7, n: int = 5) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
    )


ranks = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(ranks, st.integers(0, 1000))
def test_the_stack_is_the_sum_of_the_products(ranks, seed):
    pairs = [random_factors(seed + i, rank) for i, rank in enumerate(ranks)]
    stacked = lowrank.stack(pairs)
    assert stacked.rank == sum(ranks)
    exact = sum(pair.product().double() for pair in pairs)
    torch.testing.assert_close(stacked.product().double(), exact, rtol=1e-5, atol=1e-5)


@given(ranks, st.integers(0, 1000), st.booleans())
def test_a_total_is_never_larger_than_the_matrix_needs(ranks, seed, wide):
    m, n = (5, 7) if wide else (7, 5)
    pairs = [random_factors(seed + i, rank, m, n).double() for i, rank in enumerate(ranks)]
    exact = sum(pair.product() for pair in pairs)
    found = lowrank.total(iter(pairs))
    torch.testing.assert_close(found.product(), exact)
    assert found.rank == (ranks[0] if len(ranks) == 1 and ranks[0] <= 5 else 5)


@given(st.integers(1, 12), st.integers(0, 1000))
def test_norm_and_distance_are_those_of_the_matrices(rank, seed):
    first, second = random_factors(seed, rank), random_factors(seed + 1, 2)
    product = first.B.double() @ first.A.double()
    other = second.B.double() @ second.A.double()
    assert abs(lowrank.norm(first) - float(torch.linalg.matrix_norm(product))) < 1e-9
    distance = float(torch.linalg.matrix_norm(product - other))
    assert abs(lowrank.distance(first, second) - distance) < 1e-9


def test_relative_error_is_zero_for_nothing_and_for_equals():
    pair = random_factors(0, 3)
    zero = Factors(torch.zeros(3, 5), torch.zeros(7, 3))
    assert lowrank.relative_error([(zero, zero)]) == 0
    assert lowrank.relative_error([(pair, pair)]) < 1e-15
    assert lowrank.relative_error([(pair, zero)]) == float("inf")


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000))
def test_truncation_is_the_best_of_its_rank(rank, keep, seed):
    pair = random_factors(seed, rank)
    cut = lowrank.truncate(pair, rank=keep)
    singular = torch.linalg.svdvals(pair.B.double() @ pair.A.double())
    best = float(singular[keep:].square().sum().sqrt())
    assert cut.rank == min(keep, rank, 5)
    assert abs(lowrank.distance(pair, cut) - best) < 1e-4 * float(singular[0])


@given(st.floats(0.01, 1.0), st.integers(0, 1000))
def test_truncation_by_energy_keeps_the_fewest_that_suffice(energy, seed):
    pair = random_factors(seed, 4)
    shares = torch.linalg.svdvals(pair.B.double() @ pair.A.double()).square()
    kept = lowrank.truncate(pair, energy=energy).rank
    assert shares[:kept].sum() >= energy * shares.sum() * (1 - 1e-9)
    assert shares[: kept - 1].sum() < energy * shares.sum()


@settings(deadline=None)
@given(ranks, st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_stacks_that_share_a_file_are_the_stacks(ranks, seed, dtype):
    with tempfile.TemporaryFile(buffering=0) as file:
        spooled = [lowrank.SpooledFactors(file), lowrank.SpooledFactors(file)]
        pairs = [
            [
                Factors(*(f.to(dtype) for f in random_factors(seed + 7 * i + k, rank)))
                for k in (0, 1)
            ]
            for i, rank in enumerate(ranks)
        ]
        for both in pairs:
            for stack, pair in zip(spooled, both, strict=True):
                stack.add(pair)
        for stack, parts in zip(spooled, zip(*pairs, strict=True), strict=True):
            for read, stacked in zip(stack.factors(), lowrank.stack(parts), strict=True):
                assert torch.equal(read, stacked)


@given(st.integers(0, 1000), st.sampled_from([(6, 9), (9, 6), (6, 6)]))
def test_factors_of_more_than_the_matrixs_rank_are_fitted_to_it_without_loss(seed, shape):
    large = random_factors(seed, 40, *shape)
    large = Factors(1e-3 * large.A, 1e3 * large.B)
    small = lowrank.fitted(large)
    assert (small.rank, small.A.dtype, small.B.dtype) == (6, torch.float32, torch.float32)
    exact = large.double().product()
    assert (small.double().product() - exact).norm() < 2e-7 * exact.norm()
    assert lowrank.fitted(small) is small


def test_nothing_of_what_is_spooled_stays_in_memory():
    with tempfile.TemporaryFile(buffering=0) as file:
        spooled, pair = lowrank.SpooledFactors(file), random_factors(0, 3)
        storages = [weakref.ref(factor.untyped_storage()) for factor in pair]
        spooled.add(pair)
        del pair
        assert [storage() for storage in storages] == [None, None]
        assert spooled.factors().rank == 3
