"""Sparse ternary compression, of updates and of the broadcast, each with error feedback.

Sattler et al., "Robust and Communication-Efficient Federated Learning from Non-IID Data",
arXiv 1903.02891, algorithm 2.

    every round:
      client k:  e_k <- e_k + (w after local training) - w
                 send s_k = sign × mean size of the largest share of e_k;  e_k <- e_k - s_k
      server:    e <- e + Σ p_k s_k
                 send s = sign × mean size of the largest share of e;  e <- e - s
      everybody: w <- w + s

The mean size is of each tensor, where the paper has one for all.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hedgerow.methods.averaged import AveragedWeights
from hedgerow.methods.parts.codec import ChosenCodec
from hedgerow.methods.parts.feedback import Feedback
from hedgerow.methods.parts.top_k import TopK


def _ternary() -> TopK:
    """1/400 of all values, as in the paper's table 4, and their signs."""
    return TopK(k=10, tile=4000, group="all", bits=1)


class STC(AveragedWeights):
    """All parameters; signs of the largest changes alone are sent, both ways."""

    name: str = "stc"
    summary: ClassVar[str] = "signs of the largest changes, both ways, with error feedback"
    reference: ClassVar[str] = "STC, arXiv 1903.02891"

    up: ChosenCodec = Field(default_factory=_ternary)
    """Codec of updates: the paper's, or as {name: top_k, k: 1, tile: 100, group: all, bits: 1};
    with null, they are sent as they are."""
    down: ChosenCodec = Field(default_factory=_ternary)
    """Codec of the broadcast, as `up` has it; with null, it is sent as it is."""
    error_feedback: Feedback = True
    """Whether clients add to their updates what their codec has lost of earlier ones."""
    broadcast_feedback: Feedback = True
    """Whether the server adds to its broadcast what its codec has lost of earlier ones."""
