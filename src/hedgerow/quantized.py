"""Linear layers whose weights are quantized to 4 or 8 bits, and what is learnt beside them.

The weights are bitsandbytes': `nf4` and `fp4` with a scale for each 64 of them (Dettmers et al.,
"QLoRA", arXiv 2305.14314), `int8` with one for each row (Dettmers et al., "LLM.int8()",
arXiv 2208.07339). Only weights are rounded: outputs are W·x in the numbers that a model computes
with, so that the weights, dequantized, are the same function.

    W·x + B·(A·x)       W as it was loaded; B·A the sum of all that was learnt, in float32
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from hedgerow import lowrank
from hedgerow.lazy import bitsandbytes, torch, transformers
from hedgerow.lowrank import Factors
from hedgerow.optional import check_installed

if TYPE_CHECKING:
    from torch import Tensor

Quantization = Literal["nf4", "fp4", "int8"]
"""Number types of quantized weights."""

_KINDS = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}
"""bitsandbytes' classes of layers, by name, as it is imported only where there are some."""


def check_library(kind: Quantization) -> None:
    """Raise a `UserError` where the library that quantizes to such numbers is missing."""
    check_installed(f"model.quantization: {kind}", "bitsandbytes")


def configuration(kind: Quantization, dtype: str) -> transformers.BitsAndBytesConfig:
    """transformers' configuration that quantizes a checkpoint while it is loaded.

    Args:
        kind: number type of the weights.
        dtype: name of the number type that is computed with.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    check_library(kind)
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def quantize_hollow(network: Any, kind: Quantization, dtype: str) -> None:
    """Give a network without values the quantized layers that it would be loaded with.

    Args:
        network: on the meta device, in the number type that is computed with.
        kind: number type of the weights.
        dtype: name of the number type that is computed with.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    quantizer = transformers.quantizers.AutoHfQuantizer.from_config(
        configuration(kind, dtype), pre_quantized=False
    )
    quantizer.preprocess_model(model=network, device_map={"": "cpu"})
    for _, layer in layers(network):
        shape = layer.weight.shape
        if _bits_of(layer) == "8bit":
            layer.weight = bitsandbytes.nn.Int8Params(
                torch.empty(shape, dtype=torch.int8, device="meta"),
                requires_grad=False,
                SCB=torch.empty(shape[0], device="meta"),
            )
            continue
        blocks = -(-shape.numel() // _BLOCK)
        state = bitsandbytes.functional.QuantState(
            absmax=torch.empty(blocks, device="meta"),
            shape=shape,
            code=torch.empty(16, device="meta"),
            blocksize=_BLOCK,
            quant_type=kind,
            dtype=getattr(torch, dtype),
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8, device="meta"),
            quant_state=state,
            quant_type=kind,
            bnb_quantized=True,
        )


_BLOCK = 64
"""Number of 4-bit weights that have one scale."""


def scales_of(layer: Any) -> Tensor:
    """Scales of a quantized layer's weight."""
    if _bits_of(layer) == "8bit":
        found: Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return found
    return layer.weight.quant_state.absmax  # type: ignore[no-any-return]


def layers(network: Any) -> Iterator[tuple[str, Any]]:
    """The quantized layers of a network, by name."""
    for name, module in network.named_modules():
        if is_quantized(module):
            yield name, module


def leave_file(network: Any) -> None:
    """Have a network with quantized layers hold what else it has itself, and not in its file.

    The file, all of whose weights were read to be quantized, would stay in memory with it.
    """
    if kind_of(network) is not None:
        ours = {id(layer.weight) for _, layer in layers(network)}
        for tensor in [*network.parameters(), *network.buffers()]:
            if id(tensor) not in ours:
                tensor.data = tensor.data.clone()


def is_quantized(layer: Any) -> bool:
    """Whether this is a linear layer of bitsandbytes, whose weight is quantized."""
    return _bits_of(layer) is not None


def _bits_of(layer: Any) -> str | None:
    """`4bit` or `8bit`; None for a layer that is not quantized."""
    kinds = type(layer).__mro__
    own = (kind.__name__ for kind in kinds if kind.__module__.startswith("bitsandbytes."))
    return next((_KINDS[name] for name in own if name in _KINDS), None)


def is_whole(layer: Any) -> bool:
    """Whether a quantized layer has the scales of its weight."""
    scales = {"4bit": "quant_state", "8bit": "SCB"}[_bits_of(layer) or "8bit"]
    return getattr(layer.weight, scales, None) is not None


def peft_options(layer: Any) -> dict[str, bool]:
    """What peft has to be told to wrap a layer, which may be a quantized one."""
    bits = _bits_of(layer)
    return {} if bits is None else {f"loaded_in_{bits}": True}


def kind_of(network: Any) -> Quantization | None:
    """Number type of a network's quantized weights; None where none are."""
    for _, layer in layers(network):
        kind: Quantization = getattr(layer.weight, "quant_type", "int8")
        return kind
    return None


def compute_exactly(network: Any) -> None:
    """Have quantized layers round their weights alone, and not what they compute with these.

    On some CPUs bitsandbytes would evaluate 4-bit layers in bfloat16 whatever is asked for, and it
    rounds the inputs of 8-bit ones, too. Where a row is not made of whole blocks, its CPU kernel
    for AVX-512 takes wrong scales (bitsandbytes 0.50; see `dequantized`).
    """
    for _, layer in layers(network):
        four_bits = _bits_of(layer) == "4bit"
        if four_bits:
            layer.support_avx512bf16_for_cpu = False
        if not four_bits or layer.in_features % layer.weight.quant_state.blocksize:
            layer.forward = functools.partial(_forward, layer)


def _forward(layer: Any, inputs: Tensor) -> Tensor:
    output: Tensor = _product().apply(inputs, layer)
    return output if layer.bias is None else output + layer.bias.to(output.dtype)


@functools.cache
def _product() -> Any:
    """x·Wᵀ of a quantized layer, of which nothing else is kept for the backward pass."""

    # In here, as it could not be defined without importing torch.
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, inputs: Tensor, layer: Any) -> Tensor:
            context.layer = layer
            return inputs @ dequantized(layer).to(inputs.dtype).T

        @staticmethod
        def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
            [gradient] = gradients
            return gradient @ dequantized(context.layer).to(gradient.dtype), None

    return Product


def dequantized(layer: Any) -> Tensor:
    """The weight (m, n) that a quantized layer computes with, in float32."""
    functional, weight = bitsandbytes.functional, layer.weight
    if _bits_of(layer) == "8bit":
        whole: Tensor = functional.int8_vectorwise_dequant(weight.data, scales_of(layer))
        return whole.float()
    # As one row: blocks are of all weights in their order, and go on from row to row, which the
    # CPU kernel for AVX-512 gets wrong where rows are 32 weights longer than so many blocks.
    state = copy.copy(weight.quant_state)
    state.shape = torch.Size((1, weight.quant_state.shape.numel()))
    flat: Tensor = functional.dequantize_4bit(weight.data, state)
    return flat.view(weight.quant_state.shape).float()


def nbytes(network: Any) -> int:
    """Bytes of a network's weights, with the scales of quantized ones."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())


# --- what is learnt -------------------------------------------------------------------------------


class SumBeside:
    """The sum of low-rank changes of a quantized layer's weight, which its outputs have, too."""

    def __init__(self, layer: Any, most: int | None) -> None:
        """Change nothing yet.

        Args:
            layer: the quantized one, itself and not a wrapper of it.
            most: largest rank of the sum; None for the matrix's own, with which nothing is lost.
        """
        self._layer, self.most = layer, most
        self._remove: Callable[[], None] = layer.register_forward_hook(self._add).remove
        self.factors: Factors | None = None
        """The sum, in float32, on the layer's device."""
        self.lost = 0.0
        """Frobenius norm of all that bounding the rank has cut off, at most."""

    def add(self, pair: Factors) -> None:
        """Add B·A to the sum, and cut the sum to the largest rank where it has become larger."""
        # On the CPU whatever the layer's device: a GPU's SVD is another algorithm.
        parts = [pair] if self.factors is None else [self.factors, pair]
        whole = lowrank.stack([Factors(*(each.cpu().float() for each in part)) for part in parts])
        if self.most is None or whole.rank <= self.most:
            whole = lowrank.fitted(whole)
        else:
            found = lowrank.svd(whole)
            whole = found.factors(self.most).float()
            # The norm of a sum is at most the sum of norms.
            self.lost += float(torch.linalg.vector_norm(found.values[self.most :]))
        self.factors = Factors(*(each.to(self._layer.weight.device) for each in whole))

    def remove(self) -> None:
        """Take the sum off the layer."""
        self._remove()

    def _add(self, _: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.factors is None:
            return output
        A, B = self.factors
        return output + ((inputs[0].to(A.dtype) @ A.T) @ B.T).to(output.dtype)


def replace_by_float(network: Any, name: str, change: Factors | None) -> None:
    """Put a plain layer in float32 in a quantized one's place, with a change added to its weight.

    Args:
        name: of the layer in the network.
        change: what is beside it; None for nothing.
    """
    layer = network.get_submodule(name)
    weight = dequantized(layer)
    if change is not None:
        weight = weight + change.product()
    bias = layer.bias
    m, n = weight.shape
    # GPT-2's kind of linear layer keeps its weight transposed, and bitsandbytes' does not.
    source: type[Any] = getattr(layer, "source_cls", torch.nn.Linear)
    if issubclass(source, transformers.pytorch_utils.Conv1D):
        with torch.device("meta"):
            plain = transformers.pytorch_utils.Conv1D(m, n)
        weight = weight.T.contiguous()
    else:
        plain = torch.nn.Linear(n, m, bias=bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = torch.nn.Parameter(bias.detach().float(), requires_grad=False)
    network.set_submodule(name, plain.train(layer.training))


def forget(network: Any) -> None:
    """Have a network, none of whose layers is quantized any more, not say that some are."""
    network.hf_quantizer = None
    flags = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")
    for flag in flags:
        if hasattr(network, flag):
            delattr(network, flag)
    for config in (network.config, network.config.get_text_config()):
        for key in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, key):
                delattr(config, key)
        config.dtype = torch.float32
