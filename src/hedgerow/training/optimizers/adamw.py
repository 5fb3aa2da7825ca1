"""AdamW: steps by running averages of gradients and of their squares, and decoupled decay.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hedgerow.lazy import torch
from hedgerow.training.optimizers.base import Optimizer

if TYPE_CHECKING:
    from torch import nn

Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Optimizer):
    """torch.optim.AdamW; how it is computed (`foreach`, `fused` …) is left to torch."""

    name: str = "adamw"

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Shares (0 or more, below 1) of the running averages of gradients and of their squares that
    are left after a step; by default 0.9 and 0.999."""
    eps: float = Field(1e-8, ge=0)
    """Term (0 or more) beside the root of the average square, which steps are divided by; by
    default 1e-8."""
    weight_decay: float = Field(0.0, ge=0)
    """Share of the weights, times the learning rate, that a step takes off them; by default 0."""
    amsgrad: bool = False
    """Whether steps are divided by the largest average square so far (arXiv 1904.09237), not the
    present one; by default not."""

    def build(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float
    ) -> torch.optim.Optimizer:
        """torch's."""
        return torch.optim.AdamW(
            list(parameters.values()),
            lr=learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
        )
