"""Muon: steps along the momentum's nearest orthogonal matrix; AdamW for what is no such matrix.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/; Liu et al., "Muon is Scalable for LLM Training",
arXiv 2502.16982.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hedgerow.lazy import torch
from hedgerow.training.optimizers.base import Optimizer

if TYPE_CHECKING:
    from torch import nn

Decay = Annotated[float, Field(ge=0, lt=1)]


class Muon(Optimizer):
    """torch.optim.Muon for matrices of hidden layers, torch.optim.AdamW for the rest."""

    name: str = "muon"

    momentum: float = Field(0.95, ge=0, lt=1)
    """Share (0 or more, below 1) of the running average of gradients that is left after a step; by
    default 0.95."""
    nesterov: bool = True
    """Whether steps look ahead by the momentum; by default they do."""
    weight_decay: float = Field(0.0, ge=0)
    """Share of the weights, times the learning rate, that a step takes off them, AdamW's as well;
    by default 0."""
    ns_steps: int = Field(5, ge=1, lt=100)
    """Newton-Schulz iterations (1 to 99) towards the orthogonal matrix; by default 5."""
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Coefficients a, b and c (without a unit) of an iteration's X <- a·X + b·(XXᵀ)·X + c·(XXᵀ)²·X;
    by default those of the post."""
    eps: float = Field(1e-7, gt=0)
    """Least norm (above 0) that the momentum is divided by before the iterations; by default
    1e-7."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """Factor of the learning rate of an (m, n) matrix. `original`, the default: √max(1, m/n);
    `match_rms_adamw`: 0.2·√max(m, n), with which learning rates of AdamW go on to fit."""
    adamw_for: tuple[str, ...] = ("embed", "lm_head", "wte", "wpe")
    """Parts of the names of matrices that AdamW steps nevertheless, as embeddings and output
    layers, which these are."""
    adamw_scale: float = Field(1.0, gt=0)
    """AdamW's learning rate (above 0) in units of Muon's; by default 1."""
    adamw_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's `betas`."""
    adamw_eps: float = Field(1e-8, ge=0)
    """AdamW's `eps`."""

    def build(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float
    ) -> torch.optim.Optimizer:
        """torch's Muon, torch's AdamW, or one that steps both."""
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in parameters.items():
            is_hidden = parameter.ndim == 2 and not any(part in name for part in self.adamw_for)
            (matrices if is_hidden else rest).append(parameter)
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers.append(
                torch.optim.Muon(
                    matrices,
                    lr=learning_rate,
                    weight_decay=self.weight_decay,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    ns_coefficients=self.ns_coefficients,
                    eps=self.eps,
                    ns_steps=self.ns_steps,
                    adjust_lr_fn=self.adjust_lr_fn,
                )
            )
        if rest:
            optimizers.append(
                torch.optim.AdamW(
                    rest,
                    lr=learning_rate * self.adamw_scale,
                    betas=self.adamw_betas,
                    eps=self.adamw_eps,
                    weight_decay=self.weight_decay,
                )
            )
        return optimizers[0] if len(optimizers) == 1 else _side_by_side(optimizers)


def _side_by_side(optimizers: list[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """One optimiser that steps several, each of one group, on their parameters."""

    # In here, as it could not be defined without importing torch.
    class SideBySide(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([each.param_groups[0] for each in optimizers], {})

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for each, group in zip(optimizers, self.param_groups, strict=True):
                # What is kept, and what a schedule changes, is this optimiser's.
                each.state, each.param_groups = self.state, [group]
                each.step()
            return loss

    return SideBySide()
