"""What all backends share: how the entries of a base come out of Philox4x32-10.

Entry i of base j is computed from (seed, j, i) alone (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011). The key is the seed; the counter is (block of entries, 0, j, purpose).
A *tile* is `TILE` consecutive entries, and within it neighbours come from neighbouring counters, so
that the lanes of a vector unit or the threads of a warp compute neighbours:

    uniform, gaussian   8 entries a counter: entry e of a tile is in lane e mod (TILE/8), and in
                        slot e div (TILE/8), which is half (slot mod 2) of word (slot div 2)
    rademacher, signs   128 entries a counter: lane e mod (TILE/128), slot e div (TILE/128), which
                        is bit (slot mod 32) of word (slot div 32)

Entries are unscaled here: ±1, odd multiples of 2⁻¹⁶ between -1 and 1, or normal with variance 1.
The bases of `hedgerow.sketch` are 1/√size times them.

A hadamard base of size n is a row of a block-diagonal orthogonal matrix: Walsh–Hadamard matrices on
*segments*, which are all whole tiles and then the binary digits of what is left of n (1,000 = 512 +
256 + 128 + 64 + 32 + 8), so that it is orthogonal for every n.
"""

from __future__ import annotations

from typing import Literal, get_args

Basis = Literal["uniform", "rademacher", "hadamard", "gaussian"]
BASES: tuple[Basis, ...] = get_args(Basis)

TILE = 4096
MAX_SIZE = 2**31 - 1
"""Largest number of entries of a vector: counters and rows then fit into 32 bits."""

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

# What a counter is for: its last word.
UNIFORM, RADEMACHER, GAUSSIAN, SIGNS, ROWS, OFFSET = 1, 2, 3, 4, 5, 6

SECOND_MOMENT = {"uniform": (1 - 2.0**-32) / 3, "rademacher": 1.0, "gaussian": 1.0, "hadamard": 1.0}
"""ρ: E e² of an unscaled entry, so that a base has a length of √ρ."""

# Box–Muller with 16 bits for the radius and 16 for the angle. Polynomials instead of library calls,
# each operation rounded to float32 on its own, give the same bits everywhere.
LN2 = 0.6931472
LOG = (-2.1034264, 4.221194, -3.6748648, 2.2523586, -0.8650217, 0.1871757, -0.01741408)
"""ln m for 1 ≤ m < 2, ascending powers of m; error below 2e-6."""
SIN = (1.5707963, -0.6459635, 0.07968022, -0.00460216)
"""sin(πt/2)/t for |t| ≤ 1/2, ascending powers of t²; error below 1e-8."""
COS = (1.0, -1.233697, 0.25359861, -0.02040826)
"""cos(πt/2) for |t| ≤ 1/2, ascending powers of t²; error below 1e-7."""


def philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 on plain numbers: four words for one counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF
        c2, c3 = p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = k0 + PHILOX_W[0] & 0xFFFFFFFF, k1 + PHILOX_W[1] & 0xFFFFFFFF
    return c0, c1, c2, c3


def segments(size: int) -> list[tuple[int, int]]:
    """Start and length (a power of two) of each segment that is shorter than a tile."""
    start, parts = size - size % TILE, []
    while start < size:
        length = 1 << ((size - start).bit_length() - 1)
        parts.append((start, length))
        start += length
    return parts


def samples_before(row: int, size: int, k: int, offset: int) -> int:
    """Number of the k sampled rows that are in segments before `row`, a segment's start.

    Systematic sampling with a random `offset` in [0, size): each segment has its share of the rows
    to within one, and every row has the probability k/size exactly.
    """
    return (k * row + offset) // size
