"""Blocks, the budget among them, and coordinates on the wire."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgerow.sketch import project, reconstruct
from hedgerow.sketch.blocks import Block, allocate, group, norms, project_blocks, reconstruct_block
from hedgerow.sketch.coordinates import BITS, Packed, dequantize, nbytes, pack, quantize

SHAPES = {"wte": (50, 4), "norm": (4,), "q": (4, 4), "k": (2, 4), "v": (2, 4), "up": (9, 4)}


def test_consecutive_tensors_are_grouped_to_the_median_size():
    """The sizes are 200, 4, 16, 8, 8 and 36, and their median 16."""
    blocks = [list(block.shapes) for block in group(SHAPES)]
    assert blocks == [["wte"], ["norm", "q"], ["k", "v"], ["up"]]
    assert sum(block.size for block in group(SHAPES)) == 272


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 5000)), min_size=1, max_size=30),
    st.floats(0, 1),
)
def test_an_allocation_spends_the_budget_within_the_limits(blocks, share):
    weights, most = [w for w, _ in blocks], [m for _, m in blocks]
    budget = len(most) + round(share * (sum(most) - len(most)))
    counts = allocate(budget, weights, most)
    assert sum(counts) == budget
    assert all(1 <= count <= limit for count, limit in zip(counts, most, strict=True))


def test_an_allocation_is_in_proportion_where_no_limit_is_met():
    assert allocate(100, [1.0, 3.0, 6.0], [1000] * 3) == [10, 30, 60]
    assert allocate(100, [1.0, 3.0, 6.0], [1000, 1000, 20]) == [20, 60, 20]
    assert allocate(4, [0.0, 0.0], [5, 5]) == [2, 2]
    with pytest.raises(ValueError, match="2 to 10"):
        allocate(11, [1, 1], [5, 5])


@pytest.mark.parametrize("basis", ["hadamard", "uniform"])
def test_a_model_is_sketched_block_by_block(basis):
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    blocks, counts, seed = group(SHAPES), [20, 3, 3, 5], 77
    coordinates = list(project_blocks(iter(tensors.items()), blocks, seed, counts, basis))
    rebuilt = {}
    for index, (block, gamma) in enumerate(zip(blocks, coordinates, strict=True)):
        flat = torch.cat([tensors[name].flatten() for name in block.shapes])
        assert torch.equal(gamma, project(flat, seed + index, counts[index], basis))
        rebuilt |= reconstruct_block(gamma, block, index, seed, basis)
    assert {name: tuple(t.shape) for name, t in rebuilt.items()} == SHAPES
    last = reconstruct(coordinates[-1], seed + 3, 36, basis).view(9, 4)
    assert torch.equal(rebuilt["up"], last)
    assert norms(iter(tensors.items()), blocks)[3] == pytest.approx(float(tensors["up"].norm()))


def test_a_stream_in_another_order_is_noticed():
    with pytest.raises(ValueError, match="expected tensor a, got b"):
        list(project_blocks(iter([("b", torch.ones(1))]), [Block({"a": (1,)})], 0, [1], "uniform"))


@pytest.mark.parametrize(("bits", "error"), [(1, math.pi / 2 - 1), (2, 0.134), (4, 0.0117)])
def test_quantized_coordinates_have_the_error_of_the_theory(bits, error):
    gamma = torch.randn(50 * 4096, generator=torch.Generator().manual_seed(3)) ** 3
    back = dequantize(quantize(gamma, bits, 5), bits, len(gamma), 5)
    assert float((back - gamma).square().sum() / gamma.square().sum()) == pytest.approx(
        error, rel=0.03
    )


def loud_and_quiet() -> torch.Tensor:
    """Four tiles, of which one is a tenth as loud as the others."""
    delta = torch.randn(4 * 4096, generator=torch.Generator().manual_seed(1))
    delta[4096:8192] *= 0.1
    return delta


def with_a_spike() -> torch.Tensor:
    """Normal numbers, and one that is as long as all the others together."""
    delta = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    delta[77] = 64
    return delta


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("share", [1, 3, 4.25])
@pytest.mark.parametrize(
    ("make", "part"), [(loud_and_quiet, slice(4096, 8192)), (with_a_spike, slice(78, 4096))]
)
def test_a_quantized_sketch_is_unbiased_where_numbers_are_small(make, part, bits, share):
    """The length of the estimate along the quiet part, which noise from the loud one drowns."""
    delta, seeds = make(), 250
    k = int(len(delta) / share)
    along = []
    for seed in range(seeds):
        gamma = project(delta, seed, k)
        sent = dequantize(quantize(gamma, bits, seed + 2**63), bits, k, seed + 2**63)
        estimate = reconstruct(sent, seed, len(delta))
        along.append(float(estimate[part] @ delta[part] / delta[part].square().sum()))
    values = torch.tensor(along)
    assert abs(values.mean() - 1) < 4 * values.std() / seeds**0.5 + 0.01


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 6000), min_size=1, max_size=3),
    st.sampled_from(BITS),
    st.floats(1e-20, 1e20),
)
def test_packed_coordinates_come_back(lengths, bits, scale):
    generator = torch.Generator().manual_seed(sum(lengths))
    coordinates = [torch.randn(k, generator=generator) * scale for k in lengths]
    tensors = pack(iter(coordinates), bits, 9)
    back = Packed(tensors, bits, 9)
    assert [len(gamma) for gamma in back] == lengths == back.counts
    assert sum(t.nbytes for name, t in tensors.items() if name != "counts") == sum(
        nbytes(k, bits) for k in lengths
    )
    for gamma, other in zip(coordinates, back, strict=True):
        if bits == 32:
            assert torch.equal(gamma, other)
        else:
            a, b = gamma.double(), other.double()
            assert float((a - b).norm()) <= 1.5 * float(a.norm())


def test_zeros_stay_zeros_and_what_is_not_finite_is_refused():
    assert torch.equal(dequantize(quantize(torch.zeros(10), 2, 1), 2, 10, 1), torch.zeros(10))
    for bits in BITS:
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match="must be finite"):
                pack([torch.tensor([1.0, value])], bits, 1)


@pytest.mark.parametrize("bits", [1, 32])
@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("counts"),
        lambda t: t.update(more=torch.ones(1)),
        lambda t: t.update(counts=t["counts"].long()),
        lambda t: t.update(counts=t["counts"] * 0),
        lambda t: t.update(counts=t["counts"] + 9),
        lambda t: t.update(counts=torch.tensor([2**31 - 1] * 3, dtype=torch.int32)),
        lambda t: t.update(counts=t["counts"][:0]),
    ],
)
def test_tensors_that_are_no_coordinates_are_refused(bits, damage):
    tensors = pack([torch.ones(5), torch.ones(9)], bits, 1)
    damage(tensors)
    with pytest.raises(
        ValueError, match=r"expected tensors|(counts|codes|coordinates|scales) must be"
    ):
        Packed(tensors, bits, 1)
