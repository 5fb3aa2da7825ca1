"""Adapters of an earlier fine-tune as base models: a PEFT folder, and the model that it is for.

A run on such a base starts from the model with the adapter merged into it. What the run learns can
be handed on as one adapter of the model below, which then holds both.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hedgerow import bounded
from hedgerow.adapters import PREFIX, adapter_pairs, embedding_pairs
from hedgerow.errors import UserError, brief, reason_of
from hedgerow.lazy import peft, safetensors, torch, transformers
from hedgerow.lowrank import Factors, stack

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter as peft writes them."""
    return (folder / _CONFIG).is_file()


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter's folder has a tokenizer of its own, or some of one."""
    return any((folder / name).is_file() for name in (*VOCABULARIES, "tokenizer_config.json"))


VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files that hold a tokenizer's tokens."""


def config_of(folder: Path) -> Any:
    """peft's configuration of the adapter in a folder.

    Raises:
        UserError: it cannot be read, or asks for what peft does not know.
    """
    where = f"model.path: {folder / _CONFIG}"
    try:
        content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({reason_of(error)}): copy the adapter's folder again"
        ) from None
    kind = content.get("peft_type") if isinstance(content, dict) else None
    version = f"peft {peft.__version__}"
    if kind is None:
        raise UserError(f"{where} is of no adapter of peft: it does not say its `peft_type`")
    if not isinstance(kind, str) or kind not in list(peft.PeftType):
        raise UserError(
            f"{where} is of an adapter of the kind {kind}, which {version} does not know: update "
            "peft, or merge the adapter where it was made and give the whole model"
        )
    if content.get("megatron_config"):  # by which peft would import a module that a file names
        raise UserError(f"{where} has `megatron_config`: give an adapter of a transformers model")
    known = _fields(kind)
    new = {key for key, value in content.items() if key not in known and value and key != _RUNTIME}
    if new:
        raise UserError(
            f"{where} asks for {', '.join(f'`{key}`' for key in sorted(new))}, which {version} "
            "does not know: update peft, or merge the adapter where it was made and give the whole "
            "model"
        )
    for key in (_BASE, "revision"):
        if not isinstance(content.get(key), str | None):
            raise UserError(f"{where} has `{key}: {brief(content[key])}`, which is no text")
    try:
        return peft.PeftConfig.from_peft_type(**{k: v for k, v in content.items() if k in known})
    except Exception as error:  # each kind of adapter checks its values as it likes
        raise UserError(f"{where} is not read by {version}: {reason_of(error)}") from None


_BASE = "base_model_name_or_path"
_RUNTIME = "runtime_config"
"""What peft says about the process that wrote a file, and does not read."""


def _fields(kind: str) -> set[str]:
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    return set(config.__dataclass_fields__) - {_RUNTIME}


def base_of(folder: Path) -> str:
    """Folder, or name on the Hub, of the model that the adapter in a folder is for.

    A relative path is looked for in the working directory, as peft does, then in the adapter's
    folder.

    Raises:
        UserError: the adapter does not name a model, or names one that is not there or an adapter.
    """
    named = config_of(folder).base_model_name_or_path
    where = f"model.path: {folder} is an adapter"
    mend = f"set `base_model_name_or_path` in its {_CONFIG} to the model's folder"
    if not named:
        raise UserError(f"{where} that does not name the model it is for: {mend}")
    places = [Path(named).expanduser(), folder / named]
    found = next((place.absolute() for place in places if place.is_dir()), None)
    if found is None:
        if Path(named).is_absolute() or named.startswith((".", "~")) or named.count("/") > 1:
            raise UserError(f"{where} of {named}, which is not there: {mend}")
        return str(named)
    if is_adapter(found):
        raise UserError(
            f"{where} of {found}, which is itself an adapter: merge that one into its own base "
            f"first (merge_and_unload() of peft), save the whole model, and {mend}"
        )
    return str(found)


@dataclass(frozen=True, eq=False)
class BaseAdapter:
    """What an adapter adds to the model that it is for; its weights stay in its folder."""

    folder: Path
    base: str
    """Folder, or name on the Hub, of that model."""
    revision: str | None
    """Revision of that model on the Hub."""
    scales: Mapping[str, float]
    """Scale of each adapted module's factors, s in s·B·A."""
    options: Mapping[str, Any]
    """As `Joined` has them."""
    parameters: Mapping[str, tuple[str, int]]
    """Where factors are of a parameter: its name, and the number of its experts, 0 of a matrix."""
    repeated: frozenset[str]
    """Tensors that are in its file once more under another name, which peft does not read."""
    obstacle: str | None
    """Why no other adapter can be put beside it, as `it has use_dora`; None where one can."""

    def joined(self, learnt: Mapping[str, Factors]) -> Joined:
        """This adapter and the factors that were learnt on top of it, as one of the model below.

        Nothing is lost: of a module that both adapt, the ranks add up; what was learnt of a module
        whose weight the adapter replaces is added to that weight.

        Raises:
            UserError: there is an obstacle.
        """
        if self.obstacle is not None:
            raise UserError(
                f"the run's base, {self.folder}, is an adapter that no other can be added to, "
                f"since {self.obstacle}: export the whole model with --to merged"
            )
        with _opened(self.folder) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own = dict(adapter_pairs(tensors))
        embeddings = dict(embedding_pairs(tensors))
        factors = {id(factor) for pair in (*own.values(), *embeddings.values()) for factor in pair}
        saved = {
            name: tensor
            for name, tensor in tensors.items()
            if id(tensor) not in factors and name not in self.repeated
        }
        pairs = {
            matrix: part
            for module, pair in own.items()
            for matrix, part in self._matrices(module, self._scaled(module, pair))
        }
        for module, pair in learnt.items():
            if (name := f"{PREFIX}{module}.weight") in saved:
                saved[name] = (saved[name].float() + pair.product()).to(saved[name].dtype)
            elif module in pairs:
                pairs[module] = stack([pairs[module].float(), pair.float()])
            else:
                pairs[module] = pair
        scaled = {module: self._scaled(module, pair) for module, pair in embeddings.items()}
        return Joined(pairs, scaled, saved, self.options)

    def _matrices(self, module: str, pair: Factors) -> Iterator[tuple[str, Factors]]:
        """The factors of a module, or those of each expert of a parameter, by name."""
        name, number = self.parameters.get(module, (module, 0))
        if not number:
            yield name, pair
            return
        rows = pair.A.chunk(number)
        columns = pair.B.reshape(len(pair.B), -1, number).unbind(-1)
        for expert, (A, B) in enumerate(zip(rows, columns, strict=True)):
            yield f"{name}.{expert}", Factors(A, B)

    def _scaled(self, module: str, pair: Factors) -> Factors:
        pair = pair.float()
        return pair._replace(B=pair.B * self.scales[module])


@dataclass(frozen=True, eq=False)
class Joined:
    """An adapter, with its scale in its factors."""

    pairs: Mapping[str, Factors]
    """Factors of linear layers, by module."""
    embeddings: Mapping[str, Factors] = field(default_factory=dict)
    """Factors of embeddings, by module; the product has a column for each token."""
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights in place of the model's own, by PEFT's key names."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What adapter_config.json has to say for peft to find those."""

    def each(self, change: Callable[[Factors], Factors]) -> Joined:
        """The same with `change` applied to all factors."""
        return replace(
            self,
            pairs={module: change(pair) for module, pair in self.pairs.items()},
            embeddings={module: change(pair) for module, pair in self.embeddings.items()},
        )


# --- an adapter in its base -----------------------------------------------------------------------


def merged(folder: Path, network: Any, base: str) -> tuple[Any, BaseAdapter]:
    """The network with the adapter in a folder merged into its weights, and what that is.

    Its embeddings get as many rows as they had when the adapter was trained.

    Args:
        base: folder of the network, or its name on the Hub.

    Raises:
        UserError: the adapter does not fit the network, or is no change of its weights.
    """
    where = f"model.path: {folder}"
    config = config_of(folder)
    _check_kind(config, folder)
    if not (folder / _WEIGHTS).is_file():
        raise UserError(
            f"{where} has no {_WEIGHTS}: save the adapter in that format, since others are pickles"
        )
    shapes = _shapes(folder)
    _check_ranks(config, shapes, f"model.path: {folder / _CONFIG}")
    _check_expressions(config, network, f"model.path: {folder / _CONFIG}")
    dtypes = {name: weight.dtype for name, weight in network.state_dict().items()}
    try:
        # peft draws what it is about to read, and warns of what is checked here.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _resize(network, config, shapes)
            config.inference_mode = True
            adapted = peft.PeftModel(network, config).eval()
            names = getattr(network, "_checkpoint_conversion_mapping", {})
            read = adapted.load_adapter(
                str(folder), "default", torch_device="cpu", key_mapping=names
            )
            repeated = _repeated(folder, read.unexpected_keys)
            _check_read(read.missing_keys, set(read.unexpected_keys) - repeated, where)
            below = _describe(folder, base, config, adapted, shapes, repeated)
            _untie(network)
            before = _probe(network)
            result = adapted.merge_and_unload()
            _check_rows(result, where)
            if not _alike(_probe(result), before, result.dtype):
                raise UserError(
                    f"{where} is an adapter that computes something else once it is merged into "
                    "its base, as a run needs it: give one that is plain LoRA"
                )
    except UserError:
        raise
    except Exception as error:  # each kind of adapter checks its values as it likes
        raise UserError(
            f"{where} cannot be merged into {base} ({reason_of(error)}): check that the adapter is "
            f"whole, and that `base_model_name_or_path` in its {_CONFIG} is what it was trained on"
        ) from None
    for name, weight in result.named_parameters():
        weight.data = weight.data.to(dtypes.get(name, weight.dtype))
    say_whether_tied(result)
    return result, below


def say_whether_tied(network: Any) -> None:
    """Have a network's configuration say so where its embeddings are two, though it ties them.

    An adapter may bring two where the model had one, and a checkpoint may have two; of which one
    alone would be saved.
    """
    first, last = network.get_input_embeddings(), network.get_output_embeddings()
    if last is not None and last.weight is not first.weight:
        for config in (network.config, network.config.get_text_config()):
            config.tie_word_embeddings = False


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each of an adapter's tensors, which are all finite numbers."""
    shapes = {}
    with _opened(folder) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                raise UserError(
                    f"model.path: {folder} is an adapter whose {name} has values that are no "
                    "finite numbers: give one from before it diverged"
                )
            shapes[name] = tuple(tensor.shape)
    return shapes


def _check_kind(config: Any, folder: Path) -> None:
    """Raise a `UserError` where an adapter is of no kind that changes weights."""
    where = f"model.path: {folder} is an adapter"
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(
            f"{where} of the kind {kind}, which changes no weights of its base, so that it cannot "
            "be merged: give one of LoRA's kind"
        )
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{where} for the task {task}: give one for causal language modelling")
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith("pissa_niter"):
        raise UserError(
            f"{where} that was saved with `init_lora_weights: {start}`, so that its base is to be "
            "changed by an SVD that draws at random: save it with "
            "`path_initial_model_for_weight_conversion` of peft's save_pretrained()"
        )


def _check_ranks(config: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise a `UserError` where an adapter would be made far larger than its weights are."""
    most = max((size for shape in shapes.values() for size in shape), default=0)
    pattern = getattr(config, "rank_pattern", None)
    ranks = [("r", getattr(config, "r", None))]
    ranks += [("rank_pattern", rank) for rank in (pattern.values() if pattern else ())]
    for key, rank in ranks:
        if isinstance(rank, int) and rank > most:
            raise UserError(
                f"{where} has a rank of {rank:,} in `{key}`, where its weights have at most "
                f"{most:,}: copy the adapter's folder again"
            )


def _check_expressions(config: Any, network: Any, where: str) -> None:
    """Raise a `UserError` where peft would search names by an expression that takes too long.

    They are tried where they have bounds, each as peft does in `check_target_module_exists` and
    `get_pattern_key`.
    """
    names = [name for name, _ in network.named_modules()]
    for key, how, expressions in _expressions(config):
        try:
            found = bounded.matches(expressions, names, how=how)
        except bounded.Exceeded as error:
            raise UserError(
                f"{where} has an expression in `{key}` that {error}: write the modules' names there"
            ) from None
        for failure in (each for each in found if isinstance(each, bounded.Failure)):
            raise UserError(
                f"{where} has an expression in `{key}` that is none ({failure}): write the "
                "modules' names there"
            )


def _expressions(config: Any) -> Iterator[tuple[str, Literal["match", "fullmatch"], list[str]]]:
    """The regular expressions of an adapter's configuration: key, use, and what peft makes of them.

    Those of plain names are left out, of which there may be one for each module.
    """
    for key in ("target_modules", "exclude_modules"):
        if isinstance(expression := getattr(config, key, None), str):
            yield key, "fullmatch", [expression]
    for key, around in (
        ("modules_to_save", r"(^|.*\.){}($|\..*)"),
        ("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
        ("rank_pattern", r"(.*\.)?({})$"),
        ("alpha_pattern", r"(.*\.)?({})$"),
        ("lambda_pattern", r"(.*\.)?({})$"),
    ):
        patterns = getattr(config, key, None) or ()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if odd := [each for each in map(str, patterns) if not re.fullmatch(r"[\w.-]*", each)]:
            yield key, "match", [around.replace("{}", each) for each in odd]


def _repeated(folder: Path, unread: Sequence[str]) -> frozenset[str]:
    """Those of an adapter's unread tensors that are in its file under another name as well.

    peft writes resized embeddings and the tokens of tied ones twice, and what an embedding was
    before it trained a copy of it.
    """
    found = {name for name in unread if ".original_module." in name}
    if found == set(unread):
        return frozenset(found)
    with _opened(folder) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in set(unread) - found:
        others = (tensor for other, tensor in tensors.items() if other not in unread)
        if any(torch.equal(tensors[name], other) for other in others):
            found.add(name)
    return frozenset(found)


def _check_read(missing: Iterable[str], unexpected: Iterable[str], where: str) -> None:
    """Raise a `UserError` where peft has left some of an adapter's weights out, or found none."""
    for names, what in (
        (missing, "has no weights for"),
        (unexpected, "has weights that its base has no place for, as"),
    ):
        if names := sorted(names):
            some = ", ".join(n.removeprefix(PREFIX).replace(".default", "") for n in names[:3])
            raise UserError(
                f"{where} {what} {some} ({len(names):,} in all): check that the adapter is "
                f"whole, and that `base_model_name_or_path` in its {_CONFIG} is what it was "
                "trained on"
            )


def resize(folder: Path, network: Any) -> None:
    """Give a network without values as many embeddings as the adapter in a folder has."""
    with torch.no_grad():
        _resize(network, config_of(folder), _shapes(folder))


def _resize(network: Any, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give the embeddings as many rows as they had in training, where the adapter tells.

    Rows that it should bring hold NaN until it does.
    """
    layers = [network.get_input_embeddings(), network.get_output_embeddings()]
    modules = [name for name, module in network.named_modules() if module in layers]
    old = layers[0].weight.shape[0]
    rows = [
        shape[-1] if name.endswith(".lora_embedding_A") else shape[0]
        for name, shape in shapes.items()
        for module in modules
        if name
        in {
            f"{PREFIX}{module}.{part}"
            for part in ("weight", "base_layer.weight", "lora_embedding_A")
        }
    ]
    tokens = getattr(config, "trainable_token_indices", None) or []
    for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
        rows += [max(old, *(index + 1 for index in indices))] if indices else []
    if not rows or max(rows) == old:
        return
    network.resize_token_embeddings(max(rows), mean_resizing=False)
    for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
        if layer is not None:
            layer.weight[old:] = torch.nan


def _check_rows(network: Any, where: str) -> None:
    """Raise a `UserError` where embeddings have grown by rows that nobody has brought."""
    for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
        if layer is not None and (absent := layer.weight.isnan().any(dim=1)).any():
            first = int(absent.nonzero()[0])
            name = next(name for name, module in network.named_modules() if module is layer)
            raise UserError(
                f"{where} was trained with embeddings that had been resized, and has no values of "
                f"{name} for {int(absent.sum())} of the tokens from {first} on: save it again with "
                "`save_embedding_layers=True` of peft's save_pretrained()"
            )


def _untie(network: Any) -> None:
    """Part tied embeddings where an adapter's factors change one of them alone."""
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    layers = [network.get_input_embeddings(), network.get_output_embeddings()]
    if None in layers or not any(isinstance(layer, kind) for layer in layers):
        return
    first, last = (each.get_base_layer() if isinstance(each, kind) else each for each in layers)
    if first.weight is last.weight:
        last.weight = torch.nn.Parameter(first.weight.detach().clone(), requires_grad=False)


def _probe(network: Any) -> Tensor:
    """What a network says to a short text."""
    rows = network.get_input_embeddings().weight.shape[0]
    ids = torch.arange(min(8, rows), device=network.device)[None]
    logits: Tensor = network(input_ids=ids, use_cache=False).logits.float()
    return logits


def _alike(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    rounding = 1e-3 if dtype == torch.float32 else 0.25
    return bool((first - second).abs().max() <= rounding * second.std())


def _describe(
    folder: Path,
    base: str,
    config: Any,
    adapted: Any,
    shapes: Mapping[str, tuple[int, ...]],
    repeated: frozenset[str],
) -> BaseAdapter:
    """Describe an adapter that is attached to its base."""
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    return BaseAdapter(
        folder=folder,
        base=base,
        revision=config.revision if hasattr(config, "revision") else None,
        scales={name: float(layer.scaling["default"]) for name, layer in layers.items()},
        options={
            key: value
            for key in ("modules_to_save", "trainable_token_indices")
            if (value := getattr(config, key, None))
        },
        parameters={
            name: _parameter(name, layer)
            for name, layer in layers.items()
            if isinstance(layer, peft.tuners.lora.ParamWrapper)
        },
        repeated=repeated,
        obstacle=_obstacle(config, adapted, layers, shapes),
    )


def _parameter(place: str, wrapper: Any) -> tuple[str, int]:
    """Name and number of experts of the parameter of which factors stand under `place`."""
    owner = place
    while owner.endswith(".base_layer"):  # peft nests the wrappers of one module's parameters
        owner = owner.removesuffix(".base_layer")
    if wrapper.get_param().ndim == 3:
        return f"{owner}.{wrapper.parameter_name}", wrapper.num_experts
    return owner, 0


def _obstacle(
    config: Any, adapted: Any, layers: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Why no other adapter can be put beside one that is attached to its base; None if one can."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"it is of the kind {kind}"
    if config.bias != "none":
        return f"it has `bias: {config.bias}`"
    start = config.init_lora_weights
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal", "mica"):
        return f"its `init_lora_weights: {start}` changes the weights of its own base"
    for option in ("layer_replication", "use_dora", "lora_bias"):
        if getattr(config, option, None):
            return f"it has `{option}`"
    if odd := next((name for name, layer in layers.items() if layer.lora_variant), None):
        return f"its layers are no plain LoRA ({odd})"
    for name, layer in layers.items():
        if isinstance(layer, peft.tuners.lora.ParamWrapper) and (
            layer.get_param().ndim < 3 and layer.parameter_name != "weight"
        ):
            return f"it adapts {layer.parameter_name} of {name}, which is no layer's weight"
    live = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if odd := next((name for name in shapes if ".lora_" in name and name not in live), None):
        return f"this version of transformers has {odd} under another name"
    copies = (
        module.modules_to_save["default"]
        for module in adapted.modules()
        if isinstance(module, peft.utils.other.ModulesToSaveWrapper)
    )
    if any(isinstance(copy, transformers.pytorch_utils.Conv1D) for copy in copies):
        return "its `modules_to_save` has a transposed layer"
    return None


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """The adapter's file of weights, whose tensors are read one by one."""
    try:
        with safetensors.safe_open(folder / _WEIGHTS, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise UserError(
            f"model.path: {folder / _WEIGHTS} is damaged ({error}): copy it again"
        ) from None
