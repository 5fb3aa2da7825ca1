"""Configuration files of models in the spellings of transformers 4 and 5 at once.

What transformers 5 writes, version 4 reads as another model, and says nothing: it does not know
`rope_parameters`, and takes the default base frequency. Readers of either version find their own
keys here; a file that has both already stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_FULL, _SLIDING = "full_attention", "sliding_attention"


def rewrite(file: Path, change: Callable[[Json], Json]) -> None:
    """Change what a JSON file says; one of which nothing changes keeps its bytes."""
    content = json.loads(file.read_text(encoding="utf-8"))
    changed = change(content)
    if changed != content:
        text = json.dumps(changed, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def rewrite_tokenizer(folder: Path) -> None:
    """Have both versions read a folder's tokenizer alike."""
    whole, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if whole.is_file() and config.is_file():
        tokenizer = json.loads(whole.read_text(encoding="utf-8"))
        rewrite(config, lambda content: tokenizer_config(content, tokenizer))


def model_config(config: Mapping[str, Any]) -> Json:
    """What config.json says, with the keys of transformers 4 beside those of 5.

    Keys that are there keep their values. Models inside the model are dealt with alike.
    """
    both = {
        key: model_config(value) if isinstance(value, Mapping) and "model_type" in value else value
        for key, value in config.items()
    }
    older = {**_rope(both), **_experts(both)}
    if older.keys() - both.keys() and "dtype" in both:
        older["torch_dtype"] = both["dtype"]
    return both | {key: value for key, value in older.items() if key not in both}


def tokenizer_config(config: Json, tokenizer: Json) -> Json:
    """What tokenizer_config.json says, in words that transformers 4 and 5 both read alike.

    Args:
        config: what the file says. Only what version 5 has written is changed.
        tokenizer: what tokenizer.json says.
    """
    both = dict(config)
    if config.get("backend") == "tokenizers" or config.get("tokenizer_class") == _BACKEND:
        # Version 4's own classes would add tokens to what tokenizer.json says, as Llama's does
        # <s>, and its general one a space, or none.
        both["tokenizer_class"] = "PreTrainedTokenizerFast"
        spaces = (tokenizer.get("pre_tokenizer") or {}).get("add_prefix_space")
        if spaces is not None and spaces != bool(config.get("add_prefix_space")):
            both["add_prefix_space"] = spaces
    if isinstance(both.get("extra_special_tokens"), list):
        # Version 4 takes a mapping by this name only, and calls a list of them otherwise.
        both["additional_special_tokens"] = both.pop("extra_special_tokens")
    return both


_BACKEND = "TokenizersBackend"


def _experts(config: Json) -> Json:
    if config.get("model_type") in _RENAMED_EXPERTS and "num_local_experts" in config:
        return {"num_experts": config["num_local_experts"]}
    return {}


_RENAMED_EXPERTS = ("qwen3_moe",)


def _rope(config: Json) -> Json:
    """Rotary positions as the keys of transformers 4; {} where version 5 has not written any."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping) or config.get("rope_scaling") is not None:
        return {}
    model_type = str(config.get("model_type"))
    if _FULL in parameters and model_type not in _WITH_KINDS_OF_LAYERS:
        return {}  # version 4 does not know it, and version 5 would read both spellings as one
    local = parameters.get(_SLIDING) or {}
    # Where layers differ, those of full attention have the model's own positions.
    whole = parameters.get(_FULL) or parameters
    kind = whole.get("rope_type", whole.get("type", "default"))
    named = ("rope_type", "type", "rope_theta", "partial_rotary_factor", _FULL, _SLIDING)
    scaling = {key: value for key, value in whole.items() if key not in named}
    keys: Json = {}
    if kind == "longrope" and "original_max_position_embeddings" in scaling:
        original = scaling.pop("original_max_position_embeddings")
        keys["original_max_position_embeddings"] = original
    if kind != "default" or scaling:
        # Phi-3's own check knows the older word only.
        scaling = {"type" if kind == "longrope" else "rope_type": kind, **scaling}
    keys["rope_scaling"] = scaling or None
    theta, share = whole.get("rope_theta"), whole.get("partial_rotary_factor")
    if theta is not None:
        keys[_THETA.get(model_type, "rope_theta")] = theta
    if share is not None:
        keys["rotary_pct" if model_type.startswith("gpt_neox") else "partial_rotary_factor"] = share
    if local.get("rope_theta") is not None:
        keys[_LOCAL_THETA.get(model_type, "rope_local_base_freq")] = local["rope_theta"]
    return keys


_WITH_KINDS_OF_LAYERS = {"gemma3_text", "gemma3n_text", "modernbert", "modernbert-decoder", "olmo3"}
"""Models of version 4 whose kinds of layers differ in their rotary positions."""
_THETA = {
    "gpt_neox": "rotary_emb_base",
    "gpt_neox_japanese": "rotary_emb_base",
    "modernbert-decoder": "global_rope_theta",
}
_LOCAL_THETA = {"modernbert-decoder": "local_rope_theta"}
