"""FedEx-LoRA: FedIT made exact by merging what the averages lack into everybody's base.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large
Language Models", arXiv 2410.09432. The residual has a rank of at most N·r beside B·A's r; it
travels as low-rank factors, never as a matrix.

    every round:
      client k:  go on from the global adapter (A, B), and train it
      server:    A = Σ p_k A_k,  B = Σ p_k s_k B_k,  B'·A' = Σ p_k s_k B_k A_k - B·A  (by SVD)
      everybody: W <- W + B'·A', and the global adapter is (A, B)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from hedgerow.lowrank import Factors
from hedgerow.methods.fedit import average
from hedgerow.methods.lora import Part
from hedgerow.methods.residual import ResidualAdapter


class FedExLoRA(ResidualAdapter):
    """Adapters of one rank, averaged factor by factor, with the residual in the base."""

    name: Literal["fedex_lora"] = "fedex_lora"
    summary: ClassVar[str] = "LoRA of one rank, averaged; what averages lack enters the base: exact"
    reference: ClassVar[str] = "FedEx-LoRA, arXiv 2410.09432"
    same_rank: ClassVar[bool] = True

    def next_start(self, stacked: Factors, parts: Sequence[Part]) -> Factors:
        """The averages of A and B apart."""
        return average(stacked, parts)
