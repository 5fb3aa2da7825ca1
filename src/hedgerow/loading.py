"""Base models from folders and from the Hub: safetensors only, and no code of their own."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hedgerow.bundled import MODEL
from hedgerow.errors import UserError
from hedgerow.lazy import peft, safetensors, torch, transformers
from hedgerow.names import DEMO, MEMORY

if TYPE_CHECKING:
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
def _bars_in_terminals_only() -> Iterator[None]:
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


@_bars_in_terminals_only()
def load(settings: ModelSettings) -> tuple[Any, Any]:
    """Load a model (or an adapter with its base) from a folder, or a model from the Hub.

    Returns:
        The network, on its device, and its tokenizer, which has a padding token.

    Raises:
        UserError: there is no such model, it is no causal language model, it has no safetensors
            weights (others are pickles), or the device is not there.
    """
    if settings.path == MEMORY:
        raise UserError(
            "model.path: the run's base model was in the memory of the program that began it: open "
            "the run there with model= and tokenizer=, or name a folder that holds it with "
            "model.path=FOLDER"
        )
    where = f"model.path: {settings.path}"
    path = location(settings.path)
    folder = Path(path)
    is_adapter = (folder / "adapter_config.json").is_file()
    if folder.is_absolute() and not (folder / "config.json").is_file() and not is_adapter:
        problem = "has no config.json"
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{where} {problem}: give a model folder in Hugging Face format")
    device = _device(settings.device)
    if not folder.exists():
        _check_reachable(settings)
    words = path
    try:
        options = {
            "revision": settings.revision,
            "dtype": getattr(torch, settings.dtype),
            "use_safetensors": True,
            "trust_remote_code": False,
        }
        if is_adapter:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
                adapted = peft.AutoPeftModelForCausalLM.from_pretrained(path, **options)
            words = adapted.peft_config["default"].base_model_name_or_path
            network, missing = adapted.merge_and_unload(), set()
        else:
            network, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, **options
            )
            missing = info["missing_keys"]
        tokenizer = _tokenizer(words, settings)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        safetensors.SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where} cannot be loaded as a causal language model: {reason}") from None
    if missing:
        # transformers would draw them at random: another base for everybody who loads it.
        names = ", ".join(sorted(missing)[:3])
        raise UserError(f"{where} has no weights for {names}: give a complete checkpoint")
    return network.to(device), tokenizer


def skeleton(settings: ModelSettings) -> Any:
    """The network of a base model without values, to look at its layers in no time."""
    path = location(settings.path)
    if (Path(path) / "adapter_config.json").is_file():
        path = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
    config = transformers.AutoConfig.from_pretrained(
        path, revision=settings.revision, trust_remote_code=False
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _check_reachable(settings: ModelSettings) -> None:
    """Raise a `UserError` where a model is neither in the cache nor on a Hub that can be reached.

    transformers would find out as well, after trying for most of a minute without a word.
    """
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name, revision = settings.path, settings.revision
    if huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision) is not None:
        return
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
    except (httpx.TransportError, OfflineModeIsEnabled):
        raise UserError(
            f"model.path: {name} is no folder, and the Hugging Face Hub cannot be reached for a "
            "model of that name: give a folder, or connect to the network"
        ) from None
    except HfHubHTTPError:
        return  # transformers says which of its files are missing, or whose they are


def load_tokenizer(settings: ModelSettings) -> Any:
    """Load a model's tokenizer alone, with a padding token.

    Raises:
        UserError: there is none.
    """
    folder = Path(location(settings.path))
    words = str(folder) if folder.exists() else settings.path
    if (folder / "adapter_config.json").is_file():
        words = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    try:
        return _tokenizer(words, settings)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.path: {settings.path} has no tokenizer: {reason}") from None


def _tokenizer(words: str, settings: ModelSettings) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        words, revision=settings.revision, trust_remote_code=False
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
