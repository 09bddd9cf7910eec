"""The two demo models before training: real architectures and processors at a size that trains on two CPU cores.

InstructBLIP: its ViT, a Q-Former that reads the question, T5. LLaVA: a CLIP ViT, a two-layer projector, LLaMA. Both
look at 48 x 48 pixels in 16 patches. Tokenizers know whole words, lower-cased, so that decoding gives an answer back to
the letter.
"""

from typing import Any, TypeVar

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sparsight.demo.scenes import SIZE

M = TypeVar("M", bound=PreTrainedModel)
PATCH = 12
PATCHES = (SIZE // PATCH) ** 2
QUERIES = 12
VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
MEAN = STD = 0.25  # of a pixel in [0, 1]
LONGEST_ANSWER = 40  # tokens; a caption of four digits has 31 and an end

TEXT = """
0 1 2 3 4 5 6 7 8 9 red green blue yellow purple white top bottom left right above below of at the a an and or is are
in there here this that it how many what which where who when why color colors digit digits number numbers image picture
scene larger smaller largest smallest sum describe name say yes no one two three four user assistant system
? . , : ! ; ' -
"""
WORDS = TEXT.split()

# The template of llava-hf/llava-1.5-7b-hf in other words, with the end of sequence and markers around what is learnt.
LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set texts = [message['content']] -%}{%- set images = 0 -%}
{%- else -%}
{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}
{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT: ' -}}
{%- generation -%}{{- texts | join(' ') + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message['role'] | upper + ': ' + '<image>\\n' * images + texts | join(' ') + ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def tokenizer(
    template: str, special: dict[str, str], padding_side: str = "right", **extra: dict[str, str]
) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer; `template` is what is put around a text, `special` the tokens by role."""
    names = [*special.values(), "<image>"]
    vocabulary = {word: i for i, word in enumerate([*names, *WORDS])}
    # a round number of rows, so that every weight matrix divides into groups of eight
    vocabulary |= {f"<unused{i}>": i for i in range(len(vocabulary), -8 * (-len(vocabulary) // 8))}
    fast = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\d|[^\W\d]+|[^\w\s]"), "isolated")]
    )
    fast.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, vocabulary[name]) for name in names if name in template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        **special,
        **extra,
        padding_side=padding_side,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def instructblip_processor() -> InstructBlipProcessor:
    """Build the processor: text goes to T5 behind the image's query tokens, and to the Q-Former on its own."""
    t5 = tokenizer("$A </s>", {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
    bert = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    image = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    return InstructBlipProcessor(image, t5, tokenizer("[CLS] $A [SEP]", bert), num_query_tokens=QUERIES)


def llava_processor() -> LlavaProcessor:
    """Build the processor, with a chat template in the usual form `USER: <image>\\n... ASSISTANT: ...</s>`."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    image = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        image,
        tokenizer("<s> $A", special, "left", extra_special_tokens={"image_token": "<image>"}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def instructblip(processor: Any) -> InstructBlipForConditionalGeneration:
    """Build the model for a processor, with random weights from torch's generator."""
    words, former = processor.tokenizer, processor.qformer_tokenizer
    language = {
        "model_type": "t5",
        "vocab_size": len(words),
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 3,  # as many as in the decoder: the library sizes the decoder's cache by it
        "num_decoder_layers": 3,
        "num_heads": 4,
        "relative_attention_max_distance": 64,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
        "decoder_start_token_id": words.pad_token_id,
    }
    qformer = {
        "vocab_size": len(former),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": former.pad_token_id,
    }
    config = InstructBlipConfig(
        vision_config=VISION | {"initializer_range": 0.02},
        qformer_config=qformer,
        text_config=language,
        num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        model.query_tokens.normal_(std=0.5)  # zeros, as the library leaves them, would keep all queries the same
        model.language_model.lm_head.weight.normal_(std=128**-0.5)  # the library's 1.0 starts at a loss of 50
    return _greedy(model, words, decoder_start_token_id=words.pad_token_id)


def llava(processor: Any) -> LlavaForConditionalGeneration:
    """Build the model for a processor, with random weights from torch's generator."""
    words = processor.tokenizer
    language = {
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model", "hidden_act": "gelu", "projection_dim": 128},
        text_config=language,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return _greedy(LlavaForConditionalGeneration(config), words, bos_token_id=words.bos_token_id)


def _greedy(model: M, words: PreTrainedTokenizerFast, **ids: int) -> M:
    """Set how the model generates: greedily, up to the longest answer."""
    model.generation_config = GenerationConfig(
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        **ids,
    )
    return model


def build(kind: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a demo model of one kind (instructblip or llava) and its processor."""
    builders: dict[str, tuple[Any, Any]] = {
        "instructblip": (instructblip, instructblip_processor),
        "llava": (llava, llava_processor),
    }
    if kind not in builders:
        raise ValueError(f"no demo model {kind!r}: choose from {', '.join(builders)}")
    model, processor = builders[kind]
    words = processor()
    return model(words), words
