"""Ferret: full-parameter federated tuning through shared randomness.

Shu et al., "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models",
arXiv 2409.06277, section 3 and algorithm 1. Clients take ordinary first-order steps on all
parameters and send the coordinates of their update on random bases, which everybody regenerates
from a seed; nobody ever sends, or holds, a base.

    every round (coordinates: random, the paper's):
      client k:  Δ_k = (w after local training) - w
                 for each block l:  γ_kl = coordinates of Δ_kl on K_l random bases of its seed
      server:    γ_l = η_t Σ p_k γ_kl
      everybody: w <- w + Σ_l Σ_j γ_lj v_lj

    every round (coordinates: largest):
      client k:  γ_k = H_k Δ_k, and of each 65,536 of them the largest, as sign × mean size
      server:    γ = H η_t Σ p_k H_kᵀ γ_k, in few bits
      everybody: w <- w + Hᵀ γ

Where this goes past the paper, and what `paper: true` takes back: bases are rows of a randomised
Hadamard matrix H (cheaper by orders of magnitude, and a smaller error), and coordinates have few
bits. The largest of all travel by default, with their places, each client's on a rotation of its
own, so that errors average out; random ones in one bit share a round's seed, so that the server
adds them as they are. What stays with `paper: true`: the estimate is unbiased (the authors' is Δ/3,
which their rates make up for), a block closes at the median tensor's size (theirs at 0.9 of it),
and each round has seeds of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, StrictBool, model_validator

from hedgerow.methods.composed import Composed, Parts
from hedgerow.methods.lora import LoraOptions
from hedgerow.methods.parts.coordinates import CoordinateOptions
from hedgerow.methods.parts.one_adapter import OneAdapter
from hedgerow.methods.parts.server_optimizers import Momentum
from hedgerow.methods.parts.trains import AllWeights

if TYPE_CHECKING:
    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings

PAPER: dict[str, Any] = {
    "coordinates": "random",
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


class Ferret(CoordinateOptions, LoraOptions, Composed):
    """First-order steps, sent as coordinates on shared random bases."""

    name: str = "ferret"
    summary: ClassVar[str] = "all parameters trained, sent as coordinates on shared random bases"
    reference: ClassVar[str] = "Ferret, arXiv 2409.06277"
    compresses_broadcast: ClassVar[bool] = True

    over: Literal["full", "lora"] = "full"
    """Parameters that are trained and sketched: `full`, all of the model's, or `lora`, those of one
    adapter, for which the options of LoRA count."""
    server_learning_rate: float = Field(1.0, gt=0)
    """Learning rate of the server in the first round, η_1: the factor of the average update."""
    anneal: float = Field(1.0, gt=0, le=1)
    """Factor by which the server's learning rate changes from round to round, η_t = η_1·annealᵗ⁻¹;
    1 keeps it."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of the global steps: the share of its last step that each repeats; 0 is none, else
    the server, or with random coordinates everybody, keeps a vector of the model's size in
    float32."""
    error_feedback: bool = False
    """Whether a client adds to its update what its last sketch has lost, and shrinks what it sends
    to 1/(1 + ω) of its length; it keeps a vector of the model's size in float32 on disk."""
    paper: StrictBool = False
    """Whether options that are not given are as in the paper: `coordinates` random, `basis`
    uniform, `budget` 4096, 32 bits both ways, `allocation` norm, `seeds` client, no `shrink`,
    `clip` 10, `weights` uniform."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, options: Any) -> Any:
        return cls._with_paper(options) if isinstance(options, dict) else options

    @model_validator(mode="after")
    def _options_count(self) -> Ferret:
        if self.error_feedback and not self.shrink:
            raise ValueError("`error_feedback` sends updates shorter: leave `shrink: false` out")
        if self.momentum and self.server is not None:
            raise ValueError("give `momentum` or `server`, not both")
        fields = type(self).model_fields
        for choice, keys in self._idle(self.over, self.coordinates).items():
            if idle := sorted(key for key in keys if getattr(self, key) != fields[key].default):
                raise ValueError(
                    f"`{idle[0]}` counts with `{choice}` alone: leave it out, or give both"
                )
        return self

    @classmethod
    def counting(cls, options: Mapping[str, Any]) -> set[str]:
        """All, without those of LoRA where nothing is an adapter, or of random coordinates."""
        whole = cls._with_paper(options)
        idle = cls._idle(whole.get("over", "full"), whole.get("coordinates", "largest"))
        return super().counting(options) - set().union(*idle.values())

    @classmethod
    def _with_paper(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options as they are given, with the paper's, or what others follow from them."""
        if options.get("paper") is True:
            return {**PAPER, **({"budget": None} if "compression" in options else {}), **options}
        return cls.with_choice(options)

    @classmethod
    def _idle(cls, over: str, coordinates: str) -> dict[str, Set[str]]:
        """Options that do not count with these choices, by the choice that they count with."""
        lora = {} if over == "lora" else {"over: lora": LoraOptions.model_fields.keys()}
        if coordinates == "random":
            return {**lora, "coordinates: largest": cls.OF_LARGEST}
        return {**lora, "coordinates: random": cls.OF_RANDOM}

    @property
    def takes_different_ranks(self) -> bool | None:
        """No, over an adapter; else there is none."""
        return False if self.over == "lora" else None

    @property
    def keeps_optimizer(self) -> bool | None:
        """Whether they are not the paper's settings."""
        return not self.paper

    @property
    def parts(self) -> Parts:
        """Coordinates of all weights, or of one adapter, in few bits."""
        momentum = Momentum(momentum=self.momentum) if self.momentum else None
        return Parts(
            trains=AllWeights() if self.over == "full" else OneAdapter(self),
            up=self.uplink(feedback=1.0 if self.error_feedback else None),
            down=self.broadcast,
            feedback_down=float(self.broadcast_feedback) or None,
            rate=lambda round: self.server_learning_rate * self.anneal ** (round - 1),
            clip=self.clipped if self.clip else None,
            server=self.server or momentum,
        )

    def entry_options(self) -> dict[str, Any]:
        """Options that rebuilding a step takes beside its coordinates."""
        names = ["over", "broadcast_bits"]
        of_random = ["basis", "momentum"]
        names += (
            of_random if self.coordinates == "random" else ["coordinates", "broadcast_compression"]
        )
        if self.over == "lora":
            names += ["ranks", "alpha", "rslora", "targets"]
        return self.model_dump(mode="json", include=set(names)) | super().entry_options()

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check that the budget fits the blocks (and the adapter the model)."""
        super().check(model, num_clients, training)
        if self.over == "lora":
            self.check_adapter(model, num_clients, same_rank_for=self.name)
        if self.sketch is not None:
            self.sketch.check(self.trained_shapes(model), model.name)

    def left_out(self, model: Model) -> list[str]:
        """Say which matrices the adapter's targets leave out."""
        return list(self.matrices(model).left_out) if self.over == "lora" else []
