"""FedSVD: B is trained on a fixed A, and after each round A becomes B·A's right singular vectors.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv
2505.12805. Averages of B are exact, since A is the same for all; and A follows what was learnt,
with orthonormal rows.

    every round:
      client k:  go on from the global adapter (A, B), and train B alone
      server:    B' = Σ p_k s_k B_k,  U·S·Vᵀ = B'·A,  A = Vᵀ,  B = U·S
      everybody: the global adapter is (A, B); the base stays as it is
"""

from __future__ import annotations

from typing import ClassVar

from hedgerow import lowrank
from hedgerow.lowrank import Factors
from hedgerow.methods.one_factor import OneFactor


class FedSVD(OneFactor):
    """Adapters of one rank, B averaged, and A re-orthogonalised."""

    name: str = "fedsvd"
    summary: ClassVar[str] = "LoRA of one rank, B averaged on A of B·A's singular vectors: exact"
    reference: ClassVar[str] = "FedSVD, arXiv 2505.12805"
    same_rank: ClassVar[bool] = True
    refactors: ClassVar[bool] = True

    @property
    def keeps_optimizer(self) -> bool | None:
        """Nothing: moments would belong to factors that are no more once these are made anew."""
        return None

    def refactor(self, pair: Factors) -> Factors:
        """A = Vᵀ, B = U·S, of zeros beyond the matrix's own rank."""
        left, values, right = lowrank.svd(pair)
        return Factors(right, left * values).padded(pair.rank)
