"""A tiny random model of every type that transformers maps from images and text to text, made by one rule.

The rule starts from the default config of the type and makes every width, depth, number of heads, vocabulary and image
small, by the names of the settings. A model has one layer of each kind that its config names, and at least two. What the
rule does not get right stands in `tiny_exceptions.py`, one entry per type. `tiny_inputs.batches` makes inputs.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import zoo  # isort: skip  # noqa: F401  # before transformers

import torch
import transformers as hf
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tiny_exceptions import CHANGES, RESIST
from tiny_inputs import batches

__all__ = ["MORE", "RESIST", "TYPES", "batches", "build", "config"]

TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
MORE = ("phi4_multimodal",)  # reads pictures, too, and is mapped as multimodal alone

VOCABULARY = 200
TEXT, VISION, QFORMER, AUDIO = 64, 32, 48, 24  # four widths, so that none is taken for another

_WIDTHS = {"text": TEXT, "vision": VISION, "qformer": QFORMER, "audio": AUDIO}
_PARTS = (  # the first word in the name of a part of a config says what it is
    ("qformer", "qformer"), ("audio", "audio"), ("vision", "vision"), ("vq_", "vision"), ("sam_", "vision"),
    ("encoder_config", "vision"), ("adapter", "vision"), ("text", "text"), ("decoder", "text"), ("dit", "text"),
)  # fmt: skip
_TOKENS = re.compile(r"^(.+?)_(token_id|token_index|id|index)$")
_FIRST_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "image": 3, "video": 4, "audio": 5}
_NO_TOKENS = ("forced_eos_token_id", "insert_layer_id")
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types")

# name of a setting: what it becomes, whatever the part; the first that matches counts
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size(_per_layer_input)?|unpadded_vocab_size", VOCABULARY),
    (r"(num_)?(hidden_layers|layers|decoder_layers|encoder_layers)|depth|n_layers|num_blocks|num_global_layers", 2),
    (r"(encoder|decoder)_attention_heads", 4),
    (r"image_size|crop_size|resolution|force_image_size|max_image_size|max_img_size", 32),
    (r"patch_size|encoder_stride", 4),
    (r"num_position_embeddings|position_embedding_size|num_patches|num_image_tokens|image_seq_length|seq_len", 64),
    (r"max_num_patches|max_vit_seq_len|img_max_token_num", 256),
    (r"max_(2d_)?position_embeddings|max_source_positions", 1024),
    (r"pos_emb_(height|width)", 8),
    (r"window_size", 16),
    (r"head_dim|(swa|global|linear_key|linear_value|linear|index|indexer|mamba)_head_dim", 16),
    (r"d_kv|v_head_dim|qk_nope_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"kv_lora_rank|q_lora_rank", 24),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
    (r"n_shared_experts|moe_num_shared_experts|n_group|topk_group", 1),
    (r"first_k_dense_replace", 1),
    (r"moe_hidden_size", 48),
    (r"moe_.*intermediate_size|shared_.*intermediate_size|share_expert_dim", 32),
    (r"linear_num_(key|value)_heads|linear_num_heads|index_n_heads|indexer_n_heads|mamba_num_heads", 4),
    (r"num_query_tokens|latent_query_num|resampler_n_latents|resampler_num_latents", 4),
    (r"mm_tokens_per_image", 16),
    (r"patch_embed_hidden_size", 48),
    (r"resampler_depth|aligner_num_add_layers", 2),
    (r"resampler_n_heads|resampler_heads", 2),
    (r"resampler_(head_dim|dim_head)", 16),
    (r"sliding_window(_size)?|attention_chunk_size|chunk_size", 16),
    (r"sliding_window_pattern", 2),
    (r"index_topk", 8),
    (r"insert_layer_id", 0),
    (r"(post_conv|proj_conv)_mid_channels", 24),
    (r"num_embeddings|codebook_size", 64),
    (r"base_channels|latent_channels|downsample_hidden_size", 32),
    (r"output_channels", 16),
    (r"(text|decoder|image_text)_hidden_size|out_hidden_size|projector_(in|out)put_dim|(adapter_)?out_dim|output_dim", TEXT),
    (r"vision_hidden_size|encoder_hidden_size", VISION),
    (r"projection_dim|word_embed_proj_dim|image_token_embed_dim", TEXT),
    (r"(project|align|merge)\w*_(hidden|intermediate)_(size|dim)|merged_hidden_size", 48),
    (r"hidden_size_per_layer_input|laurel_rank|d_rel|hc_lowrank", 8),
)  # fmt: skip
_SIZE = [(re.compile(f"({pattern})$"), value) for pattern, value in _SIZES]


def build(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Make the model of one type, in eval mode; the same seed gives the same weights."""
    if kind in RESIST:
        raise ValueError(f"{kind}: {RESIST[kind]}")
    model = _empty(kind, seed, torch.float32)
    _fill(model, torch.Generator().manual_seed(seed))
    if dtype != torch.float32:
        full, model = model, _empty(kind, seed, dtype)
        for key, tensor in model.state_dict(keep_vars=True).items():
            if any(re.search(rf"(^|\.){word}(\.|$)", key) for word in model._keep_in_fp32_modules_strict or ()):
                tensor.data = tensor.data.float()
        model.load_state_dict(full.state_dict())
    return model.eval()


def _empty(kind: str, seed: int, dtype: torch.dtype) -> Any:
    """The model as its class makes it, in the precision in which loading makes it."""
    usual = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            model = getattr(hf, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[kind])(config(kind))
        finally:
            torch.set_default_dtype(usual)
    model.config.dtype = dtype
    return model


def config(kind: str) -> Any:
    """The small config of one type."""
    large = CONFIG_MAPPING[kind]()
    values = large.to_dict()
    for key, value in vars(large).items():
        if value is None and key == "vision_config":
            values[key] = CONFIG_MAPPING[f"{kind}_vision"]().to_dict()
        elif value is None and re.match("(image|video)_token_(id|index)$", key):
            values[key] = None  # which `to_dict` may leave out
    small = _smaller(values, "text", dict(_FIRST_TOKENS))
    for path, value in copy.deepcopy(CHANGES.get(kind, {})).items():
        *parts, last = path.split(".")
        where = small
        for part in parts:
            where = where[part]
        where[last] = value
    return CONFIG_MAPPING[kind](**{key: value for key, value in small.items() if key != "model_type"})


def _smaller(values: dict[str, Any], part: str, tokens: dict[str, int]) -> dict[str, Any]:
    """The same settings made small; `part` is what they describe: text, vision, qformer or audio."""
    old = next((values[key] for key in ("num_hidden_layers", "depth", "num_layers") if values.get(key)), None)
    layers = _layers_to_keep(values, old)
    small = {}
    for key, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            inner = next((name for word, name in _PARTS if word in key), part)
            small[key] = _smaller(value, inner, tokens)
        elif key == "rope_parameters" or key == "rope_scaling":
            small[key] = _rope(value)
        elif key == "per_layer_config" and value:
            changes = {int(i): _smaller(change, part, tokens) for i, change in value.items()}
            small[key] = {layers.index(i): change for i, change in changes.items() if i in layers}
        elif isinstance(value, list | tuple):
            small[key] = _list(key, value, old, layers)
        elif key.endswith(("layers", "depth")) and value == old:
            small[key] = len(layers)
        else:
            token = _TOKENS.match(key)
            if token and key not in _NO_TOKENS and (value is None or isinstance(value, int)):
                named = value is not None or token[1] in ("pad", "image", "video")
                small[key] = tokens.setdefault(token[1], len(tokens)) if named else None
            else:
                small[key] = _size(key, value, part, values)
    return small


def _layers_to_keep(values: dict[str, Any], old: int | None) -> list[int]:
    """One layer of each kind, by the lists that name a kind for every layer; two at least."""
    lists = [values[key] for key in _PER_LAYER if isinstance(values.get(key), list | tuple)]
    lists = [kinds for kinds in lists if old is None or len(kinds) == old]
    first: dict[tuple[Any, ...], int] = {}
    for index, kinds in enumerate(zip(*lists, strict=True)):
        first.setdefault(kinds, index)
    kept = sorted(first.values())
    return kept if len(kept) > 1 else [0, 1]


def _list(key: str, value: Any, old: int | None, layers: list[int]) -> Any:
    if key == "image_grid_pinpoints":
        return [[32, 64], [64, 32]]
    if not value or (isinstance(value[0], str | list | tuple | dict | bool) and len(value) != old):
        return value
    if old is not None and list(value) == list(range(old)):
        return list(range(len(layers)))
    if len(value) == old:
        return type(value)(value[i] for i in layers)
    if re.search("index|indices|attn_idxs|attention_layers", key):
        return type(value)([1])
    matched = next((size for pattern, size in _SIZE if pattern.match(key)), None)
    return value if matched is None else type(value)(matched for _ in value)


def _size(key: str, value: Any, part: str, values: dict[str, Any]) -> Any:
    """A number made small by its name; other values stay."""
    if key == "vision_use_head":
        return False  # the models use the patches, not the pooled picture
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if value == 0:
        return 0
    width = _WIDTHS[part]
    if key in ("hidden_size", "d_model", "embed_dim"):
        return width
    if key in ("intermediate_size", "ffn_dim", "d_ff", "mlp_dim") or re.search("ffn_dim|dense_intermediate|_mlp$", key):
        return width * 3 // 2
    if re.search("num_key_value_heads|kv_heads", key):
        heads = values.get(key.replace("num_key_value", "num_attention")) or 0
        return (4 if part == "text" else 2) if value == heads else 2 if part == "text" else 1
    if re.fullmatch(r"(num_|swa_num_|encoder_|num_sliding_|conf_num_)?(attention_)?heads", key):
        return 4 if part == "text" else 2
    return next((size for pattern, size in _SIZE if pattern.match(key)), value)


def _rope(value: Any) -> Any:
    """Rotary settings for heads of 16: the sections of a multimodal rotation add up to half of what is rotated."""
    if not isinstance(value, dict):
        return value
    small = {key: _rope(inner) if isinstance(inner, dict) else inner for key, inner in value.items()}
    if "partial_rotary_factor" in small:
        small["partial_rotary_factor"] = 0.5
    if "mrope_section" in small:
        half = int(16 * small.get("partial_rotary_factor", 1.0)) // 2
        small["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return small


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter random values of a scale at which each part of the model matters, in place."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is None or id(p) in seen or not p.is_floating_point():
                continue
            seen.add(id(p))
            constant = bool((p == p.flatten()[0]).all()) or not bool(torch.isfinite(p).all())
            if p.dim() >= 2:  # 1/sqrt(fan in)
                conv = isinstance(module, nn.modules.conv._ConvNd)
                fan = p[0].numel() if p.dim() == 2 or conv else p.shape[-1]
                p.normal_(0, fan**-0.5, generator=generator)
            elif "bias" in key:
                p.normal_(0, 0.05, generator=generator)
            elif constant and "norm" in f"{name}.{key}".lower():
                p.add_(torch.empty_like(p).normal_(0, 0.1, generator=generator))
            elif constant:  # gates, scales of layers
                p.uniform_(0.3, 0.9, generator=generator)
    try:
        words, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return
    if words is not None and head is not None and words.weight is head.weight:
        words.weight.mul_(0.5)  # else the model only says its last token again
