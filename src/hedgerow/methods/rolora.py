"""RoLoRA: alternating minimisation, B in one round and A in the next.

Chen et al., "Robust Federated Finetuning of Foundation Models via Alternating Minimization of
LoRA", arXiv 2409.02346; "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
arXiv 2502.01755. The factor that rests is the same for all, so every average is exact, and unlike
FFA-LoRA's A is learnt.

    every round:
      client k:  go on from (A, B); train B in odd rounds, A in even ones
      server:    B = Σ p_k s_k B_k in odd rounds, A = Σ p_k A_k in even ones
      everybody: the global adapter is (A, B); the base stays as it is

Half an adapter travels up. An entry is a whole one, so that a client that was away, or a newcomer,
needs the last entry alone.
"""

from __future__ import annotations

from typing import ClassVar

from hedgerow.methods.factors import Factor
from hedgerow.methods.one_factor import OneFactor


class RoLoRA(OneFactor):
    """Adapters of one rank, of which A and B are trained in turns."""

    name: str = "rolora"
    summary: ClassVar[str] = "LoRA of one rank, A and B trained and averaged in turns: exact"
    reference: ClassVar[str] = "RoLoRA, arXiv 2409.02346, 2502.01755"
    same_rank: ClassVar[bool] = True

    @property
    def keeps_coordinates(self) -> bool:
        """No: rounds sum changes of B and of A in turns."""
        return False

    def trained_factor(self, round: int) -> Factor:
        """B first: while it is zero, A has no gradient."""
        return "lora_B" if round % 2 else "lora_A"
