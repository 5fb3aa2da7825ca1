"""Exact algebra on low-rank factors: stack, measure, re-factorise.

A matrix update is a pair of factors, ΔW = B·A with A of shape (r, n) and B of shape (m, r). A sum
of such updates is again such a pair (stacked), so nothing here ever needs the m×n matrix, except
where the pair has become larger than the matrix itself.

Sources: FLoRA (arXiv 2409.05976), section 3, for stacking; FLoRIST (arXiv 2506.09199) for the
re-factorisation by small SVDs.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from hedgerow.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Factors(NamedTuple):
    """ΔW = B·A; A has shape (r, n), B has shape (m, r)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """The number of rows of A (an upper bound of the matrix's rank)."""
        return self.A.shape[0]

    def product(self) -> Tensor:
        """ΔW itself, shape (m, n), in float32 or wider."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.B.to(wide) @ self.A.to(wide)

    def double(self) -> Factors:
        """The pair in float64."""
        return Factors(self.A.double(), self.B.double())

    def float(self) -> Factors:
        """The pair in float32."""
        return Factors(self.A.float(), self.B.float())

    def leading(self, rank: int) -> Factors:
        """The first rows of A and columns of B."""
        return Factors(self.A[:rank], self.B[:, :rank])

    def padded(self, rank: int) -> Factors:
        """The pair with rows of A and columns of B of zeros, up to this rank: the same product."""
        more = (0, rank - self.rank)
        return Factors(
            torch.nn.functional.pad(self.A, (0, 0, *more)), torch.nn.functional.pad(self.B, more)
        )


def stack(pairs: Sequence[Factors]) -> Factors:
    """Stack pairs: the product is the sum of theirs, of rank Σ r_k (FLoRA, section 3, eq. 5).

    Args:
        pairs: at least one; A of shape (r_k, n) and B of shape (m, r_k), of one dtype and device.

    Returns:
        A of shape (Σ r_k, n) and B of shape (m, Σ r_k), in the same dtype.
    """
    return Factors(torch.cat([p.A for p in pairs], dim=0), torch.cat([p.B for p in pairs], dim=1))


def difference(first: Factors, second: Factors) -> Factors:
    """The pair whose product is that of the first without that of the second, in float64."""
    minus = second.double()
    return stack([first.double(), minus._replace(B=-minus.B)])


def total(pairs: Iterable[Factors]) -> Factors:
    """The sum of products as one pair of at most the matrix's rank.

    The only pair as it is, if it is not larger; else their matrix, with an identity beside it, both
    scaled so that neither needs a wider range of numbers than the pairs.

    Args:
        pairs: at least one.
    """
    remaining = iter(pairs)
    first, second = next(remaining), next(remaining, None)
    m, n = first.B.shape[0], first.A.shape[1]
    if second is None and first.rank <= min(m, n):
        return first
    matrix = first.product()
    for pair in itertools.chain([second] if second else [], remaining):
        matrix.addmm_(pair.B, pair.A)
    # A power of two, so that nothing is rounded.
    scale = 2.0 ** (math.frexp(float(matrix.abs().max()))[1] // 2)
    identity = scale * torch.eye(min(m, n), dtype=matrix.dtype)
    matrix = matrix / scale
    return Factors(matrix, identity) if m <= n else Factors(identity, matrix)


def fitted(pair: Factors) -> Factors:
    """The same product from factors of at most the matrix's rank, min(m, n); its dtype is kept.

    Factors that are no larger stay as they are.
    """
    if pair.rank <= min(pair.A.shape[1], pair.B.shape[0]):
        return pair
    small = total([pair.double()])
    return Factors(small.A.to(pair.A.dtype), small.B.to(pair.B.dtype))


def rounded(pair: Factors) -> tuple[Factors, float]:
    """The pair in float32, and the Frobenius norm of what that changes of its product.

    Args:
        pair: in float64.
    """
    small = pair.float()
    A, B = small.A.double(), pair.B
    # B'·A' - B·A = (B' - B)·A' + B·(A' - A), from which nothing cancels.
    A, B = torch.cat([A, A - pair.A]), torch.cat([small.B.double() - B, B], dim=1)
    return small, float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


class SpooledFactors:
    """Stacked pairs that arrive one by one, and wait on disk until they are read.

    While clients train one after another, what the earlier ones sent is then not in memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Keep the pairs in `file`, unbuffered and open for both, which others may share."""
        self._file = file
        self._places: list[tuple[int, int]] = []
        self._like: Factors | None = None

    def add(self, pair: Factors) -> None:
        """Append the rows of A and the columns of B, as the first pair has them."""
        if self._like is None:
            # Not views, which would keep the first pair in memory.
            (_, n), (m, _) = pair.A.shape, pair.B.shape
            self._like = Factors(pair.A.new_empty(0, n), pair.B.new_empty(0, m))
        self._places.append((self._file.seek(0, os.SEEK_END), pair.rank))
        for rows in (pair.A, pair.B.T):
            # Rows of both, so that each client's part of either is one piece.
            unwritten = memoryview(_bytes(rows.contiguous()))
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        assert self._like is not None, "no pair has been added"
        return self._like.B.shape[1], self._like.A.shape[1]

    def factors(self, first: int = 0, last: int | None = None) -> Factors:
        """The stacked pairs from `first` to before `last` (default: all), read into memory."""
        assert self._like is not None, "no pair has been added"
        places = self._places[first:last]
        total = sum(rank for _, rank in places)
        A, B = (like.new_empty(total, like.shape[1]) for like in self._like)
        end = 0
        for place, rank in places:
            self._file.seek(place)
            for rows in (A, B):
                unread = memoryview(_bytes(rows[end : end + rank]))
                while unread:
                    unread = unread[self._file.readinto(unread) :]  # type: ignore[attr-defined]
            end += rank
        return Factors(A, B.T)


def _bytes(tensor: Tensor) -> Any:
    """A contiguous tensor's own memory, as a flat array of bytes."""
    return tensor.flatten().view(torch.uint8).numpy()


def norm(pair: Factors) -> float:
    """Frobenius norm of B·A, computed in float64."""
    if pair.rank >= min(pair.A.shape[1], pair.B.shape[0]):
        return float(torch.linalg.matrix_norm(_product64(pair)))
    # ‖B·A‖ = ‖R_B·R_Aᵀ‖, since the orthogonal factors of both QRs keep lengths.
    r_a = torch.linalg.qr(pair.A.double().T, mode="r").R
    r_b = torch.linalg.qr(pair.B.double(), mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def distance(first: Factors, second: Factors) -> float:
    """Frobenius norm of the difference of two products of one shape, computed in float64."""
    if first.rank + second.rank >= min(first.A.shape[1], first.B.shape[0]):
        return float(torch.linalg.matrix_norm(_product64(first) - _product64(second)))
    return norm(difference(first, second))


def inner_products(pairs: Sequence[Factors], rows: int = 1024) -> Tensor:
    """Inner products ⟨B_i A_i, B_j A_j⟩ = tr(A_iᵀ B_iᵀ B_j A_j) of pairs of any ranks.

    Args:
        pairs: N pairs of one module, each of rank r_i.
        rows: number of rows of A that are multiplied with all at a time, at least; more where one
            pair has more.

    Returns:
        An N×N matrix in float64, in O((m + n)·(Σ r)²) operations.
    """
    A, B = (torch.cat([pair[i].float() for pair in pairs], dim=i) for i in (0, 1))
    owner = torch.repeat_interleave(torch.tensor([pair.rank for pair in pairs]))
    found = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    for start in range(0, len(A), rows):
        own = slice(start, start + rows)
        products = ((A[own] @ A.T) * (B[:, own].T @ B)).double()
        by_pair = torch.zeros(len(products), len(pairs), dtype=torch.float64)
        found.index_add_(0, owner[own], by_pair.index_add_(1, owner, products))
    return found


def _product64(pair: Factors) -> Tensor:
    return pair.B.double() @ pair.A.double()


def relative_error(pairs: Iterable[tuple[Factors, Factors]]) -> float:
    """‖applied - exact‖ / ‖exact‖ in Frobenius norm, over all (applied, exact) matrices together.

    It is 0 where both are zero.
    """
    error = size = 0.0
    for applied, exact in pairs:
        error += distance(applied, exact) ** 2
        size += norm(exact) ** 2
    return relative(error, size)


def relative(error: float, size: float) -> float:
    """Root of a squared error relative to a squared size; 0 where both are zero."""
    return (error / size) ** 0.5 if size else 0.0 if not error else math.inf


class Svd(NamedTuple):
    """The singular value decomposition of B·A, in float64."""

    left: Tensor
    """Shape (m, k), orthonormal columns."""
    values: Tensor
    """Shape (k,), descending."""
    right: Tensor
    """Shape (k, n), orthonormal rows."""

    def rank(self, beside: float) -> int:
        """Numeric rank: what is beyond it is nothing for float32 beside a matrix of this norm."""
        tails = self.values.square().flip(0).cumsum(0).flip(0).sqrt()
        return int((tails > 2e-7 * beside).sum())

    def factors(self, rank: int | None = None) -> Factors:
        """The leading `rank` components as float64 factors that share the singular values.

        Both carry their square roots, so that neither needs a wider range of numbers.
        """
        root = self.values[:rank].sqrt()
        return Factors(self.right[:rank] * root[:, None], self.left[:, :rank] * root)


def svd(pair: Factors) -> Svd:
    """Decompose B·A, by QR of both factors and an SVD of the small core.

    Args:
        pair: factors with A of shape (r, n) and B of shape (m, r), finite.

    Returns:
        min(r, m, n) singular values and their vectors, float64, on the factors' device.
    """
    q_b, r_b = torch.linalg.qr(pair.B.double())
    q_a, r_a = torch.linalg.qr(pair.A.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Svd(q_b @ u, s, v @ q_a.T)


class Projections(NamedTuple):
    """The random matrices that sketches multiply with."""

    right: Tensor
    """Ω and the probes beside it, shape (n, l + 8)."""
    left: Tensor
    """Ψ, shape (3l, m)."""

    @staticmethod
    def draw(m: int, n: int, rank: int, generator: torch.Generator) -> Projections:
        """Draw matrices for `rank` components of sums of shape (m, n); l is twice that."""
        width = min(2 * rank + 1, m, n)
        right = torch.randn(n, width + _PROBES, generator=generator)
        return Projections(right, torch.randn(min(3 * width + 1, m), m, generator=generator))


class SumSketch:
    """A sum of many low-rank products in the memory of one, folded in as they come.

    A sketch of a sum is the sum of sketches: with random Ω (n, l) and Ψ (3l, m), Y = Σ B(AΩ) and
    Z = Σ (ΨB)A tell the sum's leading directions and how they are combined, in one pass (Tropp et
    al., "Practical Sketching Algorithms for Low-Rank Matrix Approximation", arXiv 1609.00048,
    algorithm 4). No product of the matrix's own size is made. What the sketch is too narrow for
    disturbs what it finds, which is shortened against that, so that it is better than nothing.
    """

    def __init__(self, tests: Projections) -> None:
        """Sketch nothing yet; sketches of matrices of one shape may share their `tests`."""
        self._tests = tests
        self._range = torch.zeros(tests.left.shape[1], tests.right.shape[1])
        self._corange = torch.zeros(tests.left.shape[0], tests.right.shape[0])

    def add(self, pair: Factors, weight: float) -> None:
        """Fold weight·B·A in."""
        self._range.addmm_(pair.B, pair.A @ self._tests.right, alpha=weight)
        self._corange.addmm_(self._tests.left @ pair.B, pair.A, alpha=weight)

    def svd(self) -> tuple[Svd, float, float]:
        """The sum's leading components, of which there are as many as the sketch is wide.

        Returns:
            The decomposition; an unbiased estimate of what it is off, ‖·‖_F²; and one of ‖sum‖_F².
        """
        width = self._range.shape[1] - _PROBES
        range_, probed = torch.split(self._range.double(), [width, _PROBES], dim=1)
        basis, _ = torch.linalg.qr(range_)
        core, triangle = torch.linalg.qr(self._tests.left.double() @ basis)
        combined = torch.linalg.solve_triangular(
            triangle, core.T @ self._corange.double(), upper=True
        )
        u, s, v = torch.linalg.svd(combined, full_matrices=False)
        left = basis @ u
        seen = left @ (s[:, None] * (v @ self._tests.right[:, width:].double()))
        size = float(seen.square().sum())
        # The length along what was found that is nearest to the sum, as far as the probes can tell.
        length = min(max(float((seen * probed).sum()) / size, 0.0), 1.0) if size else 1.0
        missed, norm = probed - length * seen, float(probed.square().sum())
        found = Svd(left, length * s, v)
        return found, float(missed.square().sum()) / _PROBES, norm / _PROBES


_PROBES = 8
"""Random vectors that measure what a sketch has missed."""


def truncate(pair: Factors, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """The best approximation of B·A by a smaller pair.

    Args:
        pair: factors with A of shape (r, n) and B of shape (m, r).
        rank: keep at most so many singular values.
        energy: keep the fewest singular values whose squares sum to this share (0 to 1) of all.

    Returns:
        Balanced factors (both carry the square roots of the singular values), in the dtype of
        `pair`, of rank at least 1 and at most min(r, m, n).
    """
    whole = svd(pair)
    keep = len(whole.values) if rank is None else min(rank, len(whole.values))
    if energy is not None:
        shares = whole.values.square().cumsum(0)
        keep = min(keep, int((shares < energy * shares[-1]).sum()) + 1)
    A, B = whole.factors(keep)
    return Factors(A.to(pair.A.dtype).contiguous(), B.to(pair.B.dtype).contiguous())
