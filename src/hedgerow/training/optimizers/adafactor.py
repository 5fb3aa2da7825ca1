"""Adafactor: of a matrix of squared gradients, only row and column averages are kept.

Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
arXiv 1804.04235, algorithm 4, as torch has it: step sizes relative to the weights, and no momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hedgerow.lazy import torch
from hedgerow.training.optimizers.base import Optimizer

if TYPE_CHECKING:
    from torch import nn

NotNegative = Annotated[float, Field(ge=0)]


class Adafactor(Optimizer):
    """torch.optim.Adafactor; how it is computed (`foreach`) is left to torch.

    The learning rate is the most that the t-th step, of 1/√t in units of the weights, may be.
    """

    name: str = "adafactor"

    beta2_decay: float = Field(-0.8, le=0)
    """Exponent c (0 or less) of the share 1 - t^c of the average squares that is left after step t;
    by default -0.8."""
    eps: tuple[NotNegative | None, NotNegative] = (None, 1e-3)
    """Least root of an average square that a step is divided by, null being float precision's; and
    least size of weights that steps are in units of. Both are 0 or more; by default null and
    1e-3."""
    d: float = Field(1.0, ge=1)
    """Root mean square (1 or more) that longer steps, in units of the averages, are cut to; by
    default 1."""
    weight_decay: float = Field(0.0, ge=0)
    """Share of the weights, times the learning rate, that a step takes off them; by default 0."""

    def build(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float
    ) -> torch.optim.Optimizer:
        """torch's."""
        return torch.optim.Adafactor(
            list(parameters.values()),
            lr=learning_rate,
            beta2_decay=self.beta2_decay,
            eps=self.eps,
            d=self.d,
            weight_decay=self.weight_decay,
        )
