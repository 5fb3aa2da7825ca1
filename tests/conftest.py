"""A tiny random Llama, three clients' files, and the command line as a function."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hedgerow import cli

SHARED = Path(__file__).parents[2] / "shared"

# Tiny models only lose by threads, which spin while they wait; and sums of two threads have other
# bits than sums of one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs ../shared where it is not there."""
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="../shared is not here"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and a real model beside the repository."""
    return SHARED


class Output(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def hedgerow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Output]:
    """Run a command line in this process."""

    def run(*arguments: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["hedgerow", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Output(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers that reads bytes."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return random_llama(tmp_path_factory.mktemp("model") / "tiny", **sizes, **heads)


def random_llama(folder: Path, **sizes: int) -> Path:
    """Save a random Llama that reads bytes in a folder; `sizes` are transformers' names."""
    config = LlamaConfig(
        vocab_size=260,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def experiment(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Write an experiment file on three clients of different sizes; keywords change sections."""
    return functools.partial(write_experiment, tmp_path, tiny_model)


def write_experiment(folder: Path, base: Path, /, **sections: Any) -> Path:
    """As the fixture `experiment`, into any folder."""
    for client, size in enumerate([5, 9, 14]):
        rows = [
            {"instruction": f"Say {'abc'[client]}{i}", "output": f"{'abc'[client] * 3}{i}"}
            for i in range(size)
        ]
        (folder / f"client_{client}.json").write_text(json.dumps(rows))
    rows = [{"instruction": f"Say b{i}", "output": f"bbb{i}"} for i in range(4)]
    (folder / "test.json").write_text(json.dumps(rows))
    content: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {
            "clients": "client_{}.json",
            "test": "test.json",
            "prompt": "plain",
            "max_length": 64,
        },
        "method": {"name": "flora", "ranks": [4, 2, 1]},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "federation": {"rounds": 2},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def no_past(round: int) -> Any:
    """The earlier entries of a turn in which nobody reads them."""
    raise AssertionError("nobody reads an earlier entry")


class Forgetful:
    """The memory of a client, or a server, that keeps nothing."""

    def load(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def save(self, tensors: Any) -> None:
        """Forget them."""


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def ledger_bytes(run: Path) -> dict[str, bytes]:
    """The files of a run's ledger."""
    return {path.name: path.read_bytes() for path in sorted((run / "ledger").iterdir())}


def tensorboard_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of each scalar in a run's event files, as TensorBoard shows them."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
