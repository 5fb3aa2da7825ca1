"""Adapter updates of some clients, and the plain sums that they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor

from hedgerow.adapters import adapter_pairs
from hedgerow.methods.base import Aggregate, Expected, ServerRound
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.testing.doubles import Forgetful
from hedgerow.wire import Update

Clients = list[tuple[int, float, int]]
SHAPES = {"model.q": (6, 5), "model.v": (3, 5)}
SERVER_ROUND = ServerRound(1, [], None, Expected(Seeds(0), SHAPES, TrainingSettings()), Forgetful())


def updates(seed: int, clients: Clients, rslora: bool = False) -> Iterator[Update]:
    """Adapter updates of clients given as (rank, alpha, number of examples)."""
    generator = torch.Generator().manual_seed(seed)
    for index, (rank, alpha, examples) in enumerate(clients):
        tensors = {}
        for module, (m, n) in SHAPES.items():
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, n, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(m, rank, generator=generator)
        about = {"r": str(rank), "lora_alpha": repr(alpha)}
        if rslora:
            about["use_rslora"] = "true"
        yield Update("flora", 1, f"c{index}", "p", examples, 1.0, tensors, about)


def exact(seed: int, clients: Clients, rslora: bool = False) -> dict[str, Tensor]:
    """Σ p_k s_k B_k A_k of each module, in float64."""
    total = sum(examples for _, _, examples in clients)
    sums = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for update, (rank, alpha, examples) in zip(
        updates(seed, clients, rslora), clients, strict=True
    ):
        scale = alpha / (rank**0.5 if rslora else rank)
        for module, pair in adapter_pairs(update.tensors):
            sums[module] += examples / total * scale * pair.B.double() @ pair.A.double()
    return sums


def error(aggregate: Aggregate, sums: dict[str, Tensor]) -> float:
    """How far an aggregate is from the sums, relative to them."""
    pairs = dict(adapter_pairs(aggregate.tensors))
    noise = sum((pairs[m].product().double() - s).square().sum() for m, s in sums.items())
    return float((noise / sum(s.square().sum() for s in sums.values())).sqrt())


clients = st.lists(
    st.tuples(st.integers(1, 6), st.floats(0.5, 32), st.integers(1, 1000)), min_size=1, max_size=5
)
