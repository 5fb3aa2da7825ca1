"""KTO: answers that are labelled as good or bad, weighed as people weigh gains and losses.

Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306,
equations 7 and 8:

    r = log(π(y|x) / π_ref(y|x)),   z = max(0, mean over the batch of log(π(y'|x) / π_ref(y'|x)))

    loss:  λ_D·(1 - σ(β(r - z))) of a good answer,   λ_U·(1 - σ(β(z - r))) of a bad one

z estimates how far the model is from the reference by answers y' to other prompts; no gradient goes
through it. The paper takes y' from the same batch. Here a prompt's y' is the answer of the example
before it in the client's data, so that its log-likelihood under the reference is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hedgerow.data import Tokenized
from hedgerow.lazy import torch
from hedgerow.training.objectives.answers import collate_both, log_likelihoods
from hedgerow.training.objectives.base import Batch, Objective, Reference

if TYPE_CHECKING:
    from torch import Tensor


class KTO(Objective):
    """Rewards of good answers are to be above the batch's average one, of bad answers below it.

    A pair of a better and a worse answer counts as one good and one bad answer.
    """

    name: str = "kto"
    learns = "labels"
    separable = False

    beta: float = Field(0.1, gt=0)
    """Factor β (above 0) of the rewards, by default 0.1: a larger one keeps the model nearer to the
    reference."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight λ_D (above 0) of good answers, by default 1; where they are fewer than bad ones, one
    with which both weigh about the same is advised."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight λ_U (above 0) of bad answers, by default 1."""
    reference: Reference = "base"
    """Model that rewards are beside, by default the `base` that the run began with; `round`: the
    one with which a client begins its training in each round."""

    @property
    def refers_to(self) -> Reference:
        """`reference`."""
        return self.reference

    @property
    def reward_scale(self) -> float:
        """β."""
        return self.beta

    def collate(self, examples: Tokenized, indices: Sequence[int], pad_id: int) -> Batch:
        """Answers, then those of other prompts, and which of the former are good."""
        batch = collate_both(examples, indices, pad_id, refers=True)
        chosen = [int(index) for index in indices]
        good = examples.desirable
        flags = [True] * len(chosen) if good is None else good[chosen].tolist()
        return batch | {"desirable": torch.tensor(flags)}

    def count(self, batch: Batch) -> int:
        """Number of answers."""
        return len(batch["desirable"])

    def total(self, network: Any, batch: Batch) -> Tensor:
        """Sum over answers."""
        matched, mismatched = _halves(batch)
        with torch.no_grad():
            other = _ratios(network, mismatched)
        divergence = other.mean().clamp(min=0)
        rewards = self.beta * (_ratios(network, matched) - divergence)
        good = batch["desirable"].to(rewards.device)
        losses = torch.where(
            good,
            self.desirable_weight * (1 - rewards.sigmoid()),
            self.undesirable_weight * (1 - (-rewards).sigmoid()),
        )
        return losses.sum()


def _ratios(network: Any, batch: Batch) -> Tensor:
    """log(π(y|x) / π_ref(y|x)) of each row."""
    found, _ = log_likelihoods(network, batch)
    return found - batch["reference"].to(found.device)


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    """The answers of a batch, and those of other prompts."""
    parts = {name: batch[name].chunk(2) for name in ("input_ids", "labels", "reference")}
    first, second = ({name: part[n] for name, part in parts.items()} for n in (0, 1))
    return first, second
