"""Adapters of several clients in one set of tensors, each under its client's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from hedgerow.errors import which_client

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.model import Model

_T = TypeVar("_T")


def client_names(factors: Mapping[str, object]) -> list[str]:
    """Names of the clients whose factors are there, in alphabetical order."""
    return sorted({key.partition("/")[0] for key in factors})


def of_client(factors: Mapping[str, _T], name: str | None) -> dict[str, _T]:
    """Factors of one client, with PEFT's key names."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): factors[key] for key in factors if key.startswith(prefix)}


def under(name: str, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of one client, under its name."""
    return {f"{name}/{key}": factor for key, factor in factors.items()}


def models(model: Model, clients: Sequence[str]) -> Iterator[str]:
    """Attach each client's adapter to the model; one that has not trained yet has the base.

    Args:
        model: whose `factors` are those of several clients.
        clients: names of those whose models are meant.
    """
    for name in clients:
        if own := of_client(model.factors or {}, name):
            with model.with_factors(own):
                yield name
        else:
            yield name


def chosen(factors: Mapping[str, Tensor], client: str | None, method: str) -> dict[str, Tensor]:
    """Factors of the client that was asked for.

    Raises:
        UserError: none was, or there is none of this name.
    """
    names = client_names(factors)
    if client not in names:
        raise which_client(f"a {method} run", names)
    return of_client(factors, client)
