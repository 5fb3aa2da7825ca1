"""The architectures, one line each, and a random model of a few kilobytes of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers

from hedgerow.testing.models import byte_tokenizer


class Architecture(NamedTuple):
    """A line of the table: how transformers calls the configuration, and what makes it tiny."""

    name: str
    config: str
    """Class of the configuration."""
    options: Mapping[str, Any] = MappingProxyType({})
    """Arguments of the configuration, beside those of `SMALL`; None leaves one of them out."""
    kind: str = "dense"
    quick: bool = False
    """Whether `make test` tries it, too; `make test-slow` tries all."""
    also: tuple[str, ...] = ("fedavg",)
    """Methods that are tried beside `flora`, by their names in `walk.METHODS`."""
    network: str = "AutoModelForCausalLM"
    """Class that makes the network from the configuration."""
    saved: Mapping[str, Any] = MappingProxyType({})
    """Arguments of `save_pretrained`."""
    refused: str = ""
    """Words of the sentence by which it has to be refused, if it has to."""
    lacking: str = ""
    """What is not right with it yet, with which its test is expected to fail."""

    def __str__(self) -> str:
        return self.name


SMALL: dict[str, Any] = {
    # The tokenizer has 259 tokens: more embeddings than those are what most models have.
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

_A = Architecture
_NO_GQA = {"num_key_value_heads": 4}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    **_NO_GQA,
}
_DEEPSEEK = {
    **_MLA,
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _text(**options: Any) -> dict[str, Any]:
    """The options of a text model inside a model of several kinds of input."""
    return {key: value for key, value in (SMALL | options).items() if value is not None}


ARCHITECTURES = [
    # Dense
    _A("llama", "LlamaConfig", quick=True, also=("ferret",)),
    _A("llama, tied", "LlamaConfig", {"tie_word_embeddings": True}, also=("ferret",)),
    _A(
        "llama, biases, rope llama3",
        "LlamaConfig",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    _A(
        "llama, rope yarn",
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    _A(
        "llama, rope dynamic",
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
            }
        },
    ),
    _A("llama, sharded", "LlamaConfig", saved={"max_shard_size": "40KB"}),
    _A("llama, stored in bfloat16", "LlamaConfig", {"dtype": "bfloat16"}),
    _A("mistral, window", "MistralConfig", {"sliding_window": 8}),
    _A("ministral", "MinistralConfig", {"sliding_window": 8}),
    _A("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
    _A("qwen3", "Qwen3Config"),
    _A("gemma", "GemmaConfig"),
    _A("gemma2", "Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 8}, quick=True),
    _A("gemma3 (text)", "Gemma3TextConfig", {"sliding_window": 8}),
    _A("phi", "PhiConfig", _NO_GQA),
    _A("phi3", "Phi3Config", kind="fused"),
    _A(
        "phi3, rope longrope",
        "Phi3Config",
        {
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "original_max_position_embeddings": 24,
            },
        },
        kind="fused",
    ),
    _A("stablelm", "StableLmConfig", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    _A("olmo", "OlmoConfig", {"clip_qkv": 0.5}),
    _A("olmo2", "Olmo2Config"),
    _A("olmo3", "Olmo3Config", {"sliding_window": 8}),
    _A(
        "granite",
        "GraniteConfig",
        {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    _A("cohere", "CohereConfig", {"logit_scale": 0.25}),
    _A("cohere2", "Cohere2Config", {"sliding_window": 8, "logit_scale": 0.25}),
    _A("starcoder2", "Starcoder2Config", {"use_bias": True}),
    _A("glm", "GlmConfig"),
    _A("glm4", "Glm4Config", kind="fused"),
    _A("helium", "HeliumConfig"),
    _A("exaone4", "Exaone4Config", {"sliding_window": 8}),
    _A("smollm3", "SmolLM3Config"),
    _A("nemotron", "NemotronConfig"),
    _A("ernie4_5", "Ernie4_5Config"),
    _A("seed_oss", "SeedOssConfig"),
    _A("hunyuan (dense)", "HunYuanDenseV1Config"),
    _A("arcee", "ArceeConfig"),
    _A("apertus", "ApertusConfig"),
    _A("minicpm3", "MiniCPM3Config", {**_MLA, "dim_model_base": 8, "scale_emb": 2}),
    _A("gpt_neox", "GPTNeoXConfig", kind="fused"),
    _A(
        "gpt_neo",
        "GPTNeoConfig",
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    _A("gptj", "GPTJConfig", {"rotary_dim": 4}, kind="fused"),
    _A("codegen", "CodeGenConfig", {"rotary_dim": 4}, kind="fused"),
    _A("opt", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 24}),
    _A("bloom", "BloomConfig", kind="fused"),
    _A(
        "falcon",
        "FalconConfig",
        {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
        kind="fused",
    ),
    _A("falcon (alibi)", "FalconConfig", {"head_dim": None, "alibi": True}, kind="fused"),
    _A("mpt", "MptConfig", {"max_seq_len": 128}, kind="fused"),
    _A("gpt2", "GPT2Config", kind="fused", quick=True),
    _A("gpt_bigcode", "GPTBigCodeConfig", {"n_inner": 48}, kind="fused"),
    _A("persimmon", "PersimmonConfig", kind="fused"),
    _A("biogpt", "BioGptConfig"),
    _A("xglm", "XGLMConfig", {"ffn_dim": 48, "d_model": 32, "num_layers": 2, "attention_heads": 4}),
    _A("diffllama", "DiffLlamaConfig"),
    _A("openai-gpt", "OpenAIGPTConfig", kind="fused"),
    _A("nanochat", "NanoChatConfig"),
    _A("bitnet", "BitNetConfig"),
    _A("vaultgemma", "VaultGemmaConfig", {"sliding_window": 8}),
    _A(
        "gemma3n (text)",
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 264,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "sliding_window": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        also=("fedavg", "ferret over lora"),
    ),
    _A(
        "gemma4 (text)",
        "Gemma4TextConfig",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 264,
            "hidden_size_per_layer_input": 8,
            "sliding_window": 8,
            "global_head_dim": 16,
        },
    ),
    _A("bert, decoder", "BertConfig", {"is_decoder": True}),
    _A(
        "whisper (decoder)",
        "WhisperConfig",
        {
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "max_target_positions": 128,
        },
    ),
    _A("modernbert-decoder", "ModernBertDecoderConfig", {"local_attention": 8}, kind="fused"),
    # Experts
    _A(
        "mixtral",
        "MixtralConfig",
        {"num_local_experts": 4},
        "experts",
        quick=True,
        also=("fedavg", "fedit", "ferret over lora"),
    ),
    _A(
        "qwen2_moe",
        "Qwen2MoeConfig",
        {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
        "experts",
    ),
    _A(
        "qwen3_moe",
        "Qwen3MoeConfig",
        {**_EXPERTS, "num_experts": 4},
        "experts",
        also=("fedavg", "fedit", "ferret over lora"),
    ),
    _A("deepseek_v2", "DeepseekV2Config", _DEEPSEEK, "experts"),
    _A(
        "deepseek_v3",
        "DeepseekV3Config",
        _DEEPSEEK,
        "experts",
        also=("fedavg", "fedit", "ferret over lora"),
    ),
    _A(
        "glm4_moe",
        "Glm4MoeConfig",
        {**_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
        "experts",
    ),
    _A(
        "olmoe",
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2},
        "experts",
        also=("fedavg", "fedit", "ferret over lora"),
    ),
    _A(
        "gpt_oss",
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        "experts",
    ),
    _A(
        "granitemoe",
        "GraniteMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "experts",
    ),
    _A("phimoe", "PhimoeConfig", {"num_local_experts": 4}, "experts"),
    _A(
        "lfm2_moe",
        "Lfm2MoeConfig",
        {
            **_EXPERTS,
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
        "experts",
    ),
    _A(
        "dbrx",
        "DbrxConfig",
        {
            "head_dim": None,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 24,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 32,
            },
        },
        "experts",
    ),
    _A(
        "llama4 (text)",
        "Llama4TextConfig",
        {"intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 64},
        "experts",
    ),
    _A(
        "jetmoe",
        "JetMoeConfig",
        {
            "kv_channels": 8,
            "num_local_experts": 4,
            "num_key_value_heads": 2,
            "num_attention_heads": None,
            "head_dim": None,
        },
        "experts",
    ),
    _A(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        {"moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
        "experts",
    ),
    _A("hunyuan (moe)", "HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2}, "experts"),
    _A(
        "minimax_m2",
        "MiniMaxM2Config",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
        "experts",
    ),
    _A(
        "granitemoeshared",
        "GraniteMoeSharedConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
        "experts",
    ),
    _A("flex_olmo", "FlexOlmoConfig", {"num_experts": 4, "num_experts_per_tok": 2}, "experts"),
    _A(
        "afmoe",
        "AfmoeConfig",
        {**_EXPERTS, "num_experts": 4, "num_dense_layers": 1, "sliding_window": 8},
        "experts",
    ),
    _A(
        "laguna",
        "LagunaConfig",
        {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
        "experts",
        lacking="peft reads no adapter of its shared_experts, so that the export is refused",
    ),
    _A(
        "longcat_flash",
        "LongcatFlashConfig",
        {
            **_MLA,
            "num_layers": 1,
            "num_hidden_layers": None,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
        },
        "experts",
    ),
    # Recurrent, and of several kinds of layers
    _A("mamba", "MambaConfig", {"state_size": 8}, "recurrent"),
    _A(
        "mamba2",
        "Mamba2Config",
        {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
        "recurrent",
        quick=True,
    ),
    _A(
        "falcon_mamba",
        "FalconMambaConfig",
        {"state_size": 8},
        "recurrent",
        also=("fedavg", "ferret over lora"),
    ),
    _A("rwkv", "RwkvConfig", {"context_length": 128}, "recurrent"),
    _A(
        "xlstm",
        "xLSTMConfig",
        {
            "hidden_size": 64,
            "qk_dim_factor": 1.0,
            "num_heads": 2,
            "num_blocks": 2,
            "chunk_size": 16,
        },
        "recurrent",
    ),
    _A(
        "recurrent_gemma",
        "RecurrentGemmaConfig",
        {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32},
        "recurrent",
    ),
    _A("lfm2", "Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "hybrid", quick=True),
    _A(
        "jamba",
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        "hybrid",
        also=("fedavg", "ferret over lora"),
    ),
    _A("bamba", "BambaConfig", {**_MAMBA2, "attn_layer_indices": [1]}, "hybrid"),
    _A(
        "zamba2",
        "Zamba2Config",
        {
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_d_state": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"],
            "use_mem_rope": True,
            "use_mamba_kernels": False,
        },
        "hybrid",
    ),
    _A(
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        {
            **_MAMBA2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
        },
        "hybrid",
    ),
    _A(
        "qwen3_next",
        "Qwen3NextConfig",
        {**_EXPERTS, **_DELTA, "num_experts": 4, "shared_expert_intermediate_size": 24},
        "hybrid",
    ),
    _A("qwen3_5 (text)", "Qwen3_5TextConfig", _DELTA, "hybrid"),
    _A("falcon_h1", "FalconH1Config", {**_MAMBA2, "mamba_d_ssm": 64}, "hybrid"),
    _A("olmo_hybrid", "OlmoHybridConfig", _DELTA, "hybrid"),
    _A(
        "minimax",
        "MiniMaxConfig",
        {
            "num_local_experts": 4,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "hybrid",
    ),
    _A(
        "kimi_linear",
        "KimiLinearConfig",
        {
            **_EXPERTS,
            **{k: v for k, v in _MLA.items() if k not in ("q_lora_rank", "head_dim")},
            "num_local_experts": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
        "hybrid",
    ),
    _A(
        "nemotron_h",
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": None,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 8,
        },
        "hybrid",
    ),
    # Not causal: a token's logits depend on what follows it
    _A("bert", "BertConfig", refused="causal"),
    _A("roberta", "RobertaConfig", {"max_position_embeddings": 130}, refused="causal"),
    # Vision-language models, with text alone
    _A(
        "gemma3",
        "Gemma3Config",
        {
            "text_config": _text(sliding_window=8),
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
        },
        "vision",
        network="Gemma3ForConditionalGeneration",
        also=("fedavg", "ferret over lora"),
    ),
    _A(
        "qwen2_vl",
        "Qwen2VLConfig",
        {
            "text_config": _text(
                head_dim=None,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                },
            ),
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        },
        "vision",
        network="Qwen2VLForConditionalGeneration",
    ),
    _A(
        "llava",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **SMALL},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
        },
        "vision",
        network="LlavaForConditionalGeneration",
    ),
    _A(
        "mistral3",
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **SMALL},
            "vision_config": {"model_type": "pixtral", "head_dim": 8, **_VISION},
        },
        "vision",
        network="Mistral3ForConditionalGeneration",
    ),
    _A(
        "qwen3_5",
        "Qwen3_5Config",
        {
            "text_config": _text(**_DELTA),
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
            },
        },
        "vision",
        network="Qwen3_5ForConditionalGeneration",
    ),
    _A(
        "llama4",
        "Llama4Config",
        {
            "text_config": _text(
                intermediate_size_mlp=48, num_local_experts=4, attention_chunk_size=64
            ),
            "vision_config": {
                **_VISION,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
        },
        "vision",
        network="Llama4ForConditionalGeneration",
    ),
    _A(
        "mllama",
        "MllamaConfig",
        {
            "text_config": _text(cross_attention_layers=[1], num_hidden_layers=3),
            "vision_config": {
                **_VISION,
                "num_global_layers": 1,
                "attention_heads": 2,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
                "supported_aspect_ratios": [[1, 1]],
            },
        },
        "vision",
        network="MllamaForConditionalGeneration",
    ),
    _A(
        "gemma4",
        "Gemma4Config",
        {
            "text_config": _text(
                layer_types=["sliding_attention", "full_attention"],
                vocab_size_per_layer_input=264,
                hidden_size_per_layer_input=8,
                sliding_window=8,
                global_head_dim=16,
            ),
            "vision_config": {**_VISION, "num_key_value_heads": 2, "head_dim": 8},
            "audio_config": None,
        },
        "vision",
        network="Gemma4ForConditionalGeneration",
    ),
]


def build(architecture: Architecture, folder: Path) -> Path:
    """Save a random model of an architecture in a folder, with a tokenizer of bytes.

    Its weights are large, and biases and norms are other than 0 and 1, so that a computation that
    leaves something out gives another loss.
    """
    options = SMALL if architecture.kind != "vision" else {}
    options = {k: v for k, v in ({**options, **architecture.options}).items() if v is not None}
    config = getattr(transformers, architecture.config)(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = getattr(transformers, architecture.network)
        network = kind(config) if architecture.kind == "vision" else kind.from_config(config)
        with torch.no_grad():
            for parameter in network.parameters():
                scale = 0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
                parameter.add_(scale * torch.randn_like(parameter))
    network.to(config.dtype or torch.float32).save_pretrained(folder, **architecture.saved)
    byte_tokenizer().save_pretrained(folder)
    return folder
