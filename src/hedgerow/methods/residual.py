"""An adapter that clients go on training, and exact sums nevertheless: the rest goes into the base.

Whatever adapter clients are to go on from, it differs from the exact sum of theirs by a matrix of
low rank. An entry holds both: under `start.` and PEFT's keys the adapter, and under PEFT's keys
alone the residual, of a rank for each matrix and at least 1. The global model is the base with all
residuals merged, and the last start adapter beside it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from hedgerow import lowrank
from hedgerow.errors import UserError
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Aggregate, ServerTurn
from hedgerow.methods.fedit import AveragedAdapter
from hedgerow.methods.lora import Part, Stacks, check_factors, check_pairs, exact_sum, finite
from hedgerow.model import adapter_pairs, adapter_tensors
from hedgerow.wire import kinds

if TYPE_CHECKING:
    from hedgerow.model import Model
    from hedgerow.wire import Entry, Update

_START = "start."


class ResidualAdapter(AveragedAdapter):
    """A global adapter that is not all of the aggregate; `next_start` says which."""

    entries_accumulate: ClassVar[bool] = True

    @abstractmethod
    def next_start(self, stacked: Factors, parts: Sequence[Part]) -> Factors:
        """The adapter of one module that clients go on from, with its scale in its factors."""

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """A start adapter of one rank, and a residual of up to the rank of all that is in it."""
        count = len(entry.participants)
        start, residual = _split(kinds(entry.tensors))
        check_factors(start, shapes, self.entry_ranks(count))
        most = sum(self.possible_ranks(count)[-count:]) + self.largest_rank
        check_pairs(residual, shapes, {m: min(*shape, most) for m, shape in shapes.items()})

    def aggregate(self, updates: Iterable[Update], turn: ServerTurn) -> Aggregate:
        """The start adapter, and what it lacks of Σ p_k s_k B_k A_k."""
        stacks = Stacks(updates)
        shares = stacks.shares()
        start: dict[str, Factors] = {}
        residual: dict[str, Factors] = {}

        def applied_and_exact() -> Iterator[tuple[Factors, Factors]]:
            for module in stacks:
                stacked, parts = stacks.factors(module), stacks.parts(module, shares)
                exact = exact_sum(stacked, parts)
                start[module] = self.next_start(stacked, parts)
                residual[module] = difference(exact, start[module])
                yield lowrank.stack([start[module], residual[module]]), exact

        error = lowrank.relative_error(applied_and_exact())
        tensors = {_START + key: factor for key, factor in adapter_tensors(start).items()}
        metrics = finite({"aggregation_error": error})
        return Aggregate(tensors | adapter_tensors(residual), metrics)

    def apply(self, model: Model, entry: Entry) -> None:
        """W <- W + the residual; the global adapter is the entry's."""
        start, residual = _split(entry.tensors)
        for module, factors in adapter_pairs(residual):
            model.merge(module, factors)
        model.factors = start

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """The stack of all residuals and the last start adapter."""
        start: dict[str, Tensor] = {}
        rounds: list[dict[str, Factors]] = []
        for entry in entries:
            start, residual = _split(entry.tensors)
            rounds.append(dict(adapter_pairs(residual)))
        if not rounds:
            raise UserError("round 0 is the base model: there is no adapter to export yet")
        rounds.append(dict(adapter_pairs(start)))
        return adapter_tensors({m: lowrank.stack([r[m] for r in rounds]) for m in rounds[0]})


def difference(exact: Factors, start: Factors) -> Factors:
    """What `start` lacks of `exact`, without what float32 cannot tell from zero beside `exact`."""
    minus = start.double()
    rest = lowrank.svd(lowrank.stack([exact, minus._replace(B=-minus.B)]))
    smallest = torch.finfo(torch.float32).eps * lowrank.norm(exact)
    return rest.factors(max(1, int((rest.values > smallest).sum()))).float()


_T = TypeVar("_T")


def _split(tensors: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
    """The start adapter, by PEFT's keys, and the residual."""
    start = {k.removeprefix(_START): tensors[k] for k in tensors if k.startswith(_START)}
    return start, {k: tensors[k] for k in tensors if not k.startswith(_START)}
