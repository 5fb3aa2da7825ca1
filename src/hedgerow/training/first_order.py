"""Local training with first-order optimisers: what a client does between two rounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hedgerow.experiment import TrainingSettings
from hedgerow.training.job import Job, check_finite
from hedgerow.training.loss import batch_loss


def train(job: Job, parameters: Iterable[nn.Parameter]) -> float:
    """Train `parameters` of the job's network in place.

    Plain SGD without clipping and accumulation needs no gradient but that of one tensor at a time:
    each is applied and freed as soon as the backward pass has it.

    Returns:
        The mean loss per answer token over all steps.

    Raises:
        Diverged: the loss is not finite.
    """
    network, settings, trainable = job.network, job.settings, list(parameters)
    in_backward = _can_step_in_backward(settings)
    optimizer = None if in_backward else _optimizer(trainable, settings, job.learning_rate)
    total_loss, total_tokens = 0.0, 0
    devices = [network.device] if network.device.type == "cuda" else []
    network.train()
    # Dropout layers draw from the global generator only, so it is lent a seed and given back.
    with (
        torch.random.fork_rng(devices=devices),
        _stepping_in_backward(trainable if in_backward else [], settings, job.learning_rate),
    ):
        torch.manual_seed(job.dropout_seed)
        for step, (collated, step_tokens) in enumerate(job.steps(), start=1):
            loss_sum = 0.0
            for batch in collated:
                loss, _ = batch_loss(network, batch)
                # All tokens of a step weigh the same, in whichever of its forward passes they are.
                torch.autograd.backward(loss / max(step_tokens, 1))
                loss_sum += float(loss.detach())
            check_finite(loss_sum, step)
            if optimizer is not None:
                if settings.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            total_loss, total_tokens = total_loss + loss_sum, total_tokens + step_tokens
    network.eval()
    return total_loss / max(total_tokens, 1)


def _can_step_in_backward(settings: TrainingSettings) -> bool:
    return (
        settings.optimizer == "sgd"
        and settings.momentum == 0
        and settings.max_grad_norm is None
        and settings.gradient_accumulation == 1
    )


@contextmanager
def _stepping_in_backward(
    parameters: list[nn.Parameter], settings: TrainingSettings, learning_rate: float
) -> Iterator[None]:
    """SGD's step on each parameter at the moment at which its gradient is complete."""

    @torch.no_grad()
    def step(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if settings.weight_decay:
            parameter.grad.add_(parameter, alpha=settings.weight_decay)
        parameter.add_(parameter.grad, alpha=-learning_rate)
        parameter.grad = None

    handles = [
        p.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
        for p in parameters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _optimizer(
    parameters: list[nn.Parameter], settings: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay)
