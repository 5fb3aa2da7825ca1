"""A client's round, gone through with hollow tensors: what it holds, by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.optim import optimizer as optimizers

from hedgerow import quantized
from hedgerow.data import Example, collate, learnt_from
from hedgerow.errors import InvalidMessage
from hedgerow.federation.participant import job_of
from hedgerow.footprint.hollow import Held
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Client, ClientRound
from hedgerow.model import Model
from hedgerow.quantized import SumBeside
from hedgerow.seeds import Seeds
from hedgerow.training.loss import batch_loss
from hedgerow.wire import Kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.experiment import Experiment
    from hedgerow.settings import TrainingSettings
    from hedgerow.wire import Entry

WEIGHTS = "base weights"
BESIDE = "learnt beside quantized weights"
TRAINED = "adapter"
SNAPSHOT = "snapshot of the start"
GRADIENTS = "gradients"
OPTIMIZER = "optimiser's state"
STEP = "the optimiser's step"
KEPT = "kept for the next round"
ACTIVATIONS = "activations"

_STEPS = 2
"""Steps of each of the rounds that are gone through: the first makes the optimiser's state."""


@dataclass(frozen=True)
class Stages:
    """What a client holds, in bytes by part, at the peak of a stage of its round."""

    training: Mapping[str, int]
    """From when it has the model until its last step."""
    trained: Mapping[str, int]
    """After its last step, while it makes its update: all but the update itself."""
    released: Mapping[str, int]
    """After it has given the model back, while its update is serialised."""


def scoring(experiment: Experiment, network: Any, beside: Sequence[Tensor] = ()) -> dict[str, int]:
    """What whoever scores the model on test rows holds, in bytes by part, at the peak.

    Batches are the largest that there can be, as in `stages`, and so are the other arguments.
    """
    held, rows = _held(experiment), experiment.evaluation.batch_size
    examples = _Longest(rows, experiment.data.max_length)
    with held, torch.no_grad():
        _tell_base(held, network, beside)
        with held.made_for(ACTIVATIONS):
            batch_loss(network, collate([examples[i] for i in range(rows)], pad_id=0))
    return positive(held.peak)


def stages(
    experiment: Experiment, network: Any, client: Client, beside: Sequence[Tensor] = ()
) -> Stages:
    """Go through a client's round with a network that has no values.

    Batches are the largest that there can be: `training.batch_size` texts of `data.max_length`
    tokens, each of them learnt. There are two rounds where the client remembers something, so that
    the second begins with it.

    Args:
        experiment: its settings.
        network: a causal language model on the meta device, in the dtype of the base; it is left
            with the method's layers.
        client: whose rank counts.
        beside: what is kept beside quantized weights.
    """
    method, training = experiment.method, experiment.training
    model, memory = Model(network, _NoTokenizer(), "model"), _Memory()
    held = _held(experiment)
    few = _few_steps(training)
    count, objective = few.batch_size * few.gradient_accumulation, experiment.objective
    examples = _Longest(count, experiment.data.max_length, paired=objective.learns != "answers")
    remembers = method.clients_remember or training.keep_optimizer
    with held, _telling_steps(held):
        _tell_base(held, network, beside)
        for _ in range(2 if remembers else 1):
            client_round = ClientRound(
                client, 1, Seeds(experiment.federation.seed), training, memory, _no_past
            )
            job = replace(
                job_of(experiment, model, cast(Any, examples), client_round), settings=few
            )
            held.begin()
            with held.made_for(TRAINED):
                parameters = method.start(model, client_round)
            held.are_for(SNAPSHOT, model.snapshot.values())
            job = replace(job, start=model.snapshot, shared_state=model.shared_state)
            with _telling_batches(held, examples), _telling_gradients(held, parameters):
                trained = method.train(job, client_round, parameters)
            peak = dict(held.peak)
            if remembers:
                client_round.save()
            held.are_for(KEPT, (each for each in client_round.kept.values() if each.is_meta))
            after = {part: size for part, size in held.now.items() if part != ACTIVATIONS}
            del trained, parameters, job, client_round
            model.release()
        released = {part: held.now[part] for part in (WEIGHTS, BESIDE, TRAINED)}
    return Stages(positive(peak), positive(after), positive(released))


def positive(parts: Mapping[str, int]) -> dict[str, int]:
    """The parts that take some bytes."""
    return {part: size for part, size in parts.items() if size > 0}


def hold_beside(network: Any, shapes: Mapping[str, Sequence[int]], rank: int) -> list[Tensor]:
    """Have quantized layers keep something beside their weights; returns all of it.

    Args:
        network: without values.
        shapes: shapes of the matrices that are learnt, by the layer's name.
        rank: rank of what is learnt, at most the matrix's own.
    """
    found: list[Tensor] = []
    layers = dict(quantized.layers(network))
    for name in shapes.keys() & layers.keys():
        m, n = shapes[name]
        r = min(rank, m, n)
        beside = SumBeside(layers[name], most=None)
        beside.factors = Factors(*(torch.empty(size, device="meta") for size in ((r, n), (m, r))))
        found += beside.factors
    return found


def _held(experiment: Experiment) -> Held:
    return Held(on_cpu=experiment.model.device == "cpu")


def _tell_base(held: Held, network: Any, beside: Sequence[Tensor]) -> None:
    """Have a network's weights be counted as such, and what is beside them."""
    scales = [quantized.scales_of(layer) for _, layer in quantized.layers(network)]
    held.are_for(WEIGHTS, [*network.parameters(), *network.buffers(), *scales])
    held.are_for(BESIDE, beside)


def _few_steps(training: TrainingSettings) -> TrainingSettings:
    """As many steps, and passes for each, as there are until nothing new is held."""
    passes = min(training.gradient_accumulation, 2)
    steps = min(training.steps or _STEPS, _STEPS)
    return training.model_copy(
        update={"steps": steps, "epochs": None, "gradient_accumulation": passes}
    )


@contextmanager
def _telling_steps(held: Held) -> Iterator[None]:
    """Have what optimisers make be counted as theirs."""

    def before(optimizer: Any, *_: Any) -> None:
        stack.enter_context(held.made_for(STEP))

    def after(optimizer: Any, *_: Any) -> None:
        stack.close()
        kept = (value for each in optimizer.state.values() for value in each.values())
        held.are_for(OPTIMIZER, (v for v in kept if isinstance(v, torch.Tensor) and v.is_meta))

    with ExitStack() as stack:
        hooks = [
            optimizers.register_optimizer_step_pre_hook(before),
            optimizers.register_optimizer_step_post_hook(after),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _telling_batches(held: Held, examples: _Longest) -> Iterator[None]:
    """Have what is made from the first batch on be counted as activations.

    Before that, there is what an optimiser goes on from.
    """

    def begins() -> None:
        if not started:
            started.append(True)
            stack.enter_context(held.made_for(ACTIVATIONS))

    started: list[bool] = []
    with held.made_for(OPTIMIZER), ExitStack() as stack:
        examples.told = begins
        yield


@contextmanager
def _telling_gradients(held: Held, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Have gradients be counted as such as soon as each is complete."""

    def complete(parameter: Tensor) -> None:
        if parameter.grad is not None:
            held.are_for(GRADIENTS, [parameter.grad])

    hooks = [
        parameter.register_post_accumulate_grad_hook(complete)  # type: ignore[no-untyped-call]
        for parameter in parameters.values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Longest:
    """Examples of so many tokens each, all of which are learnt; as `Tokenized` has them."""

    desirable = None

    def __init__(self, count: int, length: int, *, paired: bool = False) -> None:
        self.lengths = self.widths = np.full(count, length, dtype=np.int32)
        self.reference = np.zeros(count, dtype=np.float32)
        self.other = _Longest(count, length) if paired else None
        self.told: Callable[[], None] = lambda: None
        """Called when an example is read."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        self.told()
        tokens = np.zeros(self.lengths[index], dtype=np.int32)
        return Example(tokens, 1, learnt=learnt_from(0, len(tokens)))


class _NoTokenizer:
    """Tokenizer of nothing."""

    pad_token_id = None


class _Memory:
    """Memory of the client, whose tensors are there when they are read, as those of its file."""

    def __init__(self) -> None:
        self._saved: dict[str, Kind | Tensor] = {}

    def load(self) -> Mapping[str, Tensor]:
        """Tensors like those that were saved, and those that have values, as counts of steps."""
        return _Read(self._saved)

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what they are."""
        self._saved = {
            name: Kind(each.dtype, tuple(each.shape)) if each.is_meta else each
            for name, each in tensors.items()
        }


class _Read(Mapping[str, "Tensor"]):
    def __init__(self, kinds: Mapping[str, Kind | Tensor]) -> None:
        self._kinds = kinds

    def __getitem__(self, name: str) -> Tensor:
        kind = self._kinds[name]
        if isinstance(kind, torch.Tensor):
            return kind.clone()
        return torch.empty(kind.shape, dtype=kind.dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def _no_past(round: int) -> Entry:
    """No entry: it is the first round."""
    raise InvalidMessage(f"there is no entry of round {round}")
