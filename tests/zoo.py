"""A tiny random model with its real processor for every family.

Each model has the wiring of its family (window and full attention, deepstack, sliding masks, relative position bias,
bidirectional prefixes), two vision blocks and two or three language blocks, and builds in well under a second. What a
Q-Former or a feature layer leaves unused in the real models is unused here, too.

Qwen-VL and SmolVLM processors need torchvision. Its wheel does not import beside a CPU-only torch because the schemas
of two operators are missing, so it lives in a folder of its own, `torchvision` in the environment's prefix, and
importing this module declares the two schemas and puts the folder on the path. Import it before transformers.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

_TORCHVISION = Path(sys.prefix) / "torchvision"
if _TORCHVISION.is_dir() and str(_TORCHVISION) not in sys.path:
    sys.path.insert(0, str(_TORCHVISION))
    _operators = torch.library.Library("torchvision", "DEF")
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchvision  # noqa: F401

import transformers as hf  # noqa: E402
from transformers.utils import is_torchvision_available  # noqa: E402

import zoo_text  # noqa: E402

NAMES: tuple[str, ...] = (
    "instructblip-t5",
    "instructblip-llama",
    "blip2-opt",
    "blip2-t5",
    "llava",
    "qwen2.5-vl",
    "qwen3-vl",
    "qwen3-vl-moe",
    "paligemma",
    "gemma3",
    "smolvlm",
)

MORE = ("internvl", "mllama", "gemma4")  # in zoo_more.py
NEEDS_TORCHVISION = ("qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "smolvlm", "internvl", "gemma4")

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 12}


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Make the model, in eval mode, and the processor of one family; the same seed gives the same weights."""
    processor, model = _BUILDERS[name]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() >= 2:  # 1/sqrt(fan in): activations neither vanish nor explode, so that every part matters
                fan = p.shape[-1] if p.dim() == 3 else p[0].numel()
                p.normal_(0, fan**-0.5, generator=generator)
            elif not key.endswith("weight"):
                p.normal_(0, 0.05, generator=generator)
        words = model.get_input_embeddings().weight
        if words is model.get_output_embeddings().weight:
            words.mul_(0.5)  # else a model with tied embeddings only says its last token again
    return model.to(dtype).eval(), processor


def folder(name: str, path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save one family's model and processor as an ordinary transformers folder."""
    model, processor = build(name, seed=seed, dtype=dtype)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)


def digest(folder: Path) -> dict[str, str]:
    """The hash of every weight file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def images(n: int, seed: int = 0) -> list[Image.Image]:
    """Draw `n` small RGB pictures of different sizes: a shape on a noisy ground."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(n):
        width, height = (int(x) for x in rng.integers(28, 60, 2))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        ink = tuple(int(x) for x in rng.integers(0, 256, 3))
        draw = ImageDraw.Draw(image)
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((4, 4, width - 8, height - 8), fill=ink)
        drawn.append(image)
    return drawn


def _image_processor(name: str, **options: Any) -> Any:
    """Take the class that `AutoProcessor` would load: torchvision's where it is installed, else Pillow's."""
    return getattr(hf, name if is_torchvision_available() else f"{name}Pil")(**options)


def _square(name: str, **options: Any) -> Any:
    return _image_processor(name, size={"height": 32, "width": 32}, **options)


def _t5_config(vocab: int) -> hf.T5Config:
    return hf.T5Config(
        vocab_size=vocab, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, relative_attention_num_buckets=8,
        relative_attention_max_distance=32, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip


def _llama_config(vocab: int, **options: Any) -> hf.LlamaConfig:
    size = {**_TEXT, "num_hidden_layers": 3, "num_key_value_heads": 2}
    return hf.LlamaConfig(vocab_size=vocab, max_position_embeddings=1024, tie_word_embeddings=False, **size, **options)


def _blip(instruct: bool, text_tokenizer: Any, text_config: Any) -> tuple[Any, Any]:
    """Make an InstructBLIP or BLIP-2; `text_config(vocabulary size)` is its language model's config."""
    picture = _square("BlipImageProcessor")
    if instruct:
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        asked = zoo_text.tokenizer("words", specials, prefix="[CLS]", suffix="[SEP]", **{**roles, "padding_side": "right"})
        processor = hf.InstructBlipProcessor(picture, text_tokenizer, asked, num_query_tokens=4)
    else:
        processor = hf.Blip2Processor(picture, text_tokenizer, num_query_tokens=4)
    prefix = "InstructBlip" if instruct else "Blip2"
    queries = {
        "vocab_size": len(asked) if instruct else 32, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    config = getattr(hf, f"{prefix}Config")(
        vision_config=_VISION,
        qformer_config=queries,
        text_config=text_config(len(text_tokenizer)),
        num_query_tokens=4,
        image_token_index=text_tokenizer.convert_tokens_to_ids("<image>"),
    )
    return processor, getattr(hf, f"{prefix}ForConditionalGeneration")(config)


def _opt_config(vocab: int) -> hf.OPTConfig:
    return hf.OPTConfig(
        vocab_size=vocab, hidden_size=48, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, dropout=0.0,
        word_embed_proj_dim=48, max_position_embeddings=512, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip


def _llava() -> tuple[Any, Any]:
    words = zoo_text.llama_tokenizer(padding_side="left")
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = hf.LlavaProcessor(
        _image_processor("CLIPImageProcessor", **crop), words, patch_size=8, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=zoo_text.LLAVA,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION),
        text_config=_llama_config(len(words), pad_token_id=words.pad_token_id),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return processor, hf.LlavaForConditionalGeneration(config)


def _qwen(version: int, experts: int = 0) -> tuple[Any, Any]:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    words = zoo_text.tokenizer("bytes", [*specials, "<|video_pad|>"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = {f"{key}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for key, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")
    )}  # fmt: skip
    pixels = {"patch_size": 4, "size": {"shortest_edge": 24 * 24, "longest_edge": 48 * 48}}
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 4, "out_hidden_size": 48,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    text = {**_GROUPED, "num_hidden_layers": 3, "vocab_size": len(words), "rope_parameters": rope}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    if version == 2:
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        kind, template, video = "Qwen2_5_VL", zoo_text.QWEN_SYSTEM + zoo_text.QWEN, hf.Qwen2VLVideoProcessor
    else:
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        kind, template, video = "Qwen3VL", zoo_text.QWEN, hf.Qwen3VLVideoProcessor
    picture = _image_processor("Qwen2VLImageProcessor", **pixels)
    processor = getattr(hf, f"{kind}Processor")(picture, words, video(patch_size=4), chat_template=template)
    if experts:
        kind += "Moe"
        text |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    config = getattr(hf, f"{kind}Config")(vision_config=vision, text_config=text, **ids)
    return processor, getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _paligemma() -> tuple[Any, Any]:
    words = zoo_text.gemma_tokenizer([])
    picture = _square("SiglipImageProcessor")
    picture.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(picture, words)
    text = {**_GROUPED, "num_key_value_heads": 1, "vocab_size": len(words), "model_type": "gemma"}
    config = hf.PaliGemmaConfig(
        vision_config={**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=48,
        hidden_size=48,
        pad_token_id=0,
    )
    return processor, hf.PaliGemmaForConditionalGeneration(config)


def _gemma3() -> tuple[Any, Any]:
    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = ["<start_of_turn>", "<end_of_turn>", *images.values()]
    words = zoo_text.gemma_tokenizer(turns, extra_special_tokens=images)
    processor = hf.Gemma3Processor(_square("Gemma3ImageProcessor"), words, chat_template=zoo_text.GEMMA, image_seq_length=4)
    text = {**_GROUPED, "num_hidden_layers": 3, "vocab_size": len(words), "query_pre_attn_scalar": 12}
    text |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    config = hf.Gemma3Config(
        vision_config={**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = [1, words.convert_tokens_to_ids("<end_of_turn>")]
    return processor, model


def _smolvlm() -> tuple[Any, Any]:
    roles = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    grid = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
    words = zoo_text.tokenizer(
        "bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *roles.values(), *grid], extra_special_tokens=roles,
        bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_end|>", padding_side="left",
    )  # fmt: skip
    cut = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = hf.SmolVLMProcessor(
        _image_processor("SmolVLMImageProcessor", **cut), words, hf.SmolVLMVideoProcessor(**cut),
        image_seq_len=4, chat_template=zoo_text.SMOL,
    )  # fmt: skip
    ends = {"bos_token_id": 1, "eos_token_id": words.eos_token_id, "pad_token_id": 2}
    config = hf.SmolVLMConfig(
        vision_config=_VISION,
        text_config=_llama_config(len(words), **ends),
        scale_factor=2,
        image_token_id=words.image_token_id,
        pad_token_id=2,
    )
    return processor, hf.SmolVLMForConditionalGeneration(config)


def _more(name: str) -> tuple[Any, Any]:
    import zoo_more  # it imports this module

    return getattr(zoo_more, name)(_image_processor)


_BUILDERS = {
    "instructblip-t5": lambda: _blip(True, zoo_text.t5_tokenizer(), _t5_config),
    "instructblip-llama": lambda: _blip(True, zoo_text.llama_tokenizer(), lambda size: _llama_config(size, pad_token_id=4)),
    "blip2-opt": lambda: _blip(False, zoo_text.opt_tokenizer(), _opt_config),
    "blip2-t5": lambda: _blip(False, zoo_text.t5_tokenizer(), _t5_config),
    "llava": _llava,
    "qwen2.5-vl": lambda: _qwen(2),
    "qwen3-vl": lambda: _qwen(3),
    "qwen3-vl-moe": lambda: _qwen(3, experts=4),
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "smolvlm": _smolvlm,
    **{name: partial(_more, name) for name in MORE},
}
