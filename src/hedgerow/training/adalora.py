"""Local training of ΔW = P·Λ·Q within a budget of rank (AdaLoRA, arXiv 2303.10512, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hedgerow.lazy import peft, torch
from hedgerow.training import first_order
from hedgerow.training.checkpointing import checkpointed
from hedgerow.training.job import Job
from hedgerow.training.optimizers import make_optimizer

if TYPE_CHECKING:
    from torch import Tensor, nn


def train(
    job: Job,
    parameters: Mapping[str, nn.Parameter],
    *,
    initial: int,
    target: int,
    orthogonality: float,
) -> float:
    """Train peft's AdaLoRA layers, and set all but the most important singular values to zero.

    The budget is whole in the first tenth of the steps, the target's in the last fifth, and falls
    with the cube of the steps between.

    Args:
        job: its network has the layers attached, under peft's adapter name `default`.
        parameters: by PEFT's key names, which end in `lora_A` (Q, of shape (initial, n)), `lora_E`
            (Λ, of shape (initial, 1)) or `lora_B` (P, of shape (m, initial)).
        initial: the rank of each matrix before the first step.
        target: the rank of a matrix after the last one, on average over all.
        orthogonality: what the mean of ‖PᵀP - I‖_F and ‖QQᵀ - I‖_F counts in the loss.

    Returns:
        The mean loss per answer token over all steps, without the regulariser.

    Raises:
        Diverged: the loss is not finite.
    """
    network, settings, trainable = job.network, job.settings, list(parameters.values())
    steps = job.most_steps
    last_cut = steps - steps // 5
    allocator = peft.tuners.adalora.layer.RankAllocator(
        network,
        peft.AdaLoraConfig(
            target_r=target,
            init_r=initial,
            tinit=steps // 10,
            tfinal=steps - last_cut,
            total_step=steps,
        ),
        "default",
    )
    optimizer = make_optimizer(parameters, settings, job.learning_rate)
    pace = first_order.paced(optimizer, job)
    vectors = {name: p for name, p in parameters.items() if not name.endswith("lora_E")}
    survivors = None
    total_loss, total_tokens = 0.0, 0
    devices = [network.device] if network.device.type == "cuda" else []
    network.train()
    with (
        torch.random.fork_rng(devices=devices),
        checkpointed(network, settings.gradient_checkpointing),
    ):
        torch.manual_seed(job.dropout_seed)
        each = first_order.gradients(job, parameters)
        for step, (loss_sum, step_tokens) in enumerate(each, start=1):
            torch.autograd.backward(orthogonality * non_orthogonality(vectors))
            for parameter in trainable:
                if parameter.grad is None:  # as of a layer that only chooses what others read
                    parameter.grad = torch.zeros_like(parameter)
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
            pace(step - 1)
            optimizer.step()
            if step <= last_cut:
                allocator.update_ipt(network)
                budget, due = allocator.budget_schedule(step)
                if (due or step == last_cut) and budget < allocator.init_bgt:
                    survivors = allocator.mask_to_budget(network, budget)
            elif survivors is not None:
                allocator.mask_using_rank_pattern(network, survivors)
            optimizer.zero_grad(set_to_none=True)
            total_loss, total_tokens = total_loss + loss_sum, total_tokens + step_tokens
    network.eval()
    return total_loss / max(total_tokens, 1)


def non_orthogonality(vectors: Mapping[str, Tensor]) -> Tensor:
    """The mean of ‖QQᵀ - I‖_F and ‖PᵀP - I‖_F over all matrices, as peft's AdaLoraModel has it."""
    distances = []
    for name, factor in vectors.items():
        rows = factor if name.endswith("lora_A") else factor.T
        distances.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows)).to(rows)))
    return torch.stack(distances).mean()
