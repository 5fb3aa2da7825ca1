"""DPO: direct preference optimisation, and two losses that followed it.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv 2305.18290, equation 7. With the rewards of a better and a worse answer to a prompt,

    r_w = β·log(π(y_w|x) / π_ref(y_w|x)),   r_l = β·log(π(y_l|x) / π_ref(y_l|x))

    sigmoid: -(1 - ε)·log σ(r_w - r_l) - ε·log σ(r_l - r_w),   ε: label_smoothing (Mitchell, 2023)
    robust:  (-(1 - ε)·log σ(r_w - r_l) + ε·log σ(r_l - r_w)) / (1 - 2ε)         (arXiv 2403.00409)
    ipo:     (m_w - m_l - 1/(2β))²,  m: log(π(y|x) / π_ref(y|x)) per token of y  (arXiv 2310.12036)

Losses are as in TRL, which has IPO's mean per token from its authors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from hedgerow.data import Tokenized
from hedgerow.lazy import torch
from hedgerow.training.objectives.answers import collate_both, log_likelihoods
from hedgerow.training.objectives.base import Batch, Objective, Reference

if TYPE_CHECKING:
    from torch import Tensor


class DPO(Objective):
    """Rewards of pairs beside a reference: the better answer's is to be above the worse one's."""

    name: str = "dpo"
    learns = "pairs"

    beta: float = Field(0.1, gt=0)
    """Factor β (above 0) of the rewards, by default 0.1: a larger one keeps the model nearer to the
    reference."""
    loss: Literal["sigmoid", "ipo", "robust"] = "sigmoid"
    """Loss of the difference of rewards, by default `sigmoid`, DPO's own. `ipo` is a square, which
    draws it to 1/(2β) per token; `robust` has the mean that `sigmoid` would have if no pair were
    the wrong way round, as a share `label_smoothing` of them is."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share ε (0 or more, below 0.5) of the pairs that are taken to be the wrong way round, for
    `sigmoid` and `robust`; by default 0."""
    reference: Reference = "base"
    """Model that rewards are beside, by default the `base` that the run began with; `round`: the
    one with which a client begins its training in each round."""

    @model_validator(mode="after")
    def _smoothing_counts(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("`label_smoothing` counts with `loss: sigmoid` or `robust` alone")
        return self

    @property
    def refers_to(self) -> Reference:
        """`reference`."""
        return self.reference

    @property
    def reward_scale(self) -> float:
        """β."""
        return self.beta

    def collate(self, examples: Tokenized, indices: Sequence[int], pad_id: int) -> Batch:
        """Better answers, then worse ones, in one forward pass."""
        return collate_both(examples, indices, pad_id, refers=True)

    def count(self, batch: Batch) -> int:
        """Number of pairs."""
        return len(batch["labels"]) // 2

    def total(self, network: Any, batch: Batch) -> Tensor:
        """Sum over pairs."""
        found, tokens = log_likelihoods(network, batch)
        ratios = found - batch["reference"].to(found.device)
        if self.loss == "ipo":
            better, worse = (ratios / tokens.clamp(min=1)).chunk(2)
            return ((better - worse - 1 / (2 * self.beta)) ** 2).sum()
        better, worse = ratios.chunk(2)
        margins = self.beta * (better - worse)
        right, wrong = (torch.nn.functional.logsigmoid(each) for each in (margins, -margins))
        smoothing = self.label_smoothing
        if self.loss == "robust":
            losses = (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)
        else:
            losses = -(1 - smoothing) * right - smoothing * wrong
        return losses.sum()
