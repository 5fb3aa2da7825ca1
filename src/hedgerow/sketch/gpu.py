"""The Triton backend, for NVIDIA GPUs: the bits of `reference`, made in registers.

No base is ever in memory. A program makes the entries that it needs, uses them, and forgets them;
it loads (or owns) a part of the vector in the order of `layout`'s lanes and slots, so that Philox
runs once a counter and every access is to neighbouring addresses.

Partial sums go to a buffer that is summed in a fixed order, and how the work is cut depends on the
size alone: results are the same on every run. Entries are bit-identical to the reference's because
every float operation that is not exact is rounded on its own (no fused multiply-adds but the
explicit ones, which add products to sums).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hedgerow.sketch import layout
from hedgerow.sketch.layout import Basis

_TILE = tl.constexpr(layout.TILE)
_BITS = tl.constexpr(layout.TILE.bit_length() - 1)
_M0, _M1 = tl.constexpr(layout.PHILOX_M[0]), tl.constexpr(layout.PHILOX_M[1])
_W0, _W1 = tl.constexpr(layout.PHILOX_W[0]), tl.constexpr(layout.PHILOX_W[1])
_ROUNDS = tl.constexpr(layout.PHILOX_ROUNDS)
_SIGNS = tl.constexpr(layout.SIGNS)
_ROWS = tl.constexpr(layout.ROWS)
_LN2 = tl.constexpr(layout.LN2)
_LOG = tl.constexpr(layout.LOG)
_SIN = tl.constexpr(layout.SIN)
_COS = tl.constexpr(layout.COS)


class _Kind(NamedTuple):
    """A kind of dense bases, and how much of one a program (128 threads) works on at once.

    More bases share what is loaded of the vector, and more columns Philox's keys; both take
    registers.
    """

    purpose: int
    parts: int
    """Entries that are made of one word."""
    bases: int
    """Of a projection."""
    columns: int
    """Of a reconstruction: consecutive counters, of a part of a tile or of several."""


_KINDS: dict[str, _Kind] = {
    "uniform": _Kind(layout.UNIFORM, parts=2, bases=8, columns=512),
    "rademacher": _Kind(layout.RADEMACHER, parts=32, bases=8, columns=128),
    "gaussian": _Kind(layout.GAUSSIAN, parts=2, bases=4, columns=256),
}
_GROUP = 4
"""Tiles that are summed up in float32: 128 products in each thread."""
_CHUNKS = 1024
"""The most parts of a vector; enough to fill a GPU, and few enough for the buffer of their sums."""


def project_dense(x: Tensor, seed: int, k: int, kind: Basis) -> Tensor:
    """Inner products of x with k unscaled bases; float64."""
    purpose, parts, most, _ = _KINDS[kind]
    bases = min(most, triton.next_power_of_2(k))
    groups = triton.cdiv(len(x), _GROUP * layout.TILE)
    per_chunk = triton.cdiv(groups, _CHUNKS)
    chunks = triton.cdiv(groups, per_chunk)
    partial = torch.empty(chunks, k, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        _project_dense[triton.cdiv(k, bases), chunks](
            x.contiguous(),
            partial,
            seed,
            len(x),
            k,
            per_chunk,
            KIND=kind,
            PURPOSE=purpose,
            PARTS=parts,
            BASES=bases,
            GROUP=_GROUP,
            COLUMNS=128,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return partial.sum(0)


def reconstruct_dense(coordinates: Tensor, seed: int, size: int, kind: Basis) -> Tensor:
    """The sum of unscaled bases, each times its coordinate; float32."""
    purpose, parts, _, columns = _KINDS[kind]
    out = torch.empty(size, dtype=torch.float32, device=coordinates.device)
    counters = triton.cdiv(size, layout.TILE) * layout.TILE // (4 * parts)
    with torch.cuda.device_of(out):
        _reconstruct_dense[(triton.cdiv(counters, columns),)](
            coordinates.contiguous(),
            out,
            seed,
            size,
            len(coordinates),
            KIND=kind,
            PURPOSE=purpose,
            PARTS=parts,
            COLUMNS=columns,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def project_hadamard(x: Tensor, seed: int, k: int, offset: int) -> Tensor:
    """The sampled rows of the signed, transformed x; float32."""
    coordinates = torch.empty(k, dtype=torch.float32, device=x.device)
    _hadamard(_project_hadamard, x.contiguous(), coordinates, seed, offset)
    return coordinates


def reconstruct_hadamard(coordinates: Tensor, seed: int, size: int, offset: int) -> Tensor:
    """The transpose of `project_hadamard`; float32."""
    out = torch.empty(size, dtype=torch.float32, device=coordinates.device)
    _hadamard(_reconstruct_hadamard, out, coordinates.contiguous(), seed, offset)
    return out


def _hadamard(
    kernel: triton.JITFunction, x: Tensor, coordinates: Tensor, seed: int, offset: int
) -> None:
    """One program for each whole tile, and one for each binary digit of what is left."""
    tiles, left = divmod(len(x), layout.TILE)
    with torch.cuda.device_of(x):
        for programs, whole in ((tiles, True), (left.bit_length(), False)):
            if programs:
                kernel[(programs,)](
                    x,
                    coordinates,
                    seed,
                    len(x),
                    len(coordinates),
                    offset,
                    WHOLE=whole,
                    num_warps=4,
                    enable_fp_fusion=False,
                )


@triton.jit(do_not_specialize=["seed", "size", "k", "per_chunk"])
def _project_dense(
    x,
    partial,
    seed,
    size,
    k,
    per_chunk,
    KIND: tl.constexpr,
    PURPOSE: tl.constexpr,
    PARTS: tl.constexpr,
    BASES: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A chunk's share of the inner products with a block of bases."""
    LANES: tl.constexpr = _TILE // (4 * PARTS)
    base = tl.program_id(0) * BASES + tl.arange(0, BASES)
    chunk = tl.program_id(1)
    total = tl.full([BASES, COLUMNS], 0, tl.float64)
    for i in range(per_chunk):
        group = chunk * per_chunk + i
        sums = tl.full([BASES, COLUMNS], 0, tl.float32)
        for step in range(GROUP * LANES // COLUMNS):
            counter = group * (GROUP * LANES) + step * COLUMNS
            start, entry, left = _columns(counter, size, LANES, COLUMNS)
            column = counter + tl.arange(0, COLUMNS)[None, :]
            words = _philox(seed, column, 0, base[:, None], PURPOSE)
            # The slots in two loops: what the two parts of a normal number share is in the inner
            # one, and all the bits of a word unrolled would not fit into the instruction cache.
            for pair in range(PARTS // 2):
                for j in tl.static_range(8):
                    part = pair * 2 + j % 2
                    index = entry + (j // 2 * PARTS + part) * LANES
                    value = tl.load(x + start + index, mask=index < left, other=0)
                    factor = _entries(words[j // 2], part, KIND)
                    sums = tl.fma(factor, value.to(tl.float32), sums)
        total += sums.to(tl.float64)
    total = tl.reduce(total, 1, _add)
    tl.store(partial + chunk.to(tl.int64) * k + base, total, mask=base < k)


@triton.jit(do_not_specialize=["seed", "size", "k"])
def _reconstruct_dense(
    coordinates,
    out,
    seed,
    size,
    k,
    KIND: tl.constexpr,
    PURPOSE: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A part of the output: the sum of all bases there, in their order."""
    LANES: tl.constexpr = _TILE // (4 * PARTS)
    counter = tl.program_id(0) * COLUMNS
    column = counter + tl.arange(0, COLUMNS)[None, :]
    part = tl.arange(0, PARTS)[:, None]
    sums0 = tl.full([PARTS, COLUMNS], 0, tl.float32)
    sums1 = tl.full([PARTS, COLUMNS], 0, tl.float32)
    sums2 = tl.full([PARTS, COLUMNS], 0, tl.float32)
    sums3 = tl.full([PARTS, COLUMNS], 0, tl.float32)
    for base in range(k):
        coordinate = tl.load(coordinates + base)
        words = _philox(seed, column, 0, base, PURPOSE)
        sums0 = tl.fma(_entries(words[0], part, KIND), coordinate, sums0)
        sums1 = tl.fma(_entries(words[1], part, KIND), coordinate, sums1)
        sums2 = tl.fma(_entries(words[2], part, KIND), coordinate, sums2)
        sums3 = tl.fma(_entries(words[3], part, KIND), coordinate, sums3)
    sums = (sums0, sums1, sums2, sums3)
    start, entry, left = _columns(counter, size, LANES, COLUMNS)
    for i in tl.static_range(4):
        index = entry + (i * PARTS + part) * LANES
        tl.store(out + start + index, sums[i], mask=index < left)


@triton.jit(do_not_specialize=["seed", "size", "k", "offset"])
def _project_hadamard(x, coordinates, seed, size, k, offset, WHOLE: tl.constexpr):
    """A segment's rows that are sampled."""
    start, length, bits, inside = _segment(size, WHOLE)
    tile, index = start // _TILE, _index()
    value = tl.load(x + tile.to(tl.int64) * _TILE + index, mask=inside, other=0)
    value = _fwht(value.to(tl.float32) * _signs(seed, tile), bits)
    first, place, sampled = _places(seed, start, length, bits, size, k, offset)
    tl.store(coordinates + first + place, value, mask=sampled)


@triton.jit(do_not_specialize=["seed", "size", "k", "offset"])
def _reconstruct_hadamard(out, coordinates, seed, size, k, offset, WHOLE: tl.constexpr):
    """A segment, of its rows that were sampled."""
    start, length, bits, inside = _segment(size, WHOLE)
    tile, index = start // _TILE, _index()
    first, place, sampled = _places(seed, start, length, bits, size, k, offset)
    value = tl.load(coordinates + first + place, mask=sampled, other=0)
    value = _fwht(value, bits) * _signs(seed, tile)
    tl.store(out + tile.to(tl.int64) * _TILE + index, value, mask=inside)


@triton.jit
def _add(a, b):
    """For `tl.reduce`: `tl.sum` is compiled code, which the interpreter of the tests cannot call if
    Triton was imported before it was switched on.
    """
    return a + b


@triton.jit
def _columns(counter, size, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """For `COLUMNS` counters the start of the first one's tile, and, from there, their first
    entries and the end of the vector (or of what they can reach, if that is nearer).
    """
    lane = counter % LANES + tl.arange(0, COLUMNS)[None, :]
    start = (counter // LANES).to(tl.int64) * _TILE
    left = tl.minimum(size - start, (COLUMNS // LANES + 1) * _TILE).to(tl.int32)
    return start, lane // LANES * _TILE + lane % LANES, left


@triton.jit
def _philox(seed, c0, c1, c2, c3):
    """Four words for each counter, of numbers and tensors of numbers below 2³¹.

    `tl.philox` has the same bits, but multiplies twice for the two words of each product.
    """
    multiplier0, multiplier1 = tl.full([], _M0, tl.uint64), tl.full([], _M1, tl.uint64)
    key = seed.to(tl.uint64)
    key0, key1 = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        product0, product1 = c0 * multiplier0, c2 * multiplier1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = product0.to(tl.uint32)
        key0, key1 = key0 + _W0, key1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _entries(word, part, KIND: tl.constexpr):
    """The unscaled entries that are made of one part (a bit or a half) of each word.

    Bits under the exponent of a power of two are an integer plus that power, exactly; this is
    several times faster than to convert an integer.
    """
    if KIND == "rademacher":
        entries = (((word << (31 - part)) & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)
    elif KIND == "uniform":
        half = (word >> (16 * part)) & 0xFFFF
        # 128 + 2 half 2⁻¹⁶, less 128 + 65535 · 2⁻¹⁶
        entries = ((half << 1) | 0x43000000).to(tl.float32, bitcast=True) - 128.9999847412109375
    else:
        entries = _normal(word & 0xFFFF, word >> 16, part)
    return entries


@triton.jit
def _normal(radius, angle, part):
    """Box–Muller, `reference._normal`: the first or second (`part`) of two normal numbers."""
    # 64 + (2 radius + 1) 2⁻¹⁷, less 64
    chance = ((radius << 1) | 0x42800001).to(tl.float32, bitcast=True) - 64.0
    bits = chance.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    log = _polynomial(_LOG, 6, mantissa) + ((bits >> 23) - 127).to(tl.float32) * _LN2
    length = tl.sqrt_rn(tl.maximum(log * -2.0, 0.0))
    quarter = angle >> 14
    # 256 + 2 (angle mod 2¹⁴) 2⁻¹⁵, less 256 + 16383 · 2⁻¹⁵
    t = (((angle & 0x3FFF) << 1) | 0x43800000).to(tl.float32, bitcast=True) - 256.499969482421875
    square = t * t
    sine, cosine = _polynomial(_SIN, 3, square) * t, _polynomial(_COS, 3, square)
    value = tl.where(((quarter ^ part) & 1) == 1, sine, cosine)
    sign = ((quarter + 1 - part) & 2) << 30
    return length * (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _polynomial(COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr, x):
    """Horner's rule, each operation rounded: `reference._polynomial`."""
    value = x * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        value = value * x + COEFFICIENTS[DEGREE - i]
    return value


@triton.jit
def _index():
    """A tile's entries, in rows of 32: the lanes of its signs."""
    return tl.arange(0, _TILE // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def _segment(size, WHOLE: tl.constexpr):
    """A program's segment: its start, length, log₂ of the length, and which of the tile it is.

    A short segment is transformed among zeros, as a whole tile. This is exact: the larger strides
    only add zeros to it or subtract them from it, and make copies of it all over the tile.
    """
    if WHOLE:
        bits = tl.full([], _BITS, tl.int32)
        length = tl.full([], _TILE, tl.int32)
        start = tl.program_id(0) * _TILE
        inside = tl.full([1, 1], True, tl.int1)
    else:
        bits = tl.program_id(0)
        length = size & (1 << bits)
        start = (size >> (bits + 1)) << (bits + 1)
        inside = (_index() ^ (start % _TILE)) < length
    return start, length, bits, inside


@triton.jit
def _signs(seed, tile):
    """The random signs of a tile's entries."""
    slot, lane = tl.arange(0, _TILE // 32)[:, None], tl.arange(0, 32)[None, :]
    words = _philox(seed, tile * 32 + lane, 0, 0, _SIGNS)
    low = tl.where(slot < 32, words[0], words[1])
    high = tl.where(slot < 96, words[2], words[3])
    return _entries(tl.where(slot < 64, low, high), slot % 32, "rademacher")


@triton.jit
def _fwht(x, bits):
    """The transform of a tile, strides 1, 2, 4 …; orthonormal for segments of 2^bits entries."""
    for i in tl.static_range(_BITS):
        x = _butterflies(x, 1 << i)
    # 2^(-bits/2), from its exponent.
    scale = ((127 - (bits >> 1)) << 23).to(tl.float32, bitcast=True)
    return x * tl.where((bits & 1) == 1, scale * 0.70710678118654752, scale)


@triton.jit
def _butterflies(x, STRIDE: tl.constexpr):
    """One stage: sums and differences of the entries that are `STRIDE` apart."""
    pairs = tl.reshape(x, [_TILE // (2 * STRIDE), 2, STRIDE])
    first, second = tl.split(tl.permute(pairs, [0, 2, 1]))
    pairs = tl.permute(tl.join(first + second, first - second), [0, 2, 1])
    return tl.reshape(pairs, [_TILE // 32, 32])


@triton.jit
def _places(seed, start, length, bits, size, k, offset):
    """Where a segment's coordinates begin, and the place among them of each row that is sampled.

    A row's place is `reference.rows` inverted, so that no thread has to look up what another has:
    an odd factor has an inverse modulo a power of two, and the mix, as it shifts by half of the
    bits, is its own.
    """
    a, b, c, d = _philox(seed, start, 0, 0, _ROWS)
    e, f, g, h = _philox(seed, start, 1, 0, _ROWS)
    a, c, e, g = _inverse(a), _inverse(c), _inverse(e), _inverse(g)
    mask, shift = (1 << bits) - 1, (bits + 1) >> 1
    place = (_index() * g - g * h) & mask
    place = ((place ^ (place >> shift)) * e - e * f) & mask
    place = ((place ^ (place >> shift)) * c - c * d) & mask
    place = ((place ^ (place >> shift)) * a - a * b) & mask
    first = (start.to(tl.int64) * k + offset) // size
    count = ((start + length).to(tl.int64) * k + offset) // size - first
    return first, place, (place < count.to(tl.uint32)) & (_index() < length)


@triton.jit
def _inverse(factor):
    """Of `factor | 1`, modulo a tile's 2¹²: Newton's iteration has 3, 6, then 12 bits right."""
    odd = factor | 1
    inverse = odd * (2 - odd * odd)
    return inverse * (2 - odd * inverse)
