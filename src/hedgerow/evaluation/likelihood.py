"""How likely a model finds given answers, whole test sets at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hedgerow.data import Example, collate
from hedgerow.training.loss import token_losses
from hedgerow.workers import ALONE, Workers

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Tick = Callable[[int], None]
"""Is told how many more examples are done."""


def losses(
    network: Any,
    lengths: npt.NDArray[np.integer],
    read: Callable[[int], Example],
    batch_size: int,
    tick: Tick,
    workers: Workers = ALONE,
) -> tuple[Float64, Int64]:
    """The summed cross-entropy of each example, and how many tokens it sums; each of shape (n,).

    Args:
        lengths: shape (n,): tokens of each example.
        read: gives an example by its index.
        workers: who take batches side by side.
    """
    sums = np.zeros(len(lengths))
    counts = np.zeros(len(lengths), dtype=np.int64)
    made = batches(lengths, batch_size)

    def score(batch: Int64) -> tuple[Float64, Int64]:
        return batch_losses(network, [read(i) for i in batch.tolist()])

    for batch, found in zip(made, workers.map(score, made), strict=True):
        sums[batch], counts[batch] = found
        tick(len(batch))
    return sums, counts


def batch_losses(network: Any, examples: Sequence[Example], **inputs: Any) -> tuple[Float64, Int64]:
    """As `losses`, in one forward pass; `inputs` are what else the network is given."""
    # What stands in the padding makes no difference, so any token will do.
    by_token, rows = token_losses(network, collate(examples, pad_id=0), **inputs)
    weights = by_token.to("cpu", torch.float64).numpy()
    sums = np.bincount(rows.numpy(), weights, minlength=len(examples))
    counts = np.bincount(rows.numpy(), minlength=len(examples))
    return sums.astype(np.float64), counts.astype(np.int64)


def batches(lengths: npt.NDArray[np.integer], batch_size: int) -> list[Int64]:
    """Every index once, like lengths together; the longest first, so that memory fails early."""
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
