"""FLoRA: federated fine-tuning with heterogeneous low-rank adapters, aggregated by stacking.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", arXiv 2409.05976, section 3 and algorithm 1. Averaging factors is wrong, since
(Σ p_k B_k)(Σ p_k A_k) has cross terms that Σ p_k B_k A_k has not; stacking them is exact, and does
not ask that all clients have one rank.

    every round:
      client k:  attach an adapter of its own rank r_k that changes nothing (B_k = 0), and train it
      server:    A = [p_1 s_1 A_1; …; p_N s_N A_N],  B = [B_1 … B_N],  so B·A = Σ p_k s_k B_k A_k,
                 or their product where that is smaller; with `compress` cut by small SVDs
      everybody: W <- W + B·A

What a client's adapter starts from is `restart`. In the paper it is a new random A_k (`zero`). Warm
starts keep the optimiser's moments at the client, and what they belong to: its A_k (`own`), or,
where rounds are so short that a B_k which begins anew never gets far, the averages of both factors
(`shared`). Then the aggregate is the averages' product and what it lacks of the exact sum, which is
merged as the stacked factors are:

    every round (shared):
      client k:  go on from the first r_k rows of the global adapter (A, B); its other rows take
                 part and are not trained
      server:    A, B = averages of the factors, where rows that a client has not are as they were;
                 B'·A' = the exact sum - B·A, by small SVDs
      everybody: W <- W + B'·A', and the global adapter is (A, B)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from hedgerow import lowrank
from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.errors import InvalidMessage, UserError
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.methods.base import (
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Payload,
    ServerRound,
    Trained,
)
from hedgerow.methods.factors import (
    check_factors,
    check_pairs,
    copy_factors,
    draw_adapter,
    factor_kinds,
    init_factors,
)
from hedgerow.methods.lora import update_scale
from hedgerow.methods.parts.scaling import Scaling
from hedgerow.methods.parts.statements import Statement, check_stated
from hedgerow.methods.quantization import (
    Bits,
    check_step_sizes,
    dequantize,
    dequantize_update,
    quantize,
    quantized_kinds,
)
from hedgerow.methods.residual import ResidualAdapter, last_step, split, with_residuals
from hedgerow.methods.stacking import StackedFactors, finite
from hedgerow.methods.sums import ExactSums, SketchedSums
from hedgerow.methods.truncation import Compress, truncate_sums
from hedgerow.methods.weighting import Weighting
from hedgerow.wire import LARGEST_BROADCAST, LARGEST_SENT, check_kinds, kinds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.training.job import Job
    from hedgerow.wire import Entry, Participant, Update

FEW_STEPS = 8
"""With fewer local steps a round than that, `warm` is `shared`, else `own`; `bench/README.md` says
what it was chosen by."""

MOST_SPOOLED = 8 << 30
"""Bytes of updates that wait on disk for an exact sum; of more, where the broadcast is cut anyway,
sketches are added up."""

ROUNDING = Statement(
    name="rounding_error",
    form=re.compile(r"0|1|1\.0|0\.[0-9]{1,10}|[0-9](\.[0-9]{1,3})?e-[0-9]{2}"),
    digits=3,
    most=1.0,
)
"""What an update in fewer bits says of itself: ‖ΔW sent - ΔW‖ / ‖ΔW‖."""


def _as_compress(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class FLoRA(ResidualAdapter):
    """Adapters of any ranks: the aggregate is exact, and clients go on from where they were."""

    name: str = "flora"
    summary: ClassVar[str] = "LoRA of different ranks; the aggregate is exact"
    reference: ClassVar[str] = "FLoRA, arXiv 2409.05976"

    restart: Literal["warm", "own", "shared", "zero"] = "warm"
    """Start of the adapters in a round. `zero`: anew, as in the paper; `own`: the client's own A
    and moments; `shared`: the average of all adapters, and own moments; `warm`: `shared` with fewer
    than 8 local steps a round, else `own`."""
    scaling: Weighting = "size"
    """Scaling factors p_k, by which clients' updates are added. `size`: each client's share of the
    round's examples; `uniform`: 1/N for each of N clients; a number for each client, or a list with
    one for each; `adaptive`: by size, in steps as long as clients' losses along the last step
    advise (three more forward passes of one batch for each client in a round)."""
    compress: Annotated[Compress | None, BeforeValidator(_as_compress)] = None
    """Cut of the broadcast (`energy`, `rank`, `bits`, `carry`); with `true`, to the size of the
    largest client's update; with null or `false`, it is exact. Of updates of more than 8 GiB in a
    round sketches are added up, if `compress` bounds the broadcast."""
    upload_bits: Bits = 32
    """Number of bits of each number of an update; 32 sends it as it is."""

    @property
    def clients_remember(self) -> bool:
        """Whether they start warm."""
        return self.restart != "zero"

    @property
    def keeps_optimizer(self) -> bool | None:
        """Whether they start warm: moments are of little use for an A that is drawn anew."""
        return True if self.restart != "zero" else None

    @property
    def server_remembers(self) -> bool:
        """Whether it carries what it owes."""
        return self.compress is not None and self.compress.carry

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check, as for every adapter; and that weights and the bound on ranks fit the clients."""
        super().check(model, num_clients, training)
        self._weigh.check_clients(num_clients)
        bound = self.compress and self.compress.largest(self.largest_rank)
        if bound and self._is_shared(training) and bound <= self.largest_rank:
            raise UserError(
                f"method.compress: a broadcast of rank {bound} has no room beside the adapter of "
                f"rank {self.largest_rank} that a shared start broadcasts: give a larger `rank`, "
                "or method.restart: own"
            )

    # --- at a client ----------------------------------------------------------------------------

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the first r_k rows of the global adapter; or B_k = 0 and its own or a new A_k."""
        rank = self.rank(client_round.client)
        if self._is_shared(client_round.training):
            parameters = model.attach(self.config(rank), _beyond(model.factors or {}, rank))
            init_factors(parameters, client_round.seeds.torch("adapter"), self.largest_rank)
            if model.factors is not None:
                copy_factors(parameters, model.factors, self.scale(rank))
            return parameters
        parameters = model.attach(self.config(rank))
        init_factors(
            parameters,
            client_round.seeds.torch("adapter", client_round.round, client_round.client.name),
            rank,
        )
        kept = client_round.memory.load() if self.restart != "zero" else {}
        with torch.no_grad():
            for name in parameters.keys() & kept.keys():
                parameters[name].copy_(kept[name])
        return parameters

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Train locally; a warm start keeps the client's own A."""
        said = self._weigh.said(job, client_round, last_step)
        trained = super().train(job, client_round, parameters)
        if self.restart != "zero" and not self._is_shared(client_round.training):
            client_round.remember(
                {n: p.detach().cpu() for n, p in parameters.items() if ".lora_A." in n}
            )
        return dataclasses.replace(trained, said=said)

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """The client's factors, in so many bits, and what it knows of rounding and step sizes."""
        tensors, about = super().update(model, client_round, trained)
        if self.upload_bits == 32:
            return Payload(tensors, about)
        quantized = quantize(tensors, self.upload_bits)
        sent = (pair for _, pair in adapter_pairs(dequantize(quantized)))
        error = lowrank.relative_error(
            zip(sent, dict(adapter_pairs(tensors)).values(), strict=True)
        )
        return Payload(quantized, about | ROUNDING.said([error]))

    # --- at the server --------------------------------------------------------------------------

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check rank and scale, and that there is a pair of the client's rank for each module."""
        rank = self.rank(client)
        rounded = [ROUNDING] if self.upload_bits < 32 else []
        check_stated(update, self._about(rank), rounded + self._weigh.statements(update.round))
        pair = factor_kinds(expected.shapes, rank)
        check_kinds(kinds(update.tensors), quantized_kinds(pair, self.upload_bits))
        check_step_sizes(update.tensors, self.upload_bits, LARGEST_SENT)

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Stack the factors; or average them, and re-factorise and maybe cut what averages lack."""
        start = self._start(server_round)
        said: list[tuple[int, Mapping[str, str]]] = []

        def arriving() -> Iterator[Update]:
            for update in updates:
                said.append((update.num_examples, update.about))
                yield dequantize_update(update)

        sums, weights, metrics = self._sums(arriving(), said, start, server_round)
        if self.compress is None:
            whole = with_residuals((m, each.average(), each.exact()) for m, each in sums)
            tensors = whole.tensors
            metrics |= whole.metrics
        else:
            owed, shapes = server_round.memory.load(), server_round.expected.shapes
            tensors, left, errors = truncate_sums(
                self.compress, sums, owed, shapes, self.largest_rank
            )
            metrics |= errors
            if self.compress.carry:
                server_round.memory.save(left)
        if self.upload_bits < 32:
            metrics["upload_error"] = sum(ROUNDING.read(x)[0] for _, x in said) / len(said)
        if isinstance(sums, SketchedSums):
            metrics["sketch_error"] = sums.relative_error
        return Aggregate(tensors, finite(metrics), weights)

    def shown(self, update: Update, server_round: ServerRound) -> Update:
        """Client's change as one adapter, ΔW_k = s_k·(B_k·A_k - B_0·A_0), in float32."""
        if server_round.previous is None or not self._is_shared(server_round.expected.training):
            return dequantize_update(update)  # B_0 = 0
        s, rank = update_scale(update), int(update.about["r"])
        start = dequantize(split(server_round.previous.tensors)[0])
        pairs = zip(adapter_pairs(dequantize(update.tensors)), adapter_pairs(start), strict=True)
        change = {}
        for (module, pair), (_, whole) in pairs:
            before = whole.leading(rank)
            change[module] = lowrank.stack([pair, before._replace(B=-before.B / s)])
        alpha = s * ((2 * rank) ** 0.5 if self.rslora else 2 * rank)
        about = self._about(2 * rank, alpha)
        return dataclasses.replace(update, tensors=adapter_tensors(change), about=about)

    def check_weights(self, participants: Sequence[Participant]) -> None:
        """Raise `InvalidMessage` unless the weights are those of `scaling`."""
        self._weigh.check(participants)

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for a pair for each module, and for a shared start another, of the largest rank."""
        start, residual = split(kinds(entry.tensors))
        count, bits = len(entry.participants), self.compress.bits if self.compress else 32
        if not start and self.restart == "shared":
            raise InvalidMessage("the adapter that clients start from is missing")
        if start:
            if self.restart in ("zero", "own"):
                raise InvalidMessage(
                    f"unexpected adapter to start from, with restart: {self.restart}"
                )
            check_kinds(start, quantized_kinds(factor_kinds(shapes, self.largest_rank), bits))
        ranks = self.possible_ranks(count)
        # More is known only where all clients take part, or all have one rank.
        fewest, most = sum(ranks[:count]), sum(ranks[-count:])
        if self.restart == "zero" and self.compress is None:
            check_factors(residual, shapes, range(fewest, most + 1))
            return
        if start or self.compress:
            check_pairs(residual, shapes, {m: min(shape) for m, shape in shapes.items()}, bits)
        else:
            least, largest = (
                {module: min(rank, *shape) for module, shape in shapes.items()}
                for rank in (fewest, most)
            )
            check_pairs(residual, shapes, largest, least=least)
        check_step_sizes(entry.tensors, bits, LARGEST_BROADCAST)

    # --- details --------------------------------------------------------------------------------

    def _is_shared(self, training: TrainingSettings) -> bool:
        """Whether clients go on from the average of their adapters."""
        if self.restart == "warm":
            return training.epochs is None and training.most_steps(0) < FEW_STEPS
        return self.restart == "shared"

    def _start(self, server_round: ServerRound) -> dict[str, Factors]:
        """The global adapter that this round's clients went on from; nothing where they did not."""
        expected = server_round.expected
        if not self._is_shared(expected.training):
            return {}
        if server_round.previous is not None:
            return dict(adapter_pairs(dequantize(split(server_round.previous.tensors)[0])))
        drawn = expected.seeds.torch("adapter")
        return dict(adapter_pairs(draw_adapter(expected.shapes, drawn, self.largest_rank)))

    def _sums(
        self,
        updates: Iterable[Update],
        said: Sequence[tuple[int, Mapping[str, str]]],
        start: Mapping[str, Factors],
        server_round: ServerRound,
    ) -> tuple[ExactSums | SketchedSums, list[float], dict[str, float]]:
        """The round's sums, p_k of each update, and the adaptive step's size.

        Args:
            said: |D_k| of the updates that have been read, and what they say of themselves.
        """
        bound = self.compress.largest(self.largest_rank) if self.compress else None
        arrived: StackedFactors | SketchedSums
        if bound and self._spooled(server_round) > MOST_SPOOLED:
            arrived = SketchedSums(
                updates,
                start=start,
                weigh=lambda update: self._weigh.relative(update, server_round),
                rank=bound,
                generator=server_round.expected.seeds.torch("sketch", server_round.round),
            )
        else:
            arrived = StackedFactors(updates)
        counts, about = arrived.num_examples, [about for _, about in said]
        weights = self._weigh.weights(arrived.clients, counts, about, server_round)
        metrics = {}
        if self._weigh.is_adaptive:
            metrics["step_size"] = self._weigh.step_size(counts, about, server_round)
        if isinstance(arrived, SketchedSums):
            arrived.normalise(self._weigh.factor(counts, about, server_round))
            return arrived, weights, metrics
        as_sent = self.restart == "zero" and self.compress is None
        return ExactSums(arrived, start, weights, whole=as_sent), weights, metrics

    @property
    def _weigh(self) -> Scaling:
        return Scaling(self.scaling)

    def _spooled(self, server_round: ServerRound) -> int:
        """The bytes of all clients' factors."""
        rows = sum(self.rank(client) for client in server_round.clients)
        return 4 * rows * sum(sum(shape) for shape in server_round.expected.shapes.values())


def _beyond(factors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The rows of A and columns of B from `rank` on; nothing where there are none."""
    pairs = {m: Factors(A[rank:], B[:, rank:]) for m, (A, B) in adapter_pairs(factors)}
    return adapter_tensors({m: pair for m, pair in pairs.items() if pair.rank})
