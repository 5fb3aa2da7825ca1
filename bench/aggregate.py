"""Aggregating the adapters of many clients: memory, and time beside the products that it takes.

    python bench/aggregate.py [--clients 1000] [--rank 16] [--layers 32]

The adapted matrices are those of a 7B Llama (all linear layers), the factors random; eight clients'
are made and come again and again. The server's code is FLoRA's, with `compress: true`. Beside its
time stands that of its matrix products alone, on the same numbers, in the same run.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.lowrank import Factors, Projections
from hedgerow.methods.base import Client, Expected, ServerRound
from hedgerow.methods.flora import FLoRA
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.wire import Update

HIDDEN, INTERMEDIATE, DISTINCT = 4096, 11008, 8
MATRICES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("gate_proj", "up_proj"), (INTERMEDIATE, HIDDEN)),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


class Forgetful:
    """The memory of a server in its first round."""

    def load(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Count what is carried to the next round, and forget it."""
        print(f"carried to the next round: {sum(t.nbytes for t in tensors.values()) / 1e6:.0f} MB")


def main() -> None:
    """Aggregate, then do the products again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    shapes = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(arguments.layers)
        for name, shape in MATRICES.items()
    }
    method = FLoRA(ranks=arguments.rank, compress=True)
    clients = [Client(k, f"c{k}", 100 + k % 7) for k in range(arguments.clients)]
    sent = [adapter_tensors(random_factors(shapes, arguments.rank, k)) for k in range(DISTINCT)]
    size = sum(tensor.nbytes for tensor in sent[0].values())
    before = peak()

    def updates() -> Iterator[Update]:
        about = {"r": str(arguments.rank), "lora_alpha": str(2 * arguments.rank)}
        for client in clients:
            tensors = sent[client.index % DISTINCT]
            yield Update("flora", 1, client.name, "", client.num_examples, 1.0, tensors, about)

    expected = Expected(Seeds(0), shapes, TrainingSettings())
    began = time.perf_counter()
    server_round = ServerRound(1, clients, None, expected, Forgetful())
    aggregate = method.aggregate(updates(), server_round)
    seconds = time.perf_counter() - began
    result = sum(tensor.nbytes for tensor in aggregate.tensors.values())
    above = (peak() - before) / size
    products = time_of_products(method, shapes, sent, arguments.clients)
    total = size * len(clients)
    print(f"an update: {size / 1e6:.0f} MB; {len(clients)} of them: {total / 1e9:.0f} GB")
    print(f"the result: {result / size:.2f} updates; metrics: {aggregate.metrics}")
    print(f"peak memory above that of the {DISTINCT} clients' factors: {above:.1f} updates")
    print(f"time / time of the matrix products alone: {seconds / products:.2f}")


def time_of_products(
    method: FLoRA, shapes: dict[str, tuple[int, int]], sent: list[dict[str, Tensor]], clients: int
) -> float:
    """The seconds that the sketches' products take for so many clients, from those of a few."""
    assert method.compress is not None
    rank, generator = method.compress.largest(method.largest_rank) or 1, torch.Generator()
    tests = {s: Projections.draw(*s, rank, generator) for s in set(shapes.values())}
    began = time.perf_counter()
    for tensors in sent:
        for module, (A, B) in adapter_pairs(tensors):
            right, left = tests[shapes[module]]
            B @ (A @ right), (left @ B) @ A
    return (time.perf_counter() - began) / len(sent) * clients


def random_factors(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Factors]:
    """Gaussian factors for matrices of these shapes."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 0.01 * torch.randn(shape, generator=generator)

    return {name: Factors(drawn(rank, n), drawn(m, rank)) for name, (m, n) in shapes.items()}


def peak() -> int:
    """The peak memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
