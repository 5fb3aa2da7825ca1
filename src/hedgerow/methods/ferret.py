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
What stays with it: the estimate is unbiased (the authors' is Δ/3, which their rates make up for), a
block closes at the median tensor's size (theirs at 0.9 of it), and each round has seeds of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, model_validator

from hedgerow.errors import UserError
from hedgerow.methods.composed import Composed, Parts
from hedgerow.methods.lora import LoraOptions
from hedgerow.methods.parts import shrink
from hedgerow.methods.parts.bits import FewBits
from hedgerow.methods.parts.one_adapter import OneAdapter
from hedgerow.methods.parts.server_optimizers import Momentum
from hedgerow.methods.parts.sketch import Sketch, coordinates_in
from hedgerow.methods.parts.trains import AllWeights
from hedgerow.methods.parts.uplink import Uplink
from hedgerow.sketch import Basis
from hedgerow.sketch.blocks import Block, group
from hedgerow.sketch.coordinates import Bits
from hedgerow.sketch.layout import MAX_SIZE, SECOND_MOMENT

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings

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
    "weights": "uniform",
}
"""The paper's settings and its authors' clipping. The budget is for all blocks together: it gives
the 7.8·10³ numbers, up and down, of the paper's table on communication. Their local steps are
`training.optimizer: sgd` with `max_grad_norm: null`."""


class Ferret(LoraOptions, Composed):
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
    """Longest mean update on one base, as the 2-norm ‖γ_j v_j‖; longer ones are cut to it, before
    they are multiplied with the server's learning rate. With null, they are left as they are."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of the global steps: the share of its last step that each repeats; 0 is none, else
    every participant keeps a vector of the model's size in float32."""
    error_feedback: bool = False
    """Whether a client adds to its update what its last sketch has lost, and shrinks what it sends
    to 1/(1 + ω) of its length; it keeps a vector of the model's size in float32 on disk."""
    paper: StrictBool = False
    """Whether options that are not given are as in the paper: `basis` uniform, `budget` 4096, 32
    bits both ways, `allocation` norm, `seeds` client, no `shrink`, `clip` 10, `weights` uniform."""

    @model_validator(mode="before")
    @classmethod
    def _paper_settings(cls, options: Any) -> Any:
        if isinstance(options, dict) and options.get("paper") is True:
            given = PAPER if "compression" not in options else PAPER | {"budget": None}
            return {**given, **options}
        return options

    @model_validator(mode="after")
    def _options_count(self) -> Ferret:
        if self.budget is not None and self.compression is not None:
            raise ValueError("give `budget` or `compression`, not both")
        if self.error_feedback and not self.shrink:
            raise ValueError("`error_feedback` sends updates shorter: leave `shrink: false` out")
        if self.momentum and self.server is not None:
            raise ValueError("give `momentum` or `server`, not both")
        fields = type(self).model_fields
        unused = fields.keys() - self.counting({"over": self.over})
        idle = sorted(key for key in unused if getattr(self, key) != fields[key].default)
        if idle:
            raise ValueError(
                f"`{idle[0]}` counts with `over: lora` alone: leave it out, or give both"
            )
        return self

    @classmethod
    def counting(cls, options: Mapping[str, Any]) -> set[str]:
        """All, or without those of LoRA where nothing is an adapter."""
        idle = set() if options.get("over") == "lora" else set(LoraOptions.model_fields)
        return super().counting(options) - idle

    @property
    def keeps_optimizer(self) -> bool | None:
        """Whether they are not the paper's settings."""
        return not self.paper

    @property
    def parts(self) -> Parts:
        """Sketches of all weights, or of one adapter, in few bits."""
        lengths = shrink.contraction if self.error_feedback else shrink.bounded
        momentum = Momentum(momentum=self.momentum) if self.momentum else None
        return Parts(
            trains=AllWeights() if self.over == "full" else OneAdapter(self),
            up=Uplink(
                through=self._sketch,
                codec=FewBits(bits=self.bits),
                shrink=lengths if self.error_feedback or self.shrink else shrink.whole,
                feedback=1.0 if self.error_feedback else None,
            ),
            down=FewBits(bits=self.broadcast_bits),
            rate=lambda round: self.server_learning_rate * self.anneal ** (round - 1),
            clip=None if self.clip is None else self._clipped,
            server=self.server or momentum,
        )

    def entry_options(self) -> dict[str, Any]:
        """Options that rebuilding a step takes beside its coordinates."""
        names = ["over", "basis", "broadcast_bits", "momentum"]
        if self.over == "lora":
            names += ["ranks", "alpha", "rslora", "targets"]
        return self.model_dump(mode="json", include=set(names)) | super().entry_options()

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check that the budget fits the blocks (and the adapter the model)."""
        if self.over == "lora":
            self.check_adapter(model, num_clients, same_rank_for=self.name)
        blocks = group(self.trained_shapes(model))
        if max(block.size for block in blocks) > MAX_SIZE:
            raise UserError(f"{model.name} has a weight of more than {MAX_SIZE} entries")
        given, most = self._budget(blocks), sum(self._sketch.limits(blocks))
        advice = "a smaller compression" if given < most else "a larger compression"
        if not len(blocks) <= given <= most:
            key = "budget" if self.budget is not None else "compression"
            raise UserError(
                f"method.{key}: {getattr(self, key) or DEFAULT_COMPRESSION:g} is {given} "
                f"coordinates of {self.bits}-bit numbers, and {model.name} takes {len(blocks)} "
                f"(one for each block) to {most}: give {advice}, another budget or other bits"
            )

    def left_out(self, model: Model) -> list[str]:
        """Say which matrices the adapter's targets leave out."""
        return list(self.matrices(model).left_out) if self.over == "lora" else []

    @property
    def _sketch(self) -> Sketch:
        return Sketch(self.basis, self._budget, self.allocation, shared=self.seeds == "round")

    def _budget(self, blocks: Sequence[Block]) -> int:
        """Number of coordinates in all, K."""
        if self.budget is not None:
            return self.budget
        size = sum(block.size for block in blocks)
        asked = 4 * size / (self.compression or DEFAULT_COMPRESSION)
        return coordinates_in(asked, blocks, FewBits(bits=self.bits).nbytes)

    def _clipped(self, gamma: Tensor) -> Tensor:
        limit = (self.clip or 0.0) / SECOND_MOMENT[self.basis] ** 0.5
        return gamma.clamp(-limit, limit)
