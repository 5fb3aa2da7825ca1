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
                c = model.shared_state.get(key)
                model.shared_state[key] = step.clone() if c is None else c.add_(step)

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
        self._difference: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}
        self._steps = 0

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Correct the gradients of a step: g + (c - c_k)."""
        if not self._steps:  # once, since variates would have to come from the CPU for each step
            self._difference = self._differences(parameters)
        self._steps += 1
        for name, parameter in parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if name in self._total:
                self._total[name] += gradient
            else:
                self._total[name] = gradient.float().clone()
            if name in self._difference:
                gradient.add_(self._difference[name])

    def learnt(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """c_k from now on, the mean of the gradients as they were, by `kept_as`, on the CPU."""
        return {kept_as(name): self._mean(name, p).cpu() for name, p in parameters.items()}

    def changes(self, learnt: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """Δc_k of each parameter, by the name under which it travels; `learnt` is the new c_k."""
        return {
            f"{CONTROL}{key.removeprefix(_KEPT)}": torch.nn.Parameter(c - self._own.get(key, 0))
            for key, c in learnt.items()
        }

    def _differences(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """c - c_k on the parameters' device, by their names; nothing where both are 0."""
        found = {}
        for name, parameter in parameters.items():
            key, zero = kept_as(name), torch.zeros(())
            if key in self._common or key in self._own:
                c, own = self._common.get(key, zero), self._own.get(key, zero)
                found[name] = c.to(parameter.device) - own.to(parameter.device)
        return found

    def _mean(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Mean of a parameter's gradients; 0 of one that had none."""
        total = self._total.get(name)
        return torch.zeros(parameter.shape) if total is None else total / self._steps


def times_share(values: Values, share: float) -> Values:
    """Means of what clients sent, with those of Δc_k times the share of clients that took part."""
    return values.mapped(lambda n, each: each * share if n.startswith(CONTROL) else each)


_KEPT = "control/"
"""Before the name, since what follows a parameter's name is its optimiser's."""


def kept_as(name: str) -> str:
    """Name under which a parameter's control variate is kept."""
    return f"{_KEPT}{name}"
