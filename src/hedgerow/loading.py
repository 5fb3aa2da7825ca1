"""Base models from folders and from the Hub: safetensors only, and no code of their own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from hedgerow import base_adapter, quantized
from hedgerow.base_adapter import BaseAdapter
from hedgerow.bundled import MODEL
from hedgerow.errors import UserError, readable, reason_of
from hedgerow.lazy import huggingface_hub, peft, tokenizers, torch, transformers
from hedgerow.names import DEMO, MEMORY
from hedgerow.optional import check_installed

if TYPE_CHECKING:
    from hedgerow.quantized import Quantization
    from hedgerow.settings import ModelSettings


def location(path: str) -> str:
    """Folder, or name on the Hub, for transformers and peft, of what `model.path` names."""
    return str(MODEL) if path == DEMO else path


def name_of(path: str) -> str:
    """Name of a base model: the whole one on the Hub, as `acme/tiny-llama`; a folder's own name.

    A folder of the Hub's cache is named after what it is a copy of.
    """
    place = Path(path)
    cached = [part for part in place.parts if part.startswith("models--")]
    if cached:
        return cached[-1].removeprefix("models--").replace("--", "/")
    is_folder = place.is_absolute() or place.exists() or len(place.parts) != 2
    return place.name if is_folder or path.startswith(".") else path


@contextmanager
def bars_in_terminals_only() -> Iterator[None]:
    """Keep transformers' bars out of files and notebooks, where they are lines upon lines."""
    bars = transformers.utils.logging
    hidden = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            bars.enable_progress_bar()


class Origin(NamedTuple):
    """What a model came from, beside its weights."""

    adapter: BaseAdapter | None = None
    """The adapter of an earlier fine-tune that is merged into the weights, if one is."""
    unused: Sequence[str] = ()
    """Names of the checkpoint's weights that the network has no place for."""
    quantized: str | None = None
    """Why nothing can be added to the checkpoint's weights, where they are quantized."""


class Loaded(NamedTuple):
    """A model as it was loaded."""

    network: Any
    """The transformers model, on its device."""
    tokenizer: Any
    """Its tokenizer, with a padding token where there is any token that could be one."""
    origin: Origin


@bars_in_terminals_only()
def load(settings: ModelSettings) -> Loaded:
    """Load a model (or an adapter with its base) from a folder, or from the Hub.

    Raises:
        UserError: there is no such model, it is no causal language model, it has no safetensors
            weights (others are pickles), some of them are missing, or the device is not there.
    """
    if settings.path == MEMORY:
        raise UserError(
            "model.path: the run's base model was in the memory of the program that began it: open "
            "the run there with model= and tokenizer=, or name a folder that holds it with "
            "model.path=FOLDER"
        )
    where = f"model.path: {settings.path}"
    folder = Path(location(settings.path))
    is_adapter = base_adapter.is_adapter(folder)
    if folder.is_absolute() and not (folder / "config.json").is_file() and not is_adapter:
        problem = "has no config.json"
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"{where} {problem}: give a model folder in Hugging Face format, the name of a model "
            "on the Hub, or demo, the tiny model that comes with hedgerow"
        )
    device = _device(settings.device)
    if (adapted := adapter_folder(settings)) is not None:
        if settings.quantization is not None:
            raise UserError(
                f"model.quantization: {settings.path} is an adapter, which would be rounded into "
                "its base: merge it first (merge_and_unload() of peft), save the whole model, and "
                "give that, or leave model.quantization out"
            )
        network, origin = _load_below(adapted, settings, where)
        network, adapter = base_adapter.merged(adapted, network, base_adapter.base_of(adapted))
        origin = origin._replace(adapter=adapter)
    else:
        network, origin = _load_network(
            str(folder), settings.revision, settings.dtype, where, settings.quantization, device
        )
    check_network(network, where)
    if quantized.kind_of(network) is None:
        network = network.to(device)
    return Loaded(network, load_tokenizer(settings), origin)


def adapter_folder(settings: ModelSettings) -> Path | None:
    """Folder of the adapter that `model.path` names, in the Hub's cache if need be; else None.

    Raises:
        UserError: an adapter of the Hub cannot be fetched, or a folder has a model as well.
    """
    folder = Path(location(settings.path))
    if folder.exists():
        if not base_adapter.is_adapter(folder):
            return None
        if any(folder.glob("model*.safetensors")):
            raise UserError(
                f"model.path: {settings.path} has the weights of a whole model (model.safetensors) "
                "beside those of an adapter (adapter_config.json): give a folder with one of them"
            )
        return folder
    name, revision = settings.path, settings.revision
    if folder.is_absolute():
        return None
    _check_reachable(name, revision, f"model.path: {name}")
    cached = [
        isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=revision), str)
        for file in ("config.json", "adapter_config.json")
    ]
    # A model that is here already is not asked for on the Hub, which may not be to be reached.
    if cached == [True, False] or (
        cached == [False, False]
        and transformers.utils.find_adapter_config_file(name, revision=revision) is None
    ):
        return None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*/*"]
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {name} cannot be fetched: {reason_of(error)}") from None


def _load_below(folder: Path, settings: ModelSettings, where: str) -> tuple[Any, Origin]:
    """The network that an adapter is for."""
    base, revision = base_adapter.base_of(folder), base_adapter.config_of(folder).revision
    below = f"{where} is an adapter of {base}, which"
    if not Path(base).is_dir():
        _check_reachable(base, revision, f"{where} is an adapter of {base}: {base}")
    elif not (Path(base) / "config.json").is_file():
        raise UserError(
            f"{below} has no config.json: set `base_model_name_or_path` in its adapter_config.json "
            "to a model folder in Hugging Face format"
        )
    network, origin = _load_network(base, revision, settings.dtype, below)
    unusable = origin.quantized
    if unusable is None and quantized.kind_of(network) is not None:
        unusable = _quantized(network.config, base)
    if unusable is not None:  # such weights would round what is merged into them
        raise UserError(
            f"{below} {unusable}, in `base_model_name_or_path` of its adapter_config.json"
        )
    return network, origin


def _load_network(
    place: str,
    revision: str | None,
    dtype: str,
    where: str,
    quantization: Quantization | None = None,
    device: torch.device | None = None,
) -> tuple[Any, Origin]:
    """A network, complete and as its checkpoint has it, from a folder or the Hub.

    Args:
        where: what it is called in messages, for a verb to follow.
        quantization: number type that its linear layers are quantized to; None leaves them as
            they are.
        device: where a quantized one is loaded; others are loaded on the CPU.
    """
    _check_format(Path(place), where)
    options = {"revision": revision, "trust_remote_code": False}
    unusable = config = None
    own_kind, loading = False, dict[str, Any]()
    try:
        _check_not_adapter(place, revision, where)
        _check_layers(transformers.PreTrainedConfig.get_config_dict(place, **options)[0], where)
        config = transformers.AutoConfig.from_pretrained(place, **options)
        if any(
            getattr(part, "quantization_config", None) is not None
            for part in (config, config.get_text_config())
        ):
            if quantization is not None:
                raise UserError(
                    f"model.quantization: {place} has quantized weights already: leave it out"
                )
            own_kind = _method_of(config) == "bitsandbytes"
            if own_kind:
                check_installed(f"{where} has weights that are quantized, which", "bitsandbytes")
            else:
                unusable = _quantized(config, place)
        kind = _kind_of(config, where)
        if quantization is not None:
            loading["quantization_config"] = quantized.configuration(quantization, dtype)
        if quantization is not None or own_kind:
            loading["device_map"] = {"": device or torch.device("cpu")}
        _check_size(kind, config, Path(place), where)
        network, info = kind.from_pretrained(
            place,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # or it says no more than that there are some
            **loading,
            **options,
        )
    except UserError:
        raise
    except Exception as error:  # strangers' files lead many libraries into errors of any kind
        if unusable is not None:
            raise UserError(
                f"{where} {unusable} (it is not loaded here: {reason_of(error)})"
            ) from None
        if _wants_code(error):
            raise UserError(
                f"{where} needs code of its own, which is never run: give a model of an "
                "architecture that transformers has itself"
            ) from None
        if (damaged := _damaged(Path(place), _CONFIGS)) is not None:
            raise UserError(
                f"{where} cannot be loaded: {damaged}: copy it again from the checkpoint"
            ) from None
        if config is None and not isinstance(error, OSError):
            raise UserError(f"{where} has {_wrong_in_config(error)}") from None
        raise UserError(
            f"{where} cannot be loaded as a causal language model: {reason_of(error)}"
        ) from None
    if not all(quantized.is_whole(layer) for _, layer in quantized.layers(network)):
        raise UserError(
            f"{where} {_quantized(config, place)} (it is not loaded here: its weights are not "
            "quantized as its config.json says)"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise UserError(
            f"{where} has {name} of shape {tuple(found)}, where its config.json asks for "
            f"{tuple(wanted)}: give the checkpoint with its own config.json"
        )
    if missing := info["missing_keys"]:
        # transformers would draw them at random: another base for everybody who loads it.
        names = ", ".join(sorted(missing)[:3])
        raise UserError(f"{where} has no weights for {names}: give a complete checkpoint")
    unused = sorted(info["unexpected_keys"])
    if unusable is None and not own_kind and (odd := _belonging(network, unused)) is not None:
        raise UserError(
            f"{where} has weights that its config.json does not account for, as {odd} "
            f"({len(unused):,} in all): give the checkpoint with its own config.json"
        )
    base_adapter.say_whether_tied(network)
    quantized.leave_file(network)
    if quantization is not None and quantized.kind_of(network) is None:
        raise UserError(
            f"model.quantization: {place} has no linear layers that bitsandbytes could quantize: "
            "leave it out"
        )
    return network, Origin(None, unused, unusable)


def _check_format(folder: Path, where: str) -> None:
    """Raise a `UserError` where a folder has weights, but not all in safetensors format."""
    if not folder.is_dir():
        return
    kinds = ("pytorch_model*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack")
    others = sorted(file.name for kind in kinds for file in folder.glob(kind))
    if (index := folder / "model.safetensors.index.json").is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            others = sorted(each for each in names if not each.endswith(".safetensors"))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{where} has a damaged {index.name}: copy the model's folder again"
            ) from None
    elif any(folder.glob("*.safetensors*")):
        return
    if others:
        raise UserError(
            f"{where} has no weights in safetensors format, and {others[0]} is not read: save the "
            "model again, with save_pretrained() of transformers"
        )


def _check_not_adapter(place: str, revision: str | None, where: str) -> None:
    """Raise a `UserError` for what transformers would load with an adapter, be it a pickle."""
    if transformers.utils.find_adapter_config_file(place, revision=revision) is not None:
        raise UserError(
            f"{where} has an adapter (adapter_config.json) beside its model: give a folder with "
            "one of them"
        )


_LAYERS = re.compile(r"(?:.*_)?(?:layers?|blocks|experts)")
_MOST_LAYERS = 10_000
_MOST_FOR_A_BYTE = 8
"""Largest number of parameters for a byte of a checkpoint, whose weights have a bit at least."""


def _check_layers(content: Any, where: str) -> None:
    """Raise a `UserError` where config.json asks for more layers than anybody could make."""
    for key, value in content.items():
        if isinstance(value, dict):
            _check_layers(value, where)
        elif isinstance(value, int) and _LAYERS.fullmatch(key) and value > _MOST_LAYERS:
            raise UserError(
                f"{where} has a config.json whose `{readable(key)}` is {value:,}, where at most "
                f"{_MOST_LAYERS:,} can be: give the checkpoint with its own config.json"
            )


def _check_size(kind: Any, config: Any, folder: Path, where: str) -> None:
    """Raise a `UserError` where config.json asks for more than a folder's weights can be.

    transformers would make what is not there, however large.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not size:
        return
    try:
        with torch.device("meta"):
            parameters = sum(each.numel() for each in kind.from_config(config).parameters())
    except Exception:  # some cannot be made so; what else is wrong is said where they are loaded
        return
    if parameters > _MOST_FOR_A_BYTE * size:
        raise UserError(
            f"{where} has a config.json that asks for {parameters:,} parameters, where its weights "
            f"are {size:,} bytes: give the whole checkpoint with its own config.json"
        )


def _wrong_in_config(error: Exception) -> str:
    """What is wrong in config.json, by what transformers says when it checks it."""
    reason = reason_of(error)
    if isinstance(error, huggingface_hub.errors.StrictDataclassError):
        reason = reason.partition("Error: ")[2]  # without the name of the check
    found = re.match(r"Field '(\w+)' ", reason)
    if found is None:
        return f"a config.json that transformers does not read ({reason})"
    reason = reason[found.end() :].partition(". Errors: ")[0]
    return f"a config.json whose `{found[1]}` is of a wrong kind ({reason})"


def _wants_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error) or "custom code" in str(error)


def _kind_of(config: Any, where: str) -> Any:
    """The class of transformers that makes a network which predicts the next token of a text."""
    if getattr(config, "is_encoder_decoder", False):  # whose decoder could be loaded by itself
        raise UserError(f"{where} {_WITH_ENCODER}")
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    # The part of a model of images and text that reads text is saved with a configuration of its
    # own, which is not always one that can be loaded again.
    is_whole = type(config) in causal and causal[type(config)].config_class in causal
    if not is_whole and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText  # which is asked for text alone
    if type(config) in causal:
        return transformers.AutoModelForCausalLM
    raise UserError(
        f"{where} is a model of the kind {config.model_type}, which is no causal language model: "
        "give one that predicts the next token of a text"
    )


def _belonging(network: Any, unused: Sequence[str]) -> str | None:
    """The first of a checkpoint's unused weights that is part of what the network is made of.

    It is of a further layer, or a bias, a scale or an adapter of a layer that has none here; others
    are heads and towers of their own.
    """
    modules = dict(network.named_modules())
    prefix = f"{network.base_model_prefix}."
    # Layers that predict further tokens come after the others, and nothing here asks them.
    further = getattr(network.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    for name in unused:
        for own in (name, name.removeprefix(prefix), prefix + name):
            parts = own.split(".")
            for end in range(1, len(parts)):
                inner, part = modules.get(".".join(parts[:end])), parts[end]
                if "weight" in getattr(inner, "_parameters", ()):
                    return name
                if isinstance(inner, torch.nn.ModuleList) and part.isdigit():
                    beyond = int(part) - len(inner) - further
                    if beyond >= 0:
                        return name
    return None


# --- what any base has to be ----------------------------------------------------------------------


def check_network(network: Any, where: str) -> None:
    """Raise a `UserError` where a network, from wherever, is no whole causal language model.

    Args:
        where: what it is called in messages, for a verb to follow.
    """
    kind = type(network).__name__
    if getattr(network.config, "is_encoder_decoder", False):
        raise UserError(f"{where} {_WITH_ENCODER}")
    if network.get_output_embeddings() is None and not network.can_generate():
        raise UserError(f"{where} is a {kind}, which predicts no tokens: give the model with them")
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    if any(isinstance(module, layer) for module in network.modules()):
        raise UserError(f"{where} has an adapter of peft: merge it first, with merge_and_unload()")
    for name, weight in network.named_parameters():
        if weight.is_meta:
            raise UserError(
                f"{where} has no values of {name} in memory: load the whole model onto one device"
            )


_WITH_ENCODER = (
    "has an encoder that reads the prompt, beside its decoder: give a causal language model, which "
    "has a decoder alone"
)


def check_adds(network: Any, where: str) -> None:
    """Raise a `UserError` where nothing can be added to weights: quantized ones, or no numbers.

    Quantized layers that can have what is learnt beside their weights are for `check_finite`.

    Args:
        where: what the network is called in messages, for a verb to follow.
    """
    is_quantized = getattr(network, "is_quantized", False) or any(
        # Some libraries keep integers in tensors of a class of their own.
        not weight.is_floating_point()
        or weight.element_size() < 2
        or type(weight.data) is not torch.Tensor
        for weight in network.parameters()
    )
    config = network.config
    named = (getattr(c, "quantization_config", None) for c in (config, config.get_text_config()))
    if is_quantized or any(one is not None for one in named):
        raise UserError(f"{where} {_quantized(network.config, network.config.name_or_path)}")
    check_finite(network, where)


def check_finite(network: Any, where: str) -> None:
    """Raise a `UserError` where weights, or the scales of quantized ones, are no numbers."""
    numbers = {n: w for n, w in network.named_parameters() if not hasattr(w, "quant_state")}
    for name, layer in quantized.layers(network):
        scales = {what: each for what, each in layer.state_dict().items() if what != "weight"}
        numbers |= {f"{name}.{what}": each for what, each in scales.items()}
    for name, weight in numbers.items():
        if not weight.isfinite().all():
            raise UserError(
                f"{where} has values in {name} that are no finite numbers: give a checkpoint that "
                "is not damaged, or one from before it diverged"
            )


def _method_of(config: Any) -> str | None:
    """Name of the library or format by which a model is quantized, as its config.json says."""
    settings = getattr(config, "quantization_config", None)
    settings = settings or getattr(config.get_text_config(), "quantization_config", None)
    settings = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    method = settings.get("quant_method")
    name: str | None = getattr(method, "value", method)
    return name


def _quantized(config: Any, place: str | None) -> str:
    """Why a quantized model is no base, for messages."""
    by = f" ({method})" if (method := _method_of(config)) else ""
    original = _original(place)
    named = f", {original}" if original else ""
    return (
        f"has quantized weights{by}, to which what is learnt cannot be added exactly: give the "
        f"checkpoint that it was made from{named}"
    )


def _original(place: str | None) -> str | None:
    """The model that a folder's was made from, as its model card says; None where it does not."""
    card = Path(place or "") / "README.md"
    if not place or not card.is_file():
        return None
    try:
        made_from = huggingface_hub.ModelCard.load(card).data.to_dict().get("base_model")
    except (ValueError, OSError, yaml.YAMLError):
        return None
    names = made_from if isinstance(made_from, list) else [made_from]
    return next((name for name in names if isinstance(name, str)), None)


def skeleton(settings: ModelSettings) -> Any:
    """The network of a base model without values, to look at its layers in no time.

    Under an adapter, it is the model that the adapter is for.
    """
    place, revision = location(settings.path), settings.revision
    if Path(place).is_absolute() and not Path(place).is_dir():
        raise UserError(
            f"model.path: {place}, the run's base, is not there any more: add model.path=FOLDER, "
            "the folder of a copy of it"
        )
    adapted = adapter_folder(settings)
    if adapted is not None:
        place, revision = base_adapter.base_of(adapted), base_adapter.config_of(adapted).revision
    config = transformers.AutoConfig.from_pretrained(
        place, revision=revision, trust_remote_code=False
    )
    with torch.device("meta"):
        network = _kind_of(config, f"model.path: {settings.path}").from_config(config)
        if adapted is not None:
            base_adapter.resize(adapted, network)
        return network


def _check_reachable(name: str, revision: str | None, where: str) -> None:
    """Raise a `UserError` where a model is neither in the cache nor on a Hub that can be reached.

    transformers would find out as well, after trying for most of a minute without a word.
    """
    import httpx
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    try:
        for file in ("config.json", "adapter_config.json"):
            cached = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
            if isinstance(cached, str):
                return
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
    except HFValidationError:
        raise UserError(f"{where} is no folder, and no name of a model on the Hub") from None
    except (httpx.TransportError, OfflineModeIsEnabled):
        raise UserError(
            f"{where} is no folder, and the Hugging Face Hub cannot be reached for a "
            "model of that name: give a folder, or connect to the network"
        ) from None
    except HfHubHTTPError:
        return  # transformers says which of its files are missing, or whose they are


def load_tokenizer(settings: ModelSettings) -> Any:
    """Load a model's tokenizer alone, with a padding token.

    That of an adapter is in the adapter's folder; where there is none, it is its base's.

    Raises:
        UserError: there is none.
    """
    folder = Path(location(settings.path))
    place, revision = str(folder) if folder.exists() else settings.path, settings.revision
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        if (adapted := adapter_folder(settings)) is not None:
            base, below = base_adapter.base_of(adapted), base_adapter.config_of(adapted).revision
            if base_adapter.has_tokenizer(adapted):
                place, revision = str(adapted), None
                # The folder does not say of which architecture the model is, but its base's does.
                options["config"] = transformers.AutoConfig.from_pretrained(
                    base, revision=below, trust_remote_code=False
                )
            else:
                place, revision = base, below
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision, **options)
        if adapted is not None and (file := adapted / "chat_template.jinja").is_file():
            tokenizer.chat_template = file.read_text(encoding="utf-8")
    except UserError:
        raise
    except Exception as error:  # tokenizers has no kind of error of its own
        if _wants_code(error):
            raise UserError(
                f"model.path: {settings.path} has a tokenizer that needs code of its own, which is "
                "never run: give a model whose tokenizer transformers has itself"
            ) from None
        if Path(place).is_dir() and not any(
            (Path(place) / name).is_file() for name in base_adapter.VOCABULARIES
        ):
            raise UserError(
                f"model.path: {settings.path} has no tokenizer (tokenizer.json, say): copy it "
                "there from the model that it was made from"
            ) from None
        if (damaged := _damaged(Path(place), _TOKENIZERS)) is not None:
            raise UserError(
                f"model.path: {damaged}: copy it again from the model that it was made from"
            ) from None
        raise UserError(
            f"model.path: {settings.path} has no tokenizer that can be loaded: {reason_of(error)}"
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZERS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


def _damaged(folder: Path, names: Sequence[str]) -> str | None:
    """The first of a folder's files that is not what it should be, and why; None for none."""
    for file in (folder / name for name in names):
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return f"{file} is not JSON ({reason_of(error)})"
        if not isinstance(content, dict):
            return f"{file} is no JSON object"
        if file.name == "tokenizer.json":
            try:
                tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # it has no kind of its own
                return f"{file} is not read by tokenizers ({reason_of(error)})"
    return None


def tokenization(tokenizer: Any) -> dict[str, Any]:
    """State that decides a tokenizer's output, without the padding that its last call asked for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return dict(tokenizer.get_vocab())
    content: dict[str, Any] = json.loads(backend.to_str())
    return {key: content[key] for key in content if key not in ("padding", "truncation")}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is no device: write auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"model.device: {name!r} is not supported: write auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: there is no CUDA device here: write cpu or auto")
    return device
