"""Ways in which adapters, sketches and seeds can be wrong, and all ways of a method."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch

from hedgerow.methods import (
    FedExLoRA,
    FFALoRA,
    FLoRA,
    FLoRAAdaLoRA,
    FLoRIST,
)
from hedgerow.methods.base import Method
from hedgerow.methods.composed import Composed
from hedgerow.methods.lora import LoraMethod
from hedgerow.methods.parts.sketch import Sketch
from hedgerow.methods.zeroth_order import ZerothOrderMethod
from hedgerow.sketch.coordinates import BITS, lengths
from hedgerow.testing.files import File
from hedgerow.testing.wrong import (
    Direction,
    Way,
    any_wrong,
    other_metadata,
    other_options,
)


def other_rank(rng: Random, file: File) -> None:
    """All factors of one more or one less, and maybe `r` and `lora_alpha` to go with it."""
    change = rng.choice([-1, 1])
    factors = {name: tensor for name, tensor in file.loaded().items() if tensor.ndim == 2}
    for name, tensor in factors.items():
        wide = tensor if ".lora_A." in name else tensor.T
        if len(wide) + change == 0:
            change = 1
        other = torch.cat([wide, wide[:1]]) if change == 1 else wide[:-1]
        file.put(name, other if ".lora_A." in name else other.T.contiguous())
    if "r" in file.metadata and (not factors or rng.random() < 0.5):
        file.metadata["r"] = str(int(file.metadata["r"]) + change)
        file.metadata["lora_alpha"] = str(2 * int(file.metadata["r"]))


def too_large_rank(rng: Random, file: File) -> None:
    """The factors of one matrix of more rank than anybody may have given it."""
    keys = [name for name in file.tensors if name.startswith("base") and ".lora_A." in name]
    key = rng.choice(keys)
    other = key.replace(".lora_A.", ".lora_B.")
    rank = rng.choice([50, 1000])
    file.put(key, torch.ones(rank, file.loaded()[key].shape[1]))
    file.put(other, torch.ones(file.loaded()[other].shape[0], rank))


def start_as_residual(rng: Random, file: File) -> None:
    """The two parts of an entry in each other's place."""
    file.tensors = {
        name.removeprefix("start.") if name.startswith("start.") else f"start.{name}": tensor
        for name, tensor in file.tensors.items()
    }


def with_counts(change: Callable[[Random, list[int]], None]) -> Way:
    """A sketch that is whole, with other counts."""

    def wrong(rng: Random, file: File) -> None:
        name = rng.choice([name for name in file.tensors if name.endswith("counts")])
        counts = file.loaded()[name].tolist()
        sizes = {n: len(tensor) for n, tensor in file.loaded().items()}
        for bits in BITS:
            parts = {
                name.replace("counts", n): sum(of) for n, (_, of) in lengths(counts, bits).items()
            }
            if parts.items() <= sizes.items():
                break
        change(rng, counts)
        for part, (dtype, each) in lengths(counts, bits).items():
            file.put(name.replace("counts", part), torch.zeros(sum(each), dtype=dtype))
        file.put(name, torch.tensor(counts, dtype=torch.int32))

    wrong.__name__, wrong.__doc__ = change.__name__, change.__doc__
    return wrong


def other_counts(rng: Random, counts: list[int]) -> None:
    """A block has other counts than its budget gives."""
    counts[rng.randrange(len(counts))] += rng.choice([1, 1000])


def no_coordinate_of_a_block(rng: Random, counts: list[int]) -> None:
    """A block has no coordinate, and another has its."""
    first, second = rng.sample(range(len(counts)), 2)
    counts[first], counts[second] = 0, counts[second] + counts[first]


def other_seed(rng: Random, file: File) -> None:
    """A seed is not the round's or the client's."""
    name = rng.choice([name for name in file.tensors if name.endswith(("seed", "seeds"))])
    seeds = file.loaded()[name]
    seeds[rng.randrange(len(seeds))] = rng.choice([-1, 12345, -(2**63)])
    file.put(name, seeds)


def negative_seed(rng: Random, file: File) -> None:
    """A seed is below 0."""
    name = rng.choice([name for name in file.tensors if name.endswith(("seed", "seeds"))])
    file.put(name, -1 - file.loaded()[name])


def other_sketches(rng: Random, file: File) -> None:
    """Two in another order, one in another's place, or one more than there are participants."""
    sketches = {
        prefix: {n: t for n, t in file.tensors.items() if n.startswith(prefix)}
        for prefix in sorted({name[:2] for name in file.tensors if name[1] == "."})
    }

    def put(source: str, target: str) -> None:
        parts = sketches[source].items()
        file.tensors |= {target + name.removeprefix(source): part for name, part in parts}

    if len(sketches) > 1 and rng.random() < 0.8:
        first, second = rng.sample(list(sketches), 2)
        put(first, second)
        if rng.random() < 0.5:
            put(second, first)
    else:
        put("0.", f"{len(sketches)}.")


def one_seed_twice(rng: Random, file: File) -> None:
    """A seed is there two times."""
    seeds = file.loaded()["seeds"]
    seeds[-1] = seeds[0]
    file.put("seeds", seeds)


def too_many_steps(rng: Random, file: File) -> None:
    """There are more steps than anybody has taken."""
    count = rng.randint(65, 200)
    file.put("seeds", torch.arange(count))
    file.put("coordinates", torch.ones(count))


def kinds_of_wrong(method: Method, direction: Direction, file: File) -> list[Way]:
    """Ways in which an update (`up`) or entry (`down`) like `file` is wrong and must be refused.

    A class that inherits from a method of hedgerow's is up to what that one is.
    """
    ways = any_wrong(direction, file)
    if isinstance(method, Composed):
        ways += _wrong_seeds_and_sketches(method, direction, file)
    elif isinstance(method, ZerothOrderMethod):
        ways += [one_seed_twice, other_seed, negative_seed, too_many_steps]
    elif isinstance(method, LoraMethod):
        ways.append(too_large_rank if _ranks_are_free(method, direction) else other_rank)
        if isinstance(method, FedExLoRA) and direction == "down":
            ways += [too_large_rank, start_as_residual]
        if isinstance(method, FFALoRA) and direction == "down":
            ways += [other_seed, negative_seed]
        if direction == "up":
            ways += [
                other_metadata("r", "5", "0", "-1", "x", "9" * 99),
                other_metadata("lora_alpha", "nan", "1e30", "", "0"),
            ]
    if direction == "down" and not method.entry_options():
        ways.append(other_options)
    elif direction == "down":
        ways.append(other_metadata("options", "{}", "[]", "null", "{" * 9999, '{"x": NaN}'))
    return ways


def _wrong_seeds_and_sketches(method: Composed, direction: Direction, file: File) -> list[Way]:
    """Ways in which what a message is rotated or sketched by is wrong, where it has some."""
    ways: list[Way] = []
    if any(name.endswith("seed") for name in file.tensors):
        ways += [other_seed, negative_seed]
    if any(name.endswith("counts") for name in file.tensors):
        ways.append(with_counts(no_coordinate_of_a_block))
        # Sums of coordinates on different numbers of bases may have any number between.
        through = method.parts.through
        if direction == "up" or not (
            isinstance(through, Sketch)
            and through.allocation == "norm"
            and through.bases != "hadamard"
        ):
            ways.append(with_counts(other_counts))
        if direction == "down":
            ways.append(other_sketches)
    return ways


def _ranks_are_free(method: LoraMethod, direction: Direction) -> bool:
    """Whether each matrix has a rank of its own, so that one more or less may be right."""
    if isinstance(method, FLoRA) and method.compress is not None:
        # Codes of integers have as many steps as there are rows, which one more does not fit.
        return direction == "down" and method.compress.bits == 32
    if isinstance(method, FLoRA) and direction == "down" and method.broadcast == "orthogonal":
        return True
    return isinstance(method, FLoRAAdaLoRA) or (isinstance(method, FLoRIST) and direction == "down")
