"""Entries may be larger than memory: each tensor that is needed is read once, and no other."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from hedgerow.adapters import adapter_tensors
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Client, Expected, ServerRound
from hedgerow.methods.flora import FLoRA
from hedgerow.methods.florist import FLoRIST
from hedgerow.methods.parts.start_and_residual import START
from hedgerow.methods.quantization import quantize
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.testing.doubles import Forgetful
from hedgerow.wire import Entry, Update

SHAPES = {"q": (12, 10), "up": (9, 16), "v": (7, 10)}


class Watched(Mapping[str, Tensor]):
    """Tensors of a file; `read` is what was read of it, in order."""

    def __init__(self, tensors):
        self._tensors, self.read = tensors, []

    def __getitem__(self, name):
        self.read.append(name)
        return self._tensors[name]

    def __contains__(self, name):
        return name in self._tensors

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)


def factors(rank, bits=32):
    generator = torch.Generator().manual_seed(rank)
    pairs = {
        module: Factors(
            torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
        )
        for module, (m, n) in SHAPES.items()
    }
    return quantize(adapter_tensors(pairs), bits)


def entry(bits, start=True):
    own = {START + name: tensor for name, tensor in factors(4, bits).items()} if start else {}
    tensors = Watched(own | factors(3, bits))
    return Entry("flora", 1, "p", [], {}, tensors), tensors


class Merging:
    """A model that notes how much had been read of an entry when it was given a module."""

    def __init__(self, tensors):
        self._tensors, self.merged, self.factors = tensors, [], None

    def merge(self, module, pair):
        assert pair.A.dtype == pair.B.dtype == torch.float32
        self.merged.append((module, len(self._tensors.read)))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("method", [FLoRA(), FLoRIST()], ids=["flora", "florist"])
def test_a_module_is_merged_before_the_next_is_read(method, bits):
    has_start = method.name == "flora"
    given, tensors = entry(bits if has_start else 32, start=has_start)
    model = Merging(tensors)
    method.apply(model, given)
    each = 4 if has_start and bits == 8 else 2
    assert model.merged == [("q", each), ("up", 2 * each), ("v", 3 * each)]
    assert sorted(tensors.read) == sorted(tensors)
    assert (model.factors is not None) == has_start


def server_round(previous):
    expected = Expected(Seeds(0), SHAPES, TrainingSettings(steps=2))
    return ServerRound(2, [Client(0, "c", 5)], previous, expected, Forgetful())


@pytest.mark.parametrize("bits", [8, 32])
def test_a_server_reads_of_the_entry_before_what_clients_start_from(bits):
    given, tensors = entry(bits)
    method = FLoRA(ranks=4, restart="shared")
    method.starts(TrainingSettings(steps=2)).before(server_round(given))
    begun = [name for name in tensors if name.startswith(START)]
    assert sorted(tensors.read) == sorted(begun)
    tensors.read.clear()
    about = {"r": "4", "lora_alpha": "8"}
    update = Update("flora", 2, "c", "p", 5, 1.0, factors(4), about)
    method.shown(update, server_round(given))
    assert sorted(tensors.read) == sorted(begun)


def test_an_export_reads_of_old_entries_no_start():
    (first, old), (last, new) = entry(8), entry(8)
    adapter = FLoRA().adapter([first, last], None, None)
    assert not [name for name in old.read if name.startswith(START)]
    assert sorted(new.read) == sorted(new)
    assert {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name} == {3 + 3 + 4}
