"""An adapter that clients go on training, and exact sums nevertheless: the rest goes into the base.

Whatever adapter clients are to go on from, it differs from the exact sum of theirs by a matrix of
low rank. An entry holds both: under `start.` and PEFT's keys the adapter, and under PEFT's keys
alone the residual, of a rank for each matrix and at least 1; both may be quantized. The
global model is the base with all residuals merged, and the last start adapter beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from hedgerow import lowrank
from hedgerow.adapters import adapter_pair, adapter_pairs, adapter_tensors
from hedgerow.errors import UserError
from hedgerow.lowrank import Factors
from hedgerow.methods.continued import AveragedAdapter
from hedgerow.methods.parts.start_and_residual import split
from hedgerow.methods.quantization import dequantize

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.methods.base import ClientRound
    from hedgerow.model import Model
    from hedgerow.wire import Entry


class ResidualAdapter(AveragedAdapter):
    """A global adapter that is not all of the aggregate; an entry may also have none."""

    entries_accumulate: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def apply(self, model: Model, entry: Entry) -> None:
        """Merge the residual into W, module by module; the global adapter is the entry's."""
        start, residual = map(dequantize, split(entry.tensors))
        for module, factors in adapter_pairs(residual):
            model.merge(module, factors)
        model.factors = dict(start) or None

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """Stack all residuals and the last start adapter."""
        parts: list[Mapping[str, Tensor]] = []
        start: Mapping[str, Tensor] = {}
        for entry in entries:
            start, residual = map(dequantize, split(entry.tensors))
            parts.append(residual)
        if not parts:
            raise UserError("round 0 is the base model: there is no adapter to export yet")
        if start:
            parts.append(start)
        whole = {}
        for pairs in zip(*map(adapter_pairs, parts), strict=True):
            module, _ = pairs[0]
            whole[module] = lowrank.stack([pair for _, pair in pairs])
        return adapter_tensors(whole)


def last_step(client_round: ClientRound) -> Iterator[tuple[str, Factors]]:
    """What the last round has changed, module by module: its residual, and the adapters' change."""
    start, residual = map(dequantize, split(client_round.past(client_round.round - 1).tensors))
    is_first = not start or client_round.round == 2
    earlier = {} if is_first else client_round.past(client_round.round - 2).tensors
    before = dequantize(split(earlier)[0])
    for module, pair in adapter_pairs(residual):
        new, old = adapter_pair(start, module), adapter_pair(before, module)
        gone = old and old._replace(B=-old.B)
        yield module, lowrank.stack([p for p in (pair, new, gone) if p is not None])
