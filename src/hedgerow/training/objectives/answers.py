"""Two answers to each prompt in one batch, and how likely a network finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hedgerow.data import Tokenized, collate
from hedgerow.errors import UserError
from hedgerow.lazy import torch
from hedgerow.training.loss import token_losses
from hedgerow.training.objectives.base import Batch

if TYPE_CHECKING:
    from torch import Tensor


def collate_both(
    examples: Tokenized, indices: Sequence[int], pad_id: int, *, refers: bool
) -> dict[str, Tensor]:
    """The batch of n examples, and after them of the other answers to their prompts.

    Args:
        refers: whether log-likelihoods of another model are part of it.

    Returns:
        `input_ids` and `labels` of shape (2n, longest); `answers` of the same shape, which says of
        each token whether it is of an answer; and with `refers`, `reference`: float32 of shape
        (2n,).
    """
    assert examples.other is not None, "the data are prepared for the objective"
    chosen = [int(index) for index in indices]
    rows = [part[index] for part in (examples, examples.other) for index in chosen]
    batch = collate(rows, pad_id)
    places = torch.arange(batch["labels"].shape[1])
    begins = torch.tensor([row.prompt_length for row in rows])
    batch["answers"] = (places >= begins[:, None]) & (batch["labels"] != -100)
    if refers:
        found = [_reference(part)[chosen] for part in (examples, examples.other)]
        batch["reference"] = torch.from_numpy(np.concatenate(found))
    return batch


def log_likelihoods(network: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The log-likelihood of each answer, log π(y|x), and its number of tokens.

    Returns:
        Both of shape (rows,), float32 and on the network's device; the first is differentiable.
    """
    losses, rows = token_losses(network, batch)
    return summed(-losses, rows, len(batch["labels"]))


def summed(values: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums of values by the row that each is of, and numbers of them; each of shape (count,)."""
    rows = rows.to(values.device)
    zeros = torch.zeros(count, dtype=values.dtype, device=values.device)
    numbers = zeros.index_add(0, rows, torch.ones_like(values))
    return zeros.index_add(0, rows, values), numbers


def referenced(
    network: Any,
    examples: Tokenized,
    pad_id: int,
    batch_size: int,
    indices: npt.NDArray[np.integer] | None = None,
) -> Tokenized:
    """The examples with their log-likelihoods under a network as it is, without dropout.

    Args:
        batch_size: number of sequences in a forward pass.
        indices: the examples that are needed, the others have NaN; None: all are.
    """
    indices = np.arange(len(examples)) if indices is None else np.asarray(indices)
    is_training = network.training
    network.eval()
    values = np.full(len(examples), np.nan, dtype=np.float32)
    by_length = indices[np.argsort(-examples.lengths[indices], kind="stable")]
    for first in range(0, len(by_length), batch_size):
        chosen = by_length[first : first + batch_size]
        batch = collate([examples[int(index)] for index in chosen], pad_id)
        with torch.no_grad():
            values[chosen] = log_likelihoods(network, batch)[0].cpu().numpy()
    network.train(is_training)
    other = examples.other
    if other is not None:
        other = referenced(network, other, pad_id, batch_size, indices)
    return replace(examples, reference=values, other=other)


def _reference(examples: Tokenized) -> npt.NDArray[np.float32]:
    """Log-likelihoods of examples under the model that is referred to."""
    if examples.reference is None:
        raise UserError(
            "training.objective: the log-likelihoods of its reference have not been computed: the "
            "engine has to do so before training (`referenced`)"
        )
    return examples.reference
