"""The auxiliary loss of a mixture's routers, beside whatever objective is learnt."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from hedgerow.errors import UserError
from hedgerow.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.training.objectives.base import Batch, Objective


def balanced_loss(objective: Objective, network: Any, batch: Batch, coefficient: float) -> Tensor:
    """The loss of a batch, with gradients that also spread tokens over a mixture's experts.

    Args:
        objective: has made the batch.
        network: a causal language model of transformers.
        batch: as `Objective.collate` makes it.
        coefficient: what the auxiliary loss of the routers (Fedus et al., "Switch Transformers",
            arXiv 2101.03961, equation 4) counts, for each token, pair or answer that is summed, in
            the gradient alone; with 0 it is not made.

    Returns:
        What `Objective.total` returns, a differentiable float32 scalar.
    """
    if not coefficient:
        return objective.total(network, batch)
    auxiliary: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        if output.aux_loss.requires_grad:  # a pass beside, as KTO's, has no gradient
            auxiliary.append(output.aux_loss)

    hooks = [
        network.register_forward_pre_hook(_asking, with_kwargs=True),
        network.register_forward_hook(keep),
    ]
    try:
        loss = objective.total(network, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not auxiliary:
        return loss
    beside = coefficient * objective.count(batch) * torch.stack(auxiliary).mean()
    return loss + (beside - beside.detach())


def check_router_loss(network: Any) -> None:
    """Raise a `UserError` where transformers has no auxiliary loss for a network's routers."""
    if "output_router_logits" not in inspect.signature(type(network).forward).parameters:
        raise UserError(
            "training.router_aux_loss_coef: transformers has no auxiliary loss for "
            f"{type(network).__name__}: leave it out"
        )


def _asking(_: Any, arguments: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return arguments, {**inputs, "output_router_logits": True}
