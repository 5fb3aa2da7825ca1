"""Local training with first-order optimisers: what a client does between two rounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from hedgerow.errors import UserError
from hedgerow.lazy import torch
from hedgerow.training import private_steps
from hedgerow.training.checkpointing import checkpointed
from hedgerow.training.job import OR_CLIP, Job, check_finite
from hedgerow.training.objectives.base import Batch, Objective
from hedgerow.training.optimizers import make_optimizer, optimizer_of
from hedgerow.training.routers import balanced_loss
from hedgerow.training.trainers import trainer_of
from hedgerow.wire import is_writable

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]
"""An optimiser's, by the parameter's name and what it is: `{name}/exp_avg` …"""


AfterBackward = Callable[[Mapping[str, "nn.Parameter"]], None]
"""Called in each step with the parameters by name, when their gradients are complete and before
they are clipped: adds a regulariser's, say. The first call is before any step was taken. It must
not read the examples themselves, which example-level privacy hides in the gradients alone."""


def train(
    job: Job,
    parameters: Mapping[str, nn.Parameter],
    *,
    after_backward: AfterBackward | None = None,
) -> float:
    """Train `parameters` of the job's network in place.

    Without clipping, accumulation and a hook, an optimiser that needs no gradient but that of one
    tensor at a time, as plain SGD, applies and frees each as soon as the backward pass has it.

    Args:
        job: the client's data and settings.
        parameters: what is trained, by name.
        after_backward: changes each step's gradients.

    Returns:
        The mean loss over all steps, per answer token or pair as the objective counts, without what
        a hook adds to it.

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
        state: as an earlier call with this optimiser returned it; for a parameter of which it has
            nothing, or what belongs to another shape, the optimiser begins anew.
        after_backward: as in `train`.

    Returns:
        The mean loss as `train` has it, and the optimiser's state.
    """
    network, settings, trainable = job.network, job.settings, list(parameters.values())
    if (trainer := job.trainer or trainer_of(settings)) is not None:
        if after_backward is not None or job.private is not None:
            raise UserError(
                f"training.trainer {trainer.name}: its steps cannot be changed, as the method or "
                "`privacy` needs it: leave it out"
            )
        return trainer.train(job, parameters), {}
    immediate = after_backward is None and job.private is None and _steps_immediately(job)
    optimizer = None
    if not immediate:
        optimizer = make_optimizer(parameters, settings, job.learning_rate)
        _restore(optimizer, parameters, state)
        pace = paced(optimizer, job)
    total_loss, total_tokens = 0.0, 0
    devices = [network.device] if network.device.type == "cuda" else []
    network.train()
    # Dropout layers draw from the global generator only, so it is lent a seed and given back.
    with (
        torch.random.fork_rng(devices=devices),
        checkpointed(network, settings.gradient_checkpointing),
        _stepping_in_backward(trainable, job) if immediate else nullcontext() as step_is_done,
    ):
        torch.manual_seed(job.dropout_seed)
        for step, (loss_sum, step_tokens) in enumerate(gradients(job, parameters)):
            if after_backward is not None:
                after_backward(parameters)
            if optimizer is not None:
                if settings.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
                pace(step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if step_is_done is not None:
                step_is_done()
            total_loss, total_tokens = total_loss + loss_sum, total_tokens + step_tokens
    network.eval()
    return total_loss / max(total_tokens, 1), _state(optimizer, parameters)


def gradients(job: Job, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[float, int]]:
    """Have the parameters the gradients of one step after another: noisy ones in private jobs.

    Yields:
        Summed loss of the step's answers, and their number of tokens (or of pairs).

    Raises:
        Diverged: the loss is not finite.
    """
    if job.private is not None:
        yield from private_steps.gradients(job, job.private, parameters)
        return
    for step, (collated, step_tokens) in enumerate(job.steps(), start=1):
        router = job.settings.router_aux_loss_coef
        loss = backward(job.objective, job.network, collated, step_tokens, step, router=router)
        yield loss, step_tokens


def backward(
    objective: Objective,
    network: Any,
    collated: Sequence[Batch],
    step_tokens: int,
    step: int,
    *,
    router: float = 0.0,
) -> float:
    """Add up the gradients of one step's batches; returns their summed loss.

    Args:
        objective: has made the batches.
        step_tokens: how many tokens, or pairs, they count.
        step: which one it is, for messages.
        router: coefficient of the routers' auxiliary loss.

    Raises:
        Diverged: the loss is not finite.
    """
    loss_sum = 0.0
    for batch in collated:
        loss = balanced_loss(objective, network, batch, router)
        # All tokens of a step weigh the same, in whichever of its forward passes they are.
        torch.autograd.backward(loss / max(step_tokens, 1))
        loss_sum += float(loss.detach())
    check_finite(loss_sum, step, OR_CLIP)
    return loss_sum


_PLAIN: dict[str, tuple[type[Any], str]] = {
    "none": (type(None), "uint8"),
    "bool": (bool, "uint8"),
    "int": (int, "int64"),
    "float": (float, "float64"),
}
"""What an optimiser may keep beside tensors: the ending of its key, its type, and the type of the
tensor without dimensions by which it is kept."""
_SHAPE = ":shape"
"""The key of a parameter's lengths, where what is kept of it has others."""


def _state(
    optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, nn.Parameter]
) -> State:
    """What the optimiser keeps of each parameter, on the CPU; of one that is odd, nothing."""
    state: State = {}
    for name, parameter in parameters.items():
        kept = _kept(optimizer.state[parameter], parameter) if optimizer else {}
        state |= {f"{name}/{what}": value for what, value in kept.items()}
    return state


def _kept(values: Mapping[Any, Any], parameter: nn.Parameter) -> State:
    """What is kept of one parameter: all that the optimiser has of it, or nothing."""
    kept: State = {}
    for what, value in values.items():
        if not isinstance(what, str) or "/" in what or ":" in what:
            return {}
        if isinstance(value, torch.Tensor):
            kept[what] = value.detach().cpu()  # the optimizer is gone, so nobody else steps it
            continue
        for ending, (kind, dtype) in _PLAIN.items():
            if type(value) is kind and not (kind is int and abs(value) >= 2**63):
                kept[f"{what}:{ending}"] = torch.tensor(value or 0, dtype=getattr(torch, dtype))
                break
        else:
            return {}
    if not all(is_writable(tensor) for tensor in kept.values()):
        return {}
    if any(tensor.shape not in ((), parameter.shape) for tensor in kept.values()):
        kept[_SHAPE] = torch.tensor([parameter.ndim, *parameter.shape])
    return kept


def _restore(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
) -> None:
    """Have the optimiser go on from what `_state` returned, where that fits the parameters."""
    kept: dict[str, dict[str, str]] = defaultdict(dict)
    for key in state:
        name, _, what = key.rpartition("/")
        kept[name][what] = key
    for name, parameter in parameters.items():
        # One parameter's at a time: read from a file, all of them would be there twice.
        values = {what: state[key] for what, key in kept[name].items()}
        shape = values.pop(_SHAPE, None)
        if shape is not None:
            fits = shape.tolist() == [parameter.ndim, *parameter.shape]
        else:
            fits = all(value.shape in ((), parameter.shape) for value in values.values())
        if fits:
            for key, value in values.items():
                what, _, ending = key.partition(":")
                optimizer.state[parameter][what] = _restored(value, ending, parameter)


def _restored(value: Tensor, ending: str, parameter: nn.Parameter) -> Any:
    if ending == "none":
        return None
    if ending:
        return _PLAIN[ending][0](value.item())
    # Counts of steps are on the CPU, wherever the parameter is.
    return value.to(parameter.device, copy=True) if value.shape else value.clone()


def _steps_immediately(job: Job) -> bool:
    """Whether optimiser and settings allow steps to be taken in backward passes."""
    settings = job.settings
    if settings.max_grad_norm is not None or settings.gradient_accumulation > 1:
        return False
    return optimizer_of(settings).immediate_step(job.learning_rate) is not None


@contextmanager
def _stepping_in_backward(parameters: list[nn.Parameter], job: Job) -> Iterator[Callable[[], None]]:
    """A step on each parameter at the moment at which its gradient is complete.

    Yields a function that is to be called when a step has been taken.
    """
    optimizer, done = optimizer_of(job.settings), 0
    take = optimizer.immediate_step(job.learning_rate * job.pace(done))

    @torch.no_grad()
    def step(parameter: Tensor) -> None:
        assert take is not None, "`_steps_immediately` has asked"
        take(parameter)
        parameter.grad = None

    def step_is_done() -> None:
        nonlocal done, take
        done += 1
        take = optimizer.immediate_step(job.learning_rate * job.pace(done))

    handles = [
        p.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
        for p in parameters
    ]
    try:
        yield step_is_done
    finally:
        for handle in handles:
            handle.remove()


def paced(optimizer: torch.optim.Optimizer, job: Job) -> Callable[[int], None]:
    """Function that gives the optimiser the learning rate of a step (0, 1, …) of the job.

    Raises:
        UserError: it has no learning rate that could change.
    """
    settings = job.settings
    if settings.local_schedule == "constant" and not settings.warmup_steps:
        return lambda step: None
    if not all("lr" in group for group in optimizer.param_groups):
        raise UserError(
            f"training.optimizer {settings.optimizer}: has no learning rate (`lr` of its groups) "
            "that could change in a round: leave out training.local_schedule and warmup_steps"
        )
    rates = [group["lr"] for group in optimizer.param_groups]

    def begin(step: int) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * job.pace(step)

    return begin
