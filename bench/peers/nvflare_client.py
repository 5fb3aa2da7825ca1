"""A client of NVFlare's simulator, which begins it once for each: see nvflare_simulator.py."""

from __future__ import annotations

import json

import nvflare.client as flare
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare_simulator import DOT
from work import Work, factors_of, set_factors


def main() -> None:
    """Train whenever the server asks."""
    work = Work.asked_for()
    flare.init()
    client = int(flare.get_site_name().rsplit("-", 1)[1]) - 1
    network = work.network()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        set_factors(network, {k.replace(DOT, "."): v for k, v in received.params.items()})
        loss = work.train(network, client, received.current_round)
        factors = {name.replace(".", DOT): f.clone() for name, f in factors_of(network).items()}
        # Tensors are streamed as they are, beside a letter of metadata.
        said = {"loss": loss, "bytes_up": sum(factor.nbytes for factor in factors.values())}
        (work.out / f"{client}.json").write_text(json.dumps(said))
        weight = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: work.clients[client]}
        flare.send(FLModel(params=factors, metrics={"loss": loss}, meta=weight))


if __name__ == "__main__":
    main()
