"""AdamW whose running averages have 8 bits each.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, as bitsandbytes
has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from hedgerow.errors import UserError
from hedgerow.lazy import bitsandbytes
from hedgerow.training.optimizers.base import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamW8bit(Optimizer):
    """bitsandbytes' AdamW8bit: a quarter of AdamW's memory, for tensors of 4,096 numbers on."""

    libraries = ("bitsandbytes",)

    name: str = "adamw_8bit"

    is_paged: ClassVar[bool] = False
    """Whether averages may go to the host's memory where the GPU's is full."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Shares (0 or more, below 1) of the running averages of gradients and of their squares that
    are left after a step; by default 0.9 and 0.999."""
    eps: float = Field(1e-8, ge=0)
    """Term (0 or more) beside the root of the average square, which steps are divided by; by
    default 1e-8."""
    weight_decay: float = Field(0.0, ge=0)
    """Share of the weights, times the learning rate, that a step takes off them; by default 0."""
    min_8bit_size: int = Field(4096, ge=0)
    """Number of numbers of a tensor from which on its averages have 8 bits; those of smaller ones
    have 32, as they need little. By default 4096."""

    def check(self, device: torch.device) -> None:
        """Raise a `UserError` without bitsandbytes, and for pages where there is no GPU."""
        super().check(device)
        if self.is_paged and device.type == "cpu":
            raise UserError(
                f"training.optimizer {self.name}: pages go between a GPU and the host, and "
                "model.device is the CPU: take adamw_8bit"
            )

    def build(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float
    ) -> torch.optim.Optimizer:
        """bitsandbytes'."""
        kind = bitsandbytes.optim.PagedAdamW8bit if self.is_paged else bitsandbytes.optim.AdamW8bit
        optimizer: torch.optim.Optimizer = kind(
            list(parameters.values()),
            lr=learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )
        return optimizer
