"""One causal language model in memory, and what a participant of a federation does to it.

There is one base model however many clients train on it: a client borrows it (an adapter is
attached, or the weights are trained in place with one snapshot beside them) and gives it back.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hedgerow.adapters import PREFIX, adapter_pairs
from hedgerow.errors import UserError
from hedgerow.lazy import peft, torch, transformers
from hedgerow.loading import Origin, load, name_of, tokenization
from hedgerow.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.settings import ModelSettings


_TRAINED, _FROZEN = "default", "frozen"
"""peft's names of the adapter that a client trains, and of one beside it."""


class Model:
    """A causal language model, its tokenizer, and the state that ledger entries advance.

    Attributes:
        network: the transformers model; outside `attach` it holds no adapter.
        tokenizer: its tokenizer.
        origin: what it came from.
        momentum: a decaying sum of past steps by weight, for methods with server momentum.
        factors: the adapter that belongs to the global model, for methods that do not merge theirs
            into the weights (PEFT's key names); None where the weights are the whole model.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        name: str,
        origin: Origin = Origin(),  # noqa: B008, it is immutable
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
        self.origin = origin
        self.momentum: dict[str, Tensor] = {}
        self.factors: Mapping[str, Tensor] | None = None
        self._attached: dict[str, Any] = {}
        self._wrapped: dict[str, dict[str, Any]] = {}
        self._trained: dict[str, nn.Parameter] = {}
        self._snapshot: dict[str, Tensor] = {}
        self._remainders: dict[str, Tensor] = {}
        self._singular: dict[str, Factors] = {}

    @classmethod
    def load(cls, settings: ModelSettings) -> Model:
        """Load a model (or an adapter with its base) from a folder, or a model from the Hub.

        Raises:
            UserError: there is no such model, it is no causal language model, it has no safetensors
                weights (others are pickles), or the device is not there.
        """
        loaded = load(settings)
        return cls(loaded.network, loaded.tokenizer, name_of(settings.path), loaded.origin)

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
        """A copy of weights and buffers in host memory, for `reset`."""
        return {n: w.to("cpu", copy=True) for n, w in self.network.state_dict().items()}

    def reset(self, state: Mapping[str, Tensor]) -> None:
        """Make the model what it was when `state` was taken, before any entry."""
        self.network.load_state_dict(state)
        self.momentum, self.factors, self._remainders = {}, None, {}
        self._singular.clear()
        self._wrapped.clear()  # another run may attach other adapters

    # --- what a client trains -------------------------------------------------------------------

    def attach(
        self,
        config: peft.LoraConfig,
        frozen: Mapping[str, Tensor] | None = None,
        *,
        core: bool = False,
    ) -> dict[str, nn.Parameter]:
        """Attach an adapter; returns its live parameters, uninitialised, by PEFT's key names.

        Args:
            config: peft's configuration of the adapter.
            frozen: factors of a second adapter beside it, of one rank and with its scale in them,
                which takes part in the model's function and is not trained.
            core: put an r×r matrix R between the factors, ΔW = s·B·R·A, under `lora_R.weight`.

        Raises:
            ValueError: peft finds no modules that the configuration names.
        """
        # peft takes tens of milliseconds to wrap even a tiny model, for every client of every
        # round, so the wrapped layers of each configuration are made once and swapped in and out.
        beside = _plain_config(frozen) if frozen else None
        key = json.dumps(
            [core, *(c and c.to_dict() for c in (config, beside))], sort_keys=True, default=sorted
        )
        if key not in self._wrapped:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is said in our own words, or is moot
                try:
                    adapted = peft.get_peft_model(self.network, config, _TRAINED)
                    if beside is not None:
                        adapted.add_adapter(_FROZEN, beside)
                except BaseException:
                    # peft has wrapped some layers, and came to one that it cannot, or to Ctrl-C.
                    for name, layer in self._lora_layers().items():
                        self.network.set_submodule(name, layer.get_base_layer())
                    if hasattr(self.network, "peft_config"):
                        del self.network.peft_config
                    raise
            self._wrapped[key] = self._lora_layers()
            adapted.unload()
            for layer in self._wrapped[key].values() if core else ():
                _insert_core(layer)
        self._attached = self._wrapped[key]
        for name, layer in self._attached.items():
            self.network.set_submodule(name, layer)
            if frozen:
                layer.set_adapter([_TRAINED, _FROZEN])
        parameters = self._parameters(_TRAINED)
        for parameter in parameters.values():
            parameter.requires_grad_(True)  # whoever had the layers before may have frozen some
        if frozen:
            with torch.no_grad():
                for name, parameter in self._parameters(_FROZEN).items():
                    parameter.requires_grad_(False).copy_(frozen[name])
        self.network.eval()
        return parameters

    def _lora_layers(self) -> dict[str, Any]:
        """The layers that peft has wrapped, by name."""
        kind = peft.tuners.lora.LoraLayer
        return {n: m for n, m in self.network.named_modules() if isinstance(m, kind)}

    def _parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter that is attached, by PEFT's key names."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self._attached.items():
            if adapter not in layer.lora_A:
                continue  # an embedding's, which `adapted_shapes` refuses in its own words
            parts = {what: getattr(layer, what)[adapter] for what in ("lora_A", "lora_B")}
            if isinstance(parts["lora_B"], torch.nn.Sequential):
                parts["lora_R"], parts["lora_B"] = parts["lora_B"]
            if isinstance(layer, peft.tuners.adalora.AdaLoraLayer):
                # Its factors are plain parameters, and the singular values stand beside them.
                parts["lora_E"] = layer.lora_E[adapter]
                found |= {f"{PREFIX}{name}.{what}": part for what, part in parts.items()}
            else:
                found |= {f"{PREFIX}{name}.{w}.weight": part.weight for w, part in parts.items()}
        return found

    def unfreeze(self) -> dict[str, nn.Parameter]:
        """Make all weights trainable, with a snapshot to give them back; returns them by name."""
        parameters = dict(self.network.named_parameters())
        self.network.requires_grad_(True)
        self.take_snapshot(parameters)
        return parameters

    def take_snapshot(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the snapshot that `trained_delta` compares with, in host memory."""
        # `.to` alone would hand out the weights themselves where they are on the CPU already.
        self._snapshot = {
            name: p.detach().clone() if p.device.type == "cpu" else p.detach().cpu()
            for name, p in parameters.items()
        }
        self._trained = dict(parameters)

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
            weight = layer.weight.T if _is_transposed(layer) else layer.weight
            # On the CPU whatever the model's device: a GPU's SVD is another algorithm.
            u, _, v = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=False)
            u, v = u[:, :rank], v[:rank]
            signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
            self._singular[module] = Factors(v * signs, u * signs.T).float()
        return self._singular[module]

    # --- what an entry changes ------------------------------------------------------------------

    def add(self, name: str, delta: Tensor) -> None:
        """Add `delta` (the weight's shape) to the weight `name`.

        A bfloat16 weight would round small deltas away, round after round, so what the rounding
        took is kept, in host memory, and added the next time (compensated summation).
        """
        self._singular.clear()
        weight = self.network.get_parameter(name)
        delta = delta.to(weight.device)
        with torch.no_grad():
            if weight.dtype == torch.float32:
                weight.add_(delta)
                return
            total = delta + weight
            if name in self._remainders:
                total += self._remainders[name].to(weight.device)
            weight.copy_(total)
            self._remainders[name] = total.sub_(weight).to(weight.dtype).cpu()

    def change(self, name: str, before: Tensor) -> Tensor:
        """Change of the weight `name` since it was `before`, on the CPU, in float32."""
        now: Tensor = self.network.get_parameter(name).detach().cpu().float()
        if name in self._remainders:
            now = now + self._remainders[name].float()
        return now - before.float()

    def merge(self, module: str, factors: Factors) -> None:
        """Add B·A to the weight of the linear layer `module`."""
        layer = self.network.get_submodule(module)
        product = Factors(*(f.to(self.device) for f in factors)).product()
        self.add(
            f"{module}.weight",
            product.T if _is_transposed(layer) else product,
        )

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

    def adapted_shapes(self, targets: str | list[str]) -> dict[str, tuple[int, int]]:
        """The shape (m, n) of each matrix that an adapter with these targets would change.

        Raises:
            UserError: the model has no such modules, or they are not plain linear layers.
        """
        config = peft.LoraConfig(r=1, target_modules=targets, init_lora_weights=False)
        try:
            parameters = self.attach(config)
        except (ValueError, RuntimeError, re.error) as error:
            modules = self.network.named_modules()
            linear = sorted({n.rpartition(".")[2] for n, module in modules if _is_linear(module)})
            raise UserError(
                f"method.targets: {self.architecture} has no modules {targets} that an adapter "
                f"can be attached to ({' '.join(str(error).split())[:120]} …); its linear layers "
                f"are {', '.join(linear)}; `all-linear` takes all but the output layer"
            ) from None
        layers = {name: layer.get_base_layer() for name, layer in self._attached.items()}
        self.release()
        embeddings = self.network.get_input_embeddings().weight
        for name, layer in layers.items():
            if not _is_linear(layer):
                raise UserError(f"method.targets: {name} is not a linear layer: leave it out")
            if layer.weight is embeddings:
                raise UserError(
                    f"method.targets: {name} shares its weight with the input embeddings, which an "
                    "adapter would change too: leave it out"
                )
        return {
            module: (pair.B.shape[0], pair.A.shape[1]) for module, pair in adapter_pairs(parameters)
        }


def _plain_config(factors: Mapping[str, Tensor]) -> peft.LoraConfig:
    """peft's configuration of an adapter of one rank, whose scale is in its factors."""
    pairs = dict(adapter_pairs(factors))
    rank = next(iter(pairs.values())).rank
    return peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(pairs), init_lora_weights=False
    )


def _insert_core(layer: Any) -> None:
    """Let an adapter's B follow an r×r matrix, as whose projection peft's forward pass calls it."""
    B = layer.lora_B[_TRAINED]
    options = {"device": B.weight.device, "dtype": B.weight.dtype}
    core = torch.nn.Linear(B.in_features, B.in_features, bias=False, **options)
    layer.lora_B[_TRAINED] = torch.nn.Sequential(core, B)


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, torch.nn.Linear) or _is_transposed(layer)


def _is_transposed(layer: Any) -> bool:
    """Whether this is GPT-2's kind of linear layer, which keeps its weight transposed."""
    return isinstance(layer, transformers.pytorch_utils.Conv1D)


def max_positions(network: Any) -> int:
    """Number of tokens that the network was made for; `sys.maxsize` where it does not say."""
    config = network.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # the latter is MPT's
    return next(filter(None, (getattr(config, name, None) for name in names)), sys.maxsize)
