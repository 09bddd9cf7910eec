"""Components that are found without a table, for the model types that people use most: each was checked by hand.

A model with transformers' default configuration is built on the meta device, without weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM

from sparsight import Family, SparsightError, anatomy
from sparsight.model.discover import discover
from sparsight.model.families import COMPONENTS

import zoo

# vision, connector, language
FOUND = {
    "aria": (
        "model.vision_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "blip": (
        "vision_model.encoder.layers",
        "",
        "text_decoder.bert.encoder.layer",
    ),
    "blip-2": (
        "vision_model.encoder.layers",
        "qformer.encoder.layer+language_projection",
        "language_model.model.decoder.layers",
    ),
    "cohere2_vision": (
        "model.vision_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "deepseek_vl": (
        "model.vision_model.encoder.layers",
        "model.aligner",
        "model.language_model.layers",
    ),
    "deepseek_vl_hybrid": (
        "model.high_res_vision_model.vision_encoder.layers+model.vision_model.encoder.layers",
        "model.aligner",
        "model.language_model.layers",
    ),
    "ernie4_5_vl_moe": (
        "model.vision_tower.blocks",
        "model.resampler_model",
        "model.language_model.layers",
    ),
    "exaone4_5": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "florence2": (
        "model.vision_tower.blocks.0+model.vision_tower.blocks.1+model.vision_tower.blocks.2+model.vision_tower.blocks.3",
        "model.multi_modal_projector",
        "model.language_model.encoder.layers+model.language_model.decoder.layers",
    ),
    "gemma3": (
        "model.vision_tower.encoder.layers",
        "",
        "model.language_model.layers",
    ),
    "git": (
        "git.image_encoder.vision_model.encoder.layers",
        "git.visual_projection",
        "git.encoder.layer",
    ),
    "glm46v": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "glm4v": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "glm4v_moe": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "glm_ocr": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "got_ocr2": (
        "model.vision_tower.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "granite_docling": (
        "model.vision_model.encoder.layers",
        "model.vision_model.connector.coarse.deepstack_mergers+model.vision_model.connector.fine.deepstack_mergers+model.vision_model.connector.coarse.projection+model.vision_model.connector.fine.projection+model.vision_model.connector.mlp_fc2",
        "model.text_model.layers",
    ),
    "hyperclovax_vision_v2": (
        "model.vision_model.blocks",
        "model.vision_model.merger+model.projector",
        "model.language_model.layers",
    ),
    "idefics": (
        "model.vision_model.encoder.layers",
        "",
        "model.layers+model.gated_cross_attn_layers",
    ),
    "idefics2": (
        "model.vision_model.encoder.layers",
        "model.connector.perceiver_resampler.layers+model.connector.modality_projection",
        "model.text_model.layers",
    ),
    "idefics3": (
        "model.vision_model.encoder.layers",
        "model.connector",
        "model.text_model.layers",
    ),
    "instructblip": (
        "vision_model.encoder.layers",
        "qformer.encoder.layer+language_projection",
        "language_model.model.decoder.layers",
    ),
    "instructblipvideo": (
        "vision_model.encoder.layers",
        "qformer.encoder.layer+language_projection",
        "language_model.model.decoder.layers",
    ),
    "internvl": (
        "model.vision_tower.encoder.layer",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "janus": (
        "model.vision_model.encoder.layers",
        "model.aligner",
        "model.language_model.layers",
    ),
    "kimi_k25": (
        "model.vision_tower.layers",
        "model.mm_projector",
        "model.language_model.layers",
    ),
    "kosmos-2": (
        "vision_model.model.encoder.layers",
        "image_to_text_projection",
        "text_model.model.layers",
    ),
    "kosmos-2.5": (
        "vision_model.encoder.layer",
        "image_to_text_projection",
        "text_model.model.layers",
    ),
    "lfm2_vl": (
        "model.vision_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "lighton_ocr": (
        "model.vision_encoder.transformer.layers",
        "model.vision_projection",
        "model.language_model.layers",
    ),
    "llama4": (
        "vision_model.model.layers",
        "vision_model.vision_adapter+multi_modal_projector",
        "language_model.model.layers",
    ),
    "llava": (
        "model.vision_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "llava_next": (
        "model.vision_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "llava_next_video": (
        "model.vision_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "llava_onevision": (
        "model.vision_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "minicpmv4_6": (
        "model.vision_tower.encoder.layers",
        "model.merger.mlp+model.vision_tower.vit_merger",
        "model.language_model.layers",
    ),
    "mistral3": (
        "model.vision_tower.transformer.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "mllama": (
        "model.vision_model.transformer.layers+model.vision_model.global_transformer.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "molmo2": (
        "model.vision_tower.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "nemotron_h_omni": (
        "vision_model.encoder.layer",
        "multi_modal_projector",
        "language_model.model.layers",
    ),
    "ovis2": (
        "model.vision_tower.transformer.encoder.layers",
        "model.vision_tower.head_linear",
        "model.language_model.layers",
    ),
    "paddleocr_vl": (
        "model.visual.vision_model.encoder.layers",
        "model.projector",
        "model.language_model.layers",
    ),
    "paligemma": (
        "model.vision_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "phi4_multimodal": (
        "model.embed_tokens_extend.image_embed.img_processor.encoder.layers",
        "model.embed_tokens_extend.image_embed.img_projection_up+model.embed_tokens_extend.image_embed.img_projection_down",
        "model.layers",
    ),
    "pi0": (
        "model.vlm.vision_tower.encoder.layers",
        "model.vlm.multi_modal_projector",
        "model.vlm.language_model.layers",
    ),
    "pix2struct": (
        "encoder.encoder.layer",
        "",
        "decoder.layer",
    ),
    "qwen2_5_omni": (
        "thinker.model.visual.blocks",
        "thinker.model.visual.merger",
        "thinker.model.language_model.layers",
    ),
    "qwen2_5_omni_thinker": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "qwen2_5_vl": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "qwen2_vl": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "qwen3_5": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "qwen3_5_moe": (
        "model.visual.blocks",
        "model.visual.merger",
        "model.language_model.layers",
    ),
    "qwen3_omni_moe_thinker": (
        "model.visual.blocks",
        "model.visual.merger_list+model.visual.merger",
        "model.language_model.layers",
    ),
    "qwen3_vl": (
        "model.visual.blocks",
        "model.visual.deepstack_merger_list+model.visual.merger",
        "model.language_model.layers",
    ),
    "qwen3_vl_moe": (
        "model.visual.blocks",
        "model.visual.deepstack_merger_list+model.visual.merger",
        "model.language_model.layers",
    ),
    "smolvlm": (
        "model.vision_model.encoder.layers",
        "model.connector",
        "model.text_model.layers",
    ),
    "step3p7": (
        "model.vision_model.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "t5gemma2": (
        "model.encoder.vision_tower.encoder.layers",
        "",
        "model.encoder.text_model.layers+model.decoder.layers",
    ),
    "video_llama_3": (
        "model.vision_model.encoder.layers",
        "model.projector",
        "model.language_model.layers",
    ),
    "video_llava": (
        "model.video_tower.encoder.layers+model.image_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "vipllava": (
        "model.vision_tower.encoder.layers",
        "model.multi_modal_projector",
        "model.language_model.layers",
    ),
    "vision-encoder-decoder": (
        "encoder.layers",
        "",
        "decoder.bert.encoder.layer",
    ),
}


def hollow(kind):
    with torch.device("meta"):
        return AutoModelForMultimodalLM.from_config(CONFIG_MAPPING[kind]())


@pytest.mark.parametrize("kind", FOUND)
def test_the_parts_are_found(kind):
    body = anatomy(hollow(kind))
    assert tuple("+".join(body.family.paths(component)) for component in COMPONENTS) == FOUND[kind]
    assert {mark.path for mark in body.marks} == {path for c in COMPONENTS for path in body.family.paths(c)}


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("dots3_note", "model.audio_tower.layers"),
        ("qwen2_5_omni", "talker.model.layers"),
        ("qwen2_5_omni", "token2wav.code2wav_dit_model.transformer_blocks"),
        ("phi4_multimodal", "model.embed_tokens_extend.audio_embed.encoder.encoders"),
        ("pi0", "model.dit.layers"),
        ("kyutai_speech_to_text", "codec_model.encoder.encoder_transformer.layers"),
    ],
)
def test_parts_that_are_neither_stay_dense_and_are_listed(kind, part):
    body = anatomy(hollow(kind))
    assert not any(layer.name.startswith(f"{part}.") for layer in body.layers)
    reasons = {x.reason for x in body.skipped if x.name.startswith(f"{part}.") and x.name.endswith("proj.weight")}
    assert all("neither vision nor language" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("llama4", ("feed_forward.router",)),
        ("qwen3_5_moe", ("mlp.gate", "shared_expert_gate", "in_proj_a", "in_proj_b")),
        ("gemma4", ("per_layer_input_gate",)),
        ("dots3_note", ("mlp.gate", "indexer.wq_b", "indexer.weights_proj")),
        ("mistral_large4", ("indexer.wk",)),
        ("ernie4_5_vl_moe", ("text_moe.gate",)),
        ("glm5_next", ("forget_gate.f_a_proj", "b_proj")),
    ],
)
def test_routers_gates_and_indexers_are_never_pruned(kind, words):
    body = anatomy(hollow(kind))
    for word in words:
        assert not any(layer.name.endswith(f".{word}") for layer in body.layers), word
        assert any(x.name.endswith(f".{word}.weight") and x.reason == "router or gate" for x in body.skipped), word
    assert any(layer.name.endswith("q_proj") or "q_b_proj" in layer.name for layer in body.layers)


@pytest.mark.parametrize(
    ("kind", "tensor", "experts", "shape"),
    [
        ("aria", "model.language_model.layers.0.mlp.experts.down_proj", 8, (4096, 4096)),
        ("llama4", "language_model.model.layers.0.feed_forward.experts.gate_up_proj", 16, (16384, 5120)),
        ("llama4", "language_model.model.layers.0.feed_forward.experts.down_proj", 16, (5120, 8192)),
        ("inkling_mm_model", "model.language_model.layers.0.mlp.shared_experts.up_proj", 2, (3072, 6144)),
        ("nemotron_h_omni", "language_model.model.layers.1.mixer.experts.up_proj", 8, (7688, 4096)),
        ("step3p7", "model.language_model.layers.3.mlp.experts.gate_up_proj", 288, (2560, 4096)),
    ],
)
def test_experts_of_every_layout_are_layers(kind, tensor, experts, shape):
    layers = [layer for layer in anatomy(hollow(kind)).layers if layer.name.startswith(f"{tensor}.")]
    assert [layer.shape for layer in layers] == [shape] * experts


def test_a_missing_component_is_said():
    assert anatomy(hollow("fuyu")).missing == ("vision",)
    assert anatomy(hollow("llava")).missing == ()


def test_names_of_the_whole_model_say_nothing_of_its_parts():
    """`VideoLlava` is no vision model, and `VisionEncoderDecoder` has a decoder that is language."""
    found = discover(hollow("vision-encoder-decoder"))
    assert found.family.vision == ("encoder.layers",)
    assert found.family.language == ("decoder.bert.encoder.layer",)


class Mixer(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        return self.proj(x)


def strange(**parts):
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def test_lists_of_lists_sequences_and_unlike_blocks():
    nested = nn.ModuleList([nn.ModuleList([Mixer(), Mixer()]), nn.ModuleList([Mixer(16)])])
    other = type("Other", (Mixer,), {})
    model = strange(
        visual=strange(stages=nested, head=nn.Linear(8, 8)),
        projector=nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)),
        decoder=strange(blocks=nn.Sequential(Mixer(), other())),
    )
    family = discover(model).family
    assert family == Family(("visual.stages.0", "visual.stages.1"), ("projector",), ("decoder.blocks",))


def test_plain_lists_and_convolutions_are_no_blocks():
    model = strange(
        stem=nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)]),
        vision_adapter=strange(layers=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])),
        layers=nn.ModuleList([Mixer(), Mixer()]),
    )
    assert discover(model).family == Family((), ("vision_adapter",), ("layers",))


def test_a_family_replaces_what_it_names_and_the_rest_is_found():
    model, _ = zoo.build("llava")
    model.config.model_type = "llava_of_tomorrow"
    whole = anatomy(model)
    part = anatomy(model, Family.parse("language=model.language_model.layers"))
    assert part.family == whole.family
    reasons = {mark.path: mark.reason for mark in part.marks}
    assert reasons["model.language_model.layers"] == "`family`"
    assert "'projector'" in reasons["model.multi_modal_projector"]
    moved = anatomy(model, Family.parse("vision=model.vision_tower.encoder.layers+model.multi_modal_projector"))
    assert moved.family.connector == ()
    assert {layer.component for layer in moved.layers if "projector" in layer.name} == {"vision"}


def test_a_model_without_blocks_is_refused():
    model, _ = zoo.build("llava")
    model.model.vision_tower, model.model.language_model = nn.Linear(4, 4), nn.Linear(4, 4)
    with pytest.raises(SparsightError, match="no list of blocks with linear layers was found"):
        anatomy(model)
