"""What trains: low-rank adapters (LoRA, arXiv 2106.09685), through peft. Shared by its methods.

Two conventions hold for all of them. An *update* holds a client's factors as peft has them, with
`r` and `lora_alpha` beside them, so ΔW_k = s_k·B_k·A_k with s_k = alpha_k / r_k. In an *entry* the
scale is already in the factors, exactly once, so ΔW = B·A.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import peft
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from hedgerow import lowrank
from hedgerow.errors import InvalidMessage, UserError
from hedgerow.lowrank import Factors, SpooledStack
from hedgerow.methods.base import Aggregate, Client, Expected, Method, Payload, Trained, Turn
from hedgerow.methods.encoding import Bits, encoded_kinds
from hedgerow.model import adapter_pairs, adapter_tensors
from hedgerow.wire import Kind, check_kinds, kinds

if TYPE_CHECKING:
    from hedgerow.experiment import TrainingSettings
    from hedgerow.model import Model
    from hedgerow.wire import Entry, Update

_RANKS = re.compile(r"(\d+(\.\d+)?)?r")


def _valid_alpha(value: float | str) -> float | str:
    if isinstance(value, str) and not _RANKS.fullmatch(value):
        raise ValueError("must be a number, or a multiple of the rank such as 2r")
    if float(value[:-1] or 1) == 0 if isinstance(value, str) else value <= 0:
        raise ValueError("must be above 0")
    return value


class LoraMethod(Method):
    """The options of every method that trains adapters, and what they share."""

    ranks: (
        Annotated[int, Field(ge=1)]
        | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    ) = 16
    """One rank for all clients, or a list with one for each."""
    alpha: Annotated[float | str, AfterValidator(_valid_alpha)] = "2r"
    """LoRA's alpha: a number, or a multiple of the client's rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the output), or names such as [q_proj, v_proj]."""
    rslora: bool = False
    """Scale by alpha/√r instead of alpha/r (arXiv 2312.03732)."""

    same_rank: ClassVar[bool] = False
    """The method needs one rank for all clients."""

    def rank(self, client: Client) -> int:
        """r_k."""
        return self.ranks if isinstance(self.ranks, int) else self.ranks[client.index]

    @property
    def largest_rank(self) -> int:
        """The largest r_k."""
        return self.ranks if isinstance(self.ranks, int) else max(self.ranks)

    def scale(self, rank: int) -> float:
        """s_k of a client of this rank."""
        return scale(rank, self._alpha(rank), self.rslora)

    def config(self, rank: int) -> peft.LoraConfig:
        """peft's configuration of an adapter of this rank, left for us to initialise."""
        return peft.LoraConfig(
            r=rank,
            lora_alpha=self._alpha(rank),
            lora_dropout=self.dropout,
            target_modules=self.targets,
            use_rslora=self.rslora,
            init_lora_weights=False,
        )

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """The list of ranks fits the clients, the ranks fit the matrices, the modules are there."""
        ranks = [self.ranks] if isinstance(self.ranks, int) else self.ranks
        if not isinstance(self.ranks, int) and not self.pools_data and len(ranks) != num_clients:
            raise UserError(
                f"method.ranks has {len(ranks)} ranks for {num_clients} clients: "
                "give one for each, or one number for all"
            )
        if self.same_rank and len(set(ranks)) > 1:
            raise UserError(
                f"method.ranks: {self.name} averages adapters of one rank, not of {ranks}: "
                "give one number, or take zero_padding or flora"
            )
        shapes = model.adapted_shapes(self.targets)
        largest = max(min(shape) for shape in shapes.values())
        if max(ranks) > largest:
            raise UserError(
                f"method.ranks: rank {max(ranks)} is above the rank of every targeted matrix of "
                f"{model.name} (at most {largest}): give ranks up to {largest}"
            )

    def trained_shapes(self, model: Model) -> Mapping[str, Sequence[int]]:
        """Of the adapted matrices, (m, n) by module."""
        return model.adapted_shapes(self.targets)

    def update(self, model: Model, turn: Turn, trained: Trained) -> Payload:
        """The client's factors, with PEFT's key names."""
        tensors = {name: factor.detach().cpu() for name, factor in trained.parameters.items()}
        return Payload(tensors, self._about(self.rank(turn.client)))

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """The rank and scale are the client's, and there is a pair of that rank for each module."""
        rank = self.rank(client)
        update.check_about(self._about(rank))
        check_factors(kinds(update.tensors), expected.shapes, [rank])

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """It has a pair for each module, all of one rank that its participants may give it."""
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
            raise InvalidMessage(f"it has {participants} participants of {len(self.ranks)} clients")
        return sorted(self.ranks)

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """The last entry is the whole adapter, for methods that go on training one."""
        *_, last = [None, *entries]
        if last is None:
            raise UserError("round 0 is the base model: there is no adapter to export yet")
        return dict(last.tensors)

    def _about(self, rank: int, alpha: float | None = None) -> dict[str, str]:
        """What an update says of itself, in peft's words."""
        about = {"r": str(rank), "lora_alpha": _exact(alpha or self._alpha(rank))}
        return about | ({"use_rslora": "true"} if self.rslora else {})

    def _alpha(self, rank: int) -> float:
        if not isinstance(self.alpha, str):
            return self.alpha
        return float(self.alpha[:-1] or 1) * rank


def _exact(number: float) -> str:
    """A number as text that reads back as the same number; whole ones without a point."""
    return str(int(number)) if number == int(number) else repr(number)


def scale(rank: int, alpha: float, rslora: bool) -> float:
    """s = alpha/r, or alpha/√r."""
    return alpha / (rank**0.5 if rslora else rank)


def update_scale(update: Update) -> float:
    """s_k, from what the update says of itself."""
    about = update.about
    return scale(int(about["r"]), float(about["lora_alpha"]), "use_rslora" in about)


def check_factors(
    given: Mapping[str, Kind], shapes: Mapping[str, Sequence[int]], ranks: Sequence[int]
) -> None:
    """Raise `InvalidMessage` unless these are an adapter's factors, in float32.

    Args:
        given: what they are, by PEFT's key names.
        shapes: (m, n) of the adapted matrices, by module.
        ranks: those that the adapter may have, in ascending order.
    """
    first = next(iter(factor_kinds(shapes, 1)), "")
    rank = given[first].shape[0] if first in given and given[first].shape else ranks[0]
    if rank not in ranks:
        possible = " to ".join(str(rank) for rank in sorted({ranks[0], ranks[-1]}))
        raise InvalidMessage(f"it is an adapter of rank {rank}, not {possible}")
    check_kinds(given, factor_kinds(shapes, rank))


def check_pairs(
    given: Mapping[str, Kind],
    shapes: Mapping[str, Sequence[int]],
    most: Mapping[str, int],
    bits: Bits = 32,
    least: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Raise `InvalidMessage` unless these are factors, each module's of its own rank.

    Args:
        given: what they are, by PEFT's key names.
        shapes: (m, n) of the adapted matrices, by module.
        most: the largest rank that each module may have.
        bits: of each number, as `encoding.encode` has them.
        least: the smallest rank that each module may have; 1 if not given.

    Returns:
        The rank of each module.
    """
    ranks: dict[str, int] = {}
    expected: dict[str, Kind] = {}
    for module, shape in shapes.items():
        first = next(iter(factor_kinds({module: shape}, 1)))
        ranks[module] = given[first].shape[0] if first in given and given[first].shape else 1
        if ranks[module] > most[module]:
            raise InvalidMessage(f"{module} has rank {ranks[module]}, above {most[module]}")
        expected |= factor_kinds({module: shape}, ranks[module])
    check_kinds(given, encoded_kinds(expected, bits))
    for module, rank in (least or {}).items():
        if ranks[module] < rank:
            raise InvalidMessage(f"{module} has rank {ranks[module]}, below {rank}")
    return ranks


def factor_kinds(shapes: Mapping[str, Sequence[int]], rank: int) -> dict[str, Kind]:
    """What the factors of an adapter of this rank are, for matrices of these shapes (m, n)."""
    with torch.device("meta"):
        pairs = {
            module: Factors(torch.empty(rank, n), torch.empty(m, rank))
            for module, (m, n) in shapes.items()
        }
    return kinds(adapter_tensors(pairs))


def init_factors(parameters: Mapping[str, Tensor], generator: torch.Generator, rows: int) -> None:
    """A new adapter that changes nothing yet: A as peft draws it, B zero.

    `rows` rows of A are drawn and the first r kept, so that clients of different ranks that share
    a generator's seed share rows.
    """
    with torch.no_grad():
        for _, (A, B) in adapter_pairs(parameters):
            bound = A.shape[1] ** -0.5  # Kaiming's with a = √5
            draws = torch.empty(rows, A.shape[1]).uniform_(-bound, bound, generator=generator)
            A.copy_(draws[: A.shape[0]])
            B.zero_()


def draw_adapter(
    shapes: Mapping[str, Sequence[int]], generator: torch.Generator, rank: int
) -> dict[str, Tensor]:
    """The adapter of this rank that `init_factors` gives a model with matrices of these shapes."""
    pairs = {m: Factors(torch.empty(rank, n), torch.empty(o, rank)) for m, (o, n) in shapes.items()}
    factors = adapter_tensors(pairs)
    init_factors(factors, generator, rank)
    return factors


def copy_factors(
    parameters: Mapping[str, nn.Parameter], factors: Mapping[str, Tensor], scale: float
) -> None:
    """Continue from an entry's factors (scale in B): as many rows of A, columns of B as both have.

    What an adapter has beyond them stays as it is: the entry is of a lower rank where no client of
    the largest took part.
    """
    source = dict(adapter_pairs(factors))
    with torch.no_grad():
        for module, (A, B) in adapter_pairs(parameters):
            rank = min(A.shape[0], source[module].rank)
            A[:rank] = source[module].A[:rank]
            B[:, :rank] = source[module].B[:, :rank] / scale


class Part(NamedTuple):
    """Where one client's factors are in a stack, and what they count."""

    rows: slice
    """Its rows of A and columns of B."""
    weight: float
    """p_k."""
    scale: float
    """s_k."""


class Stacks:
    """The clients' factors, stacked module by module; they wait on disk until they are asked for.

    Attributes:
        clients: who sent them, in their order.
        num_examples: |D_k| of each.
    """

    def __init__(self, updates: Iterable[Update]) -> None:
        """Take updates with PEFT's keys, `r` and `lora_alpha`, as they arrive."""
        spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (gone with the last stack)
        self._stacks: dict[str, SpooledStack] = defaultdict(lambda: SpooledStack(spool))
        self.clients: list[str] = []
        self.num_examples: list[int] = []
        self._ranks: dict[str, list[int]] = defaultdict(list)
        self._scales: list[float] = []
        for update in updates:
            for module, pair in adapter_pairs(update.tensors):
                self._stacks[module].add(pair)
                self._ranks[module].append(pair.rank)
            self.clients.append(update.client)
            self.num_examples.append(update.num_examples)
            self._scales.append(update_scale(update))

    def __iter__(self) -> Iterator[str]:
        """The modules, in a fixed order."""
        return iter(sorted(self._stacks))

    def shape(self, module: str) -> tuple[int, int]:
        """(m, n) of the adapted matrix."""
        return self._stacks[module].shape

    def shares(self) -> list[float]:
        """p_k = n_k / Σ n."""
        total = sum(self.num_examples)
        return [count / total for count in self.num_examples]

    def stack(self, module: str, weights: Sequence[float]) -> tuple[Factors, list[Part]]:
        """A of shape (Σ r_k, n) and B of shape (m, Σ r_k), as sent, and whose rows are whose.

        The clients count `weights`.
        """
        ((stacked, parts),) = self.pieces(module, weights)
        return stacked, parts

    def pieces(
        self, module: str, weights: Sequence[float], most: float = math.inf
    ) -> Iterator[tuple[Factors, list[Part]]]:
        """The stack of a module in pieces of `most` rows (or of one client that has more).

        The parts' rows are those of their piece.
        """
        ranks = self._ranks[module]
        first = 0
        while first < len(ranks):
            fitting = takewhile(lambda end: end <= most, accumulate(ranks[first:]))
            last = first + max(len(list(fitting)), 1)
            own = slice(first, last)
            given = zip(
                *(accumulate(ranks[own]), ranks[own], weights[own], self._scales[own]), strict=True
            )
            parts = [Part(slice(end - rank, end), weight, s) for end, rank, weight, s in given]
            yield self._stacks[module].factors(first, last), parts
            first = last


def exact_sum(stacked: Factors, parts: Sequence[Part]) -> Factors:
    """Σ p_k s_k B_k A_k as one pair, in float64: A = [p_1 s_1 A_1; …], B = [B_1 …].

    Args:
        stacked: A of shape (Σ r_k, n) and B of shape (m, Σ r_k), which stay as they are.
        parts: of each client in turn.
    """
    counts = torch.tensor([part.weight * part.scale for part in parts], dtype=torch.float64)
    ranks = torch.tensor([part.rows.stop - part.rows.start for part in parts])
    A = stacked.A.double() * counts.repeat_interleave(ranks)[:, None]
    return Factors(A, stacked.B.double())


def aggregate_adapters(
    updates: Iterable[Update], combine: Callable[[Factors, Sequence[Part], Factors], Factors]
) -> Aggregate:
    """Combine the clients' factors module by module, and measure the noise that this makes.

    Args:
        updates: each with PEFT's keys, `r` and `lora_alpha`.
        combine: from the stacked factors of one module, whose rows are whose, and their exact
            sum, to the factors that are broadcast.

    Returns:
        The factors, and `aggregation_error`: how far their products are from Σ p_k s_k B_k A_k,
        relative to it, in Frobenius norm over all modules (left out where that is zero).
    """
    stacks = Stacks(updates)
    shares = stacks.shares()
    combined: dict[str, Factors] = {}

    def applied_and_exact() -> Iterator[tuple[Factors, Factors]]:
        for module in stacks:
            stacked, parts = stacks.stack(module, shares)
            exact = exact_sum(stacked, parts)
            combined[module] = combine(stacked, parts, exact)
            yield combined[module], exact

    error = lowrank.relative_error(applied_and_exact())
    return Aggregate(adapter_tensors(combined), finite({"aggregation_error": error}))


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Without what is infinite: clients can make the exact sum zero, to which errors relate."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
