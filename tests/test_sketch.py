"""Shared randomness: the generator, the bases, and the formulas of their estimates."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgerow.sketch import BASES, coordinates, cpu, layout, project, reconstruct, reference
from hedgerow.workers import Workers

DENSE = [basis for basis in BASES if basis != "hadamard"]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_the_published_answers(counter, key, words):
    """Random123's known-answer vectors for Philox4x32-10 (kat_vectors)."""
    seed = key[0] | key[1] << 32
    assert tuple(int(word) for word in reference.philox(list(counter), seed)) == words
    assert layout.philox(counter, seed) == words
    assert cpu.philox(counter, seed) == words


def test_the_layout_is_the_documented_one():
    """A format that others may implement: entries by hand from the words of one counter."""
    seed, base, tile, lane = 2**40 + 7, 3, 1, 5
    words = reference.philox([tile * 512 + lane, 0, base, layout.UNIFORM], seed)
    start = tile * layout.TILE
    uniform = reference.entries("uniform", seed, base, start, start + layout.TILE, "cpu")
    for slot in range(8):
        half = int(words[slot // 2]) >> 16 * (slot % 2) & 0xFFFF
        assert uniform[lane + 512 * slot] == (2 * half - 65535) / 65536
    words = reference.philox([tile * 32 + lane, 0, base, layout.RADEMACHER], seed)
    signs = reference.entries("rademacher", seed, base, start, start + layout.TILE, "cpu")
    for slot in range(128):
        bit = int(words[slot // 32]) >> slot % 32 & 1
        assert signs[lane + 32 * slot] == 1 - 2 * bit


sizes = st.one_of(
    st.integers(1, 300), st.integers(4000, 4200), st.sampled_from([8192, 12288 + 1000, 40_000])
)


@settings(max_examples=40, deadline=None)
@given(
    size=sizes,
    seed=st.integers(0, 2**64 - 1),
    base=st.integers(0, 5),
    tiles=st.sampled_from([1, 2, 3, 64]),
    threads=st.sampled_from([1, 2, 5]),
    kind=st.sampled_from(DENSE),
)
def test_dense_bases_are_the_same_bits_for_any_chunks_and_threads(
    size, seed, base, tiles, threads, kind
):
    one_hot = torch.zeros(base + 1)
    one_hot[base] = 1
    with chunks_of(tiles), in_threads(threads):
        compiled = cpu.reconstruct_dense(one_hot, seed, size, kind)
    cut = size // 3
    expected = [
        reference.entries(kind, seed, base, *part, "cpu") for part in [(0, cut), (cut, size)]
    ]
    assert torch.equal(compiled, torch.cat(expected))


@settings(max_examples=40, deadline=None)
@given(
    size=sizes,
    seed=st.integers(0, 2**64 - 1),
    share=st.floats(0, 1),
    tiles=st.sampled_from([1, 2, 3, 64]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_hadamard_sketches_are_the_same_bits_for_any_chunks_and_threads(
    size, seed, share, tiles, threads
):
    k = max(1, round(share * size))
    offset = seed % size
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    with chunks_of(tiles), in_threads(threads):
        coordinates = cpu.project_hadamard(x, seed, k, offset)
        estimate = cpu.reconstruct_hadamard(coordinates, seed, size, offset)
    assert torch.equal(coordinates, reference.project_hadamard(x, seed, k, offset))
    assert torch.equal(estimate, reference.reconstruct_hadamard(coordinates, seed, size, offset))


def test_hadamard_bases_are_different_rows_of_an_orthogonal_matrix():
    size = 4096 + 1000
    bases = torch.stack(
        [reconstruct(row, 5, size) for row in torch.eye(size)[:: size // 40]]
    ).double()
    assert torch.allclose(bases @ bases.T, torch.eye(len(bases), dtype=torch.float64), atol=1e-6)
    inside = bases[0][bases[0] != 0].abs()
    assert torch.equal(inside, torch.full_like(inside, inside[0]))


@pytest.mark.parametrize("size", [1, 7, 1000, 5000])
def test_all_rows_of_a_hadamard_sketch_give_the_vector_back(size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(reconstruct(project(x, 9, size), 9, size), x, atol=2e-6)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("size", "k"), [(3, 1), (100, 33), (5000, 400)])
def test_the_estimate_is_unbiased_with_the_error_of_the_formula(basis, size, k):
    """E‖Δ̂ - Δ‖² is (d/K)‖Δ‖² for independent bases (to O(1/d)) and (d/K - 1)‖Δ‖² for hadamard."""
    generator = torch.Generator().manual_seed(size)
    delta = torch.randn(size, generator=generator) * torch.linspace(0.1, 3, size)
    seeds = 1000 if size == 3 else 300
    error, along = [], {"itself": [], "a coordinate": [], "a direction": []}
    direction = torch.randn(size, generator=generator)
    for seed in range(seeds):
        off = (reconstruct(project(delta, seed, k, basis), seed, size, basis) - delta).double()
        error.append(float(off @ off))
        along["itself"].append(float(off @ delta.double()))
        along["a coordinate"].append(float(off[size // 2]))
        along["a direction"].append(float(off @ direction.double()))
    for what, values in along.items():
        standard_error = statistics.stdev(values) / math.sqrt(seeds)
        assert abs(statistics.mean(values)) < 4 * standard_error + 1e-9, what
    energy = float(delta.double() @ delta.double())
    if size == 3:
        return  # the formulas leave out what is O(1/d)
    expected = size / k - (basis == "hadamard")
    assert statistics.mean(error) / energy == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("kind", DENSE)
def test_entries_have_the_moments_that_they_say(kind):
    entries = reference.entries(kind, 11, 0, 0, 1 << 18, "cpu").double()
    n = len(entries)
    second = layout.SECOND_MOMENT[kind]
    fourth = {"uniform": 1 / 5, "rademacher": 1, "gaussian": 3}[kind]
    assert abs(entries.mean()) < 4 * (second / n) ** 0.5
    assert abs(entries.square().mean() - second) < 4 * ((fourth - second**2) / n) ** 0.5 + 1e-9
    assert abs((entries[1:] * entries[:-1]).mean()) < 4 * second / n**0.5
    assert entries.pow(4).mean() == pytest.approx(fourth, rel=0.03)
    if kind != "gaussian":
        assert entries.abs().max() <= 1


@pytest.mark.parametrize("length", [1, 2, 4, 16, 64])
def test_every_row_of_a_segment_is_as_likely_and_none_comes_twice(length):
    seeds, count = 1500, max(1, length // 4)
    seen = torch.zeros(length)
    for seed in range(seeds):
        rows = reference.rows(seed, 0, length, count, "cpu")
        assert len(rows.unique()) == count
        seen[rows] += 1
    expected = seeds * count / length
    deviation = max((seeds * count / length * (1 - count / length)) ** 0.5, 1e-9)
    assert (seen - expected).abs().max() <= 4.5 * deviation


@pytest.mark.parametrize("basis", BASES)
def test_bfloat16_is_read_as_the_float32_numbers_it_stands_for(basis):
    x = torch.randn(5000).bfloat16()
    assert torch.equal(project(x, 3, 17, basis), project(x.float(), 3, 17, basis))


def test_a_vector_of_any_shape_is_projected_and_left_alone():
    x = torch.randn(30, 40)
    before = x.clone()
    assert torch.equal(project(x, 3, 8), project(x.flatten(), 3, 8))
    assert torch.equal(x, before)


def test_another_process_with_other_threads_has_the_same_numbers():
    code = (
        "import torch; from hedgerow.sketch import BASES, project, reconstruct\n"
        "x = torch.arange(300_000) % 7 - 3.0\n"
        "for basis in BASES:\n"
        "    y = project(x, 12345678901234567, 9, basis)\n"
        "    z = reconstruct(y, 12345678901234567, 300_000, basis)\n"
        "    print([v.hex() for v in (y.tolist() + z[::9973].tolist())])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.ones(4), 1, 5, "hadamard"), "1 to 4"),
        ((torch.ones(4), 1, 0, "uniform"), "at least 1"),
        ((torch.ones(0), 1, 1, "uniform"), "entries, got 0"),
        ((torch.ones(4), -1, 1, "uniform"), r"2\^64, got -1"),
        ((torch.ones(4), 1, 1, "fourier"), "one of uniform"),
        ((torch.ones(4, dtype=torch.int64), 1, 1, "uniform"), "floating"),
    ],
)
def test_what_cannot_be_projected_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        project(*arguments)


class chunks_of:  # noqa: N801
    """The compiled backend works on chunks of so many tiles."""

    def __init__(self, tiles: int) -> None:
        self.entries = tiles * layout.TILE

    def __enter__(self) -> None:
        self.before, cpu.CHUNK = cpu.CHUNK, self.entries
        assert len(list(cpu.in_threads(lambda chunk: None, 2 * self.entries))) == 2

    def __exit__(self, *_: object) -> None:
        cpu.CHUNK = self.before


class in_threads:  # noqa: N801
    """torch, and so the compiled backend, uses so many threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


@given(
    st.integers(2, 1500),
    st.data(),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.01, 1.0, 300.0]),
)
def test_the_largest_of_tiles_are_those_that_torch_finds(tile, data, tiles, seed, scale):
    """Also where many are of one size, or 0."""
    k = data.draw(st.integers(1, tile))
    values = torch.randn(tiles * tile, generator=torch.Generator().manual_seed(seed))
    if scale:
        values = (values * scale).round() / scale
    places = cpu.largest(values, tile, k).reshape(tiles, k)
    found = values.view(tiles, tile).abs().topk(k, sorted=False).indices.sort().values
    assert np.array_equal(places, found.numpy() + np.arange(tiles)[:, None] * tile)


@pytest.mark.parametrize("scale", [1.0, 30.0, 3.0], ids=["none", "some", "most"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_largest_are_the_same_in_any_chunks(threads, scale):
    """Of 40 tiles in chunks of four; those whose values are rounded have ties."""
    values = torch.randn(40 * 1024, generator=torch.Generator().manual_seed(7))
    values[8 * 1024 :] = (values[8 * 1024 :] * scale).round() / scale
    if scale == 1.0:
        values = torch.randn(40 * 1024, generator=torch.Generator().manual_seed(8))
    found = values.view(40, 1024).abs().topk(9, sorted=False).indices.sort().values
    with chunks_of(1), in_threads(threads):
        places = cpu.largest(values, 1024, 9)
    assert np.array_equal(places.reshape(40, 9), found.numpy() + np.arange(40)[:, None] * 1024)


def test_a_forked_process_has_threads_of_its_own():
    """As has one in which a chunk has failed."""

    def fails(chunk: tuple[int, int]) -> None:
        raise ZeroDivisionError

    def stops(size: int) -> list[int]:
        torch.set_num_threads(2)
        return list(cpu.in_threads(lambda chunk: chunk[1], size, 10))

    with in_threads(2):
        assert stops(25) == [10, 20, 25]
        with pytest.raises(ZeroDivisionError):
            list(cpu.in_threads(fails, 25, 10))
        assert list(Workers(2).map(stops, [25, 30])) == [[10, 20, 25], [10, 20, 30]]
        assert stops(25) == [10, 20, 25]


def test_kernels_start_no_threads_beyond_their_own():
    """torch would start as many again for each of them."""
    program = """
import threading, torch
from pathlib import Path
from hedgerow.sketch import cpu, project
torch.set_num_threads(3)
def count():
    return len(list(Path("/proc/self/task").iterdir()))
torch.ones(1 << 22).add_(1)  # torch's own
before = count()
project(torch.ones((1 << 21) + 5, dtype=torch.bfloat16), 1, 9)
cpu.largest(torch.ones(1 << 21), 4096, 64)
print(count() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert int(done.stdout) <= 3, done.stderr


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_levels_are_those_of_the_best_uniform_quantizer(bits):
    """The same arithmetic in numpy, in float64."""
    values = torch.randn(2 * 4096 + 300, generator=torch.Generator().manual_seed(bits)).numpy()
    values[4096:8192] = 0
    lengths, step, most = coordinates.groups(len(values)), 0.7, 2 ** (bits - 1)
    levels, scales = cpu.round_groups(values, lengths, step, bits)
    for group, scale, stop in zip(
        np.split(values.astype(float), np.cumsum(lengths)[:-1]),
        scales,
        np.cumsum(lengths),
        strict=True,
    ):
        unit = np.sqrt((group**2).mean()) * step
        level = np.floor(group / max(unit, 1e-300)).clip(-most, most - 1)
        assert np.array_equal(levels[stop - len(group) : stop], level + most)
        along = group @ (level + 0.5)
        assert scale == pytest.approx(group @ group / along if along else 0, rel=1e-6)
    read = np.empty_like(values)
    packed = coordinates._packed(levels, bits)
    cpu.read_groups(packed, scales, lengths, bits, read)
    assert np.array_equal(read, (levels - np.float32(most - 0.5)) * np.repeat(scales, lengths))
    for short in ((packed[:-1], scales), (packed, scales[:-1])):
        with pytest.raises(ValueError, match="8492 numbers need"):
            cpu.read_groups(*short, lengths, bits, read)
