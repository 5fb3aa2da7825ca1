"""Gradient checkpointing: less memory for activations, and the same training."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from support.runs import ledger_bytes, rows_of
from torch.utils._python_dispatch import TorchDispatchMode

from hedgerow.settings import TrainingSettings
from hedgerow.testing.models import random_llama
from hedgerow.training import first_order
from hedgerow.training.checkpointing import checkpointed
from hedgerow.training.objectives.supervised import Supervised


class Peak(TorchDispatchMode):
    """The largest sum of the bytes of all tensors that were made within it and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: N807, RUF100
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._made, result)
        return result

    def _made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not size or place in self._alive:
            return
        self._alive.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


def step(network: Any, asked: bool) -> tuple[float, int, dict[str, torch.Tensor]]:
    """A backward pass: its loss, the peak of what it makes, and the gradients."""
    torch.manual_seed(0)
    tokens = torch.randint(3, 250, (4, 96))
    batch = {"input_ids": tokens, "labels": tokens}
    network.train().zero_grad()
    for parameter in network.parameters():  # so that no gradient counts as an activation
        parameter.grad = torch.zeros_like(parameter)
    torch.manual_seed(1)
    with checkpointed(network, asked), Peak() as peak:
        loss = first_order.backward(Supervised(), network, [batch], 4 * 95, 1)
    return loss, peak.most, {n: p.grad.clone() for n, p in network.named_parameters()}


@pytest.fixture(scope="module")
def twelve_layers(tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 12}
    folder = random_llama(
        tmp_path_factory.mktemp("model") / "twelve",
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    from transformers import AutoModelForCausalLM

    # Attention dropout, so that layers have to draw the same when they are computed again.
    return AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.1)


def test_twelve_layers_take_half_the_memory_and_have_the_same_gradients(twelve_layers):
    loss, whole, gradients = step(twelve_layers, False)
    again, least, checked = step(twelve_layers, True)
    assert again == loss
    for name, gradient in gradients.items():
        torch.testing.assert_close(checked[name], gradient, rtol=0, atol=1e-6)
    print(f"peak of activations: {least / whole:.3f} of {whole:,} bytes")
    assert least <= 0.5 * whole
    assert not twelve_layers.is_gradient_checkpointing


METHODS = [
    {"name": "flora", "ranks": [4, 2, 1], "dropout": 0.1},
    {"name": "flora_adalora", "ranks": 2},
    {"name": "fedavg"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_a_run_comes_to_the_same_and_may_go_on_with_it_or_without(
    method, hedgerow, experiment, tmp_path
):
    path = experiment(federation={"rounds": 2})
    text = path.read_text()
    import yaml

    content = yaml.safe_load(text) | {"method": method}
    path.write_text(yaml.safe_dump(content))
    on = "training.gradient_checkpointing=true"
    for name, *overrides in (["plain"], ["asked", on], ["later", "federation.rounds=1"]):
        result = hedgerow("run", path, *overrides, "--out", tmp_path / name)
        assert result.code == 0, result.err
    result = hedgerow("run", path, on, "--out", tmp_path / "later", "--resume")
    assert result.code == 0, result.err
    plain = rows_of(tmp_path / "plain")
    for name in ("asked", "later"):
        for row, other in zip(plain, rows_of(tmp_path / name), strict=True):
            assert other["eval_loss"] == pytest.approx(row["eval_loss"], abs=1e-5)
    assert ledger_bytes(tmp_path / "asked") == ledger_bytes(tmp_path / "plain")


def test_steps_in_the_backward_pass_and_private_ones_come_to_the_same(experiment, hedgerow):
    """Weights that change while layers are computed again, and one backward pass an example."""
    path = experiment(training={"optimizer": "sgd", "max_grad_norm": None})
    out = path.parent
    private = '{"level": "example", "clip": 1, "noise_multiplier": 1, "delta": 1e-3, "seed": 1}'
    for name, *overrides in (
        ["immediate", "method=fedavg"],
        ["private", "method=fedit", f"privacy={private}"],
    ):
        losses = []
        for asked in ("false", "true"):
            run = out / f"{name}-{asked}"
            set_ = [*overrides, f"training.gradient_checkpointing={asked}"]
            result = hedgerow("run", path, *set_, "--out", run)
            assert result.code == 0, result.err
            losses.append([row["eval_loss"] for row in rows_of(run)])
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert losses[0][0] != losses[0][-1]


def test_a_network_that_cannot_is_refused(hedgerow, experiment, tmp_path, monkeypatch):
    from transformers import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "supports_gradient_checkpointing", False)
    path = experiment(training={"gradient_checkpointing": True})
    result = hedgerow("run", path, "--out", tmp_path / "run")
    assert (result.code, (tmp_path / "run").exists()) == (2, False)
    assert "training.gradient_checkpointing: transformers has none for Llama" in result.err


def test_it_is_off_unless_asked_for():
    assert not TrainingSettings().gradient_checkpointing
