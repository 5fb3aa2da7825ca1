"""The loss along the last round's step: whether global steps should be longer or shorter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.training.job import Job

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def losses_along(
    job: Job,
    step: Iterable[tuple[str, Factors]],
    lengths: Sequence[float],
    order: np.random.Generator,
) -> tuple[float, ...]:
    """The loss where the step that has led here had been so long, on the same examples for all.

    Args:
        job: with the network after the step; it is as it was afterwards.
        step: the last round's, ΔW = B·A of each module that it changed.
        lengths: in units of the step; 1 is where the network is.
        order: draws the examples, as many as a training step has.

    Returns:
        The mean loss at each length, per answer token or pair.
    """
    size = min(job.settings.batch_size * job.settings.gradient_accumulation, len(job.data))
    drawn = order.choice(len(job.data), size, replace=False)
    each = range(0, size, job.settings.batch_size)
    objective, data = job.objective, job.referring(job.data, drawn)
    indices = [drawn[first : first + job.settings.batch_size].tolist() for first in each]
    batches = [objective.collate(data, batch, job.pad_id) for batch in indices]
    count = sum(map(objective.count, batches))
    changes = dict(step)
    job.network.eval()
    found = []
    with torch.inference_mode():
        for length in lengths:
            with _changed(job.network, changes, length - 1):
                total = sum(float(objective.total(job.network, batch)) for batch in batches)
            found.append(total / count)
    return tuple(found)


@contextmanager
def _changed(network: Any, changes: dict[str, Factors], length: float) -> Iterator[None]:
    """The network with `length`·B·A beside the layers' weights, whatever is attached to these."""

    def hook(pair: Factors) -> Any:
        def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            A, B = (factor.to(output) for factor in pair)
            return output + length * ((inputs[0] @ A.T) @ B.T)

        return add

    handles: list[Any] = []
    before: dict[Tensor, Tensor] = {}
    for module, pair in changes.items() if length else ():
        found = _expert_of(network, module)
        if found is None:
            handles.append(network.get_submodule(module).register_forward_hook(hook(pair)))
            continue
        weight, expert, is_transposed = found
        before.setdefault(weight, weight.clone())
        product = length * pair.product().to(weight.device)
        weight[expert] = weight[expert].float() + (product.T if is_transposed else product)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, values in before.items():
            weight.copy_(values)


def _expert_of(network: Any, module: str) -> tuple[Tensor, int, bool] | None:
    """The weight that holds an expert's matrix, its number there, and whether it is transposed.

    None of a linear layer.
    """
    place, _, number = module.rpartition(".")
    owner, _, parameter = place.rpartition(".")
    if not number.isdecimal() or not owner:
        return None
    layer = network.get_submodule(owner)
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = getattr(layer, parameter, None)
    if not isinstance(weight, torch.nn.Parameter) or weight.ndim != 3:
        return None
    return weight, int(number), bool(getattr(layer, "is_transposed", False))
