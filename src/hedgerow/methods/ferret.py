"""Ferret: full-parameter federated tuning through shared randomness.

Shu et al., "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models",
arXiv 2409.06277, section 3 and algorithm 1. Clients take ordinary first-order steps on all
parameters and send the coordinates of their update on random bases, which everybody regenerates
from a seed; nobody ever sends, or holds, a base.

    every round:
      client k:  Δ_k = (w after local training) - w
                 for each block l:  γ_kl = coordinates of Δ_kl on K_l random bases of its seed
      server:    γ_l = η_t Σ p_k γ_kl
      everybody: w <- w + Σ_l Σ_j γ_lj v_lj

Where this goes past the paper, and what `paper: true` takes back: bases are rows of a randomised
Hadamard matrix (cheaper by orders of magnitude, and a smaller error), coordinates have one bit, and
clients share a round's seed, so that coordinates add and the broadcast does not grow with clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hedgerow.errors import UserError
from hedgerow.methods.base import Aggregate, Client, Payload, Trained, Turn
from hedgerow.methods.fedit import AveragedAdapter
from hedgerow.methods.lora import LoraMethod, init_factors
from hedgerow.sketch import Basis
from hedgerow.sketch.blocks import (
    Block,
    allocate,
    group,
    norms,
    project_blocks,
    reconstruct_block,
)
from hedgerow.sketch.coordinates import GROUP, Bits, pack, unpack
from hedgerow.sketch.layout import SECOND_MOMENT
from hedgerow.wire import InvalidMessage

if TYPE_CHECKING:
    from hedgerow.model import Model
    from hedgerow.wire import Entry, Update

DEFAULT_COMPRESSION = 128
PAPER = {
    "basis": "uniform",
    "budget": 4096,
    "bits": 32,
    "broadcast_bits": 32,
    "allocation": "norm",
    "seeds": "client",
    "clip": 10.0,
}
"""The paper's settings and its authors' clipping. Their local steps are `training.optimizer: sgd`
with `max_grad_norm: null`."""


class Ferret(AveragedAdapter):
    """First-order steps, sent as coordinates on shared random bases."""

    name: Literal["ferret"] = "ferret"
    summary: ClassVar[str] = "all parameters trained, sent as coordinates on shared random bases"
    reference: ClassVar[str] = "Ferret, arXiv 2409.06277"

    over: Literal["full", "lora"] = "full"
    """What is trained and sketched: all parameters, or one adapter (with LoRA's options)."""
    basis: Basis = "hadamard"
    """hadamard, uniform (the paper's), rademacher or gaussian."""
    budget: Annotated[int, Field(ge=1)] | None = None
    """K = Σ K_l, the coordinates of an update."""
    compression: Annotated[float, Field(ge=1)] | None = None
    """Instead of `budget`: how many times smaller than all parameters in float32 an update is;
    128 where neither is given."""
    bits: Bits = 1
    """Of a coordinate on its way up; 32 sends it as it is."""
    broadcast_bits: Bits = 2
    """Of a coordinate on its way down: what is lost there, no average over clients makes good."""
    allocation: Literal["size", "norm"] = "size"
    """K_l in proportion to the block's size, or (the paper's) to the norm of its update."""
    seeds: Literal["round", "client"] = "round"
    """One seed for all clients of a round, so that their coordinates add; or (the paper's) one for
    each, so that their errors are independent and the broadcast grows with their number."""
    server_learning_rate: float = Field(1.0, gt=0)
    """η_1, what the average update is multiplied by."""
    anneal: float = Field(1.0, gt=0, le=1)
    """η_t = η_1·annealᵗ⁻¹."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """The longest step ‖γ_j v_j‖ on one base."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of the global steps; costs every participant a vector of the model's size in float32."""
    error_feedback: bool = False
    """A client adds to its update what its last sketch has lost, and shrinks what it sends."""
    paper: bool = False
    """The paper's settings, for all options above that are not given."""

    same_rank: ClassVar[bool] = True
    entries_accumulate: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _paper_settings(cls, options: Any) -> Any:
        if isinstance(options, dict) and options.get("paper") is True:
            given = PAPER if "compression" not in options else PAPER | {"budget": None}
            return {**given, **options}
        return options

    @model_validator(mode="after")
    def _one_size(self) -> Ferret:
        if self.budget is not None and self.compression is not None:
            raise ValueError("give `budget` or `compression`, not both")
        return self

    def check(self, model: Model, num_clients: int) -> None:
        """The budget fits the blocks (and the adapter the model)."""
        parameters = dict(model.network.named_parameters())
        if self.over == "lora":
            LoraMethod.check(self, model, num_clients)
            parameters = model.attach(self.config(self.largest_rank))
            model.release()
        blocks = group({name: p.shape for name, p in parameters.items()})
        given, most = self._budget(blocks), sum(self._most(blocks))
        advice = "a smaller compression" if given < most else "a larger compression"
        if not len(blocks) <= given <= most:
            key = "budget" if self.budget is not None else "compression"
            raise UserError(
                f"method.{key}: {getattr(self, key) or DEFAULT_COMPRESSION:g} is {given} "
                f"coordinates of {self.bits}-bit numbers, and {model.name} takes {len(blocks)} "
                f"(one for each block) to {most}: give {advice}, another budget or other bits"
            )

    def start(self, model: Model, turn: Turn) -> Mapping[str, nn.Parameter]:
        """All weights, or the global adapter; with a snapshot, for Δ_k."""
        if self.over == "full":
            return model.unfreeze()
        parameters = super().start(model, turn)
        model.remember(parameters)
        return parameters

    def update(self, model: Model, turn: Turn, trained: Trained) -> Payload:
        """The coordinates of Δ_k."""
        blocks = group({name: p.shape for name, p in trained.parameters.items()})
        sender = [turn.client.name] if self.seeds == "client" else []
        seed = turn.seeds.derive("bases", turn.round, *sender)
        lost = turn.memory.load() if self.error_feedback else {}

        def delta() -> Iterator[tuple[str, Tensor]]:
            for name, change in model.trained_delta():
                yield name, change.add_(lost[name].to(change.device)) if name in lost else change

        counts = self._counts(blocks, delta)
        projected = project_blocks(delta(), blocks, seed, counts, self.basis)
        coordinates = [
            gamma * self._shrinkage(block, len(gamma))
            for block, gamma in zip(blocks, projected, strict=True)
        ]
        tensors = _Sketch(seed, coordinates).encode(self.bits)
        if self.error_feedback:
            sent = self._estimate([_Sketch.decode(tensors, self.bits)], blocks, model.device)
            turn.memory.save(
                {
                    name: change.sub_(estimate).cpu()
                    for (name, change), (_, estimate) in zip(delta(), sent, strict=True)
                }
            )
        if self.over == "lora":
            tensors["adapter_seed"] = torch.tensor([turn.seeds.derive("adapter")])
        return Payload(tensors, {})

    def check_update(self, client: Client, update: Update) -> None:
        """It has a seed, and coordinates: as many as the budget, if that is a number."""
        try:
            coordinates = _Sketch.decode(update.tensors, self.bits).coordinates
            if self.over == "lora":
                _seed_in(update.tensors, "adapter_seed")
        except ValueError as error:
            raise InvalidMessage(str(error)) from None
        given = sum(len(gamma) for gamma in coordinates)
        if self.budget is not None and given != self.budget:
            raise InvalidMessage(f"it has {given} coordinates, not {self.budget}")

    def aggregate(self, updates: Iterable[Update]) -> Aggregate:
        """η_t Σ p_k γ_k: coordinates on the same bases add, those on others stand beside them."""
        total, rate = 0, 0.0
        sums: dict[tuple[int, ...], list[Tensor]] = {}
        adapter_seed: dict[str, Tensor] = {}
        for update in updates:
            total += update.num_examples
            rate = self.server_learning_rate * self.anneal ** (update.round - 1)
            adapter_seed = {n: t for n, t in update.tensors.items() if n == "adapter_seed"}
            seed, coordinates = _Sketch.decode(update.tensors, self.bits)
            weighted = [gamma * update.num_examples for gamma in coordinates]
            # Which rows a hadamard sketch samples depends on how many; other bases do not.
            counts = [len(gamma) for gamma in weighted] if self.basis == "hadamard" else []
            key = (seed, *counts)
            sums[key] = _added(sums[key], weighted) if key in sums else weighted
        tensors = dict(adapter_seed)
        for index, ((seed, *_), gammas) in enumerate(sums.items()):
            step = _Sketch(seed, [self._clipped(gamma * (rate / total)) for gamma in gammas])
            encoded = step.encode(self.broadcast_bits)
            tensors |= {f"{index}.{name}": tensor for name, tensor in encoded.items()}
        return Aggregate(tensors, {})

    def apply(self, model: Model, entry: Entry) -> None:
        """w <- w + Σ_l Σ_j γ_lj v_lj, or that plus momentum."""
        sketches: list[_Sketch] = []
        while f"{len(sketches)}.seed" in entry.tensors:
            prefix = f"{len(sketches)}."
            own = {n.removeprefix(prefix): n for n in entry.tensors if n.startswith(prefix)}
            tensors = {name: entry.tensors[key] for name, key in own.items()}
            sketches.append(_Sketch.decode(tensors, self.broadcast_bits))
        weights: Mapping[str, Tensor] = dict(model.network.named_parameters())
        if self.over == "lora":
            weights = self._global_adapter(model, int(entry.tensors["adapter_seed"]))
        blocks = group({name: weight.shape for name, weight in weights.items()})
        for name, step in self._estimate(sketches, blocks, model.device):
            if self.momentum:
                if name in model.momentum:
                    step += self.momentum * model.momentum[name]
                model.momentum[name] = step
            if self.over == "full":
                model.add(name, step)
            else:
                in_entry = self.scale(self.largest_rank) if ".lora_B." in name else 1.0
                weights[name].add_(step.cpu(), alpha=in_entry)

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """The global adapter, which takes the model's shapes to rebuild."""
        if self.over == "full":
            raise UserError(
                "ferret over all parameters makes no adapter: export --to merged or --to ledger"
            )
        factors = load_model().factors
        if factors is None:
            raise UserError("round 0 is the base model: there is no adapter to export yet")
        return dict(factors)

    # --- details --------------------------------------------------------------------------------

    def _estimate(
        self, sketches: Sequence[_Sketch], blocks: Sequence[Block], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """What the sketches stand for, all together, tensor by tensor."""
        for index, block in enumerate(blocks):
            total: dict[str, Tensor] = {}
            for seed, coordinates in sketches:
                gamma = coordinates[index].to(device)
                estimate = reconstruct_block(gamma, block, index, seed, self.basis)
                total = {n: total[n] + t for n, t in estimate.items()} if total else estimate
            yield from total.items()

    def _global_adapter(self, model: Model, seed: int) -> Mapping[str, Tensor]:
        """The factors in the model, to be changed in place; before the first round, the drawn."""
        if model.factors is None:
            parameters = model.attach(self.config(self.largest_rank))
            init_factors(parameters, torch.Generator().manual_seed(seed), self.largest_rank)
            model.factors = {name: p.detach().cpu().clone() for name, p in parameters.items()}
            model.release()
        return model.factors

    def _budget(self, blocks: Sequence[Block]) -> int:
        """K."""
        if self.budget is not None:
            return self.budget
        dense = 4 * sum(block.size for block in blocks)
        fixed, each = 4 * len(blocks), self.bits / 8  # bytes: K_l itself, and a coordinate
        if self.bits < 32:
            fixed, each = fixed + 4 * len(blocks), each + 4 / GROUP  # and scales, at least one
        return max(0, int((dense / (self.compression or DEFAULT_COMPRESSION) - fixed) / each))

    def _most(self, blocks: Sequence[Block]) -> list[int]:
        """The largest K_l that are possible."""
        return [b.size if self.basis == "hadamard" else 2**31 - 1 for b in blocks]

    def _counts(
        self, blocks: Sequence[Block], delta: Callable[[], Iterator[tuple[str, Tensor]]]
    ) -> list[int]:
        """K_l."""
        by_norm = self.allocation == "norm"
        weights = norms(delta(), blocks) if by_norm else [float(b.size) for b in blocks]
        return allocate(self._budget(blocks), weights, self._most(blocks))

    def _shrinkage(self, block: Block, count: int) -> float:
        """1, or under error feedback 1/(1 + ω) for an error of ω: what it loses comes again."""
        if not self.error_feedback:
            return 1.0
        return count / (block.size + (0 if self.basis == "hadamard" else count))

    def _clipped(self, gamma: Tensor) -> Tensor:
        if self.clip is None:
            return gamma
        limit = self.clip / SECOND_MOMENT[self.basis] ** 0.5
        return gamma.clamp(-limit, limit)


class _Sketch(NamedTuple):
    """Coordinates by block, and the seed of their bases."""

    seed: int
    coordinates: list[Tensor]

    def encode(self, bits: Bits) -> dict[str, Tensor]:
        return pack(self.coordinates, bits) | {"seed": torch.tensor([self.seed])}

    @staticmethod
    def decode(tensors: Mapping[str, Tensor], bits: Bits) -> _Sketch:
        """Raises ValueError where the tensors are no sketch."""
        packed = {n: t for n, t in tensors.items() if n not in ("seed", "adapter_seed")}
        return _Sketch(_seed_in(tensors, "seed"), unpack(packed, bits))


def _seed_in(tensors: Mapping[str, Tensor], name: str) -> int:
    seed = tensors.get(name)
    if seed is None or seed.dtype != torch.int64 or seed.shape != (1,) or seed.item() < 0:
        raise ValueError(f"its {name} is not a number of 63 bits")
    return int(seed)


def _added(sums: list[Tensor], gammas: list[Tensor]) -> list[Tensor]:
    """Sums by block; where one has fewer coordinates, those on the first of the other's bases."""
    if len(sums) != len(gammas):
        raise RuntimeError("updates of one round have different blocks")
    added = []
    for a, b in zip(sums, gammas, strict=True):
        longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
        added.append(longer.clone())
        added[-1][: len(shorter)] += shorter
    return added
