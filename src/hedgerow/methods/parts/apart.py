"""Adapters of several clients in one set of tensors, each under its client's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from hedgerow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

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


def chosen(factors: Mapping[str, Tensor], client: str | None, method: str) -> dict[str, Tensor]:
    """Factors of the client that was asked for.

    Raises:
        UserError: none was, or there is none of this name.
    """
    names = client_names(factors)
    if client not in names:
        known = ", ".join(names) or "none before round 1"
        raise UserError(
            f"a {method} run has a model for each client: name one with --client ({known})"
        )
    return of_client(factors, client)
