"""Cross-entropy of answers: what training descends and evaluation reports."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hedgerow.errors import UserError
from hedgerow.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_NO_LOSS = -100

# Some models (GPT-2) advise a mask wherever they see padding; `token_losses` says why none is
# needed. The advice is given once a process, so muting each call alone would come to the same.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)


def batch_loss(
    network: Any, batch: Mapping[str, Tensor], *, router_coefficient: float = 0.0
) -> tuple[Tensor, int]:
    """The summed cross-entropy (natural logarithm) of a batch, and how many tokens it sums.

    Args:
        network: a causal language model of transformers.
        batch: see `token_losses`.
        router_coefficient: what the auxiliary loss of a mixture's routers counts, for each token
            that is summed, in the gradient alone; 0 where there are none.

    Returns:
        A differentiable float32 scalar on the network's device, and the number of label tokens.
    """
    if not router_coefficient:
        losses, rows = token_losses(network, batch)
        return losses.sum(), len(rows)
    auxiliary: list[Tensor] = []
    hook = network.register_forward_hook(lambda _, __, output: auxiliary.append(output.aux_loss))
    try:
        losses, rows = token_losses(network, batch, output_router_logits=True)
    finally:
        hook.remove()
    beside = router_coefficient * len(rows) * torch.stack(auxiliary).mean()
    return losses.sum() + (beside - beside.detach()), len(rows)


def check_router_loss(network: Any) -> None:
    """Raise a `UserError` where transformers has no auxiliary loss for a network's routers."""
    if "output_router_logits" not in inspect.signature(type(network).forward).parameters:
        raise UserError(
            "training.router_aux_loss_coef: transformers has no auxiliary loss for "
            f"{type(network).__name__}: leave it out"
        )


def token_losses(network: Any, batch: Mapping[str, Tensor], **inputs: Any) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token that has a label.

    No attention mask is passed: padding is on the right, so nothing before it attends to it, and it
    has no labels. Without a mask, attention takes its causal fast path. Logits are in the network's
    dtype, and made only at positions where some row has a label; cross-entropy is in float32.

    Where rotary frequencies follow the longest text of a batch (as Phi-3's LongRoPE), texts on
    either side of where they change go through the network apart, so that what a text comes to does
    not depend on those beside it.

    Args:
        network: a causal language model of transformers.
        batch: int64 `input_ids` and `labels` of shape (batch, length), as `data.collate` makes
            them: labels are not shifted, and -100 where there is no loss. A batch on the CPU serves
            a GPU best: what counts is then found without waiting for the device.
        inputs: what else the network is given, such as a key-value cache that the batch continues.

    Returns:
        Losses of shape (n,), float32, differentiable, on the network's device; and the row of the
        batch that each is from, shape (n,), on the batch's device. Both are ordered by row.
    """
    lengths = _lengths(batch["labels"])
    is_long = lengths > unscaled_positions(network)
    if not 0 < int(is_long.sum()) < len(lengths):
        return _token_losses(network, batch, **inputs)
    parts = []
    for chosen in ((~is_long).nonzero().squeeze(1), is_long.nonzero().squeeze(1)):
        longest = int(lengths[chosen].max())
        part = {name: batch[name][chosen, :longest] for name in ("input_ids", "labels")}
        losses, rows = _token_losses(network, part, **inputs)
        parts.append((losses, chosen[rows]))
    rows, order = torch.cat([rows for _, rows in parts]).sort(stable=True)
    return torch.cat([losses for losses, _ in parts])[order.to(network.device)], rows


def _token_losses(
    network: Any, batch: Mapping[str, Tensor], **inputs: Any
) -> tuple[Tensor, Tensor]:
    device = network.device
    labels = batch["labels"][:, 1:]  # position i predicts token i + 1
    positions = (labels != _NO_LOSS).any(dim=0).nonzero().squeeze(1)
    labels = labels[:, positions]
    rows, columns = (labels != _NO_LOSS).nonzero(as_tuple=True)
    kept = positions.to(device)
    keeps = _can_keep_logits(type(network).forward)
    if keeps:
        inputs["logits_to_keep"] = kept
    output = network(input_ids=batch["input_ids"].to(device), use_cache=False, **inputs)
    logits = output.logits if keeps else output.logits[:, kept]
    logits = logits[rows.to(device), columns.to(device)]
    targets = labels[rows, columns].to(device)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"), rows


def _lengths(labels: Tensor) -> Tensor:
    """Tokens of each row without its padding: up to the last label, as answers end texts."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != _NO_LOSS) * places).amax(dim=1)


def unscaled_positions(network: Any) -> int:
    """Longest text up to which rotary frequencies are those of short texts.

    It is `sys.maxsize` where they are the same in all texts.
    """
    config = getattr(network, "config", None)
    if config is None:
        return sys.maxsize
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    # They may be given for each kind of layer by itself.
    each = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    limits = [
        one.get("original_max_position_embeddings") or text.max_position_embeddings
        for one in each
        if one.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=sys.maxsize)


@functools.cache
def _can_keep_logits(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
