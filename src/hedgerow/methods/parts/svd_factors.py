"""Factors with singular values of their own, ΔW = s·P·Λ·Q, of which the least may be cut.

AdaLoRA, Zhang et al., arXiv 2303.10512, section 3.1: P of shape (m, r), Λ of shape (r, 1), Q of
shape (r, n). What is left after training is an ordinary pair, B = P and A = Λ·Q, of a rank for each
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hedgerow.errors import InvalidMessage
from hedgerow.lazy import peft, torch
from hedgerow.methods.factors import check_pairs
from hedgerow.methods.lora import LoraOptions
from hedgerow.methods.parts.starts import Starts
from hedgerow.methods.parts.svd_layers import SvdLayers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.methods.base import ClientRound
    from hedgerow.model import Model
    from hedgerow.wire import Kind


class NewSvd(Starts):
    """New P and Q with Λ = 0 in every round, of a larger rank than they end with.

    They are orthogonal from the start. AdaLoRA draws small ones and leaves that to the regulariser,
    but here they begin anew in each round, which may have only a few steps.
    """

    def __init__(self, options: LoraOptions, initial: float) -> None:
        """Attach more components than the client's rank.

        Args:
            options: those of the adapter that is left after training.
            initial: rank before training, as a multiple of the client's.
        """
        super().__init__(options)
        self._initial = initial

    def rank(self, rank: int) -> int:
        """Rank of each matrix before training, of a client of this rank."""
        return math.ceil(self._initial * rank)

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach P, Λ and Q to each matrix."""
        options, rank = self._options, self._options.rank(client_round.client)
        initial = self.rank(rank)
        config = peft.AdaLoraConfig(
            init_r=initial,
            # peft divides it by the initial rank, and s_k is that of r_k.
            lora_alpha=options.scale(rank) * initial,
            lora_dropout=options.dropout,
            target_modules=options.targets,
            init_lora_weights=False,
            total_step=1,  # the layers don't ask; `training.adalora` has the schedule
        )
        parameters = model.attach(config, layers=SvdLayers())
        generator = client_round.seeds.torch(
            "adapter", client_round.round, client_round.client.name
        )
        with torch.no_grad():
            for name, parameter in sorted(parameters.items()):
                if name.endswith(".lora_E"):
                    parameter.zero_()
                else:
                    drawn = torch.empty(parameter.shape)
                    parameter.copy_(torch.nn.init.orthogonal_(drawn, generator=generator))
        return parameters

    def check(
        self, given: Mapping[str, Kind], shapes: Mapping[str, Sequence[int]], ranks: Sequence[int]
    ) -> None:
        """Raise `InvalidMessage` unless clients of these ranks may have made these factors.

        They have up to the initial rank in each matrix, and r_k on average. A matrix of which
        nothing is left has a component of zeros beyond the budget.

        Args:
            given: what they are, by PEFT's key names.
            shapes: (m, n) of the adapted matrices, by module.
            ranks: r_k of each client.
        """
        most = sum(map(self.rank, ranks))
        total = sum(check_pairs(given, shapes, dict.fromkeys(shapes, most)).values())
        budget = sum(ranks) * len(shapes) + len(ranks) * (len(shapes) - 1)
        if total > budget:
            raise InvalidMessage(f"ranks must sum to at most {budget}, got {total}")


def as_pairs(parameters: Mapping[str, nn.Parameter], initial: int) -> dict[str, Tensor]:
    """Make ordinary factors of the components that are left; one of zeros where none is.

    Args:
        parameters: P, Λ and Q after training, by PEFT's key names.
        initial: their rank.

    Returns:
        A and B by PEFT's key names, on the CPU.
    """
    tensors = {}
    factors = {name: factor.detach().cpu() for name, factor in parameters.items()}
    for key in factors:
        if key.endswith(".lora_E"):
            module = key.removesuffix(".lora_E")
            left = factors[key].flatten() != 0
            left[0] |= not left.any()
            # peft divides by r + 1e-5 where the server divides by r.
            values = factors[key][left] * (initial / (initial + 1e-5))
            tensors[f"{module}.lora_A.weight"] = values * factors[f"{module}.lora_A"][left]
            tensors[f"{module}.lora_B.weight"] = factors[f"{module}.lora_B"][:, left]
    return tensors
