"""SparseLoCo: DiLoCo's local steps, of which the largest changes travel, in two bits.

Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", arXiv 2508.15706,
algorithm 1: error feedback with a decay stands for the outer momentum.

    every round:
      client k:  e_k <- 0.95 e_k + (w after H steps of AdamW that goes on from its last round) - w
                 send s_k = the 64 largest of each 4,096 of e_k, in 2 bits;  e_k <- e_k - s_k
      server:    collect all s_k
      everybody: w <- w + Σ s_k / N
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hedgerow.methods.averaged import AveragedWeights
from hedgerow.methods.parts.codec import ChosenCodec
from hedgerow.methods.parts.feedback import Feedback
from hedgerow.methods.parts.top_k import TopK
from hedgerow.methods.weighting import ByShare


class SparseLoCo(AveragedWeights):
    """All parameters; the largest changes alone are sent, and the rest later."""

    name: str = "sparseloco"
    summary: ClassVar[str] = "the largest changes in 2 bits, with error feedback and kept moments"
    reference: ClassVar[str] = "SparseLoCo, arXiv 2508.15706"

    up: ChosenCodec = Field(default_factory=TopK)
    """Codec of updates: the paper's, or as {name: top_k, k: 32, tile: 4096, bits: 2}; with null,
    they are sent as they are."""
    gather: bool = True
    """Whether the broadcast has every client's update as it came, for everybody to add up, as in
    the paper; with `false` it is their mean, in the codec `down`."""
    error_feedback: Feedback = 0.95
    """Factor of what clients still owe of earlier updates, above 0; 1 forgets nothing."""
    weights: ByShare = "uniform"
    """Weights p_k of the clients' updates: `uniform`, 1/N for each of N clients, as in the paper,
    or `size`, each client's share of the round's examples."""

    @property
    def keeps_optimizer(self) -> bool | None:
        """Yes: inner optimisers are never reset."""
        return True
