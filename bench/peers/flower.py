"""Flower: a ServerApp with its FedAvg, and a ClientApp, on its simulation runtime (Ray).

One client trains at a time, in an actor that keeps the model. The app is run in this process, which
saves Flower the SuperLink and the packing of `flwr run`.
"""

from __future__ import annotations

import logging

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import Work, factors_of, network_of, set_factors

BACKEND = {
    "init_args": {"num_cpus": 1, "num_gpus": 0, "log_to_driver": False, "logging_level": "error"},
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
}


def main() -> None:
    """Train."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    work = Work.asked_for()
    server, client = ServerApp(), ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        own, model = int(context.node_config["partition-id"]), network_of(work)
        set_factors(model, message.content["arrays"].to_torch_state_dict())
        round = message.content["config"]["server-round"] - 1
        loss = work.train(model, own, round)
        arrays = ArrayRecord(factors_of(model))
        metrics = MetricRecord(
            {"loss": loss, "num-examples": work.clients[own], "bytes": arrays.count_bytes()}
        )
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        count = len(work.clients)
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(work.begins_with),
            num_rounds=work.rounds,
            train_config=ConfigRecord(),
        )
        metrics = result.train_metrics_clientapp[work.rounds]
        factors = dict(result.arrays.to_torch_state_dict())
        work.finish(factors, metrics["loss"], round(metrics["bytes"]))

    run_simulation(server, client, len(work.clients), backend_config=BACKEND)


if __name__ == "__main__":
    main()
