"""Further families with their real processors, beside those of `zoo.NAMES`, which every test of the zoo runs on."""

from __future__ import annotations

from typing import Any

import transformers as hf

import tiny
import zoo_text

_PARTS = (
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}"
)
INTERNVL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n" + _PARTS.replace("IMAGE", "<IMG_CONTEXT>\n")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
_START = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA = (
    "{% for message in messages %}" + _START.format("{{ message.role }}") + _PARTS.replace("IMAGE", "<|image|>")
    + "<|eot_id|>{% endfor %}{% if add_generation_prompt %}" + _START.format("assistant") + "{% endif %}"
)  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
}  # fmt: skip


def internvl(picture: Any) -> tuple[Any, Any]:
    """InternVL; `picture(class, ...)` makes its image processor."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    roles = dict(
        zip(("start_image_token", "end_image_token", "context_image_token", "video_token"), specials[3:], strict=True)
    )
    words = zoo_text.tokenizer(
        "bytes", specials, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left", extra_special_tokens=roles
    )  # fmt: skip
    cut = {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    processor = hf.InternVLProcessor(
        picture("GotOcr2ImageProcessor", **cut), words, hf.InternVLVideoProcessor(), image_seq_length=4,
        chat_template=INTERNVL,
    )  # fmt: skip
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.InternVLConfig(
        vision_config={**VISION, "num_attention_heads": 2, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(words), **ids},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    return processor, hf.InternVLForConditionalGeneration(config)


def mllama(picture: Any) -> tuple[Any, Any]:
    """Llama 3.2 Vision: cross-attention layers between those of the language model."""
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    words = zoo_text.tokenizer(
        "bytes", [*specials, "<|image|>"], bos_token=specials[0], eos_token=specials[1], pad_token=specials[2]
    )  # fmt: skip
    tiles = {"size": {"height": 32, "width": 32}, "max_image_tiles": 4}
    processor = hf.MllamaProcessor(picture("MllamaImageProcessor", **tiles), words, chat_template=LLAMA)
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    vision = {
        **VISION, "num_global_layers": 1, "attention_heads": 2, "image_size": 32, "patch_size": 8, "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 1], "vision_output_dim": 96, "supported_aspect_ratios": ratios,
    }  # fmt: skip
    text = {
        **TEXT, "cross_attention_layers": [1], "vocab_size": len(words), "pad_token_id": 2, "bos_token_id": 0,
        "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    config = hf.MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<|image|>")
    )  # fmt: skip
    return processor, hf.MllamaForConditionalGeneration(config)


def gemma4(picture: Any) -> tuple[Any, Any]:
    """Gemma 4: layers that share keys and values, and inputs per layer."""
    roles = {f"{key}_token": f"<{key}>" for key in ("boi", "eoi", "image", "boa", "eoa", "audio", "video")}
    turns = ["<start_of_turn>", "<end_of_turn>", *roles.values()]
    words = zoo_text.gemma_tokenizer(turns, extra_special_tokens=roles)
    cut = {"patch_size": 4, "pooling_kernel_size": 2}
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(), picture("Gemma4ImageProcessor", **cut, max_soft_tokens=70), words,
        hf.Gemma4VideoProcessor(**cut), chat_template=zoo_text.GEMMA.replace("<start_of_image>", "<image>"),
        image_seq_length=70,
    )  # fmt: skip
    config = tiny.config("gemma4")
    config.text_config.vocab_size = config.text_config.vocab_size_per_layer_input = len(words)
    config.text_config.pad_token_id, config.text_config.eos_token_id, config.text_config.bos_token_id = 0, 1, 2
    for key in ("image", "audio", "video", "boi", "eoi", "boa"):
        if hasattr(config, f"{key}_token_id"):
            setattr(config, f"{key}_token_id", words.convert_tokens_to_ids(f"<{key}>"))
    return processor, hf.Gemma4ForConditionalGeneration(config)
