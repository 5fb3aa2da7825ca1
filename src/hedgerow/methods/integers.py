"""Factors in 16 or 8 bits: what travels when float32 is more than the aggregate needs.

Each component of an adapter (a row of A, a column of B) is divided by its largest number and
rounded to integers, so that a factor's relative error is about 1e-5 in 16 bits and 4e-3 in 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from hedgerow.errors import InvalidMessage
from hedgerow.lazy import torch
from hedgerow.wire import Kind, Update

if TYPE_CHECKING:
    from torch import Tensor

Bits = Literal[8, 16, 32]


def _integer(bits: Bits) -> torch.dtype:
    """Number type of a code of so many bits."""
    return {8: torch.int8, 16: torch.int16}[bits]


def encode(tensors: Mapping[str, Tensor], bits: Bits) -> dict[str, Tensor]:
    """Factors in so many bits; 32 leaves them as they are.

    Args:
        tensors: by PEFT's key names: A of shape (r, n), B of shape (m, r), in float32.

    Returns:
        The codes under the same names, and beside each factor its steps, float32 of shape (r,).
    """
    if bits == 32:
        return dict(tensors)
    encoded = {}
    largest = 2 ** (bits - 1) - 1
    for name, factor in tensors.items():
        # NaN and infinity stay what they are in the steps, where the reader's checks find them.
        step = factor.abs().amax(dim=_across(name)) / largest
        divisor = step.where(step > 0, 1.0).unsqueeze(_across(name))
        encoded[name] = (factor / divisor).nan_to_num().round().to(_integer(bits))
        encoded[_step_name(name)] = step
    return encoded


class _Decoded(Mapping[str, "Tensor"]):
    """Factors, each read and decoded when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        factor, step = self._tensors[name], _step_name(name)
        if step not in self._tensors:
            return factor
        return factor * self._tensors[step].unsqueeze(_across(name))

    def __contains__(self, name: object) -> bool:
        return str(name).endswith(".weight") and name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def decode(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The inverse of `encode`, in float32, whatever the bits; factors are read one by one."""
    return _Decoded(tensors)


def decoded(update: Update) -> Update:
    """An update whose tensors are read and decoded."""
    return dataclasses.replace(update, tensors=dict(decode(update.tensors)))


def encoded_kinds(kinds: Mapping[str, Kind], bits: Bits) -> dict[str, Kind]:
    """The kinds of what `encode` makes of factors of these kinds."""
    if bits == 32:
        return dict(kinds)
    codes = {name: Kind(_integer(bits), kind.shape) for name, kind in kinds.items()}
    steps = {
        _step_name(name): Kind(torch.float32, (kind.shape[1 - _across(name)],))
        for name, kind in kinds.items()
    }
    return codes | steps


def check_steps(tensors: Mapping[str, Tensor], bits: Bits, largest: float) -> None:
    """Raise `InvalidMessage` where encoded factors have numbers above `largest` in size."""
    most = largest / 2 ** (bits - 1)
    for name in tensors:
        if name.endswith(".step") and not tensors[name].abs().max() <= most:
            raise InvalidMessage(f"{name} has numbers above {most:g}")


def _across(name: str) -> int:
    """The dimension of a factor along which a component's numbers lie."""
    return 1 if ".lora_A." in name else 0


def _step_name(name: str) -> str:
    return name.removesuffix(".weight") + ".step"
