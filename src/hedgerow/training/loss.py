"""Cross-entropy of answers: what training descends and evaluation reports."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    rows_there, columns_there = rows.to(device), columns.to(device)
    keeps = _can_keep_logits(type(network).forward)
    if keeps:
        inputs["logits_to_keep"] = kept
    with _only_at(network, len(labels), len(kept), rows_there, columns_there) as is_gathered:
        output = network(input_ids=batch["input_ids"].to(device), use_cache=False, **inputs)
    if is_gathered:
        logits = output.logits[0]
    else:
        logits = output.logits if keeps else output.logits[:, kept]
        logits = logits[rows_there, columns_there]
    targets = labels[rows, columns].to(device)
    return _cross_entropies(logits, targets), rows


_AT_ONCE = 1 << 25
"""Logits whose cross-entropy is taken at a time: in float32, 128 MiB."""


def _cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row of logits, shape (n, vocabulary), in float32.

    Many are done some rows at a time, and those again in the backward pass. So neither the logits
    of a model in half precision nor their logarithms of probabilities are ever all there in
    float32: of a vocabulary of 128,000 they would take more than the layers' activations. No row's
    numbers depend on others.
    """
    rows = max(1, _AT_ONCE // logits.shape[1])
    if len(logits) <= rows:
        return _in_float32(logits, targets)
    parts = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    losses = [
        torch.utils.checkpoint.checkpoint(
            _in_float32, *part, use_reentrant=False, preserve_rng_state=False
        )
        for part in parts
    ]
    return torch.cat(losses)


def _in_float32(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def _only_at(
    network: Any, height: int, width: int, rows: Tensor, columns: Tensor
) -> Iterator[list[bool]]:
    """Have the output layer compute nothing but the logits that count, one after another.

    Args:
        network: a causal language model of transformers.
        height: number of rows of the batch.
        width: number of positions at which logits are asked for.
        rows: row of each logit that counts, shape (n,).
        columns: which of the positions it is at, shape (n,).

    Yields:
        A list that is not empty where it did, and is where no layer reads states of such a shape.
    """
    done: list[bool] = []

    def gather(layer: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not arguments or arguments[0].shape[:-1] != (height, width):
            return arguments
        done.append(True)
        states, *more = arguments
        return states[rows, columns].unsqueeze(0), *more

    layer = getattr(network, "get_output_embeddings", lambda: None)()
    if layer is None:
        yield done
        return
    handle = layer.register_forward_pre_hook(gather)
    try:
        yield done
    finally:
        handle.remove()


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
