"""Loss and perplexity of the right answers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hedgerow.evaluation.metrics.base import LikelihoodMetric, Score, Weighted


class Loss(LikelihoodMetric):
    """Mean cross-entropy of a token of an answer (its EOS included), and its exponential.

    Each token weighs the same, whichever row it is from.
    """

    name: str = "loss"
    scores = (
        Score("eval_loss", label="loss", unit="nats per token", direction="lower"),
        Score("eval_perplexity", label="perplexity", direction="lower", derived=True),
    )

    def score(self, nats: float, tokens: int) -> Weighted:
        """Mean over the tokens of all rows."""
        return Weighted(total=nats, weight=tokens)

    def derive(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Perplexity: exp(loss), infinite where that is beyond a float."""
        loss = scores["eval_loss"]
        return {"eval_perplexity": math.exp(loss) if loss < 700 else math.inf}
