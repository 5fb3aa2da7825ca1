"""pfl-research: its SimulatedBackend and FederatedAveraging, with its own training loop.

It scores every user before and after training in the first round, whatever is asked for.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from work import Batch, Work, factors_of, learnt


class Rows(Dataset):
    """A user's rows of a round; as long as all that the user has, which is its weight."""

    def __init__(self, work: Work, user: int, round: int) -> None:
        super().__init__(raw_data=[], user_id=str(user))
        self._rows = work.clients[user]
        self._batches = list(work.batches(user, round))

    def __len__(self) -> int:
        return self._rows

    def iter(self, batch_size: int | None) -> Iterator[Batch]:
        """The batches, which are of this size already."""
        return iter(self._batches)


class Network(torch.nn.Module):
    """The model, with the methods that pfl asks of one."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.inner = work.network()
        self.losses: list[tuple[float, int]] = []

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch, which is noted."""
        self.train()
        loss = self.inner(**batch, use_cache=False).loss
        self.losses.append((loss.item(), learnt(batch)))
        return loss

    @torch.no_grad()
    def metrics(self, **batch: torch.Tensor) -> dict[str, Weighted]:
        """The loss, as a metric."""
        self.eval()
        tokens = learnt(batch)
        loss = self.inner(**batch, use_cache=False).loss.item()
        return {"loss": Weighted(loss * tokens, tokens)}


def main() -> None:
    """Train."""
    logging.disable(logging.WARNING)
    work = Work.asked_for()
    settings, count = work.settings, len(work.clients)
    network = Network(work)
    trained = [p for p in network.parameters() if p.requires_grad]
    rounds: dict[int, int] = defaultdict(int)
    order: list[int] = []

    def rows_of(user: int) -> Rows:
        order.append(user)
        rounds[user] += 1
        return Rows(work, user, rounds[user] - 1)

    users = FederatedDataset(rows_of, get_user_sampler("minimize_reuse", list(range(count))))
    model = PyTorchModel(
        model=network,
        local_optimizer_create=lambda _, lr: torch.optim.AdamW(trained, lr=lr, weight_decay=0.0),
        central_optimizer=torch.optim.SGD(trained, lr=1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds,
            train_cohort_size=count,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=users, val_data=users, postprocessors=[WeightByDatapoints()]
        ),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=settings["steps"],
            local_learning_rate=settings["learning_rate"],
            local_batch_size=settings["batch_size"],
            local_max_grad_norm=settings["max_grad_norm"],
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=settings["batch_size"]),
    )
    factors = factors_of(network.inner)
    # Nothing is serialised: a user's statistics would be these numbers.
    bytes_up = sum(factor.nbytes for factor in factors.values())
    work.finish(factors, work.mean(losses_of_last_round(network, work, order)), bytes_up)


def losses_of_last_round(network: Network, work: Work, order: list[int]) -> list[float]:
    """Mean losses of the users' tokens, by user."""
    steps, count = work.settings["steps"], len(work.clients)
    last = network.losses[-steps * count :]
    losses = {}
    for place, user in enumerate(order[-count:]):
        own = last[place * steps : (place + 1) * steps]
        losses[user] = sum(loss * n for loss, n in own) / sum(n for _, n in own)
    return [losses[user] for user in range(count)]


if __name__ == "__main__":
    main()
