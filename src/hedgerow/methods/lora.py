"""What trains: low-rank adapters (LoRA, arXiv 2106.09685), through peft. Shared by its methods.

Two conventions hold for all of them. An *update* holds a client's factors as peft has them, with
`r` and `lora_alpha` beside them, so ΔW_k = s_k·B_k·A_k with s_k = alpha_k / r_k. In an *entry* the
scale is already in the factors, exactly once, so ΔW = B·A.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.lazy import peft
from hedgerow.methods.base import (
    Client,
    ClientRound,
    Expected,
    Holds,
    Method,
    Payload,
    Trained,
    float32_bytes,
)
from hedgerow.methods.factors import check_factors
from hedgerow.wire import kinds

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.targets import Targets
    from hedgerow.wire import Entry, Update


_RANKS = re.compile(r"(\d+(\.\d+)?)?r")


def _valid_alpha(value: float | str) -> float | str:
    if isinstance(value, str) and not _RANKS.fullmatch(value):
        raise ValueError("must be a number, or a multiple of the rank such as 2r")
    if float(value[:-1] or 1) == 0 if isinstance(value, str) else value <= 0:
        raise ValueError("must be above 0")
    return value


class LoraOptions(BaseModel):
    """Options of adapters, whichever method trains them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ranks: (
        Annotated[int, Field(ge=1)]
        | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    ) = 16
    """Rank of a client's adapter: one number for all clients, or a list with one for each; at most
    that of the largest adapted matrix."""
    alpha: Annotated[float | str, AfterValidator(_valid_alpha)] = "2r"
    """Alpha of LoRA, above 0: a number, or a multiple of the client's rank as `2r`. An adapter
    changes a matrix by alpha/r·B·A."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that training leaves out at random; 0 is none."""
    targets: str | list[str] = "all-linear"
    """Modules that get an adapter: `all-linear` (every linear layer but the output, and all
    experts), a list of names, or of their ends, as [q_proj, v_proj], or a regular expression for
    whole names, as '.*(q|v)_proj'."""
    rslora: bool = False
    """Whether adapters are scaled by alpha/√r instead of alpha/r (arXiv 2312.03732)."""

    elsewhere: ClassVar[Mapping[str, str]] = {
        "r": "give `ranks`",
        "lora_alpha": "give `alpha`",
        "lora_dropout": "give `dropout`",
        "target_modules": "give `targets`",
        "use_rslora": "give `rslora`",
        "use_dora": "DoRA divides a weight by its norm once what was learnt is in it, so that "
        "adapters do not add up, and no aggregate of them is exact; leave it out",
        "modules_to_save": "nothing is trained beside adapters; take `fedavg` or `ferret`, which "
        "train all of the model",
        "rank_pattern": "a client's adapter has one rank; take `flora_adalora`, which finds one "
        "for each matrix",
        "layers_to_transform": "give `targets` an expression, as '.*layers\\.[01]\\..*_proj'",
    }
    """Keys of peft's, and what to do here instead, for a sentence to end with."""
    adapts_experts: ClassVar[bool] = True
    """The method can adapt experts that a model keeps as parameters, beside linear layers."""

    def rank(self, client: Client) -> int:
        """Rank of a client, r_k."""
        return self.ranks if isinstance(self.ranks, int) else self.ranks[client.index]

    @property
    def largest_rank(self) -> int:
        """Largest rank of a client."""
        return self.ranks if isinstance(self.ranks, int) else max(self.ranks)

    def scale(self, rank: int) -> float:
        """Scale of a client of this rank, s_k."""
        return scale(rank, self._alpha(rank), self.rslora)

    def config(self, rank: int) -> peft.LoraConfig:
        """Configuration, for peft, of an adapter of this rank that is left for us to initialise."""
        return peft.LoraConfig(
            r=rank,
            lora_alpha=self._alpha(rank),
            lora_dropout=self.dropout,
            target_modules=self.targets,
            use_rslora=self.rslora,
            init_lora_weights=False,
        )

    def matrix_shapes(self, model: Model) -> Mapping[str, Sequence[int]]:
        """Shapes of the adapted matrices, (m, n) by module."""
        return model.adapted_shapes(self.targets, experts=self.adapts_experts)

    def matrices(self, model: Model) -> Targets:
        """What the targets name in the model, and what they leave out."""
        return model.targets(self.targets, experts=self.adapts_experts)

    def check_adapter(
        self, model: Model, num_clients: int | None, same_rank_for: str | None
    ) -> None:
        """Check that ranks fit the clients and the matrices, and that the modules are there.

        Args:
            model: the base.
            num_clients: how many clients the ranks are for; None does not ask.
            same_rank_for: name of a method that needs one rank for all clients, or None.

        Raises:
            UserError: naming the option that does not fit.
        """
        ranks = [self.ranks] if isinstance(self.ranks, int) else self.ranks
        if not isinstance(self.ranks, int) and num_clients not in (None, len(ranks)):
            raise UserError(
                f"method.ranks has {len(ranks)} ranks for {num_clients} clients: "
                "give one for each, or one number for all"
            )
        if same_rank_for and len(set(ranks)) > 1:
            raise UserError(
                f"method.ranks: {same_rank_for} averages adapters of one rank, not of {ranks}: "
                "give one number, or take zero_padding or flora"
            )
        if self.dropout and self.matrices(model).parameters:
            raise UserError(
                "method.dropout: the inputs of experts cannot be left out at random: set "
                "method.dropout=0, or name targets without experts"
            )
        shapes = self.matrix_shapes(model)
        largest = max(min(shape) for shape in shapes.values())
        if max(ranks) > largest:
            raise UserError(
                f"method.ranks: rank {max(ranks)} is above the rank of every targeted matrix of "
                f"{model.name} (at most {largest}): give ranks up to {largest}"
            )

    def _alpha(self, rank: int) -> float:
        if not isinstance(self.alpha, str):
            return self.alpha
        return float(self.alpha[:-1] or 1) * rank


class LoraMethod(LoraOptions, Method):
    """What every method that trains adapters shares."""

    same_rank: ClassVar[bool] = False
    """The method needs one rank for all clients."""

    @property
    def keeps_weights(self) -> bool:
        """Yes: adapters are beside them, or are merged."""
        return True

    @property
    def takes_different_ranks(self) -> bool | None:
        """Whether each client may have its own; nothing, where one participant has all data."""
        return None if self.pools_data else not self.same_rank

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check that ranks fit the clients and the matrices, and that the modules are there."""
        self.check_adapter(
            model,
            num_clients=None if self.pools_data else num_clients,
            same_rank_for=self.name if self.same_rank else None,
        )

    def trained_shapes(self, model: Model) -> Mapping[str, Sequence[int]]:
        """Shapes of the adapted matrices, (m, n) by module."""
        return self.matrix_shapes(model)

    def left_out(self, model: Model) -> list[str]:
        """Say which matrices the targets leave out."""
        return list(self.matrices(model).left_out)

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Collect the client's factors, with PEFT's key names."""
        tensors = {name: factor.detach().cpu() for name, factor in trained.parameters.items()}
        return Payload(tensors, {**self._about(self.rank(client_round.client)), **trained.said})

    def update_holds(self, client: Client, expected: Expected) -> Holds:
        """Memory of the client's factors."""
        return Holds(message=adapter_bytes(expected.shapes, self.rank(client)))

    def aggregate_holds(self, clients: Sequence[Client], expected: Expected) -> Holds:
        """Memory of factors of the largest rank, and of one matrix's of all clients."""
        ranks = [self.rank(client) for client in clients]
        return Holds(
            message=adapter_bytes(expected.shapes, max(ranks)),
            work=stack_bytes(expected.shapes, sum(ranks)),
        )

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check rank and scale, and that there is a pair of the client's rank for each module."""
        rank = self.rank(client)
        update.check_about(self._about(rank))
        check_factors(kinds(update.tensors), expected.shapes, [rank])

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for a pair for each module, all of one rank that its participants may give it."""
        ranks = self.entry_ranks(len(entry.participants))
        check_factors(kinds(entry.tensors), shapes, ranks)

    def entry_ranks(self, participants: int) -> Sequence[int]:
        """The ranks that an entry of so many clients may have, in ascending order.

        Here it has the largest of theirs.
        """
        return self.possible_ranks(participants)[participants - 1 :]

    def possible_ranks(self, participants: int) -> list[int]:
        """The ranks of all clients that so many participants may be, in ascending order.

        Raises:
            InvalidMessage: there are not so many clients.
        """
        if isinstance(self.ranks, int):
            return [self.ranks] * participants
        if participants > len(self.ranks):
            raise InvalidMessage(
                f"expected at most {len(self.ranks)} participants, one for each of method.ranks, "
                f"got {participants}"
            )
        return sorted(self.ranks)

    def possible_sums(self, participants: int) -> tuple[int, int]:
        """The smallest and the largest sum of the ranks of so many participants, Σ r_k.

        More is known only where all clients take part, or all have one rank.
        """
        ranks = self.possible_ranks(participants)
        return sum(ranks[:participants]), sum(ranks[-participants:])

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """Adapter of the last entry, for methods that go on training one."""
        *_, last = [None, *entries]
        if last is None:
            raise UserError("round 0 is the base model: there is no adapter to export yet")
        return dict(last.tensors)

    def _about(self, rank: int, alpha: float | None = None) -> dict[str, str]:
        """Metadata of an update, by peft's names."""
        return adapter_metadata(rank, alpha or self._alpha(rank), self.rslora)


def adapter_bytes(shapes: Mapping[str, Sequence[int]], rank: int) -> int:
    """Bytes of factors of this rank, in float32, of matrices of these shapes (m, n)."""
    return float32_bytes({name: (rank, sum(shape)) for name, shape in shapes.items()})


def stack_bytes(shapes: Mapping[str, Sequence[int]], rank: int) -> int:
    """Bytes that the stacked factors of one matrix take, Σ r_k being `rank`, and their exact sum.

    They are read in float32, and multiplied and measured in float64, three at a time.
    """
    return (4 + 3 * 8) * rank * max(sum(shape) for shape in shapes.values())


def adapter_metadata(rank: int, alpha: float, rslora: bool) -> dict[str, str]:
    """Rank and scale of an adapter, by peft's names."""
    about = {"r": str(rank), "lora_alpha": _exact(alpha)}
    return about | ({"use_rslora": "true"} if rslora else {})


def _exact(number: float) -> str:
    """A number as text that reads back as the same number; whole ones without a point."""
    return str(int(number)) if number == int(number) else repr(number)


def scale(rank: int, alpha: float, rslora: bool) -> float:
    """Scale of an adapter, s = alpha/r, or alpha/√r."""
    return alpha / (rank**0.5 if rslora else rank)


def update_scale(update: Update) -> float:
    """Scale of an update's factors, s_k, from its metadata."""
    about = update.about
    return scale(int(about["r"]), float(about["lora_alpha"]), "use_rslora" in about)
