"""Gradient checkpointing: layers keep their inputs alone, and are computed again going backward.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, as torch has it
(`torch.utils.checkpoint`, not reentrant), around each of a network's layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hedgerow.errors import UserError
from hedgerow.lazy import torch


@contextmanager
def checkpointed(network: Any, asked: bool) -> Iterator[None]:
    """The network with gradient checkpointing until the block ends, where that is asked for.

    Layers draw the same dropout when they are computed again, so that nothing else changes.
    """
    # As transformers' own switch does it, which also has all inputs require gradients, for good.
    modules = (
        [m for m in network.modules() if hasattr(m, "gradient_checkpointing")] if asked else []
    )
    function = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    before = [module.gradient_checkpointing for module in modules]
    for module in modules:
        module.gradient_checkpointing, module._gradient_checkpointing_func = True, function
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.gradient_checkpointing = was


def check_checkpointing(network: Any) -> None:
    """Raise a `UserError` where transformers has no gradient checkpointing for a network."""
    if not getattr(network, "supports_gradient_checkpointing", False):
        raise UserError(
            f"training.gradient_checkpointing: transformers has none for {type(network).__name__}: "
            "leave it out"
        )
