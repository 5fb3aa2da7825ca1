"""Adapters of experts: a factor of each, from which peft's factors of all of them are put together.

peft adapts a parameter of shape (experts, m, n) by one pair of matrices, A of shape
(experts·r, n) and B of shape (m, r·experts), whose columns of one rank stand together. Here each
expert has a pair of its own, as every linear layer has, so that nothing else has to know of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from hedgerow.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor


class _Joined(nn.Module):
    """The factors of all experts as the one weight that peft reads; each is a parameter."""

    def __init__(self, weight: Tensor, experts: int, what: str) -> None:
        super().__init__()
        self.what = what
        rank = weight.shape[0 if what == "lora_A" else 1] // experts
        shape = (rank, weight.shape[1]) if what == "lora_A" else (weight.shape[0], rank)
        self.factors = nn.ParameterList(weight.new_zeros(shape) for _ in range(experts))

    @property
    def weight(self) -> Tensor:
        """What peft reads."""
        join = joined_rows if self.what == "lora_A" else joined_columns
        return join(list(self.factors))


def joined_rows(factors: Sequence[Tensor]) -> Tensor:
    """A of all experts, shape (experts·r, n), from those of each, shape (r, n)."""
    return torch.cat(list(factors))


def joined_columns(factors: Sequence[Tensor]) -> Tensor:
    """B of all experts, shape (m, r·experts), from those of each, shape (m, r)."""
    return torch.stack(list(factors), dim=-1).flatten(1)


def split(wrapper: ParamWrapper, adapter: str) -> None:
    """Give each expert of a wrapped parameter factors of its own."""
    for what in ("lora_A", "lora_B"):
        parts = getattr(wrapper, what)
        parts[adapter] = _Joined(parts[adapter].weight, wrapper.num_experts, what)


def factors_of(wrapper: Any, adapter: str, name: str) -> Iterator[tuple[str, str, nn.Parameter]]:
    """The factors of each expert: the matrix's name, `lora_A` or `lora_B`, and the parameter.

    Args:
        wrapper: peft's, maybe around others of parameters of the same module.
        name: of that module.
    """
    while isinstance(wrapper, ParamWrapper):
        for what in ("lora_A", "lora_B"):
            for expert, factor in enumerate(getattr(wrapper, what)[adapter].factors):
                yield f"{name}.{wrapper.parameter_name}.{expert}", what, factor
        wrapper = wrapper.base_layer


# --- as peft has them in files ------------------------------------------------------------------

OLD_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Ends of the names that experts and routers had as linear layers, before transformers 5.

In `target_modules` peft reads them as names of experts' parameters, whatever stands before.
"""


def grouped(pairs: Mapping[str, Factors], order: Sequence[str]) -> dict[str, list[Factors]]:
    """The pairs of each parameter's experts, in the experts' order.

    Args:
        pairs: by the names of matrices, all of one rank.
        order: names of the parameters of experts, in the network's order.
    """
    found: dict[str, list[Factors]] = {}
    for name in order:
        numbers = sorted(
            int(module.removeprefix(f"{name}."))
            for module in pairs
            if re.fullmatch(rf"{re.escape(name)}\.\d+", module)
        )
        if numbers:
            found[name] = [pairs[f"{name}.{number}"] for number in numbers]
    return found


def joined(groups: Mapping[str, Sequence[Factors]]) -> dict[str, Factors]:
    """Factors of each parameter as peft's files have them, by the module that they stand under.

    The last parameter of a module is under the module's own name, each before it one `base_layer`
    further inside.
    """
    depth: dict[str, int] = {}
    found = {}
    for name in reversed(list(groups)):
        owner = name.rpartition(".")[0]
        place = owner + ".base_layer" * depth.get(owner, 0)
        depth[owner] = depth.get(owner, 0) + 1
        pairs = groups[name]
        found[place] = Factors(
            joined_rows([p.A for p in pairs]), joined_columns([p.B for p in pairs])
        )
    return found
