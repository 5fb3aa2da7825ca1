"""Zero-padding: FedIT for different ranks, by padding every factor to the largest.

The baseline for heterogeneous ranks in FLoRA (arXiv 2409.05976, section 4), after Cho et al.,
"Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv 2401.06432.

    every round:
      client k:  go on from the first r_k rows of A and columns of B, and train them
      server:    pad A_k and B_k with zeros to the largest rank, then average them as FedIT does
      everybody: the global adapter is (A, B); the base stays as it is
"""

from __future__ import annotations

from typing import ClassVar

from hedgerow.methods.continued import ContinuedAdapter


class ZeroPadding(ContinuedAdapter):
    """Adapters of different ranks, padded with zeros and averaged; `average` pads."""

    name: str = "zero_padding"
    summary: ClassVar[str] = "LoRA of different ranks, padded with zeros and averaged (noisy)"
    reference: ClassVar[str] = "HetLoRA, arXiv 2401.06432, as compared in FLoRA"
