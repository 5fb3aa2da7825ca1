"""Local training with first-order optimisers: what a client does between two rounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hedgerow.lazy import torch
from hedgerow.settings import TrainingSettings
from hedgerow.training.job import Job, check_finite
from hedgerow.training.loss import batch_loss

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]
"""An optimiser's, by the parameter's name and what it is: `{name}/exp_avg` …"""


AfterBackward = Callable[[Mapping[str, "nn.Parameter"]], None]
"""Called in each step with the parameters by name, when their gradients are complete and before
they are clipped: adds a regulariser's, say. The first call is before any step was taken."""


def train(
    job: Job,
    parameters: Mapping[str, nn.Parameter],
    *,
    after_backward: AfterBackward | None = None,
) -> float:
    """Train `parameters` of the job's network in place.

    Plain SGD without clipping and accumulation needs no gradient but that of one tensor at a time:
    each is applied and freed as soon as the backward pass has it (unless there is a hook).

    Args:
        job: the client's data and settings.
        parameters: what is trained, by name.
        after_backward: changes each step's gradients.

    Returns:
        The mean loss per answer token over all steps, without what a hook adds to it.

    Raises:
        Diverged: the loss is not finite.
    """
    return continue_training(job, parameters, {}, after_backward=after_backward)[0]


def continue_training(
    job: Job,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
    *,
    after_backward: AfterBackward | None = None,
) -> tuple[float, State]:
    """`train` with an optimiser that goes on from where it was.

    Args:
        state: as an earlier call returned it for parameters of the same names and shapes; where a
            parameter has none, or one of another shape, the optimiser begins anew for it.
        after_backward: as in `train`.

    Returns:
        The mean loss as `train` has it, and the optimiser's state.
    """
    network, settings, trainable = job.network, job.settings, list(parameters.values())
    in_backward = after_backward is None and _can_step_in_backward(settings)
    optimizer = None if in_backward else make_optimizer(trainable, settings, job.learning_rate)
    if optimizer is not None:
        _restore(optimizer, parameters, state)
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
            loss_sum = backward(network, collated, step_tokens, step)
            if after_backward is not None:
                after_backward(parameters)
            if optimizer is not None:
                if settings.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            total_loss, total_tokens = total_loss + loss_sum, total_tokens + step_tokens
    network.eval()
    return total_loss / max(total_tokens, 1), _state(optimizer, parameters)


def backward(
    network: Any, collated: Sequence[Mapping[str, Tensor]], step_tokens: int, step: int
) -> float:
    """Add up the gradients of one step's batches; returns their summed loss.

    Args:
        step_tokens: how many tokens the batches have labels for.
        step: which one it is, for messages.

    Raises:
        Diverged: the loss is not finite.
    """
    loss_sum = 0.0
    for batch in collated:
        loss, _ = batch_loss(network, batch)
        # All tokens of a step weigh the same, in whichever of its forward passes they are.
        torch.autograd.backward(loss / max(step_tokens, 1))
        loss_sum += float(loss.detach())
    check_finite(loss_sum, step)
    return loss_sum


def _state(
    optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, nn.Parameter]
) -> State:
    """What the optimiser keeps of each parameter, on the CPU."""
    return {
        f"{name}/{what}": value.detach().cpu()
        for name, parameter in parameters.items()
        for what, value in (optimizer.state[parameter] if optimizer else {}).items()
        if isinstance(value, torch.Tensor)
    }


def _restore(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
) -> None:
    kept: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in state:
        name, _, what = key.rpartition("/")
        kept[name][what] = state[key]
    for name, parameter in parameters.items():
        if all(value.shape in ((), parameter.shape) for value in kept[name].values()):
            optimizer.state[parameter].update(
                {w: v.to(parameter.device) if v.shape else v for w, v in kept[name].items()}
            )


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
    def step(parameter: Tensor) -> None:
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


def make_optimizer(
    parameters: list[nn.Parameter], settings: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser that the experiment names."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay)
