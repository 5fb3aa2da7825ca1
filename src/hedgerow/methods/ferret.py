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

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, StrictBool, model_validator

from hedgerow.errors import Diverged, InvalidMessage, UserError
from hedgerow.lazy import torch
from hedgerow.methods.base import (
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Method,
    Payload,
    ServerRound,
    Trained,
    weight_shapes,
)
from hedgerow.methods.factors import init_factors
from hedgerow.methods.fedit import HeldAdapter
from hedgerow.methods.lora import LoraMethod
from hedgerow.sketch import Basis
from hedgerow.sketch.blocks import (
    Block,
    allocate,
    group,
    norms,
    project_blocks,
    reconstruct_block,
)
from hedgerow.sketch.coordinates import ERROR, Bits, Packed, lengths, nbytes, pack
from hedgerow.sketch.layout import MAX_SIZE, SECOND_MOMENT
from hedgerow.wire import Kind, check_kinds, kinds, seed_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.seeds import Seeds
    from hedgerow.settings import TrainingSettings
    from hedgerow.wire import Entry, Update

DEFAULT_COMPRESSION = 128
PAPER = {
    "basis": "uniform",
    "budget": 4096,
    "bits": 32,
    "broadcast_bits": 32,
    "allocation": "norm",
    "seeds": "client",
    "shrink": False,
    "clip": 10.0,
}
"""The paper's settings and its authors' clipping. The budget is for all blocks together: it gives
the 7.8·10³ numbers, up and down, of the paper's table on communication. Their local steps are
`training.optimizer: sgd` with `max_grad_norm: null`."""


class Ferret(HeldAdapter):
    """First-order steps, sent as coordinates on shared random bases."""

    name: str = "ferret"
    summary: ClassVar[str] = "all parameters trained, sent as coordinates on shared random bases"
    reference: ClassVar[str] = "Ferret, arXiv 2409.06277"

    over: Literal["full", "lora"] = "full"
    """Parameters that are trained and sketched: `full`, all of the model's, or `lora`, those of one
    adapter, for which the options of LoRA count."""
    basis: Basis = "hadamard"
    """Distribution of the random bases; `hadamard` is the fastest, `uniform` the paper's."""
    budget: Annotated[int, Field(ge=1)] | None = None
    """Number of coordinates of an update, K = Σ K_l over blocks; with null, `compression`
    decides."""
    compression: Annotated[float, Field(ge=1)] | None = None
    """Number of times that an update is smaller, in bytes, than what is trained (all parameters, or
    the adapter) in float32; with null, `budget` decides, or it is 128 where that is null too."""
    bits: Bits = 1
    """Number of bits of a coordinate on its way up; 32 sends it as it is."""
    broadcast_bits: Bits = 2
    """Number of bits of a coordinate on its way down: what is lost there, no average over clients
    makes good."""
    allocation: Literal["size", "norm"] = "size"
    """Allocation of the coordinates K_l to blocks of parameters: in proportion to the block's
    `size`, or to the `norm` of its update, as in the paper."""
    seeds: Literal["round", "client"] = "round"
    """Seeds of the bases. `round`: one for all clients of a round, so that their coordinates add;
    `client`: one for each, as in the paper, so that their errors are independent and the broadcast
    grows with their number."""
    server_learning_rate: float = Field(1.0, gt=0)
    """Learning rate of the server in the first round, η_1: the factor of the average update."""
    anneal: float = Field(1.0, gt=0, le=1)
    """Factor by which the server's learning rate changes from round to round, η_t = η_1·annealᵗ⁻¹;
    1 keeps it."""
    shrink: bool = True
    """Whether a sketch whose expected error is ω‖Δ_k‖² is sent min(1, 1.5/√(1 + ω)) times as long:
    where the error is large, a whole step would be mostly noise."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Longest step on one base, as the 2-norm ‖γ_j v_j‖; longer ones are cut to it. With null, they
    are left as they are."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of the global steps: the share of its last step that each repeats; 0 is none, else
    every participant keeps a vector of the model's size in float32."""
    error_feedback: bool = False
    """Whether a client adds to its update what its last sketch has lost, and shrinks what it sends
    to 1/(1 + ω) of its length; it keeps a vector of the model's size in float32 on disk."""
    paper: StrictBool = False
    """Whether options that are not given are as in the paper: `basis` uniform, `budget` 4096, 32
    bits both ways, `allocation` norm, `seeds` client, no `shrink`, `clip` 10."""

    same_rank: ClassVar[bool] = True
    averages: ClassVar[bool] = False
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

    def trained_shapes(self, model: Model) -> Mapping[str, Sequence[int]]:
        """Shapes of all weights, or of the adapter."""
        if self.over == "full":
            return weight_shapes(model)
        parameters = model.attach(self.config(self.largest_rank))
        model.release()
        return {name: tuple(p.shape) for name, p in parameters.items()}

    def entry_options(self) -> dict[str, Any]:
        """Options that rebuilding a step takes beside its coordinates."""
        names = ["over", "basis", "broadcast_bits", "momentum"]
        if self.over == "lora":
            names += ["ranks", "alpha", "rslora", "targets"]
        return self.model_dump(mode="json", include=set(names))

    @property
    def clients_remember(self) -> bool:
        """Whether there is error feedback: clients remember what their sketches have lost."""
        return self.error_feedback

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check that the budget fits the blocks (and the adapter the model)."""
        if self.over == "lora":
            LoraMethod.check(self, model, num_clients, training)
        blocks = group(self.trained_shapes(model))
        if max(block.size for block in blocks) > MAX_SIZE:
            raise UserError(f"{model.name} has a weight of more than {MAX_SIZE} entries")
        given, most = self._budget(blocks), sum(self._limits(blocks))
        advice = "a smaller compression" if given < most else "a larger compression"
        if not len(blocks) <= given <= most:
            key = "budget" if self.budget is not None else "compression"
            raise UserError(
                f"method.{key}: {getattr(self, key) or DEFAULT_COMPRESSION:g} is {given} "
                f"coordinates of {self.bits}-bit numbers, and {model.name} takes {len(blocks)} "
                f"(one for each block) to {most}: give {advice}, another budget or other bits"
            )

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Unfreeze all weights, or attach the global adapter; with a snapshot, for Δ_k."""
        if self.over == "full":
            return model.unfreeze()
        parameters = super().start(model, client_round)
        model.take_snapshot(parameters)
        return parameters

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Project Δ_k: its coordinates travel up."""
        blocks = group({name: p.shape for name, p in trained.parameters.items()})
        seed = self._seed(client_round.seeds, client_round.round, client_round.client)
        lost = client_round.memory.load() if self.error_feedback else {}

        def delta() -> Iterator[tuple[str, Tensor]]:
            for name, change in model.trained_delta():
                yield name, change.add_(lost[name].to(change.device)) if name in lost else change

        weights = norms(delta(), blocks) if self.allocation == "norm" else None
        counts = self._counts(self._budget(blocks), blocks, weights)
        projected = project_blocks(delta(), blocks, seed, counts, self.basis)
        pairs = zip(blocks, projected, strict=True)
        shrunk = (gamma * self._shrinkage(block, gamma) for block, gamma in pairs)
        try:
            tensors = pack(shrunk, self.bits, _rotation(seed, up=True))
        except ValueError:
            raise Diverged(
                "the update contains NaN or infinity: a lower training.learning_rate may help"
            ) from None
        tensors |= self._seed_tensors(seed, client_round.seeds)
        if self.error_feedback:
            sent = self._unpacked(tensors, self.bits, up=True)
            rebuilt = self._rebuilt([sent], blocks, model.device)
            client_round.remember(
                {
                    name: change.sub_(estimate).cpu()
                    for (name, change), (_, estimate) in zip(delta(), rebuilt, strict=True)
                }
            )
        return Payload(tensors, {})

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check for the round's seed, and as many coordinates for each block as there may be."""
        update.check_about({})
        blocks = group(expected.shapes)
        counts = self._checked_counts(update.tensors, "counts", blocks)
        seeds = self._seed_tensors(self._seed(expected.seeds, update.round, client), expected.seeds)
        check_kinds(kinds(update.tensors), _sketch_kinds(counts, self.bits) | kinds(seeds))
        for name, seed in seeds.items():
            if not torch.equal(update.tensors[name], seed):
                raise InvalidMessage(f"{name} must be the one that the run derives for this round")

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for as many sketches of all blocks as `aggregate` makes of so many updates."""
        clients, blocks = len(entry.participants), group(shapes)
        given = kinds(entry.tensors)
        one_each = self.seeds == "client"
        # Where counts differ between clients, so do hadamard's bases.
        by_counts = self.basis == "hadamard" and self.allocation == "norm"
        sketches = sum(name.endswith(".seed") for name in given)
        most = clients if one_each or by_counts else 1
        least = most if one_each else 1
        if not least <= sketches <= most:
            raise InvalidMessage(
                f"expected {least} to {most} sketches of {clients} participants, got {sketches}"
            )
        # On other bases, coordinates add up to as many as the longest have.
        summed = 1 if one_each or by_counts else clients
        counts = [
            self._checked_counts(entry.tensors, f"{index}.counts", blocks, summed)
            for index in range(sketches)
        ]
        expected = {"adapter_seed": seed_kind()} if self.over == "lora" else {}
        for index, own in enumerate(counts):
            parts = _sketch_kinds(own, self.broadcast_bits) | {"seed": seed_kind()}
            expected |= {f"{index}.{name}": kind for name, kind in parts.items()}
        check_kinds(given, expected)
        seeds = [int(entry.tensors[f"{index}.seed"]) for index in range(sketches)]
        bases = [(seed, *own) for seed, own in zip(seeds, counts, strict=True)]
        if bases != sorted(set(bases)) or len(set(seeds)) != (clients if one_each else 1):
            raise InvalidMessage(
                "sketches must be on distinct bases, in ascending order, with "
                + ("a seed for each client" if one_each else "one seed")
            )
        if any(int(entry.tensors[name]) < 0 for name in given if name.endswith("seed")):
            raise InvalidMessage("seeds must be non-negative")

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Sum coordinates, η_t Σ p_k γ_k: those on other bases stand beside each other."""
        total, rate = 0, 0.0
        sums: dict[tuple[int, ...], list[Tensor]] = {}
        beside: dict[str, Tensor] = {}
        for update in updates:
            total += update.num_examples
            rate = self.server_learning_rate * self.anneal ** (update.round - 1)
            beside = {n: t for n, t in update.tensors.items() if n == "adapter_seed"}
            seed, gammas = self._unpacked(update.tensors, self.bits, up=True)
            # Which rows a hadamard sketch samples depends on how many; other bases do not.
            key = (seed, *gammas.counts) if self.basis == "hadamard" else (seed,)
            _add(sums.setdefault(key, []), gammas, update.num_examples)
        tensors = dict(beside)
        for index, ((seed, *_), weighted) in enumerate(sorted(sums.items())):
            steps = (self._clipped(gamma * (rate / total)) for gamma in weighted)
            part = pack(steps, self.broadcast_bits, _rotation(seed, up=False))
            part["seed"] = torch.tensor([seed])
            tensors |= {f"{index}.{name}": tensor for name, tensor in part.items()}
        return Aggregate(tensors, {})

    def apply(self, model: Model, entry: Entry) -> None:
        """Add the rebuilt step, w <- w + Σ_l Σ_j γ_lj v_lj, or that plus momentum."""
        sketches: list[_Sketch] = []
        while f"{len(sketches)}.seed" in entry.tensors:
            prefix = f"{len(sketches)}."
            own = {n.removeprefix(prefix): n for n in entry.tensors if n.startswith(prefix)}
            tensors = {name: entry.tensors[key] for name, key in own.items()}
            sketches.append(self._unpacked(tensors, self.broadcast_bits, up=False))
        weights: Mapping[str, Tensor] = dict(model.network.named_parameters())
        if self.over == "lora":
            weights = self._global_adapter(model, int(entry.tensors["adapter_seed"]))
        blocks = group({name: weight.shape for name, weight in weights.items()})
        for name, step in self._rebuilt(sketches, blocks, model.device):
            if self.momentum:
                if name in model.momentum:
                    step += self.momentum * model.momentum[name]
                model.momentum[name] = step
            if self.over == "full":
                model.add(name, step)
            else:
                # In a model's factors the scale is in B.
                scale = self.scale(self.largest_rank) if ".lora_B." in name else 1.0
                weights[name].add_(step.cpu(), alpha=scale)

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """The global adapter, which takes the model's shapes to rebuild."""
        if self.over == "full":
            return Method.adapter(self, entries, client, load_model)
        return super().adapter(entries, client, load_model)

    # --- details --------------------------------------------------------------------------------

    def _rebuilt(
        self, sketches: Sequence[_Sketch], blocks: Sequence[Block], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Sum of the estimates of all sketches, tensor by tensor."""
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

    def _seed(self, seeds: Seeds, round: int, client: Client) -> int:
        """Seed of a client's bases in a round."""
        sender = [client.name] if self.seeds == "client" else []
        return seeds.derive("bases", round, *sender)

    def _seed_tensors(self, seed: int, seeds: Seeds) -> dict[str, Tensor]:
        """Tensors of an update's seeds: of its bases, and of the adapter that all began with."""
        adapter = {"adapter_seed": torch.tensor([seeds.derive("adapter")])}
        return {"seed": torch.tensor([seed])} | (adapter if self.over == "lora" else {})

    def _unpacked(self, tensors: Mapping[str, Tensor], bits: Bits, *, up: bool) -> _Sketch:
        packed = {n: t for n, t in tensors.items() if n not in ("seed", "adapter_seed")}
        seed = int(tensors["seed"])
        return _Sketch(seed, Packed(packed, bits, _rotation(seed, up=up)))

    def _budget(self, blocks: Sequence[Block]) -> int:
        """Number of coordinates in all, K."""
        if self.budget is not None:
            return self.budget
        size = sum(block.size for block in blocks)
        asked = 4 * size / (self.compression or DEFAULT_COMPRESSION)

        def weight(k: int) -> int:
            """Bytes of k coordinates, with their scales and the K_l themselves."""
            counts = [max(1, k * block.size // size) for block in blocks]
            return sum(4 + nbytes(count, self.bits) for count in counts)

        return bisect.bisect_right(range(1, 32 * size), asked, key=weight)

    def _limits(self, blocks: Sequence[Block]) -> list[int]:
        """The largest K_l that are possible."""
        return [b.size if self.basis == "hadamard" else MAX_SIZE for b in blocks]

    def _counts(
        self, budget: int, blocks: Sequence[Block], weights: Sequence[float] | None
    ) -> list[int]:
        """K_l, in proportion to weights, or to the blocks' sizes."""
        weights = weights or [float(block.size) for block in blocks]
        return allocate(budget, weights, self._limits(blocks))

    def _checked_counts(
        self, tensors: Mapping[str, Tensor], name: str, blocks: Sequence[Block], summed: int = 1
    ) -> list[int]:
        """The tensor `name` of K_l.

        Args:
            summed: of how many clients coordinates may have been added, each with its own K_l.

        Raises:
            InvalidMessage: they are not as this method allocates them.
        """
        if kinds(tensors).get(name) != Kind(torch.int32, (len(blocks),)):
            raise InvalidMessage(
                f"expected {name} of dtype int32, one for each of the model's {len(blocks)} blocks"
            )
        counts: list[int] = tensors[name].tolist()
        budget = self._budget(blocks)
        if self.allocation == "size":
            possible = counts == self._counts(budget, blocks, None)
        else:
            limits = zip(counts, self._limits(blocks), strict=True)
            possible = all(1 <= count <= limit for count, limit in limits)
            possible = possible and budget <= sum(counts) <= budget * summed
        if not possible:
            raise InvalidMessage(f"{name} must allocate {budget} coordinates to blocks")
        return counts

    def _shrinkage(self, block: Block, gamma: Tensor) -> float:
        """Factor of a sketch's length, by its expected error."""
        one = 0 if self.basis == "hadamard" else 1
        omega = (block.size / len(gamma) + one) * (1 + ERROR[self.bits]) - 1
        if self.error_feedback:
            return 1 / (1 + omega)
        return min(1.0, 1.5 / (1 + omega) ** 0.5) if self.shrink else 1.0

    def _clipped(self, gamma: Tensor) -> Tensor:
        if self.clip is None:
            return gamma
        limit = self.clip / SECOND_MOMENT[self.basis] ** 0.5
        return gamma.clamp(-limit, limit)


def _sketch_kinds(counts: Sequence[int], bits: Bits) -> dict[str, Kind]:
    """Kinds of what `pack` makes of so many coordinates by block."""
    parts = {name: Kind(t, (sum(each),)) for name, (t, each) in lengths(counts, bits).items()}
    return {"counts": Kind(torch.int32, (len(counts),)), **parts}


class _Sketch(NamedTuple):
    """Coordinates by block, and the seed of their bases."""

    seed: int
    coordinates: Packed


def _rotation(seed: int, *, up: bool) -> int:
    """The seed of the rotations before rounding, which are others than the bases."""
    return seed ^ (1 << 63 if up else 3 << 62)


def _add(sums: list[Tensor], gammas: Sequence[Tensor], weight: int) -> None:
    """Add coordinates, times a weight, to sums by block; fewer are those on the first bases."""
    for index, gamma in enumerate(gammas):
        if index == len(sums):
            sums.append(gamma * weight)
            continue
        more = max(0, len(gamma) - len(sums[index]))
        sums[index] = torch.nn.functional.pad(sums[index], (0, more)) if more else sums[index]
        sums[index][: len(gamma)].add_(gamma, alpha=weight)
