"""What goes over the wire, counted at the socket; what an update of a gigabyte costs in memory."""

import contextlib
import json
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from support.models import random_llama
from support.network import Network
from support.runs import rows_of, run_hedgerow

pytestmark = pytest.mark.slow

FLORA = {"name": "flora", "ranks": 16}
FERRET = {"name": "ferret", "compression": 32}
MIB = 1 << 20


def model_of(folder, hidden, layers):
    """A Llama of this width and depth, with the usual proportions."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return random_llama(folder, **sizes, num_attention_heads=8, num_key_value_heads=8)


def app_of(folder, model, clients, method, rounds):
    """A Flower app for so many clients, and their data."""
    for client in range(clients):
        rows = [{"instruction": f"Say {client} {i}", "output": f"{client}{i}"} for i in range(8)]
        (folder / f"client_{client}.json").write_text(json.dumps(rows))
    content = {
        "model": {"path": str(model)},
        "data": {"clients": "client_{}.json", "prompt": "plain", "max_length": 32},
        "method": method,
        "training": {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "optimizer": "sgd"},
        "federation": {"rounds": rounds},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    run_hedgerow("flower", "init", path, folder / "app")
    return folder / "app"


class Meter(threading.Thread):
    """Passes connections on to a port, and counts the bytes in both directions."""

    def __init__(self, target):
        super().__init__(daemon=True)
        self.target, self.bytes = target, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()

    def run(self):
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except ConnectionRefusedError:  # the SuperLink has ended
                near.close()
                continue
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source, target):
        try:
            while data := source.recv(1 << 16):
                with self._lock:
                    self.bytes += len(data)
                target.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("method", [FLORA, FERRET], ids=["flora", "ferret"])
def test_the_wire_carries_what_the_metrics_say(tmp_path, method):
    """Between sites and SuperLink, with TLS, polling, heartbeats and the app itself."""
    model = model_of(tmp_path / "model", hidden=512, layers=8)
    app = app_of(tmp_path, model, 2, method, rounds=4)
    with Network(tmp_path / "network") as network:
        meter = Meter(network.port)
        meter.start()
        for index in range(2):
            name = f"client-{index:03d}"
            network.register(name)
            network.start_node(
                name,
                superlink_port=meter.port,
                data=str(tmp_path / f"client_{index}.json"),
                model=str(model),
            )
        run = network.submit(app, tmp_path / "run")
        assert network.finish(run) == "finished:completed", network.run_log(run)
    rows = rows_of(tmp_path / "run")
    payload = sum(row["bytes_up"] + row["bytes_down"] for row in rows)
    print(
        f"{method['name']}: {payload:,} bytes by the metrics, {meter.bytes:,} on the wire, "
        f"{meter.bytes / payload:.4f} times"
    )
    assert payload > 10 * MIB
    assert payload < meter.bytes <= 1.05 * payload


class Peaks(threading.Thread):
    """The largest resident sets of Flower's processes, by program, until `done`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.done, self.peaks, self.baselines = False, {}, {}

    def run(self):
        while not self.done:
            for process in psutil.process_iter(["cmdline"]):
                line = " ".join(process.info["cmdline"] or [])
                for program in ("flwr-clientapp", "flwr-serverapp", "flower.worker"):
                    if program in line:
                        self._look_at(program, process.pid)
            time.sleep(0.05)

    def _look_at(self, program, pid):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return
        self.peaks[program] = max(self.peaks.get(program, 0), peak * 1024)


def test_a_gigabyte_passes_with_one_extra_copy(tmp_path):
    """FedAvg of a model of a gigabyte: update and entry, at the site's end and at the server's."""
    model = model_of(tmp_path / "model", hidden=1024, layers=16)
    size = (model / "model.safetensors").stat().st_size
    assert size > 1000 * MIB
    app = app_of(tmp_path, model, 1, {"name": "fedavg"}, rounds=2)
    peaks = Peaks()
    with Network(tmp_path / "network") as network:
        network.register("client-000")
        network.start_node("client-000", data=str(tmp_path / "client_0.json"), model=str(model))
        peaks.start()
        run = network.submit(app, tmp_path / "run")
        assert network.finish(run) == "finished:completed", network.run_log(run)
        peaks.done = True
    assert rows_of(tmp_path / "run")[-1]["bytes_up"] > size
    print({program: f"{peak / size:.2f}" for program, peak in peaks.peaks.items()})
    # Each process also holds its libraries.
    assert peaks.peaks["flwr-clientapp"] < 2 * size + 300 * MIB
    assert peaks.peaks["flwr-serverapp"] < 2 * size + 600 * MIB
