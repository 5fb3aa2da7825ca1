"""Server steps along low-rank changes, which are stacked and never made dense.

    Δ = Σ p_k s_k B_k A_k - B_0 A_0,   m <- β m + Δ,   B·A <- B_0 A_0 + η (a Δ + b m)

Steps that are linear in the changes so far are sums of low-rank products, and so stacks of their
factors (FLoRA, arXiv 2409.05976, section 3). The rank of m would grow with every round: its leading
components are kept, by small SVDs, at most twice as many as are broadcast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hedgerow import lowrank
from hedgerow.adapters import adapter_pair, adapter_tensors
from hedgerow.lowrank import Factors
from hedgerow.methods.parts.renamed import below
from hedgerow.methods.parts.truncation import UNEVEN

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.methods.parts.server_optimizers import Linear, ServerOptimizer
    from hedgerow.methods.parts.sums import Sum, Sums

MOMENTUM = "momentum."
"""What the keys of the momentum's factors begin with, beside PEFT's."""


def check(optimizer: ServerOptimizer, bound: int | None, advice: str) -> Linear:
    """Check that a server optimiser steps along stacked factors.

    Args:
        optimizer: the method's.
        bound: largest rank of a broadcast, on average over matrices; None: there is none.
        advice: what bounds the method's broadcast, as the beginning of an instruction.

    Returns:
        Its step, as a linear one.

    Raises:
        ValueError: with the sentence for whoever has chosen it.
    """
    linear = optimizer.linear
    if linear is None:
        momenta = "sgd, momentum or nesterov"
        instead = f"give {momenta}" if bound else f"give sgd, or {advice} and give {momenta}"
        raise ValueError(
            f"`server`: {optimizer.name} scales each number of a step by itself, and stacked "
            f"factors are never multiplied out: {instead}"
        )
    if linear.decay and bound is None:
        raise ValueError(
            f"`server`: {optimizer.name} adds up the factors of all rounds, whose rank nothing "
            f"bounds: {advice}, or give sgd"
        )
    return linear


class SteppedSums:
    """Where the server's steps lead, instead of the sums themselves; read once.

    Attributes:
        kept: factors of the momentum after the steps, for the next round.
    """

    def __init__(
        self, sums: Sums, step: Linear | None, bound: int | None, kept: Mapping[str, Tensor]
    ) -> None:
        """Step when a sum is asked for.

        Args:
            sums: a round's.
            step: of the optimiser; None leaves the sums as they are.
            bound: largest rank of a broadcast, on average; None where there is no momentum.
            kept: what the round before has kept.
        """
        self._sums, self._step, self._bound = sums, step, bound
        self._before = below(kept, MOMENTUM)
        self.kept: dict[str, Tensor] = {}
        self._lost = self._size = 0.0

    @property
    def missed(self) -> float:
        """As the sums have it, times the step's length."""
        length = 1.0 if self._step is None else self._step.of_change
        return self._sums.missed * length**2

    @property
    def metrics(self) -> dict[str, float]:
        """`momentum_error`: what was cut of the momenta in this round, relative to them."""
        return {"momentum_error": (self._lost / self._size) ** 0.5} if self._size else {}

    def __iter__(self) -> Iterator[tuple[str, Sum]]:
        for module, each in self._sums:
            yield module, each if self._step is None else self._stepped(module, each, self._step)

    def _stepped(self, module: str, each: Sum, step: Linear) -> Sum:
        change, past = each.step(), adapter_pair(self._before, module)
        steps = [_times(change, step.of_change)]
        if past is not None:
            steps.append(_times(past.double(), step.of_momentum))
        if step.decay:
            self._keep(module, change, past, step.decay)
        if each.start is None:
            return each._replace(exact=lowrank.stack(steps))
        start, average = each.start.double(), each.average
        if average is not None:
            # Its factors step as far as the change does, so that little is left beside them.
            average = Factors(
                *(a + step.of_change * (b - a) for a, b in zip(start, average, strict=True))
            )
        return each._replace(exact=lowrank.stack([start, *steps]), average=average)

    def _keep(self, module: str, change: Factors, past: Factors | None, decay: float) -> None:
        """Keep the leading components of β m + Δ."""
        decayed = [] if past is None else [_times(past.double(), decay)]
        whole = lowrank.svd(lowrank.stack([change, *decayed]))
        most = UNEVEN * self._bound if self._bound else len(whole.values)
        pair = whole.factors(min(most, max(whole.rank(beside=float(whole.values.norm())), 1)))
        factors = adapter_tensors({module: pair.float()})
        self.kept |= {MOMENTUM + key: factor for key, factor in factors.items()}
        self._lost += float(whole.values[most:].square().sum())
        self._size += float(whole.values.square().sum())


def _times(pair: Factors, factor: float) -> Factors:
    return pair._replace(A=pair.A * factor)
