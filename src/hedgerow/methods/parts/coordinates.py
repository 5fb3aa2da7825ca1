"""Options of an update's coordinates on random bases, and how they travel.

The `largest` of all coordinates on a rotation of each client's own, with their places; or those on
so many `random` bases that nothing but a seed says which ones they are (Ferret, arXiv 2409.06277).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hedgerow.methods.parts import shrink
from hedgerow.methods.parts.bits import FewBits
from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.dense import Dense
from hedgerow.methods.parts.feedback import Feedback
from hedgerow.methods.parts.sketch import Budget, Sketch
from hedgerow.methods.parts.top_k import TopK
from hedgerow.methods.parts.uplink import Uplink
from hedgerow.sketch import Basis
from hedgerow.sketch.coordinates import Bits
from hedgerow.sketch.layout import SECOND_MOMENT

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_COMPRESSION = 128


class CoordinateOptions(BaseModel):
    """Which coordinates, how many, and in how many bits."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    coordinates: Literal["largest", "random"] = "largest"
    """Coordinates of an update that travel: the `largest` on all bases, with their places, or those
    on K `random` bases, as in the paper; these by default where one of their own options is other
    than by default (`basis`, `budget`, `allocation`, `seeds`, `clip`)."""
    basis: Basis = "hadamard"
    """Distribution of the random bases; `hadamard` is the fastest, `uniform` the paper's."""
    budget: Annotated[int, Field(ge=1)] | None = None
    """Number of coordinates of an update, K = Σ K_l over blocks; with null, `compression`
    decides."""
    compression: Annotated[float, Field(ge=1)] | None = None
    """Number of times that an update is smaller, in bytes, than what is trained (all parameters, or
    the adapter) in float32; with null, `budget` decides, or it is 128 where that is null too."""
    bits: Bits = 1
    """Number of bits of a coordinate on its way up; 32 sends random ones as they are."""
    broadcast_bits: Bits = 2
    """Number of bits of a coordinate on its way down, of all bases where the largest travel up:
    what is lost there, no average over clients makes good."""
    broadcast_compression: Annotated[float, Field(ge=1)] | None = None
    """Number of times that the broadcast is smaller, in bytes, than what is trained in float32: the
    largest coordinates of the mean travel. With null, all do, in `broadcast_bits`."""
    broadcast_feedback: Feedback = False
    """Whether the server adds to its broadcast what its codec has lost of earlier ones: `true`, or
    a factor for what is owed, above 0, with which it is forgotten. The server keeps a vector of the
    size of what is trained in float32 on disk."""
    allocation: Literal["size", "norm"] = "size"
    """Allocation of random coordinates K_l to blocks of parameters: in proportion to the block's
    `size`, or to the `norm` of its update, as in the paper."""
    seeds: Literal["round", "client"] = "round"
    """Seeds of the random bases. `round`: one for all clients of a round, so that their coordinates
    add; `client`: one for each, as in the paper, so that their errors are independent and the
    broadcast grows with their number."""
    shrink: bool = True
    """Whether an update whose expected error is ω‖Δ_k‖² is sent min(1, 1.5/√(1 + ω)) times as long:
    where the error is large, a whole step would be mostly noise."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Longest mean update on one random base, as the 2-norm ‖γ_j v_j‖; longer ones are cut to it,
    before they are multiplied with the server's learning rate. With null, they are left as they
    are."""

    OF_RANDOM: ClassVar[frozenset[str]] = frozenset(
        {"basis", "budget", "allocation", "seeds", "clip"}
    )
    """Options that count with random coordinates alone."""
    OF_LARGEST: ClassVar[frozenset[str]] = frozenset(
        {"broadcast_compression", "broadcast_feedback"}
    )
    """Options that count with the largest coordinates alone."""

    @classmethod
    def with_choice(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options as they are given, and which coordinates they are of."""
        given = {
            key
            for key in cls.OF_RANDOM & options.keys()
            if options[key] not in (None, cls.model_fields[key].default)
        }
        return {**({"coordinates": "random"} if given else {}), **options}

    @model_validator(mode="after")
    def _coordinates_fit(self) -> CoordinateOptions:
        if self.budget is not None and self.compression is not None:
            raise ValueError("give `budget` or `compression`, not both")
        if self.coordinates == "largest" and self.bits == 32:
            raise ValueError("`bits`: the largest coordinates travel in 1, 2, 4 or 8 bits, not 32")
        default = type(self).model_fields["broadcast_bits"].default
        if self.broadcast_compression is not None and self.broadcast_bits != default:
            raise ValueError("give `broadcast_compression` or `broadcast_bits`, not both")
        loses = self.coordinates == "random" or self.broadcast.error
        if self.broadcast_feedback and not loses:
            raise ValueError(
                "`broadcast_feedback`: a broadcast in 32 bits loses nothing: give fewer "
                "`broadcast_bits`, or `broadcast_feedback: false`"
            )
        _ = self.codec, self.broadcast  # which raise where a compression does not fit
        return self

    def uplink(self, feedback: float | None) -> Uplink:
        """What updates pass through.

        Args:
            feedback: decay of what clients owe; None: there is no error feedback.
        """
        lengths = shrink.bounded if self.shrink else shrink.whole
        return Uplink(
            through=self.sketch or Dense(),
            codec=self.codec,
            shrink=lengths if feedback is None else shrink.contraction,
            feedback=feedback,
        )

    @property
    def codec(self) -> Codec:
        """What coordinates are written with on their way up."""
        if self.bits == 32 or self.coordinates == "random":
            return FewBits(bits=self.bits)
        advice = "other `bits`, or `coordinates: random`"
        return _largest("compression", self._compression, self.bits, advice)

    @property
    def broadcast(self) -> Codec:
        """What coordinates are written with on their way down."""
        if self.broadcast_compression is None:
            return FewBits(bits=self.broadcast_bits)
        advice = "or `broadcast_bits` instead"
        return _largest("broadcast_compression", self.broadcast_compression, 1, advice)

    @property
    def sketch(self) -> Sketch | None:
        """The map to random coordinates; None where the largest travel."""
        if self.coordinates == "largest":
            return None
        budget = Budget(self.budget, self._compression, FewBits(bits=self.bits))
        return Sketch(self.basis, budget, self.allocation, shared=self.seeds == "round")

    def clipped(self, gamma: Tensor) -> Tensor:
        """Coordinates γ, cut to `clip`."""
        limit = (self.clip or 0.0) / SECOND_MOMENT[self.basis] ** 0.5
        return gamma.clamp(-limit, limit)

    @property
    def _compression(self) -> float:
        return self.compression or DEFAULT_COMPRESSION


def _largest(key: str, compression: float, bits: Literal[1, 2, 4, 8], advice: str) -> TopK:
    """As many of the largest coordinates as an option leaves.

    Raises:
        ValueError: there is no such share of them.
    """
    try:
        return TopK.within(32 / compression, bits)
    except ValueError:
        raise ValueError(
            f"`{key}`: {compression:g} does not fit the largest coordinates of {bits} bit"
            f"{'s' if bits > 1 else ''} each: give another, {advice}"
        ) from None
