"""Where clients' adapters start in a round, of their own rank r_k each.

new:      B_k = 0, A_k drawn anew                              (FLoRA's)
own:      B_k = 0, A_k as the client left it
global:   the first r_k rows of the global adapter
shared:   the same, and its other rows take part untrained
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from hedgerow import lowrank
from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.methods.factors import copy_factors, draw_adapter, init_factors, of_factor
from hedgerow.methods.lora import LoraOptions, adapter_metadata, update_scale
from hedgerow.methods.parts.one_adapter import attach_global
from hedgerow.methods.parts.start_and_residual import split
from hedgerow.methods.quantization import dequantize, dequantize_update

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.methods.base import ClientRound, ServerRound
    from hedgerow.model import Model
    from hedgerow.wire import Entry, Update


class Starts(ABC):
    """Start of the clients' adapters, by their options."""

    goes_on: ClassVar[bool] = False
    """Whether clients go on from a global adapter, which is `before`."""

    def __init__(self, options: LoraOptions) -> None:
        self._options = options

    @abstractmethod
    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach a client's adapter; returns its parameters, by PEFT's key names."""

    def kept(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """What the client's next adapter starts from, of the trained one; here nothing."""
        return {}

    def before(self, server_round: ServerRound) -> dict[str, Factors]:
        """The global adapter, by module, that clients went on from; nothing where they did not."""
        return {}

    def change(self, update: Update, server_round: ServerRound) -> Update:
        """A client's own change as one adapter in float32, to be shown to people."""
        return dequantize_update(update)


class New(Starts):
    """An adapter that changes nothing, with a new A_k in every round."""

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Draw A_k from the round's and the client's seed; B_k = 0."""
        rank = self._options.rank(client_round.client)
        parameters = model.attach(self._options.config(rank))
        name = client_round.client.name
        init_factors(
            parameters, client_round.seeds.torch("adapter", client_round.round, name), rank
        )
        return parameters


class Own(New):
    """An adapter that changes nothing, with the A_k that the client's last round ended with."""

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Take the client's own A_k; a new one where it has none."""
        parameters = super().start(model, client_round)
        kept = client_round.memory.load()
        with torch.no_grad():
            for name in parameters.keys() & kept.keys():
                parameters[name].copy_(kept[name])
        return parameters

    def kept(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """A_k, on the CPU."""
        return {n: p.detach().cpu() for n, p in of_factor("lora_A", parameters).items()}


class Global(Starts):
    """The first r_k rows of the global adapter; in round 1 the run's seed draws it."""

    goes_on: ClassVar[bool] = True

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach as much of the global adapter as the client's rank has."""
        rank = self._options.rank(client_round.client)
        return attach_global(model, self._options, rank, client_round.seeds)

    def before(self, server_round: ServerRound) -> dict[str, Factors]:
        """The last entry's adapter; in round 1 what the seed draws, whose B is zero."""
        if server_round.previous is not None:
            return dict(adapter_pairs(self.adapter(server_round.previous)))
        expected = server_round.expected
        drawn = expected.seeds.torch("adapter")
        return dict(adapter_pairs(draw_adapter(expected.shapes, drawn, self._options.largest_rank)))

    def adapter(self, entry: Entry) -> Mapping[str, Tensor]:
        """The global adapter of an entry, in float32: beside a residual, or all of it."""
        return dequantize(split(entry.tensors)[0] or entry.tensors)


class Shared(Global):
    """The global adapter, of which a client trains the first r_k rows; the others take part.

    So every client starts from the same function, and residuals beside the adapter are exact.
    """

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the client's rows, and beside them, frozen, those that it has not."""
        options, rank = self._options, self._options.rank(client_round.client)
        parameters = model.attach(options.config(rank), _beyond(model.factors or {}, rank))
        init_factors(parameters, client_round.seeds.torch("adapter"), options.largest_rank)
        if model.factors is not None:
            copy_factors(parameters, model.factors, options.scale(rank))
        return parameters

    def change(self, update: Update, server_round: ServerRound) -> Update:
        """ΔW_k = s_k·(B_k·A_k - B_0·A_0), of twice the client's rank."""
        if server_round.previous is None:
            return dequantize_update(update)  # B_0 = 0
        s, rank = update_scale(update), int(update.about["r"])
        start = self.adapter(server_round.previous)
        pairs = zip(adapter_pairs(dequantize(update.tensors)), adapter_pairs(start), strict=True)
        change = {}
        for (module, pair), (_, whole) in pairs:
            before = whole.leading(rank)
            change[module] = lowrank.stack([pair, before._replace(B=-before.B / s)])
        rslora = self._options.rslora
        alpha = s * ((2 * rank) ** 0.5 if rslora else 2 * rank)
        about = adapter_metadata(2 * rank, alpha, rslora)
        return dataclasses.replace(update, tensors=adapter_tensors(change), about=about)


def _beyond(factors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The rows of A and columns of B from `rank` on; nothing where there are none."""
    pairs = {m: Factors(A[rank:], B[:, rank:]) for m, (A, B) in adapter_pairs(factors)}
    return adapter_tensors({m: pair for m, pair in pairs.items() if pair.rank})
