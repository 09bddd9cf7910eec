"""The zoo's tokenizers and chat templates.

Tokenizers are byte-level BPE, as GPT-2, OPT, Qwen and SmolVLM have it, or BPE with a word marker and byte fallback, as
T5, LLaMA and Gemma have it, so that any text survives encoding and decoding. Templates have the form of the families'
own. Import `zoo` first: it makes torchvision ready before transformers comes.
"""

from __future__ import annotations

from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

_WORDS = """
what which how many color colour shape is are the there a an of in on to left right above below and or not yes no red
green blue yellow black white circle square triangle star image picture question answer short describe this it USER
ASSISTANT User Assistant user assistant system model one two three four small large
"""

LLAVA = (
    "{% for message in messages %}{% if message.role == 'assistant' %}ASSISTANT: {% generation %}"
    "{{ message.content[0].text }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.role | upper }}: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{{ ':' if message.content[0].type == 'image' else ': ' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def t5_tokenizer() -> Any:
    specials = ["<pad>", "</s>", "<unk>"]
    return tokenizer(
        "words", specials, suffix="</s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def llama_tokenizer(**options: Any) -> Any:
    specials = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return tokenizer("words", specials, prefix="<s>", **roles, **options)


def opt_tokenizer() -> Any:
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    roles = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return tokenizer("bytes", specials, prefix="</s>", **roles)


def gemma_tokenizer(more: list[str], **roles: Any) -> Any:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *more]
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return tokenizer("words", specials, marker_first=False, padding_side="left", **names, **roles)


def tokenizer(
    style: str, specials: list[str], *, prefix: str = "", suffix: str = "", marker_first: bool = True, **roles: Any
) -> hf.PreTrainedTokenizerFast:
    """Make a fast tokenizer whose vocabulary starts with `specials`.

    `style` is "bytes" (GPT-2) or "words" (word marker, byte fallback); `prefix` and `suffix` are the special tokens
    put around every text; `roles` goes to the constructor (eos_token="</s>", ...).
    """
    marker = "Ġ" if style == "bytes" else "▁"
    if style == "bytes":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = BPE(specials, letters, marker)
        made = Tokenizer(core)
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    else:
        letters = [f"<0x{i:02X}>" for i in range(256)] + [chr(i) for i in range(33, 127)] + [marker]
        core = BPE(specials, letters, marker, unk_token="<unk>", byte_fallback=True)
        made = Tokenizer(core)
        scheme = "first" if marker_first else "never"
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=marker, prepend_scheme=scheme)
        steps = [decoders.Replace(marker, " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if marker_first else steps)
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    if prefix or suffix:
        around = [(token, made.token_to_id(token)) for token in (prefix, suffix) if token]
        single, pair = (f"{prefix} $A {suffix}".strip(), f"{prefix} $A $B:1 {suffix}".strip())
        made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=around)
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def BPE(specials: list[str], letters: list[str], marker: str, **options: Any) -> models.BPE:
    """Build a BPE model that knows every letter and, letter by letter, every word of `_WORDS`."""
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*specials, *letters]))}
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS.split():
        piece = marker
        for letter in word:
            merges.setdefault((piece, letter))
            piece += letter
            vocabulary.setdefault(piece, len(vocabulary))
    return models.BPE(vocab=vocabulary, merges=list(merges), **options)
