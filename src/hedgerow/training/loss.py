"""Cross-entropy of answers: what training descends and evaluation reports."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hedgerow.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_NO_LOSS = -100

# Some models (GPT-2) advise a mask wherever they see padding; `token_losses` says why none is
# needed. The advice is given once a process, so muting each call alone would come to the same.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)


def batch_loss(network: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The summed cross-entropy (natural logarithm) of a batch, and how many tokens it sums.

    Args:
        network: a causal language model of transformers.
        batch: see `token_losses`.

    Returns:
        A differentiable float32 scalar on the network's device, and the number of label tokens.
    """
    losses, rows = token_losses(network, batch)
    return losses.sum(), len(rows)


def token_losses(network: Any, batch: Mapping[str, Tensor], **inputs: Any) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token that has a label.

    No attention mask is passed: padding is on the right, so nothing before it attends to it, and it
    has no labels. Without a mask, attention takes its causal fast path. Logits are in the network's
    dtype, and made only at positions where some row has a label; cross-entropy is in float32.

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


@functools.cache
def _can_keep_logits(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
