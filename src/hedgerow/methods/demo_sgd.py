"""DeMo: momentum that stays with its client, of which the fast components travel.

Peng et al., "DeMo: Decoupled Momentum Optimization", arXiv 2411.19870, algorithm 1, with the signs,
the decay and the components of its code.

    every round:
      client k:  m_k <- 0.999 m_k + (w after local steps of SGD) - w
                 send q_k = the 32 largest of each 4,096 components of m_k's cosine transform
                 m_k <- m_k - q_k
      server:    collect all q_k
      everybody: w <- w + η sign(Σ q_k / N)

In the paper a round is one step, `training: {optimizer: sgd, steps: 1}`, and components travel in
32 bits, where 8 do here. Pieces of the transform are as long as the largest divisor of a side up to
64, as in the code; tiles follow one another in its components, and are its pieces where these have
4,096 values.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hedgerow.methods.averaged import AveragedWeights
from hedgerow.methods.parts.codec import ChosenCodec
from hedgerow.methods.parts.feedback import Feedback
from hedgerow.methods.parts.server_optimizers import ChosenServerOptimizer, Sign
from hedgerow.methods.parts.top_k import TopK
from hedgerow.methods.weighting import ByShare


def _fast_components() -> TopK:
    return TopK(k=32, tile=4096, bits=8, transform="dct")


class DemoSGD(AveragedWeights):
    """All parameters; the fast components of each client's momentum are sent."""

    name: str = "demo_sgd"
    summary: ClassVar[str] = "the largest components of local momentum, in a cosine transform"
    reference: ClassVar[str] = "DeMo, arXiv 2411.19870"

    up: ChosenCodec = Field(default_factory=_fast_components)
    """Codec of updates: the paper's, or as {name: top_k, k: 16, tile: 4096, transform: dct}; with
    null, they are sent as they are."""
    gather: bool = True
    """Whether the broadcast has every client's update as it came, for everybody to add up, as in
    the paper; with `false` it is their mean, in the codec `down`."""
    error_feedback: Feedback = 0.999
    """Decay of the clients' momentum, above 0: the factor of what is left of earlier rounds."""
    server: ChosenServerOptimizer = Field(default_factory=Sign)
    """Optimiser of the global steps: signs, of size {name: sign, learning_rate: 0.001}, or another;
    with null, the global model takes the mean update as it is."""
    weights: ByShare = "uniform"
    """Weights p_k of the clients' updates: `uniform`, 1/N for each of N clients, as in the paper,
    or `size`, each client's share of the round's examples."""
