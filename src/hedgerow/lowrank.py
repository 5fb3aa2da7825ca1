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


def norm(pair: Factors) -> float:
    """The Frobenius norm of B·A, computed in float64."""
    A, B = pair.A.double(), pair.B.double()
    if pair.rank >= min(A.shape[1], B.shape[0]):
        return float(torch.linalg.matrix_norm(B @ A))
    # ‖B·A‖ = ‖R_B·R_Aᵀ‖, since the orthogonal factors of both QRs keep lengths.
    r_a = torch.linalg.qr(A.T, mode="r").R
    r_b = torch.linalg.qr(B, mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def distance(first: Factors, second: Factors) -> float:
    """The Frobenius norm of the difference of two products, computed in float64."""
    first = Factors(first.A.double(), first.B.double())
    return norm(stack([first, Factors(second.A.double(), -second.B.double())]))


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
