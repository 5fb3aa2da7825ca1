"""Targets of adapters: which matrices of a network an adapter changes, and which it leaves out.

Two kinds can be adapted: linear layers, and experts, which transformers keep as parameters of three
dimensions, a matrix for each expert. Each expert's matrix is adapted by itself, under the name of
the parameter and the expert's number, as `model.layers.0.mlp.experts.down_proj.3`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hedgerow.errors import UserError, did_you_mean
from hedgerow.lazy import peft, torch, transformers

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targets:
    """What an adapter changes, in the network's order."""

    modules: Sequence[str]
    """Names of linear layers."""
    parameters: Sequence[str]
    """Names of parameters that hold a matrix for each expert."""
    left_out: Sequence[str]
    """Sentences on what was asked for, or looks like a matrix, and is not adapted."""


def find(network: Any, wanted: str | Collection[str], *, experts: bool = True) -> Targets:
    """What an adapter with these targets changes.

    Args:
        network: a causal language model of transformers, without adapters.
        wanted: `all-linear` (every linear layer but the output layer, and all experts); a list of
            names, or of the ends of names; or a regular expression for whole names.
        experts: whether experts can be adapted.

    Raises:
        UserError: a name, or the expression, matches nothing that can be adapted.
    """
    linear, stacked = linear_layers(network), expert_parameters(network)
    output = network.get_output_embeddings()
    if wanted == ALL_LINEAR:
        chosen = [name for name, layer in linear.items() if layer is not output]
        chosen += stacked
    else:
        chosen = _matching(network, wanted, [*linear, *stacked])
    reached = _reached(network, linear, stacked)
    refused = [name for name in chosen if name in linear and not _fits_peft(network, name)]
    unread = [name for name in chosen if name not in reached and name not in refused]
    frozen = [] if experts else [name for name in chosen if name in stacked]
    apart = {*refused, *unread, *frozen}
    modules = [name for name in chosen if name in linear and name not in apart]
    parameters = [name for name in chosen if name in stacked and name not in apart]
    sentences = [
        *_said(unread, "which a text does not pass through as through a linear layer"),
        *_said(refused, "which LoRA cannot adapt in this architecture"),
        *_said(frozen, "experts, which this method cannot adapt"),
    ]
    if wanted == ALL_LINEAR:
        sentences += _said(_other_matrices(network, linear, stacked), "no linear layers")
    if not modules and not parameters:
        raise UserError(
            f"method.targets: nothing of {type(network).__name__} is left to adapt: "
            + "; ".join(sentences or [_what_there_is(linear, stacked)])
        )
    shown = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted))
    return Targets(modules, parameters, [f"targets {shown}: {said}" for said in sentences])


def linear_layers(network: Any) -> dict[str, nn.Module]:
    """The linear layers of a network, the output layer too, by name."""
    return {name: module for name, module in network.named_modules() if is_linear(module)}


def is_linear(layer: Any) -> bool:
    """Whether this is a linear layer, of torch or of GPT-2's kind."""
    return isinstance(layer, torch.nn.Linear) or is_transposed(layer)


def is_transposed(layer: Any) -> bool:
    """Whether this is GPT-2's kind of linear layer, which keeps its weight transposed."""
    return isinstance(layer, transformers.pytorch_utils.Conv1D)


def expert_parameters(network: Any) -> dict[str, bool]:
    """Parameters that hold a matrix for each expert, and whether they keep it transposed, (n, m).

    Such a parameter has the shape (experts, m, n), or (experts, n, m), and its module or the
    module's class is named after experts. Gates of recurrent layers have three dimensions too, but
    a module with a state, which a wrapper would hide.
    """
    return {
        f"{name}.{parameter}": bool(getattr(module, "is_transposed", False))
        for name, module in network.named_modules()
        if "expert" in f"{name}.{type(module).__name__}".lower()
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and weight.is_floating_point()
    }


def _matching(network: Any, wanted: str | Collection[str], known: Sequence[str]) -> list[str]:
    """The names among `known` that `wanted` means, in their order."""
    if isinstance(wanted, str) and not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", wanted):
        try:
            found = [name for name in known if re.fullmatch(wanted, name)]
        except re.error as error:
            raise UserError(
                f"method.targets: {wanted!r} is no regular expression ({error}): write a list of "
                f"names, as [q_proj, v_proj], or `{ALL_LINEAR}`"
            ) from None
        if not found:
            raise UserError(
                f"method.targets: the expression {wanted!r} matches no whole name of what can be "
                f"adapted, as {known[0]} is one"
            )
        return found
    names = re.split(r"\s*,\s*", wanted) if isinstance(wanted, str) else sorted(wanted)
    chosen: set[str] = set()
    for name in names:
        # The name of one expert's matrix means all of its parameter.
        owner = name.rpartition(".")[0] if name.rpartition(".")[2].isdecimal() else name
        found = [k for k in known if k in (name, owner) or k.endswith(f".{name}")]
        if not found:
            raise _unknown(network, name, known)
        chosen.update(found)
    return [name for name in known if name in chosen]


def _unknown(network: Any, name: str, known: Sequence[str]) -> UserError:
    ends = sorted({other.rpartition(".")[2] for other in known})
    other = [n for n, _ in network.named_modules() if n == name or n.endswith(f".{name}")]
    if other:
        kind = type(network.get_submodule(other[0])).__name__
        return UserError(
            f"method.targets: {other[0]} is not a linear layer ({kind}): leave it out, or name "
            f"one of {', '.join(ends)}"
        )
    return UserError(
        f"method.targets: {type(network).__name__} has no {name!r} that an adapter could change"
        f"{did_you_mean(name, ends)}: name some of {', '.join(ends)}, or write `{ALL_LINEAR}`"
    )


def _what_there_is(linear: Mapping[str, Any], stacked: Mapping[str, Any]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in [*linear, *stacked]})
    return f"its linear layers are {', '.join(ends)}" if ends else "it has no linear layers"


def _reached(network: Any, linear: Mapping[str, Any], stacked: Mapping[str, Any]) -> set[str]:
    """Names of what a text passes through: what is never called can learn nothing.

    Some layers' weights are read by others, some belong to images, and some give more than a
    tensor, to which a product could be added.
    """
    reached: set[str] = set()

    def hook(names: Sequence[str], features: int | None) -> Any:
        def called(_: Any, __: Any, output: Any) -> None:
            fits = isinstance(output, torch.Tensor) and output.shape[-1] == features
            if features is None or fits:
                reached.update(names)

        return called

    owners: dict[str, list[str]] = {}
    for name in stacked:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    hooks: list[tuple[Any, list[str], int | None]]
    hooks = [(layer, [name], _shape(layer)[0]) for name, layer in linear.items()]
    hooks += [(network.get_submodule(owner), names, None) for owner, names in owners.items()]
    handles = [layer.register_forward_hook(hook(names, m)) for layer, names, m in hooks]
    try:
        input_ids = torch.tensor([[0, 1, 2, 1]], device=network.device)
        with torch.no_grad():
            network(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def matrix_shapes(network: Any, targets: Targets) -> dict[str, tuple[int, int]]:
    """Shape (m, n) of each matrix that is adapted, by name, one for each expert."""
    shapes = {name: _shape(network.get_submodule(name)) for name in targets.modules}
    transposed = expert_parameters(network)
    for name in targets.parameters:
        count, m, n = network.get_parameter(name).shape
        shape = (n, m) if transposed[name] else (m, n)
        shapes |= {f"{name}.{expert}": shape for expert in range(count)}
    return shapes


def _shape(layer: Any) -> tuple[int, int]:
    """Shape (m, n) of a linear layer's matrix."""
    first, second = layer.weight.shape
    return (second, first) if is_transposed(layer) else (first, second)


def _other_matrices(
    network: Any, linear: Mapping[str, Any], stacked: Mapping[str, Any]
) -> Iterator[str]:
    """Weights of two dimensions and more that are neither linear layers nor embeddings."""
    known = {f"{name}.weight" for name in linear} | set(stacked)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for parameter, weight in module.named_parameters(recurse=False):
            full = f"{name}.{parameter}"
            is_matrix = weight.ndim > 1 and weight.numel() > max(weight.shape)
            if is_matrix and full not in known and not re.search("bias|norm", full.lower()):
                yield full


def _fits_peft(network: Any, name: str) -> bool:
    """Whether peft adapts a layer of this name in this architecture."""
    config = peft.LoraConfig()
    try:
        peft.tuners.tuners_utils._check_lora_target_modules_mamba(
            config, network, name.rpartition(".")[2]
        )
    except ValueError:
        return False
    return True


def _said(names: Collection[str] | Iterator[str], why: str) -> list[str]:
    """One sentence on all names, those that differ in numbers alone counted together."""
    kinds = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    listed = ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items())
    return [f"left out are {listed}: {why}"] if kinds else []
