"""Compiled kernels for the CPU (numba), in as many threads as torch uses.

A vector is worked on in chunks of whole tiles, and a chunk tile by tile: a tile's share of a base
is made in the first-level cache and used there at once. What is added up is added in an order that
depends neither on the threads nor on how fast they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hedgerow.sketch import layout
from hedgerow.sketch.layout import TILE, Basis

CHUNK = 64 * TILE
"""Entries that one task works on by default; few enough for the second-level cache to hold."""
_IN_ONE = 1 << 15
"""Entries up to which torch copies in the thread that it is called in."""

Floats = NDArray[np.float32]
_Result = TypeVar("_Result")
_KINDS = {"uniform": layout.UNIFORM, "rademacher": layout.RADEMACHER, "gaussian": layout.GAUSSIAN}
_LOW = np.uint64(0xFFFFFFFF)
_M0, _M1 = (np.uint64(m) for m in layout.PHILOX_M)
_W0, _W1 = (np.uint64(w) for w in layout.PHILOX_W)
_UNIT = np.float32(2.0**-16)
_LN2 = np.float32(layout.LN2)
_LOG = tuple(np.float32(c) for c in layout.LOG)
_SIN = tuple(np.float32(c) for c in layout.SIN)
_COS = tuple(np.float32(c) for c in layout.COS)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the interpreter's lock, and keep the result on disk if there is a place."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(**options, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def project_dense(x: Tensor, seed: int, k: int, kind: Basis) -> Tensor:
    """Inner products of x with k unscaled bases; float64."""

    def dots(chunk: tuple[int, int]) -> NDArray[np.float64]:
        values = _loaded(x, *chunk)
        total: NDArray[np.float64] = _dots(values, chunk[0] // TILE, k, np.uint64(seed), code)
        return total

    code = _KINDS[kind]
    return torch.from_numpy(sum(in_threads(dots, len(x)), np.zeros(k)))


def reconstruct_dense(coordinates: Tensor, seed: int, size: int, kind: Basis) -> Tensor:
    """The sum of unscaled bases, each times its coordinate; float32."""
    gamma, out = coordinates.numpy(), _output(size)
    tiles = out.numpy()

    def rebuild(chunk: tuple[int, int]) -> None:
        _combine(gamma, chunk[0] // TILE, np.uint64(seed), _KINDS[kind], tiles[slice(*chunk)])

    for _ in in_threads(rebuild, len(out)):
        pass
    return out[:size]


def project_hadamard(x: Tensor, seed: int, k: int, offset: int) -> Tensor:
    """The sampled rows of the signed, transformed x; float32."""
    coordinates = torch.empty(k, dtype=torch.float32)
    gamma = coordinates.numpy()

    def sample(chunk: tuple[int, int]) -> None:
        _sample(_loaded(x, *chunk), chunk[0], len(x), np.uint64(seed), offset, gamma)

    for _ in in_threads(sample, len(x)):
        pass
    return coordinates


def reconstruct_hadamard(coordinates: Tensor, seed: int, size: int, offset: int) -> Tensor:
    """The transpose of `project_hadamard`; float32."""
    gamma, out = coordinates.numpy(), _output(size)
    tiles = out.numpy()

    def rebuild(chunk: tuple[int, int]) -> None:
        _spread(gamma, chunk[0], size, np.uint64(seed), offset, tiles[slice(*chunk)])

    for _ in in_threads(rebuild, len(out)):
        pass
    return out[:size]


def round_groups(
    values: Floats, lengths: NDArray[np.int64], step: float, bits: int
) -> tuple[NDArray[np.uint8], Floats]:
    """Levels of groups of numbers, and the factors that make these unbiased.

    Args:
        values: shape (k,), group after group.
        lengths: numbers of each group.
        step: between two levels, in units of the root of a group's mean square.
        bits: the levels are 2ᵇⁱᵗˢ.

    Returns:
        Levels counted from the lowest, shape (k,); and a scale of each group, float32: its energy
        by its inner product with its levels, which are half of odd numbers.

    Raises:
        ValueError: a number is not finite.
    """
    starts = np.cumsum(lengths) - lengths
    products = np.multiply(values, values, dtype=np.float64)
    energy = np.add.reduceat(products, starts)
    if not np.isfinite(energy).all():  # the square of a float32 is finite in float64
        raise ValueError("coordinates must be finite")
    units = np.maximum(np.sqrt(energy / lengths) * step, 1e-300)
    levels = np.empty(len(values), dtype=np.uint8)
    _round(values, lengths, units, 2 ** (bits - 1), levels, products)
    along = np.add.reduceat(products, starts)
    scales = np.where(along > 0, energy / np.maximum(along, 1e-300), 0)
    return levels, scales.astype(np.float32)


def read_groups(
    codes: NDArray[np.uint8], scales: Floats, lengths: NDArray[np.int64], bits: int, out: Floats
) -> None:
    """Write what stands for the numbers that `round_groups` has rounded: levels times scales.

    Args:
        codes: the levels, 8/bits of them in a byte, the first in its lowest bits; no group begins
            within a byte.
        scales: of each group.
        lengths: numbers of each group.
        bits: of a level.
        out: where the numbers are written, shape (k,).

    Raises:
        ValueError: there are too few codes or scales, or too many.
    """
    # The kernel does not look.
    if len(codes) != -(-len(out) * bits // 8) or len(scales) != len(lengths):
        raise ValueError(f"{len(out)} numbers need as many codes, and a scale for each group")
    _read(codes, scales, lengths, bits, out)


def largest(values: Tensor, tile: int, k: int) -> NDArray[np.int64]:
    """Places of the k numbers of each tile that are largest in magnitude, ascending.

    Of equal magnitudes, of which not all are among the largest, those count that torch takes, as in
    ledgers of earlier versions.

    Args:
        values: float32, whole tiles of them; finite.
        tile: numbers of a tile, here a codec's; k are at most all of them.
    """
    rows = values.view(-1, tile)
    places = np.empty((len(rows), k), dtype=np.int64)
    is_tied = np.ones(len(rows), dtype=np.bool_)
    step = max(1, CHUNK // tile)

    def choose(chunk: tuple[int, int], first: int = step) -> None:
        own = slice(first + chunk[0], first + chunk[1])
        _largest(rows[own].numpy(), places[own], is_tied[own])

    choose((0, step), first=0)
    if is_tied[:step].sum() < step / 2:  # or torch, which most tiles have to ask, is asked of all
        for _ in in_threads(choose, len(rows) - step, step):
            pass
    tied = np.flatnonzero(is_tied)
    for some in np.split(tied, range(step, len(tied), step)):
        # One by itself may be all that a model has, and is not copied.
        own = rows[some[0]][None] if len(some) == 1 else rows[torch.from_numpy(some)]
        found = own.abs().topk(k, sorted=False).indices
        places[some] = found.sort().values.numpy()
    places += np.arange(len(rows))[:, None] * tile
    return places.reshape(-1)


def philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, ...]:
    """The generator itself: four words for one counter."""
    return tuple(int(word) for word in _one(*(np.uint64(c) for c in counter), np.uint64(seed)))


# --- chunks and threads -------------------------------------------------------------------------


def in_threads(
    task: Callable[[tuple[int, int]], _Result], size: int, step: int | None = None
) -> Iterator[_Result]:
    """Results of a task for each chunk (start, stop), in order.

    Args:
        task: leaves the interpreter's lock, and neither calls this nor what torch does in several
            threads: these would be started for each of the threads here. Where it raises, other
            chunks may go on meanwhile.
        size: number of entries.
        step: number of entries of a chunk; `CHUNK` by default.
    """
    step = step or CHUNK
    chunks = [(start, min(start + step, size)) for start in range(0, size, step)]
    threads = torch.get_num_threads()
    if threads == 1 or len(chunks) <= 1:
        yield from map(task, chunks)
        return
    yield from _pool(threads).map(task, chunks)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work: to start them takes as long as a small tensor does."""
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of them


def _loaded(x: Tensor, start: int, stop: int) -> Floats:
    """A chunk of x as float32, with zeros up to a whole tile."""
    chunk = x[start:stop]
    missing = -len(chunk) % TILE
    loaded = chunk
    if missing or chunk.dtype != torch.float32:
        loaded = torch.empty(len(chunk) + missing, dtype=torch.float32)
        loaded[len(chunk) :] = 0
        for piece, own in zip(chunk.split(_IN_ONE), loaded.split(_IN_ONE), strict=False):
            own[: len(piece)].copy_(piece)
    floats: Floats = loaded.numpy()
    return floats


def _output(size: int) -> Tensor:
    """A vector for that many entries, in whole tiles: kernels write nothing less."""
    return torch.empty(-(-size // TILE) * TILE, dtype=torch.float32)


# --- the generator ------------------------------------------------------------------------------


@numba.njit(inline="always")
def _philox(c0, c1, c2, c3, seed):
    """Four words for one counter. The words are 64 bits wide; only their lower halves count."""
    k0, k1 = seed & _LOW, seed >> np.uint64(32)
    for _ in range(layout.PHILOX_ROUNDS):
        p0, p1 = (c0 & _LOW) * _M0, (c2 & _LOW) * _M1
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ k1, p0
        k0, k1 = k0 + _W0, k1 + _W1
    return np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)


@_compiled
def _one(c0, c1, c2, c3, seed):
    return _philox(c0, c1, c2, c3, seed)


@_compiled
def _fill(words, lanes, tile, base, purpose, seed):
    """The words of a tile's counters: words[w, lane]."""
    first, c2, c3 = np.uint64(tile * lanes), np.uint64(base), np.uint64(purpose)
    for lane in range(lanes):
        counter = first + np.uint64(lane)
        w0, w1, w2, w3 = _philox(counter, np.uint64(0), c2, c3, seed)
        words[0, lane], words[1, lane], words[2, lane], words[3, lane] = w0, w1, w2, w3


@_compiled
def _uniform(words, entries, tile, base, seed):
    lanes = TILE // 8
    _fill(words, lanes, tile, base, layout.UNIFORM, seed)
    for w in range(4):
        at = 2 * w * lanes
        for lane in range(lanes):
            word = words[w, lane]
            low, high = np.int32(word & np.uint32(0xFFFF)), np.int32(word >> np.uint32(16))
            entries[at + lane] = np.float32(low * np.int32(2) - np.int32(65535)) * _UNIT
            entries[at + lanes + lane] = np.float32(high * np.int32(2) - np.int32(65535)) * _UNIT


@_compiled
def _signs(words, entries, tile, base, purpose, seed):
    """Entries ±1, from one bit each."""
    lanes = TILE // 128
    _fill(words, lanes, tile, base, purpose, seed)
    bits = entries.view(np.uint32)
    for w in range(4):
        for lane in range(lanes):
            word = words[w, lane]
            for bit in range(32):  # 1.0 with the bit as its sign
                sign = word << np.uint32(31 - bit) & np.uint32(0x80000000)
                bits[(32 * w + bit) * lanes + lane] = sign | np.uint32(0x3F800000)


@_compiled
def _gaussian(words, entries, tile, base, seed):
    lanes = TILE // 8
    _fill(words, lanes, tile, base, layout.GAUSSIAN, seed)
    numbers, mantissas = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    lengths = np.empty(lanes, np.float32)
    for w in range(4):
        at = 2 * w * lanes
        _split(words[w], numbers, mantissas.view(np.uint32))
        _lengths(numbers.view(np.uint32), mantissas, lengths)
        _turn(words[w], lengths, entries[at : at + lanes], entries[at + lanes : at + 2 * lanes])


# Loops that read what they write would not be vectorised, so each step has arrays of its own.


@_compiled
def _split(words, numbers, mantissas):
    """Odd numbers n = 2·radius + 1, and their mantissas."""
    for lane in range(len(words)):
        radius = np.int32(words[lane] & np.uint32(0xFFFF))
        numbers[lane] = np.float32(radius * np.int32(2) + np.int32(1))
    bits = numbers.view(np.uint32)
    for lane in range(len(words)):
        mantissas[lane] = bits[lane] & np.uint32(0x7FFFFF) | np.uint32(0x3F800000)


@_compiled
def _lengths(bits, mantissas, lengths):
    """√(-2 ln(n/2¹⁷))."""
    for lane in range(len(bits)):
        exponent = np.float32(np.int32(bits[lane] >> np.uint32(23)) - np.int32(127 + 17))
        m = mantissas[lane]
        log = _LOG[6] * m + _LOG[5]
        log = log * m + _LOG[4]
        log = log * m + _LOG[3]
        log = log * m + _LOG[2]
        log = log * m + _LOG[1]
        log = log * m + _LOG[0]
        square = (log + exponent * _LN2) * np.float32(-2)
        lengths[lane] = np.sqrt(square if square > np.float32(0) else np.float32(0))


@_compiled
def _turn(words, lengths, first, second):
    """Each length in the direction of its angle."""
    for lane in range(len(words)):
        angle = words[lane] >> np.uint32(16)
        quarter = angle >> np.uint32(14)
        t = np.float32(np.int32(angle & np.uint32(0x3FFF)) * np.int32(2) - np.int32(16383))
        t = t * np.float32(2.0**-15)
        y = t * t
        sine = (((_SIN[3] * y + _SIN[2]) * y + _SIN[1]) * y + _SIN[0]) * t
        cosine = ((_COS[3] * y + _COS[2]) * y + _COS[1]) * y + _COS[0]
        odd = quarter & np.uint32(1) != np.uint32(0)
        first_sign = np.float32(np.int32(1) - np.int32((quarter + np.uint32(1)) & np.uint32(2)))
        second_sign = np.float32(np.int32(1) - np.int32(quarter & np.uint32(2)))
        first[lane] = lengths[lane] * ((sine if odd else cosine) * first_sign)
        second[lane] = lengths[lane] * ((cosine if odd else sine) * second_sign)


@_compiled
def _entries(words, entries, tile, base, seed, kind):
    """A tile of an unscaled dense base."""
    if kind == layout.UNIFORM:
        _uniform(words, entries, tile, base, seed)
    elif kind == layout.RADEMACHER:
        _signs(words, entries, tile, base, layout.RADEMACHER, seed)
    else:
        _gaussian(words, entries, tile, base, seed)


# --- dense bases --------------------------------------------------------------------------------

_LANES = 64
"""Partial sums that are kept apart: enough to hide the latency of an addition."""


@_compiled
def _dots(x, first_tile, k, seed, kind):
    """Inner products of a chunk with k bases: float32 within a tile, float64 beyond."""
    total = np.zeros(k)
    words, entries = np.empty((4, TILE // 8), np.uint32), np.empty(TILE, np.float32)
    partial = np.empty(_LANES, np.float32)
    for tile in range(len(x) // TILE):
        values = x[tile * TILE : (tile + 1) * TILE]
        for base in range(k):
            _entries(words, entries, first_tile + tile, base, seed, kind)
            partial[:] = 0
            for at in range(0, TILE, _LANES):
                for lane in range(_LANES):
                    partial[lane] += values[at + lane] * entries[at + lane]
            dot = 0.0
            for lane in range(_LANES):
                dot += partial[lane]
            total[base] += dot
    return total


@_compiled
def _combine(gamma, first_tile, seed, kind, out):
    """Σ γ_j e_j on a chunk."""
    words, entries = np.empty((4, TILE // 8), np.uint32), np.empty(TILE, np.float32)
    for tile in range(len(out) // TILE):
        values = out[tile * TILE : (tile + 1) * TILE]
        values[:] = 0
        for base in range(len(gamma)):
            _entries(words, entries, first_tile + tile, base, seed, kind)
            for i in range(TILE):
                values[i] += gamma[base] * entries[i]


# --- hadamard bases -----------------------------------------------------------------------------


@_compiled
def _fwht(a, b, length):
    """The Walsh–Hadamard transform of a[:length], unscaled, in whichever of a and b it returns."""
    step = 1
    while 4 * step <= length:
        _two_passes(a, b, length // 4)
        a, b, step = b, a, 4 * step
    if step < length:
        _butterflies(a, b, length // 2)
        a, b = b, a
    return a


@_compiled
def _butterflies(a, b, half):
    """Add and subtract neighbours, and move the lowest bit of the index to its top.

    So all passes have one shape, that vector units like, and the last leaves the usual order.
    """
    for i in range(half):
        x, y = a[2 * i], a[2 * i + 1]
        b[i] = x + y
        b[half + i] = x - y


@_compiled
def _two_passes(a, b, quarter):
    """`_butterflies` twice, with the same operations and half of the loads and stores."""
    for i in range(quarter):
        w, x, y, z = a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]
        left, right = w + x, y + z
        b[i], b[2 * quarter + i] = left + right, left - right
        left, right = w - x, y - z
        b[quarter + i], b[3 * quarter + i] = left + right, left - right


@_compiled
def _scale(length):
    return np.float32(1 / np.sqrt(np.float64(length)))


@_compiled
def _rows(rows, start, length, count, seed):
    """The first `count` rows of a segment, as in `reference.rows`, counted from its start."""
    zero, purpose = np.uint64(0), np.uint64(layout.ROWS)
    a, b, c, d = _philox(np.uint64(start), zero, zero, purpose, seed)
    e, f, g, h = _philox(np.uint64(start), np.uint64(1), zero, purpose, seed)
    one = np.uint32(1)
    a, c, e, g = a | one, c | one, e | one, g | one
    mask, shift = np.uint32(length - 1), np.uint32(0)
    while (1 << 2 * shift) < length or shift == 0:
        shift += one
    for i in range(count):
        row = (np.uint32(i) * a + b) & mask
        row ^= row >> shift
        row = (row * c + d) & mask
        row ^= row >> shift
        row = (row * e + f) & mask
        row ^= row >> shift
        rows[i] = (row * g + h) & mask


_samples_before = _compiled(layout.samples_before)


@_compiled
def _segment(start, size, k, offset):
    """A segment's length, where its coordinates begin, and how many there are."""
    length = TILE
    while length > size - start:
        length //= 2
    first = _samples_before(start, size, k, offset)
    return length, first, _samples_before(start + length, size, k, offset) - first


@_compiled
def _sample(x, begin, size, seed, offset, gamma):
    """Write the coordinates of a chunk, which begins at entry `begin` of the vector."""
    words, signs = np.empty((4, TILE // 128), np.uint32), np.empty(TILE, np.float32)
    a, b, rows = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.uint32)
    k, start, end = len(gamma), begin, min(begin + len(x), size)
    while start < end:
        length, first, count = _segment(start, size, k, offset)
        if start % TILE == 0:
            _signs(words, signs, start // TILE, 0, layout.SIGNS, seed)
        if count > 0:
            for i in range(length):
                a[i] = x[start - begin + i] * signs[start % TILE + i]
            transformed, scale = _fwht(a, b, length), _scale(length)
            _rows(rows, start, length, count, seed)
            for i in range(count):
                gamma[first + i] = transformed[rows[i]] * scale
        start += length


@_compiled
def _spread(gamma, begin, size, seed, offset, out):
    """The transpose of `_sample`."""
    words, signs = np.empty((4, TILE // 128), np.uint32), np.empty(TILE, np.float32)
    a, b, rows = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.uint32)
    k, start, end = len(gamma), begin, min(begin + len(out), size)
    while start < end:
        length, first, count = _segment(start, size, k, offset)
        if start % TILE == 0:
            _signs(words, signs, start // TILE, 0, layout.SIGNS, seed)
        a[:length] = 0
        if count > 0:
            _rows(rows, start, length, count, seed)
            for i in range(count):
                a[rows[i]] = gamma[first + i]
            transformed, scale = _fwht(a, b, length), _scale(length)
            for i in range(length):
                out[start - begin + i] = transformed[i] * scale * signs[start % TILE + i]
        else:
            out[start - begin : start - begin + length] = 0
        start += length


# --- few bits -----------------------------------------------------------------------------------


@_compiled
def _round(values, lengths, units, most, levels, products):
    """Levels of groups, and the products of numbers and what their levels stand for."""
    lowest, highest = -np.float64(most), np.float64(most - 1)
    start = 0
    for group in range(len(lengths)):
        unit, stop = units[group], start + lengths[group]
        own, of_own, along = values[start:stop], levels[start:stop], products[start:stop]
        for i in range(len(own)):
            value = np.float64(own[i])
            level = np.floor(value / unit)
            level = lowest if level < lowest else level  # vectorised, as min and max are not
            level = highest if level > highest else level
            along[i] = value * (level + 0.5)
            of_own[i] = np.uint8(np.int32(level) + np.int32(most))
        start = stop


@_compiled
def _read(codes, scales, lengths, bits, out):
    """Levels times scales."""
    per_byte, mask = 8 // bits, (1 << bits) - 1
    middle = np.float32(2.0 ** (bits - 1) - 0.5)
    start = 0
    for group in range(len(lengths)):
        scale, stop = scales[group], start + lengths[group]
        whole = (stop - start) // per_byte
        for byte in range(whole):
            code = np.int32(codes[start // per_byte + byte])
            for place in range(per_byte):
                level = np.float32(code >> place * bits & mask) - middle
                out[start + byte * per_byte + place] = level * scale
        for i in range(start + whole * per_byte, stop):
            code = np.int32(codes[i // per_byte])
            out[i] = (np.float32(code >> i % per_byte * bits & mask) - middle) * scale
        start = stop


# --- the largest --------------------------------------------------------------------------------

_MAGNITUDE = np.uint32(0x7FFFFFFF)
"""All bits of a float32 but its sign: as whole numbers they have the order of magnitudes."""
_EXPONENT = np.uint32(23)
_NORMAL = np.uint32(1 << 23)
"""Least of these numbers that is no denormal one."""


@_compiled
def _largest(rows, places, is_tied):
    """Places of the largest in each row, or that it is not clear which they are."""
    tile, k = rows.shape[1], places.shape[1]
    counts, some = np.empty((4, 256), np.int64), np.empty(tile, np.uint32)
    for row in range(len(rows)):
        own = rows[row].view(np.uint32)
        least, is_tied[row] = _kth(own, k, counts, some)
        if is_tied[row]:
            continue
        at = 0
        for i in range(tile):
            if own[i] & _MAGNITUDE >= least:
                places[row, at] = i
                at += 1


@_compiled
def _kth(words, k, counts, some):
    """The k-th largest magnitude, and whether more have it than are among the k largest.

    By radix: its first eight bits by counting those of all, the others by counting those of the few
    that have the same first ones.
    """
    size = len(words)
    # Neighbours are often of one size: in counters of their own they don't wait for each other.
    counters = 4 if size >= 1024 else 1
    counts[:counters] = 0
    fours = size // 4 * 4 if counters == 4 else 0
    for i in range(0, fours, 4):
        counts[0, (words[i] & _MAGNITUDE) >> _EXPONENT] += 1
        counts[1, (words[i + 1] & _MAGNITUDE) >> _EXPONENT] += 1
        counts[2, (words[i + 2] & _MAGNITUDE) >> _EXPONENT] += 1
        counts[3, (words[i + 3] & _MAGNITUDE) >> _EXPONENT] += 1
    for i in range(fours, size):
        counts[0, (words[i] & _MAGNITUDE) >> _EXPONENT] += 1
    for other in range(1, counters):
        counts[0] += counts[other]
    digit, left = _digit(counts[0], k)
    found = 0
    if digit == 0:  # many zeros, as where nothing was trained
        for i in range(size):
            found += 0 < words[i] & _MAGNITUDE < _NORMAL
        if found < left:
            return np.uint32(0), counts[0, 0] > left
        found = 0
    for i in range(size):
        if (words[i] & _MAGNITUDE) >> _EXPONENT == digit:
            some[found] = words[i] & _MAGNITUDE
            found += 1
    for shift in (np.uint32(15), np.uint32(7), np.uint32(0)):
        mask = np.uint32(255 if shift else 127)
        counts[0] = 0
        for i in range(found):
            counts[0, some[i] >> shift & mask] += 1
        digit, left = _digit(counts[0], left)
        same = 0
        for i in range(found):
            if some[i] >> shift & mask == digit:
                some[same] = some[i]
                same += 1
        found = same
    return some[0], found > left


@_compiled
def _digit(counts, k):
    """The digit of the k-th largest, by how many have each, and its place among those."""
    digit = 255
    while counts[digit] < k:
        k -= counts[digit]
        digit -= 1
    return np.uint32(digit), k
