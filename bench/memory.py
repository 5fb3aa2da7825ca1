"""The memory of a client that trains all parameters: what each stage of its round has at its peak.

    python bench/memory.py [--hidden 2048 --layers 22 --intermediate 5632 --heads 32 --kv-heads 4]
        [--coordinates largest|random]

A Llama of these dimensions (by default TinyLlama-1.1B's) with random bfloat16 weights takes two
plain SGD steps on the demo's data and is sketched and rebuilt, stage by stage; the kernel's
high-water mark of the process is reset before each. Linux only. The last table says what the same
stages come to for a 7B Llama, from its shapes: nothing in it is measured but the activations, which
are scaled from this run by layers times hidden size.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hedgerow import console, demo
from hedgerow.data import ClientData
from hedgerow.experiment import load
from hedgerow.methods.base import Client, ClientRound, Expected, ServerRound
from hedgerow.methods.ferret import Ferret
from hedgerow.methods.parts.coordinates import DEFAULT_COMPRESSION
from hedgerow.model import Model
from hedgerow.seeds import Seeds
from hedgerow.sketch.blocks import group
from hedgerow.training.job import Job
from hedgerow.wire import Entry, Update

SEVEN_B = {"hidden": 4096, "layers": 32, "intermediate": 11008, "heads": 32, "kv_heads": 32}
VOCABULARY = 32_000


def main() -> None:
    """Run the stages and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_dimensions(parser, hidden=2048, layers=22, intermediate=5632, heads=32, kv_heads=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--coordinates", choices=("largest", "random"), default="largest")
    options = vars(parser.parse_args())
    tokens, method = options.pop("tokens"), Ferret(coordinates=options.pop("coordinates"))
    network = random_llama(**options)
    size = sum(p.numel() for p in network.parameters())
    weights = 2 * size
    measured = stages(method, network, tokens)
    console.table(
        f"{size / 1e9:.2f}B parameters in bfloat16 ({gigabytes(weights)}), 1 × {tokens} tokens",
        ["stage", "peak", "beside the weights", "in copies of the weights"],
        [
            (name, gigabytes(peak), gigabytes(peak - weights), f"{peak / weights:.2f}")
            for name, peak in measured.items()
        ],
    )
    activations = measured["training"] - 2 * weights
    scale = SEVEN_B["layers"] * SEVEN_B["hidden"] / (options["layers"] * options["hidden"])
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in llama(**SEVEN_B).named_parameters()}
    print_seven_b(method, shapes, activations * scale, tokens)


def add_dimensions(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Add an option for each dimension of a Llama."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)


def print_seven_b(
    method: Ferret, shapes: dict[str, tuple[int, ...]], activations: float, tokens: int
) -> None:
    """What the stages come to for a 7B Llama whose weights are on a GPU."""
    weights = 2 * sum(math.prod(shape) for shape in shapes.values())
    gradient = 2 * max(math.prod(shape) for shape in shapes.values())
    if method.coordinates == "random":
        block = max(block.size for block in group(shapes))
    else:
        block = max(math.prod(shape) for shape in shapes.values())
    rows = [
        ("weights", "2 bytes each", gigabytes(weights), ""),
        ("snapshot", "2 bytes each", "", gigabytes(weights)),
        ("what rounding took (of past entries)", "2 bytes each", "", gigabytes(weights)),
        ("the largest gradient", "2 bytes each", gigabytes(gradient), ""),
        (f"activations, 1 × {tokens} tokens", "scaled from above", gigabytes(activations), ""),
        (
            "peak in training",
            "",
            gigabytes(weights + gradient + activations),
            gigabytes(2 * weights),
        ),
        (
            "update and estimate of a tensor, or block",
            "4 bytes, twice",
            gigabytes(8 * block),
            "",
        ),
        ("peak in sketching", "", gigabytes(weights + 8 * block), gigabytes(2 * weights)),
        (
            "an update that waits at the server",
            f"4 bytes, by {DEFAULT_COMPRESSION:g}",
            "",
            gigabytes(2 * weights // int(DEFAULT_COMPRESSION)),
        ),
        ("AdamW instead of SGD", "gradient and moments", gigabytes(3 * weights), ""),
    ]
    size = weights / 2e9
    console.table(
        f"{size:.2f}B parameters, computed", ["part", "how", "device", "host"], rows, numbers=True
    )


def stages(method: Ferret, network: Any, tokens: int) -> dict[str, int]:
    """The peak of each stage of a client's round, in bytes beside what the process had before."""
    floor = resident() - sum(p.nbytes for p in network.parameters())
    peaks: dict[str, int] = {}

    def stage(name: str) -> None:
        peaks[name] = high_water() - floor
        Path("/proc/self/clear_refs").write_text("5")

    with tempfile.TemporaryDirectory() as folder:
        changes = [
            "training.optimizer=sgd",
            "training.max_grad_norm=null",
            "training.steps=2",
            "training.batch_size=1",
            f"data.max_length={tokens}",
            "training.learning_rate=1e-3",
        ]
        experiment = load(demo.prepare(Path(folder)), changes)
        tokenizer = Model.load(experiment.model).tokenizer
        data = ClientData(experiment.data, tokenizer, Seeds(0))
        shard = data.tokenize(data.names[0])
    model = Model(network, tokenizer, "random")
    seeds, shapes = Seeds(0), method.trained_shapes(model)
    client = Client(0, "client-000", len(shard))
    client_round = ClientRound(client, 1, seeds, experiment.training, Forgetful(), no_past)
    order = seeds.numpy("batches")
    job = Job(
        network=network,
        data=shard,
        settings=experiment.training,
        learning_rate=1e-3,
        pad_id=tokenizer.pad_token_id,
        order=order,
        dropout_seed=0,
    )
    Path("/proc/self/clear_refs").write_text("5")
    stage("weights")
    parameters = method.start(model, client_round)
    stage("snapshot")
    trained = method.train(job, client_round, parameters)
    stage("training")
    tensors, about = method.update(model, client_round, trained)
    stage("sketch")
    model.release()
    update = Update(
        method="ferret",
        round=1,
        client=client.name,
        parent="",
        num_examples=len(shard),
        train_loss=trained.loss,
        tensors=tensors,
        about=about,
    )
    aggregate = method.aggregate(
        [update],
        ServerRound(1, [client], None, Expected(seeds, shapes, experiment.training), Forgetful()),
    )
    stage("server, which needs no model")
    entry = Entry(
        method="ferret", round=1, parent="", participants=[], metrics={}, tensors=aggregate.tensors
    )
    method.apply(model, entry)
    stage("apply an entry")
    return peaks


def no_past(round: int) -> Entry:
    """Nothing: Ferret reads no earlier entry."""
    raise AssertionError("nobody reads an earlier entry")


class Forgetful:
    """No memory from round to round: error feedback is off."""

    def load(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def save(self, tensors: object) -> None:
        """Forget them."""


def llama(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int) -> Any:
    """A Llama of these dimensions; bfloat16."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def random_llama(**dimensions: int) -> Any:
    """With weights that are random enough to train: one short random piece, over and over."""
    with torch.device("meta"):
        network = llama(**dimensions)
    network = network.to_empty(device="cpu")
    network.model.rotary_emb.__init__(network.config)  # type: ignore[misc]  # its buffers
    piece = torch.randn(99_991).mul_(0.02).bfloat16()
    for name, parameter in network.named_parameters():
        flat = parameter.detach().view(-1)
        for part in flat.split(len(piece)):
            part.copy_(piece[: len(part)])
        if name.endswith("norm.weight"):
            flat.fill_(1)
    return network


def resident() -> int:
    """Bytes that the process has in memory."""
    return status("VmRSS")


def high_water() -> int:
    """The most that it has had since the mark was reset."""
    return status("VmHWM")


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1]) * 1024


def gigabytes(number: float) -> str:
    """For reading."""
    return f"{number / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
