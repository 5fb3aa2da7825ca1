"""Targets of adapters: which matrices of a network an adapter changes, and which it leaves out.

Two kinds can be adapted: linear layers, and experts, which transformers keep as parameters of three
dimensions, a matrix for each expert. Each expert's matrix is adapted by itself, under the name of
the parameter and the expert's number, as `model.layers.0.mlp.experts.down_proj.3`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hedgerow import bounded, quantized
from hedgerow.errors import UserError, brief, did_you_mean
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
            names, or of the ends of names, also as one text with commas; or a regular expression
            for whole names.
        experts: whether experts can be adapted.

    Raises:
        UserError: a name, or the expression, matches nothing that can be adapted, or some experts
            of a parameter and not all.
    """
    wanted = _read(wanted)
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
    else:
        sentences += _said_of_fused(chosen, stacked)
    if not modules and not parameters:
        raise UserError(
            f"method.targets: nothing of {type(network).__name__} is left to adapt: "
            + "; ".join(sentences or [_what_there_is(linear, stacked)])
        )
    shown = wanted if isinstance(wanted, str) else ", ".join(wanted)
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


def _read(wanted: str | Collection[str]) -> str | list[str]:
    """The targets as they are meant: `all-linear`, an expression, or names, in ascending order."""
    if isinstance(wanted, str):
        # Neither names nor expressions for them have spaces; and brackets are those of a list.
        names = r"[\w.,\s-]*"
        text = wanted.strip()
        if not re.fullmatch(rf"{names}|\[{names}\]", text):
            return text
        wanted = [text.strip("[]")]
    found = sorted({name for text in wanted for name in re.split(r"[\s,]+", text) if name})
    if any(name.lower() == ALL_LINEAR for name in found):
        if len(found) > 1:
            raise UserError(
                f"method.targets: `{ALL_LINEAR}` stands alone, not in a list with others: write it "
                "without them, or name all"
            )
        return ALL_LINEAR
    return found


def _matching(network: Any, wanted: str | list[str], known: Sequence[str]) -> list[str]:
    """The names among `known` that `wanted` means, in their order."""
    if isinstance(wanted, str):
        return _matching_expression(wanted, known)
    by_end: dict[str, list[str]] = {}
    for name in known:
        for end in _ends(name):
            by_end.setdefault(end, []).append(name)
    chosen: set[str] = set()
    of_experts: dict[str, set[int]] = {}
    unknown = []
    for name in wanted:
        owner, _, number = name.rpartition(".")
        if name in by_end:
            chosen.update(by_end[name])
        elif number.isdecimal() and owner in by_end:
            for parameter in by_end[owner]:
                of_experts.setdefault(parameter, set()).add(int(number))
        else:
            unknown.append(name)
    stacked = expert_parameters(network)
    for parameter, numbers in of_experts.items():
        if parameter not in stacked:
            unknown.append(f"{parameter}.{min(numbers)}")
        elif parameter not in chosen and numbers != (
            every := set(range(len(network.get_parameter(parameter))))
        ):
            raise UserError(
                f"method.targets: {parameter} holds {len(every)} experts, which are adapted all or "
                f"not at all: name {parameter} without a number"
            )
    if unknown:
        raise _unknown(network, unknown, known)
    chosen.update(of_experts)
    return [name for name in known if name in chosen]


def _matching_expression(wanted: str, known: Sequence[str]) -> list[str]:
    """The names that an expression matches as a whole.

    It may be a stranger's, who has written the experiment.
    """
    longer = f".*({wanted})"
    if found := _matched(wanted, known):
        return found
    if _matched(longer, known):
        advice = f"write {longer!r}, which matches their ends"
    else:
        advice = "write a list of names or of their ends, as [q_proj, v_proj]"
    raise UserError(
        f"method.targets: the expression {wanted!r} matches no whole name of what can be adapted, "
        f"as {known[0]} is one: {advice}"
    )


def _matched(expression: str, known: Sequence[str]) -> list[str]:
    instead = f"write a list of names, as [q_proj, v_proj], or `{ALL_LINEAR}`"
    try:
        [matches] = bounded.matches([expression], known, how="fullmatch")
    except bounded.Exceeded as error:
        raise UserError(f"method.targets: {brief(expression)} {error}: {instead}") from None
    if isinstance(matches, bounded.Failure):
        raise UserError(
            f"method.targets: {brief(expression)} is no regular expression ({matches}): {instead}"
        )
    return [name for name, is_one in zip(known, matches, strict=True) if is_one]


def _ends(name: str) -> Iterator[str]:
    """A name, and what is left of it without its first part, its first two …"""
    while name:
        yield name
        name = name.partition(".")[2]


def _unknown(network: Any, names: Sequence[str], known: Sequence[str]) -> UserError:
    ends = sorted({one.rpartition(".")[2] for one in known})
    for name in names:
        if re.search(r"[^\w.-]", name):
            return UserError(
                f"method.targets: {name!r} in a list is no name: write a regular expression by "
                "itself, without a list"
            )
        modules = [n for n, _ in network.named_modules() if n == name or n.endswith(f".{name}")]
        if modules:
            kind = type(network.get_submodule(modules[0])).__name__
            return UserError(
                f"method.targets: {modules[0]} is not a linear layer ({kind}): leave it out, or "
                f"name one of {', '.join(ends)}"
            )
    shown = " and ".join(f"{name!r}{_near(name, known)}" for name in names)
    stacked = sorted({one.rpartition(".")[2] for one in expert_parameters(network)})
    experts = f" (those of its experts are {', '.join(stacked)})" if stacked else ""
    return UserError(
        f"method.targets: {type(network).__name__} has no {shown} that an adapter could change: "
        f"name some of {', '.join(ends)}{experts}, or write `{ALL_LINEAR}`"
    )


def _near(name: str, known: Sequence[str]) -> str:
    """The name among `known`, or the end of one, that may have been meant, in brackets."""
    typed = name.lower().removesuffix(".weight")
    alike = {
        end
        for one in known
        for end in _ends(one)
        if end.count(".") == typed.count(".") and not end[0].isdecimal()
    }
    last = typed.rpartition(".")[2]
    near = did_you_mean(typed, sorted(alike | {ALL_LINEAR}))
    near = near or did_you_mean(last, sorted({one.rpartition(".")[2] for one in known}))
    return f" ({near.removeprefix(', ')})" if near else ""


def _said_of_fused(chosen: Sequence[str], stacked: Mapping[str, Any]) -> list[str]:
    """Sentences on experts that are not named, of whose matrices a part goes by a name that is.

    As `gate_proj` names a layer, and of experts is a part of `gate_up_proj`.
    """
    ends = {name.rpartition(".")[2] for name in chosen}
    sentences = []
    for whole in sorted({name.rpartition(".")[2] for name in stacked} - ends):
        words = set(whole.split("_"))
        parts = sorted(end for end in ends if len(end.split("_")) > 1 and words > {*end.split("_")})
        if parts:
            names = [name for name in stacked if name.rpartition(".")[2] == whole]
            keep = f"experts, which keep their {' and '.join(parts)} in it: name {whole}, too"
            sentences += _said(names, keep)
    return sentences


def _what_there_is(linear: Mapping[str, Any], stacked: Mapping[str, Any]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in [*linear, *stacked]})
    return f"its linear layers are {', '.join(ends)}" if ends else "it has no linear layers"


def _reached(network: Any, linear: Mapping[str, Any], stacked: Mapping[str, Any]) -> set[str]:
    """Names of what a text passes through: what is never called can learn nothing.

    Some layers' weights are read by others, maybe in training alone, some belong to images, and
    some give more than a tensor, to which a product could be added.
    """
    called: set[str] = set()

    def hook(names: Sequence[str], features: int | None) -> Any:
        def call(_: Any, __: Any, output: Any) -> None:
            fits = isinstance(output, torch.Tensor) and output.shape[-1] == features
            if features is None or fits:
                called.update(names)

        return call

    owners: dict[str, list[str]] = {}
    for name in stacked:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    hooks: list[tuple[Any, list[str], int | None]]
    hooks = [(layer, [name], _shape(layer)[0]) for name, layer in linear.items()]
    hooks += [(network.get_submodule(owner), names, None) for owner, names in owners.items()]
    handles = [layer.register_forward_hook(hook(names, m)) for layer, names, m in hooks]
    input_ids = torch.tensor([[0, 1, 2, 1]], device=network.device)
    try:
        with torch.no_grad():
            network(input_ids=input_ids, use_cache=False)
            reached = set(called)
            called.clear()
            with _training(network):
                network(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    # A router has sent the text to some of a layer's experts, and could have to the others.
    beside = {_beside(name) for name in reached & called}
    return (reached & called) | {name for name in linear if _beside(name) in beside}


@contextmanager
def _training(network: Any) -> Iterator[None]:
    """The network's layers as they are in training, until the block ends.

    Whatever goes through a list of layers is left as it is: it may skip some of these at random.
    """
    before = {module: module.training for module in network.modules()}
    devices = [network.device] if network.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # dropout draws from the global generator
        try:
            for module in before:
                lists = (torch.nn.ModuleList, torch.nn.ModuleDict)
                module.training = not any(isinstance(part, lists) for part in module.children())
            yield
        finally:
            for module, training in before.items():
                module.training = training


def _beside(name: str) -> str:
    """The name without the last of its numbers, where that of its layer is another."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    if len(numbers) > 1:
        parts[numbers[-1]] = "*"
    return ".".join(parts)


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
    if quantized.is_quantized(layer):
        return layer.out_features, layer.in_features
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
    """Whether peft adapts a layer of this name in this architecture.

    It refuses the last layer of some architectures' state space mixers, whose kernels read its
    weight themselves in training, and knows not all of them.
    """
    owner = network.get_submodule(name.rpartition(".")[0])
    if name.endswith(".out_proj") and hasattr(owner, "A_log") and hasattr(owner, "chunk_size"):
        return False
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
