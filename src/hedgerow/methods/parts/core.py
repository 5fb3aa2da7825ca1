"""A core between fixed bases: ΔW = s·B·R·A, of which the r×r matrix R alone is trained.

The bases are LoRA-XS's (Bałazy et al., arXiv 2405.17604): the leading singular vectors of W, which
everybody has without a word. They are made in float64, on the CPU and with fixed signs: machines
differ in the last bits, unless two singular values of a weight are so close that their vectors are
hardly defined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hedgerow import lowrank
from hedgerow.adapter_layers import TRAINED, AdapterLayers
from hedgerow.adapters import adapter_tensors
from hedgerow.errors import UserError
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.methods.factors import factor_kinds
from hedgerow.wire import Kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.lazy import peft
    from hedgerow.methods.lora import LoraOptions
    from hedgerow.model import Model


class CoreLayers(AdapterLayers):
    """LoRA's layers with an r×r matrix between A and B, under `lora_R.weight`."""

    name: ClassVar[str] = "core"
    adapts_experts: ClassVar[bool] = False

    def around(
        self,
        layer: Any,
        config: peft.LoraConfig,
        beside: peft.LoraConfig | None = None,
        parameter: str | None = None,
    ) -> Any:
        """Wrap a linear layer, and let B follow R, as whose projection peft's forward calls it."""
        wrapper = super().around(layer, config, beside, parameter)
        B = wrapper.lora_B[TRAINED]
        options = {"device": B.weight.device, "dtype": B.weight.dtype}
        core = torch.nn.Linear(B.in_features, B.in_features, bias=False, **options)
        wrapper.lora_B[TRAINED] = torch.nn.Sequential(core, B)
        return wrapper

    def factors(self, layer: Any, adapter: str) -> dict[str, Any]:
        """A, B, and R between them."""
        parts = super().factors(layer, adapter)
        parts["lora_R"], parts["lora_B"] = parts["lora_B"]
        return parts


def check_ranks(shapes: Mapping[str, Sequence[int]], rank: int) -> None:
    """Raise a `UserError` unless every matrix has so many singular vectors.

    Args:
        shapes: (m, n) of the adapted matrices, by module.
        rank: the largest of a client.
    """
    module, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        raise UserError(
            f"method.ranks: {module} has {min(shape)} singular vectors, not {rank}: give a lower "
            "rank, or other targets"
        )


def attach(
    model: Model, options: LoraOptions, rank: int, modules: Iterable[str]
) -> dict[str, nn.Parameter]:
    """Attach the global core between frozen bases; before the first round it is zero.

    Args:
        model: the base, whose `factors` hold the cores, with their scale in them.
        options: of the adapter.
        rank: the client's.
        modules: names of the adapted matrices.

    Returns:
        The cores, which alone are trained, by PEFT's key names.
    """
    # The bases: W's leading right and left singular vectors.
    fixed = adapter_tensors({m: model.singular_vectors(m, rank) for m in modules})
    parameters = model.attach(options.config(rank), layers=CoreLayers())
    held = model.factors or {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in fixed:
                parameter.requires_grad_(False).copy_(fixed[name])
            elif name in held:
                parameter.copy_(held[name] / options.scale(rank))
            else:
                parameter.zero_()
    return {name: p for name, p in parameters.items() if name not in fixed}


def with_cores(
    model: Model, cores: Mapping[str, Tensor], modules: Iterable[str]
) -> dict[str, Tensor]:
    """The adapter (A, B·R) that cores stand for, by PEFT's key names, and the cores beside it."""
    own = dict(cores)
    pairs = {}
    for module in modules:
        core = own[core_name(module)]
        A, B = model.singular_vectors(module, len(core))
        pairs[module] = Factors(A, B @ core)
    return adapter_tensors(pairs) | own


def core_kinds(modules: Iterable[str], rank: int) -> dict[str, Kind]:
    """Kinds of the cores of these modules."""
    return {core_name(module): Kind(torch.float32, (rank, rank)) for module in modules}


def zeros(modules: Iterable[str], rank: int) -> dict[str, Tensor]:
    """Cores that change nothing, as all clients begin with."""
    return {core_name(module): torch.zeros(rank, rank) for module in modules}


def core_name(module: str) -> str:
    """PEFT's key name of a module's A, with R for A."""
    return next(iter(factor_kinds({module: (1, 1)}, 1))).replace(".lora_A.", ".lora_R.")


def product_error(cores: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """How far cores are from others, relative to these, as B·R·A: the bases keep lengths."""
    pairs = []
    for name, core in exact.items():
        basis = torch.eye(len(core))
        pairs.append((Factors(cores[name], basis), Factors(core, basis)))
    return lowrank.relative_error(pairs)
