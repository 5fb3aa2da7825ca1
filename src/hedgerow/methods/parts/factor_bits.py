"""Factors of an update in few bits: each component rounded to integers of its largest number.

client:  A_k, B_k rounded to `bits` bits, and ‖ΔW sent - ΔW‖ / ‖ΔW‖, which it alone can know
server:  A_k, B_k in float32 again
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hedgerow import lowrank
from hedgerow.adapters import adapter_pairs
from hedgerow.methods.factors import check_factors, factor_kinds
from hedgerow.methods.parts.statements import Statement
from hedgerow.methods.quantization import (
    Bits,
    check_step_sizes,
    dequantize,
    quantize,
    quantized_kinds,
)
from hedgerow.wire import LARGEST_SENT, check_kinds, kinds

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING_ERROR = Statement(
    name="rounding_error",
    form=re.compile(r"0|1|1\.0|0\.[0-9]{1,10}|[0-9](\.[0-9]{1,3})?e-[0-9]{2}"),
    digits=3,
    most=1.0,
)
"""‖ΔW sent - ΔW‖ / ‖ΔW‖, over all modules."""


class FactorBits:
    """Codec of the factors of an update; 32 bits leave them as they are."""

    def __init__(self, bits: Bits = 32) -> None:
        self._bits = bits

    @property
    def is_plain(self) -> bool:
        """Whether factors are sent as they are."""
        return self._bits == 32

    @property
    def statements(self) -> list[Statement]:
        """What updates state of their rounding, where there is some."""
        return [ROUNDING_ERROR] if self._bits < 32 else []

    def encode(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Factors, by PEFT's key names, as they are sent, and what the update states of them."""
        if self._bits == 32:
            return tensors, {}
        quantized = quantize(tensors, self._bits)
        sent = (pair for _, pair in adapter_pairs(dequantize(quantized)))
        given = (pair for _, pair in adapter_pairs(tensors))
        error = lowrank.relative_error(zip(sent, given, strict=True))
        return quantized, ROUNDING_ERROR.said([error])

    def nbytes(self, shapes: Mapping[str, Sequence[int]], rank: int) -> int:
        """Bytes of factors of this rank, as they are sent, of matrices of these shapes (m, n)."""
        sent = quantized_kinds(factor_kinds(shapes, rank), self._bits)
        return sum(kind.nbytes for kind in sent.values())

    def check(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], rank: int
    ) -> None:
        """Raise `InvalidMessage` unless these are an adapter's factors, as `encode` sends them.

        Args:
            tensors: as they arrived.
            shapes: (m, n) of the adapted matrices, by module.
            rank: the client's.
        """
        if self._bits == 32:
            check_factors(kinds(tensors), shapes, [rank])
            return
        check_kinds(kinds(tensors), quantized_kinds(factor_kinds(shapes, rank), self._bits))
        check_step_sizes(tensors, self._bits, LARGEST_SENT)

    def metrics(self, said: Sequence[Mapping[str, str]]) -> dict[str, float]:
        """Mean over clients of the error that rounding has made, where there is some."""
        if self._bits == 32:
            return {}
        return {"upload_error": sum(ROUNDING_ERROR.read(each)[0] for each in said) / len(said)}
