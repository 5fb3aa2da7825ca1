"""Coordinates on random bases that everybody regenerates from a seed (Ferret, arXiv 2409.06277).

Section 3: of each block l of the parameters, K_l coordinates γ_l = ⟨v, Δ_l⟩, scaled so that Σ γ v
is an unbiased estimate of Δ_l. The map is linear, so coordinates on equal bases add.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.lazy import torch
from hedgerow.methods.parts.bits import FewBits
from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.message import Message, check_derived
from hedgerow.methods.parts.renamed import below
from hedgerow.methods.parts.through import Basis, Piece, Through
from hedgerow.methods.parts.values import Shapes, Values
from hedgerow.sketch import Basis as BasisName
from hedgerow.sketch.blocks import (
    Block,
    allocate,
    group,
    norms,
    project_blocks,
    reconstruct_block,
)
from hedgerow.sketch.layout import MAX_SIZE
from hedgerow.wire import Kind, kinds, seed_kind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """Number of coordinates of all blocks together, K."""

    coordinates: int | None
    """K; None: as many as the compression leaves."""
    compression: float
    """Number of times that a message is smaller, in bytes, than what is mapped in float32."""
    codec: FewBits
    """What coordinates are written with."""

    def of(self, blocks: Sequence[Block]) -> int:
        """K, for these blocks; a message has each block's K_l beside its coordinates."""
        if self.coordinates is not None:
            return self.coordinates
        size = sum(block.size for block in blocks)

        def nbytes(k: int) -> int:
            counts = [max(1, k * block.size // size) for block in blocks]
            return sum(4 + self.codec.nbytes_of(count) for count in counts)

        return bisect.bisect_right(range(1, 32 * size), 4 * size / self.compression, key=nbytes)

    def check(self, blocks: Sequence[Block], limits: Sequence[int], model: str) -> None:
        """Raise a `UserError` unless there is one for each block, and at most so many."""
        given, most = self.of(blocks), sum(limits)
        if len(blocks) <= given <= most:
            return
        key, value = "compression", self.compression
        if self.coordinates is not None:
            key, value = "budget", self.coordinates
        advice = "a smaller compression" if given < most else "a larger compression"
        raise UserError(
            f"method.{key}: {value:g} is {given} coordinates of {self.codec.bits}-bit numbers, and "
            f"{model} takes {len(blocks)} (one for each block) to {most}: give {advice}, another "
            "budget or other bits"
        )


@dataclass(frozen=True)
class Sketch(Through):
    """Coordinates by block, with the bases' seed and K_l beside them."""

    bases: BasisName
    """Distribution of the bases."""
    budget: Budget
    allocation: Literal["size", "norm"]
    """What K_l are in proportion to: the block's size, or the norm of its change."""
    shared: bool
    """Whether all clients of a round have the same seed."""

    @property
    def is_one_sum(self) -> bool:
        """Whether all have one seed, and as many coordinates of each block whatever they learnt."""
        return self.shared and self.allocation == "size"

    def common(self, shapes: Shapes, message: Message) -> Mapping[str, Tensor]:
        """The seed of the round's bases, and K_l by the blocks' sizes."""
        blocks = group(shapes)
        return _header(self._seed(message), self.counts(self.budget.of(blocks), blocks, None))

    def encode(self, change: Values, message: Message, codec: Codec) -> Piece:
        """Project each block."""
        blocks = group(change.shapes)
        weights = norms(iter(change), blocks) if self.allocation == "norm" else None
        counts = self.counts(self.budget.of(blocks), blocks, weights)
        seed = self._seed(message)

        def projected() -> Iterator[tuple[str, Tensor]]:
            gammas = project_blocks(iter(change), blocks, seed, counts, self.bases)
            yield from zip(_names(counts), gammas, strict=True)

        return Piece(_header(seed, counts), Values(_shapes(counts), projected))

    def decode(
        self, pieces: Sequence[Piece], shapes: Shapes, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Sum of the estimates of all pieces."""
        seeds = [self.seed(piece.header) for piece in pieces]
        together = zip(*(piece.values for piece in pieces), strict=True)
        for index, (block, gammas) in enumerate(zip(group(shapes), together, strict=True)):
            total: dict[str, Tensor] = {}
            for seed, (_, gamma) in zip(seeds, gammas, strict=True):
                estimate = reconstruct_block(gamma.to(device), block, index, seed, self.bases)
                total = {n: total[n] + t for n, t in estimate.items()} if total else estimate
            yield from total.items()

    def errors(self, mapped: Shapes, shapes: Shapes, codec: Codec) -> dict[str, float]:
        """d/K - 1 on orthogonal bases, d/K on others, and the codec's error of that."""
        one = 0 if self.bases == "hadamard" else 1
        pairs = zip(group(shapes), mapped.items(), strict=True)
        return {
            name: (block.size / count + one) * (1 + codec.error) - 1
            for block, (name, (count,)) in pairs
        }

    def seed(self, header: Mapping[str, Tensor]) -> int:
        """Seed of the bases."""
        return int(header["seed"])

    def basis(self, header: Mapping[str, Tensor]) -> Basis:
        """The seed; and K_l where it depends on them which rows a basis is made of."""
        counts = header["counts"].tolist() if self.bases == "hadamard" else []
        return (self.seed(header), *counts)

    def mapped_shapes(self, header: Mapping[str, Tensor], shapes: Shapes) -> Shapes:
        """(K_l,) of each block."""
        return _shapes(header["counts"].tolist())

    def check_update(
        self, tensors: Mapping[str, Tensor], shapes: Shapes, message: Message, codec: Codec
    ) -> dict[str, Kind]:
        """Check for the message's seed, and as many coordinates as there may be."""
        counts = self._checked_counts(tensors, "counts", group(shapes))
        expected = _header(self._seed(message), counts)
        check_derived(tensors, {"seed": expected["seed"]})
        return kinds(expected)

    def broadcast(
        self, basis: Basis, shapes: Shapes, message: Message, codec: Codec
    ) -> dict[str, Tensor]:
        """The bases' own."""
        return _header(basis[0], [count for (count,) in shapes.values()])

    def encoding_holds(self, shapes: Shapes) -> int:
        """A block's tensors, twice where they are put together."""
        return max(4 * (1 + (len(block.shapes) > 1)) * block.size for block in group(shapes))

    def prefix(self, index: int) -> str:
        """Number of the piece."""
        return f"{index}."

    def pieces(self, tensors: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Tensors of each sketch."""
        found: list[Mapping[str, Tensor]] = []
        while f"{len(found)}.seed" in tensors:
            found.append(below(tensors, self.prefix(len(found))))
        return found

    def check_entry(
        self, tensors: Mapping[str, Tensor], shapes: Shapes, clients: int, codec: Codec
    ) -> dict[str, dict[str, Kind]]:
        """Check for as many sketches of all blocks as so many updates add up to."""
        blocks, one_each = group(shapes), not self.shared
        # Where counts differ between clients, so do hadamard's bases.
        by_counts = self.bases == "hadamard" and self.allocation == "norm"
        sketches = sum(name.endswith(".seed") for name in tensors)
        most = clients if one_each or by_counts else 1
        least = most if one_each else 1
        if not least <= sketches <= most:
            raise InvalidMessage(
                f"expected {least} to {most} sketches of {clients} participants, got {sketches}"
            )
        # On other bases, coordinates add up to as many as the longest have.
        summed = 1 if one_each or by_counts else clients
        given, expected, bases = kinds(tensors), {}, []
        for index in range(sketches):
            prefix = self.prefix(index)
            counts = self._checked_counts(tensors, f"{prefix}counts", blocks, summed)
            expected[prefix] = kinds(_header(0, counts))
            if given.get(f"{prefix}seed") != seed_kind():
                raise InvalidMessage(f"expected {prefix}seed of int64, and one number")
            bases.append((int(tensors[f"{prefix}seed"]), *counts))
        seeds = [seed for seed, *_ in bases]
        if bases != sorted(set(bases)) or len(set(seeds)) != (clients if one_each else 1):
            raise InvalidMessage(
                "sketches must be on distinct bases, in ascending order, with "
                + ("a seed for each client" if one_each else "one seed")
            )
        if min(seeds) < 0:
            raise InvalidMessage("seeds must be non-negative")
        return expected

    def check_seeds(
        self, tensors: Mapping[str, Tensor], message: Message, clients: Sequence[str], codec: Codec
    ) -> None:
        """Check for the seeds of the clients' bases, or for the one that they share."""
        given = {self.seed(piece) for piece in self.pieces(tensors)}
        if given != {self._seed(replace(message, sender=client)) for client in clients}:
            raise InvalidMessage("seeds must be those that the run derives for the participants")

    def check(self, shapes: Shapes, model: str) -> None:
        """Raise a `UserError` unless a model's blocks can be sketched with this budget."""
        blocks = group(shapes)
        if max(block.size for block in blocks) > MAX_SIZE:
            raise UserError(f"{model} has a weight of more than {MAX_SIZE} entries")
        self.budget.check(blocks, self.limits(blocks), model)

    def limits(self, blocks: Sequence[Block]) -> list[int]:
        """The largest K_l that are possible."""
        return [b.size if self.bases == "hadamard" else MAX_SIZE for b in blocks]

    def counts(
        self, budget: int, blocks: Sequence[Block], weights: Sequence[float] | None
    ) -> list[int]:
        """K_l, in proportion to weights, or to the blocks' sizes."""
        weights = weights or [float(block.size) for block in blocks]
        return allocate(budget, weights, self.limits(blocks))

    def _seed(self, message: Message) -> int:
        """Seed of a client's bases in a round."""
        sender = [] if self.shared or message.sender is None else [message.sender]
        return message.seeds.derive("bases", message.round, *sender)

    def _checked_counts(
        self, tensors: Mapping[str, Tensor], name: str, blocks: Sequence[Block], summed: int = 1
    ) -> list[int]:
        """The tensor `name` of K_l.

        Args:
            summed: of how many clients coordinates may have been added, each with its own K_l.

        Raises:
            InvalidMessage: they are not as the sketch allocates them.
        """
        if kinds(tensors).get(name) != Kind(torch.int32, (len(blocks),)):
            raise InvalidMessage(
                f"expected {name} of dtype int32, one for each of the model's {len(blocks)} blocks"
            )
        counts: list[int] = tensors[name].tolist()
        budget = self.budget.of(blocks)
        if self.allocation == "size":
            possible = counts == self.counts(budget, blocks, None)
        else:
            limits = zip(counts, self.limits(blocks), strict=True)
            possible = all(1 <= count <= limit for count, limit in limits)
            possible = possible and budget <= sum(counts) <= budget * summed
        if not possible:
            raise InvalidMessage(f"{name} must allocate {budget} coordinates to blocks")
        return counts


def _header(seed: int, counts: Sequence[int]) -> dict[str, Tensor]:
    return {
        "counts": torch.tensor(counts, dtype=torch.int32),
        "seed": torch.tensor([seed], dtype=torch.int64),
    }


def _names(counts: Sequence[int]) -> list[str]:
    return [str(index) for index in range(len(counts))]


def _shapes(counts: Sequence[int]) -> Shapes:
    return {name: (count,) for name, count in zip(_names(counts), counts, strict=True)}
