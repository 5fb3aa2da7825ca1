"""FLoRA: federated fine-tuning with heterogeneous low-rank adapters, aggregated by stacking.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", arXiv 2409.05976, section 3 and algorithm 1. Averaging factors is wrong, since
(Σ p_k B_k)(Σ p_k A_k) has cross terms that Σ p_k B_k A_k has not; stacking them is exact, and does
not ask that all clients have one rank.

    every round:
      client k:  attach an adapter of its own rank r_k that changes nothing (B_k = 0), and train it
      server:    A = [p_1 s_1 A_1; …; p_N s_N A_N],  B = [B_1 … B_N],  so B·A = Σ p_k s_k B_k A_k,
                 or their product where that is smaller; by default √S·Vᵀ and U·√S of the product
                 U·S·Vᵀ, by small SVDs, which `compress` cuts
      everybody: W <- W + B·A

What a client's adapter starts from is `restart`. In the paper it is a new random A_k (`zero`). Warm
starts keep the optimiser's moments at the client, and what they belong to: its A_k (`own`), or,
where rounds are so short that a B_k which begins anew never gets far, the averages of both factors
(`shared`). Then the aggregate is the averages' product and what it lacks of the exact sum, which is
merged as the stacked factors are:

    every round (shared):
      client k:  go on from the first r_k rows of the global adapter (A, B); its other rows take
                 part and are not trained
      server:    A, B = averages of the factors, where rows that a client has not are as they were;
                 B'·A' = the exact sum - B·A, by small SVDs
      everybody: W <- W + B'·A', and the global adapter is (A, B)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.methods.base import Expected
from hedgerow.methods.factors import check_factors, check_pairs, factor_kinds
from hedgerow.methods.parts.broadcast import Truncated
from hedgerow.methods.parts.factor_bits import FactorBits
from hedgerow.methods.parts.scaling import Scaling
from hedgerow.methods.parts.start_and_residual import split
from hedgerow.methods.parts.starts import New, Own, Shared, Starts
from hedgerow.methods.parts.sums import ExactSums
from hedgerow.methods.parts.truncation import ChosenCompress
from hedgerow.methods.quantization import Bits, check_step_sizes, quantized_kinds
from hedgerow.methods.residual import ResidualAdapter
from hedgerow.methods.stacked import ExactlyStacked, StackedParts
from hedgerow.methods.weighting import Weighting
from hedgerow.wire import LARGEST_BROADCAST, check_kinds, kinds

if TYPE_CHECKING:
    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.wire import Entry, Kind

FEW_STEPS = 8
"""With fewer local steps a round than that, `warm` is `shared`, else `own`; `bench/README.md` says
what it was chosen by."""

STARTS: dict[str, type[Starts]] = {"zero": New, "own": Own, "shared": Shared}


class FLoRA(ExactlyStacked, ResidualAdapter):
    """Adapters of any ranks: the aggregate is exact, and clients go on from where they were."""

    name: str = "flora"
    summary: ClassVar[str] = "LoRA of different ranks; the aggregate is exact"
    reference: ClassVar[str] = "FLoRA, arXiv 2409.05976"
    bounded_by: ClassVar[str] = (
        "bound the broadcast, with `compress: true` or `compress: {rank: 24}`"
    )
    compresses_broadcast: ClassVar[bool] = True

    restart: Literal["warm", "own", "shared", "zero"] = "warm"
    """Start of the adapters in a round. `zero`: anew, as in the paper; `own`: the client's own A
    and moments; `shared`: the average of all adapters, and own moments; `warm`: `shared` with fewer
    than 8 local steps a round, else `own`."""
    scaling: Weighting = "size"
    """Scaling factors p_k, by which clients' updates are added. `size`: each client's share of the
    round's examples; `uniform`: 1/N for each of N clients; a number for each client, or a list with
    one for each; `adaptive`: by size, in steps as long as clients' losses along the last step
    advise (three more forward passes of one batch for each client in a round)."""
    compress: ChosenCompress = None
    """Cut of the broadcast (`energy`, `rank`, `bits`, `carry`); with `true`, to the size of the
    largest client's update; with null or `false`, it is exact. Of updates of more than 8 GiB in a
    round sketches are added up, if `compress` bounds the broadcast."""
    upload_bits: Bits = 32
    """Number of bits of each number of an update; 32 sends it as it is."""

    @model_validator(mode="after")
    def _stack_is_sent(self) -> Self:
        if self.broadcast == "stack" and (self.compress or self.restart == "shared"):
            other = "`compress`" if self.compress else "`restart: shared`"
            raise ValueError(
                f"`broadcast: stack`: {other} broadcasts no stack: leave one of both out"
            )
        return self

    @classmethod
    def before_choice(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The stack, where one was sent."""
        otherwise = options.get("compress") or options.get("restart") == "shared"
        return {} if otherwise else super().before_choice(options)

    @property
    def clients_remember(self) -> bool:
        """Whether they start warm."""
        return self.restart != "zero"

    @property
    def keeps_optimizer(self) -> bool | None:
        """Whether they start warm: moments are of little use for an A that is drawn anew."""
        return True if self.restart != "zero" else None

    @property
    def parts(self) -> StackedParts:
        """Stacks, or averages and a residual; whole, or cut and carried."""
        parts = replace(super().parts, up=FactorBits(self.upload_bits), weigh=Scaling(self.scaling))
        if self.compress:
            cut = Truncated(self.compress, self.largest_rank)
            return replace(parts, sums=ExactSums, broadcast=cut)
        return parts if self.restart == "zero" else replace(parts, sums=ExactSums)

    def starts(self, training: TrainingSettings) -> Starts:
        """B_k = 0 and a new or the client's own A_k, or its rows of the global adapter."""
        warm = "shared" if training.epochs is None and training.most_steps(0) < FEW_STEPS else "own"
        return STARTS[warm if self.restart == "warm" else self.restart](self)

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check, as for every adapter; and that a bounded broadcast has room for a shared start."""
        super().check(model, num_clients, training)
        bound = self.compress and self.compress.largest(self.largest_rank)
        if bound and isinstance(self.starts(training), Shared) and bound <= self.largest_rank:
            raise UserError(
                f"method.compress: a broadcast of rank {bound} has no room beside the adapter of "
                f"rank {self.largest_rank} that a shared start broadcasts: give a larger `rank`, "
                "or method.restart: own"
            )

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for a pair for each module, and for a shared start another, of the largest rank."""
        start, residual = split(kinds(entry.tensors))
        bits: Bits = self.compress.bits if self.compress else 32
        self._check_start(start, shapes, bits)
        fewest, most = self.possible_sums(len(entry.participants))
        if start or self.compress:
            check_pairs(residual, shapes, {m: min(shape) for m, shape in shapes.items()}, bits)
        elif self.restart == "zero" and self.broadcast == "stack":
            check_factors(residual, shapes, range(fewest, most + 1))
        else:
            least, largest = (
                {module: min(rank, *shape) for module, shape in shapes.items()}
                for rank in (fewest, most)
            )
            stacked = self.broadcast == "stack"
            check_pairs(residual, shapes, largest, least=least if stacked else None)
        check_step_sizes(entry.tensors, bits, LARGEST_BROADCAST)

    def check_derived(self, entry: Entry, expected: Expected) -> None:
        """Check that it has an adapter to start from only where clients start from one."""
        start, _ = split(kinds(entry.tensors))
        if isinstance(self.starts(expected.training), Shared) != bool(start):
            raise InvalidMessage(
                "the adapter that clients start from is missing"
                if not start
                else "unexpected adapter to start from: each client goes on from its own"
            )

    def _check_start(
        self, start: Mapping[str, Kind], shapes: Mapping[str, Sequence[int]], bits: Bits
    ) -> None:
        """Raise `InvalidMessage` unless the adapter that clients go on from may be this one."""
        if not start and self.restart == "shared":
            raise InvalidMessage("the adapter that clients start from is missing")
        if not start:
            return
        if self.restart in ("zero", "own"):
            raise InvalidMessage(f"unexpected adapter to start from, with restart: {self.restart}")
        check_kinds(start, quantized_kinds(factor_kinds(shapes, self.largest_rank), bits))
