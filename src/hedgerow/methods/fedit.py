"""FedIT: federated instruction tuning by averaging the factors of equal-rank adapters.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644;
FedAvg applied to A and B apart. The baseline whose noise FLoRA removes.

    every round:
      client k:  go on from the global adapter (A, B), and train it
      server:    A = Σ p_k A_k,  B = Σ p_k B_k
      everybody: the global adapter is (A, B); the base stays as it is
"""

from __future__ import annotations

from typing import ClassVar

from hedgerow.methods.continued import ContinuedAdapter


class FedIT(ContinuedAdapter):
    """Adapters of one rank, averaged factor by factor."""

    name: str = "fedit"
    summary: ClassVar[str] = "LoRA of one rank, A and B averaged apart (noisy)"
    reference: ClassVar[str] = "FedIT, arXiv 2305.05644"
    same_rank: ClassVar[bool] = True
