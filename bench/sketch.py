"""Projecting and rebuilding a vector, by basis, K and size, beside a plain torch loop and a copy.

    python bench/sketch.py [--entries 16_000_000 …] [--k 8 64 …] [--device cpu|cuda]

The loop draws each base with `trunc_normal_`, as Ferret's authors do, and takes an inner product
(or adds the base, times its coordinate); it is timed for 2 bases and given per base. Times are the
best of three within one run; the ratios are what counts. On the CPU, what codecs do with rotated
numbers is beside the rotation: seeking the largest (and torch's topk), and rounding to few bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from hedgerow import console
from hedgerow.sketch import BASES, cpu, project, reconstruct, reference
from hedgerow.sketch.coordinates import dequantize, quantize

LOOP_BLOCK = 1_000_000
"""Entries of a block of the plain loop, about the size of a tensor."""
TILE, LARGEST = 1 << 16, 1_000
"""Numbers of a tile, and how many of the largest of them are sought."""


def main() -> None:
    """Print one table for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, nargs="+", default=[4_000_000, 16_000_000])
    parser.add_argument("--k", type=int, nargs="+", default=[8, 64], help="for the dense bases")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for entries in arguments.entries:
        compare(entries, arguments.k, torch.device(arguments.device))


def compare(size: int, dense_k: list[int], device: torch.device) -> None:
    """All bases on one vector."""
    x = torch.randn(size, device=device)
    y = torch.empty_like(x)
    copy = best(lambda: y.copy_(x), device, repeats=10)
    loop = best(lambda: plain_project(x, 2), device) / 2
    loop_back = best(lambda: plain_reconstruct(torch.ones(2, device=device), y), device) / 2
    own = best(lambda: reference.project_dense(x, 1, 1, "uniform"), device, repeats=1)
    one = torch.ones(1, device=device)
    own_back = best(lambda: reference.reconstruct_dense(one, 1, size, "uniform"), device, repeats=1)
    rows = [
        ("copy", "torch", "", ms(copy), ms(copy), "1.0", "1.0", "", ""),
        ("trunc_normal_ loop", "torch", "1", ms(loop), ms(loop_back), "", "", "1", "1"),
        (
            "uniform",
            "reference",
            "1",
            ms(own),
            ms(own_back),
            "",
            "",
            f"{loop / own:.2f}",
            f"{loop_back / own_back:.2f}",
        ),
    ]
    backend = "numba" if device.type == "cpu" else "Triton"
    for basis in BASES:
        for k in dense_k if basis != "hadamard" else [1024, size // 1024, size // 16, size]:
            coordinates = project(x, 1, k, basis)
            down = best(lambda basis=basis, k=k: project(x, 1, k, basis), device)
            up = best(lambda basis=basis, c=coordinates: reconstruct(c, 1, size, basis), device)
            rows.append(
                (
                    basis,
                    backend,
                    f"{k:,}",
                    ms(down),
                    ms(up),
                    f"{down / copy:.1f}",
                    f"{up / copy:.1f}",
                    f"{loop * k / down:,.0f}",
                    f"{loop_back * k / up:,.0f}",
                )
            )
    header = [
        "basis",
        "backend",
        "K",
        "project ms",
        "rebuild ms",
        "project/copy",
        "rebuild/copy",
        "loop/project",
        "loop/rebuild",
    ]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    console.table(f"{size:,} entries on {device}{threads}", header, rows)
    if device.type == "cpu":
        few_bits(x)


def few_bits(x: torch.Tensor) -> None:
    """The largest of tiles, and numbers in few bits, beside a rotation of the vector."""
    rotate = best(lambda: project(x, 1, len(x)), x.device)
    whole = x[: len(x) // TILE * TILE]
    topk = best(lambda: whole.view(-1, TILE).abs().topk(LARGEST, sorted=False), x.device)
    work = {
        f"{LARGEST:,} largest of {TILE:,}, torch": topk,
        f"{LARGEST:,} largest of {TILE:,}": best(
            lambda: cpu.largest(whole, TILE, LARGEST), x.device
        ),
    }
    for bits in (1, 2):
        codes = quantize(x, bits, 1)
        work[f"rotate and round, {bits} bits"] = best(lambda b=bits: quantize(x, b, 1), x.device)
        work[f"read and rotate back, {bits} bits"] = best(
            lambda b=bits, c=codes: dequantize(c, b, len(x), 1), x.device
        )
    console.table(
        f"{len(x):,} entries, {torch.get_num_threads()} threads",
        ["work", "ms", "beside a rotation"],
        [(name, ms(each), f"{each / rotate:.2f}") for name, each in work.items()],
    )


def best(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def plain_project(x: torch.Tensor, k: int) -> torch.Tensor:
    """Inner products with bases that torch's generator draws, block by block."""
    gamma = torch.zeros(k, device=x.device)
    for block in x.split(LOOP_BLOCK):
        base, bound = torch.empty_like(block), len(block) ** -0.5
        for j in range(k):
            torch.nn.init.trunc_normal_(base, 0, 1, -bound, bound)
            gamma[j] += base @ block
    return gamma


def plain_reconstruct(gamma: torch.Tensor, out: torch.Tensor) -> None:
    """The sum of such bases."""
    for block in out.zero_().split(LOOP_BLOCK):
        base, bound = torch.empty_like(block), len(block) ** -0.5
        for coordinate in gamma.tolist():
            torch.nn.init.trunc_normal_(base, 0, 1, -bound, bound)
            block.add_(base, alpha=coordinate)


def ms(seconds: float) -> str:
    """Milliseconds, for reading."""
    return f"{seconds * 1e3:,.1f}"


if __name__ == "__main__":
    main()
