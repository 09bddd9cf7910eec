"""What the rule of `tiny.py` does not get right, by type."""

from __future__ import annotations

from typing import Any


def _letters(number: int) -> str:
    return "".join("ABCDEFGHIJ"[int(digit)] for digit in str(number))


_SECTIONS = {"text_config.rope_parameters.mrope_section": [4, 2, 2]}
_HALF_SECTIONS = {"text_config.rope_parameters.mrope_section": [2, 1, 1]}
_VISION_MARKS = {"vision_start_token_id": 20, "vision_end_token_id": 21}

# type: {path of a setting in the small config: its value}
CHANGES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {64: 16}, "max_value_projector_patch_to_query_dict": 16},
    "chameleon": {
        "vocabulary_map": {"<image>": 3, **{f"IMGIMG{_letters(i)}Z": 30 + i for i in range(64)}},
        "vq_config.channel_multiplier": [1, 1, 2],
    },
    "cohere_compass": {
        "text_config.layer_types": ["sliding_attention", "full_attention"],
        "text_config.rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for name in ("sliding_attention", "full_attention")
        },
    },
    "deepseek_ocr2": {
        "vision_config.sam_config.downsample_channels": [24, 32], "text_config.num_experts_per_tok": 2,
        "text_config.mlp_layer_types": ["dense", "sparse"],
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 32,
        "vision_config.pooling_kernel_size": 2, "canvas_length": 8,
    },
    "dots3_note": {
        "text_config.head_dim": 24, "vision_config.adapter_in_dim": 32, "audio_config.adapter_input_size": 24,
        "audio_config.conv_output_size": 512,
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 3, "<|extra_200|>": 6, **{f"<|visual token {i:06d}|>": 30 + i for i in range(64)}
        },
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.attn_resolutions": [1],
    },
    "ernie4_5_vl_moe": {
        "text_config.num_hidden_layers": 3, "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "text_config.rope_parameters.mrope_section": [3, 3, 2],
    },
    "fast_vlm": {  # in place of a model of timm
        "vision_config": {
            "model_type": "convnext", "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "hidden_size": 32,
        },
    },
    "florence2": {
        "vision_config.depths": [1, 1], "vision_config.patch_size": [7, 3], "vision_config.patch_stride": [4, 2],
        "vision_config.patch_padding": [3, 1], "vision_config.patch_prenorm": [False, True],
        "vision_config.embed_dim": [16, 32], "vision_config.num_heads": [2, 2],
        "vision_config.num_groups": [2, 2], "vision_config.window_size": 4,
    },
    "gemma4": {
        "vision_config.pooling_kernel_size": 2, "text_config.num_hidden_layers": 4, "text_config.num_kv_shared_layers": 2,
        "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
        "text_config.per_layer_config": {1: {"head_dim": 24}, 3: {"head_dim": 24}},
    },
    "gemma4_unified": {
        "vision_config.mm_embed_dim": 32, "vision_config.mm_posemb_size": 16, "vision_config.output_proj_dims": 32,
        "vision_config.pooling_kernel_size": 2,
    },
    "glm46v": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm4v_moe": _HALF_SECTIONS,
    "glm5_next": {"text_config.index_kpool": 4},
    "glm_ocr": _SECTIONS,
    "glmga": _SECTIONS,
    "granite4_vision": {
        "vision_config.hidden_size": 64, "vision_config.intermediate_size": 96, "qformer_config.hidden_size": 64,
        "qformer_config.num_hidden_layers": 1,
        "downsample_rate": "1/2", "deepstack_layer_map": [[0, 0], [-1, 1]], "text_config.num_hidden_layers": 6,
        "spatial_target_layers": [2, 3, 4, 5],
    },
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "idefics": {
        "use_resampler": True, "perceiver_config.use_resampler": True, "freeze_text_layers": False,
        "freeze_vision_layers": False,
    },
    "inkling_mm_model": {
        "vision_config.patch_size": 2, "text_config.logits_mup_width_multiplier": 1.0, "audio_config.mel_vocab_size": 16,
    },
    "instructblipvideo": {"video_token_index": 4},
    "janus": {"vq_config.channel_multiplier": [1, 1], "vq_config.num_patches": 8},
    "kimi_k25": {"text_config.head_dim": 8, "projection_hidden_size": 32},
    "llama4": {
        "text_config.moe_layers": [1],
        "vision_config.intermediate_size": 128, "vision_config.projector_input_dim": 64,
        "vision_config.projector_output_dim": 64, "vision_config.vision_output_dim": 64,
    },
    "mllama": {"text_config.cross_attention_layers": [1], "vision_config.vision_output_dim": 64},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {
        "out_hidden_size": 128, "audio_config.num_hidden_layers": 4, "audio_config.hidden_sizes": [8, 16, 24, 32],
        "audio_config.depths": [1, 1, 1, 1], "audio_config.patch_sizes": [4, 4, 2, 2],
    },
    "nemotron_h_omni": {"text_config.n_groups": 2, "text_config.ssm_state_size": 16},
    "ovis2": {"visual_indicator_token_ids": [10, 11, 12, 13, 14]},
    "paddleocr_vl": _SECTIONS,
    "perception_lm": {  # in place of a model of timm
        "vision_config": {
            "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 48, "image_size": 32, "patch_size": 4, "model_args": {"embed_dim": 32},
        },
    },
    "phi4_multimodal": {
        "audio_config.ext_pw_out_channel": 24, "audio_config.depthwise_separable_out_channel": 24,
        "audio_config.nemo_conv_channels": 24, "audio_config.bias_max_distance": 16,
    },
    "pix2struct": {"vision_config.hidden_size": 64, "vision_config.num_attention_heads": 4},
    "pp_formulanet": {"vision_config.post_conv_in_channels": 16, "vision_config.post_conv_out_channels": 24},
    "qwen2_5_omni_thinker": {**_SECTIONS, **_VISION_MARKS},
    "qwen2_5_vl": _SECTIONS,
    "qwen2_vl": {**_SECTIONS, "vision_config.hidden_size": 64},
    "qwen3_omni_moe_thinker": {**_SECTIONS, **_VISION_MARKS},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2, "text_config.indexer_kv_heads": 1, "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 16, "text_config.indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": 16, "vision_config.hidden_size": 48},
    "udop": {"decoder_start_token_id": 0},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [24, 32]},
    "vipllava": {"vision_feature_layer": [-1, -2, 0]},
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
}  # fmt: skip

# types without a tiny model, and why
RESIST: dict[str, str] = {
    "gemma3n": "its vision tower can only be a model of timm, which the tests do not need",
}

# types whose saved model the auto classes do not load back, and why
UNLOADABLE: dict[str, str] = {
    "evolla": "two types share its config class, and the auto classes find the one that has no such model",
    "shieldgemma2": "the names of its weights are changed when they are saved, and not changed back",
}

# what a model does not have
NO_PICTURES = ("evolla", "mistral4")  # one reads proteins, one text alone
NO_LOSS = ("diffusion_gemma",)  # its forward takes no labels
NO_GRADIENTS = ("chameleon", "emu3")  # pictures become tokens by a search for the nearest code
