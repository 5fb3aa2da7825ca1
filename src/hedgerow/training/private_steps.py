"""Gradients that hide each example: bounded one by one, summed, with noise (DP-SGD).

Abadi et al., "Deep Learning with Differential Privacy", arXiv 1607.00133, algorithm 1:

    each step:  S: each of n examples with probability q, independently (Poisson sampling)
                g = (Σ_{i in S} min(1, C/‖g_i‖)·g_i + N(0, (z·C)²)) / (q·n)

g_i is the gradient of one example's own mean loss over its answer tokens, or of a pair's loss.
Nothing else of a step depends on the examples: not what it is divided by, nor whether there is a
step, so that what any optimiser makes of g costs nothing more. Each example has a backward pass of
its own, which is exact for whatever trains, in networks of any kind, and needs no padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hedgerow.lazy import torch
from hedgerow.training.job import SealedExamples
from hedgerow.training.routers import balanced_loss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.privacy.example_level import GaussianSteps
    from hedgerow.training.job import Job


def gradients(
    job: Job, private: GaussianSteps, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[float, int]]:
    """Have the parameters the noisy gradients of one step after another.

    Yields:
        Summed loss of the sampled examples' answers, and their number of tokens; both are 0 in a
        step without examples. They are not private.

    Raises:
        UserError: the round has one more training than is accounted for.
    """
    examples, objective = job.referring(SealedExamples.open(job.data)), job.objective
    private.begin()
    for step in range(private.count):
        # Pieces of one step's work are freed before the next: sums are as large as what trains.
        sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
        total_loss, total_tokens = 0.0, 0
        for index, seed in private.sampled(len(examples), step):
            # Dropout that differed by who else is in the sample would tell of them.
            torch.manual_seed(seed)
            batch = objective.collate(examples, [index], job.pad_id)
            loss = balanced_loss(objective, job.network, batch, job.settings.router_aux_loss_coef)
            tokens = objective.count(batch)
            torch.autograd.backward(loss / max(tokens, 1))
            _add_bounded(sums, parameters, private.clip)
            total_loss, total_tokens = total_loss + float(loss.detach()), total_tokens + tokens
        private.add_noise(sums, step)
        for name, parameter in parameters.items():
            parameter.grad = sums.pop(name).div_(private.expected).to(parameter.dtype)
        yield total_loss, total_tokens


def _add_bounded(
    sums: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], clip: float
) -> None:
    """Add one example's gradient, scaled down to a 2-norm of `clip`, and free it.

    One that is not finite counts as zero: that training failed would tell of the example.
    """
    found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in found.values()]
    length = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    if math.isfinite(length):
        for name, gradient in found.items():
            sums[name].add_(gradient, alpha=min(1.0, clip / length) if length else 1.0)
    for parameter in parameters.values():
        parameter.grad = None
