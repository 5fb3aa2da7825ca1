"""Which examples come together, in what order, and their tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hedgerow.data.tokens import Example
from hedgerow.lazy import torch

Indices = npt.NDArray[np.int64]

_WINDOW = 50
"""Batches among which examples are sorted by length: more save padding, fewer keep more chance."""
_NO_LOSS = -100


def batches(
    lengths: npt.NDArray[np.integer], batch_size: int, count: int, generator: np.random.Generator
) -> list[Indices]:
    """`count` batches of example indices, each of shape (batch_size,).

    They walk through random permutations, so that every example comes once before any
    comes again, and within a permutation hold examples of like lengths, so that little is padding.

    Args:
        lengths: shape (n,), n > 0: tokens of each example.
    """
    examples = len(lengths)
    passes = -(-count * batch_size // examples)
    drawn = np.concatenate([generator.permutation(examples) for _ in range(passes)])
    result: list[Indices] = []
    while len(result) < count:
        start = len(result) * batch_size
        # A batch that straddles two permutations is not grouped with others: sorting would bring
        # together the two uses of one example.
        within = (examples - start % examples) // batch_size
        window = max(1, min(within, _WINDOW, count - len(result)))
        result += _grouped(
            drawn[start : start + window * batch_size], lengths, batch_size, generator
        )
    return result


def epoch(
    lengths: npt.NDArray[np.integer], batch_size: int, generator: np.random.Generator
) -> list[Indices]:
    """Batches that hold each example exactly once, in random order; the last may be smaller.

    Args:
        lengths: shape (n,): tokens of each example.

    Returns:
        ceil(n / batch_size) arrays of example indices.
    """
    order = generator.permutation(len(lengths))
    full = len(order) // batch_size * batch_size
    result: list[Indices] = []
    for start in range(0, full, _WINDOW * batch_size):
        window = order[start : min(start + _WINDOW * batch_size, full)]
        result += _grouped(window, lengths, batch_size, generator)
    if full < len(order):
        result.append(order[full:])
    return result


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """The tensors of one batch, padded on the right to its longest example.

    Returns:
        `input_ids` and `labels`, each int64 of shape (examples, longest); labels are -100 on
        padding and on tokens that carry no loss. There is no attention mask: see
        `training.loss`.
    """
    shape = (len(examples), max(len(example.tokens) for example in examples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, _NO_LOSS, dtype=torch.int64)
    for row, example in enumerate(examples):
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        input_ids[row, : len(tokens)] = tokens
        learnt = torch.from_numpy(example.learnt)
        labels[row, : len(tokens)][learnt] = tokens[learnt]
    return {"input_ids": input_ids, "labels": labels}


def _grouped(
    drawn: Indices,
    lengths: npt.NDArray[np.integer],
    batch_size: int,
    generator: np.random.Generator,
) -> list[Indices]:
    """Cut a multiple of `batch_size` examples into batches of like lengths, in random order."""
    by_length = drawn[np.argsort(lengths[drawn], kind="stable")].reshape(-1, batch_size)
    return list(generator.permutation(by_length))
