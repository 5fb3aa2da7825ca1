"""Models as folders that transformers 4 and 5, and whoever else reads their folders, load alike.

The weights are new; all else are the base's own files, byte for byte where they say what is so.
Some are written anew: of a base that was never in a folder, or has changed since. Of both kinds
those that only version 5 understands also get the words of version 4 (`spellings`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from hedgerow import spellings
from hedgerow.errors import UserError
from hedgerow.lazy import huggingface_hub, torch, transformers
from hedgerow.loading import bars_in_terminals_only, tokenization
from hedgerow.model import Model

_CONFIG, _GENERATION, _TOKENIZER = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer*.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "*.tiktoken",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Everything that tokenizers are read from; no code, and nothing that is pickled."""
_PROCESSORS = "*processor_config.json"
"""What says how a model of images and text, trained here on text alone, is given images."""


def save(
    model: Model,
    folder: Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    ends: Collection[int] = (),
) -> None:
    """Write a model, its tokenizer and their settings; the model's weights get the dtype.

    Args:
        revision: of the base, where it came from the Hub; None for the newest that is here. Of the
            model below an adapter, it is the adapter that says it.
        dtype: of the weights, as `bfloat16`; None for what they have.
        ends: token ids that end an answer, beside those of the model.

    Raises:
        UserError: weights are no finite numbers, in this dtype or at all.
    """
    network = model.network
    if (below := model.origin.adapter) is not None:
        revision = below.revision
    cast(dict(network.named_parameters()), dtype, keep=_kept_in_float32(network))
    generation = network.generation_config
    # It is written below, as it is: save_pretrained refuses what many bases on the Hub have.
    network.generation_config = transformers.GenerationConfig() if generation else None
    with bars_in_terminals_only():
        network.save_pretrained(folder)
    network.generation_config = generation
    source = _folder_of(network.config.name_or_path, revision)
    for file in [] if source is None else source.glob(_PROCESSORS):
        shutil.copyfile(file, folder / file.name)
        spellings.rewrite(folder / file.name, _without_code)
    if source is not None and not _same_config(network, source):
        source = None
    if source is not None:
        shutil.copyfile(source / _CONFIG, folder / _CONFIG)
    spellings.rewrite(folder / _CONFIG, _config_of(network))
    if generation is not None:
        if source is not None and (source / _GENERATION).is_file():
            shutil.copyfile(source / _GENERATION, folder / _GENERATION)
        else:
            (folder / _GENERATION).write_text(generation.to_json_string(), encoding="utf-8")
        spellings.rewrite(folder / _GENERATION, _generation_of(model, ends))
    save_tokenizer(model.tokenizer, folder, revision=revision)


def cast(
    tensors: Mapping[str, torch.Tensor],
    dtype: str | None,
    *,
    keep: Callable[[str], bool] = lambda name: False,
) -> None:
    """Give tensors a dtype in place, and check that all are finite numbers.

    Args:
        dtype: name of a floating-point dtype of torch; None changes none.
        keep: whether a tensor of this name keeps its own dtype.

    Raises:
        UserError: naming a tensor that is not finite, in this dtype or at all.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            continue  # the weights of a quantized layer
        if not tensor.isfinite().all():
            raise UserError(
                f"{name} has values that are no finite numbers: the run has diverged; export an "
                "earlier round with --round, or train again with a lower training.learning_rate"
            )
        if dtype is None or keep(name):
            continue
        cast = tensor.detach().to(getattr(torch, dtype))
        if not cast.isfinite().all():
            raise UserError(
                f"dtype {dtype}: {name} has a value of {float(tensor.abs().max()):.6g}, and "
                f"{dtype} goes to {torch.finfo(cast.dtype).max:.6g}: use bfloat16 or float32"
            )
        tensor.data = cast


def _folder_of(place: str | None, revision: str | None) -> Path | None:
    """The folder that a model or a tokenizer came from; None where there is none (any more)."""
    if not place:
        return None
    if Path(place).is_dir():
        return Path(place)
    for file in (_CONFIG, _TOKENIZER):
        try:
            cached = huggingface_hub.try_to_load_from_cache(place, file, revision=revision)
        except huggingface_hub.errors.HFValidationError:
            return None  # a folder that is gone
        if isinstance(cached, str):
            return Path(cached).parent
    return None


# --- config.json ------------------------------------------------------------------------------


def _config_of(network: Any) -> Callable[[Any], Any]:
    """What config.json of these weights has to say, whatever that of the base says."""
    dtype = str(network.dtype).removeprefix("torch.")
    kept = hasattr(network.config, "quantization_config")

    def change(content: dict[str, Any]) -> dict[str, Any]:
        content = {key: value for key, value in content.items() if key != "auto_map"}
        if not kept:
            content.pop("quantization_config", None)
        content |= {key: dtype for key in ("dtype", "torch_dtype") if key in content}
        return spellings.model_config(content)

    return change


def _same_config(network: Any, folder: Path) -> bool:
    """Whether a folder's config.json says what the network is."""
    if not (folder / _CONFIG).is_file():
        return False
    try:
        own = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return False
    return bool(_essence(own.to_dict()) == _essence(network.config.to_dict()))


def _essence(config: Any) -> Any:
    """What of a configuration is about the function that it describes."""
    if not isinstance(config, Mapping):
        return config
    return {k: _essence(v) for k, v in config.items() if k not in _BESIDE and v is not None}


_BESIDE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "use_cache",
}


def _kept_in_float32(network: Any) -> Callable[[str], bool]:
    """Whether transformers reads a weight in float32, whatever dtype is asked for."""
    parts = {
        part
        for names in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for part in getattr(network, names, None) or ()
    }
    return lambda name: bool(parts.intersection(name.split(".")))


# --- generation_config.json -------------------------------------------------------------------


def _generation_of(model: Model, ends: Collection[int]) -> Callable[[Any], Any]:
    def change(content: dict[str, Any]) -> dict[str, Any]:
        # The run's answers end with the tokenizer's token, and generate() stops at listed ones.
        own = model.network.generation_config.eos_token_id
        ids = [] if own is None else list(own) if isinstance(own, list | tuple) else [own]
        if new := [end for end in sorted({*model.ends, *ends}) if end not in ids]:
            ids += new
            # What is only derived from config.json, readers may derive again.
            content = {key: value for key, value in content.items() if key != "_from_model_config"}
            content["eos_token_id"] = ids if len(ids) > 1 else ids[0]
        padding = content.get("pad_token_id")
        if padding is not None and not 0 <= padding < model.vocabulary_size:
            content = content | {"pad_token_id": model.pad_id}
        return content

    return change


# --- the tokenizer's files --------------------------------------------------------------------


def save_tokenizer(tokenizer: Any, folder: Path, *, revision: str | None = None) -> None:
    """Write a tokenizer: its own files where it is what they say, else what it has become.

    Args:
        revision: of the base, where it came from the Hub; None for the newest that is here.
    """
    source = _folder_of(tokenizer.name_or_path, revision)
    if source is not None:
        for pattern in _TOKENIZER_FILES:
            for file in source.glob(pattern):
                (folder / file.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / file.relative_to(source))
    if not _same_tokenizer(tokenizer, folder):
        for pattern in _TOKENIZER_FILES:
            for file in folder.glob(pattern):
                file.unlink()
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
        tokenizer.save_pretrained(folder)
    config = folder / _TOKENIZER
    if not config.is_file():
        return
    spellings.rewrite(config, _without_code)
    as_it_is = config.read_bytes()
    spellings.rewrite_tokenizer(folder)
    if config.read_bytes() != as_it_is and not _same_tokenizer(tokenizer, folder):
        config.write_bytes(as_it_is)  # its class does more than tokenizer.json says


def _without_code(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "auto_map"}


def _same_tokenizer(tokenizer: Any, folder: Path) -> bool:
    """Whether a folder's tokenizer is this one, but for a padding token that it got here."""
    try:
        own = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return False

    def said(one: Any) -> Any:
        named = {k: str(v) for k, v in one.special_tokens_map.items() if k != "pad_token"}
        return one.chat_template, named, tokenization(one)

    return bool(said(own) == said(tokenizer))
