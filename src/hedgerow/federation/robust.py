"""Robust weights of a round: all updates are compared before the first is folded in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hedgerow import lowrank
from hedgerow.errors import RunFailed
from hedgerow.files import emptied, replacing
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Method, ServerRound
from hedgerow.methods.robust_weights import RULES, Weighed, bounded_shares, trust
from hedgerow.settings import FederationSettings
from hedgerow.wire import Update

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 1 << 20
"""Number of entries of a tensor that are compared at a time."""


@contextmanager
def on_disk(updates: Iterable[Update], folder: Path) -> Iterator[list[Update]]:
    """Updates whose tensors lie in files until the block ends, so that they can be read twice.

    Args:
        updates: as they arrive.
        folder: of its own, which is made anew, and removed in the end.
    """
    with emptied(folder):
        kept = []
        for update in updates:
            path = folder / f"{update.client}.safetensors"
            with replacing(path) as file:
                update.write(file)
            kept.append(Update.read(path))
        yield kept


def weigh(
    method: Method,
    updates: list[Update],
    server_round: ServerRound,
    settings: FederationSettings,
) -> Weighed:
    """Weights of a round's updates by the experiment's rule, or by their bounded shares alone.

    By a rule, clients that claim more examples do not count more, unless `largest_share` bounds
    their claims.

    Args:
        updates: with that of the client that is trusted, if one is (`check_trusted`).
    """
    if settings.trusted is not None:
        names = [update.client for update in updates]
        return trust(inner_products(method, updates, server_round), names.index(settings.trusted))
    sizes: list[float] = [update.num_examples for update in updates]
    if settings.largest_share is None:
        sizes = [1.0] * len(updates)
    shares = bounded_shares(sizes, settings.largest_share)
    rule = RULES.get(settings.weights or "")
    if rule is None:
        return Weighed(shares, {})
    return rule(inner_products(method, updates, server_round), np.array(shares))


def check_trusted(settings: FederationSettings, round: int, names: Iterable[str]) -> None:
    """Raise `RunFailed` unless the client that others are weighed by, if any, is among these."""
    if settings.trusted is not None and settings.trusted not in names:
        raise RunFailed(
            f"round {round} has no usable update of {settings.trusted}, which the others are "
            "weighed by (federation.trusted)"
        )


def middle(
    method: Method, updates: list[Update], server_round: ServerRound, rule: str
) -> dict[str, Tensor]:
    """Change in the middle of all updates, coordinate by coordinate, by tensor's name.

    Yin et al., "Byzantine-Robust Distributed Learning", arXiv 1803.01498: their median, or the mean
    without the largest and the smallest quarter, rounded down but at least one of three or more.

    Args:
        method: whose `changes` are compared.
        updates: of the round.
        server_round: the round.
        rule: `median` or `trimmed_mean`.
    """
    found = {}
    cut = max(len(updates) // 4, 1) if len(updates) > 2 else 0
    each = [iter(method.changes(update, server_round)) for update in updates]
    for together in zip(*each, strict=True):
        # Changes of linear methods are tensors.
        flat = [change.reshape(-1) for _, change in together if not isinstance(change, Factors)]
        whole = torch.empty_like(flat[0])
        for start in range(0, len(whole), COLUMNS):
            piece = torch.stack([one[start : start + COLUMNS] for one in flat])
            ranked = piece.sort(dim=0).values
            if rule == "median":
                ranked = ranked[(len(flat) - 1) // 2 : len(flat) // 2 + 1]
            else:
                ranked = ranked[cut : len(flat) - cut]
            whole[start : start + COLUMNS] = ranked.mean(dim=0)
        name, first = together[0]
        found[name] = whole if isinstance(first, Factors) else whole.reshape(first.shape)
    return found


def inner_products(method: Method, updates: list[Update], server_round: ServerRound) -> np.ndarray:
    """Inner products of the changes that updates make, of shape (N, N), tensor by tensor."""
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    each = [iter(method.changes(update, server_round)) for update in updates]
    for together in zip(*each, strict=True):
        found += _products([change for _, change in together])
    return np.asarray(found.numpy())


def _products(changes: list[Tensor | Factors]) -> Tensor:
    """Inner products of one tensor or module."""
    pairs = [change for change in changes if isinstance(change, Factors)]
    if pairs:
        return lowrank.inner_products(pairs)
    flat = [change.reshape(-1) for change in changes if not isinstance(change, Factors)]
    found = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, len(flat[0]), COLUMNS):
        piece = torch.stack([each[start : start + COLUMNS] for each in flat]).double()
        found += piece @ piece.T
    return found
