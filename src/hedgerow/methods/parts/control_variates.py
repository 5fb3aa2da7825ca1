"""Control variates: what a client's gradients are on average, and all clients' (SCAFFOLD).

Karimireddy et al., arXiv 1910.06378: clients correct each gradient by c - c_k, so that their steps
go where all clients' data want to go together. The changes of c_k travel beside those of the
weights; everybody keeps c, which a replay of the ledger rebuilds, and each client its own c_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from hedgerow.lazy import torch
from hedgerow.methods.parts.trains import AllWeights
from hedgerow.methods.parts.values import Shapes, Values

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.wire import Entry

CONTROL = "control."
"""Beginning of the name under which the change of a parameter's control variate travels."""


class WithControlVariates(AllWeights):
    """All weights, and a control variate of each weight's shape."""

    def shapes(self, model: Model) -> Shapes:
        """Shapes of the weights, and after them of their control variates."""
        weights = super().shapes(model)
        return {**weights, **{f"{CONTROL}{name}": shape for name, shape in weights.items()}}

    def change(self, model: Model, parameters: Mapping[str, nn.Parameter]) -> Values:
        """Δ_k of the weights, and Δc_k, which is among the parameters as it is; or else 0."""
        weights = {n: p for n, p in parameters.items() if not n.startswith(CONTROL)}
        changes = super().change(model, weights)

        def each() -> Iterator[tuple[str, Tensor]]:
            yield from changes
            for name, weight in weights.items():
                learnt = parameters.get(f"{CONTROL}{name}")
                none = torch.zeros(weight.shape)
                yield f"{CONTROL}{name}", none if learnt is None else learnt.detach().clone()

        controls = {f"{CONTROL}{name}": shape for name, shape in changes.shapes.items()}
        return Values({**changes.shapes, **controls}, each)

    def add(self, model: Model, steps: Iterable[tuple[str, Tensor]], entry: Entry) -> None:
        """w <- w + Δ, and c <- c + Δc, which is kept beside the weights."""

        def of_weights() -> Iterator[tuple[str, Tensor]]:
            for name, step in steps:
                if not name.startswith(CONTROL):
                    yield name, step
                    continue
                key = kept_as(name.removeprefix(CONTROL))
                c = model.beside.get(key)
                model.beside[key] = step.clone() if c is None else c.add_(step)

        super().add(model, of_weights(), entry)


class Correction:
    """Corrects gradients by c - c_k, and sums them up as they were."""

    def __init__(self, common: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Begin.

        Args:
            common: c, by `kept_as` of the parameter's name; nothing is 0.
            own: c_k of the client's last round, likewise.
        """
        self._common, self._own = common, {key: own[key] for key in own if key.startswith(_KEPT)}
        self._total: dict[str, Tensor] = {}
        self._steps = 0

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Correct the gradients of a step: g + c - c_k."""
        self._steps += 1
        for name, parameter in parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if name in self._total:
                self._total[name] += gradient
            else:
                self._total[name] = gradient.float().clone()
            key = kept_as(name)
            for variates, sign in ((self._common, 1), (self._own, -1)):
                if key in variates:
                    gradient.add_(variates[key].to(gradient.device), alpha=sign)

    def new(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """c_k from now on, the mean of the gradients as they were, by `kept_as`, on the CPU."""
        means = {}
        for name, parameter in parameters.items():
            total = self._total.get(name)
            mean = torch.zeros(parameter.shape) if total is None else (total / self._steps).cpu()
            means[kept_as(name)] = mean
        return means

    def changes(self, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Δc_k of each parameter, by the name under which it travels; `new` is c_k from now on."""
        found = {}
        for key, mean in new.items():
            change = mean - self._own[key] if key in self._own else mean
            found[f"{CONTROL}{key.removeprefix(_KEPT)}"] = change
        return found


_KEPT = "control/"
"""Before the name, since what follows a parameter's name is its optimiser's."""


def kept_as(name: str) -> str:
    """Name under which a parameter's control variate is kept."""
    return f"{_KEPT}{name}"
