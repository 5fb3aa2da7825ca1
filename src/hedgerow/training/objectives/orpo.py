"""ORPO: the likelihood of better answers, and the odds of them beside those of worse ones.

Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691,
equations 5 to 7. With P the geometric mean of the probabilities of an answer's tokens,

    odds(y|x) = P(y|x) / (1 - P(y|x))
    loss = -log π(y_w|x) per token  -  β·log σ(log(odds(y_w|x) / odds(y_l|x)))

TRL and the authors' code take the first term over prompt and answer: so does `data.loss_on: all`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hedgerow.data import Tokenized
from hedgerow.lazy import torch
from hedgerow.training.loss import token_losses
from hedgerow.training.objectives.answers import collate_both, summed
from hedgerow.training.objectives.base import Batch, Objective

if TYPE_CHECKING:
    from torch import Tensor


class ORPO(Objective):
    """Supervised fine-tuning on better answers, with a term that makes worse ones less likely.

    It needs no reference. Its first term counts the tokens that `data.loss_on` names, of which all
    of a batch weigh the same.
    """

    name: str = "orpo"
    learns = "pairs"
    loss_on = ("answer", "all")

    beta: float = Field(0.1, gt=0)
    """Factor (above 0, the paper's λ) of the odds ratio's term, by default 0.1."""

    def collate(self, examples: Tokenized, indices: Sequence[int], pad_id: int) -> Batch:
        """Better answers, then worse ones, of which no prompt is learnt."""
        batch = collate_both(examples, indices, pad_id, refers=False)
        worse = torch.arange(len(batch["labels"])) >= len(indices)
        batch["labels"] = batch["labels"].masked_fill(worse[:, None] & ~batch["answers"], -100)
        return batch

    def count(self, batch: Batch) -> int:
        """Number of pairs."""
        return len(batch["labels"]) // 2

    def total(self, network: Any, batch: Batch) -> Tensor:
        """Sum over pairs; each has the batch's mean of the first term."""
        pairs = self.count(batch)
        losses, rows = token_losses(network, batch)
        # Places are found on the CPU, where the batch is, without waiting for a GPU.
        likelihood = losses[_places(rows < pairs, losses)].mean()
        # Losses are in the order of the labels that are predicted, row by row.
        is_answer = batch["answers"][:, 1:][batch["labels"][:, 1:] != -100]
        found, tokens = summed(-losses[_places(is_answer, losses)], rows[is_answer], 2 * pairs)
        better, worse = (found / tokens.clamp(min=1)).chunk(2)
        log_odds = (better - worse) - (_log1mexp(better) - _log1mexp(worse))
        ratios = torch.nn.functional.logsigmoid(log_odds)
        return pairs * likelihood - self.beta * ratios.sum()


def _places(mask: Tensor, where: Tensor) -> Tensor:
    """Places of a mask's true entries, shape (n,), on the device of another tensor."""
    return mask.nonzero().squeeze(1).to(where.device)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, which loses no digits (Mächler, 2012)."""
    near = x > -math.log(2)
    # Each branch gets a number that it can take, since gradients go through both.
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), far)
