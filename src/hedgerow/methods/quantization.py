"""Quantization of factors to 16 or 8 bits, where float32 is more than the aggregate needs.

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
    """Number type of quantized factors of so many bits."""
    return {8: torch.int8, 16: torch.int16}[bits]


def quantize(tensors: Mapping[str, Tensor], bits: Bits) -> dict[str, Tensor]:
    """Quantize factors to integers of so many bits; 32 leaves them as they are.

    Args:
        tensors: by PEFT's key names: A of shape (r, n), B of shape (m, r), float32.
        bits: of each number.

    Returns:
        int8 or int16 tensors under the same names, and beside each factor, under `….step`, the step
        size of each of its components, float32 of shape (r,); on the factors' device.
    """
    if bits == 32:
        return dict(tensors)
    quantized = {}
    largest = 2 ** (bits - 1) - 1
    for name, factor in tensors.items():
        # NaN and infinity stay what they are in the steps, where the reader's checks find them.
        step = factor.abs().amax(dim=_across(name)) / largest
        divisor = step.where(step > 0, 1.0).unsqueeze(_across(name))
        quantized[name] = (factor / divisor).nan_to_num().round().to(_integer(bits))
        quantized[_step_name(name)] = step
    return quantized


class _Dequantized(Mapping[str, "Tensor"]):
    """Factors, each read and dequantized when it is asked for."""

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


def dequantize(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Factors in float32 again, whatever the bits; each is read when it is asked for."""
    return _Dequantized(tensors)


def dequantize_update(update: Update) -> Update:
    """An update with its tensors read and in float32 again."""
    return dataclasses.replace(update, tensors=dict(dequantize(update.tensors)))


def quantized_kinds(kinds: Mapping[str, Kind], bits: Bits) -> dict[str, Kind]:
    """Kinds of the tensors that `quantize` makes of factors of these kinds."""
    if bits == 32:
        return dict(kinds)
    codes = {name: Kind(_integer(bits), kind.shape) for name, kind in kinds.items()}
    steps = {
        _step_name(name): Kind(torch.float32, (kind.shape[1 - _across(name)],))
        for name, kind in kinds.items()
    }
    return codes | steps


def check_step_sizes(tensors: Mapping[str, Tensor], bits: Bits, largest: float) -> None:
    """Raise `InvalidMessage` where quantized factors have numbers above `largest` in size."""
    most = largest / 2 ** (bits - 1)
    for name in tensors:
        if name.endswith(".step") and not tensors[name].abs().max() <= most:
            raise InvalidMessage(f"{name} contains values above {most:g}")


def _across(name: str) -> int:
    """Dimension of a factor along which a component's numbers lie."""
    return 1 if ".lora_A." in name else 0


def _step_name(name: str) -> str:
    return name.removesuffix(".weight") + ".step"
