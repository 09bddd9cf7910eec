"""What the rule of `tiny.py` does not get right, by type."""

from __future__ import annotations

from typing import Any

_SECTIONS = {"text_config.rope_parameters.mrope_section": [4, 2, 2]}
_HALF_SECTIONS = {"text_config.rope_parameters.mrope_section": [2, 1, 1]}
_VISION_MARKS = {"vision_start_token_id": 20, "vision_end_token_id": 21}

# type: {path of a setting in the small config: its value}
CHANGES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {64: 16}, "max_value_projector_patch_to_query_dict": 16},
    "chameleon": {
        "vocabulary_map": {"<image>": 3, **{f"IMGIMG{''.join('ABCDEFGHIJ'[int(c)] for c in str(i))}Z": 30 + i for i in range(64)}},
        "vq_config.channel_multiplier": [1, 1, 2],
        "vq_config.latent_channels": 32,
    },
    "cohere_compass": {"text_config.rope_parameters": {
        name: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        for name in ("sliding_attention", "full_attention")
    }, "text_config.layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    "emu3": {
        "vocabulary_map": {
            "<image>": 3, "<|extra_200|>": 6, **{f"<|visual token {i:06d}|>": 30 + i for i in range(64)}
        },
        "vq_config.channel_multiplier": [1, 2],
        "vq_config.attn_resolutions": [1],
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "glm46v": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm4v_moe": _HALF_SECTIONS,
    "glm_ocr": _SECTIONS,
    "glmga": _SECTIONS,
    "glm5_next": {"text_config.index_kpool": 4},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 0], [-1, 1]]},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "qwen2_5_vl": _SECTIONS,
    "qwen2_vl": {**_SECTIONS, "vision_config.hidden_size": 64},
    "qwen2_5_omni_thinker": {**_SECTIONS, **_VISION_MARKS},
    "qwen3_omni_moe_thinker": {**_SECTIONS, **_VISION_MARKS},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2, "text_config.indexer_kv_heads": 1, "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 16, "text_config.indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": 16},
    "video_llama_3": {},
    "vipllava": {"vision_feature_layer": [-1, -2, 0]},
}  # fmt: skip

# types that have no tiny model, and why
RESIST: dict[str, str] = {
    "evolla": "reads proteins, not pictures; `AutoModelForMultimodalLM` does not map its config",
    "fast_vlm": "its vision tower is a model of timm, which the tests do not need",
    "gemma3n": "its vision tower is a model of timm, which the tests do not need",
    "perception_lm": "its vision tower is a model of timm, which the tests do not need",
}
