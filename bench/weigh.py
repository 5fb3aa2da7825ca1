"""Weighing the adapters of many clients by how they agree: memory, and time beside the products.

    python bench/weigh.py [--clients 1000] [--rank 16] [--layers 32] [--matrices q_proj …]

The adapted matrices are those of a 7B Llama, the factors random, drawn anew each time that they are
read, so that nothing but the server's own code holds any. That code makes the table of inner
products that all robust rules need, of FLoRA's updates, one matrix of all clients after another;
`multi_krum` then weighs by it. Beside its time stands that of the products of stacked factors
alone, from a few rows of the table, in the same run.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from aggregate import MATRICES, Forgetful, peak, random_factors
from torch import Tensor

from hedgerow.adapters import adapter_tensors
from hedgerow.federation.robust import inner_products
from hedgerow.methods.base import Client, Expected, ServerRound
from hedgerow.methods.flora import FLoRA
from hedgerow.methods.robust_weights import RULES
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.wire import Update

ROWS = 1024
"""Rows of stacked factors whose products are timed."""


class Drawn(Mapping[str, Tensor]):
    """Tensors by name, each drawn when it is read, as those in a file are."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], draw: Callable[[str], Tensor]):
        self._shapes, self._draw = shapes, draw

    def __getitem__(self, name: str) -> Tensor:
        return self._draw(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def main() -> None:
    """Weigh, then time the products of a few rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES))
    arguments = parser.parse_args()
    shapes = {
        f"model.layers.{layer}.{name}": MATRICES[name]
        for layer in range(arguments.layers)
        for name in arguments.matrices
    }
    method = FLoRA(ranks=arguments.rank)
    clients = [Client(k, f"c{k}", 100 + k % 7) for k in range(arguments.clients)]
    one = adapter_tensors(random_factors(shapes, arguments.rank, 0))
    kinds = {name: tuple(tensor.shape) for name, tensor in one.items()}
    size = sum(tensor.nbytes for tensor in one.values())
    widest = sum(max(tensor.nbytes for tensor in one.values()) for _ in clients)
    about = {"r": str(arguments.rank), "lora_alpha": str(2 * arguments.rank)}

    def update(client: Client) -> Update:
        def draw(name: str) -> Tensor:
            seed = zlib.crc32(f"{client.index} {name}".encode())
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(kinds[name], generator=generator).mul_(0.01)

        tensors = Drawn(kinds, draw)
        return Update("flora", 1, client.name, "", client.num_examples, 1.0, tensors, about)

    expected = Expected(Seeds(0), shapes, TrainingSettings())
    server_round = ServerRound(1, clients, None, expected, Forgetful())
    before, began = peak(), time.perf_counter()
    table = inner_products(method, [update(client) for client in clients], server_round)
    weighed = RULES["multi_krum"](table, np.full(len(clients), 1 / len(clients)))
    seconds, above = time.perf_counter() - began, peak() - before
    products = time_of_products(shapes, arguments.rank * arguments.clients)
    print(f"{len(clients)} updates of {size / 1e6:.0f} MB: {size * len(clients) / 1e9:.1f} GB")
    print(f"weighed by multi_krum: {sum(weight > 0 for weight in weighed.weights)} count")
    print(
        f"peak: {above / 1e9:.2f} GB, {above / widest:.1f} times the widest factor of all clients"
    )
    print(f"time / time of the products of stacked factors alone: {seconds / products:.2f}")


def time_of_products(shapes: Mapping[str, tuple[int, int]], rows: int) -> float:
    """Seconds of the products of so many rows of stacked factors, from those of a few."""
    seconds = {}
    for m, n in set(shapes.values()):
        A, B = torch.randn(ROWS, n), torch.randn(m, ROWS)
        began = time.perf_counter()
        (A @ A.T) * (B.T @ B)
        seconds[m, n] = (time.perf_counter() - began) * (rows / ROWS) ** 2
    return sum(seconds[shape] for shape in shapes.values())


if __name__ == "__main__":
    main()
