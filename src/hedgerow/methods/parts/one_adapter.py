"""One adapter for all clients, beside the base: what trains is both of its factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow.adapters import adapter_pairs
from hedgerow.errors import UserError
from hedgerow.lazy import torch
from hedgerow.methods.factors import copy_factors, init_factors
from hedgerow.methods.lora import LoraOptions
from hedgerow.methods.parts.trains import Trains
from hedgerow.methods.parts.values import Shapes
from hedgerow.wire import seed_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.methods.base import ClientRound
    from hedgerow.model import Model
    from hedgerow.seeds import Seeds
    from hedgerow.wire import Entry, Kind


class OneAdapter(Trains):
    """An adapter of one rank whose factors' changes add; the seed that drew it travels."""

    keeps_weights: ClassVar[bool] = True

    def __init__(self, options: LoraOptions) -> None:
        self._options = options

    def shapes(self, model: Model) -> Shapes:
        """Shapes of the factors, by PEFT's key names."""
        parameters = model.attach(self._options.config(self._options.largest_rank))
        model.release()
        return {name: tuple(p.shape) for name, p in parameters.items()}

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the global adapter, with a snapshot."""
        rank = self._options.rank(client_round.client)
        parameters = attach_global(model, self._options, rank, client_round.seeds)
        model.take_snapshot(parameters)
        return parameters

    def add(self, model: Model, steps: Iterable[tuple[str, Tensor]], entry: Entry) -> None:
        """Add to both factors; a model's have their scale in B."""
        factors = self._global(model, int(entry.tensors["adapter_seed"]))
        scale = self._options.scale(self._options.largest_rank)
        for name, step in steps:
            factors[name].add_(step.cpu(), alpha=scale if ".lora_B." in name else 1.0)

    def derived(self, seeds: Seeds) -> dict[str, Tensor]:
        """The seed of the adapter that all began with."""
        return {"adapter_seed": torch.tensor([seeds.derive("adapter")])}

    def derived_kinds(self) -> dict[str, Kind]:
        """Kind of a seed."""
        return {"adapter_seed": seed_kind()}

    def models(self, model: Model, clients: Sequence[str]) -> Iterator[str | None]:
        """Attach the global adapter to the base."""
        yield from with_global(model)

    def adapter(
        self, entries: Iterable[Entry], load_model: Callable[[], Model]
    ) -> dict[str, Tensor] | None:
        """Adapter that the model holds after the entries."""
        return held_adapter(load_model())

    def merge(self, model: Model) -> None:
        """Add the global adapter to the weights, W + B·A."""
        merge_global(model)

    def _global(self, model: Model, seed: int) -> Mapping[str, Tensor]:
        """The factors in the model, to be changed in place; before the first round, the drawn."""
        if model.factors is None:
            rank = self._options.largest_rank
            parameters = model.attach(self._options.config(rank))
            init_factors(parameters, torch.Generator().manual_seed(seed), rank)
            model.factors = {name: p.detach().cpu().clone() for name, p in parameters.items()}
            model.release()
        return model.factors


def attach_global(
    model: Model, options: LoraOptions, rank: int, seeds: Seeds
) -> dict[str, nn.Parameter]:
    """Attach as much of the global adapter as a rank has; in round 1 the seeds draw it."""
    parameters = model.attach(options.config(rank))
    init_factors(parameters, seeds.torch("adapter"), options.largest_rank)
    if model.factors is not None:
        copy_factors(parameters, model.factors, options.scale(rank))
    return parameters


def with_global(model: Model) -> Iterator[None]:
    """Attach the global adapter to the base while the caller evaluates it."""
    if model.factors is None:
        yield None
    else:
        with model.with_factors(model.factors):
            yield None


def held_adapter(model: Model) -> dict[str, Tensor]:
    """The global adapter of a model.

    Raises:
        UserError: there is none yet.
    """
    if model.factors is None:
        raise UserError("round 0 is the base model: there is no adapter to export yet")
    return dict(model.factors)


def merge_global(model: Model) -> None:
    """Add the global adapter to the weights, W + B·A."""
    for module, factors in adapter_pairs(model.factors or {}):
        model.merge(module, factors)
