"""One causal language model in memory, and what a participant of a federation does to it.

There is one base model however many clients train on it: a client borrows it (an adapter is
attached, or the weights are trained in place with one snapshot beside them) and gives it back.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hedgerow import quantized, targets
from hedgerow.adapter_layers import FROZEN, LORA, TRAINED, AdapterLayers, nested
from hedgerow.adapters import adapter_pairs
from hedgerow.errors import UserError
from hedgerow.lazy import peft, torch
from hedgerow.loading import Origin, load, name_of, tokenization
from hedgerow.lowrank import Factors, norm, relative
from hedgerow.quantized import Quantization, SumBeside
from hedgerow.targets import Targets

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.settings import ModelSettings


class Model:
    """A causal language model, its tokenizer, and the state that ledger entries advance.

    Attributes:
        network: the transformers model; outside `attach` it holds no adapter.
        tokenizer: its tokenizer.
        origin: what it came from.
        shared_state: tensors that global steps keep from one to the next, by name, as the server
            optimiser's moments: the same at everybody, since a replay of the ledger rebuilds them.
        quantization: number type of the weights of linear layers; None where they are whole.
        factors: the adapter that belongs to the global model, for methods that do not merge theirs
            into the weights (PEFT's key names); None where the weights are the whole model.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        name: str,
        origin: Origin = Origin(),  # noqa: B008, it is immutable
        merged_rank: int | None = None,
    ) -> None:
        """A model of which nothing is lent.

        Args:
            merged_rank: largest rank of what is kept beside a quantized weight; None for any.
        """
        quantized.compute_exactly(network)
        self.quantization: Quantization | None = quantized.kind_of(network)
        self.merged_rank = merged_rank
        self._beside: dict[str, SumBeside] = {}
        self.network = network.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
        self.origin = origin
        self.shared_state: dict[str, Tensor] = {}
        self.factors: Mapping[str, Tensor] | None = None
        self._attached: dict[str, Any] = {}
        self._layers = LORA
        self._wrapped: dict[str, dict[str, Any]] = {}
        self._trained: dict[str, nn.Parameter] = {}
        self._snapshot: dict[str, Tensor] = {}
        self._remainders: dict[str, Tensor] = {}
        self._singular: dict[str, Factors] = {}
        self._targets: dict[tuple[str | tuple[str, ...], bool], Targets] = {}

    @classmethod
    def load(cls, settings: ModelSettings) -> Model:
        """Load a model (or an adapter with its base) from a folder, or a model from the Hub.

        Raises:
            UserError: there is no such model, it is no causal language model, it has no safetensors
                weights (others are pickles), or the device is not there.
        """
        loaded = load(settings)
        name, rank = name_of(settings.path), settings.merged_rank
        return cls(loaded.network, loaded.tokenizer, name, loaded.origin, rank)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.network.device
        return device

    @property
    def architecture(self) -> str:
        """The transformers class, as `LlamaForCausalLM`."""
        return type(self.network).__name__

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, from 0 on, that the model both reads and predicts."""
        layers = (self.network.get_input_embeddings(), self.network.get_output_embeddings())
        return min(int(layer.weight.shape[0]) for layer in layers if layer is not None)

    @property
    def pad_id(self) -> int:
        """Token id that fills batches: any that the model has, since what it says there is masked.

        It is the tokenizer's own where the model has that.
        """
        own: int | None = self.tokenizer.pad_token_id
        return own if own is not None and 0 <= own < self.vocabulary_size else 0

    @property
    def ends(self) -> list[int]:
        """Token ids that end an answer, in ascending order.

        They are the tokenizer's, and those that the model's own configuration names: chat models
        end their turns with tokens that only one of them knows. Configurations also have ends by
        default, and so an ordinary piece of text is none.
        """
        tokenizer = self.tokenizer
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        network = self.network
        ends = {tokenizer.eos_token_id}
        for config in (network.generation_config, network.config, network.config.get_text_config()):
            own = getattr(config, "eos_token_id", None)
            ends |= special.intersection(own if isinstance(own, list | tuple) else [own])
        return sorted(end for end in ends if end is not None and 0 <= end < self.vocabulary_size)

    def fingerprint(self) -> str:
        """SHA-256 of the weights (names, dtypes, shapes, bytes) and of the tokenizer."""
        digest = hashlib.sha256(self.architecture.encode())
        for name, weight in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.contiguous().flatten().view(torch.uint8).cpu().numpy())
        digest.update(json.dumps(tokenization(self.tokenizer), sort_keys=True).encode())
        return digest.hexdigest()

    def state(self) -> dict[str, Tensor]:
        """A copy of weights and buffers in host memory, for `reset`.

        Quantized weights are not in it: nothing changes them.
        """
        fixed = tuple(f"{name}." for name, _ in quantized.layers(self.network))
        state = self.network.state_dict().items()
        return {n: w.to("cpu", copy=True) for n, w in state if not n.startswith(fixed)}

    def reset(self, state: Mapping[str, Tensor]) -> None:
        """Make the model what it was when `state` was taken, before any entry."""
        self.network.load_state_dict(state, strict=self.quantization is None)
        for beside in self._beside.values():
            beside.remove()
        self._beside.clear()
        self.shared_state, self.factors, self._remainders = {}, None, {}
        self._singular.clear()
        self._wrapped.clear()  # another run may attach other adapters

    # --- what a client trains -------------------------------------------------------------------

    def attach(
        self,
        config: peft.LoraConfig,
        frozen: Mapping[str, Tensor] | None = None,
        *,
        layers: AdapterLayers = LORA,
    ) -> dict[str, nn.Parameter]:
        """Attach an adapter; returns its live parameters, uninitialised, by PEFT's key names.

        Args:
            config: peft's configuration of the adapter.
            frozen: factors of a second adapter beside it, of one rank and with its scale in them,
                which takes part in the model's function and is not trained.
            layers: the kind of layers that are put around the adapted ones.

        Raises:
            ValueError: peft finds no modules that the configuration names.
        """
        # peft takes tens of milliseconds to wrap even a tiny model, for every client of every
        # round, so the wrapped layers of each configuration are made once and swapped in and out.
        beside = _plain_config(frozen) if frozen else None
        key = json.dumps(
            [layers.name, *(c and c.to_dict() for c in (config, beside))],
            sort_keys=True,
            default=sorted,
        )
        if key not in self._wrapped:
            self._wrapped[key] = self._wrap(config, beside, layers)
        self._attached, self._layers = self._wrapped[key], layers
        for name, layer in self._attached.items():
            self.network.set_submodule(name, layer)
            for wrapper in nested(layer) if frozen else ():
                wrapper.set_adapter([TRAINED, FROZEN])
        parameters = self._parameters(TRAINED)
        for parameter in parameters.values():
            parameter.requires_grad_(True)  # whoever had the layers before may have frozen some
        if frozen:
            with torch.no_grad():
                for name, parameter in self._parameters(FROZEN).items():
                    parameter.requires_grad_(False).copy_(frozen[name])
        self.network.eval()
        return parameters

    def _wrap(
        self, config: peft.LoraConfig, beside: peft.LoraConfig | None, layers: AdapterLayers
    ) -> dict[str, Any]:
        """The layers with adapters around them, by name, in the network's order."""
        targets = self.targets(config.target_modules, experts=layers.adapts_experts)
        found: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is said in our own words, or is moot
            # Not by get_peft_model, which takes names of layers for those of experts of old.
            for name in targets.modules:
                found[name] = layers.around(self.network.get_submodule(name), config, beside)
            for name in targets.parameters:
                owner, _, parameter = name.rpartition(".")
                layer = found.get(owner) or self.network.get_submodule(owner)
                found[owner] = layers.around(layer, config, beside, parameter)
        return {name: found[name] for name, _ in self.network.named_modules() if name in found}

    def targets(self, wanted: str | Collection[str], *, experts: bool = True) -> Targets:
        """What an adapter with these targets changes; see `targets.find`."""
        key = (wanted if isinstance(wanted, str) else tuple(sorted(wanted)), experts)
        if key not in self._targets:
            self._targets[key] = targets.find(self.network, wanted, experts=experts)
        return self._targets[key]

    def _parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter that is attached, by PEFT's key names."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self._attached.items():
            found |= self._layers.parameters(layer, adapter, name)
        return found

    def unfreeze(self) -> dict[str, nn.Parameter]:
        """Make all weights trainable, with a snapshot to give them back; returns them by name."""
        parameters = dict(self.network.named_parameters())
        self.network.requires_grad_(True)
        self.take_snapshot(parameters)
        return parameters

    def take_snapshot(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the snapshot that `trained_delta` compares with, in host memory."""
        self._snapshot = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items()}
        self._trained = dict(parameters)

    @property
    def snapshot(self) -> Mapping[str, Tensor]:
        """What the parameters that train were before training, by name, in host memory."""
        return self._snapshot

    def trained_delta(self) -> Iterator[tuple[str, Tensor]]:
        """Change of each parameter since its snapshot, by name, in float32, one by one."""
        for name, parameter in self._trained.items():
            before = self._snapshot[name].to(parameter.device)
            yield name, parameter.detach().to(torch.float32, copy=True).sub_(before)

    def release(self) -> None:
        """Give the model back: without adapter, with the weights that it had before training."""
        for name, layer in self._attached.items():
            layer.zero_grad(set_to_none=True)
            self.network.set_submodule(name, layer.get_base_layer())
        self._attached = {}
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self._snapshot[name])
        self._trained, self._snapshot = {}, {}
        self.network.zero_grad(set_to_none=True)
        self.network.requires_grad_(False).eval()

    def singular_vectors(self, module: str, rank: int) -> Factors:
        """The leading singular vectors of a linear layer's weight, right ones in A, left ones in B.

        The largest entry of each row of A is positive, so that equal weights give equal vectors.
        They are kept, since an SVD takes seconds, until a weight changes.
        """
        if module not in self._singular or self._singular[module].rank != rank:
            layer = self.network.get_submodule(module)
            weight = layer.weight.T if targets.is_transposed(layer) else layer.weight
            if quantized.is_quantized(layer):
                weight = quantized.dequantized(layer)
                if (change := self.beside().get(module)) is not None:
                    weight = weight + change.product()
            # On the CPU whatever the model's device: a GPU's SVD is another algorithm.
            u, _, v = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=False)
            u, v = u[:, :rank], v[:rank]
            signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
            self._singular[module] = Factors(v * signs, u * signs.T).float()
        return self._singular[module]

    # --- what an entry changes ------------------------------------------------------------------

    def add(self, name: str, delta: Tensor, expert: int | None = None) -> None:
        """Add `delta` to the weight `name`, or to the part of it that is an expert's.

        A bfloat16 weight would round small deltas away, round after round, so what the rounding
        took is kept, in host memory, and added the next time (compensated summation).

        Args:
            delta: shape of the weight, or of that part.
            expert: number of the expert, of a weight that has a matrix for each.
        """
        self._singular.clear()
        whole = self.network.get_parameter(name)
        weight = whole if expert is None else whole[expert]
        delta = delta.to(weight.device)
        with torch.no_grad():
            if weight.dtype == torch.float32:
                weight.add_(delta)
                return
            if name not in self._remainders:
                self._remainders[name] = torch.zeros_like(whole, device="cpu")
            kept = self._remainders[name]
            kept = kept if expert is None else kept[expert]
            total = delta + weight + kept.to(weight.device)
            weight.copy_(total)
            kept.copy_(total.sub_(weight))

    def change(self, name: str, before: Tensor) -> Tensor:
        """Change of the weight `name` since it was `before`, on the CPU, in float32."""
        now: Tensor = self.network.get_parameter(name).detach().cpu().float()
        if name in self._remainders:
            now = now + self._remainders[name].float()
        return now - before.float()

    def changes(self, before: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Change of each matrix since the weights were `before`, by name, as `change` has it."""
        for name, weight in self.network.named_parameters():
            if weight.ndim == 2 and name in before:
                yield name, self.change(name, before[name])
        for module, pair in self.beside().items():
            yield f"{module}.weight", pair.product().cpu()

    def beside(self) -> dict[str, Factors]:
        """What is kept beside quantized weights, by the layer's name, in float32."""
        sums = {module: beside.factors for module, beside in self._beside.items()}
        return {module: pair for module, pair in sums.items() if pair is not None}

    def unbind(self) -> None:
        """Cut nothing any more of what is kept beside quantized weights."""
        self.merged_rank = None
        for beside in self._beside.values():
            beside.most = None

    @property
    def merged_error(self) -> float:
        """Largest relative error (Frobenius norm) of all that is kept beside quantized weights.

        0 where nothing was cut off for `merged_rank`.
        """
        lost = sum(beside.lost**2 for beside in self._beside.values())
        return relative(lost, sum(norm(pair) ** 2 for pair in self.beside().values()))

    def make_float(self) -> None:
        """Have all weights in float32, with what was kept beside quantized ones added to them.

        What the model computes stays as it was, and it is no base for further rounds.
        """
        if self.quantization is None:
            return
        self._wrapped.clear()
        beside = self.beside()
        for name, _ in list(quantized.layers(self.network)):
            quantized.replace_by_float(self.network, name, beside.get(name))
        quantized.forget(self.network)
        self.network.float()
        self._beside.clear()
        self.quantization = None

    def merge(self, module: str, factors: Factors) -> None:
        """Add B·A to the weight of the linear layer, or of the expert, `module`.

        To a quantized weight nothing is added: the sum of all that would be is kept beside it.
        """
        if module in self._beside or quantized.is_quantized(self._module(module)):
            self._singular.clear()
            if module not in self._beside:
                layer = self.network.get_submodule(module)
                self._beside[module] = SumBeside(layer, self.merged_rank)
            self._beside[module].add(factors)
            return
        product = Factors(*(f.to(self.device) for f in factors)).product()
        parameter, _, expert = module.rpartition(".")
        if (is_transposed := self._experts.get(parameter)) is not None:
            self.add(parameter, product.T if is_transposed else product, int(expert))
        else:
            layer = self.network.get_submodule(module)
            transposed = targets.is_transposed(layer)
            self.add(f"{module}.weight", product.T if transposed else product)

    def _module(self, name: str) -> Any:
        """The module of this name; None where it is an expert's, which is part of one."""
        return (
            None if name.rpartition(".")[0] in self._experts else self.network.get_submodule(name)
        )

    @cached_property
    def _experts(self) -> dict[str, bool]:
        return targets.expert_parameters(self.network)

    @contextmanager
    def with_factors(self, factors: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with an adapter whose scale is in its factors already, until the block ends."""
        parameters = self.attach(_plain_config(factors))
        try:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(factors[name])
            yield
        finally:
            self.release()

    def adapted_shapes(
        self, wanted: str | Collection[str], *, experts: bool = True
    ) -> dict[str, tuple[int, int]]:
        """The shape (m, n) of each matrix that an adapter with these targets would change.

        Args:
            wanted: the targets, see `targets.find`.
            experts: whether experts can be adapted.

        Raises:
            UserError: the model has no such matrices, or shares one with its embeddings.
        """
        found = self.targets(wanted, experts=experts)
        embeddings = self.network.get_input_embeddings().weight
        for name in found.modules:
            if self.network.get_submodule(name).weight is embeddings:
                raise UserError(
                    f"method.targets: {name} shares its weight with the input embeddings, which an "
                    "adapter would change too: leave it out"
                )
        shapes = targets.matrix_shapes(self.network, found)
        return {name: shapes[name] for name in sorted(shapes, key=lambda n: f"{n}.lora_A.weight")}


def _plain_config(factors: Mapping[str, Tensor]) -> peft.LoraConfig:
    """peft's configuration of an adapter of one rank, whose scale is in its factors."""
    pairs = dict(adapter_pairs(factors))
    rank = next(iter(pairs.values())).rank
    return peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(pairs), init_lora_weights=False
    )


def max_positions(network: Any) -> int:
    """Number of tokens that the network was made for; `sys.maxsize` where it does not say."""
    config = network.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # the latter is MPT's
    return next(filter(None, (getattr(config, name, None) for name in names)), sys.maxsize)
