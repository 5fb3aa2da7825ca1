"""Local training with first-order optimisers: what a client does between two rounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hedgerow.data import Encoded, batches, collate, epoch
from hedgerow.experiment import TrainingSettings
from hedgerow.training.loss import batch_loss


class Diverged(Exception):
    """The loss is no longer a number; the text says when, and what may help."""


def train(
    network: Any,
    parameters: Iterable[nn.Parameter],
    data: Encoded,
    settings: TrainingSettings,
    learning_rate: float,
    pad_id: int,
    order: np.random.Generator,
    dropout_seed: int,
) -> float:
    """Train `parameters` of `network` in place on one client's data.

    Args:
        order: draws the examples and the order of the batches.
        dropout_seed: of the network's dropout layers.

    Returns:
        The mean loss per answer token over all steps.

    Raises:
        Diverged: the loss is not finite.
    """
    trainable = list(parameters)
    optimizer = _optimizer(trainable, settings, learning_rate)
    total_loss, total_tokens = 0.0, 0
    devices = [network.device] if network.device.type == "cuda" else []
    network.train()
    # Dropout layers draw from the global generator only, so it is lent a seed and given back.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(dropout_seed)
        for step, micro_batches in enumerate(_steps(data, settings, order), start=1):
            loss_sum, tokens = 0.0, 0
            collated = [collate([data[i] for i in indices], pad_id) for indices in micro_batches]
            # All tokens of a step weigh the same, in whichever of its forward passes they are.
            step_tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in collated)
            for batch in collated:
                loss, count = batch_loss(network, batch)
                torch.autograd.backward(loss / max(step_tokens, 1))
                loss_sum, tokens = loss_sum + float(loss.detach()), tokens + count
            if not np.isfinite(loss_sum):
                raise Diverged(
                    f"its loss was {loss_sum} at step {step}: a lower training.learning_rate or "
                    "training.max_grad_norm may help"
                )
            if settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total_loss, total_tokens = total_loss + loss_sum, total_tokens + tokens
    network.eval()
    return total_loss / max(total_tokens, 1)


def learning_rate(settings: TrainingSettings, round: int, rounds: int) -> float:
    """The learning rate of a round (1 … rounds): whole in the first, smaller later by schedule."""
    done = (round - 1) / rounds
    factor = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + float(np.cos(np.pi * done))) / 2,
    }[settings.schedule]
    return settings.learning_rate * factor


def _steps(
    data: Encoded, settings: TrainingSettings, order: np.random.Generator
) -> Iterator[Sequence[np.ndarray]]:
    """The micro-batches of each optimiser step."""
    accumulate = settings.gradient_accumulation
    if settings.epochs is not None:
        each = [epoch(data.lengths, settings.batch_size, order) for _ in range(settings.epochs)]
        drawn = [batch for one in each for batch in one]
    else:
        count = (settings.steps or 10) * accumulate
        drawn = batches(data.lengths, settings.batch_size, count, order)
    for first in range(0, len(drawn), accumulate):
        yield drawn[first : first + accumulate]


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
