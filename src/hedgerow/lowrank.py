"""Exact algebra on low-rank factors: stack, measure, re-factorise.

A matrix update is a pair of factors, ΔW = B·A with A of shape (r, n) and B of shape (m, r). A sum
of such updates is again such a pair (the stack), so nothing here ever needs the m×n matrix, except
where the pair has become larger than the matrix itself.

Sources: FLoRA (arXiv 2409.05976), section 3, for stacking; FLoRIST (arXiv 2506.09199) for the
re-factorisation by small SVDs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
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


def stack(pairs: Sequence[Factors]) -> Factors:
    """The pair whose product is the sum of the pairs' products, of rank Σ r_k (FLoRA, eq. 5)."""
    return Factors(torch.cat([p.A for p in pairs], dim=0), torch.cat([p.B for p in pairs], dim=1))


_ROOM = 4 * 2**20
"""Bytes of address space that a buffer begins with."""


class GrowingStack:
    """A stack to which pairs are added one by one, with room for many before anything is copied.

    Room that is not used takes address space, not memory.
    """

    def __init__(self) -> None:
        self._A = self._B = torch.empty(0, 0)  # B is kept transposed, so that both grow by rows
        self._rank = 0

    def add(self, pair: Factors) -> None:
        """Append the rows of A and the columns of B."""
        rows = slice(self._rank, self._rank + pair.rank)
        self._A = _with_room(self._A, rows.stop, pair.A)
        self._B = _with_room(self._B, rows.stop, pair.B.T)
        self._A[rows] = pair.A
        self._B[rows] = pair.B.T
        self._rank = rows.stop

    def factors(self) -> Factors:
        """The stack so far; it shares memory with this object."""
        return Factors(self._A[: self._rank], self._B[: self._rank].T)


def norm(pair: Factors) -> float:
    """The Frobenius norm of B·A, computed in float64."""
    if pair.rank >= min(pair.A.shape[1], pair.B.shape[0]):
        return float(torch.linalg.matrix_norm(_product64(pair)))
    # ‖B·A‖ = ‖R_B·R_Aᵀ‖, since the orthogonal factors of both QRs keep lengths.
    r_a = torch.linalg.qr(pair.A.double().T, mode="r").R
    r_b = torch.linalg.qr(pair.B.double(), mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def distance(first: Factors, second: Factors) -> float:
    """The Frobenius norm of the difference of two products, computed in float64."""
    if first.rank + second.rank >= min(first.A.shape[1], first.B.shape[0]):
        return float(torch.linalg.matrix_norm(_product64(first) - _product64(second)))
    return norm(
        stack(
            [
                Factors(first.A.double(), first.B.double()),
                Factors(second.A.double(), -second.B.double()),
            ]
        )
    )


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
    return (error / size) ** 0.5 if size else 0.0 if not error else float("inf")


def truncate(pair: Factors, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """The best approximation of B·A by a smaller pair, by QR of both factors and SVD of the core.

    Args:
        pair: factors with A of shape (r, n) and B of shape (m, r).
        rank: keep at most so many singular values.
        energy: keep the fewest singular values whose squares sum to this share (0 to 1) of all.

    Returns:
        Balanced factors (both carry the square roots of the singular values), in the dtype of
        `pair`, of rank at least 1 and at most min(r, m, n).
    """
    q_b, r_b = torch.linalg.qr(pair.B.double())
    q_a, r_a = torch.linalg.qr(pair.A.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    keep = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        shares = s.square().cumsum(0)
        keep = min(keep, int((shares < energy * shares[-1]).sum()) + 1)
    root = s[:keep].sqrt()
    A = (q_a @ v[:keep].T * root).T
    B = q_b @ u[:, :keep] * root
    return Factors(A.to(pair.A.dtype).contiguous(), B.to(pair.B.dtype).contiguous())


def _with_room(buffer: Tensor, rows: int, like: Tensor) -> Tensor:
    """`buffer` if it has so many rows, else a larger one that begins with it."""
    if rows <= len(buffer):
        return buffer
    first = _ROOM // (like.shape[1] * like.itemsize)
    larger = torch.empty(max(rows, first, 2 * len(buffer)), like.shape[1], dtype=like.dtype)
    if len(buffer):
        larger[: len(buffer)] = buffer
    return larger
